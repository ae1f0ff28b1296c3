from . import style as style
from .report import write_pictures as write_pictures
