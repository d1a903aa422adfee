"""Find, inspect and edit the multi-modal neurons of vision-language models.

    import mmneurons as mmn
    vlm = mmn.load()                      # the pocket model; or mmn.load("llava-hf/llava-1.5-7b-hf")
    finding = mmn.find(vlm, "dog.png")

Names are imported when they are first used: reading a saved Finding needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmneurons import pocket as pocket
    from mmneurons.editing.edit import EditSettings as EditSettings
    from mmneurons.editing.edit import edit as edit
    from mmneurons.editing.export import export as export
    from mmneurons.editing.file import load_patch as load_patch
    from mmneurons.editing.file import save_patch as save_patch
    from mmneurons.editing.hallucination import DehallucinateSettings as DehallucinateSettings
    from mmneurons.editing.hallucination import dehallucinate as dehallucinate
    from mmneurons.editing.ledger import forget as forget
    from mmneurons.editing.patch import Patch as Patch
    from mmneurons.editing.reference import Reference as Reference
    from mmneurons.editing.reference import make_reference as make_reference
    from mmneurons.errors import MmneuronsError as MmneuronsError
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
    from mmneurons.neurons import Neuron as Neuron
    from mmneurons.report import write_report as write_report
    from mmneurons.vlm.doctor import doctor as doctor
    from mmneurons.vlm.interventions import Intervention as Intervention
    from mmneurons.vlm.interventions import intervene as intervene
    from mmneurons.vlm.load import load as load
    from mmneurons.vlm.recording import record as record
    from mmneurons.vlm.vlm import VLM as VLM

_HOMES = {
    "DehallucinateSettings": "mmneurons.editing.hallucination:DehallucinateSettings",
    "dehallucinate": "mmneurons.editing.hallucination:dehallucinate",
    "EditSettings": "mmneurons.editing.edit:EditSettings",
    "Reference": "mmneurons.editing.reference:Reference",
    "VLM": "mmneurons.vlm.vlm:VLM",
    "Finding": "mmneurons.finding.result:Finding",
    "Intervention": "mmneurons.vlm.interventions:Intervention",
    "MmneuronsError": "mmneurons.errors:MmneuronsError",
    "Neuron": "mmneurons.neurons:Neuron",
    "NeuronCard": "mmneurons.finding.lookup:NeuronCard",
    "NeuronFinding": "mmneurons.finding.result:NeuronFinding",
    "NounFinding": "mmneurons.finding.result:NounFinding",
    "WordNeurons": "mmneurons.finding.lookup:WordNeurons",
    "doctor": "mmneurons.vlm.doctor:doctor",
    "Patch": "mmneurons.editing.patch:Patch",
    "edit": "mmneurons.editing.edit:edit",
    "explain_neuron": "mmneurons.finding.lookup:explain_neuron",
    "export": "mmneurons.editing.export:export",
    "forget": "mmneurons.editing.ledger:forget",
    "find": "mmneurons.finding.finder:find",
    "intervene": "mmneurons.vlm.interventions:intervene",
    "load": "mmneurons.vlm.load:load",
    "load_findings": "mmneurons.finding.result:load",
    "load_patch": "mmneurons.editing.file:load_patch",
    "make_reference": "mmneurons.editing.reference:make_reference",
    "neurons_for": "mmneurons.finding.lookup:neurons_for",
    "pocket": "mmneurons.pocket",
    "record": "mmneurons.vlm.recording:record",
    "save_patch": "mmneurons.editing.file:save_patch",
    "save_findings": "mmneurons.finding.result:save",
    "write_report": "mmneurons.report:write_report",
}
__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mmneurons' has no attribute '{name}'")
    module, _, attribute = _HOMES[name].partition(":")
    try:
        loaded = importlib.import_module(module)
    except ImportError:
        from mmneurons.vlm.processors import check_torchvision

        check_torchvision()  # one that does not fit torch keeps transformers from being imported
        raise
    return getattr(loaded, attribute) if attribute else loaded


def __dir__() -> list[str]:
    return [*globals(), *__all__]
