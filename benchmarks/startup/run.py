"""Seconds of short commands, of two versions of this project: what each pays before its work begins.

git worktree add /tmp/before 485d941
python benchmarks/startup/run.py --before /tmp/before [--rounds 3] [--only NAME ...]

The versions take turns; without --before there is this one alone. The processor seconds are those of all processes of
a command, Ray's included, because other processes may share the machine; the seconds are those that a user waits. A
training command has one optimizer step; a mistake is one in the data, answered with exit code 2. Medians and
environment go to benchmarks/startup/results.json; commands that are left out keep the figures that it has.
"""

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(REPOSITORY))

from forgebook.planning.hardware import cpu_share  # noqa: E402

RESULTS = Path(__file__).with_name("results.json")
QUICKSTART = "training_configs/tiny/quickstart.yaml"
ONE_STEP = [QUICKSTART, "max_steps=1", "num_warmup_steps=0", "on_existing=overwrite"]
IN_PROCESS = [*ONE_STEP, "num_devices=0", "deepspeed=none"]
# In this order: the last ones use the run of the one before.
COMMANDS = {
    "help": ["--help"],
    "plan": ["plan", QUICKSTART],
    "preview": ["preview", QUICKSTART, "n=1"],
    "two workers, LoRA, ZeRO-2": [*ONE_STEP, "run_name=two"],
    "this process, full fine-tuning": [*IN_PROCESS, "lora_config=null", "run_name=full"],
    "this process, LoRA": [*IN_PROCESS, "run_name=lora"],
    "generate": ["generate", "{runs}/lora", "-p", "Hello", "max_new_tokens=1"],
}
# Files of training data with a mistake; None: no file.
GOOD_ROW = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
MISTAKES = {
    "malformed JSON": GOOD_ROW + GOOD_ROW[:40] + "\n",
    "no assistant turn": '{"messages": [{"role": "user", "content": "a"}]}\n',
    "wrong key": GOOD_ROW.replace("messages", "massages"),
    "missing file": None,
}
COMMANDS |= {name: [QUICKSTART, f"train_path={{runs}}/{name.replace(' ', '_')}.jsonl"] for name in MISTAKES}


def measure(words: list[str], code_base: Path, environment: dict[str, str], exit_code: int) -> tuple[float, float]:
    """Run a command of one version; return its seconds, and the processor seconds of its processes, as last seen."""
    command = [sys.executable, "main.py", *words]
    start = time.perf_counter()
    process = psutil.Popen(
        command, cwd=code_base, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    seen: dict[int, float] = {}
    while process.poll() is None:
        try:
            for one in [process, *process.children(recursive=True)]:
                times = one.cpu_times()
                seen[one.pid] = times.user + times.system
        except psutil.Error:  # it has just ended
            pass
        time.sleep(0.02)
    seconds = time.perf_counter() - start
    if process.returncode != exit_code:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode} in {code_base}")
    return seconds, sum(seen.values())


def main() -> None:
    """Measure both versions; print and save the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", help="a checkout of the version to compare with")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm", action="store_true", help="an earlier call has filled the caches")
    parser.add_argument("--only", nargs="+", default=list(COMMANDS), choices=COMMANDS)
    options = parser.parse_args()
    versions = {"before": Path(options.before).resolve()} if options.before else {}
    versions["after"] = REPOSITORY
    unmeasured = 0 if options.warm else 1  # the first time fills caches: tokens, compiled files, DeepSpeed's extension
    for name in options.only:
        measured: dict[str, list[tuple[float, float]]] = {version: [] for version in versions}
        for version, code_base in list(versions.items()) * (options.rounds + unmeasured):
            runs = Path(tempfile.gettempdir()) / f"startup-{version}"
            environment = {**os.environ, "FORGEBOOK_CACHE": str(runs / "cache"), "HF_HUB_OFFLINE": "1"}
            words = [word.format(runs=runs) for word in COMMANDS[name]]
            words += [f"storage_path={runs}"] * (QUICKSTART in words and "plan" not in words and "preview" not in words)
            if content := MISTAKES.get(name):
                runs.mkdir(exist_ok=True)
                (runs / f"{name.replace(' ', '_')}.jsonl").write_text(content)
            measured[version].append(measure(words, code_base, environment, 2 if name in MISTAKES else 0))
        medians = {}
        for version, pairs in measured.items():
            waited, used = (round(statistics.median(values), 2) for values in zip(*pairs[unmeasured:], strict=True))
            medians |= {version: used, f"{version}_seconds": waited}
        saved = json.loads(RESULTS.read_text())["results"] if RESULTS.exists() else {}
        print(f"{name:<32} processor and waited seconds: {medians}", flush=True)
        packages = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "ray")}
        environment = {
            "cpu": cpu_share(1).name,
            "cores": os.cpu_count(),
            "load": round(os.getloadavg()[0], 1),
            **packages,
        }
        saved[name] = medians | {"rounds": options.rounds, "environment": environment}
        work = "processor seconds of all processes of a command, and those waited; caches filled, the tiny model"
        RESULTS.write_text(json.dumps({"work": work, "results": saved}, indent=2) + "\n")


if __name__ == "__main__":
    main()
