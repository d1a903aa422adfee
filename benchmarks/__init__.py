"""What the package costs, and how good it is: run as modules from the root of the repository."""
