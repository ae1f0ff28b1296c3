"""jaxgpt: GPT-2 in JAX and Flax, with parameters as a plain pytree that is passed explicitly.

`__init__.pyi` lists the public names. Each is imported on first use, so that code that needs no arrays does not wait
for JAX.
"""

import lazy_loader

from jaxgpt.version import __version__ as __version__

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
