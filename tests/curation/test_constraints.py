"""Checks of synthetic examples, and verifiers that cannot be used."""

import pytest

from forgebook.config.curation_blocks import SynthesisConfig
from forgebook.curation.constraints import make_constraints
from forgebook.errors import ConfigError

SCHEMA = {"type": "object", "required": ["n"], "properties": {"n": {"type": "integer"}}}


def problem(answer: str, reference: str | None = None, **settings) -> str | None:
    write = {"write": "answers"} if "exact_match" in settings else {}
    made = make_constraints(SynthesisConfig(teacher={"model": "m"}, **write, **settings))
    return made.problem([{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}], reference)


def test_a_schema():
    assert problem('{"n": 3}', json_schema=SCHEMA) is None
    assert "the answer is no JSON" in problem("n is 3", json_schema=SCHEMA)
    assert problem('{"n": "3"}', json_schema=SCHEMA) == "json_schema: $.n: '3' is not of type 'integer'"


@pytest.mark.parametrize(
    ("answer", "right"),
    [("2 + 2 = 4\n#### 4", True), ("#### 5\nNo:\n#### 4 ", True), ("#### 5", False), ("4", False)],
)
def test_a_final_answer(answer, right):
    found = problem(answer, "so it is\n#### 4", exact_match=r"#### *([^\n]+)")
    assert (found is None) == right and (right or found.startswith("exact_match: "))


def test_the_whole_text_as_the_final_answer():
    assert problem(" safe\n", "safe", exact_match=".+") is None
    assert problem("unsafe", "safe", exact_match=".+") == "exact_match: 'unsafe' instead of 'safe'"


def test_a_verifier(tmp_path):
    file = tmp_path / "checks.py"
    file.write_text(
        "def short(row):\n    text = row['messages'][-1]['content']\n    row['messages'].clear()\n"
        "    return True if len(text) < 5 else 'too long' if len(text) < 9 else False\n"
        "def broken(row):\n    return row['answer']\n"
        "def none(row):\n    pass\n"
    )
    assert problem("yes", verifier=f"{file}:short") is None
    messages = [{"role": "assistant", "content": "yes"}]
    made = make_constraints(SynthesisConfig(teacher={"model": "m"}, verifier=f"{file}:short"))
    assert made.problem(messages) is None and len(messages) == 1  # it gets a copy
    assert problem("perhaps", verifier=f"{file}:short") == "verifier: too long"
    assert problem("perhaps so", verifier=f"{file}:short") == "verifier: false"
    for name, message in {
        "broken": "raised KeyError: 'answer'",
        "none": "returned nothing, must be",
        "other": "no function",
    }.items():
        with pytest.raises(ConfigError, match=message):
            problem("yes", verifier=f"{file}:{name}")


def test_what_cannot_be_used(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        problem("yes", verifier=f"{tmp_path}/no.py:f")
    (tmp_path / "bad.py").write_text("import nothing_like_this")
    with pytest.raises(ConfigError, match="raised ModuleNotFoundError"):
        problem("yes", verifier=f"{tmp_path}/bad.py:f")
    with pytest.raises(ConfigError, match="json_schema: "):
        problem("{}", json_schema={"type": "nothing"})
