"""The pocket model and its world: a real LLaVA of a few million parameters, shipped with the package.

Loads without torch; `mmneurons.load()` reads the weights in `folder()`.
"""

from mmneurons.pocket.samples import Sample as Sample
from mmneurons.pocket.samples import folder as folder
from mmneurons.pocket.samples import samples as samples
from mmneurons.pocket.scenes import BACKGROUNDS as BACKGROUNDS
from mmneurons.pocket.scenes import SIDE as SIDE
from mmneurons.pocket.scenes import Scene as Scene
from mmneurons.pocket.scenes import nouns as nouns
from mmneurons.pocket.scenes import scene as scene
