"""Pictures, with the extra [plot]: of a model and what it does with a text (`report`), of training runs (`curves`)."""

from jaxgpt.errors import require

# Here, before any module of this package imports from it.
require("matplotlib", "plot", "drawing")
