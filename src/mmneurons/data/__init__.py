"""Images, masks and data sets as users bring them, and stores of results kept by what they were made of; no torch."""
