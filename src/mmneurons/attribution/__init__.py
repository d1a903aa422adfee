"""The ways to find neurons that `find` is compared with, ablation, and matched controls."""
