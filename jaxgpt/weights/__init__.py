"""Checkpoints: every layout in, and out."""
