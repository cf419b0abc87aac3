"""Answers of an evaluation, saved as they are generated, so that an interrupted one resumes.

<run>/evaluation/answers-tuned-1a2b3c4d.jsonl    the settings that an answer depends on, then {"prompt": sha256, "text"}

Other settings (another checkpoint, limit, dtype or library version) have a file of their own, so that evaluations of
several checkpoints can run at the same time; an answer is found by its prompt, so that more examples, or fewer, use
those that are there.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

from forgebook.data.chat_template import Message
from forgebook.runs import atomic

__all__ = ["SavedAnswers", "prompt_key"]

LIBRARIES = ("torch", "transformers", "peft", "vllm")
KEY_LENGTH, NAME_LENGTH = 32, 8


class SavedAnswers:
    """Answers by prompt, in a file of a folder: of one model, by its name, and the same settings.

    found: how many were in it when it was opened.
    """

    def __init__(self, folder: Path, name: str, settings: dict[str, Any]):
        versions = {name: version for name in LIBRARIES if (version := _version(name)) is not None}
        header = json.dumps({"settings": {**settings, **versions}}, sort_keys=True, ensure_ascii=False)
        self.path = folder / f"answers-{name}-{_hash(header)[:NAME_LENGTH]}.jsonl"
        self._texts = _read(self.path, header)
        self.found = len(self._texts)
        lines = [header, *(_line(key, text) for key, text in self._texts.items())]
        with atomic.atomic_file(self.path) as temporary:  # without a line that a kill cut off
            temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    def __contains__(self, key: str) -> bool:
        return key in self._texts

    def __getitem__(self, key: str) -> str:
        return self._texts[key]

    def add(self, key: str, text: str) -> None:
        """Save one answer, at once."""
        self._texts[key] = text
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(_line(key, text) + "\n")


def _version(library: str) -> str | None:
    """Return an installed library's version; vLLM has an environment of its own, which lacks some."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def _line(key: str, text: str) -> str:
    return json.dumps({"prompt": key, "text": text}, ensure_ascii=False)


def _read(path: Path, header: str) -> dict[str, str]:
    """Read the answers of a file with this header; none of any other."""
    if not path.is_file():
        return {}
    # Not splitlines: an answer may hold a line separator of Unicode.
    first, *lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    if first != header:
        return {}
    texts = {}
    for line in lines:
        try:
            answer = json.loads(line)
            texts[answer["prompt"]] = answer["text"]
        except (ValueError, KeyError, TypeError):
            continue  # a process was killed while it wrote
    return texts


def prompt_key(messages: list[Message], tools: list[dict] | None) -> str:
    """Return a hash of what a model is given; of an image, of its bytes."""
    written = json.dumps([messages, tools], sort_keys=True, ensure_ascii=False, default=lambda image: image.digest)
    return _hash(written)[:KEY_LENGTH]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
