"""A conversation in the terminal: answers appear as they are written, and the model sees all that was said.

/reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C cuts an answer off.
"""

from __future__ import annotations

import contextlib
import sys

from forgebook.errors import DataError
from forgebook.inference import generate
from forgebook.inference.generate import Sampling, Speaker

__all__ = ["chat"]


def chat(speaker: Speaker, sampling: Sampling, system: str | None = None) -> None:
    """Talk with a model on the standard streams until the person ends it."""
    is_person = sys.stdin.isatty()
    if is_person:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (arrow keys and history for input())
        print("/reset forgets the conversation, /exit ends it")
    start = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    with speaker.active() as model:
        while True:
            try:
                said = input("> " if is_person else "").strip()
            except (EOFError, KeyboardInterrupt):
                print()
                return
            if said == "/exit":
                return
            if said == "/reset":
                messages = list(start)
                print("(forgotten)")
            elif said:
                messages.append({"role": "user", "content": said})
                answer = _answer(model, speaker, messages, sampling)
                # What was not answered was not said.
                messages = (
                    [*messages, {"role": "assistant", "content": answer}] if answer is not None else messages[:-1]
                )


def _answer(model, speaker: Speaker, messages: list[dict], sampling: Sampling) -> str | None:
    """Write one answer to the terminal and return it; None if it was cut off or could not be asked."""
    from transformers import TextStreamer

    class Screen(TextStreamer):
        """Print text as it comes, but what may be the begin of a stop string, until it is clear that it is not."""

        held = ""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.held += text
            keep = 0 if stream_end else _begun(self.held, stops)
            shown = self.held[: len(self.held) - keep]
            for stop in stops:
                shown = shown.partition(stop)[0]
            print(shown, end="\n" if stream_end else "", flush=True)
            self.held = self.held[len(self.held) - keep :] if keep else ""

    stops = speaker.generation_config.stop_strings or []
    screen = Screen(speaker.tokenizer, skip_prompt=True, skip_special_tokens=True)
    try:
        [(_, answer)] = generate.answer_in_batches(
            model, speaker.tokenizer, [messages], sampling,
            prompt_format=speaker.prompt_format, numbers=[len(messages)], streamer=screen,
        )  # fmt: skip
    except KeyboardInterrupt:
        print(" (cut off)")
        return None
    except DataError as error:
        print(f"({error})")
        return None
    return answer


def _begun(text: str, stops: list[str]) -> int:
    """Count the characters at the end of a text that may be the begin of a stop string."""
    longest = max(map(len, stops), default=0)
    ends = (count for count in range(min(longest, len(text)), 0, -1))
    return next((count for count in ends if any(stop.startswith(text[-count:]) for stop in stops)), 0)
