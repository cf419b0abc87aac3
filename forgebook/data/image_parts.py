"""Where the images of a conversation stand: parts of a content, or placeholders for those of a column.

message |= split_images(message, at)           a list of parts -> a text with IMAGE for each image, and the images
place_images(raw, messages, task, base)        placeholders, and the images of the columns beside; paths made absolute
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from forgebook.data.images import IMAGE, IMAGES, as_address, read_image
from forgebook.errors import DataError

__all__ = [
    "PROMPTS",
    "TASK",
    "as_parts",
    "image_base",
    "image_count",
    "is_image_part",
    "place_images",
    "split_images",
]

Message = dict[str, Any]

PLACEHOLDER = "<image>"  # LLaVA, LLaMA-Factory, ms-swift
COLUMNS = ("images", "image", "image_path", "image_paths")
PART_TYPES = ("image_url", "image", "input_image")  # OpenAI's chats, transformers, OpenAI's responses
PART_KEYS = ("image_url", "image", "url", "path", "bytes")
TASK = "vision_language"
PROMPTS = "prompts"  # in the place of a task: rows to answer, for any model


def split_images(message: Message, at: str) -> Message:
    """Return what changes in a message whose content has images: each is IMAGE there, and is listed under IMAGES.

    An image is its value as written and its field; the value is None for one that a column holds.
    """
    content = message.get("content")
    texts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) else part for part in texts]
    if any(isinstance(text, str) and IMAGE in text for text in texts):
        raise DataError(f"{at}.content has the code point U+FDD0, which is no character: remove it")
    if message.get(IMAGES):
        raise DataError(f"{at}.{IMAGES}: write each image as a part of content, as {{type: image, image: PATH}}")
    if not isinstance(content, list) or not any(map(is_image_part, content)):
        return {}
    images, parts = [], []
    for k, part in enumerate(content):
        if not is_image_part(part):
            parts.append(part)
            continue
        key = next((key for key in PART_KEYS if part.get(key)), None)
        images.append((part[key] if key != "bytes" else part) if key else None)
        images[-1] = (images[-1], f"{at}.content[{k}]" + (f".{key}" if key else ""))
        parts.append({"type": "text", "text": IMAGE})
    return {"content": parts, IMAGES: images}


def is_image_part(part: Any) -> bool:
    """Report whether a part of a content is an image, by any of the names for one."""
    return isinstance(part, dict) and part.get("type") in PART_TYPES


def image_base(uri: str) -> str | None:
    """Return where relative paths of a data file begin: its folder; None of a data set of the hub."""
    if uri.startswith("hf://"):
        return None
    return uri.rpartition("/")[0] if "://" in uri else str(Path(uri).expanduser().resolve().parent)


def place_images(raw: dict, messages: list[Message], task: str, base: str | None) -> set[str]:
    """Put the images of a row into its messages, in place; return the keys of the row that hold some.

    Raises DataError for a task that trains on text alone, an image in another turn than the user's, one that is
    missing, and counts that differ.
    """
    beside = {key: raw[key] for key in COLUMNS if raw.get(key)}
    has_marks = any(PLACEHOLDER in message["content"] for message in messages)
    has_parts = any(message.get(IMAGES) for message in messages)
    if task not in (TASK, PROMPTS):
        if has_parts:
            field = next(image[1] for message in messages for image in message.get(IMAGES) or ())
            raise DataError(f"{field}: an image, and task: {task} reads text alone: add vision_language_config: {{}}")
        if beside and has_marks:
            raise DataError(
                f"{next(iter(beside))}: the messages mention {PLACEHOLDER}, and task: {task} reads text alone: add "
                "vision_language_config: {}, or remove the row"
            )
        return set()
    if task == PROMPTS and not beside and not has_parts:
        return set()  # a prompt may be about the word
    if len(beside) > 1:
        raise DataError(f"{' and '.join(beside)} both hold images: keep one of them")
    key = next(iter(beside), "")
    column = _listed(beside[key]) if key else []
    queue = [(value, f"{key}[{k}]" if isinstance(beside[key], list) else key) for k, value in enumerate(column)]
    if queue or has_marks:
        _find_places(messages, has_parts, len(queue))
    wanted = [image for message in messages for image in message.get(IMAGES) or () if image[0] is None]
    if len(wanted) > len(queue):
        where, holds = wanted[len(queue)][1], f"{key} holds {len(queue)}" if queue else "the row holds none"
        raise DataError(f"{where}: image {len(queue) + 1} of {len(wanted)} is missing, {holds}: add it")
    if len(wanted) < len(queue):
        raise DataError(f"{key} holds {len(queue)} images, and the messages mention {len(wanted)}: remove the others")
    rest = iter(queue)
    for k, message in enumerate(messages):
        if not message.get(IMAGES):
            continue
        if message["role"] != "user":
            raise DataError(f"messages[{k}]: an image in a turn of the {message['role']}; only user turns have images")
        named = [next(rest) if value is None else (value, field) for value, field in message[IMAGES]]
        message[IMAGES] = [read_image(value, field, base) for value, field in named]
    return {key} if key else set()


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _find_places(messages: list[Message], has_parts: bool, beside: int) -> None:
    """Mark where the `beside` images of a column stand: at placeholders, else before the first question."""
    bare = any(image[0] is None for message in messages for image in message.get(IMAGES) or ())
    if bare or (has_parts and not beside):
        return
    found = False
    for k, message in enumerate(messages):
        count = message["content"].count(PLACEHOLDER)
        if not count:
            continue
        if message.get(IMAGES):
            raise DataError(f"messages[{k}].content has both {PLACEHOLDER} and image parts: keep one of them")
        found = True
        message["content"] = message["content"].replace(PLACEHOLDER, IMAGE)
        message[IMAGES] = [(None, f"messages[{k}].content")] * count
    if not found and not has_parts:
        first = next((k for k, message in enumerate(messages) if message["role"] == "user"), None)
        if first is None:
            raise DataError("an image, and no user turn that it belongs to")
        messages[first]["content"] = IMAGE * beside + messages[first]["content"]
        messages[first][IMAGES] = [(None, f"messages[{first}].content")] * beside


def image_count(messages: list[Message] | None) -> int:
    """Count the images of a conversation."""
    return sum(len(message.get(IMAGES) or ()) for message in messages or ())


def as_parts(messages: list[Message]) -> list[Message]:
    """Write messages with images as JSON can hold them, so that they are read again as they are: as content lists."""
    return [_with_parts(message) if message.get(IMAGES) else message for message in messages]


def _with_parts(message: Message) -> Message:
    first, *others = message["content"].split(IMAGE)
    parts = [{"type": "text", "text": first}] if first else []
    for image, text in zip(message[IMAGES], others, strict=True):
        parts.append({"type": "image_url", "image_url": {"url": as_address(image)}})
        parts += [{"type": "text", "text": text}] if text else []
    return {key: value for key, value in message.items() if key != IMAGES} | {"content": parts}
