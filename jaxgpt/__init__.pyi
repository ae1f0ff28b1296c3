# The headings and the order are those of the table of public names in the documentation.
# isort: skip_file

from .version import __version__ as __version__

# Models
from .config import GPTConfig as GPTConfig
from .model.gpt import GPT as GPT
from .model.gpt import TransformerBlock as TransformerBlock
from .model.gpt import MultiHeadAttention as MultiHeadAttention
from .model.gpt import FeedForward as FeedForward
from .model.gpt import LayerNorm as LayerNorm

# Text
from .generation.text import generate_text as generate_text
from .generation.text import stream as stream
from .generation.session import generate as generate
from .generation.session import GenerationResult as GenerationResult
from .generation.decode import scan_generate as scan_generate
from .generation.sampling import Greedy as Greedy
from .generation.sampling import Temperature as Temperature
from .generation.sampling import TopK as TopK
from .generation.sampling import TopP as TopP
from .generation.sampling import MinP as MinP
from .tokenizer import get_tokenizer as get_tokenizer
from .model.cache import Cache as Cache
from .generation.prepare import prepare as prepare
from .interpret import look_inside as look_inside
from .interpret import Inside as Inside

# Checkpoints
from .weights.formats import load as load
from .weights.formats import save as save

# Training
from .training.config import TrainConfig as TrainConfig
from .training.config import MeshConfig as MeshConfig
from .training.loop import train as train
from .training.loop import TrainResult as TrainResult
from .training.loop import load_run as load_run
from .training.evaluation import evaluate as evaluate
from .training.evaluation import Evaluation as Evaluation
from .parallel.sharding import make_mesh as make_mesh
from .parallel.sharding import shard as shard

# Errors
from .errors import ConfigError as ConfigError
from .errors import CheckpointError as CheckpointError
from .errors import DataError as DataError
from .errors import MissingExtraError as MissingExtraError
from .errors import TrainingError as TrainingError
from .errors import KernelError as KernelError
