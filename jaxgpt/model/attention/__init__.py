"""Causal scaled dot-product attention: one function for the model, several backends that compute it.
`__init__.pyi` lists what other modules may use."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
