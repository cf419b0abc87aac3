"""Prompts -> completions, batched, from a run, a checkpoint, a model folder or the hub.

    source = find_model("quickstart")                              its best checkpoint
    model, tokenizer, prompt_format = load_for_generation(source)
    answers = complete(model, tokenizer, conversations, prompt_format=prompt_format)

Prompts are those of training (`data/chat_template.py`). What ends an answer is gathered once, when a model is loaded,
into its `generation_config`: the tokens of its generation_config.json, the tokenizer's end of text, the token that
closes a turn in the template, and the `stopping_sequences` of the run's config.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from forgebook.config.parse import FinetuneConfig, PromptFormat, load_config
from forgebook.data import chat_template, masking, special_tokens
from forgebook.errors import ConfigError, DataError, ModelError, ResourceError
from forgebook.models import adapters, load
from forgebook.models.tokenizer import load_tokenizer, locate
from forgebook.runs import download, object_store, run

__all__ = [
    "Sampling",
    "Speaker",
    "answer_in_batches",
    "base_of",
    "complete",
    "find_model",
    "load_ends",
    "load_for_generation",
    "load_together",
    "seed_of",
]


@dataclass(frozen=True)
class Sampling:
    """How answers are written: the most likely token each time, or drawn.

    temperature: 0 is greedy; top_p: draw among the likeliest tokens that hold this share of the probability.
    seed: the same seed gives a prompt the same answer, whatever prompts are beside it.
    batch_size: prompts at a time; it changes no answer, only memory and speed.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    batch_size: int = 32

    def __post_init__(self):
        if self.temperature < 0:
            raise ConfigError(f"temperature must be 0 (greedy) or more, got {self.temperature:g}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be above 0 and at most 1, got {self.top_p:g}")
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be 1 or more, got {getattr(self, name)}")


@dataclass(frozen=True)
class Speaker:
    """One of several models that share the weights of a base; `active()` lends the model while it speaks as this one.

    adapter: the name of its adapter on the model; None is the base itself. generation_config: what ends its answers.
    """

    model: Any
    tokenizer: Any
    prompt_format: PromptFormat | None
    adapter: str | None
    generation_config: Any

    @contextlib.contextmanager
    def active(self) -> Iterator[Any]:
        """Switch the shared model to this speaker for the length of a block."""
        has_adapters = hasattr(self.model, "peft_config")
        inner = self.model.get_base_model() if has_adapters else self.model
        inner.generation_config = self.generation_config
        if self.adapter is not None:
            self.model.set_adapter(self.adapter)
        with self.model.disable_adapter() if has_adapters and self.adapter is None else contextlib.nullcontext():
            yield self.model


# Loading ----------------------------------------------------------------------------------------------


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
    """Tell on which base a checkpoint stands, and how that was made for it (RoPE scaling, quantization)."""
    settings = Path(source) / "adapter_config.json"
    if not settings.exists():
        return str(source), {}
    return json.loads(settings.read_text())["base_model_name_or_path"], adapters.read_overrides(source)


def load_for_generation(source: str | Path, dtype: str | None = None):
    """Load a checkpoint folder (adapter or full), a model folder or a hub id: on a GPU if there is one.

    dtype: None is that of the run which the checkpoint lies in, else bfloat16.

    Returns (model, tokenizer, prompt_format); prompt_format is None where the chat template serves.
    """
    [one] = load_together([source], dtype)
    with one.active() as model:
        return model, one.tokenizer, one.prompt_format


def load_together(
    sources: Sequence[str | Path], dtype: str | None = None, config: FinetuneConfig | None = None
) -> list[Speaker]:
    """Load several adapters of one base, and the base itself if it is among them, with its weights held once.

    config: whose dtype, prompt format and stopping sequences hold for sources that lie in no run.

    Raises ModelError if they stand on different bases, or some have tokens that others do not.
    """
    bases = [base_of(source) for source in sources]
    if any(base != bases[0] for base in bases):
        listed = "; ".join(f"{source}: {base}" for source, (base, _) in zip(sources, bases, strict=True))
        raise ModelError(f"only adapters of one base share its weights, got {listed}: load the others on their own")
    base, overrides = bases[0]
    model = load.load_model(base, dtype=dtype or _dtype_of(sources, config), device_map="auto", **overrides)
    tokenizers = [load_tokenizer(str(source)) for source in sources]
    rows = model.get_input_embeddings().num_embeddings
    sizes = {max(len(tokenizer), rows) for tokenizer in tokenizers}
    if len(sizes) > 1:
        raise ModelError(f"{', '.join(map(str, sources))}: some have tokens of their own: load each on its own")
    if sizes != {rows}:
        model.resize_token_embeddings(sizes.pop())  # a classifier's labels; their rows are in the adapter
    names = []
    for source in sources:
        is_adapter = (Path(source) / "adapter_config.json").exists()
        names.append(("default" if not any(names) else f"adapter-{len(names)}") if is_adapter else None)
        if is_adapter:
            model = _with_adapter(model, str(source), names[-1])
    model.eval()
    speakers = []
    for source, name, tokenizer in zip(sources, names, tokenizers, strict=True):
        tokenizer.padding_side = "left"
        of_run = _run_config(source) or config
        prompt_format = _prompt_format(Path(source)) or (of_run and of_run.generation_config.prompt_format)
        ends = _generation_config(source, model.generation_config, tokenizer, prompt_format, of_run)
        speakers.append(Speaker(model, tokenizer, prompt_format, name, ends))
    return speakers


def _with_adapter(model, folder: str, name: str):
    from peft import PeftModel

    if not hasattr(model, "peft_config"):
        return PeftModel.from_pretrained(model, folder, adapter_name=name)
    model.load_adapter(folder, adapter_name=name)
    return model


def _run_config(source: str | Path) -> FinetuneConfig | None:
    """Read the config of the run whose checkpoint this is; None of any other folder."""
    folder = Path(source).absolute()
    path = folder.parent.parent / "config.yaml"
    return load_config(path) if folder.parent.name == "checkpoints" and path.exists() else None


def _dtype_of(sources: Sequence[str | Path], config: FinetuneConfig | None) -> str:
    configs = [*(_run_config(source) for source in sources), config]
    return next((config.dtype for config in configs if config is not None), "bfloat16")


def _prompt_format(folder: Path) -> PromptFormat | None:
    saved = folder / "prompt_format.yaml"
    return PromptFormat(**yaml.safe_load(saved.read_text())) if saved.exists() else None


# What ends an answer ----------------------------------------------------------------------------------


def load_ends(source: str):
    """Load what prompts and ends a model's answers, without the model: generation config, tokenizer, prompt format."""
    tokenizer, config = load_tokenizer(source), _run_config(source)
    prompt_format = _prompt_format(Path(source)) or (config and config.generation_config.prompt_format)
    return _generation_config(source, None, tokenizer, prompt_format, config), tokenizer, prompt_format


def _generation_config(source, fallback, tokenizer, prompt_format: PromptFormat | None, config: FinetuneConfig | None):
    """Take a model's generation config, or else the fallback, with all that ends an answer in it."""
    import copy

    from transformers import GenerationConfig

    try:
        made = GenerationConfig.from_pretrained(source)
    except OSError:  # it has none of its own
        made = copy.deepcopy(fallback) or GenerationConfig()
    written, closing = _closing(tokenizer, prompt_format)
    sequences = config.generation_config.stopping_sequences if config else []
    own = made.eos_token_id if isinstance(made.eos_token_id, list) else [made.eos_token_id]
    ids = [*own, tokenizer.eos_token_id, closing, *(stop for stop in sequences if isinstance(stop, int))]
    own = [made.stop_strings] if isinstance(made.stop_strings, str) else made.stop_strings or []
    texts = [*own, written, *(stop for stop in sequences if isinstance(stop, str))]
    made.eos_token_id = list(dict.fromkeys(stop for stop in ids if stop is not None))
    made.stop_strings = list(dict.fromkeys(stop for stop in texts if stop)) or None
    made.pad_token_id = tokenizer.pad_token_id
    return made


def _closing(tokenizer, prompt_format: PromptFormat | None) -> tuple[str, int | None]:
    """Find what closes an answer in training: a text, where a prompt format ends with one, or a special token."""
    probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        encoded = masking.encode(probe, tokenizer, prompt_format)
    except DataError:  # no template; or one that refuses this conversation
        return "", None
    trained = [token for token, is_trained in zip(encoded.input_ids, encoded.loss_mask, strict=True) if is_trained]
    if trained and trained[-1] in special_tokens.special_ids(tokenizer):
        return "", trained[-1]
    return (prompt_format.assistant.partition("{instruction}")[2].strip() if prompt_format else ""), None


# Answering --------------------------------------------------------------------------------------------


def complete(
    model,
    tokenizer,
    conversations: list[list[chat_template.Message]],
    *,
    prompt_format: PromptFormat | None = None,
    tools: list[list[dict] | None] | None = None,
    on_progress: Callable[[int], None] = lambda done: None,
    keep_special: bool = False,
    **sampling: Any,
) -> list[str]:
    """Answer each conversation, which ends with a user's turn; greedy unless a temperature is given.

    tools: for each conversation the tools that it lists, as in its training row.
    keep_special: leave special tokens in the answers (some models mark tool calls with them), but that which ends it.
    sampling: the fields of `Sampling`.

    Returns the answers' texts.
    """
    answers = [""] * len(conversations)
    answered = answer_in_batches(
        model, tokenizer, conversations, Sampling(**sampling),
        prompt_format=prompt_format, tools=tools, keep_special=keep_special,
    )  # fmt: skip
    for done, (k, text) in enumerate(answered, 1):
        answers[k] = text
        on_progress(done)
    return answers


def answer_in_batches(
    model,
    tokenizer,
    conversations: list[list[chat_template.Message]],
    sampling: Sampling,
    *,
    prompt_format: PromptFormat | None = None,
    tools: list[list[dict] | None] | None = None,
    keep_special: bool = False,
    numbers: Sequence[int] | None = None,
    streamer: Any = None,
) -> Iterator[tuple[int, str]]:
    """Yield (which conversation, its answer) batch by batch, those of like length together.

    numbers: each conversation's number in the whole set where these are a part of it: its seed depends on it.
    streamer: transformers' kind, which is told of each token of a single conversation.
    """
    import torch

    listed = tools or [None] * len(conversations)
    encoded = [
        masking.encode_prompt(messages, tokenizer, prompt_format, one)
        for messages, one in zip(conversations, listed, strict=True)
    ]
    numbers = range(len(encoded)) if numbers is None else numbers
    # Prompts of like length share a batch: less padding, same answers. The longest come first, so that memory
    # runs out at once or never.
    order = sorted(range(len(encoded)), key=lambda k: -len(encoded[k]))
    reads_text = {"tokenizer": tokenizer} if model.generation_config.stop_strings else {}
    for start in range(0, len(order), sampling.batch_size):
        part = order[start : start + sampling.batch_size]
        batch = tokenizer.pad({"input_ids": [encoded[k] for k in part]}, return_tensors="pt").to(model.device)
        drawn = [_Drawn(sampling, [numbers[k] for k in part], model.device)] if sampling.temperature else []
        try:
            with torch.inference_mode():
                output = model.generate(
                    **batch, max_new_tokens=sampling.max_new_tokens, do_sample=False, logits_processor=drawn,
                    streamer=streamer, temperature=None, top_p=None, top_k=None, **reads_text,
                )  # fmt: skip
        except torch.OutOfMemoryError:
            raise ResourceError(
                f"the GPU has too little memory for {len(part)} prompts of {batch['input_ids'].shape[1]} tokens: "
                f"lower batch_size (now {sampling.batch_size})"
            ) from None
        for k, ids in zip(part, output[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
            yield k, _text(ids, model.generation_config, tokenizer, keep_special)


def _text(ids: list[int], ends, tokenizer, keep_special: bool) -> str:
    """Decode an answer up to what ends it."""
    closing = {*ends.eos_token_id, tokenizer.pad_token_id} if isinstance(ends.eos_token_id, list) else set()
    stop = next((k for k, token in enumerate(ids) if token in closing), len(ids))
    text = tokenizer.decode(ids[:stop], skip_special_tokens=not keep_special)
    places = [text.find(stop) for stop in ends.stop_strings or [] if stop in text]
    return text[: min(places)] if places else text


def seed_of(sampling: Sampling, number: int) -> int:
    """Make the seed of one prompt of a set, another for each."""
    return hash((sampling.seed, number)) % 2**63  # of whole numbers Python's hash is the same everywhere


class _Drawn:
    """Make a greedy choice a draw: each row from random numbers of its own, so that no other row changes it.

    The largest of p / e, with e drawn from the exponential distribution, is token k with probability p[k].
    """

    def __init__(self, sampling: Sampling, numbers: list[int], device):
        import torch

        self.sampling = sampling
        self.generators = [torch.Generator(device).manual_seed(seed_of(sampling, number)) for number in numbers]

    def __call__(self, input_ids, scores):
        import torch

        chances = torch.softmax(scores.float() / self.sampling.temperature, dim=-1)
        if self.sampling.top_p < 1:
            ranked, places = chances.sort(dim=-1, descending=True)
            before = ranked.cumsum(-1) - ranked
            ranked[before >= self.sampling.top_p] = 0
            chances = torch.zeros_like(chances).scatter(-1, places, ranked)
        noise = torch.stack([torch.empty_like(chances[0]).exponential_(generator=one) for one in self.generators])
        return (chances / noise).log()
