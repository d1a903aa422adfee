"""What LoRA and the output-layer references have in common: they change no columns, so no file keeps them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from mmneurons.errors import SettingError


class AppliedOnly:
    """A change that is no patch: it lasts as long as `with change.applied(vlm):` does.

    Whoever takes it for a patch is told so in words; a type checker knows none of these methods, and refuses them.
    """

    changes: ClassVar[str]
    """What it changes in the place of columns."""

    if not TYPE_CHECKING:

        def _no_patch(self, *args: Any, **options: Any) -> NoReturn:
            raise SettingError(
                "This change is no patch: it cannot be saved, exported, stacked, or left on the model.",
                seen=f"It changes {self.changes}, and no columns that a patch could name.",
                fix="Use it inside `with change.applied(vlm):`, or make a patch: method='finetune' or 'rome'.",
            )

        save = push_to_hub = apply = revert = __add__ = __radd__ = _no_patch
