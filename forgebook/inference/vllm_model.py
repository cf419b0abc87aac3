"""Models that vLLM answers with: adapters of one base, and the base itself, in one engine.

    for model in load_in_vllm([base, adapter]):
        for k, text in model.answer_in_order(conversations, tools, numbers, sampling): ...

Prompts are passed as the token ids of training, and answers end as in `generate`.
"""

from __future__ import annotations

import atexit
import gc
import io
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from forgebook.config.blocks import GenerationConfig, PromptFormat
from forgebook.data import masking
from forgebook.data.chat_template import Message
from forgebook.inference import loading
from forgebook.inference.sampling import Sampling, prompt_seed
from forgebook.models import adapters
from forgebook.models.vllm_support import runs_eagerly, vllm_max_rank

__all__ = ["VllmModel", "load_in_vllm"]

# vLLM batches on its own; this many prompts are passed to it at once, and their answers come together.
CHUNK = 64


@dataclass(frozen=True)
class VllmModel:
    """One of several models of a vLLM engine. adapter: its request, None for the base; dtype: None is vLLM's choice.

    The other fields are those of `LoadedModel`.
    """

    llm: Any
    tokenizer: Any
    prompt_format: PromptFormat | None
    adapter: Any
    generation_config: Any
    source: str
    dtype: str | None

    def answer_in_order(
        self,
        conversations: Sequence[list[Message]],
        tools: Sequence[list[dict] | None],
        numbers: Sequence[int],
        sampling: Sampling,
        keep_special: bool | None = False,
        on_finished: Callable[[int, int], None] = lambda done, tokens: None,
    ) -> Iterator[tuple[int, str, int]]:
        """Yield (index of a conversation, its answer, tokens of it).

        numbers: each conversation's number in its set; its seed is derived from it. keep_special: as in
        `generate.answer_in_batches`. on_finished: called with how many
        answers are complete and about how many tokens they have, also while the others of their chunk are not.
        """
        from vllm import SamplingParams

        ends, tokens = self.generation_config, 0
        for start in range(0, len(conversations), CHUNK):
            part = range(start, min(start + CHUNK, len(conversations)))
            inputs = [
                {
                    "prompt_token_ids": masking.encode_prompt(
                        conversations[k], self.tokenizer, self.prompt_format, tools[k]
                    )
                }
                for k in part
            ]
            settings = [
                SamplingParams(
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    max_tokens=sampling.max_new_tokens,
                    seed=prompt_seed(sampling.seed, numbers[k]),
                    stop=ends.stop_strings,
                    stop_token_ids=ends.eos_token_id,
                    repetition_penalty=ends.repetition_penalty or 1.0,
                    min_tokens=ends.min_new_tokens or 0,
                    skip_special_tokens=not (bool(tools[k]) if keep_special is None else keep_special),
                )
                for k in part
            ]
            bar = _counting_bar(start, tokens, on_finished)
            outputs = self.llm.generate(inputs, settings, lora_request=self.adapter, use_tqdm=bar)
            tokens += sum(len(output.outputs[0].token_ids) for output in outputs)
            for k, output in zip(part, outputs, strict=True):
                yield k, output.outputs[0].text, len(output.outputs[0].token_ids)

    def answer(
        self,
        conversations: list[list[Message]],
        *,
        tools: list[list[dict] | None],
        keep_special: bool = False,
        max_new_tokens: int,
        on_progress: Callable[[int, int, float], None],
        on_answer: Callable[[int, str], None],
    ) -> None:
        """Answer conversations greedily; see `generate.complete`."""
        answers = self.answer_in_order(
            conversations, tools, range(len(conversations)), Sampling(max_new_tokens), keep_special,
            lambda finished, tokens: on_progress(finished, tokens, 0.0),
        )  # fmt: skip
        for k, text, _ in answers:
            on_answer(k, text)


def _counting_bar(done: int, tokens: int, on_finished: Callable[[int, int], None]) -> type:
    """Make what vLLM shows progress with: a bar that prints nothing, and calls `on_finished` for each answer.

    done, tokens: how many were complete before. vLLM takes the class, and has no other way to tell.
    """
    from tqdm import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs, file=io.StringIO())

        def update(self, n: float | None = 1) -> bool | None:
            shown = super().update(n)
            speed = re.search(r"output: ([\d.]+) tok", str(self.postfix))  # the only count of tokens that it shares
            new = round(float(speed[1]) * self.format_dict["elapsed"]) if speed else 0
            on_finished(done + int(self.n), tokens + new)
            return shown

    return Bar


def load_in_vllm(
    sources: Sequence[str], dtype: str | None = None, defaults: GenerationConfig | None = None
) -> Iterator[VllmModel]:
    """Load models into vLLM, those of one base together, others when the model before is no longer used.

    dtype: None takes that of a source's run. defaults: as in `loading.load_together`.
    """
    base, llm = None, None
    bases = [loading.base_of(source)[0] for source in sources]
    for number, source in enumerate(sources, 1):
        config = loading.run_config(source)
        one_dtype = dtype or (config.dtype if config else None)
        if bases[number - 1] != base:
            llm = None
            gc.collect()  # ends the engine before, and frees its memory
            base = bases[number - 1]
            of_base = [one for one, its_base in zip(sources, bases, strict=True) if its_base == base]
            llm = _start(base, of_base, one_dtype)
        ends, tokenizer, prompt_format = loading.load_ends(source, defaults)
        adapter = None
        if adapters.read_lora_config(source):
            from vllm.lora.request import LoRARequest

            adapter = LoRARequest(f"adapter-{number}", number, source)
        yield VllmModel(llm, tokenizer, prompt_format, adapter, ends, source, one_dtype)


def _start(base: str, sources: Sequence[str], dtype: str | None) -> Any:
    """Start an engine for a base and the adapters among the sources."""
    from vllm import LLM

    options: dict[str, Any] = {}
    if dtype:
        options["dtype"] = dtype  # vLLM's own choice halves float32
    if runs_eagerly():
        options["enforce_eager"] = True
    lora_configs = [config for source in sources if (config := adapters.read_lora_config(source))]
    if lora_configs:
        options |= {"enable_lora": True, "max_lora_rank": vllm_max_rank(lora_configs), "max_loras": len(lora_configs)}
    llm = LLM(model=base, tokenizer=sources[-1], **options)
    # It ends its processes when this one ends, and warns of each that was slow to.
    atexit.register(logging.getLogger("vllm").setLevel, logging.ERROR)
    return llm
