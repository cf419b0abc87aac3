"""Supported combinations: every method, task and sharding, and SUPPORT.md, which is written from them and the rules."""

import json
import os
import subprocess
import sys

import pytest

from conftest import REPOSITORY, config_for
from forgebook.config.rules import RULES, Rule, broken_rules
from forgebook.config.unread_keys import UNREAD
from support_runs import METHODS, SHARDINGS, TASKS, sharded

METHODS_AND_TASKS = [(method, task) for method in METHODS for task in TASKS]
NOTES = {rule: f"rule {number}" for number, rule in enumerate(RULES, start=1)}
COMBINATIONS = [(method, task, sharding) for sharding in SHARDINGS for method in METHODS for task in TASKS]


def refusal(method: str, task: str, sharding: str) -> Rule | None:
    """Return the first rule that a combination breaks; all others train two steps, save, reload and match."""
    values = {"task": task, **sharded(sharding), **METHODS[method], **TASKS[task]}
    return next(iter(broken_rules(config_for("org/model", **values))), None)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Run a sharding's combinations when the first of them is asked for."""
    made: dict[str, dict] = {}

    def of(sharding: str) -> dict:
        if sharding not in made:
            done = subprocess.run(
                [sys.executable, "tests/support_runs.py", sharding, str(tmp_path_factory.mktemp(sharding))],
                cwd=REPOSITORY, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ".:tests"},
            )  # fmt: skip
            assert done.returncode == 0, done.stderr[-3000:]
            lines = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            made[sharding] = {(line["method"], line["task"]): line for line in lines}
        return made[sharding]

    return of


@pytest.mark.slow
@pytest.mark.parametrize(("method", "task", "sharding"), COMBINATIONS, ids=map("-".join, COMBINATIONS))
def test_it_trains_saves_and_reloads_or_says_why_not(results, method, task, sharding):
    found = results(sharding)[method, task]
    if rule := refusal(method, task, sharding):
        assert str(rule) in found["refused"]
    else:
        assert "refused" not in found, found["refused"]
        assert found["reloaded"] == pytest.approx(found["eval_loss"], rel=1e-5, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "task"), METHODS_AND_TASKS, ids=map("-".join, METHODS_AND_TASKS))
def test_every_sharding_ends_at_the_same_loss(results, method, task):
    losses = [results(s)[method, task]["eval_loss"] for s in SHARDINGS if not refusal(method, task, s)]
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-4, abs=1e-4) and len(losses) >= 2


def support_page() -> str:
    """Write SUPPORT.md: what trains, from the combinations that the tests run; what does not, from the rules."""
    lines = [
        "# Support matrix", "",
        "Which method, task and sharding work together. Every cell is a test (`tests/test_support.py`): it trains two",
        "steps, saves, loads the checkpoint with plain transformers and PEFT, and compares the loss; or the config is",
        "rejected with the reason.", "",
        "**The tests run on CPUs**, with the tiny model (a random SmolVLM for images), in float32, in one process,",
        "fsdp in two. No cell has been run on a GPU. Not in the matrix: `zero_3_hpz` and the offload files, bfloat16,",
        "packing, FlashAttention, Liger, int8. Several workers and machines: [CLUSTERS.md](CLUSTERS.md).", "",
        f"| method | task | {' | '.join('none (DDP)' if s == 'none' else s for s in SHARDINGS)} |",
        "|---|---|" + "---|" * len(SHARDINGS),
    ]  # fmt: skip
    for method, task in METHODS_AND_TASKS:
        cells = [f"no ({NOTES[rule]})" if (rule := refusal(method, task, s)) else "yes" for s in SHARDINGS]
        lines.append(f"| {method} | {task} | {' | '.join(cells)} |")
    lines += [
        "", "## What does not work", "",
        "A config that breaks one of these rules is rejected when it is loaded, with its file and line. What `plan`",
        "proposes and `--default` chooses breaks none of them.",
        "",
        "| | does not work | do instead |", "|---|---|---|",
    ]  # fmt: skip
    lines += [f"| {NOTES[rule]} | {rule.message} | {rule.fix} |" for rule in RULES]
    lines += [
        "", "## What has no effect", "",
        "These keys are read only in some tasks and modes. If the file or an override sets one where it is not read,",
        "the run starts with a warning.",
        "",
        "| has no effect | do instead |", "|---|---|",
    ]  # fmt: skip
    lines += [f"| {rule.message} | {rule.fix} |" for rule in UNREAD]
    lines += [
        "", "## Models", "",
        "Any decoder in transformers. [tests/oracles/families.md](tests/oracles/families.md) lists the families that",
        "are tested: loading, LoRA, full fine-tuning, the plan's counts, loss masks, vLLM.",
        "[tests/oracles/peers.md](tests/oracles/peers.md) runs the public tests of chat templates and LoRA that TRL,",
        "axolotl and PEFT have against this project, and says how many agree and why the others do not.",
        "",
        *engine_lines(json.loads((REPOSITORY / "benchmarks/real/results.json").read_text())["engines"]),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def engine_lines(measured: dict) -> list[str]:
    """Write how far the engines agree. measured: what benchmarks/real/run.py measured of vLLM."""
    first = f"{measured['equal_in_their_first_32_tokens']} of {measured['answers']} in their first 32 tokens"
    whole = f"{measured['equal_answers']} whole, of at most {measured['max_new_tokens']} tokens"
    median = f"they share {measured['tokens_to_the_first_difference']['median']:.0f} (median)"
    return [
        "## Engines", "",
        "Greedy answers of SmolLM2 135M and adapters on it, on a CPU, compared with those of transformers. In bfloat16",
        "the engines round differently, which decides between tokens that are about as likely.",
        "",
        "| engine | numbers | equal answers | measured by |", "|---|---|---|---|",
        "| vLLM | float32 | 20 of 20, 32 tokens each | [tests/engines](tests/engines/test_vllm.py) |",
        f"| vLLM | bfloat16 | {first}; {whole}; {median} | [benchmarks/real](benchmarks/real/results.json) |",
        "| llama.cpp | f16, beside float32 | 10 of 10, 32 tokens each | [tests/real](tests/real/test_llama_cpp.py) |",
    ]  # fmt: skip


def test_the_page_is_the_table():
    """`PYTHONPATH=. python tests/test_support.py` writes it."""
    page = (REPOSITORY / "SUPPORT.md").read_text()
    assert page == support_page() and all(rule.message in page for rule in (*RULES, *UNREAD))


def test_every_refusal_of_the_table_is_a_rule():
    refused = [one for one in COMBINATIONS if refusal(*one)]
    assert [sharding for _, _, sharding in refused].count("zero_3") == 7
    assert [one for one in refused if one[2] != "zero_3"] == [("qlora", task, "fsdp") for task in TASKS]


if __name__ == "__main__":
    (REPOSITORY / "SUPPORT.md").write_text(support_page())
