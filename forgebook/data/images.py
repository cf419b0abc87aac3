"""Images of examples: as a row names them, opened and checked, and found again when a batch needs their pixels.

image = read_image({"url": "scans/7.png"}, "messages[0].content[1]", "/data")   where it is; nothing is opened
file = check_image(image, store)                                                opened and decoded once; its facts
picture = open_image(file, store)                                               the pixels, for a batch

A message with images holds them in order under "images", and IMAGE in its content where each one stands.
"""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
import http.client
import io
import os
import stat
import urllib.error
import urllib.request
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forgebook.data.json_values import brief
from forgebook.errors import DataError, StorageError, TrainingError, first_line
from forgebook.runs import object_store
from forgebook.runs.atomic import atomic_file, link_or_copy

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

__all__ = [
    "BASE64",
    "FORMATS",
    "IMAGE",
    "IMAGES",
    "WEB",
    "Image",
    "ImageFile",
    "as_address",
    "check_image",
    "collect_image",
    "image_identity",
    "image_size",
    "is_same",
    "open_image",
    "read_image",
    "shown_content",
    "thumbnail",
]

# Where an image stands in a content: a code point that is no character, so no text has a reason to hold it.
IMAGE = "\ufdd0"
IMAGES = "images"
# Those that Pillow decodes by itself: others start programs.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
# Above this Pillow suspects a file that was made to fill the memory.
MOST_PIXELS = 89_478_485
MOST_BYTES = 64 * 2**20
WEB = ("http://", "https://")
WAIT_SECONDS = 30
BASE64 = "data:"
ORIENTATION = 0x0112  # in the metadata; above 4 the picture lies on its side


@dataclass(frozen=True)
class Image:
    """An image as a row names it. uri: an absolute path or an address; data: its bytes, where the row holds them."""

    uri: str
    data: bytes = b""


@dataclass(frozen=True)
class ImageFile:
    """An image that was opened, in pixels.

    path:     its local file; empty: it is in the store, under its digest.
    modified: of a local file, in nanoseconds.
    """

    path: str
    digest: str
    width: int
    height: int
    modified: int = 0


# As rows name them ------------------------------------------------------------------------------------


def read_image(value: Any, field: str, base: str | None) -> Image:
    """Read what names an image: a path, an address, a data URI, bytes, or an object with one of these.

    base: the folder or address that relative paths begin at. Raises DataError.
    """
    if isinstance(value, dict):
        keys = [key for key in ("bytes", "url", "image", "path") if value.get(key)]
        if not keys:
            raise DataError(f"{field} is {brief(value)}; expected an image: its path, address or bytes")
        if keys[0] == "bytes":
            data = value["bytes"]
            data = _decoded(data, field) if isinstance(data, str) else bytes(data)
            return Image(str(value.get("path") or "its bytes"), data)
        return read_image(value[keys[0]], field, base)
    if isinstance(value, bytes):
        return Image("its bytes", value)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{field} is {brief(value)}; expected the path or address of an image")
    uri = value.strip()
    if uri.startswith(BASE64):
        about, comma, content = uri.partition(",")
        if not comma or not about.endswith(";base64"):
            raise DataError(f"{field} is {brief(uri)}; expected data:image/...;base64, and the image in Base64")
        return Image("its data URI", _decoded(content, field))
    return Image(_absolute(uri.removeprefix("file://"), field, base))


def as_address(image: Image) -> str:
    """Write an image so that `read_image` reads the same one from anywhere."""
    return image.uri if not image.data else f"{BASE64}image;base64,{base64.b64encode(image.data).decode()}"


def shown_content(message: dict[str, Any]) -> str:
    """Return a message's content to read, with the name of each image where it stands."""
    content = message["content"]
    for image in message.get(IMAGES) or ():
        name = "" if isinstance(image, Image) and image.data else getattr(image, "uri", "") or image.path
        content = content.replace(IMAGE, f"[image {name}]" if name else "[image]", 1)
    return content


def _decoded(content: str, field: str) -> bytes:
    try:
        return base64.b64decode("".join(content.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"{field}: not valid Base64 ({error}): write the bytes of the image again") from None


def _absolute(uri: str, field: str, base: str | None) -> str:
    if uri.startswith((*WEB, *object_store.SCHEMES)):
        return uri
    if "://" in uri:
        raise DataError(f"{field} is {brief(uri)}; supported are paths, https://, http://, s3://, gs:// and data URIs")
    path = os.path.expanduser(uri)
    if os.path.isabs(path):
        return path
    if base is None:
        raise DataError(f"{field} is {brief(uri)}, a relative path, and this data set is no file that it begins at")
    return f"{base}/{path}"


def image_identity(image: Image) -> str:
    """Return what two examples with the same image share: a hash of its bytes, the address of one that is fetched."""
    if image.data:
        return _digest(image.data)
    try:
        return _file_digest(image.uri, os.stat(image.uri).st_mtime_ns)
    except OSError:
        return image.uri


@functools.lru_cache(maxsize=65536)
def _file_digest(path: str, modified: int) -> str:
    with open(path, "rb") as file:
        return _digest(file.read(MOST_BYTES))


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


# Opened -----------------------------------------------------------------------------------------------


def check_image(image: Image, store: Path | None) -> ImageFile:
    """Open and decode an image; one that is no local file is stored. Raises DataError with what is wrong with it.

    store: None keeps nothing, so that only the facts of such an image are known.
    """
    is_local = not image.data and not image.uri.startswith((*WEB, *object_store.SCHEMES))
    data = image.data or _read(image.uri)
    picture = _decode(data, image.uri)
    digest = _digest(data)
    if store is not None and not is_local and not (target := _stored(store, digest)).exists():
        with atomic_file(target) as temporary:
            temporary.write_bytes(data)
    modified = os.stat(image.uri).st_mtime_ns if is_local else 0
    return ImageFile(image.uri if is_local else "", digest, *picture.size, modified)


def is_same(file: ImageFile) -> bool:
    """Report whether an image's local file is as it was when it was checked."""
    try:
        return not file.path or os.stat(file.path).st_mtime_ns == file.modified
    except OSError:
        return False


def image_size(image: Image) -> tuple[int, int]:
    """Read the width and height of an image off its header. Raises DataError."""
    from PIL import Image as pillow

    try:
        source: Any = io.BytesIO(image.data or _read(image.uri)) if image.data or "://" in image.uri else image.uri
        with pillow.open(source, formats=FORMATS) as picture:
            turned = picture.getexif().get(ORIENTATION, 1) > 4
            return picture.size[::-1] if turned else picture.size
    except Exception as error:  # as of `_decode`
        raise DataError(f"{image.uri}: no size can be read ({first_line(error)})") from None


def open_image(file: ImageFile, store: Path | None) -> Picture:
    """Return the pixels of an image that was checked. Raises TrainingError if it is gone or another one by now."""
    stored = store and _stored(store, file.digest)
    try:
        data = stored.read_bytes() if stored and stored.exists() else Path(file.path).read_bytes()
    except OSError as error:
        raise TrainingError(
            f"the image {file.path or file.digest} cannot be read any more ({error.strerror}): put it back; the same "
            "command resumes"
        ) from None
    if _digest(data) != file.digest:
        raise TrainingError(
            f"the image {file.path} was changed after its example was tokenized: put the old file back, or start "
            "another run"
        )
    return _decode(data, file.path)


def collect_image(file: ImageFile, source: Path, store: Path) -> None:
    """Put an image into a store, linked where the disk allows it, else copied. source: the store of its example."""
    target = _stored(store, file.digest)
    if not target.exists():
        kept = _stored(source, file.digest)
        link_or_copy(kept if kept.exists() else Path(file.path), target)


def thumbnail(image: Image, side: int = 96) -> str:
    """Make a small JPEG of an image, as a data URI. Raises DataError."""
    picture = _decode(image.data or _read(image.uri), image.uri)
    picture.thumbnail((side, side))
    file = io.BytesIO()
    picture.save(file, "jpeg")
    return f"{BASE64}image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _stored(store: Path, digest: str) -> Path:
    return store / digest[:2] / digest


def _decode(data: bytes, name: str) -> Picture:
    """Decode an image as transformers does: upright, in RGB."""
    from PIL import Image as pillow
    from PIL import ImageOps, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata, and of sizes, which are compared here
            picture = pillow.open(io.BytesIO(data), formats=FORMATS)
            if picture.width * picture.height > MOST_PIXELS:
                raise pillow.DecompressionBombError
            picture.load()
            return ImageOps.exif_transpose(picture).convert("RGB")
    except pillow.DecompressionBombError:
        raise DataError(f"{name}: an image of more than {MOST_PIXELS:,} pixels: make it smaller") from None
    except UnidentifiedImageError:
        raise DataError(f"{name}: not an image ({', '.join(FORMATS)})") from None
    except Exception as error:  # decoders raise OSError, ValueError, SyntaxError, struct.error, ...
        raise DataError(f"{name}: a damaged image ({first_line(error)}): copy it again") from None


def _read(uri: str) -> bytes:
    """Read the bytes of an image. Raises DataError."""
    try:
        if uri.startswith(object_store.SCHEMES):
            return _bounded(object_store.read_at_most(uri, MOST_BYTES), uri)
        if uri.startswith(WEB):
            with urllib.request.urlopen(uri, timeout=WAIT_SECONDS) as response:
                return _bounded(response.read(MOST_BYTES + 1), uri)
        kind = os.stat(uri).st_mode
        if stat.S_ISDIR(kind):
            raise DataError(f"{uri} is a folder; expected an image")
        if not stat.S_ISREG(kind):
            raise DataError(f"{uri} is a pipe or a device; expected an image")
        with open(uri, "rb") as file:
            return _bounded(file.read(MOST_BYTES + 1), uri)
    except FileNotFoundError:
        raise DataError(f"the image {uri} does not exist") from None
    except StorageError as error:
        raise DataError(str(error)) from None
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise DataError(f"the image {uri} cannot be read: {reason}") from None


def _bounded(data: bytes | None, uri: str) -> bytes:
    if data is None or len(data) > MOST_BYTES:
        raise DataError(f"{uri}: an image of more than {MOST_BYTES // 2**20} MB: make it smaller")
    return data
