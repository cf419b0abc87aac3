"""Small templates with the behavior of public families x shapes of examples: each pair is right, or refused.

A template is one way to treat thoughts, generation prompts, ends of turns and tools, as families combine them: Qwen 3
shows the last thought, R1-Distill cuts thoughts and opens one, DeepSeek V3.1 and Gemma 4 close one, GLM 4.5 ends none.
"""

import copy
import itertools

import pytest

from conftest import supervised_text
from forgebook.data.masking import encode_many, encode_prompt
from forgebook.errors import DataError

SAID = {
    "unknown": "{{ m.content }}",
    "native": "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}",
    "last": "{% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}",
    "cut": "{{ m.content.split('</think>')[-1] }}",
}
PROMPTS = {"plain": "", "opens": "<think>\n", "closes": "<think></think>"}
ENDS = {"token": "<|end|>", "none": "", "newline": "<|end|>\n"}
CALLS = {
    "json": "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}",
    "xml": "{% for c in m.tool_calls or [] %}<f={{ c.function.name }}>{% for k, v in c.function.arguments.items() %}"
    "<{{ k }}>{{ v }}{% endfor %}{% endfor %}",
    "first": "{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% endif %}",
    "dropped": "",
}
CALL = {"type": "function", "function": {"name": "read", "arguments": {"place": "Oslo", "days": 2}}}
SECOND = {"type": "function", "function": {"name": "look", "arguments": {"place": "Rome"}}}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": f"To {name}.", "parameters": {"type": "object"}}}
    for name in ("read", "look")
]
USER, ANSWER = {"role": "user", "content": "How warm?"}, {"role": "assistant", "content": "Four degrees."}
THOUGHT = ANSWER | {"reasoning_content": "It says 4."}
RESULT = {"role": "tool", "content": "it is 4"}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
SHAPES = {
    "plain": [USER, ANSWER],
    "system": [{"role": "system", "content": "Be short."}, USER, ANSWER],
    "two turns": [USER, ANSWER, USER, ANSWER],
    "thought": [USER, THOUGHT],
    "thought in content": [USER, ANSWER | {"content": "<think>\nIt says 4.\n</think>\n\nFour degrees."}],
    "two thoughts": [USER, THOUGHT, USER, THOUGHT],
    "a thought, then none": [USER, THOUGHT, USER, ANSWER],
    "empty thought": [USER, ANSWER | {"reasoning_content": ""}],
    "call": [USER, CALLING],
    "call and result": [USER, CALLING, RESULT, ANSWER],
    "parallel calls": [USER, CALLING | {"tool_calls": [CALL, SECOND]}, RESULT, RESULT, ANSWER],
    "thinking agent": [USER, CALLING | {"reasoning_content": "Look first."}, RESULT, THOUGHT],
    "open end": [USER, ANSWER, USER],
    "weight 0": [USER, ANSWER | {"weight": 0}, USER, ANSWER],
    "unicode": [USER, ANSWER | {"content": "Vier Grad: 4 °C ☃ <b>&</b>"}],
}
PARTS = {"read", "look", "Oslo", "Rome", "It says 4.", "Look first.", "Four degrees.", "Vier Grad: 4 °C ☃ <b>&</b>"}


def template(said: str, prompt: str, end: str, calls: str) -> str:
    return (
        "{% if tools %}<|system|>{{ tools | tojson }}<|end|>{% endif %}{% for m in messages %}<|{{ m.role }}|>"
        f"{{% if m.role == 'assistant' %}}{SAID[said]}{CALLS[calls]}{{% else %}}{{{{ m.content }}}}{{% endif %}}"
        f"{ENDS[end]}{{% endfor %}}{{% if add_generation_prompt %}}<|assistant|>{PROMPTS[prompt]}{{% endif %}}"
    )


def parts_of(message: dict) -> set[str]:
    return {part for part in PARTS if part in str(message)}


def refusals(messages: list[dict], prompt: str, calls: str) -> list[str]:
    """List the reasons for which an example may be refused with a template."""
    reasons = []
    if prompt == "closes" and ("It says 4." in str(messages) or "Look first." in str(messages)):
        reasons.append("closes the thought")
    if calls == "first" and "look" in str(messages):
        reasons.append("leaves out the call of 'look'")
    return reasons


@pytest.mark.parametrize("shape", SHAPES)
def test_every_pair_is_right_or_refused_for_a_true_reason(tokenizer, shape):
    messages = SHAPES[shape]
    tools = TOOLS if "tool_calls" in str(messages) else None
    for said, prompt, end, calls in itertools.product(SAID, PROMPTS, ENDS, CALLS):
        if tools is None and calls != "json":
            continue
        screened = copy.copy(tokenizer)
        screened.chat_template = template(said, prompt, end, calls)
        [rows] = encode_many([(messages, tools)], screened, rewritten_turns="expand")
        expected = refusals(messages, prompt, calls)
        name = f"{said}, {prompt}, {end}, {calls}: {rows}"
        if isinstance(rows, DataError):
            assert any(reason in str(rows) for reason in expected), name
            continue
        assert not expected, name
        supervised = "".join(supervised_text(row, screened) for row in rows)
        targets = [k for k, m in enumerate(messages) if m["role"] == "assistant" and m.get("weight") != 0]
        for k in targets:
            assert all(part in supervised for part in parts_of(messages[k])), name
        ids = encode_prompt(messages[: targets[0]], screened, tools=tools)
        assert rows[0].input_ids[: len(ids)] == ids, name
        ended = [row.input_ids[j] for row in rows for j in range(len(row.loss_mask)) if row.loss_mask[j]][-1:]
        assert ended[0] in {2, 4, 6}, name
