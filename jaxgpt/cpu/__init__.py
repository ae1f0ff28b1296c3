"""Forms of the model's arithmetic that run well on a CPU."""
