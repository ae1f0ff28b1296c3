"""From a prompt to its continuation."""
