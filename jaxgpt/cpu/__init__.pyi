from . import kernel as kernel
from . import products as products
from . import sequences as sequences
