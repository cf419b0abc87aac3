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
from forgebook.inference.generate import complete
from forgebook.inference.loading import load_together
from forgebook.inference.sampling import Sampling


@pytest.fixture(scope="module")
def loaded():
    return load_together([TINY_MODEL], "float32")[0]


def talk(loaded, lines, monkeypatch, capsys, system=None):
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    chat(loaded, Sampling(max_new_tokens=8), system)
    return capsys.readouterr().out


def expected(loaded, turns, system=None):
    """Answer turn after turn, the whole conversation each time."""
    messages, answers = [{"role": "system", "content": system}] if system else [], []
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        answers += complete(loaded.model, loaded.tokenizer, [messages], max_new_tokens=8)
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers


def test_the_conversation_is_kept_until_it_is_reset(loaded, monkeypatch, capsys):
    output = talk(
        loaded, ["Where is the lamp?", "", "And now?", "/reset", "And now?", "/exit", "no"], monkeypatch, capsys
    )
    first, second = expected(loaded, ["Where is the lamp?", "And now?"])
    [anew] = expected(loaded, ["And now?"])
    assert output == f"{first}\n{second}\n(conversation forgotten)\n{anew}\n"


def test_a_system_message_stays(loaded, monkeypatch, capsys):
    output = talk(loaded, ["Where is the lamp?", "/reset", "Where is the lamp?"], monkeypatch, capsys, "Be brief.")
    [answer] = expected(loaded, ["Where is the lamp?"], "Be brief.")
    assert output == f"{answer}\n(conversation forgotten)\n{answer}\n\n"  # the end of the pipe is Ctrl-D


def test_a_stop_string_is_never_seen(loaded, monkeypatch, capsys):
    [whole] = expected(loaded, ["Where is the lamp?"])
    stop = whole[5:9]
    with monkeypatch.context() as patched:
        patched.setattr(loaded.generation_config, "stop_strings", [stop])
        output = talk(loaded, ["Where is the lamp?", "/exit"], monkeypatch, capsys)
    assert output.strip() == whole[: whole.index(stop)].strip()


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
    output = seen.decode()
    assert (
        "/reset forgets" in output and output.count("> ") == 2 and "Traceback" not in output and "Loading" not in output
    )
