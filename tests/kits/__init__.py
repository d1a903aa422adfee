"""What tests are built from: models and processors of many families, forms of weights, ways to run a command."""

from . import typechecker as typechecker  # jaxtyping is told kits.typechecker.check, and imports kits alone
