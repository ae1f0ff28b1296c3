"""How fast and how sound this machine runs the model."""
