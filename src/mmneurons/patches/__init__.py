"""Patches are edits as data; here are their files, the ledger of what is applied, and checkpoints that contain them."""
