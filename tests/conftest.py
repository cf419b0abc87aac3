"""Shared by all tests: the tiny model, small data, configs, and one Ray session."""

import contextlib
import copy
import gc
import json
import os
import random
import socket
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import pytest

# Tests reach no hub; a forgotten download would hang or hide a missing file.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# bitsandbytes compiles its CPU kernels with Inductor, whose import alone takes each process 2 seconds.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
# Ray's workers are of low priority (15), so that whatever else is busy on two cores all but stops them.
os.environ.setdefault("RAY_worker_niceness", "0")
# When the whole run of the tests began, in all its processes.
os.environ.setdefault("FORGEBOOK_TESTS_BEGAN", str(time.time()))
# Their runs tell no later plan how fast this machine is.
os.environ.setdefault("FORGEBOOK_CACHE", tempfile.mkdtemp(prefix="forgebook-tests-"))

REPOSITORY = Path(__file__).resolve().parent.parent
SLOW_FILES: set[Path] = set()  # which have tests that start Ray's workers, or take long
TINY_MODEL = REPOSITORY / "tiny_model"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Keep a file's tests in one process, which then shares its fixtures; notebooks are run one by one.

    (xdist 3.8's own --dist loadgroup does not see its groups under pytest 9.)
    """
    from xdist.scheduler import LoadScopeScheduling

    class FileByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return nodeid if "test_notebook_runs_unmodified" in nodeid else nodeid.split("::")[0]

    config.option.loadscopereorder = False  # keep the order below
    return FileByFile(config, log)


def pytest_collection_modifyitems(items):
    """Put files with slow tests first, and notebooks last, of which CI may skip some on a slow machine."""
    SLOW_FILES.update(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: (is_notebook(item), item.path not in SLOW_FILES))


def pytest_collection_finish():
    """Let the garbage collector pass over the tests and modules: 800,000 objects that stay."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item):
    """End Ray with the last file that shares it: its processes poll, idle as they are."""
    shares = item.path in SLOW_FILES and not is_notebook(item)
    if "ray" in sys.modules and not shares and "ray_session" not in item.fixturenames:
        sys.modules["ray"].shutdown()


def free_port() -> int:
    """Return a port that nothing listens on, below those that systems hand out (from 32768): none takes it meanwhile.

    Ray's workers listen on 10000 to 19999.
    """
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):  # in use
            probe.bind(("127.0.0.1", random.SystemRandom().randrange(20000, 32000)))
            return probe.getsockname()[1]


def is_notebook(item) -> bool:
    return "test_notebook_runs_unmodified" in item.nodeid


@pytest.fixture(scope="session")
def tokenizer():
    """The tiny model's tokenizer."""
    from forgebook.models.tokenizer import load_tokenizer

    return load_tokenizer(str(TINY_MODEL))


@pytest.fixture
def with_template(tokenizer):
    """A function that copies the tiny model's tokenizer with another chat template."""

    def copied(template: str):
        changed = copy.deepcopy(tokenizer)
        changed.chat_template = template
        return changed

    return copied


def chat(question: str, answer: str, system: str | None = "You are helpful.") -> dict:
    """Make one row."""
    first = [{"role": "system", "content": system}] if system else []
    return {"messages": [*first, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


CONVERSATION = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Where is the lamp?"},
    {"role": "assistant", "content": "On the table."},
    {"role": "user", "content": "And the key?"},
    {"role": "assistant", "content": "Under the lamp."},
]


def supervised_text(encoded, tokenizer) -> str:
    """Decode the tokens of an example that are in the loss."""
    return tokenizer.decode([i for i, in_loss in zip(encoded.input_ids, encoded.loss_mask, strict=True) if in_loss])


def uneven_rows(count: int) -> list[dict]:
    """Make rows of very different lengths, with very different shares of trained tokens."""
    words = "the lamp of Maria is on the table near the old door of the house".split()
    return [
        chat(" ".join(words[: 1 + 5 * k % 13] * (1 + k % 3)), " ".join(words[: 1 + 7 * k % 11] * (1 + k % 4)))
        for k in range(count)
    ]


def make_tokens(lengths, trained=1):
    """Make rows of given lengths of which the last `trained` tokens are trained."""
    from forgebook.data.token_store import Tokens

    return Tokens.from_examples([(range(n), [k >= n - trained for k in range(n)]) for n in lengths])


@pytest.fixture
def write_rows(tmp_path):
    """Write rows as JSONL and return the path."""

    def write(rows: list[dict], name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


@pytest.fixture
def make_config(tmp_path, write_rows):
    """Make a config for a small run: float32, in this process, 24 uneven rows; keywords override."""
    from forgebook.config.parse import load_config

    def make(**values):
        settings = {
            "model_id": str(TINY_MODEL),
            "train_path": write_rows(uneven_rows(24), "train.jsonl"),
            "valid_path": write_rows(uneven_rows(30)[24:], "valid.jsonl"),
            "task": "instruction_tuning",
            "run_name": "run",
            "storage_path": str(tmp_path / "runs"),
            "num_devices": 0,
            "num_epochs": 1,
            "train_batch_size_per_device": 8,
            "eval_batch_size_per_device": 8,
            "learning_rate": 1.0e-3,
            "num_warmup_steps": 1,
            "dtype": "float32",
            "deepspeed": None,
            "gradient_checkpointing": False,
            **values,
        }
        path = tmp_path / f"{settings['run_name']}.yaml"
        path.write_text(json.dumps(settings))  # JSON is YAML
        return load_config(path)

    return make


@pytest.fixture
def write_yaml(tmp_path):
    """Write YAML text to a file and return its path."""

    def write(text, name="tiny.yaml"):
        path = tmp_path / name
        path.write_text(textwrap.dedent(text), encoding="utf-8")
        return path

    return write


@pytest.fixture
def load_yaml(write_yaml):
    """Load a config of the two required keys plus some YAML text, from the third line on."""
    from forgebook.config.parse import load_config
    from support_config import MINIMAL

    return lambda text="", *overrides, **kwargs: load_config(write_yaml(MINIMAL + text), overrides, **kwargs)


def config_for(model_id: str, **values):
    """Make a config of a model that nobody trains here."""
    from forgebook.config.schema import FinetuneConfig

    return FinetuneConfig.model_validate({"model_id": model_id, "train_path": "train.jsonl", **values})


LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}


def losses_of(run) -> list[float]:
    """List the training losses of a run, step by step."""
    from forgebook.runs.metrics import read_metrics

    return [row["train_loss_batch"] for row in read_metrics(run.metrics) if "train_loss_batch" in row]


def fine_tune_until(config, step: int) -> None:
    """Run, and interrupt right after the given step is reported, before anything of it is saved."""
    from forgebook.launch.fine_tune import fine_tune
    from forgebook.runs.metrics import Progress

    class Interrupting(Progress):
        def step(self, **metrics):
            super().step(**metrics)
            if metrics["step"] == step:
                raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("forgebook.training.loop.Progress", Interrupting)
        fine_tune(config)


@pytest.fixture
def make_run(make_config, tmp_path):
    """Make a complete run's files under a name, without training."""
    from forgebook.config.parse import dump_config
    from forgebook.runs.atomic import write_json
    from forgebook.runs.run import Run, open_run
    from forgebook.runs.run_files import write_marker

    def make(name: str, eval_loss: float = 0.5, **values) -> Run:
        config = make_config(run_name=name, storage_path=str(tmp_path / "runs"), **values)
        run = open_run(config)
        run.folder.mkdir(parents=True)
        write_marker(run.folder)
        run.config.write_text(dump_config(config))
        summary = {"best_checkpoint": "checkpoints/epoch-1", "eval_loss": eval_loss, "job_id": "raysubmit_1"}
        write_json(run.summary, summary | {"created_at": f"2026-01-0{len(name)}T00:00:00+00:00"})
        return run

    return make


@pytest.fixture(scope="session")
def ray_session():
    """One Ray cluster of two cores for all tests that need one."""
    import ray

    from forgebook import ray_cluster

    ray_cluster.start_ray(cores=2)
    yield
    ray.shutdown()


@pytest.fixture
def without_ray(monkeypatch):
    """Workers are plain processes of one group: for tests whose subject is what several of them do, not Ray."""
    from forgebook.launch import ray_train
    from support_ranks import train_in_ranks

    monkeypatch.setattr(ray_train, "run_on_ray", train_in_ranks)


@pytest.fixture(scope="module")
def s3_door():
    """A bucket `forgebook` on an S3 server on loopback, behind a door that a test may close for a while."""
    import boto3

    from support_s3 import Door

    door = Door()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ENDPOINT_URL", door.url)
        environment.setenv("AWS_ACCESS_KEY_ID", "test")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "test")
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        environment.setenv("AWS_EC2_METADATA_DISABLED", "true")
        boto3.client("s3").create_bucket(Bucket="forgebook")
        yield door
    door.close()


@pytest.fixture
def door(s3_door, tmp_path, monkeypatch):
    """The same, open, for one test with a cache of its own."""
    monkeypatch.setenv("FORGEBOOK_CACHE", str(tmp_path / "cache"))
    s3_door.answers, s3_door.refused = lambda method, path: None, 0
    yield s3_door
    s3_door.answers = lambda method, path: None


@pytest.fixture
def s3(door):
    """A client of that S3 server."""
    import boto3

    return boto3.client("s3")


@pytest.fixture
def google(monkeypatch):
    """A bucket `forgebook` on an emulator of Google's storage over HTTP."""
    from gcp_storage_emulator.server import create_server

    port = free_port()
    server = create_server("127.0.0.1", port, in_memory=True, default_bucket="forgebook")
    server.start()
    monkeypatch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", f"http://127.0.0.1:{port}")
    yield
    server.stop()
