"""Pictures of a model and of what it does with a text, with the extra [plot]. What other rooms may use of it is in
`__init__.pyi`."""

import lazy_loader

from jaxgpt.errors import require

# Here, before any module of this package is imported.
require("matplotlib", "plot", "drawing")

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
