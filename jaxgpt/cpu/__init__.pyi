from . import kernel as kernel
from . import products as products
