"""What is checked, counted and kept before a run."""

import itertools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from conftest import chat, uneven_rows
from forgebook.config.parse import load_config
from forgebook.data import readers, tokenize
from forgebook.data.data_sources import Source, find_sources
from forgebook.errors import DataError, StorageError
from forgebook.models.tokenizer import load_tokenizer
from forgebook.planning.prepare import check_rows, prepare, report_rows
from forgebook.runs import atomic, object_store, run

FORMAT = {"system": "{instruction}", "user": "{instruction}", "assistant": "{instruction}<|end|>"}


def prepared(config):
    return prepare(config, run.open_run(config))


def test_all_bad_rows_are_in_the_report(make_config, tmp_path):
    """Peers' point 22: every bad row of both sets, in one pass."""
    bad = "\n".join(json.dumps({"messages": [{"role": "user", "content": k}]}) for k in range(30))
    (tmp_path / "bad.jsonl").write_text(json.dumps(chat("q", "a")) + "\n" + bad)
    (tmp_path / "worse.jsonl").write_text("{")
    config = make_config(train_path=str(tmp_path / "bad.jsonl"), valid_path=str(tmp_path / "worse.jsonl"))
    with pytest.raises(DataError, match=r"30 of 31 rows[\s\S]*and 10 more[\s\S]*1 of 1 rows[\s\S]*on_bad_rows: drop"):
        prepared(config)
    report = atomic.read_json(run.open_run(config).data_report)
    assert len(report["train"]["problems"]) == 30 and len(report["valid"]["problems"]) == 1
    assert report["train"]["problems"][29].startswith("bad.jsonl:31: messages[0].content is 29; expected a string")


def test_bad_rows_can_be_dropped_and_are_listed(make_config, tmp_path):
    (tmp_path / "some.jsonl").write_text("\n".join([json.dumps(chat("q", "a")), "{", json.dumps(chat("q", "b"))]))
    report = prepared(make_config(train_path=str(tmp_path / "some.jsonl"), on_bad_rows="drop")).report
    assert report["train"]["rows"] == 2 and report["train"]["rows_read"] == 3 and report["train"]["rows_bad"] == 1
    assert "some.jsonl:2" in report["train"]["problems"][0]
    assert "1 bad, dropped" in {line[0]: line[1] for line in report_rows(report)}["examples"]


def test_a_row_that_no_template_takes_is_a_bad_row(make_config, write_rows):
    many = [chat("q", "a"), {"messages": [{"role": "tool", "content": "x"}, {"role": "critic", "content": "y"}]}]
    with pytest.raises(DataError, match=r"rows\.jsonl:2: messages\[1\]\.role"):
        prepared(make_config(train_path=write_rows(many)))


def test_the_report_counts_what_a_user_wants_to_know(make_config, write_rows):
    train = [chat("q1", "a"), chat("q1", "a"), chat("q2", "b") | {"source": "web"}]
    train.append({"instruction": "i", "output": "<|end|>"})
    config = make_config(train_path=write_rows(train, "t.jsonl"), valid_path=write_rows([chat("q1", "a")], "v.jsonl"))
    report = prepared(config).report
    assert report["train"]["formats"] == {"messages": 3, "alpaca": 1} and report["train"]["turns"] == 11
    assert report["train"]["ignored_columns"] == {"source": 1}
    assert report["train"]["duplicate_rows"] == 1 and report["train"]["duplicates"] == ["t.jsonl:2"]
    assert report["overlap"] == {"rows": 1, "places": ["v.jsonl:1"]}
    assert report["train"]["truncation"]["longer_rows"] == 0 and report["train"]["padding_share"] < 1
    assert ["also in training", "", "1 example"] in report_rows(report)
    assert ["ignored keys", "source (1)", ""] in report_rows(report)
    special = "<|end|> (1): characters, not tokens, which only the template writes"
    assert ["special tokens in texts", special, ""] in report_rows(report)


def test_rows_are_checked_without_a_tokenizer(make_config, write_rows, monkeypatch, tmp_path):
    good, bad = write_rows([chat("q", "a")], "good.jsonl"), write_rows([chat("q", "a"), {"oops": 1}], "bad.jsonl")
    monkeypatch.setattr("forgebook.planning.prepare.tokenizer_of", None)
    check_rows(make_config(train_path=good))
    check_rows(make_config(train_path=bad, on_bad_rows="drop"))
    monkeypatch.setattr(object_store, "download_file", lambda uri, target: shutil.copy(bad, target))
    monkeypatch.setattr(object_store, "file_version", lambda uri: "1")
    monkeypatch.setenv("FORGEBOOK_CACHE", str(tmp_path / "cache"))
    for place in ("s3", "gs"):
        with pytest.raises(DataError, match=r"1 of 2 rows of .*\n  x\.jsonl:2: no 'messages'"):
            check_rows(make_config(train_path=f"{place}://bucket/x.jsonl", valid_path=None))
    for paths in ({"train_path": bad}, {"train_path": good, "valid_path": bad}):
        config = make_config(**paths)
        with pytest.raises(DataError, match=r"1 of 2 rows of .*\n  bad\.jsonl:2: no 'messages'") as error:
            check_rows(config)
        assert run.open_run(config).data_report.exists() and "All of them: " in str(error.value)
    with pytest.raises(StorageError, match=r"absent\.jsonl does not exist"):
        check_rows(make_config(train_path=str(tmp_path / "absent.jsonl"), on_bad_rows="drop"))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="is empty"):
        check_rows(make_config(train_path=str(tmp_path / "empty.jsonl")))


def test_large_files_and_the_hub_are_sampled_without_a_tokenizer(make_config, write_rows, monkeypatch, tmp_path):
    (tmp_path / "hub").mkdir()
    bad = write_rows([{"oops": 1}, *[chat("q", "a")] * 30, {"oops": 2}], "hub/bad.jsonl")
    monkeypatch.setattr("forgebook.planning.prepare.tokenizer_of", None)
    monkeypatch.setattr("forgebook.data.data_sources.LARGE_FILE", 1)
    clock = itertools.count(step=0.2)  # ten rows or so
    monkeypatch.setattr("forgebook.data.examples.time", SimpleNamespace(monotonic=lambda: next(clock)))
    for path in (bad, f"hf://{Path(bad).parent}:train"):
        with pytest.raises(DataError, match=r"1 of the first \d rows of .*\n  .*:1: no 'messages'"):
            check_rows(make_config(train_path=path))


def test_rows_per_label(make_config, write_rows):
    many = [chat("q", label) for label in ("[[1]]", "[[2]]", "[[2]]")]
    config = make_config(
        train_path=write_rows(many, "t.jsonl"), valid_path=None, task="classification",
        classifier_config={"label_tokens": ["[[1]]", "[[2]]"]},
    )  # fmt: skip
    assert prepared(config).report["train"]["rows_per_label"] == {"[[1]]": 1, "[[2]]": 2}


def test_mixes_follow_their_weights(make_config, write_rows):
    paths = [write_rows([chat(f"{name}{k}", "a") for k in range(20)], f"{name}.jsonl") for name in ("x", "y", "z")]
    mix = [paths[0], {"path": paths[1], "weight": 0.5}, {"path": paths[2], "weight": 2}]
    train = prepared(make_config(train_path=mix)).train
    counts = {name: sum(train.where(k).startswith(name) for k in range(len(train))) for name in "xyz"}
    assert counts == {"x": 20, "y": 10, "z": 40}


# A share held out -------------------------------------------------------------------------------------


def test_a_share_is_held_out_and_reported(make_config, write_rows):
    rows = [{"q": f"question {k // 2}", "a": f"answer {k}", "id": k} for k in range(40)] + [{"q": "q", "a": "a"}] * 3
    source = {"path": write_rows(rows, "qa.jsonl"), "columns": {"user": "q", "assistant": "a"}}
    config = make_config(train_path=source, valid_path={"split": 0.1})
    made = prepared(config)
    report = made.report
    assert report["valid"]["rows"] == 4 and report["valid"]["held_out"] == {"prompts": 2, "duplicates_left_out": 0}
    assert report["train"]["rows"] + 4 == 43 and report["overlap"]["rows"] == 0
    table = {line[0]: line[1:] for line in report_rows(report)}
    assert table["held out"] == ["", "2 prompts"] and table["data"][1] == "0.1 of the training examples"
    assert table["format"] == ["43 mapped columns", ""] and table["ignored keys"][0] == "id (40)"
    [described] = report["train"]["sources"]
    assert described["uri"] == source["path"] and described["bytes"] == Path(source["path"]).stat().st_size
    again = prepared(make_config(train_path=source, valid_path={"split": 0.1}, run_name="again", seed=7))
    assert again.report["valid"]["fingerprint"] == report["valid"]["fingerprint"]
    made.write_held_out(run.open_run(config).folder.parent / "held_out.jsonl")
    written = (run.open_run(config).folder.parent / "held_out.jsonl").read_text().splitlines()
    assert len(written) == 4 and all(json.loads(line)["messages"][0]["content"] for line in written)


def test_max_examples_samples_both_sets(make_config):
    sizes = [
        [prepared(make_config(max_examples=most)).report[name]["rows"] for name in ("train", "valid")]
        for most in (5, 1000)
    ]
    assert sizes == [[5, 5], [24, 6]]
    first, second = (prepared(make_config(max_examples=5, seed=seed)).report["train"] for seed in (1, 2))
    assert first["fingerprint"] == second["fingerprint"]


# The cache: peers' points 20 and 21 -------------------------------------------------------------------


def kept(config) -> set[str]:
    return {path.name for path in run.open_run(config).folder.parent.glob(".tokens/*")}


def test_tokens_are_made_once(make_config, monkeypatch):
    first = prepared(make_config())
    monkeypatch.setattr(tokenize, "encode_examples", lambda *_: pytest.fail("tokenized again"))
    again = prepared(make_config(run_name="another", learning_rate=2e-3))
    assert again.report["train"] == first.report["train"]


@pytest.mark.parametrize(
    "change",
    [
        {"train_on": "last"},
        {"rewritten_turns": "expand"},
        {"task": "causal_lm"},
        {"generation_config": {"prompt_format": FORMAT}},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_a_change_of_what_is_trained_makes_new_tokens(make_config, change):
    before = kept(config) if (config := make_config(valid_path=None)) and prepared(config) else set()
    prepared(make_config(valid_path=None, **change))
    assert len(kept(config) - before) == 1


def test_a_change_of_rows_or_template_makes_new_tokens(make_config, write_rows, tmp_path):
    """Two templates never share a cache."""
    from conftest import TINY_MODEL

    other = tmp_path / "other"
    shutil.copytree(TINY_MODEL, other)
    template = other / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    config = make_config(valid_path=None)
    prepared(config)
    first = kept(config)
    prepared(make_config(valid_path=None, model_id=str(other)))
    second = kept(config)
    prepared(make_config(valid_path=None, train_path=write_rows(uneven_rows(25), "train-2.jsonl")))
    assert len(first) == 1 and len(second) == 2 and len(kept(config)) == 3


def test_a_template_that_prints_the_date_is_rendered_each_day(tokenizer):
    import copy

    dated = copy.deepcopy(tokenizer)
    dated.chat_template = "{{ strftime_now('%f') }}" + tokenizer.chat_template  # microseconds: always another
    rest = tokenize.EncodingOptions(), None
    keys = {tokenize._cache_key(Source(__file__), dated, *rest) for _ in range(3)}
    assert len(keys) == 3 and tokenize._cache_key(Source(__file__), tokenizer, *rest) not in keys


@pytest.mark.slow
def test_ray_data_makes_the_same_tokens(ray_session, tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in uneven_rows(300)) + "{\n")
    monkeypatch.setattr(readers, "CHUNK_BYTES", 20_000)
    tokenizer = load_tokenizer("tiny_model")
    made = {}
    for way, most in (("here", 1000), ("ray", 0)):
        monkeypatch.setattr(tokenize, "CHUNKS_HERE", most)
        made[way] = tokenize.tokenize(find_sources(str(path)), tokenizer, tokenize.EncodingOptions(), tmp_path / way)
    (here, here_notes), (ray, ray_notes) = made["here"], made["ray"]
    assert len(here.files) > 3 and len(here) == 300
    assert [here.where(k) for k in range(300)] == [ray.where(k) for k in range(300)]
    assert all(
        (here.example(k)[0] == ray.example(k)[0]).all() and (here.example(k)[1] == ray.example(k)[1]).all()
        for k in range(300)
    )
    assert here_notes == ray_notes and len(here_notes.problems) == 1


@pytest.mark.parametrize(
    ("values", "warmup"), [({}, 0), ({"num_epochs": 4, "max_steps": 10}, 1), ({"num_warmup_steps": 2}, 2)]
)
def test_a_default_warmup_leaves_a_short_run_its_learning_rate(make_config, values, warmup):
    """24 examples in batches of 8 are 3 steps per epoch: 10 steps of warm-up would be the whole run."""
    config = make_config(**values)
    if "num_warmup_steps" not in values:
        path = Path(config.source)
        settings = json.loads(path.read_text())
        del settings["num_warmup_steps"]
        path.write_text(json.dumps(settings))
        config = load_config(path)
    resolved = prepared(config).config
    assert resolved.num_warmup_steps == warmup
    assert (resolved.origins["num_warmup_steps"] == "auto") == (warmup != 2)
