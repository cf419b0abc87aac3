"""A real pretrained model before and after: SmolLM2-135M-Instruct on two CPU cores, by the commands a user types.

make models; python benchmarks/real/run.py records            # messages of customers to JSON, 300 examples, one epoch
python benchmarks/real/run.py gsm8k TRAIN.jsonl TEST.jsonl    # grade-school math, 240 examples, one epoch

Trains an adapter, then answers held-out rows with the base and the tuned model. Minutes are those of a machine that
does nothing else; processor minutes count on any. Each task replaces its entry of benchmarks/real/results.json.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from importlib.metadata import version
from itertools import islice
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent.parent
RESULTS = Path(__file__).with_name("results.json")
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
CONFIG = f"training_configs/real/{MODEL}/lora/cpu-512.yaml"
RECORDS = [REPOSITORY / "data/quickstart" / f"{name}.jsonl" for name in ("train", "test")]


def head(source: Path, count: int, target: Path) -> Path:
    """Copy the first rows of a file."""
    with source.open(encoding="utf-8") as lines:
        target.write_text("".join(islice(lines, count)), encoding="utf-8")
    return target


def main_py(*words: str) -> dict[str, float]:
    """Run one command; return its minutes, and those of its processes on the cores."""
    began, before = time.time(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "main.py", *words], cwd=REPOSITORY, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"minutes": round((time.time() - began) / 60, 1), "processor_minutes": round(processor / 60, 1)}


def measure(task: str, train: Path, test: Path, rows: int, held_out: int) -> dict:
    """Train on `rows` examples of a file and evaluate on `held_out` of another."""
    metric = {"records": "exact_match"}.get(task, task)
    run = REPOSITORY / "runs" / f"real-{task}"
    data = REPOSITORY / "runs" / f"real-{task}-data"
    data.mkdir(parents=True, exist_ok=True)
    train = head(train, rows, data / "train.jsonl")
    test = head(test, held_out, data / "test.jsonl")
    valid = head(test, 40, data / "valid.jsonl")
    trained = main_py(
        CONFIG, f"train_path={train}", f"valid_path={valid}", f"run_name={run.name}", "max_steps=null", "num_devices=0",
        "on_existing=overwrite",
    )  # fmt: skip
    evaluated = main_py("evaluate", run.name, f"data={test}", f"metric={metric}")
    summary, evaluation = (json.loads((run / f"{name}.json").read_text()) for name in ("summary", "evaluation"))
    return {
        "examples": rows, "held_out": evaluation["rows"], "metric": metric,
        **{side: evaluation[f"{metric}_{side}"] for side in ("before", "before_95", "after", "after_95")},
        "eval_loss": round(summary["eval_loss"], 4), "steps": summary["steps"],
        "training": trained, "evaluation_of_both": evaluated,
        "process_gigabytes": {
            kind: round(summary[kind]["process_bytes_per_worker"] / 1e9, 2) for kind in ("planned", "measured")
        },
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["records", "gsm8k"])
    parser.add_argument("files", nargs="*", type=Path, help="gsm8k: training and test rows")
    parser.add_argument("--rows", type=int, help="training examples")
    parser.add_argument("--held-out", type=int, help="examples to answer")
    given = parser.parse_args()
    train, test = RECORDS if given.task == "records" else given.files
    rows, held_out = (300, 60) if given.task == "records" else (240, 200)
    result = measure(given.task, train, test, given.rows or rows, given.held_out or held_out)
    print(json.dumps(result, indent=1))
    cpu = next(line.split(": ")[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line)
    result["environment"] = {
        "cpu": cpu, "machine": platform.machine(), "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        **{name: version(name) for name in ("torch", "transformers", "peft")},
    }  # fmt: skip
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps(results | {given.task: result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
