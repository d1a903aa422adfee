"""What activations are compared with, so that a score tells what is due to this picture: a blank one, or others.

contribution = (activation - baseline activation) . column . direction is as additive as it is without: summed over all
neurons it is what the FFNs wrote into the logit, less what they would have written with the baseline's activations.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mmneurons.errors import SettingError
from mmneurons.finding.scoring import Target, scored_activations
from mmneurons.settings import FindSettings, MeanActivations
from mmneurons.vlm.traces import Trace
from mmneurons.vlm.vlm import VLM


def baseline_of(
    vlm: VLM, targets: Sequence[Target], choices: FindSettings, grey: Trace | None
) -> list[Float[Tensor, "targets _"]] | None:
    """What each neuron's activation is compared with, per FFN, of all its experts; None: with zero.

    Args:
        vlm: The model.
        targets: The words.
        choices: Which baseline is asked for.
        grey: The state where the same words are read with a blank image; wanted by "blank".

    Raises:
        SettingError: there is no picture to leave out, or the reference says no other noun.
        ModelError: the reference was made with other weights.
    """
    if choices.baseline == "zero":
        return None
    if isinstance(choices.baseline, MeanActivations):
        return _means(vlm, choices.baseline, targets, choices)
    if grey is None:
        raise SettingError(
            "A prompt without a picture has no blank one to compare with.",
            fix='baseline="zero"    CLI: --baseline zero',
        )
    return scored_activations(grey.of_all_experts(), choices)


def _means(
    vlm: VLM, reference: MeanActivations, targets: Sequence[Target], choices: FindSettings
) -> list[Float[Tensor, "targets _"]]:
    """Of each word the mean activations where the reference says other nouns."""
    lemmas = list(dict.fromkeys(target.word.lemma for target in targets))
    known = {lemma: reference.mean_at_other_nouns(vlm, lemma, choices.tagger) for lemma in lemmas}
    return [torch.stack([known[target.word.lemma][i] for target in targets]) for i in range(len(vlm.anatomy.ffns))]
