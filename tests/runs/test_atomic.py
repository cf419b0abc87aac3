"""Files and folders are complete or absent, whatever interrupts the writing."""

import pytest

from forgebook.errors import StorageError
from forgebook.runs.atomic import atomic_file, atomic_folder, delete_folder, read_json, write_json


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "f") as temporary:
        (temporary / "a").write_text("a")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with atomic_folder(tmp_path / "f") as temporary:
        (temporary / "a").write_text("a")
        assert not (tmp_path / "f").exists()
    assert (tmp_path / "f/a").read_text() == "a" and len(list(tmp_path.iterdir())) == 1


def test_a_new_folder_replaces_the_old_one_and_what_a_killed_process_left(tmp_path):
    for name in ("f", ".writing-f", ".removing-f"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "old").write_text("old")
    with atomic_folder(tmp_path / "f") as temporary:
        (temporary / "new").write_text("new")
        assert (tmp_path / "f/old").exists()  # until the new one is complete
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == ["f", "f/new"]


def test_a_file_keeps_its_old_content_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "below" / "a.json"
    write_json(path, {"loss": 1})
    with pytest.raises(RuntimeError), atomic_file(path) as temporary:
        temporary.write_text("{")
        raise RuntimeError
    assert read_json(path) == {"loss": 1} and [one.name for one in path.parent.iterdir()] == ["a.json"]
    write_json(path, {"loss": "ü"})
    assert "ü" in path.read_text() and path.read_text().endswith("}\n")


def test_a_name_may_be_written_as_a_folder(tmp_path):
    with pytest.raises(RuntimeError), atomic_file(tmp_path / "f") as temporary:
        temporary.mkdir()
        (temporary / "a").write_text("a")
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_deleting_a_folder_leaves_nothing_and_may_be_repeated(tmp_path):
    (tmp_path / "f").mkdir()
    (tmp_path / "f/a").write_text("a")
    delete_folder(tmp_path / "f")
    delete_folder(tmp_path / "f")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"  ", b'{"best": ', b"\xff\xfe{}", b"[1]", b"null", b"[" * 100_000])
@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("summary.json", "name a checkpoint, such as checkpoint=epoch-1"),
        ("data_report.json", "the run's checkpoints can be used"),
        ("adapter_config.json", "use another checkpoint of the run"),
    ],
)
def test_a_damaged_file_is_a_sentence_with_its_name_and_what_can_be_done(tmp_path, name, content, remedy):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(StorageError, match=rf"{name} is damaged: it (is|holds) .*{remedy}") as error:
        read_json(tmp_path / name)
    assert error.value.exit_code == 2 and len(str(error.value)) < 500


def test_a_missing_file_is_a_sentence(tmp_path):
    with pytest.raises(StorageError, match=r"summary\.json cannot be read: No such file"):
        read_json(tmp_path / "summary.json")
