"""The chat as a person uses it: through a pipe in this process, and on a real terminal."""

import contextlib
import io
import os
import pty
import subprocess
import sys

import pytest

from conftest import REPOSITORY, TINY_MODEL
from forgebook.inference.chat import chat
from forgebook.inference.generate import Sampling, complete, load_together


@pytest.fixture(scope="module")
def speaker():
    return load_together([TINY_MODEL], "float32")[0]


def talk(speaker, lines, monkeypatch, capsys, system=None):
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    chat(speaker, Sampling(max_new_tokens=8), system)
    return capsys.readouterr().out


def expected(speaker, turns, system=None):
    """Answer turn after turn, the whole conversation each time."""
    messages, answers = [{"role": "system", "content": system}] if system else [], []
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        answers += complete(speaker.model, speaker.tokenizer, [messages], max_new_tokens=8)
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers


def test_what_was_said_is_kept_until_it_is_reset(speaker, monkeypatch, capsys):
    said = talk(
        speaker, ["Where is the lamp?", "", "And now?", "/reset", "And now?", "/exit", "no"], monkeypatch, capsys
    )
    first, second = expected(speaker, ["Where is the lamp?", "And now?"])
    [anew] = expected(speaker, ["And now?"])
    assert said == f"{first}\n{second}\n(forgotten)\n{anew}\n"


def test_a_system_message_stays(speaker, monkeypatch, capsys):
    said = talk(speaker, ["Where is the lamp?", "/reset", "Where is the lamp?"], monkeypatch, capsys, "Be brief.")
    [answer] = expected(speaker, ["Where is the lamp?"], "Be brief.")
    assert said == f"{answer}\n(forgotten)\n{answer}\n\n"  # the end of the pipe is Ctrl-D


def test_a_stop_string_is_never_seen(speaker, monkeypatch, capsys):
    [whole] = expected(speaker, ["Where is the lamp?"])
    stop = whole[5:9]
    with monkeypatch.context() as patched:
        patched.setattr(speaker.generation_config, "stop_strings", [stop])
        said = talk(speaker, ["Where is the lamp?", "/exit"], monkeypatch, capsys)
    assert said.strip() == whole[: whole.index(stop)].strip()


@pytest.mark.slow
def test_the_command_on_a_terminal():
    """A pseudo-terminal: a prompt sign, the answer, Ctrl-D."""
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, str(REPOSITORY / "main.py"), "chat", "tiny", "max_new_tokens=4"],
        stdin=terminal, stdout=terminal, stderr=terminal, cwd=REPOSITORY, env={**os.environ, "TERM": "dumb"},
    )  # fmt: skip
    os.close(terminal)
    seen = b""
    with contextlib.suppress(OSError):  # Linux ends a terminal that nobody holds with an error
        while chunk := os.read(controller, 4096):
            asks = seen.count(b"> ") < (seen + chunk).count(b"> ")
            seen += chunk
            if asks:
                os.write(controller, b"Where is the lamp?\n" if seen.count(b"> ") == 1 else b"\x04")
    assert process.wait() == 0, seen.decode()
    told = seen.decode()
    assert "/reset forgets" in told and told.count("> ") == 2 and "Traceback" not in told and "Loading" not in told
