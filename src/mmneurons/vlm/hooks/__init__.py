"""What listens to a model, or changes it, while it runs."""
