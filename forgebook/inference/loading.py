"""Models that answer: found by the name of a run, a folder or a hub id, and loaded with what ends their answers.

    source = find_model("quickstart")                              its best checkpoint
    model, tokenizer, prompt_format = load_for_generation(source)
    [base, tuned] = load_together([base_folder, source])           with the weights of the base in memory once

What ends an answer is collected once, when a model is loaded, in its `generation_config`: the tokens of its
generation_config.json, the tokenizer's EOS, the end-of-turn token of the template, and the `stopping_sequences` of the
run's config.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forgebook.config import blocks
from forgebook.config.blocks import PromptFormat
from forgebook.config.parse import load_config
from forgebook.config.schema import FinetuneConfig
from forgebook.data import chat_template, masking
from forgebook.data.prompt_formats import read_prompt_format
from forgebook.errors import CheckpointError, ModelError, first_line
from forgebook.inference.generate import complete
from forgebook.inference.prompt_images import PromptImages, read_conversation
from forgebook.models import adapters, load, saved_adapters
from forgebook.models.template_settings import set_template_defaults
from forgebook.models.tokenizer import copy_of, load_tokenizer, locate, readable_model_errors, refuse_pickled
from forgebook.planning.cpu_dtype import choose_cpu_dtype
from forgebook.runs import download, object_store, run
from forgebook.runs.checksums import check_files

__all__ = [
    "LoadedModel",
    "base_of",
    "find_model",
    "load_ends",
    "load_for_generation",
    "load_together",
    "run_config",
]


@dataclass(frozen=True)
class LoadedModel:
    """One of several models that share the weights of a base; `active()` switches the shared weights to it.

    adapter: the name of its adapter on the model; None is the base itself. generation_config: what ends its answers.
    source: what it was loaded from. images: what it makes of those of prompts.
    """

    model: Any
    tokenizer: Any
    prompt_format: PromptFormat | None
    adapter: str | None
    generation_config: Any
    source: str = ""
    images: PromptImages | None = None

    @property
    def dtype(self) -> str:
        return str(self.model.dtype)

    @contextlib.contextmanager
    def active(self) -> Iterator[Any]:
        """Yield the shared model, switched to this one for the length of a block."""
        has_adapters = hasattr(self.model, "peft_config")
        inner = self.model.get_base_model() if has_adapters else self.model
        inner.generation_config = self.generation_config
        if self.adapter is not None:
            self.model.set_adapter(self.adapter)
        with self.model.disable_adapter() if has_adapters and self.adapter is None else contextlib.nullcontext():
            yield self.model

    def answer(
        self,
        conversations: list[list[chat_template.Message]],
        prompt_format: PromptFormat | None = None,
        **sampling: Any,
    ) -> list[str]:
        """Answer conversations, with the model's own prompt format unless another is passed; see `complete`.

        A content may be a list of parts, also of images, whose relative paths begin at the current folder.
        """
        prompt_format, read = prompt_format or self.prompt_format, list(map(read_conversation, conversations))
        with self.active() as model:
            return complete(model, self.tokenizer, read, prompt_format=prompt_format, images=self.images, **sampling)


# Finding and loading ---------------------------------------------------------------------------------


def find_model(name: str, checkpoint: str | None = None) -> str:
    """Find what a name means: a run's checkpoint, a folder of a checkpoint or model (local or bucket), or a hub id.

    checkpoint: of a run, "best" or the name of one, such as "epoch-2". Raises StorageError if nothing is found.
    """
    checkpoint = None if checkpoint == "best" else checkpoint
    folder = str(download.fetch_folder(name)) if object_store.is_remote(name) else name
    # owner/name, unless there is a folder `owner` here: then it is a path.
    is_hub_id = folder.count("/") == 1 and folder[0] not in "./~" and not Path(folder).parent.exists()
    if checkpoint is None and (folder == "tiny" or is_hub_id):
        return locate(folder)
    return str(run.find_checkpoint(folder, checkpoint))


def base_of(source: str | Path) -> tuple[str, dict[str, Any]]:
    """Return the base model of a checkpoint, and how it is loaded for it (rope_scaling, quantization).

    Raises CheckpointError for an adapter that names no base model.
    """
    lora_config = adapters.read_lora_config(source)
    if lora_config is None:
        return str(source), {}
    base = lora_config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        path = Path(source) / "adapter_config.json"
        raise CheckpointError(f"{path} names no base model: set base_model_name_or_path, or restore it from a copy")
    return copy_of(base), adapters.read_overrides(source)


def load_for_generation(source: str | Path, dtype: str | None = None):
    """Load a checkpoint folder (adapter or full), a model folder or a hub id: on a GPU if there is one.

    dtype: None takes that of the run to which the checkpoint belongs, else bfloat16, or on a CPU what is faster.

    Returns (model, tokenizer, prompt_format); prompt_format is None if the model uses its chat template.
    """
    [loaded] = load_together([source], dtype)
    with loaded.active() as model:
        return model, loaded.tokenizer, loaded.prompt_format


def load_together(
    sources: Sequence[str | Path], dtype: str | None = None, defaults: blocks.GenerationConfig | None = None
) -> list[LoadedModel]:
    """Load several adapters of one base, and the base itself if it is among them, with its weights in memory once.

    dtype: None takes that of the first source that belongs to a run, else bfloat16, or on a CPU what is faster.
    defaults: the prompt format, template settings and stopping sequences of sources that belong to no run.

    Raises ModelError if they have different bases, or some have tokens that others lack.
    """
    for source in sources:
        refuse_pickled(str(source))
        check_files(source)
    bases = [base_of(source) for source in sources]
    if any(base != bases[0] for base in bases):
        listed = "; ".join(f"{source}: {base}" for source, (base, _) in zip(sources, bases, strict=True))
        raise ModelError(f"only adapters of one base share its weights, got {listed}: load the others separately")
    if len(sources) > 1 and (own := [str(source) for source in sources if adapters.trains_biases(source)]):
        raise ModelError(f"{own[0]} has biases of its own, in place of its base's: load it separately")
    base, overrides = bases[0]
    configs = [run_config(source) for source in sources]
    dtype = dtype or next((config.dtype for config in configs if config is not None), None) or _usual_dtype(base)
    attention = next((config.attention for config in configs if config is not None), "auto")
    model = load.load_model(
        base, dtype=dtype, attention=attention, attention_is_required=False, device_map="auto", **overrides
    )
    held_in = str(model.dtype).removeprefix("torch.")
    tokenizers = [load_tokenizer(str(source)) for source in sources]
    vocabulary = model.get_input_embeddings().num_embeddings
    sizes = {max(len(tokenizer), vocabulary) for tokenizer in tokenizers}
    if len(sizes) > 1:
        raise ModelError(f"{', '.join(map(str, sources))}: some have tokens that others lack: load each separately")
    if sizes != {vocabulary}:
        model.resize_token_embeddings(sizes.pop())  # a classifier's labels; their embeddings are in the adapter
    model, names = _add_adapters(model, sources)
    model.eval()
    loaded = []
    for source, name, tokenizer, config in zip(sources, names, tokenizers, configs, strict=True):
        tokenizer.padding_side = "left"
        if config is None and defaults is not None:
            set_template_defaults(tokenizer, defaults.chat_template_kwargs)
        prompt_format, sequences = _prompting(source, config.generation_config if config else defaults)
        ends = _generation_config(source, model.generation_config, tokenizer, prompt_format, sequences)
        images = PromptImages(base, tokenizer, held_in)
        loaded.append(LoadedModel(model, tokenizer, prompt_format, name, ends, str(source), images))
    return loaded


def _usual_dtype(base: str) -> str:
    """Choose the dtype of a model that belongs to no run."""
    import torch
    from transformers import AutoConfig

    if torch.cuda.is_available():
        return "bfloat16"
    with readable_model_errors(base, "model"):
        sizes = AutoConfig.from_pretrained(base, trust_remote_code=False).get_text_config()
    hidden = getattr(sizes, "hidden_size", 1024)
    return choose_cpu_dtype(hidden, getattr(sizes, "intermediate_size", None) or 4 * hidden)[0]


def _add_adapters(model, sources: Sequence[str | Path]) -> tuple[Any, list[str | None]]:
    """Load each source's adapter into the model; return the model and each adapter's name, None for the base."""
    names: list[str | None] = []
    for source in sources:
        if adapters.read_lora_config(source) is None:
            names.append(None)
            continue
        name = f"adapter-{len(names)}" if any(names) else "default"
        model = saved_adapters.attach_adapter(model, str(source), name)
        names.append(name)
    return model, names


def run_config(source: str | Path) -> FinetuneConfig | None:
    """Read the config of the run to which a checkpoint belongs; None for any other folder."""
    folder = Path(source).absolute()
    path = folder.parent.parent / "config.yaml"
    return load_config(path) if folder.parent.name == "checkpoints" and path.exists() else None


def _prompting(
    source: str | Path, defaults: blocks.GenerationConfig | None
) -> tuple[PromptFormat | None, list[str | int]]:
    """Return a model's prompt format and the stopping sequences of its run."""
    own = read_prompt_format(source)
    if defaults is None:
        return own, []
    return own or defaults.prompt_format, defaults.stopping_sequences


# What ends an answer ----------------------------------------------------------------------------------


def load_ends(source: str, defaults: blocks.GenerationConfig | None = None):
    """Load what a model needs beside its weights: generation config with all that ends an answer, tokenizer, format.

    defaults: of a source that belongs to no run, as in `load_together`.

    Returns (generation_config, tokenizer, prompt_format).
    """
    tokenizer, config = load_tokenizer(source), run_config(source)
    if config is None and defaults is not None:
        set_template_defaults(tokenizer, defaults.chat_template_kwargs)
    prompt_format, sequences = _prompting(source, config.generation_config if config else defaults)
    return _generation_config(source, None, tokenizer, prompt_format, sequences), tokenizer, prompt_format


def _generation_config(
    source, fallback, tokenizer, prompt_format: PromptFormat | None, stopping_sequences: list[str | int]
):
    """Read a model's generation config, or copy the fallback, and add everything that ends an answer."""
    import copy

    from transformers import GenerationConfig

    try:
        config = GenerationConfig.from_pretrained(source)
    except OSError as error:
        if (path := Path(source) / "generation_config.json").exists():
            raise ModelError(f"{path} is damaged: {first_line(error)}") from None
        config = copy.deepcopy(fallback) or GenerationConfig()
    end_text, end_ids = masking.end_of_turn(tokenizer, prompt_format)
    own_ids = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ids = [*own_ids, tokenizer.eos_token_id, *end_ids, *(stop for stop in stopping_sequences if isinstance(stop, int))]
    own_texts = [config.stop_strings] if isinstance(config.stop_strings, str) else config.stop_strings or []
    texts = [*own_texts, end_text, *(stop for stop in stopping_sequences if isinstance(stop, str))]
    config.eos_token_id = list(dict.fromkeys(stop for stop in ids if stop is not None))
    config.stop_strings = list(dict.fromkeys(stop for stop in texts if stop)) or None
    config.pad_token_id = tokenizer.pad_token_id
    return config
