"""What goes together: the whole table of methods, tasks and shardings, and the page that shows it."""

import json
import os
import subprocess
import sys

import pytest

from conftest import REPOSITORY
from support_runs import METHODS, SHARDINGS, TASKS

# Refused with a reason; all else trains two steps, saves, reloads and matches.
REFUSED = {
    **{("qlora", task, "zero_3"): "bitsandbytes' packed weights" for task in TASKS},
    ("lora", "classification", "zero_3"): "trains single rows of the embeddings",
    ("dora", "classification", "zero_3"): "trains single rows of the embeddings",
    ("qlora", "classification", "zero_3"): "bitsandbytes' packed weights",
}
METHODS_AND_TASKS = [(method, task) for method in METHODS for task in TASKS]
COMBINATIONS = [(method, task, sharding) for sharding in SHARDINGS for method in METHODS for task in TASKS]


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
    if reason := REFUSED.get((method, task, sharding)):
        assert reason in found["refused"]
    else:
        assert found["reloaded"] == pytest.approx(found["eval_loss"], rel=1e-5, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "task"), METHODS_AND_TASKS, ids=map("-".join, METHODS_AND_TASKS))
def test_every_sharding_ends_at_the_same_loss(results, method, task):
    losses = [results(s)[method, task]["eval_loss"] for s in SHARDINGS if (method, task, s) not in REFUSED]
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-4, abs=1e-4) and len(losses) >= 2


def support_page() -> str:
    """Write SUPPORT.md from the table that the tests run."""
    lines = [
        "# What goes together", "",
        "Written from the table in `tests/test_support.py`, whose every cell is a test: two steps are trained, saved,",
        "loaded with plain transformers and PEFT, and give the same loss again; or the run is refused with the reason.",
        "",
        f"| method | task | {' | '.join('no DeepSpeed (DDP)' if s == 'none' else s for s in SHARDINGS)} |",
        "|---|---|" + "---|" * len(SHARDINGS),
    ]  # fmt: skip
    for method in METHODS:
        for task in TASKS:
            cells = [
                f"refused: {REFUSED[method, task, s]}" if (method, task, s) in REFUSED else "yes" for s in SHARDINGS
            ]
            lines.append(f"| {method} | {task} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def test_the_page_is_the_table():
    """`python tests/test_support.py` writes it."""
    assert (REPOSITORY / "SUPPORT.md").read_text() == support_page()


if __name__ == "__main__":
    (REPOSITORY / "SUPPORT.md").write_text(support_page())
