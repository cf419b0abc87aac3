"""Images of requests: no file and no private address is read, directly, through a redirect or through DNS."""

import base64
import http.server
import ipaddress
import socket
import threading
import time
import zlib

import pytest

from forgebook.errors import DataError
from forgebook.inference import request_images
from forgebook.inference.request_images import download, is_public, with_bytes, without_images
from support_vision import draw


@pytest.fixture(scope="module")
def png(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("image") / "a.png", "7").read_bytes()


@pytest.fixture(scope="module")
def site(png):
    """A web server on this machine; returns its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name, _, rest = self.path[1:].partition("/")
            self.send_response({"to": 302, "gone": 404}.get(name, 200))
            if name == "to":
                self.send_header("Location", rest)
            self.end_headers()
            if name == "endless":
                while True:
                    self.wfile.write(b"x" * 2**20)
            elif name == "slow":
                for _ in range(50):
                    self.wfile.write(b"x")
                    time.sleep(0.1)
            elif name == "a.png":
                self.wfile.write(png)

        def log_message(self, *args):
            pass

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, *args):  # clients hang up
            pass

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def anyone(address):
    return True


def message(url, **part):
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}, **part}]}]


def bytes_in(messages):
    return [part["image_url"]["bytes"] for one in messages for part in one["content"] if part["type"] == "image_url"]


def data_uri(data):
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
     "::1", "::", "fe80::1", "fd00::1", "ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1",
     "2002:7f00:1::"],
)  # fmt: skip
def test_addresses_of_machines_and_networks_of_ones_own_are_not_public(address):
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "address", ["93.184.216.34", "2606:2800:220:1::1", "::ffff:93.184.216.34", "64:ff9b::5db8:d822"]
)
def test_addresses_of_the_internet_are_public(address):
    assert is_public(ipaddress.ip_address(address))


def test_data_uris_and_addresses_become_bytes(site, png):
    read = with_bytes(message(data_uri(png)) + message(f"{site}/a.png"), anyone)
    assert bytes_in(read) == [png, png]
    assert download(f"{site}/to/a.png".replace("to/", "to//"), is_allowed=anyone) == png  # a relative redirect
    text = [{"role": "system", "content": "a"}, {"role": "user", "content": [{"type": "text", "text": "b"}]}]
    assert with_bytes(text) == text == without_images(text)
    assert without_images(message(data_uri(png))) == [{"role": "user", "content": []}]


@pytest.mark.parametrize(
    "url",
    ["file:///etc/passwd", "/etc/passwd", "a.png", "s3://bucket/a.png", "gopher://a/b", "ftp://a/b", "FILE:///a", ""],
)
def test_files_and_other_schemes_are_refused(url):
    with pytest.raises(DataError, match=r"messages\[0\].content\[0\].*(a data URI or an http\(s\) address)"):
        with_bytes(message(url))


@pytest.mark.parametrize("part", [{"type": "image", "image": "/etc/passwd"}, {"type": "image", "path": "/etc/passwd"},
                                  {"type": "image_url", "image_url": {"bytes": "aGk="}}])  # fmt: skip
def test_parts_that_name_files_are_refused(part):
    with pytest.raises(DataError, match="expected image_url with a data URI"):
        with_bytes([{"role": "user", "content": [part]}])


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "2130706433", "0x7f.1", "0", "[::ffff:127.0.0.1]"])
def test_this_machine_is_refused_however_it_is_written(host, site):
    with pytest.raises(DataError, match=r"is no host of the public internet|cannot be read"):
        download(f"http://{host}:{site.rpartition(':')[2]}/a.png")


def test_a_redirect_to_a_private_address_is_refused(site):
    """The first address is allowed here, the one that it leads to is not."""

    def only_first(address):
        return address == ipaddress.ip_address("127.0.0.1")

    for target in ("http://127.0.0.2/a.png", "http://169.254.169.254/latest/meta-data"):
        with pytest.raises(DataError, match="is no host of the public internet"):
            download(f"{site}/to/{target}", is_allowed=only_first)
    with pytest.raises(DataError, match=r"expected an http\(s\) address"):
        download(f"{site}/to/file:///etc/passwd", is_allowed=anyone)
    with pytest.raises(DataError, match="more than 3 redirects"):
        download(f"{site}/to//to//to//to//a.png", is_allowed=anyone)


def test_a_name_is_looked_up_once_and_all_its_addresses_count(monkeypatch, site, png):
    lookups, port = [], int(site.rpartition(":")[2])

    def look_up(host, *args, **kwargs):
        lookups.append(host)
        answers = {"private.example": ["10.0.0.5"], "mixed.example": ["93.184.216.34", "127.0.0.1"]}
        # This name is public when it is checked, and this machine when it is looked up again.
        known = answers.get(host, ["93.184.216.34"] if len(lookups) == 1 else ["127.0.0.1"])
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in known]

    connected = []

    def connect(address, *args, **kwargs):
        connected.append(address)
        raise OSError("no route")

    monkeypatch.setattr(request_images.socket, "getaddrinfo", look_up)
    monkeypatch.setattr(request_images.socket, "create_connection", connect)
    with pytest.raises(DataError, match="no route"):
        download(f"http://rebind.example:{port}/a.png")
    assert connected == [("93.184.216.34", port)] and lookups == ["rebind.example"]
    for host in ("private.example", "mixed.example"):
        with pytest.raises(DataError, match=f"{host} is no host of the public internet"):
            download(f"http://{host}/a.png")
    assert len(connected) == 1


def test_size_and_time_are_bounded(site, png, monkeypatch):
    with pytest.raises(DataError, match="an image of more than 20 MB"):
        download(f"{site}/endless", is_allowed=anyone)
    with pytest.raises(DataError, match="answers 404"):
        download(f"{site}/gone", is_allowed=anyone)
    monkeypatch.setattr(request_images, "SECONDS", 0.5)
    began = time.monotonic()
    with pytest.raises(DataError, match=r"did not arrive within 0.5 s"):
        download(f"{site}/slow", is_allowed=anyone)
    assert time.monotonic() - began < 4
    with pytest.raises(DataError, match="more than 32 images"):
        with_bytes(message(data_uri(png)) * 33)
    monkeypatch.setattr(request_images, "MOST_BYTES_TOGETHER", 2 * len(png))
    with pytest.raises(DataError, match="together"):
        with_bytes(message(data_uri(png)) * 3)


def test_pixels_are_bounded_by_the_header(png):
    """A PNG of a few bytes that says it has 40,000 x 40,000 pixels."""
    header = b"IHDR" + (40_000).to_bytes(4) * 2 + b"\x08\x02\x00\x00\x00"
    huge = png[:8] + (13).to_bytes(4) + header + zlib.crc32(header).to_bytes(4) + png[33:]
    with pytest.raises(DataError, match=r"messages\[0\].content\[0\]: an image of more than 33,554,432 pixels"):
        with_bytes(message(data_uri(huge)))
    with pytest.raises(DataError, match="not an image"):
        with_bytes(message(data_uri(b"hello")))
