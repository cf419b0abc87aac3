"""Processor seconds of short commands, of two versions of this project: what each pays before its work begins.

git worktree add /tmp/before 485d941
python benchmarks/startup/run.py --before /tmp/before [--rounds 3] [--only NAME ...]

The versions take turns. The seconds are those of all processes of a command, Ray's included, because other processes
may share the machine; a training command has one optimizer step. Medians and environment go to
benchmarks/startup/results.json; commands that are left out keep the figures that it has.
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


def processor_seconds(words: list[str], code_base: Path, environment: dict[str, str]) -> float:
    """Run a command of one version; return the processor seconds of its processes, as last seen before each ended."""
    command = [sys.executable, "main.py", *words]
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
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed in {code_base}")
    return sum(seen.values())


def main() -> None:
    """Measure both versions; print and save the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", required=True, help="a checkout of the version to compare with")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm", action="store_true", help="an earlier call has filled the caches")
    parser.add_argument("--only", nargs="+", default=list(COMMANDS), choices=COMMANDS)
    options = parser.parse_args()
    versions = {"before": Path(options.before).resolve(), "after": REPOSITORY}
    unmeasured = 0 if options.warm else 1  # the first time fills caches: tokens, compiled files, DeepSpeed's extension
    for name in options.only:
        seconds: dict[str, list[float]] = {version: [] for version in versions}
        for version, code_base in list(versions.items()) * (options.rounds + unmeasured):
            runs = Path(tempfile.gettempdir()) / f"startup-{version}"
            environment = {**os.environ, "FORGEBOOK_CACHE": str(runs / "cache"), "HF_HUB_OFFLINE": "1"}
            words = [word.format(runs=runs) for word in COMMANDS[name]]
            words += [f"storage_path={runs}"] * (QUICKSTART in words and "plan" not in words and "preview" not in words)
            seconds[version].append(processor_seconds(words, code_base, environment))
        medians = {version: round(statistics.median(values[unmeasured:]), 1) for version, values in seconds.items()}
        saved = json.loads(RESULTS.read_text())["results"] if RESULTS.exists() else {}
        saved[name] = medians | {"rounds": options.rounds}
        print(f"{name:<32} before {medians['before']:6.1f} s   after {medians['after']:6.1f} s", flush=True)
        packages = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "ray")}
        environment = {
            "cpu": cpu_share(1).name,
            "cores": os.cpu_count(),
            "load": round(os.getloadavg()[0], 1),
            **packages,
        }
        work = "processor seconds of all processes of a command, its caches filled, on the tiny model"
        RESULTS.write_text(json.dumps({"environment": environment, "work": work, "results": saved}, indent=2) + "\n")


if __name__ == "__main__":
    main()
