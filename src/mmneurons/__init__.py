"""Find, inspect and edit the multi-modal neurons of vision-language models.

    import mmneurons as mmn
    vlm = mmn.load()                      # the pocket model; or mmn.load("llava-hf/llava-1.5-7b-hf")
    finding = mmn.find(vlm, "dog.png")

Names are imported when they are first used: reading a saved Finding needs no torch.
"""

from __future__ import annotations

import ast
import importlib
import sys
from inspect import getsource as _source  # by another name: `inspect` is one of ours
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # each public name once: a type checker reads these lines, and so does `_homes`
    __version__: str
    from mmneurons import pocket as pocket
    from mmneurons.atlas.atlas import Atlas as Atlas
    from mmneurons.atlas.atlas import ImagePage as ImagePage
    from mmneurons.atlas.atlas import NeuronPage as NeuronPage
    from mmneurons.attribution.finders import finder_scores as finder_scores
    from mmneurons.data.dataset import Item as Item
    from mmneurons.data.dataset import read_items as read_items
    from mmneurons.data.run import Run as Run
    from mmneurons.editing.dehallucinate import chair_change as chair_change
    from mmneurons.editing.dehallucinate import dehallucinate as dehallucinate
    from mmneurons.editing.evaluate import Before as Before
    from mmneurons.editing.evaluate import Bench as Bench
    from mmneurons.editing.evaluate import evaluate as evaluate
    from mmneurons.editing.reference import Reference as Reference
    from mmneurons.editing.reference import default_reference as default_reference
    from mmneurons.editing.reference import make_reference as make_reference
    from mmneurons.errors import MmneuronsError as MmneuronsError
    from mmneurons.finding.calibration import Calibration as Calibration
    from mmneurons.finding.checking import Checked as Checked
    from mmneurons.finding.checking import check as check
    from mmneurons.finding.finder import find as find
    from mmneurons.finding.lookup import NeuronCard as NeuronCard
    from mmneurons.finding.lookup import WordNeurons as WordNeurons
    from mmneurons.finding.lookup import explain_neuron as explain_neuron
    from mmneurons.finding.lookup import neurons_for as neurons_for
    from mmneurons.finding.result import Finding as Finding
    from mmneurons.finding.result import NeuronFinding as NeuronFinding
    from mmneurons.finding.result import NounFinding as NounFinding
    from mmneurons.finding.result import load as load_findings  # noqa: F401
    from mmneurons.finding.result import save as save_findings  # noqa: F401
    from mmneurons.inspection.causal import causal as causal
    from mmneurons.inspection.faithfulness import finder_truth as finder_truth
    from mmneurons.inspection.run import inspect as inspect
    from mmneurons.inspection.sensitivity import sensitivity as sensitivity
    from mmneurons.methods import edit as edit
    from mmneurons.metrics.chair import Vocabulary as Vocabulary
    from mmneurons.metrics.chair import chair as chair
    from mmneurons.metrics.chair import pope as pope
    from mmneurons.metrics.grounding import calibrate as calibrate
    from mmneurons.neurons import Neuron as Neuron
    from mmneurons.patches.describe import describe_patch as describe_patch
    from mmneurons.patches.export import export as export
    from mmneurons.patches.ledger import forget as forget
    from mmneurons.patches.patch import Patch as Patch
    from mmneurons.report import write_report as write_report
    from mmneurons.settings import DehallucinateSettings as DehallucinateSettings
    from mmneurons.settings import EditSettings as EditSettings
    from mmneurons.settings import FindSettings as FindSettings
    from mmneurons.settings import InspectSettings as InspectSettings
    from mmneurons.settings import Question as Question
    from mmneurons.settings import SweepSettings as SweepSettings
    from mmneurons.sweeping.by_ray import Actors as Actors
    from mmneurons.sweeping.sweep import sweep as sweep
    from mmneurons.vlm.doctor import doctor as doctor
    from mmneurons.vlm.hooks.interventions import Intervention as Intervention
    from mmneurons.vlm.hooks.interventions import intervene as intervene
    from mmneurons.vlm.hooks.recording import record as record
    from mmneurons.vlm.load import load as load
    from mmneurons.vlm.vlm import VLM as VLM
    from mmneurons.web.launch import app as app


def _homes() -> dict[str, tuple[str, str]]:
    """Where each public name comes from: the module and the name in it, as the imports above say."""
    (block,) = (node for node in ast.parse(_source(sys.modules[__name__])).body if isinstance(node, ast.If))
    imports = (node for node in block.body if isinstance(node, ast.ImportFrom))
    return {alias.asname or alias.name: (node.module or "", alias.name) for node in imports for alias in node.names}


_HOMES = _homes()
__all__ = ["__version__", *sorted(_HOMES)]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib import metadata  # slow to import, and seldom asked for

        return metadata.version(__name__)
    if name not in _HOMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    module, attribute = _HOMES[name]
    try:
        if module == __name__:
            return importlib.import_module(f"{module}.{attribute}")
        return getattr(importlib.import_module(module), attribute)
    except ImportError:
        from mmneurons.vlm.processors import check_torchvision

        check_torchvision()  # one that does not fit torch keeps transformers from being imported
        raise


def __dir__() -> list[str]:
    return [*globals(), *__all__]
