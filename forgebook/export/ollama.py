"""A Modelfile: how Ollama writes the prompts of a GGUF file, and what ends its answers.

Ollama does not run the chat template inside the file: it has templates of its own, in Go's language. The one written
here is read off what the chat template renders, and refused where it would not write the same.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forgebook.data.chat_template import render
from forgebook.errors import DataError, ModelError
from forgebook.models.tokenizer import readable_model_errors
from forgebook.models.vllm_support import unserved_settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from forgebook.config.blocks import PromptFormat

__all__ = ["modelfile", "read_modelfile"]

# Tokens of context where no run says how many: what most memories hold.
CONTEXT = 8192
# These texts occur nowhere else in a prompt, and nothing is trimmed off them.
SYSTEM, FIRST, ANSWER, SECOND = "Zebra system.", "Zebra one?", "Zebra answer.", "Zebra two?"
CONVERSATIONS = [
    [("user", FIRST)],
    [("system", SYSTEM), ("user", FIRST)],
    [("user", FIRST), ("assistant", ANSWER), ("user", SECOND)],
    [("system", SYSTEM), ("user", FIRST), ("assistant", ANSWER), ("user", SECOND)],
    [("user", SECOND), ("assistant", SECOND), ("user", FIRST), ("assistant", ANSWER), ("user", FIRST)],
]


@dataclass(frozen=True)
class _Parts:
    """The texts around messages. opening: the text before a conversation without a system message."""

    opening: str
    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]
    prompt: str

    def render(self, conversation: list[tuple[str, str]]) -> str:
        """Write a conversation's prompt as Ollama does with the template of these parts."""
        around = {"system": self.system, "user": self.user, "assistant": self.assistant}
        turns = [f"{around[role][0]}{text}{around[role][1]}" for role, text in conversation]
        return "".join([*([] if conversation[0][0] == "system" else [self.opening]), *turns, self.prompt])

    def template(self) -> str:
        """Write these parts in Go's template language."""
        roles = {"system": self.system, "user": self.user, "assistant": self.assistant}
        turns = " else ".join(
            f'if eq .Role "{role}" }}}}{_literal(before)}{{{{ .Content }}}}{_literal(after)}{{{{'
            for role, (before, after) in roles.items()
        )
        opening = f"{{{{ if not .System }}}}{_literal(self.opening)}{{{{ end }}}}" if self.opening else ""
        return f"{opening}{{{{ range .Messages }}}}{{{{ {turns} end }}}}{{{{ end }}}}{_literal(self.prompt)}"


def read_modelfile(source: Path, gguf: str) -> str:
    """Read off a model how Ollama runs it: the text of a Modelfile beside the GGUF file of that name.

    source: a folder of full weights, or of an adapter.

    Raises ModelError if no template of Ollama's writes what the model's own one does.
    """
    from transformers import AutoConfig

    from forgebook.inference.loading import base_of, load_ends, run_config

    generation_config, tokenizer, prompt_format = load_ends(str(source))
    config, base = run_config(source), base_of(source)[0]
    with readable_model_errors(base, "model"):
        sizes = AutoConfig.from_pretrained(base, trust_remote_code=False).get_text_config()
    native = getattr(sizes, "max_position_embeddings", None) or CONTEXT
    context = (config.context_length if config else None) or min(native, CONTEXT)
    return modelfile(gguf, tokenizer, prompt_format, generation_config, context)


def modelfile(
    gguf: str,
    tokenizer: PreTrainedTokenizerBase,
    prompt_format: PromptFormat | None,
    generation_config: Any,
    context: int,
) -> str:
    """Write the text of a Modelfile for a GGUF file.

    gguf: the file's name, from the Modelfile's folder. generation_config: with all that ends an answer. context: tokens
    of prompt and answer that Ollama keeps.

    Raises ModelError if no template of Ollama's writes what the model's own one does.
    """
    parts = _read_parts(tokenizer, prompt_format)
    ids = generation_config.eos_token_id
    stops = [tokenizer.decode([number]) for number in (ids if isinstance(ids, list) else [ids])]
    lines = [f"FROM ./{gguf}", f'TEMPLATE """{parts.template()}"""']
    lines += [
        "# Ollama silently truncates what is longer; a longer context takes more memory.",
        f"PARAMETER num_ctx {context}",
    ]
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in _unique(stops, generation_config)]
    if generation_config.do_sample:
        names = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k"}
        values = {name: getattr(generation_config, key, None) for name, key in names.items()}
        lines += [f"PARAMETER {name} {value}" for name, value in values.items() if value is not None]
    else:
        lines += ["# The most likely token each time, as in `evaluate`.", "PARAMETER temperature 0"]
    # Ollama's own default penalizes repeated tokens, which changes the answers of a fine-tuned model.
    penalty = generation_config.repetition_penalty or 1.0
    lines += [f"PARAMETER repeat_penalty {penalty}", *(["PARAMETER repeat_last_n -1"] if penalty != 1 else [])]
    for name in unserved_settings(generation_config.to_dict(), is_server=True):
        lines.append(f"# The model's generation_config.json sets {name}, which Ollama does not have.")
    return "\n".join(lines) + "\n"


def _unique(stops: list[str], generation_config: Any) -> list[str]:
    return list(dict.fromkeys([*stops, *(generation_config.stop_strings or [])]))


def _read_parts(tokenizer: PreTrainedTokenizerBase, prompt_format: PromptFormat | None) -> _Parts:
    """Render a few conversations and cut the texts around their messages out of them."""
    try:
        prompts = [_prompt(conversation, tokenizer, prompt_format) for conversation in CONVERSATIONS]
        parts = _parts(*prompts[:3])
    except (DataError, ValueError) as error:
        raise ModelError(_refusal(str(error))) from None
    for conversation, prompt in zip(CONVERSATIONS, prompts, strict=True):
        if parts.render(conversation) != prompt:
            roles = ", ".join(role for role, _ in conversation)
            raise ModelError(_refusal(f"what it writes for a role depends on other messages ({roles})"))
    return parts


def _prompt(
    conversation: list[tuple[str, str]], tokenizer: PreTrainedTokenizerBase, prompt_format: PromptFormat | None
) -> str:
    """Render a prompt without the BOS token that the runtime writes itself."""
    messages = [{"role": role, "content": text} for role, text in conversation]
    prompt = render(messages, tokenizer, prompt_format, for_generation=True)
    adds_bos = tokenizer.bos_token is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return prompt.removeprefix(tokenizer.bos_token) if adds_bos else prompt


def _parts(one: str, with_system: str, two: str) -> _Parts:
    """Cut the prompts of the first three conversations. Raises ValueError where a text occurs more than once in one."""
    before_first, prompt = _cut(one, FIRST)
    before_system, after_system, _ = _cut(with_system, SYSTEM, FIRST)
    _, between, after_answer, _ = _cut(two, FIRST, ANSWER, SECOND)
    # What comes before each of the three users; the rest ends what was there before.
    shared = _common_end([before_first, after_system, after_answer])
    opening, end_of_system, end_of_answer = (
        text.removesuffix(shared) for text in (before_first, after_system, after_answer)
    )
    end_of_user = end_of_answer if between.startswith(end_of_answer) and prompt.startswith(end_of_answer) else ""
    return _Parts(
        opening,
        (before_system, end_of_system),
        (shared, end_of_user),
        (between.removeprefix(end_of_user), end_of_answer),
        prompt.removeprefix(end_of_user),
    )


def _cut(prompt: str, *texts: str) -> list[str]:
    """Return what is before, between and after texts."""
    parts = []
    for text in texts:
        if prompt.count(text) != 1:
            raise ValueError(f"it writes a message {prompt.count(text)} times")
        before, prompt = prompt.split(text)
        parts.append(before)
    return [*parts, prompt]


def _common_end(texts: list[str]) -> str:
    shortest = min(texts, key=len)
    return next(end for k in range(len(shortest) + 1) if all(text.endswith(end := shortest[k:]) for text in texts))


def _literal(text: str) -> str:
    """Write a text so that Go's template language and a Modelfile leave it as it is."""
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if "{{" in text or '"' in text else text


def _refusal(reason: str) -> str:
    return (
        f"export: ollama=true: no template of Ollama's writes this model's prompts: {reason}. Serve the GGUF file with "
        "llama.cpp's llama-server, which runs the chat template inside it"
    )
