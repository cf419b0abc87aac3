"""Answers per second of two versions of this project, side by side: the same prompts, greedy.

Both answer in float32, in which CPU runs were at the time of the earlier one, and in bfloat16, which today's runs
choose where a short measurement finds it faster.

git worktree add /tmp/before 99b8ac3
python benchmarks/generate/run.py ../shared/data/gsm8k/test_300.jsonl --before /tmp/before [--rows 50] [--threads 1]

Each version runs in a process of its own, one after the other, on SmolLM2-135M-Instruct (`make models`). Loading is
left out. Tokens are those of the answers, padding and prompts excluded. Processor seconds are compared, because other
processes may share the machine. Results and environment go to benchmarks/generate/results.json, by processor.
"""

import argparse
import importlib.metadata
import json
import operator
import os
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(REPOSITORY))

from forgebook.planning.hardware import cpu_share  # noqa: E402

RESULTS = Path(__file__).with_name("results.json")
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
DTYPES = ("float32", "bfloat16")
# Run by both versions: only names that both have.
CODE = """
import json, sys, time
from forgebook.inference.generate import complete
try:
    from forgebook.inference.loading import find_model, load_for_generation
except ImportError:  # where earlier versions had them
    from forgebook.inference.generate import find_model, load_for_generation
rows, model_id, limit, dtype, out = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4], sys.argv[5]
prompts = [json.loads(line)["messages"][:-1] for line in open(rows)]
model, tokenizer, prompt_format = load_for_generation(find_model(model_id), dtype)
wall, cpu = time.perf_counter(), time.process_time()
answers = complete(model, tokenizer, prompts, prompt_format=prompt_format, max_new_tokens=limit)
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
tokens = sum(map(len, tokenizer(answers)["input_ids"]))
json.dump({"wall": wall, "cpu": cpu, "tokens": tokens, "answers": answers}, open(out, "w"))
"""


def measure(code_base: Path, rows: Path, limit: int, dtype: str, folder: Path) -> dict:
    """Answer all rows with one version of the project, in one dtype."""
    out = folder / "out.json"
    command = [sys.executable, "-c", CODE, str(rows), MODEL, str(limit), dtype, str(out)]
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
    versions = {"after": REPOSITORY, "before": before}
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        rows.write_text("\n".join(Path(options.data).read_text().splitlines()[: options.rows]) + "\n")
        cases = [(name, dtype) for dtype in DTYPES for name in versions]
        measured = {
            (name, dtype): measure(versions[name], rows, options.max_new_tokens, dtype, Path(folder))
            for name, dtype in cases
        }
    rates = {case: one["tokens"] / one["cpu"] for case, one in measured.items()}
    results = [
        {
            "version": name,
            "dtype": dtype,
            "commit": commit_of(versions[name]),
            "tokens": one["tokens"],
            "processor_seconds": round(one["cpu"], 1),
            "wall_seconds": round(one["wall"], 1),
            "tokens_per_processor_second": round(rates[name, dtype], 1),
        }
        for (name, dtype), one in measured.items()
    ]
    report = {
        "environment": {
            "cpu": cpu_share(1).name,
            "threads": options.threads,
            **{name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        },
        "work": f"{options.rows} GSM8K prompts, at most {options.max_new_tokens} tokens each, {MODEL}, greedy",
        "equal_answers": {
            dtype: sum(map(operator.eq, measured["after", dtype]["answers"], measured["before", dtype]["answers"]))
            for dtype in DTYPES
        },
        "speedup": {dtype: round(rates["after", dtype] / rates["before", dtype], 2) for dtype in DTYPES},
        "speedup_of_bfloat16_now_over_float32_then": round(rates["after", "bfloat16"] / rates["before", "float32"], 2),
        "results": results,
    }
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps(known | {report["environment"]["cpu"]: report}, indent=2) + "\n")
    print(json.dumps(report, indent=2))


def commit_of(folder: Path) -> str:
    """Return the commit of a checkout."""
    command = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
