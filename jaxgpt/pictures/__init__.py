"""Pictures, with the extra [plot]: of a model and what it does with a text (`report`), of training runs (`curves`)."""
