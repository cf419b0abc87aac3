"""Answers that an interrupted evaluation leaves, and what makes them useless."""

import json

from forgebook.evaluation.answers import SavedAnswers, prompt_key

QUESTION = [{"role": "user", "content": "one"}]


def test_answers_are_read_again_but_for_a_line_cut_off_and_for_other_settings(tmp_path):
    folder = tmp_path / "evaluation"
    first, second = prompt_key(QUESTION, None), prompt_key(QUESTION, [{"name": "a"}])
    saved = SavedAnswers(folder, "base", {"max_new_tokens": 5})
    saved.add(first, "uno\nund \u2028 so")
    saved.add(second, "dos")
    path = saved.path
    path.write_text(path.read_text()[:-8])
    again = SavedAnswers(folder, "base", {"max_new_tokens": 5})
    assert again.found == 1 and first in again and second not in again and again[first] == "uno\nund \u2028 so"
    again.add(second, "dos")
    assert SavedAnswers(folder, "base", {"max_new_tokens": 5}).found == 2
    settings, *answers = map(json.loads, path.read_text().strip().split("\n"))
    assert settings["settings"]["max_new_tokens"] == 5 and "torch" in settings["settings"] and len(answers) == 2
    assert SavedAnswers(folder, "base", {"max_new_tokens": 6}).found == 0


def test_evaluations_at_the_same_time_do_not_take_each_others_answers(tmp_path):
    """As of two checkpoints of a run, each in its own terminal."""
    key = prompt_key(QUESTION, None)
    one = SavedAnswers(tmp_path, "tuned", {"model": "epoch-1"})
    other = SavedAnswers(tmp_path, "tuned", {"model": "epoch-2"})
    one.add(key, "of epoch 1")
    other.add(key, "of epoch 2")
    again = [SavedAnswers(tmp_path, "tuned", {"model": f"epoch-{k}"})[key] for k in (1, 2)]
    assert again == ["of epoch 1", "of epoch 2"]
