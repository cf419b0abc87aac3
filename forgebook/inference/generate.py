"""Prompts -> completions, batched, from a run, a checkpoint, a model folder or the hub.

    source = find_model("quickstart")                              its best checkpoint
    model, tokenizer, prompt_format = load_for_generation(source)
    answers = complete(model, tokenizer, conversations, prompt_format=prompt_format)

Prompts are those of training (`data/masking.py`). What ends an answer is collected once, when a model is loaded, in
its `generation_config`: the tokens of its generation_config.json, the tokenizer's EOS, the end-of-turn token of the
template, and the `stopping_sequences` of the run's config.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forgebook.config import blocks
from forgebook.config.blocks import PromptFormat
from forgebook.config.parse import load_config
from forgebook.config.schema import FinetuneConfig
from forgebook.data import chat_template, masking
from forgebook.data.prompt_formats import read_prompt_format
from forgebook.errors import ModelError, ResourceError, first_line
from forgebook.inference.sampling import Sampling, StopStrings, TokenSampling, prompt_seed
from forgebook.models import adapters, load, saved_adapters
from forgebook.models.template_settings import set_template_defaults
from forgebook.models.tokenizer import copy_of, load_tokenizer, locate, readable_model_errors, refuse_pickled
from forgebook.planning.cpu_dtype import choose_cpu_dtype
from forgebook.runs import download, object_store, run
from forgebook.runs.checksums import check_files

__all__ = [
    "LoadedModel",
    "OnAnswers",
    "answer_in_batches",
    "base_of",
    "complete",
    "find_model",
    "load_ends",
    "load_for_generation",
    "load_together",
    "run_config",
]

# Called with the answers that are complete, the tokens of all so far, and those in progress as a number of answers: of
# each the share of its longest possible length.
OnAnswers = Callable[[int, int, float], None]


@dataclass(frozen=True)
class LoadedModel:
    """One of several models that share the weights of a base; `active()` switches the shared weights to it.

    adapter: the name of its adapter on the model; None is the base itself. generation_config: what ends its answers.
    source: what it was loaded from.
    """

    model: Any
    tokenizer: Any
    prompt_format: PromptFormat | None
    adapter: str | None
    generation_config: Any
    source: str = ""

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
        """Answer conversations, with the model's own prompt format unless another is passed; see `complete`."""
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
    """Return the base model of a checkpoint, and how it is loaded for it (rope_scaling, quantization)."""
    lora_config = adapters.read_lora_config(source)
    if lora_config is None:
        return str(source), {}
    return copy_of(lora_config["base_model_name_or_path"]), adapters.read_overrides(source)


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
    base, overrides = bases[0]
    configs = [run_config(source) for source in sources]
    dtype = dtype or next((config.dtype for config in configs if config is not None), None) or _usual_dtype(base)
    attention = next((config.attention for config in configs if config is not None), "auto")
    model = load.load_model(
        base, dtype=dtype, attention=attention, attention_is_required=False, device_map="auto", **overrides
    )
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
        loaded.append(LoadedModel(model, tokenizer, prompt_format, name, ends, str(source)))
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


def load_ends(source: str):
    """Load what a model needs beside its weights: generation config with all that ends an answer, tokenizer, format.

    Returns (generation_config, tokenizer, prompt_format).
    """
    tokenizer, config = load_tokenizer(source), run_config(source)
    prompt_format, sequences = _prompting(source, config.generation_config if config else None)
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


# Answering --------------------------------------------------------------------------------------------


def complete(
    model,
    tokenizer,
    conversations: list[list[chat_template.Message]],
    *,
    prompt_format: PromptFormat | None = None,
    tools: list[list[dict] | None] | None = None,
    on_progress: OnAnswers = lambda done, tokens, begun: None,
    on_answer: Callable[[int, str], None] = lambda index, text: None,
    keep_special: bool = False,
    **sampling: Any,
) -> list[str]:
    """Answer each conversation, which ends with a user's turn; greedily unless a temperature is set.

    tools: for each conversation the tools that it lists, as in its training example.
    on_progress: called at each step. on_answer: called with a conversation's index and its complete answer.
    keep_special: leave special tokens in the answers, except those that end them; some models mark tool calls so.
    sampling: the fields of `Sampling`.

    Returns the answers' texts.
    """
    answers = [""] * len(conversations)
    finished = answer_in_batches(
        model,
        tokenizer,
        conversations,
        Sampling(**sampling),
        prompt_format=prompt_format,
        tools=tools,
        keep_special=keep_special,
        on_progress=on_progress,
    )
    for k, text in finished:
        answers[k] = text
        on_answer(k, text)
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
    on_progress: OnAnswers = lambda done, tokens, begun: None,
) -> Iterator[tuple[int, str]]:
    """Yield (index of a conversation, its answer) in the order in which answers end; the longest prompts come first.

    numbers: each conversation's number in the set of which these are a part; its seed is derived from it.
    on_progress: called at each step.
    streamer: a transformers streamer, which gets each token; for a single conversation only.

    Raises ResourceError if the GPU runs out of memory.
    """
    import torch

    from forgebook.inference.cache import rows_that_fit
    from forgebook.inference.decode import Request, decode

    encoded = [
        masking.encode_prompt(messages, tokenizer, prompt_format, offered)
        for messages, offered in zip(conversations, tools or [None] * len(conversations), strict=True)
    ]
    if not encoded:
        return
    numbers = range(len(encoded)) if numbers is None else numbers
    ends = model.generation_config
    answers = [_Answer(ends, tokenizer, sampling.max_new_tokens, streamer) for _ in encoded]
    requests = [
        Request(ids, TokenSampling(sampling.temperature, sampling.top_p, seed=seed), answer.add_token)
        for ids, answer, seed in zip(encoded, answers, (prompt_seed(sampling.seed, n) for n in numbers), strict=True)
    ]
    longest = max(map(len, encoded))
    batch_size = min(sampling.batch_size or rows_that_fit(model, longest + sampling.max_new_tokens), len(encoded))
    tokens = done = tokens_of_done = 0

    def report(added: int = 0) -> None:
        nonlocal tokens
        tokens += added
        on_progress(done, tokens, (tokens - tokens_of_done) / sampling.max_new_tokens)

    if streamer is not None:
        streamer.put(torch.tensor(encoded[0]))
    try:
        for k in decode(model, requests, batch_size, report):
            done, tokens_of_done = done + 1, tokens_of_done + len(answers[k].ids)
            yield k, _text(answers[k].ids, ends, tokenizer, keep_special)
            report()
    except torch.OutOfMemoryError:
        raise ResourceError(
            f"the GPU has too little memory for {batch_size} prompts of up to {longest} tokens and their answers; "
            f"set batch_size lower than {batch_size}"
        ) from None


class _Answer:
    """The tokens of an answer in progress: it ends with a token or text that ends answers, or at a limit."""

    def __init__(self, ends, tokenizer, limit: int, streamer: Any = None):
        self.ids: list[int] = []
        self._tokenizer, self._limit, self._streamer = tokenizer, limit, streamer
        self._stop_ids = _stop_ids(ends)
        self._stops = StopStrings(ends.stop_strings or ())
        # No token is shorter than a byte, and a letter may begin or end inside one.
        self._tail = 2 + max((len(stop.encode()) for stop in self._stops.stops), default=0)

    def add_token(self, token: int) -> bool:
        """Add a token; return whether the answer has ended."""
        self.ids.append(token)
        has_ended = token in self._stop_ids or len(self.ids) >= self._limit or self._has_stop_text()
        if self._streamer is not None:
            import torch

            self._streamer.put(torch.tensor([token]))
            if has_ended:
                self._streamer.end()
        return has_ended

    def _has_stop_text(self) -> bool:
        return bool(self._stops.stops) and self._stops.find(self._tokenizer.decode(self.ids[-self._tail :])) is not None


def _text(ids: list[int], ends, tokenizer, keep_special: bool) -> str:
    """Decode an answer up to what ends it."""
    closing = _stop_ids(ends)
    stop = next((k for k, token in enumerate(ids) if token in closing), len(ids))
    return StopStrings(ends.stop_strings or ()).cut(tokenizer.decode(ids[:stop], skip_special_tokens=not keep_special))


def _stop_ids(ends) -> frozenset[int]:
    """Return the tokens that end an answer, padding among them; a generation config has none, one or a list."""
    ids = ends.eos_token_id if isinstance(ends.eos_token_id, list) else [ends.eos_token_id]
    return frozenset(token for token in (*ids, ends.pad_token_id) if token is not None)
