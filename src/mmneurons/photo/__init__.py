"""The photo model: a pre-trained language model that was given eyes, put together on first use.

`mmneurons.load("photo")` reads what lies in `folder()`.
"""

from mmneurons.photo.cache import folder as folder
