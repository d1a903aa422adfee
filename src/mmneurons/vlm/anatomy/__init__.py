"""The anatomy of a model: the parts that the formulas need, found by structure and one tiny forward pass."""
