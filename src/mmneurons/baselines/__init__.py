"""Other ways to edit, for comparison."""
