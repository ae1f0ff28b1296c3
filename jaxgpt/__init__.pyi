# The headings and the order are those of the table of public names in the documentation.
# isort: skip_file

from .version import __version__ as __version__

# Models
from .config import GPTConfig as GPTConfig
from .config import ComputeConfig as ComputeConfig
from .model import GPT as GPT
from .model import TransformerBlock as TransformerBlock
from .model import MultiHeadAttention as MultiHeadAttention
from .model import FeedForward as FeedForward
from .model import LayerNorm as LayerNorm

# Text
from .generation import generate_text as generate_text
from .generation import stream as stream
from .generation import generate as generate
from .generation import GenerationResult as GenerationResult
from .generation import Logprobs as Logprobs
from .generation import beam_search as beam_search
from .generation import BeamSearchResult as BeamSearchResult
from .generation import scan_generate as scan_generate
from .generation import Greedy as Greedy
from .generation import Temperature as Temperature
from .generation import TopK as TopK
from .generation import TopP as TopP
from .generation import MinP as MinP
from .generation import RepetitionPenalty as RepetitionPenalty
from .generation import PresencePenalty as PresencePenalty
from .generation import FrequencyPenalty as FrequencyPenalty
from .generation import NoRepeatNgram as NoRepeatNgram
from .generation import BadWords as BadWords
from .generation import LogitBias as LogitBias
from .generation import MinNewTokens as MinNewTokens
from .tokenizer import get_tokenizer as get_tokenizer
from .model import Cache as Cache
from .generation import prepare as prepare
from .description import describe as describe
from .scoring import score as score
from .scoring import Score as Score
from .scoring import LMEvalModel as LMEvalModel
from .interpret import look_inside as look_inside
from .interpret import Inside as Inside

# Checkpoints
from .training import load as load
from .weights import save as save
from .weights import write_gguf as write_gguf
from .model import resize_embeddings as resize_embeddings

# Training
from .training import TrainConfig as TrainConfig
from .parallel import MeshConfig as MeshConfig
from .training import train as train
from .training import TrainResult as TrainResult
from .training import load_run as load_run
from .training import evaluate as evaluate
from .training import Evaluation as Evaluation
from .parallel import make_mesh as make_mesh
from .parallel import shard as shard

# Errors
from .errors import ConfigError as ConfigError
from .errors import CheckpointError as CheckpointError
from .errors import DataError as DataError
from .errors import MissingExtraError as MissingExtraError
from .errors import TrainingError as TrainingError
from .errors import OutOfMemoryError as OutOfMemoryError
from .errors import KernelError as KernelError
