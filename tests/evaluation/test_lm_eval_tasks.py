"""lm-eval's own package on a task of this test: no network, its scoring, both models."""

import json

import pytest

from conftest import TINY_MODEL
from forgebook.errors import ConfigError
from forgebook.evaluation.lm_eval_tasks import run_tasks
from forgebook.inference.loading import load_together

lm_eval = pytest.importorskip("lm_eval", reason="needs lm-eval (requirements-dev.txt)")

TASK = """\
task: toy
dataset_path: json
dataset_kwargs: {data_files: {test: "FOLDER/toy.jsonl"}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"question": f"Where is lamp {k}?", "choices": ["on the table", "zzqx"], "answer": k % 2} for k in range(6)]
    (tmp_path / "toy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "toy.yaml").write_text(TASK.replace("FOLDER", str(tmp_path)))
    return str(tmp_path)


@pytest.mark.slow
def test_a_task_is_scored_on_both_models_with_the_chat_template(tasks, monkeypatch):
    [loaded] = load_together([TINY_MODEL])
    seen = []
    usual = loaded.tokenizer.apply_chat_template

    def listen(messages, *arguments, **options):
        seen.append(messages)
        return usual(messages, *arguments, **options)

    monkeypatch.setattr(loaded.tokenizer, "apply_chat_template", listen)
    [score] = run_tasks(iter([("base", loaded), ("tuned", loaded)]), ["toy"], tasks)
    assert score.name == "toy acc" and score.before == score.after and score.difference.p == 1
    # The tiny model would never write the second choice, which is right in half of the rows.
    assert score.after.value == 0.5
    assert seen and seen[0][-1]["content"].startswith("Where is lamp")


@pytest.mark.slow
def test_an_unknown_task_is_an_error(tasks):
    with pytest.raises(ConfigError, match="no task toys"):
        run_tasks(iter([]), ["toys"], tasks)
    with pytest.raises(ConfigError, match="not a folder"):
        run_tasks(iter([]), ["toy"], "nowhere")
