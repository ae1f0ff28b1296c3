from .likelihood import Score as Score
from .likelihood import score as score
