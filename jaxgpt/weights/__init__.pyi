from .formats import BUNDLED as BUNDLED
from .formats import FILE_FORMATS as FILE_FORMATS
from .formats import FORMATS as FORMATS
from .formats import load as load
from .formats import load_config as load_config
from .formats import save as save
from .huggingface import write_tokenizer as write_tokenizer
