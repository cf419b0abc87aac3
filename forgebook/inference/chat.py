"""A conversation in the terminal: answers appear as they are generated, and the model sees the whole conversation.

/image PATH shows the model an image with the next message, /reset forgets the conversation, /exit or Ctrl-D ends it,
Ctrl-C cuts an answer off.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from forgebook.data.images import IMAGE, IMAGES, ImageFile, check_image, read_image
from forgebook.errors import DataError
from forgebook.inference import generate
from forgebook.inference.loading import LoadedModel
from forgebook.inference.sampling import Sampling, StopStrings

__all__ = ["chat"]

SHOW = "/image"


def chat(loaded: LoadedModel, sampling: Sampling, system: str | None = None) -> None:
    """Hold a conversation with a model on the standard streams until the user ends it."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (arrow keys and history for input())
        print("/image PATH shows an image with the next message, /reset forgets the conversation, /exit ends it")
    start = [{"role": "system", "content": system}] if system else []
    messages: list[dict[str, Any]] = list(start)
    images: list[ImageFile] = []
    with loaded.active() as model, tempfile.TemporaryDirectory() as folder:
        while True:
            try:
                line = input("> " if is_terminal else "").strip()
            except (EOFError, KeyboardInterrupt):
                print()
                return
            if line == "/exit":
                return
            if line == "/reset":
                messages, images = list(start), []
                print("(conversation forgotten)")
            elif line.split(maxsplit=1)[:1] == [SHOW]:
                images += _shown(line.removeprefix(SHOW).strip(), Path(folder))
            elif line:
                messages.append({"role": "user", "content": IMAGE * len(images) + line})
                if images:
                    messages[-1][IMAGES], images = images, []
                answer = _answer(model, loaded, messages, sampling, Path(folder))
                if answer is None:  # a turn without an answer is no part of the conversation
                    messages.pop()
                else:
                    messages.append({"role": "assistant", "content": answer})


def _shown(uri: str, store: Path) -> list[ImageFile]:
    """Open an image and print its size; return it, or nothing if it cannot be read."""
    try:
        image = check_image(read_image(uri, SHOW, os.getcwd()), store)
    except DataError as error:
        print(f"({error})")
        return []
    print(f"(an image of {image.width} x {image.height} pixels, with your next message)")
    return [image]


def _answer(model, loaded: LoadedModel, messages: list[dict], sampling: Sampling, store: Path) -> str | None:
    """Write one answer to the terminal and return it; None if it was cut off or the prompt was rejected."""
    from transformers import TextStreamer

    class Screen(TextStreamer):
        """Print text as it comes, except what is or may be beginning a stop string."""

        text, printed = "", 0

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.text += text
            shown = stops.cut(self.text) if stream_end else self.text[: stops.settled(self.text)]
            print(shown[self.printed :], end="\n" if stream_end else "", flush=True)
            self.printed = len(shown)

    stops = StopStrings(loaded.generation_config.stop_strings or ())
    screen = Screen(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True)
    try:
        [(_, answer)] = generate.answer_in_batches(
            model, loaded.tokenizer, [messages], sampling, prompt_format=loaded.prompt_format, streamer=screen,
            images=loaded.images, image_store=store,
        )  # fmt: skip
    except KeyboardInterrupt:
        print(" (cut off)")
        return None
    except DataError as error:
        print(f"({error})")
        return None
    return answer
