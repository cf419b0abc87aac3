"""Seeded damage to files, and what counts as an answer to it: success, or an error of ours in readable words."""

import contextlib
import random
import re
import resource
import signal
from collections import Counter
from collections.abc import Callable, Iterator

from forgebook.errors import ForgebookError

SECONDS, MEGABYTES = 10, 2048  # the most that one input may take, of processor time and of memory
LONGEST_ANSWER = 8000
# What no reader expects: pieces of YAML, JSON and CSV, half characters, numbers that no machine holds.
PIECES = [
    "{", "}", "[", "]", ":", ": ", ",", "-", "- ", "\n", "\n\n", "\t", " ", "'", '"', "#", "&a ", "*a", "<<: *a",
    "!!int ", "!!binary ", "!!timestamp ", "!!set ", "!!python/name:os.system ", "!x ", "|", ">", "%YAML 9.9\n",
    "---\n", "...\n", "? ", "@", "`", "\0", "\x07", "\x1b[2J", "\x85", "\u2028", "\ufeff", "\ufffe", "\ud800",
    "\U0001f600", '"\\ud800"', '"\\u0000"', "null", "~", "true", "no", "NaN", ".nan", "-.inf", "Infinity", "0", "-1",
    "1e999", "9" * 400, "9" * 5000, "0x" + "f" * 40, "1_000", "0b1", "0o17", "190:20:30", "2024-19-41", "1.5",
    "1e-400", "''", "[]", "{}", "[[]]", "${", "${HOME}", "${UNSET_FOR_SURE}", "~nobody/x", "../" * 5, "/dev/zero",
    "s3://", "hf://", "hf://a/b:train", "://", "a" * 300, "x/" * 2500, "[" * 300, "{a: " * 60, '{"a":' * 150, "\\",
    "\\u", "\r", "\r\n", "\x0b", "\x0c", ";", "|-",
]  # fmt: skip
BYTES = [b"\xff", b"\0", b"\xc3", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\xff\xfe"]
KEYS = ["", "a", "role", "\0", "\ud800", 1, None, 1.5, True, "a.b", "weight"]
VALUES: list[object] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**400, -(10**30), 0.5, -0.0, 1e308, float("inf"),
    float("nan"), "", " ", "a", "none", "auto", "tiny", "a" * 5000, "\0", "\ud800", "é\u0301", "1", "1e-4", "true",
    "[]", "{}", "${X}", [], [None], [[]], [{}], ["a", 1], [1, 2, 3], [0.9, 0.999], {}, {"a": {}}, {"": None},
    {"unit": "steps", "frequency": 0}, {"path": "a", "weight": -1}, {"role": "user"}, {"config_path": []},
    {"min": 2, "max": 1},
]  # fmt: skip


class TooLongError(BaseException):
    """An input that took more than SECONDS; no `except Exception` catches it."""


def damage_bytes(data: bytes, generator: random.Random) -> bytes:
    """Flip, insert, delete, repeat or cut off bytes."""
    damaged = bytearray(data)
    for _ in range(generator.choice((1, 1, 1, 3, 20))):
        at = generator.randrange(len(damaged) + 1)
        stop = min(len(damaged), at + generator.choice((1, 2, 4, 64)))
        match generator.randrange(6):
            case 0 if at < len(damaged):
                damaged[at] ^= 1 << generator.randrange(8)
            case 1:
                damaged[at:stop] = generator.randbytes(generator.choice((1, 2, 8)))
            case 2:
                damaged[at:at] = generator.choice(BYTES)
            case 3:
                del damaged[at:stop]
            case 4:
                damaged[at:at] = damaged[at:stop] * generator.choice((1, 50))
            case _ if generator.random() < 0.2:
                del damaged[at:]
    return bytes(damaged)


def damage_tokens(text: str, generator: random.Random) -> str:
    """Replace, repeat, swap, remove or insert words, signs and lines."""
    tokens = re.findall(r"\w+|\s+|[^\w\s]", text)
    for _ in range(generator.choice((1, 1, 2, 5))):
        at = generator.randrange(len(tokens) + 1)
        other = generator.randrange(len(tokens) + 1)
        match generator.randrange(5):
            case 0:
                tokens[at : at + 1] = [generator.choice(PIECES)]
            case 1:
                tokens.insert(at, generator.choice(PIECES))
            case 2:
                del tokens[at : at + 1]
            case 3:
                tokens[at:at] = tokens[other : other + generator.choice((1, 3, 30))]
            case _:
                tokens[at : at + 1], tokens[other : other + 1] = tokens[other : other + 1], tokens[at : at + 1]
    return "".join(tokens)


def damage_values(value: object, generator: random.Random, stop: float = 0.02) -> object:
    """Return a copy in which one value is of another type or size, missing or under another key.

    stop: the share of copies whose outermost value it is; further in, it is a third.
    """
    if generator.random() < stop or not isinstance(value, dict | list) or not value:
        return generator.choice(VALUES)
    copy = value.copy()
    key = generator.choice(list(copy) if isinstance(copy, dict) else range(len(copy)))
    match generator.randrange(8):
        case 0:
            del copy[key]
        case 1 if isinstance(copy, dict):
            copy[generator.choice(KEYS)] = copy.pop(key)
        case 2:
            for _ in range(generator.choice((1, 30, 150))):
                copy[key] = [copy[key]] if generator.random() < 0.5 else {"a": copy[key]}
        case _:
            copy[key] = damage_values(copy[key], generator, 1 / 3)
    return copy


def encode(text: str) -> bytes:
    """Encode text that may hold half characters."""
    return text.encode("utf-8", "surrogatepass")


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Raise TooLongError in what takes more than SECONDS of processor time."""

    def stop(number: int, frame: object) -> None:
        raise TooLongError

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def answer_to(use: Callable[[], object]) -> str:
    """Use one input; return what is wrong with the answer, or "fine" or "refused" if nothing is."""
    try:
        with bounded():
            use()
    except ForgebookError as error:
        return "refused" if _is_readable(str(error)) else f"not readable: {str(error)!r:.500}"
    except (Exception, TooLongError) as error:
        return f"{type(error).__name__}: {error}"[:500]
    return "fine"


def _is_readable(text: str) -> bool:
    names_internals = re.search(r"Traceback|pydantic|Input should|object at 0x|<class|\w+Error\(", text)
    return bool(text.strip()) and len(text) <= LONGEST_ANSWER and not names_internals


def report(answers: dict[int, str]) -> tuple[Counter, list[str]]:
    """Count the answers by kind; list those that are wrong, by the number of their input."""
    wrong = [f"input {k}: {answer}" for k, answer in answers.items() if answer not in ("fine", "refused")]
    return Counter(answers.values()), wrong


def peak_megabytes() -> float:
    """Return the most memory that this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
