"""Pictures and data sets as users bring them, and results kept by what they were made of; no torch."""
