"""Tokenizers, and where a model's files are: a local folder, a hub id, s3:// or gs://. Imports no torch.

source    = locate(config.model_id)               a local folder or a hub id
tokenizer = load_tokenizer(source)
tokenizer = tokenizer_of(config)                  with the labels of a classifier
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forgebook.catalog import TINY_MODEL, hub_id_of, model_folder, read_catalog
from forgebook.config.blocks import labels_of
from forgebook.errors import ForgebookError, ModelError, first_line, near_miss
from forgebook.models.template_settings import set_template_defaults
from forgebook.runs.atomic import read_json
from forgebook.runs.checksums import check_files
from forgebook.runs.download import fetch_folder
from forgebook.runs.object_store import is_remote

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from forgebook.config.blocks import HubRepo, WeightsPath
    from forgebook.config.schema import FinetuneConfig

__all__ = [
    "copy_of",
    "is_here",
    "label_pieces",
    "load_tokenizer",
    "locate",
    "readable_model_errors",
    "refuse_own_code",
    "refuse_pickled",
    "tokenizer_of",
    "tokenizer_source",
]

CODE_REFUSED = (
    "{source!r} needs Python code from its own repository, which is never run here: choose a model whose architecture "
    "is part of transformers"
)
PICKLE_REFUSED = (
    "the weights of {source!r} are pickled ({files}), and loading a pickle can run code: convert them to safetensors "
    "(https://huggingface.co/spaces/safetensors/convert), or choose a model that has them"
)
PICKLES = ("pytorch_model*.bin", "adapter_model*.bin", "consolidated*.pth", "*.ckpt", "*.pt")


def locate(model: str | HubRepo) -> str:
    """Turn a config's model path, URI, hub id or {repo_id: ...} into what `from_pretrained` takes.

    Raises StorageError for a URI or path with nothing there, ModelError if the hub cannot be reached.
    """
    if not isinstance(model, str):
        is_any = model.revision is None  # a mirror does not record which revision it holds
        return locate(model.repo_id) if is_any and hub_id_of(model_folder(model.repo_id)) else _fetch_repo(model)
    if model == "tiny":
        return str(TINY_MODEL)
    looks_local = model.startswith((".", "/", "~")) or Path(model).is_dir()
    if is_remote(model) or looks_local:
        return str(fetch_folder(model).resolve())
    return copy_of(model)


def copy_of(model: str) -> str:
    """Return the folder of a hub's model in a mirror on this machine; the name as it is where there is none."""
    folder = model_folder(model)
    return str(folder) if hub_id_of(folder) else model


def is_here(model: str) -> bool:
    """Report whether a model's config can be read without the hub: in a folder, a mirror or the hub's own cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if is_remote(model) or model_folder(model).is_dir():
        return True
    try:
        return isinstance(try_to_load_from_cache(model, "config.json"), str)
    except HFValidationError:  # a path, of a folder that is not there
        return False


def _fetch_repo(repo: HubRepo) -> str:
    """Download a repository's snapshot from the hub, once; return its folder."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return snapshot_download(repo.repo_id, revision=repo.revision)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(f"{repo.repo_id} could not be fetched from the hub: {first_line(error)}") from None


def tokenizer_source(model_id: str, *starts: WeightsPath | None) -> str:
    """Return where the tokenizer comes from: the first of the checkpoints that has one, else the base model.

    starts: the checkpoints that a run continues, the adapter first.
    """
    for start in starts:
        if start is not None:
            source = locate(start)
            if (Path(source) / "tokenizer_config.json").exists():
                return source
    return locate(model_id)


def tokenizer_of(config: FinetuneConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer that a config trains with: a classifier's labels are tokens, the template has its settings."""
    source = tokenizer_source(
        config.model_id, config.initial_adapter_model_ckpt_path, config.initial_base_model_ckpt_path
    )
    tokenizer = load_tokenizer(source, labels_of(config.classifier_config))
    set_template_defaults(tokenizer, config.generation_config.chat_template_kwargs)
    return tokenizer


def label_pieces(tokenizer: PreTrainedTokenizerBase, labels: Sequence[str]) -> dict[int, list[int]]:
    """Map the id of each new label to the ids of its text, as the tokenizer splits it without the label.

    tokenizer: as `load_tokenizer` returned it, with the labels.
    """
    if not labels:
        return {}
    plain = load_tokenizer(tokenizer.name_or_path)
    numbers = tokenizer.convert_tokens_to_ids(list(labels))
    pieces = {
        number: plain(text, add_special_tokens=False)["input_ids"] for number, text in zip(numbers, labels, strict=True)
    }
    return {number: ids for number, ids in pieces.items() if ids != [number]}


def load_tokenizer(source: str, labels: Sequence[str] = ()) -> PreTrainedTokenizerBase:
    """Load a fast tokenizer that pads on the right; add a token for each label that it lacks. Raises ModelError."""
    from tokenizers import AddedToken
    from transformers import AutoTokenizer

    check_files(source, with_weights=False)
    with readable_model_errors(source, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    if not tokenizer.is_fast:
        raise ModelError(f"the tokenizer of {source} has no fast version, whose character offsets the loss mask needs")
    if template := _processor_template(source, tokenizer.chat_template is None):
        tokenizer.chat_template = template
    if tokenizer.pad_token is None:
        # Masks go by position, so padding with the end token hides no end token.
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    # Not "special" tokens: they are answers, and must show when text is decoded. Words are a label only as a whole.
    for label in labels:
        is_word = label[:1].isalnum() or label[-1:].isalnum()
        tokenizer.add_tokens([AddedToken(label, normalized=False, single_word=is_word)])
    return tokenizer


def _processor_template(source: str, is_needed: bool) -> str | None:
    """Read the chat template that models published before 2025 keep with their processor; None if there is none.

    is_needed: also ask the hub.
    """
    from transformers.utils import cached_file

    name = "chat_template.json"
    path: Any = Path(source) / name
    if is_needed and not Path(source).is_dir():
        lenient = ("missing_entries", "connection_errors", "gated_repo")
        path = cached_file(source, name, **{f"_raise_exceptions_for_{kind}": False for kind in lenient})
    return read_json(Path(path))["chat_template"] if path and Path(path).exists() else None


class readable_model_errors:
    """Turn what transformers raises for a missing or broken model into a ModelError with one readable sentence."""

    def __init__(self, source: str, what: str):
        self.source, self.what = source, what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, traceback) -> None:
        if error is None or isinstance(error, ForgebookError):
            return
        if "trust_remote_code" in str(error) or "custom code" in str(error):
            raise ModelError(CODE_REFUSED.format(source=self.source)) from None
        if isinstance(error, pickle.UnpicklingError) or "use_safetensors" in str(error):
            raise ModelError(PICKLE_REFUSED.format(source=self.source, files="a .bin file")) from None
        if problem := _hub_problem(self.source, str(error)):
            raise ModelError(problem) from None
        # OSError: not there, no network; ValueError: unknown architecture, unusable attention; KeyError, TypeError,
        # AttributeError: bad config; SafetensorError: truncated weights.
        # A damaged tokenizer.json is a plain Exception.
        is_damaged = type(error).__name__ == "SafetensorError" or type(error) is Exception
        if is_damaged or isinstance(error, OSError | ValueError | KeyError | TypeError | AttributeError):
            raise ModelError(f"no {self.what} could be loaded from {self.source!r}: {first_line(error)}") from None


def _hub_problem(model_id: str, text: str) -> str:
    """Return the fix for an error of the hub; empty if the text is another error."""
    if "gated repo" in text:
        return (
            f"{model_id!r} is gated: accept its license on https://huggingface.co/{model_id}, then run `hf auth login` "
            "or set HF_TOKEN to a token of that account"
        )
    if "401 Unauthorized" in text:
        return (
            f"the hub does not accept the token for {model_id!r}: run `hf auth login`, or set HF_TOKEN to a valid one"
        )
    if "not a valid model identifier" in text:
        hint = near_miss(model_id.lower(), read_catalog().shapes)
        return f"the hub has no model {model_id!r}{hint}; a private one needs HF_TOKEN, a folder is written ./folder"
    if "couldn't connect" in text:
        return (
            f"{model_id!r} is not on this machine, and the hub cannot be reached: where it can, run `hf download "
            f"{model_id} --local-dir MODELS/{model_id}`, bring MODELS here and set FORGEBOOK_MODELS to it"
        )
    return ""


def refuse_own_code(folder: Path) -> None:
    """Raise ModelError if a model folder names Python code of its own, which a program that reads it might run."""
    for name in ("config.json", "tokenizer_config.json"):
        if (folder / name).exists() and '"auto_map"' in (folder / name).read_text(encoding="utf-8", errors="replace"):
            raise ModelError(CODE_REFUSED.format(source=str(folder)))


def refuse_pickled(source: str) -> None:
    """Raise ModelError if a local folder has its weights only as pickles, which can run code when they are loaded."""
    folder = Path(source)
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise ModelError(PICKLE_REFUSED.format(source=source, files=pickles[0]))
