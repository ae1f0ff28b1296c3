"""From a text to a model."""
