"""Prompts -> completions, batched and greedy, from a run, a checkpoint or a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import yaml

from helpers import adapters, models, prompts
from helpers.config import PromptFormat

__all__ = ["complete", "load_for_generation"]


def load_for_generation(source: str | Path, dtype: str = "bfloat16"):
    """Load a checkpoint folder (adapter or full), a model folder or a hub id for generation.

    Returns (model, tokenizer, prompt_format); prompt_format is None where the chat template serves.
    """
    folder = Path(source)
    adapter = folder / "adapter_config.json"
    base = json.loads(adapter.read_text())["base_model_name_or_path"] if adapter.exists() else str(source)
    overrides = adapters.read_overrides(folder) if adapter.exists() else {}
    model = models.load_model(base, dtype=dtype, **overrides)
    tokenizer = models.load_tokenizer(str(source))
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))  # a classifier's labels; their rows are in the adapter
    if adapter.exists():
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(folder))
    saved_format = folder / "prompt_format.yaml"
    prompt_format = PromptFormat(**yaml.safe_load(saved_format.read_text())) if saved_format.exists() else None
    tokenizer.padding_side = "left"
    return model.eval(), tokenizer, prompt_format


def complete(
    model,
    tokenizer,
    conversations: list[list[prompts.Message]],
    *,
    prompt_format: PromptFormat | None = None,
    tools: list[list[dict] | None] | None = None,
    max_new_tokens: int = 128,
    batch_size: int = 32,
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """Answer each conversation, which ends with a user's turn; greedy, stopping at the end-of-turn token.

    tools: for each conversation the tools that it lists, as in its training row.

    Returns the answers' texts without special tokens.
    """
    import torch

    listed = tools or [None] * len(conversations)
    encoded = [
        prompts.encode_prompt(messages, tokenizer, prompt_format, one)
        for messages, one in zip(conversations, listed, strict=True)
    ]
    # Prompts of like length share a batch: less padding, same answers.
    order = sorted(range(len(encoded)), key=lambda k: len(encoded[k]))
    answers = [""] * len(encoded)
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        batch = tokenizer.pad({"input_ids": [encoded[k] for k in part]}, return_tensors="pt").to(model.device)
        with torch.inference_mode():
            output = model.generate(
                **batch,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        texts = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for k, text in zip(part, texts, strict=True):
            answers[k] = text
        on_progress(start + len(part))
    return answers
