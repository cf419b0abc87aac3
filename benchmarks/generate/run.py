"""Answers per second of two versions of this project, side by side: the same prompts, greedy, float32.

git worktree add /tmp/before 99b8ac3
python benchmarks/generate/run.py ../shared/data/gsm8k/test_300.jsonl --before /tmp/before [--rows 50] [--threads 1]

Each version runs in a process of its own, one after the other, on SmolLM2-135M-Instruct (`make models`). Loading is
left out. Tokens are those of the answers, padding and prompts excluded. Processor seconds are compared, because other
processes may share the machine. Results and environment go to benchmarks/generate/results.json.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(REPOSITORY))

from forgebook.planning.hardware import cpu_share  # noqa: E402

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
# Run by both versions: only names that both have.
CODE = """
import json, sys, time
from forgebook.inference.generate import complete
from forgebook.inference.loading import find_model, load_for_generation
rows, model_id, limit, out = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
prompts = [json.loads(line)["messages"][:-1] for line in open(rows)]
model, tokenizer, prompt_format = load_for_generation(find_model(model_id), "float32")
wall, cpu = time.perf_counter(), time.process_time()
answers = complete(model, tokenizer, prompts, prompt_format=prompt_format, max_new_tokens=limit)
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
tokens = sum(map(len, tokenizer(answers)["input_ids"]))
json.dump({"wall": wall, "cpu": cpu, "tokens": tokens, "answers": answers}, open(out, "w"))
"""


def measure(code_base: Path, rows: Path, limit: int, folder: Path) -> dict:
    """Answer all rows with one version of the project."""
    out = folder / "out.json"
    command = [sys.executable, "-c", CODE, str(rows), MODEL, str(limit), str(out)]
    subprocess.run(command, check=True, cwd=code_base, env={**os.environ, "PYTHONPATH": str(code_base)})
    return json.loads(out.read_text())


def main() -> None:
    """Measure both versions; print and save the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--before", required=True, help="a checkout of the version to compare with")
    parser.add_argument("--rows", type=int, default=50)
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    before = Path(options.before).resolve()
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        rows.write_text("\n".join(Path(options.data).read_text().splitlines()[: options.rows]) + "\n")
        versions = {"after": REPOSITORY, "before": before}
        measured = {name: measure(path, rows, options.max_new_tokens, Path(folder)) for name, path in versions.items()}
    equal = sum(one == other for one, other in zip(*(one["answers"] for one in measured.values()), strict=True))
    results = [
        {
            "version": name,
            "commit": commit_of(versions[name]),
            "tokens": one["tokens"],
            "processor_seconds": round(one["cpu"], 1),
            "wall_seconds": round(one["wall"], 1),
            "tokens_per_processor_second": round(one["tokens"] / one["cpu"], 1),
        }
        for name, one in measured.items()
    ]
    report = {
        "environment": {
            "cpu": cpu_share(1).name,
            "threads": options.threads,
            **{name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        },
        "work": f"{options.rows} GSM8K prompts, at most {options.max_new_tokens} tokens each, {MODEL}, float32, greedy",
        "equal_answers": equal,
        "speedup": round(results[0]["tokens_per_processor_second"] / results[1]["tokens_per_processor_second"], 2),
        "results": results,
    }
    Path(__file__).with_name("results.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


def commit_of(folder: Path) -> str:
    """Return the commit of a checkout."""
    command = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
