"""GSM8K on the tiny model through every way to train: LoRA and full, DeepSpeed stages and none, 1 and 2 workers.

python benchmarks/gsm8k/run.py TRAIN.jsonl VALID.jsonl [--steps 40]

Each cell is `python main.py training_configs/tiny/gsm8k-{lora,full}.yaml` as a user types it. With --steps a run
stops early (all combinations in minutes); without, it takes the whole epoch. Both evaluate before and after.
Results are appended to benchmarks/gsm8k/results.json.
"""

import argparse
import itertools
import json
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent.parent
RESULTS = Path(__file__).with_name("results.json")


def run(train: str, valid: str, method: str, deepspeed: str, devices: int, steps: int | None) -> dict:
    """Run one combination; return its losses, pace and peak memory."""
    name = f"gsm8k-{method}-{deepspeed}-{devices}"
    batch = 16 // devices  # the same 16 rows per update whatever the number of workers
    command = [
        sys.executable, "main.py", f"training_configs/tiny/gsm8k-{method}.yaml", f"train_path={train}",
        f"valid_path={valid}", f"deepspeed={deepspeed}", f"num_devices={devices}", f"run_name={name}",
        f"train_batch_size_per_device={batch}", "eval_first=true", "on_existing=overwrite",
    ]  # fmt: skip
    began = time.time()
    done = subprocess.run(
        command + [f"max_steps={steps}"] * bool(steps), cwd=REPOSITORY, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    folder = REPOSITORY / "runs" / name
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [row["eval_loss"] for row in rows if "eval_loss" in row]
    summary = json.loads((folder / "summary.json").read_text())
    return {
        "method": method, "deepspeed": deepspeed, "num_devices": devices, "steps": summary["steps"],
        "eval_loss_before": round(losses[0], 4), "eval_loss_after": round(losses[-1], 4),
        "real_tokens_per_second": round(summary["trained_tokens_throughput"]),
        "peak_gigabytes_per_worker": round(max(summary["peak_memory_bytes_per_worker"]) / 1e9, 2),
        "wall_seconds": round(time.time() - began),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path)
    parser.add_argument("valid", type=Path)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--methods", nargs="+", default=["lora", "full"])
    parser.add_argument("--deepspeed", nargs="+", default=["none", "zero_1", "zero_2", "zero_3"])
    parser.add_argument("--devices", nargs="+", type=int, default=[1, 2])
    given = parser.parse_args()
    cpu = next(line.split(": ")[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line)
    environment = {"cpu": cpu, "machine": platform.machine(), **{n: version(n) for n in ("torch", "ray", "deepspeed")}}
    results = json.loads(RESULTS.read_text())["results"] if RESULTS.exists() else []
    paths = str(given.train.resolve()), str(given.valid.resolve())
    for combination in itertools.product(given.methods, given.deepspeed, given.devices):
        results.append(run(*paths, *combination, given.steps))
        print(json.dumps(results[-1]), flush=True)
        assert results[-1]["eval_loss_after"] < results[-1]["eval_loss_before"]
        RESULTS.write_text(json.dumps({"environment": environment, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
