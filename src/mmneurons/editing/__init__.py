"""Editing makes patches: changes of a few columns, as data, that are applied and taken back exactly."""
