"""Estimates what a model needs on a TPU pod slice or on nodes of GPUs, with none at hand. `__init__.pyi` lists what
other packages may use."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
