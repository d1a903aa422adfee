"""Edits as data: patches of a few columns, applied and taken back exactly."""
