"""Draws a model and what it does with a text; needs the extra [plot]. `__init__.pyi` lists what other packages may
use."""

import lazy_loader

from jaxgpt.errors import require

# Checked here, before any module of this package is imported.
require("matplotlib", "plot", "drawing")

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
