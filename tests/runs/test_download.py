"""Local copies of remote files; a local path stands for itself."""

import http.server
import threading
import urllib.request
from typing import ClassVar

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


@pytest.fixture
def web():
    """An HTTP server that counts the downloads of a file, and breaks off the first of a file whose name says so."""

    class Handler(http.server.BaseHTTPRequestHandler):
        downloads: ClassVar[list[str]] = []

        def do_HEAD(self):
            self.send_response(200)
            self.send_header("ETag", '"1"')
            self.send_header("Content-Length", "4")
            self.end_headers()

        def do_GET(self):
            self.do_HEAD()
            self.downloads.append(self.path)
            self.wfile.write(b"te" if "broken" in self.path and len(self.downloads) == 1 else b"text")

        def log_message(self, *words):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        Handler.address = f"http://127.0.0.1:{server.server_port}"
        yield Handler
        server.shutdown()


def over_http(monkeypatch, web):
    """Let https:// addresses of a host reach the server, which speaks HTTP."""
    opened = urllib.request.urlopen

    def urlopen(request, timeout):
        url, method = request.full_url.replace("https://host", web.address), request.get_method()
        return opened(urllib.request.Request(url, headers=request.headers, method=method), timeout=timeout)

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)


def test_a_web_file_is_downloaded_once_and_a_broken_download_leaves_nothing(monkeypatch, web):
    over_http(monkeypatch, web)
    with pytest.raises(StorageError, match=r"https://host/broken\.jsonl could not be read"):
        fetch_file("https://host/broken.jsonl")
    assert not [path for path in cache_folder().rglob("*") if path.is_file()]
    for _ in range(2):
        assert fetch_file("https://host/broken.jsonl").read_text() == "text"
    assert web.downloads == ["/broken.jsonl"] * 2


def test_a_signed_address_is_stored_under_the_name_of_its_file(monkeypatch, web):
    over_http(monkeypatch, web)
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
