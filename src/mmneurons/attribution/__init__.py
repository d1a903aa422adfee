"""Other ways to score neurons, to compare `find` with; ablation of neurons; and matched random neurons as controls."""
