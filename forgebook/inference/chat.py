"""A conversation in the terminal: answers appear as they are generated, and the model sees the whole conversation.

/reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C cuts an answer off.
"""

from __future__ import annotations

import contextlib
import sys

from forgebook.errors import DataError
from forgebook.inference import generate
from forgebook.inference.loading import LoadedModel
from forgebook.inference.sampling import Sampling, StopStrings

__all__ = ["chat"]


def chat(loaded: LoadedModel, sampling: Sampling, system: str | None = None) -> None:
    """Hold a conversation with a model on the standard streams until the user ends it."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (arrow keys and history for input())
        print("/reset forgets the conversation, /exit ends it")
    start = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    with loaded.active() as model:
        while True:
            try:
                line = input("> " if is_terminal else "").strip()
            except (EOFError, KeyboardInterrupt):
                print()
                return
            if line == "/exit":
                return
            if line == "/reset":
                messages = list(start)
                print("(conversation forgotten)")
            elif line:
                messages.append({"role": "user", "content": line})
                answer = _answer(model, loaded, messages, sampling)
                if answer is None:  # a turn without an answer is no part of the conversation
                    messages.pop()
                else:
                    messages.append({"role": "assistant", "content": answer})


def _answer(model, loaded: LoadedModel, messages: list[dict], sampling: Sampling) -> str | None:
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
            model, loaded.tokenizer, [messages], sampling, prompt_format=loaded.prompt_format, streamer=screen
        )
    except KeyboardInterrupt:
        print(" (cut off)")
        return None
    except DataError as error:
        print(f"({error})")
        return None
    return answer
