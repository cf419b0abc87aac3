"""Python code on all cores: in order, errors included, and no process outlives its parent."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from conftest import REPOSITORY, uneven_rows
from forgebook.data import forked, readers, tokenize
from forgebook.data.data_sources import find_sources
from forgebook.errors import DataError

linux = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux alone")


@pytest.fixture(autouse=True)
def two_cores(monkeypatch):
    monkeypatch.setattr(forked, "cores", lambda: 2)


@linux
def test_results_come_in_order_from_several_processes():
    def call(number, item):  # a closure, which cannot be pickled
        time.sleep(0.05 * (number == 0))
        assert threading.current_thread() is not threading.main_thread()  # where limits on templates cost more
        return number, item * 2, os.getpid()

    results = list(forked.map_forked(call, ["a", "b", "c", "d"]))
    assert [one[:2] for one in results] == [(0, "aa"), (1, "bb"), (2, "cc"), (3, "dd")]
    pids = {one[2] for one in results}
    assert len(pids) == 2 and os.getpid() not in pids


@linux
@pytest.mark.parametrize("before", [None, "true"])
def test_the_environment_stays_as_it_was(monkeypatch, before):
    monkeypatch.delenv(forked.PARALLELISM, raising=False)
    if before is not None:
        monkeypatch.setenv(forked.PARALLELISM, before)
    inside = list(forked.map_forked(lambda number, item: os.environ[forked.PARALLELISM], [1, 2]))
    assert inside == ["false", "false"] and os.environ.get(forked.PARALLELISM) == before


@linux
def test_an_error_is_that_of_its_item():
    def call(number, item):
        if item == "bad":
            raise DataError("rows.jsonl:3: what is wrong")
        return item

    results = forked.map_forked(call, ["good", "bad", "never", "read"])
    assert next(results) == "good"
    with pytest.raises(DataError, match=r"rows\.jsonl:3: what is wrong"):
        list(results)


@linux
def test_a_killed_process_is_an_error_with_the_fix():
    with pytest.raises(DataError, match="was killed, probably for want of memory"):
        list(forked.map_forked(lambda number, item: os.kill(os.getpid(), signal.SIGKILL), [1, 2]))


@linux
def test_no_process_outlives_its_parent():
    script = (
        "import os, time\nfrom forgebook.data import forked\n"
        "list(forked.map_forked(lambda k, item: (os.write(1, b'%d\\n' % os.getpid()), time.sleep(600)), [1, 2]))\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    children = [int(parent.stdout.readline()) for _ in range(min(2, forked.cores()))]
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 30
    while any(os.path.exists(f"/proc/{pid}/status") and _is_running(pid) for pid in children):
        assert time.monotonic() < deadline, "a child lives on"
        time.sleep(0.05)


def _is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/status") as file:
            return "State:\tZ" not in file.read()
    except OSError:
        return False


def test_ray_is_not_forked(monkeypatch):
    import types

    monkeypatch.setitem(sys.modules, "ray", types.SimpleNamespace(is_initialized=lambda: True))
    assert not forked.can_fork()
    monkeypatch.setitem(sys.modules, "ray", types.SimpleNamespace(is_initialized=lambda: False))
    assert forked.can_fork() == (sys.platform == "linux")


@linux
def test_tokens_are_the_same_in_processes_and_without(write_rows, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "CHUNK_BYTES", 4096)
    [*sources] = find_sources(write_rows([*uneven_rows(60), {"messages": "no list"}]))
    pids, write_shard = [], tokenize._write_shard

    def written(where):
        folder = tmp_path / where
        tokens, notes = tokenize.tokenize(sources, tokenizer, tokenize.EncodingOptions(), folder)
        files = sorted(folder.rglob("*.arrow"))
        return [path.read_bytes() for path in files], [tokens.where(k) for k in range(len(tokens))], notes

    in_processes = written("forked")
    monkeypatch.setattr(forked, "can_fork", lambda: False)
    monkeypatch.setattr(tokenize, "_write_shard", lambda *a, **k: pids.append(os.getpid()) or write_shard(*a, **k))
    assert written("here") == in_processes and len(in_processes[0]) == len(pids) > 2
    assert len(in_processes[1]) == 60 and "rows.jsonl:61" in in_processes[2].problems[0]
