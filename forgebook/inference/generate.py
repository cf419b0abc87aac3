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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forgebook.config.parse import FinetuneConfig, PromptFormat, load_config
from forgebook.data import chat_template, masking, special_tokens
from forgebook.data.prompt_formats import read_prompt_format
from forgebook.errors import DataError, ModelError, ResourceError
from forgebook.inference.sampling import Sampler, Sampling, StopStrings, TokenSampling, prompt_seed
from forgebook.models import adapters, load
from forgebook.models.tokenizer import load_tokenizer, locate
from forgebook.runs import download, object_store, run

__all__ = [
    "LoadedModel",
    "answer_in_batches",
    "base_of",
    "complete",
    "find_model",
    "load_ends",
    "load_for_generation",
    "load_together",
]


@dataclass(frozen=True)
class LoadedModel:
    """One of several models that share the weights of a base; `active()` switches the shared weights to it.

    adapter: the name of its adapter on the model; None is the base itself. generation_config: what ends its answers.
    """

    model: Any
    tokenizer: Any
    prompt_format: PromptFormat | None
    adapter: str | None
    generation_config: Any

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
        """Answer conversations, in the speaker's own prompt format unless another is named; see `complete`."""
        prompt_format = prompt_format or self.prompt_format
        with self.active() as model:
            return complete(model, self.tokenizer, conversations, prompt_format=prompt_format, **sampling)


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
    lora_config = adapters.read_lora_config(source)
    if lora_config is None:
        return str(source), {}
    return lora_config["base_model_name_or_path"], adapters.read_overrides(source)


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
) -> list[LoadedModel]:
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
        is_adapter = adapters.read_lora_config(source) is not None
        names.append(("default" if not any(names) else f"adapter-{len(names)}") if is_adapter else None)
        if is_adapter:
            model = _with_adapter(model, str(source), names[-1])
    model.eval()
    models = []
    for source, name, tokenizer in zip(sources, names, tokenizers, strict=True):
        tokenizer.padding_side = "left"
        of_run = _run_config(source) or config
        prompt_format = read_prompt_format(source) or (of_run and of_run.generation_config.prompt_format)
        ends = _generation_config(source, model.generation_config, tokenizer, prompt_format, of_run)
        models.append(LoadedModel(model, tokenizer, prompt_format, name, ends))
    return models


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


# What ends an answer ----------------------------------------------------------------------------------


def load_ends(source: str):
    """Load what prompts and ends a model's answers, without the model: generation config, tokenizer, prompt format."""
    tokenizer, config = load_tokenizer(source), _run_config(source)
    prompt_format = read_prompt_format(source) or (config and config.generation_config.prompt_format)
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
        seeds = [prompt_seed(sampling.seed, numbers[k]) for k in part]
        sampler = Sampler(
            [TokenSampling(sampling.temperature, sampling.top_p, seed=seed) for seed in seeds], model.device
        )
        try:
            with torch.inference_mode():
                output = model.generate(
                    **batch,
                    max_new_tokens=sampling.max_new_tokens,
                    do_sample=False,
                    temperature=None,
                    top_p=None,
                    top_k=None,
                    logits_processor=[sampler],
                    streamer=streamer,
                    **reads_text,
                )
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
    return StopStrings(ends.stop_strings or ()).cut(tokenizer.decode(ids[:stop], skip_special_tokens=not keep_special))
