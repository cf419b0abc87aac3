"""Local copies of remote files; a local path stands for itself."""

import io
import urllib.error
import urllib.request

import pytest

from forgebook.errors import StorageError
from forgebook.runs.download import cache_folder, fetch_file, fetch_folder, find_files


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FORGEBOOK_CACHE", str(tmp_path / "cache"))


def test_a_local_path_is_used_as_it_is(tmp_path):
    (tmp_path / "a.jsonl").write_text("a")
    assert fetch_file(str(tmp_path / "a.jsonl")) == tmp_path / "a.jsonl"
    assert fetch_folder(str(tmp_path)) == tmp_path
    assert cache_folder() == tmp_path / "cache" and not cache_folder().exists()


@pytest.mark.parametrize(
    ("fetch", "path", "message"),
    [
        (fetch_file, ".", r"\. is a folder; name a file in it"),
        (fetch_file, "/dev/zero", "/dev/zero is a pipe or a device: write its content to a file"),
        (fetch_file, "a\0b", "cannot be read: embedded null byte"),
        (fetch_file, "n" * 300, "cannot be read: File name too long"),
        (fetch_file, "none.jsonl", r"none\.jsonl does not exist \(looked from /"),
        (fetch_folder, "none", r"the folder none does not exist \(looked from /"),
        (fetch_folder, "https://host/model", "a folder can be read from a local path, s3:// or gs://"),
    ],
)
def test_what_cannot_be_read_is_a_readable_error(fetch, path, message):
    with pytest.raises(StorageError, match=message):
        fetch(path)


def test_a_web_file_is_downloaded_once_and_a_broken_download_leaves_nothing(monkeypatch):
    answers = [urllib.error.URLError("no route"), io.BytesIO(b"text")]

    def urlopen(url, timeout):
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    with pytest.raises(StorageError, match=r"https://host/a\.jsonl could not be read: no route"):
        fetch_file("https://host/a.jsonl")
    assert not [path for path in cache_folder().rglob("*") if path.is_file()]
    assert fetch_file("https://host/a.jsonl").read_text() == fetch_file("https://host/a.jsonl").read_text() == "text"


def test_a_signed_address_is_stored_under_the_name_of_its_file(monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: io.BytesIO(b"text"))
    assert fetch_file("https://host/signed.csv?signature=" + "s" * 2000).name == "signed.csv"


def test_a_glob_matches_files_in_order(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.txt"):
        (tmp_path / name).write_text("")
    (tmp_path / "d.jsonl").mkdir()
    assert find_files(f"{tmp_path}/*.jsonl") == [f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl"]
    for name in ("data[v2].jsonl", "what?.jsonl", "all*.jsonl", "[x].jsonl"):
        (tmp_path / name).write_text("")
        assert find_files(f"{tmp_path}/{name}") == [f"{tmp_path}/{name}"]
    (tmp_path / "set[1]").mkdir()
    (tmp_path / "set[1]" / "a[b].jsonl").write_text("")
    assert find_files(f"{tmp_path}/set[1]/*.jsonl") == [f"{tmp_path}/set[1]/a[b].jsonl"]
    assert find_files("none.jsonl") == ["none.jsonl"]  # checked when it is read
    assert find_files("https://host/a?b=*") == ["https://host/a?b=*"]
    with pytest.raises(StorageError, match="matches no file"):
        find_files(f"{tmp_path}/*.csv")


def test_folders_and_globs_of_a_bucket(s3, tmp_path):
    for name in ("model/config.json", "model/below/a.txt"):
        s3.put_object(Bucket="forgebook", Key=f"download/{name}", Body=name.encode())
    folder = fetch_folder("s3://forgebook/download/model")
    assert (folder / "below/a.txt").read_text() == "model/below/a.txt"
    assert fetch_folder("s3://forgebook/download/model") == folder  # from the cache
    assert find_files("s3://forgebook/download/model/*.json") == ["s3://forgebook/download/model/config.json"]
    with pytest.raises(StorageError, match="no files there"):
        fetch_folder("s3://forgebook/download/none")
