"""Reading from a real S3 server over HTTP, and run folders by name."""

import boto3
import pytest
from moto.server import ThreadedMotoServer

from conftest import TINY_MODEL, chat, uneven_rows
from helpers import data, models, storage
from helpers.errors import StorageError
from helpers.launch import fine_tune


@pytest.fixture(scope="module")
def s3():
    """A bucket `forgebook` on an S3 server on loopback."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        environment.setenv("AWS_ACCESS_KEY_ID", "test")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "test")
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        client = boto3.client("s3")
        client.create_bucket(Bucket="forgebook")
        yield client
    server.stop()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FORGEBOOK_CACHE", str(tmp_path / "cache"))


def test_rows_from_a_bucket(s3, write_rows):
    s3.upload_file(write_rows([chat("q", "a")]), "forgebook", "data/rows.jsonl")
    assert data.read_rows("s3://forgebook/data/rows.jsonl")[0].messages[-1]["content"] == "a"


def test_a_run_from_a_model_and_rows_in_a_bucket(s3, make_config, write_rows):
    for path in TINY_MODEL.iterdir():
        s3.upload_file(str(path), "forgebook", f"models/tiny/{path.name}")
    s3.upload_file(write_rows(uneven_rows(16)), "forgebook", "data/train.jsonl")
    config = make_config(model_id="s3://forgebook/models/tiny", train_path="s3://forgebook/data/train.jsonl")
    assert fine_tune(config).is_complete


@pytest.mark.parametrize("path", ["s3://forgebook/none.jsonl", "s3://no-such-bucket/rows.jsonl"])
def test_what_is_not_there_is_a_readable_error(s3, path):
    with pytest.raises(StorageError, match="could not be read"):
        storage.fetch_file(path)
    with pytest.raises(StorageError):
        models.locate(path)


def test_a_broken_download_leaves_nothing_in_the_cache(s3, tmp_path):
    with pytest.raises(StorageError):
        storage.fetch_file("s3://forgebook/none.jsonl")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_https_errors_are_readable():
    with pytest.raises(StorageError, match=r"https://127\.0\.0\.1:9/rows\.jsonl could not be read"):
        storage.fetch_file("https://127.0.0.1:9/rows.jsonl")


def test_a_run_is_found_by_folder_and_by_name(make_config, monkeypatch, tmp_path):
    run = fine_tune(make_config())
    monkeypatch.chdir(tmp_path)
    assert storage.find_run("run") == storage.find_run(str(run.folder)) == run
    with pytest.raises(StorageError, match="no run 'other'"):
        storage.find_run("other")
