"""Reading and writing on a real S3 server over HTTP, and the errors when it refuses."""

import os
import socket
import subprocess
import sys
import time

import pytest

from conftest import REPOSITORY, TINY_MODEL, chat, uneven_rows
from forgebook.data.examples import read_examples
from forgebook.errors import BucketBusyError, StorageError
from forgebook.launch.fine_tune import fine_tune
from forgebook.models.tokenizer import locate
from forgebook.runs import download, object_store, time_limit


def test_rows_from_a_bucket(s3, write_rows):
    s3.upload_file(write_rows([chat("q", "a")]), "forgebook", "data/rows.jsonl")
    assert read_examples("s3://forgebook/data/rows.jsonl")[0].messages[-1]["content"] == "a"


def test_a_glob_in_a_bucket(s3, write_rows):
    for name in ("a.jsonl", "b.jsonl", "c.txt"):
        s3.upload_file(write_rows([chat("q", "a")]), "forgebook", f"glob/{name}")
    found = download.find_files("s3://forgebook/glob/*.jsonl")
    assert found == ["s3://forgebook/glob/a.jsonl", "s3://forgebook/glob/b.jsonl"]
    with pytest.raises(StorageError, match="matches no file"):
        download.find_files("s3://forgebook/glob/*.csv")


@pytest.fixture(params=["s3", "gs"])
def silent_uri(request, monkeypatch):
    """A URI in a bucket whose server accepts connections and sends nothing; calls are given up after 1 s."""
    for module in (object_store, time_limit):
        monkeypatch.setattr(module, "GIVE_UP_SECONDS", 1)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", address)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{address}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "test")
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        yield f"{request.param}://forgebook/rows.jsonl"


@pytest.mark.parametrize(
    "call",
    [object_store.list_files, object_store.has_file, object_store.read_file, object_store.remove_folder,
     lambda uri: object_store.write_file(uri, b"x"), download.fetch_file],
    ids="list has read remove write fetch".split(),
)  # fmt: skip
def test_a_server_that_sends_nothing_is_given_up(silent_uri, tmp_path, monkeypatch, call):
    monkeypatch.setenv("FORGEBOOK_CACHE", str(tmp_path))
    started = time.monotonic()
    with pytest.raises(BucketBusyError, match=f"{silent_uri} could not be .*does not answer or is overloaded"):
        call(silent_uri)
    assert time.monotonic() - started < 10


def test_a_run_from_a_model_and_rows_in_a_bucket(s3, make_config, write_rows):
    for path in TINY_MODEL.iterdir():
        s3.upload_file(str(path), "forgebook", f"models/tiny/{path.name}")
    s3.upload_file(write_rows(uneven_rows(16)), "forgebook", "data/train.jsonl")
    config = make_config(model_id="s3://forgebook/models/tiny", train_path="s3://forgebook/data/train.jsonl")
    assert fine_tune(config).is_complete


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("s3://forgebook/none.jsonl", "nothing has that name"),
        ("s3://no-such-bucket/rows.jsonl", "there is no such bucket"),
    ],
    ids=["key", "bucket"],
)
def test_what_is_not_there_is_a_readable_error(door, tmp_path, path, message):
    with pytest.raises(StorageError, match=f"{path} could not be read: {message}"):
        download.fetch_file(path)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    with pytest.raises(StorageError):
        locate(path)


@pytest.mark.parametrize("use", ["read", "list", "write"])
@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("no such bucket", "there is no such bucket"),
        ("no right", "the credentials do not allow it"),
        ("unknown key id", "the credentials are wrong or have expired"),
        ("wrong secret", "the credentials are wrong or have expired"),
        ("wrong region", "set AWS_DEFAULT_REGION to the bucket's region .*expecting 'eu-west-1'"),
        ("moved", "set AWS_DEFAULT_REGION"),
        ("slow down", "does not answer or is overloaded"),
    ],
)
def test_an_error_of_a_bucket_has_its_fix(door, monkeypatch, answer, message, use):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    door.answers = lambda method, path: answer
    uses = {
        "read": lambda: download.fetch_file("s3://forgebook/rows.jsonl"),
        "list": lambda: object_store.list_files("s3://forgebook/run"),
        "write": lambda: object_store.write_file("s3://forgebook/x", b"x"),
    }
    with pytest.raises(StorageError, match=f"s3://forgebook/.* could not be .*: .*{message}"):
        uses[use]()


def test_missing_credentials_are_distinguished_from_wrong_ones(door, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    door.answers = lambda method, path: "no right"
    with pytest.raises(StorageError, match="no credentials were found"):
        download.fetch_file("s3://forgebook/rows.jsonl")


def test_an_endpoint_that_is_not_there(door, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(BucketBusyError, match=r"the server of http://127\.0\.0\.1:9 does not answer"):
        download.fetch_file("s3://forgebook/rows.jsonl")


def test_a_request_is_tried_again(door):
    door.answers = lambda method, path: "slow down" if door.refused < 2 else None
    object_store.write_file("s3://forgebook/again", b"x")
    assert door.refused == 2 and object_store.read_file("s3://forgebook/again") == b"x"


def test_https_errors_are_readable():
    with pytest.raises(StorageError, match=r"https://127\.0\.0\.1:9/rows\.jsonl could not be read"):
        download.fetch_file("https://127.0.0.1:9/rows.jsonl")


@pytest.fixture
def folder(tmp_path):
    """A folder with a file in it, and another below."""
    (tmp_path / "f/below").mkdir(parents=True)
    (tmp_path / "f/a").write_text("a")
    (tmp_path / "f/below/b").write_text("bb")
    return tmp_path / "f"


def test_a_folder_is_there_whole_or_not_at_all(door, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    uri = "s3://forgebook/whole"
    door.answers = lambda method, path: "slow down" if method == "PUT" and path.endswith("/b") else None
    with pytest.raises(BucketBusyError):
        object_store.upload_folder(folder, uri)
    assert object_store.read_manifest(uri) is None and not object_store.download_folder(uri, tmp_path / "got")
    with pytest.raises(StorageError, match="is not complete: its upload was interrupted"):
        download.fetch_folder(uri)
    door.answers = lambda method, path: None
    object_store.upload_folder(folder, uri)
    assert object_store.download_folder(uri, tmp_path / "got")
    assert object_store.make_manifest(tmp_path / "got") == object_store.make_manifest(folder)  # times of change, too
    assert (download.fetch_folder(uri) / "below/b").read_text() == "bb"
    object_store.remove_folder(uri)
    assert object_store.list_files(uri) == {}


def test_a_file_that_is_not_what_was_uploaded_is_found(door, folder, tmp_path):
    object_store.upload_folder(folder, "s3://forgebook/short")
    object_store.write_file("s3://forgebook/short/a", b"longer")
    with pytest.raises(StorageError, match="has 6 bytes, its manifest has 1"):
        object_store.download_folder("s3://forgebook/short", tmp_path / "got")
    assert not (tmp_path / "got").exists()


def test_the_engine_needs_no_boto3():
    """pyarrow finds credentials itself; boto3 is for notebooks and tests that act as a user."""
    code = "import sys; sys.modules['boto3'] = None; from forgebook.runs import object_store as o; o.open_bucket('s3://b/k')"
    subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, check=True, env=os.environ | {"AWS_REGION": "eu-west-1"}
    )


def test_the_region_is_the_environments_or_the_buckets_own(monkeypatch):
    from pyarrow import fs

    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_DEFAULT_REGION", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(fs, "resolve_s3_region", lambda bucket: {"far": "ap-southeast-2"}[bucket])
    assert object_store.open_bucket("s3://far/rows.jsonl")[0].region == "ap-southeast-2"
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-3")
    assert object_store.open_bucket("s3://far/rows.jsonl")[0].region == "eu-west-3"
    monkeypatch.setenv("AWS_REGION", "eu-north-1")
    assert object_store.open_bucket("s3://far/rows.jsonl")[0].region == "eu-north-1"


def test_a_public_object_is_read_without_credentials(s3, monkeypatch, tmp_path):
    s3.put_object(Bucket="forgebook", Key="public", Body=b"x", ACL="public-read")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    assert object_store.read_file("s3://forgebook/public") == b"x"
