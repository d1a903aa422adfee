"""The photo model: a pre-trained language model that was given eyes, put together on first use from two packages."""
