"""The book's chapter 4: the GPT, and the arithmetic under it."""
