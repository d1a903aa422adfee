"""Edits as data: patches, their files, the ledger of what is applied, checkpoints with them inside."""
