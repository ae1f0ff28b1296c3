"""One program on many devices, and on many machines."""
