"""How types and shapes are checked while tests run."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
"""An int is taken for a float, as type checkers do."""
