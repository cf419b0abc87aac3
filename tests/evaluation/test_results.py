"""Results as text, as figures of evaluation.json and as a file of mistakes; no model."""

import json

import numpy as np

from forgebook.evaluation.results import (
    Comparison,
    conversation_text,
    figure_lines,
    make_evaluation,
    message_text,
    save,
    share_score,
    statistic_score,
)
from forgebook.runs.run import Run

CALL = {"function": {"name": "weather", "arguments": {"city": "Oslo"}}}


def evaluation(**values):
    compared = Comparison(["p1", "p2", "p3"], ["a", "b", "c"], ["a", "x", "y"], ["z", "b", "w"])
    kinds = [[None, "different", "empty"], ["different", None, "different"]]
    scores = [share_score("exact_match", [True, False, False], [False, True, False])]
    return make_evaluation("exact_match", scores, compared, kinds, **values)


def test_mistakes_that_the_base_did_not_make_come_first():
    mistakes = evaluation().mistakes
    assert [one["prompt"] for one in mistakes] == ["p1", "p3"]
    assert mistakes[0] == {
        "kind": "different", "base_was_right": True, "prompt": "p1", "reference": "a", "base": "a", "tuned": "z"
    }  # fmt: skip
    assert evaluation().kinds == {"different": (1, 2), "empty": (1, 0)}
    by_example = [["empty"], [None]]  # three answers of one example count once
    assert evaluation(rows=1, kinds_by_example=by_example).kinds == {"empty": (1, 0)}


def test_figures_have_flat_names(tmp_path):
    run = Run(tmp_path)
    save(evaluation(left_out=2), run)
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert written["rows"] == 3 and written["rows_left_out"] == 2 and written["metric"] == "exact_match"
    assert written["exact_match_before"] == written["exact_match_after"] == 1 / 3
    assert written["exact_match_p"] == 1.0 and written["exact_match_test"] == "McNemar, exact"
    assert len(written["exact_match_after_95"]) == 2
    assert written["mistakes"]["different"] == {"before": 1, "after": 2}
    assert len((tmp_path / "evaluation" / "mistakes.jsonl").read_text().splitlines()) == 2


def test_figures_as_lines():
    first, second = figure_lines(evaluation(left_out=2))
    assert first == ("exact match on 3 held-out examples (2 left out: dropped by truncation): base 33.3%, tuned 33.3%")
    assert second.startswith("  95% intervals 6.1% to 79.2%, ") and "p = 1 (McNemar, exact)" in second
    losses = statistic_score("perplexity", np.mean, [[3.0, 4.0]], [[1.0, 2.0]], 99)
    only = make_evaluation("perplexity", [losses], Comparison([], [], [], []), [[], []])
    assert "base 3.500, tuned 1.500" in figure_lines(only)[0]


def test_conversations_as_text():
    user, system = {"role": "user", "content": "Where?"}, {"role": "system", "content": "Be brief."}
    assert conversation_text([system, user]) == "Where?"
    calling = {"role": "assistant", "content": "I look.", "tool_calls": [CALL]}
    assert message_text(calling) == 'I look.\n{"name": "weather", "arguments": {"city": "Oslo"}}'
    assert conversation_text([user, calling]).startswith("[user] Where?\n[assistant] I look.\n{")
