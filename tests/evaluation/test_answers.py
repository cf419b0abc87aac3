"""Answers that an interrupted evaluation leaves, and what makes them useless."""

import json

from conftest import TINY_MODEL
from forgebook.evaluation.answers import SavedAnswers, model_identity, prompt_key
from forgebook.runs.checksums import write_checksums

QUESTION = [{"role": "user", "content": "one"}]


def test_answers_are_read_again_but_for_a_line_cut_off_and_for_other_settings(tmp_path):
    path = tmp_path / "evaluation" / "answers-base.jsonl"
    first, second = prompt_key(QUESTION, None), prompt_key(QUESTION, [{"name": "a"}])
    saved = SavedAnswers(path, {"max_new_tokens": 5})
    saved.add(first, "uno\nund \u2028 so")
    saved.add(second, "dos")
    path.write_text(path.read_text()[:-8])
    again = SavedAnswers(path, {"max_new_tokens": 5})
    assert again.found == 1 and first in again and second not in again and again[first] == "uno\nund \u2028 so"
    again.add(second, "dos")
    assert SavedAnswers(path, {"max_new_tokens": 5}).found == 2
    settings, *answers = map(json.loads, path.read_text().strip().split("\n"))
    assert settings["settings"]["max_new_tokens"] == 5 and "torch" in settings["settings"] and len(answers) == 2
    assert SavedAnswers(path, {"max_new_tokens": 6}).found == 0 and len(path.read_text().splitlines()) == 1


def test_other_weights_are_another_model(tmp_path):
    assert model_identity(str(TINY_MODEL)) == model_identity(str(TINY_MODEL)) != model_identity("owner/name")
    (tmp_path / "model.safetensors").write_text("a")
    write_checksums(tmp_path)
    before = model_identity(str(tmp_path))
    (tmp_path / "model.safetensors").write_text("b")
    write_checksums(tmp_path)
    assert model_identity(str(tmp_path)) != before
