"""The processor of a model that reads images: pixels from pictures, and the tokens that stand for each of them.

processor = load_processor(source, tokenizer)      around our own tokenizer; for images alone
copy_processor(source, folder)                     its files as published, into a checkpoint

Images are resized by Pillow, so that a run needs no torchvision, whose published builds fit one kind of torch alone;
transformers' processors also handle videos, for which several need it. Those parts are left out.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forgebook.errors import ModelError
from forgebook.models.tokenizer import locate, readable_model_errors, refuse_own_code

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from forgebook.config.schema import FinetuneConfig

__all__ = ["copy_processor", "load_processor", "processor_of", "processor_source", "reads_images"]

# What a checkpoint needs of them beside its tokenizer, which saves the chat template.
FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
PIXTRAL = "transformers.models.pixtral.image_processing_{}pixtral"


def reads_images(source: str) -> bool:
    """Report whether a model reads images, as transformers names its architecture."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as READS_IMAGES

    with readable_model_errors(source, "model"):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    return config.model_type in READS_IMAGES


def load_processor(source: str, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Load the processor of a model around its loaded tokenizer.

    Raises ModelError for a model that reads no images, or whose processor does not say which token stands for one.
    """
    from transformers import AutoImageProcessor
    from transformers.processing_utils import ProcessorMixin

    if not reads_images(source):
        raise ModelError(f"{source!r} reads no images, which vision_language_config needs: choose a model that does")
    if Path(source).is_dir():
        refuse_own_code(Path(source))
    with readable_model_errors(source, "image processor"):
        settings, _ = ProcessorMixin.get_processor_dict(source)
        image_processor = AutoImageProcessor.from_pretrained(source, backend="pil", trust_remote_code=False)
        kind: Any = _processor_class(source, settings)
        parts = {"tokenizer": tokenizer, "image_processor": image_processor}
        with _for_images(kind):
            processor = kind.from_args_and_dict([parts.get(name) for name in kind.get_attributes()], settings)
    if not isinstance(getattr(processor, "image_token", None), str):
        raise ModelError(f"{kind.__name__} does not say which token stands for an image, so {source!r} cannot be used")
    return processor


def _processor_class(source: str, settings: dict[str, Any]) -> type:
    """Find the class that the files name, else the one of the model's architecture."""
    from transformers import AutoConfig, AutoImageProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES, model_type_to_module_name

    kinds: dict[str, Any] = dict(PROCESSOR_MAPPING_NAMES)
    named = settings.get("processor_class")
    named = named or AutoImageProcessor.get_image_processor_dict(source)[0].get("processor_class")
    model_type = AutoConfig.from_pretrained(source, trust_remote_code=False).model_type
    named = named or kinds.get(model_type)
    for family, name in kinds.items():
        module = model_type_to_module_name(family)
        path = f"transformers.models.{module}.processing_{module}"
        if name == named and importlib.util.find_spec(path) is not None:
            if module == "pixtral":
                _without_torchvision()
            return getattr(importlib.import_module(path), name)
    raise ModelError(f"transformers has no processor for {source!r} (model type {model_type}, {named})")


def _without_torchvision() -> None:
    """Let Pixtral's processor take a function of sizes from its Pillow twin where torchvision is missing."""
    from transformers.utils.import_utils import is_torchvision_available

    if not is_torchvision_available():
        sys.modules.setdefault(PIXTRAL.format(""), importlib.import_module(PIXTRAL.format("pil_")))


@contextlib.contextmanager
def _for_images(kind: Any) -> Iterator[None]:
    """Let a processor be made without the part for videos."""
    module, own = sys.modules[kind.__module__], kind.__dict__.get("check_argument_for_proper_class")
    if getattr(module, "num2words", "") is None:  # SmolVLM spells a video's number of frames with it
        module.num2words = str  # type: ignore[attr-defined]
    check = kind.check_argument_for_proper_class
    kind.check_argument_for_proper_class = lambda self, name, part: None if part is None else check(self, name, part)
    try:
        yield
    finally:
        if own is None:
            del kind.check_argument_for_proper_class
        else:
            kind.check_argument_for_proper_class = own


def processor_source(config: FinetuneConfig) -> str:
    """Return where a run's processor comes from: its base model."""
    return locate(config.initial_base_model_ckpt_path or config.model_id)


def processor_of(config: FinetuneConfig, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Load the processor that a config trains with, around its tokenizer; None for a task without images."""
    return None if config.vision_language_config is None else load_processor(processor_source(config), tokenizer)


def copy_processor(source: str, folder: Path) -> None:
    """Copy the files of a model's processor as they were published, so that a checkpoint loads without its base."""
    from transformers.utils import cached_file

    for name in FILES:
        found = cached_file(
            source, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
        )
        if found is not None and not (folder / name).exists():
            shutil.copyfile(found, folder / name)
