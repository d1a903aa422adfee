"""The parts of a model that the maths needs: found by structure and one tiny forward pass, kept as data."""
