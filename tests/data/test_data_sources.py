"""Globs, folders of shards, data sets of `datasets.save_to_disk`, and remote files with their versions."""

import json

import pytest

from conftest import chat
from forgebook.config.data_block import DataSource
from forgebook.data.data_sources import content_key, describe_source, find_sources, is_large
from forgebook.data.examples import read_examples
from forgebook.data.readers import read_chunk, split_source
from forgebook.errors import StorageError

ROWS = [chat(f"q{k}", f"a{k}") for k in range(4)]


def write(path, rows=ROWS):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def answers(path, *arguments):
    return [one.conversation[-1]["content"] for one in read_examples(path, *arguments)]


def test_a_folder_of_shards(tmp_path):
    for name in ("b-1.jsonl", "a-0.jsonl", "README.md", "dataset_info.json", ".hidden.jsonl"):
        write(tmp_path / "data" / name)
    names = [source.uri.rsplit("/", 1)[1] for source in find_sources(str(tmp_path / "data"))]
    assert names == ["a-0.jsonl", "b-1.jsonl"] and len(answers(f"{tmp_path}/data/")) == 8


@pytest.mark.parametrize("at_the_top", [[], ["a.jsonl"]], ids=["below alone", "at the top, too"])
def test_data_files_in_folders_of_a_folder_are_not_left_out_in_silence(tmp_path, at_the_top):
    for name in (*at_the_top, "more/b.jsonl", ".cache/c.jsonl", "more/notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}\n")
    with pytest.raises(StorageError, match=r"data files in folders of its own \(more/b\.jsonl\).*/\*\*/\*\.jsonl"):
        find_sources(str(tmp_path))
    assert [source.uri.rsplit("/", 1)[1] for source in find_sources(f"{tmp_path}/more")] == ["b.jsonl"]


@pytest.mark.parametrize(
    "other", ["test.jsonl", "x-validation-00000.parquet", "val.jsonl", "held_out.csv", "evaluation.json"]
)
@pytest.mark.parametrize("first", ["train-00000.jsonl", "rows.jsonl"])
def test_a_folder_of_several_splits_is_refused(tmp_path, first, other):
    """Its test examples would be trained."""
    for name in (first, other):
        write(tmp_path / "data" / name)
    with pytest.raises(StorageError, match=r"holds files of several splits .*name those to read"):
        find_sources(str(tmp_path / "data"))
    assert len(find_sources(str(tmp_path / "data" / first.replace("-00000.jsonl", "*")))) == 1


def test_files_beside_those_of_one_split_are_read(tmp_path):
    for name in ("train.jsonl", "contest.jsonl", "values.jsonl"):
        write(tmp_path / "data" / name)
    assert len(find_sources(str(tmp_path / "data"))) == 3


def test_a_data_set_that_was_saved_to_disk(tmp_path):
    from datasets import Dataset, DatasetDict

    saved = Dataset.from_list([*ROWS, *ROWS])
    saved.save_to_disk(tmp_path / "saved", num_shards=2)
    assert answers(str(tmp_path / "saved")) == ["a0", "a1", "a2", "a3"] * 2
    DatasetDict({"train": saved, "test": saved}).save_to_disk(tmp_path / "both")
    with pytest.raises(StorageError, match=r"several splits, .* name one of .*both/train, .*both/test"):
        find_sources(str(tmp_path / "both"))
    assert len(answers(str(tmp_path / "both" / "train"))) == 8
    [shard, _] = find_sources(str(tmp_path / "saved"))
    [chunk] = split_source(shard)
    assert [where.rsplit(":", 1)[1] for where, _ in read_chunk(chunk)] == ["1", "2", "3", "4"]


def test_a_source_has_its_mapping_and_is_described(tmp_path):
    path = write(tmp_path / "qa.jsonl", [{"q": "1", "a": "2"}])
    [source] = find_sources(DataSource(path=str(path), columns={"user": "q", "assistant": "a"}))
    assert source.mapping.columns == (("user", "q"), ("assistant", "a")) and source.version is None
    assert describe_source(source) == {"uri": str(path), "content": content_key(source), "bytes": 21}
    assert not is_large(source)
    with pytest.raises(StorageError, match="revision is for data sets of the hub"):
        find_sources(DataSource(path=str(path), revision="main"))


def test_a_changed_object_is_read_again(s3, write_rows):
    """And one that changes while it is read is an error that names it."""
    path, uri = write_rows(ROWS[:1]), "s3://forgebook/stale/rows.jsonl"
    s3.upload_file(path, "forgebook", "stale/rows.jsonl")
    assert answers(uri) == ["a0"]
    [before] = find_sources(uri)
    s3.upload_file(write_rows(ROWS), "forgebook", "stale/rows.jsonl")
    assert answers(uri) == ["a0", "a1", "a2", "a3"]
    assert [raw for chunk in split_source(before) for _, raw in read_chunk(chunk)] == ROWS[:1]  # the copy that it has
    [after] = find_sources(uri)
    assert before.version != after.version == describe_source(after)["version"]
    s3.upload_file(write_rows(ROWS[:2]), "forgebook", "stale/rows.jsonl")
    s3.upload_file(write_rows(ROWS[:3]), "forgebook", "stale/other.jsonl")
    assert len(find_sources("s3://forgebook/stale/")) == 2


def test_an_object_that_is_replaced_before_it_is_read_is_an_error(s3, write_rows):
    s3.upload_file(write_rows(ROWS), "forgebook", "moving/rows.jsonl")
    [found] = find_sources("s3://forgebook/moving/rows.jsonl")
    s3.upload_file(write_rows(ROWS[:1]), "forgebook", "moving/rows.jsonl")
    with pytest.raises(StorageError, match=r"s3://forgebook/moving/rows\.jsonl was changed while it was read"):
        split_source(found)


def test_a_copy_that_is_current_costs_one_head(s3, door, write_rows):
    s3.upload_file(write_rows(ROWS), "forgebook", "heads/rows.jsonl")
    answers("s3://forgebook/heads/rows.jsonl")
    calls = []
    door.answers = lambda method, path: calls.append(method)
    assert len(answers("s3://forgebook/heads/rows.jsonl")) == 4 and calls == ["HEAD"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("tatsu-lab/alpaca", "a data set of the hub is hf://tatsu-lab/alpaca:train"),
        ("s3://", "s3:// without a bucket"),
        ("gs:///rows/", "gs:// without a bucket"),
    ],
)
def test_an_address_that_nothing_reads_has_its_fix(path, message):
    with pytest.raises(StorageError, match=message):
        find_sources(path)


def test_a_file_without_suffix_in_a_folder_is_read(tmp_path, monkeypatch, write_rows):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows/train").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert [source.uri for source in find_sources("rows/train")] == ["rows/train"]
