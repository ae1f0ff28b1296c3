"""What a model needs on a TPU pod slice, with no TPU at hand."""
