"""Load processors, which turn pictures and words into tensors, with torchvision or without it.

transformers refuses the processors of many families where torchvision is missing, because they could read videos too,
or because one of their modules takes a helper from torchvision. Pictures need neither: here the same processor class is
given the family's Pillow image processor and no video processor.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
import transformers  # its names are looked up where they are used: with a broken torchvision, looking them up fails
from transformers.utils.hub import cached_file

from mmneurons.errors import ModelError

VIDEO = "video_processor"
"""Name of the part of a processor that reads videos, which is left out here."""
REFUSALS = (ImportError, OSError, ValueError, TypeError, AttributeError, LookupError, RecursionError)
"""Errors that transformers raises where a processor cannot be loaded."""


class ImageAndTokenizer:
    """An image processor and a tokenizer side by side, for models whose picture and words go to different parts.

    Args:
        image_processor: Makes the encoder's inputs of pictures.
        tokenizer: Makes the decoder's inputs of words.
    """

    chat_template = None

    def __init__(self, image_processor: Any, tokenizer: Any) -> None:
        self.image_processor, self.tokenizer = image_processor, tokenizer

    def __call__(self, images: Any = None, text: Any = None, return_tensors: str = "pt", **options: Any) -> Any:
        """Encode pictures, words, or both; `options` go to the tokenizer."""
        made: dict[str, Any] = {}
        if images is not None:
            made |= self.image_processor(images, return_tensors=return_tensors)
        if text is not None:
            made |= self.tokenizer(text, return_tensors=return_tensors, **options)
        return transformers.BatchFeature(made)


def load_processor(
    source: str, *, model_type: str, revision: str | None = None, trust_remote_code: bool = False
) -> Any:
    """Load the processor that lies beside a model's weights.

    Args:
        source: A hub id or a folder.
        model_type: `config.model_type` of the model, for checkpoints that do not say which processor is theirs.
        revision: Passed to transformers.
        trust_remote_code: Passed to transformers.

    Returns:
        The family's own processor, or an `ImageAndTokenizer` if the family has none. Without torchvision it reads
        pictures by Pillow and cannot read videos.

    Raises:
        ModelError: if there is none, or it needs a package that is not installed.
    """
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        found = transformers.AutoProcessor.from_pretrained(source, **options)
    except REFUSALS as error:
        found = _without_torchvision(source, model_type, options, error)
    # transformers may return a part alone (an image processor or a tokenizer) where the family has no processor class.
    try:
        if not (hasattr(found, "image_processor") and hasattr(found, "tokenizer")):
            found = ImageAndTokenizer(*(_part(name, source, options) for name in ("image_processor", "tokenizer")))
        # Without its files transformers makes an empty tokenizer, silently.
        if not found.tokenizer("a dog", add_special_tokens=False).input_ids:
            raise ValueError("Its tokenizer knows no words: tokenizer.json is not there.")
    except REFUSALS as error:
        raise refusal(source, error) from error
    return found


def check_torchvision() -> None:
    """Refuse a torchvision that is installed but cannot be imported; it also keeps transformers from being imported.

    Raises:
        ModelError: if so, with the line that mends it.
    """
    if find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        raise ModelError(
            "torchvision is installed, but does not work with this torch; nothing can read pictures until it does.",
            seen=f"torch {torch.__version__}; import torchvision: {_said(error)}",
            fix=f"{_install_torchvision(force=True)}   or: pip uninstall torchvision",
        ) from error


def refusal(source: str, error: Exception) -> ModelError:
    """Return the error for a user whose processor cannot be loaded; `error` is what transformers raised.

    Raises:
        ModelError: if the cause is a torchvision that cannot be imported.
    """
    # A broken torchvision hides itself behind many errors, and is told before whatever else this one says.
    check_torchvision()
    package = missing_package(error)
    # transformers takes a tokenizer that it cannot read for one of tiktoken.
    if package == "tiktoken" and _has_sentencepiece(source) and not is_installed("sentencepiece"):
        package = "sentencepiece protobuf"
    if package == "torchvision":
        return ModelError(
            f"The processor of '{source}' needs torchvision, which is not installed.",
            seen=_said(error),
            fix=f"{_install_torchvision()}   (of the version that fits torch {torch.__version__})\n"
            'Or do without a processor: inputs={"input_ids": ..., "pixel_values": ...}, tensors made elsewhere.',
        )
    if package:
        return ModelError(
            f"The processor of '{source}' needs {_packages(package)}.",
            seen=_said(error),
            fix=f"pip install {package}",
        )
    return ModelError(
        f"Cannot load the processor of '{source}'.",
        seen=_said(error),
        fix='Name the model that this one was made from: load(model, processor="hub/id")    CLI: --processor hub/id\n'
        f"Or put its processor beside the weights: AutoProcessor.from_pretrained(...).save_pretrained('{source}')",
    )


def _without_torchvision(source: str, model_type: str, options: dict[str, Any], error: Exception) -> Any:
    """Load the same processor by Pillow alone, if torchvision was all that was missing."""
    if find_spec("torchvision") is not None:
        raise refusal(source, error) from error
    # Only a class that wants a video processor, or that transformers hides without torchvision, can have failed for
    # that.
    name = _class_name(source, model_type, options) or ""
    kind = _processor_class(name)
    if kind is None or (VIDEO not in _attributes(kind) and not _is_hidden(name)):
        raise refusal(source, error) from error
    try:
        if VIDEO not in _attributes(kind):
            return kind.from_pretrained(source, **options)
        # `from_pretrained` would load the video processor: the parts are loaded one by one and put together.
        stored, _ = kind.get_processor_dict(source, **options)
        parts = [_part(name, source, options) for name in _attributes(kind)]
        return _images_only(kind).from_args_and_dict(parts, stored)
    except REFUSALS as second:
        # Some classes cannot do without a video processor, and meet a None: then torchvision is what is missing.
        cause = error if isinstance(second, AttributeError) and "NoneType" in str(second) else second
        raise refusal(source, cause) from cause


def _class_name(source: str, model_type: str, options: dict[str, Any]) -> str | None:
    """Return the name of the processor class, from the places where AutoProcessor looks, in its order."""
    auto = transformers.models.auto
    readers = (
        lambda: transformers.ProcessorMixin.get_processor_dict(source, **options)[0],
        lambda: transformers.image_processing_base.ImageProcessingMixin.get_image_processor_dict(source, **options)[0],
        lambda: auto.tokenization_auto.get_tokenizer_config(source, **options),
    )
    for read in readers:
        try:
            name = read().get("processor_class")
        except (OSError, ValueError):
            continue
        if name:
            return name
    return _class_names().get(model_type)


def _class_names() -> Mapping[str, str | None]:
    """Return the name of the processor class of each type of model, as transformers lists them."""
    return transformers.models.auto.processing_auto.PROCESSOR_MAPPING_NAMES  # pyright: ignore[reportPrivateImportUsage]


def _attributes(kind: Any) -> list[str]:
    """Return the names of the parts that a processor is made of; transformers 4 lists them on the class."""
    return kind.get_attributes() if hasattr(kind, "get_attributes") else kind.attributes


def _is_hidden(name: str) -> bool:
    """Whether transformers shows a dummy in place of this class, since torchvision is missing."""
    found = transformers.models.auto.processing_auto.processor_class_from_name(name)
    return getattr(found, "is_dummy", False)


def _processor_class(name: str) -> Any:
    """Return the processor class of this name, also if transformers hides it, or None if it is not there."""
    auto = transformers.models.auto
    if not _is_hidden(name):
        return auto.processing_auto.processor_class_from_name(name) if name else None
    # A hidden class is still in its family's module, which can be imported if that module finds what it asks for.
    for model_type, known in _class_names().items():
        if known == name:
            family = auto.configuration_auto.model_type_to_module_name(model_type)
            try:
                with _pillow_module(family):
                    module = importlib.import_module(f"transformers.models.{family}.processing_{family}")
            except ImportError:
                continue
            if hasattr(module, name):
                return getattr(module, name)
    return None


@contextmanager
def _pillow_module(family: str) -> Iterator[None]:
    """Put a family's Pillow module in the place of its torchvision module inside the `with`, for imports of helpers."""
    package = f"transformers.models.{family}"
    wanted = f"{package}.image_processing_{family}"
    if wanted in sys.modules:
        yield
        return
    sys.modules[wanted] = importlib.import_module(f"{package}.image_processing_pil_{family}")
    try:
        yield
    finally:
        del sys.modules[wanted]


def _part(name: str, source: str, options: dict[str, Any]) -> Any:
    """Load one of the parts that a processor is made of; None for videos."""
    if name == VIDEO:
        return None
    if name == "image_processor":
        return transformers.AutoImageProcessor.from_pretrained(source, **options)
    if name == "feature_extractor":
        return transformers.AutoFeatureExtractor.from_pretrained(source, **options)
    folder = {} if name == "tokenizer" else {"subfolder": name}
    return transformers.AutoTokenizer.from_pretrained(source, **folder, **options)


def _images_only(kind: Any) -> Any:
    """Make a processor class like this one that accepts None as its video processor."""

    class ImagesOnly(kind):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name == VIDEO and argument is None:
                return None
            return super().check_argument_for_proper_class(argument_name, argument)

    # Under the name of the original, by which transformers and users know it.
    ImagesOnly.__name__ = ImagesOnly.__qualname__ = kind.__name__
    return ImagesOnly


def missing_package(error: BaseException) -> str | None:
    """Return the package that an error says is missing, as pip calls it, or None if what it names is installed."""
    text = str(error)
    if "torchvision" in text.casefold():
        return "torchvision" if find_spec("torchvision") is None else None
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("transformers"):
        return error.name.partition(".")[0]
    for pattern in (
        r"pip install (?:-U |--upgrade )?'?([\w-]+)",
        r"requires (?:the )?`?(\w+)`?(?: library|$|\.|,| to be)",
    ):
        if (found := re.search(pattern, text)) and not is_installed(found[1]):
            return found[1].lower()
    return None


def _has_sentencepiece(source: str) -> bool:
    """Whether a checkpoint's tokenizer.model is of SentencePiece: its files begin with the tag of their first field."""
    try:
        found = cached_file(source, "tokenizer.model", local_files_only=True)
    except OSError:
        return False
    return found is not None and Path(found).read_bytes()[:1] == b"\n"


def _packages(names: str) -> str:
    """Write which packages are missing."""
    if " " not in names:
        return f"the package {names}, which is not installed"
    return f"the packages {names.replace(' ', ' and ')}, which are not installed"


def is_installed(package: str) -> bool:
    """Whether a package of this name, as pip calls it, is installed."""
    try:
        metadata.distribution(package)
    except metadata.PackageNotFoundError:
        return find_spec(package.replace("-", "_")) is not None
    return True


def _install_torchvision(*, force: bool = False) -> str:
    """Return the line that installs a torchvision built for this torch: +cpu and +cu130 have an index of their own."""
    build = torch.__version__.partition("+")[2]
    index = f" --index-url https://download.pytorch.org/whl/{build}" if build else ""
    return f"pip install {'--force-reinstall --no-deps ' if force else ''}torchvision{index}"


def _said(error: BaseException) -> str:
    """Return an error's message on one line, cut off at 400 characters."""
    return shorten(str(error), 400) or type(error).__name__
