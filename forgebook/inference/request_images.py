"""Images of API requests: their bytes, from data URIs and from addresses of the public internet alone.

    messages = with_bytes(request.messages)          each image_url holds its bytes
    data = download("https://example.com/a.png")     also after redirects no address of this machine or its network

A server reaches what its clients do not: files, and machines behind the same firewall. So no path is read, a host's
addresses are looked up once and must all be public, and the connection is made to the very address that was checked.
"""

from __future__ import annotations

import http.client
import io
import ipaddress
import socket
import ssl
import time
import urllib.parse
from collections.abc import Callable
from typing import Any

from forgebook.data import images
from forgebook.data.image_parts import is_image_part
from forgebook.data.images import read_image
from forgebook.data.json_values import brief
from forgebook.errors import DataError

__all__ = ["download", "is_public", "with_bytes", "without_images"]

MOST_IMAGES = 32  # of a request
MOST_BYTES = 20 * 2**20  # of an image
MOST_BYTES_TOGETHER = 64 * 2**20
MOST_PIXELS = 2**25  # in memory three bytes each, of several requests at a time
SECONDS = 10.0  # for all addresses of a request together
REDIRECTS = 3
PORTS = {"http": 80, "https": 443}
NAT64 = ipaddress.ip_network("64:ff9b::/96")
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def without_images(messages: list[Any]) -> list[Any]:
    """Return a request's messages without the parts that are images: the text that a prompt is made of."""
    return [
        message | {"content": [part for part in message["content"] if not is_image_part(part)]}
        if isinstance(message, dict) and isinstance(message.get("content"), list)
        else message
        for message in messages
    ]


def with_bytes(messages: list[Any], is_allowed: Callable[[Address], bool] | None = None) -> list[Any]:
    """Return a request's messages with the bytes of each image. is_allowed: of an address; default: `is_public`.

    Raises DataError for what is neither a data URI nor a public http(s) address, and for too many, too large images.
    """
    until, count, size, read = time.monotonic() + SECONDS, 0, 0, []
    for k, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("content"), list):
            read.append(message)
            continue
        parts = []
        for j, part in enumerate(message["content"]):
            if not is_image_part(part):
                parts.append(part)
                continue
            count += 1
            if count > MOST_IMAGES:
                raise DataError(f"messages: more than {MOST_IMAGES} images")
            data = _bytes_of(part, f"messages[{k}].content[{j}]", until, is_allowed or is_public)
            size += len(data)
            if size > MOST_BYTES_TOGETHER:
                raise DataError(f"messages: images of more than {MOST_BYTES_TOGETHER // 2**20} MB together")
            parts.append({"type": "image_url", "image_url": {"bytes": data}})
        read.append(message | {"content": parts})
    return read


def _bytes_of(part: dict[str, Any], at: str, until: float, is_allowed: Callable[[Address], bool]) -> bytes:
    value = part.get("image_url")
    url = value.get("url") if isinstance(value, dict) else value
    if not isinstance(url, str) or not url.strip().startswith((images.BASE64, *images.WEB)):
        raise DataError(f"{at} is {brief(part)}; expected image_url with a data URI or an http(s) address")
    try:
        if url.strip().startswith(images.BASE64):
            data = read_image(url, "image_url", None).data
        else:
            data = download(url.strip(), until, is_allowed)
        _check_size(data)
    except DataError as error:
        raise DataError(f"{at}: {error}") from None
    return data


def _check_size(data: bytes) -> None:
    """Raise DataError for an image of too many bytes or pixels; its header says how many."""
    from PIL import Image as pillow

    if len(data) > MOST_BYTES:
        raise DataError(f"an image of more than {MOST_BYTES // 2**20} MB")
    try:
        width, height = pillow.open(io.BytesIO(data), formats=images.FORMATS).size
    except pillow.DecompressionBombError:
        width, height = MOST_PIXELS, MOST_PIXELS
    except Exception:  # decoders raise OSError, ValueError, SyntaxError, struct.error, ...
        raise DataError(f"not an image ({', '.join(images.FORMATS)})") from None
    if width * height > MOST_PIXELS:
        raise DataError(f"an image of more than {MOST_PIXELS:,} pixels")


# Downloads --------------------------------------------------------------------------------------------


def is_public(address: Address) -> bool:
    """Report whether an address is of the public internet, also the IPv4 address that an IPv6 address stands for."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo and address.teredo[1])
        if address in NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner:
            return is_public(inner)
    return address.is_global and not address.is_multicast


def download(url: str, until: float | None = None, is_allowed: Callable[[Address], bool] = is_public) -> bytes:
    """Download an image. until: of time.monotonic. Raises DataError."""
    until = time.monotonic() + SECONDS if until is None else until
    for _ in range(REDIRECTS + 1):
        try:
            data, target = _requested(url, until, is_allowed)
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise DataError(f"{brief(url)} cannot be read: {error}") from None
        if target is None:
            return data
        url = urllib.parse.urljoin(url, target)
    raise DataError(f"{brief(url)}: more than {REDIRECTS} redirects")


def _requested(url: str, until: float, is_allowed: Callable[[Address], bool]) -> tuple[bytes, str | None]:
    """Return the body of an answer, or where it redirects to."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in PORTS or not parts.hostname:
        raise DataError(f"{brief(url)}: expected an http(s) address")
    port = parts.port or PORTS[parts.scheme]
    address = _checked_address(parts.hostname, port, is_allowed)
    connection = http.client.HTTPConnection(parts.hostname, port, timeout=_left(until))
    connection.sock = socket.create_connection((address, port), timeout=_left(until))
    try:
        if parts.scheme == "https":
            context = ssl.create_default_context()
            connection.sock = context.wrap_socket(connection.sock, server_hostname=parts.hostname)
        path = urllib.parse.quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
        query = urllib.parse.quote(parts.query, safe="/?%:@!$&'()*+,;=~-._")
        host = parts.netloc.rpartition("@")[2]
        headers = {"Host": host, "User-Agent": "forgebook", "Accept": "image/*", "Connection": "close"}
        connection.request("GET", path + (f"?{query}" if query else ""), headers=headers)
        response = connection.getresponse()
        if response.status in (301, 302, 303, 307, 308) and (target := response.getheader("location")):
            return b"", target
        if response.status != 200:
            raise DataError(f"{brief(url)} answers {response.status} {response.reason}")
        return _body(response, connection, until), None
    finally:
        connection.close()


def _body(response: http.client.HTTPResponse, connection: http.client.HTTPConnection, until: float) -> bytes:
    pieces, size = list[bytes](), 0
    while True:
        if connection.sock is not None:  # a whole answer's time, not each packet's
            connection.sock.settimeout(_left(until))
        piece = response.read1(2**16)
        if not piece:
            return b"".join(pieces)
        pieces.append(piece)
        size += len(piece)
        _left(until)
        if size > MOST_BYTES:
            raise DataError(f"an image of more than {MOST_BYTES // 2**20} MB")


def _left(until: float) -> float:
    left = until - time.monotonic()
    if left <= 0:
        raise DataError(f"the images of the request did not arrive within {SECONDS:g} s")
    return left


def _checked_address(host: str, port: int, is_allowed: Callable[[Address], bool]) -> str:
    """Look up a host; return one of its addresses. Raises DataError unless all of them are allowed."""
    found = {str(entry[4][0]).partition("%")[0] for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    if not found or not all(is_allowed(ipaddress.ip_address(address)) for address in found):
        raise DataError(f"{host} is no host of the public internet, and images of no other are fetched here")
    return min(found, key=lambda address: (":" in address, address))  # IPv4 first: not all machines route IPv6
