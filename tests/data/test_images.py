import base64
import http.server
import io
import json
import struct
import threading
import zlib

import pytest
from PIL import Image as pillow

from forgebook.data import images
from forgebook.data.examples import read_examples
from forgebook.data.images import Image, as_address, check_image, image_size, is_same, open_image, read_image
from forgebook.errors import DataError, TrainingError
from forgebook.runs import object_store
from support_vision import draw, image_row


def png(size=(40, 30)) -> bytes:
    file = io.BytesIO()
    pillow.new("RGB", size, "navy").save(file, "png")
    return file.getvalue()


def header(width: int, height: int) -> bytes:
    """Make a PNG of a header, and the beginning of its pixels."""
    about = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + about + struct.pack(">I", zlib.crc32(about))
    return start + struct.pack(">I", 9) + b"IDAT" + bytes(9)


def test_paths_begin_at_the_data_file_and_addresses_stay():
    assert read_image("a/b.png", "f", "/data") == Image("/data/a/b.png")
    assert read_image({"url": "b.png"}, "f", "s3://bucket/set") == Image("s3://bucket/set/b.png")
    for uri in ("/x/b.png", "https://h/b.png", "http://h/b.png", "gs://k/b.png"):
        assert read_image(uri, "f", "/data") == Image(uri)
    assert read_image("file:///x/b.png", "f", "/data") == Image("/x/b.png")


@pytest.mark.parametrize("form", ["uri", "bytes", "hub", "base64"])
def test_bytes_in_the_row_are_the_image(form):
    text = base64.b64encode(png()).decode()
    value = {
        "uri": f"data:image/png;base64,{text}", "bytes": png(), "hub": {"bytes": png(), "path": "a.png"},
        "base64": {"bytes": text},
    }[form]  # fmt: skip
    image = read_image(value, "f", None)
    assert image.data == png() and read_image(as_address(image), "f", None).data == png()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("data:image/png;base64,***", "f: not valid Base64"),
        ("data:image/png,abc", "expected data:image/...;base64"),
        ("ftp://h/a.png", "supported are paths, https://"),
        ("a.png", "a relative path"),
        ({}, "expected an image"),
        (7, "expected the path or address"),
    ],
)
def test_what_names_no_image_is_an_error(value, message):
    with pytest.raises(DataError, match=message):
        read_image(value, "f", None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header(40_000, 40_000), "more than 89,478,485 pixels"),
        (header(12_000, 12_000), "more than 89,478,485 pixels"),
        (png()[:-40], "damaged image"),
        (b"<html>not found</html>", "not an image"),
        (b"", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),  # which Pillow gives to Ghostscript
    ],
)
def test_a_file_that_is_no_whole_image_is_an_error_and_is_not_kept(tmp_path, content, message):
    (tmp_path / "a.png").write_bytes(content)
    for image in (Image(str(tmp_path / "a.png")), Image("its bytes", content or b"\0")):
        with pytest.raises(DataError, match=message):
            check_image(image, tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_other_files_are_errors(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="is a folder"):
        check_image(Image(str(tmp_path)), None)
    with pytest.raises(DataError, match="does not exist"):
        check_image(Image(str(tmp_path / "b.png")), None)
    monkeypatch.setattr(images, "MOST_BYTES", 50)
    with pytest.raises(DataError, match="an image of more than"):
        check_image(Image(str(draw(tmp_path / "a.png"))), None)


def test_the_facts_of_an_image_are_those_of_its_pixels(tmp_path):
    picture = pillow.new("RGB", (40, 30))
    turned = picture.getexif()
    turned[0x0112] = 6  # to be turned by 90 degrees, as phones write it
    picture.save(tmp_path / "a.jpg", exif=turned)
    file = check_image(Image(str(tmp_path / "a.jpg")), None)
    assert (file.width, file.height) == (30, 40) == open_image(file, None).size


def test_bytes_are_found_again_in_the_store(tmp_path):
    file = check_image(Image("its bytes", png()), tmp_path / "store")
    assert file.path == "" and open_image(file, tmp_path / "store").size == (40, 30)
    with pytest.raises(TrainingError, match="cannot be read any more"):
        open_image(file, tmp_path / "other")


def test_a_file_that_changes_is_noticed(tmp_path):
    file = check_image(Image(str(draw(tmp_path / "a.png"))), None)
    assert is_same(file) and open_image(file, None).size == (40, 30)
    draw(tmp_path / "a.png", "other")
    assert not is_same(file)
    with pytest.raises(TrainingError, match="was changed after its example was tokenized"):
        open_image(file, None)
    (tmp_path / "a.png").unlink()
    assert not is_same(file)


def test_images_are_read_over_http(tmp_path):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/a.png" else 404)
            self.end_headers()
            self.wfile.write(png())

        def log_message(self, *arguments):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    try:
        file = check_image(Image(f"{address}/a.png"), tmp_path / "store")
        with pytest.raises(DataError, match="cannot be read: Not Found"):
            check_image(Image(f"{address}/b.png"), tmp_path / "store")
    finally:
        server.shutdown()
        server.server_close()
    assert open_image(file, tmp_path / "store").size == (40, 30)


def test_an_image_beside_rows_in_a_bucket_is_read_and_kept(s3, tmp_path):
    s3.put_object(Bucket="forgebook", Key="set/images/a.png", Body=png((50, 20)))
    image = read_image({"url": "images/a.png"}, "f", "s3://forgebook/set")
    file = check_image(image, tmp_path)
    assert (file.width, file.height, file.path) == (50, 20, "")
    s3.delete_object(Bucket="forgebook", Key="set/images/a.png")
    assert open_image(file, tmp_path).size == (50, 20)  # as it was checked
    with pytest.raises(DataError, match=r"s3://forgebook/set/images/a\.png"):
        check_image(image, tmp_path)


def test_a_large_object_of_a_bucket_is_not_fetched(door, s3, tmp_path, monkeypatch):
    s3.put_object(Bucket="forgebook", Key="large.png", Body=png() + bytes(2000))
    monkeypatch.setattr(images, "MOST_BYTES", 1000)
    asked = []
    door.answers = lambda method, path: asked.append(method)
    with pytest.raises(DataError, match="more than 0 MB: make it smaller"):
        check_image(Image("s3://forgebook/large.png"), tmp_path)
    assert asked and "GET" not in asked


def test_an_image_beside_rows_in_a_bucket_of_google_is_read_and_kept(google, tmp_path, monkeypatch):
    object_store.write_file("gs://forgebook/set/images/a.png", png((50, 20)))
    rows = json.dumps(image_row("q", "a", "images/a.png")) + "\n"
    object_store.write_file("gs://forgebook/set/rows.jsonl", rows.encode())
    [example] = read_examples("gs://forgebook/set/rows.jsonl", "vision_language")
    [image] = example.messages[0]["images"]
    assert image == Image("gs://forgebook/set/images/a.png") and image_size(image) == (50, 20)
    file = check_image(image, tmp_path)
    object_store.remove_folder("gs://forgebook/set")
    assert open_image(file, tmp_path).size == (50, 20)
    with pytest.raises(DataError, match=r"gs://forgebook/set/images/a\.png could not be read: nothing has that name"):
        check_image(image, tmp_path)
    object_store.write_file("gs://forgebook/set/images/a.png", png() + bytes(2000))
    monkeypatch.setattr(images, "MOST_BYTES", 1000)
    with pytest.raises(DataError, match="make it smaller"):
        check_image(image, tmp_path)
