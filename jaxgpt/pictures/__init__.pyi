from . import style as style
from .report import write_comparison as write_comparison
from .report import write_pictures as write_pictures
