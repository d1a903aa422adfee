"""The pocket model and its world of drawings: a real LLaVA of a few million parameters, shipped with the package.

The package itself needs no torch; `mmneurons.load()` reads the weights in `folder()`.
"""

from mmneurons.pocket.facts import facts as facts
from mmneurons.pocket.samples import Sample as Sample
from mmneurons.pocket.samples import folder as folder
from mmneurons.pocket.samples import samples as samples
from mmneurons.pocket.scenes import BACKGROUNDS as BACKGROUNDS
from mmneurons.pocket.scenes import SIDE as SIDE
from mmneurons.pocket.scenes import Scene as Scene
from mmneurons.pocket.scenes import nouns as nouns
from mmneurons.pocket.scenes import scene as scene
from mmneurons.pocket.sets import EDIT_PAIRS as EDIT_PAIRS
from mmneurons.pocket.sets import EditPair as EditPair
from mmneurons.pocket.sets import EditSet as EditSet
from mmneurons.pocket.sets import EvaluationSet as EvaluationSet
from mmneurons.pocket.sets import Question as Question
from mmneurons.pocket.sets import edit_set as edit_set
from mmneurons.pocket.sets import evaluation_set as evaluation_set
from mmneurons.pocket.sets import pope as pope
