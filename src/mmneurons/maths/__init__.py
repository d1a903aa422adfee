"""Pure functions on tensors and arrays: no models, no files."""
