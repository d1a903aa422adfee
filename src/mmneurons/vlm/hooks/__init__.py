"""Hooks that record what a model does, or change it, while it runs."""
