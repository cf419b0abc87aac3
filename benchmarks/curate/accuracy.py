"""Held-out accuracy before and after curation: python benchmarks/curate/accuracy.py [--seeds 1 2 3]

The quickstart's task, a customer's message -> a JSON record, has one right answer per message. Of 1,000 training rows
650 are as they are; 350 are bad: 160 wrong (a field of another record; or the request that a form has as its default),
60 cut off, 30 refusals, 40 duplicates with a changed word, 30 the same row again, 30 leaks of the validation file.

For each seed two models are trained for the same number of optimizer steps: on the planted rows, and on what `curate`
leaves of them, with the loss of the first model as its judge of label noise. Their answers to 150 held-out messages, in
no other file, must be the right record.
The figures go to benchmarks/curate/results.json, with the environment.
"""

import argparse
import copy
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests"), str(Path(__file__).parent)]
DATA = REPOSITORY / "data" / "quickstart"
GOOD, STEPS, BATCH, VALIDATION = 650, 160, 16, 50
FAULTS = {"wrong": 160, "truncated": 60, "refusal": 30, "near_duplicate": 40, "exact_duplicate": 30, "leak": 30}
WRONG_RECORDS = {"wrong", "truncated", "refusal"}


def plant(seed: int) -> tuple[list[dict], list[str]]:
    """Return training rows, the good ones first, and the fault of each; "" for a good one."""
    from support_planted import REFUSALS, answered, edited

    rng = random.Random(seed)
    rows, leaks = read("train.jsonl"), read("test.jsonl")[:VALIDATION]
    rng.shuffle(rows)
    good, spare = rows[:GOOD], iter(rows[GOOD:])
    planted = []
    for fault, count in FAULTS.items():
        for k in range(count):
            if fault == "wrong":
                row = next(spare)
                row = answered(row, with_wrong_field(answer_of(row), answer_of(rng.choice(good)), k, rng))
            elif fault == "truncated":
                row = next(spare)
                row = answered(row, answer_of(row)[: rng.randrange(12, len(answer_of(row)) - 4)])
            elif fault == "refusal":
                row = answered(next(spare), REFUSALS[k % len(REFUSALS)])
            elif fault == "leak":
                row = copy.deepcopy(leaks[k % len(leaks)])
            else:
                row = copy.deepcopy(rng.choice(good))
                row = edited(row, rng) if fault == "near_duplicate" else row
            planted.append((fault, row))
    rng.shuffle(planted)
    planted = [("", row) for row in good] + planted  # the original of a duplicate comes first
    return [row for _, row in planted], [fault for fault, _ in planted]


def read(name: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / name).read_text().splitlines()]


def answer_of(row: dict) -> str:
    return row["messages"][-1]["content"]


def with_wrong_field(answer: str, other: str, number: int, rng: random.Random) -> str:
    """Change one field: every second time the request to the form's default, else any field to another record's."""
    record, another = json.loads(answer), json.loads(other)
    if number % 2 == 0 and record["request"] != "refund":
        return json.dumps(record | {"request": "refund"})
    fields = [name for name in record if another[name] != record[name]]
    name = rng.choice(fields)
    return json.dumps(record | {name: another[name]})


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def train(folder: Path, name: str, rows: str, seed: int) -> float:
    """Train on a file; return the share of right records among the held-out messages."""
    from forgebook.cli.main import main

    config = [
        str(REPOSITORY / "training_configs/tiny/quickstart.yaml"), f"train_path={rows}", f"storage_path={folder}",
        f"valid_path={folder / 'valid.jsonl'}", f"run_name={name}", "num_devices=0", "deepspeed=null", f"seed={seed}",
        f"train_batch_size_per_device={BATCH}", f"max_steps={STEPS}", "num_epochs=20",
    ]  # fmt: skip
    assert main(config) == 0
    answers = folder / f"{name}.answers.jsonl"
    held_out = [{"messages": row["messages"][:-1]} for row in read("test.jsonl")[VALIDATION:]]
    questions = write(folder / "questions.jsonl", held_out)
    assert main(["generate", str(folder / name), f"data={questions}", f"out={answers}", "max_new_tokens=64"]) == 0
    written = [json.loads(line) for line in answers.read_text().splitlines()]
    right = [answer_of(row) for row in read("test.jsonl")[VALIDATION:]]
    return statistics.fmean(given(row) == answer for row, answer in zip(written, right, strict=True))


def given(row: dict) -> str:
    return str(row.get("answer") or row["messages"][-1]["content"]).strip()


def curate(folder: Path, rows: str, faults: list[str]) -> tuple[str, dict]:
    """Curate by the command; return the file, and how much of what is bad was dropped."""
    from forgebook.cli.main import main
    from forgebook.runs.atomic import read_json

    out = folder / "clean.jsonl"
    drop = "[empty_answer,truncated,refusal,exact_duplicate,near_duplicate,validation_overlap,high_loss]"
    config = str(REPOSITORY / "training_configs/tiny/quickstart.yaml")
    arguments = [f"train_path={rows}", f"valid_path={folder / 'valid.jsonl'}", f"curation.drop={drop}"]
    assert main(["curate", config, f"out={out}", f"run={folder / 'planted'}", *arguments]) == 0
    dropped = {int(json.loads(line)["where"].rpartition(":")[2]) - 1
               for line in out.with_suffix(".dropped.jsonl").read_text().splitlines()}  # fmt: skip
    bad = {number for number, fault in enumerate(faults) if fault}
    recall = {
        fault: round(statistics.fmean(k in dropped for k, one in enumerate(faults) if one == fault), 3)
        for fault in FAULTS
    }
    report = read_json(out.with_suffix(".report.json"))
    return str(out), {
        "dropped": len(dropped), "precision": round(len(dropped & bad) / max(1, len(dropped)), 3),
        "recall": recall, "reasons": {name: one["count"] for name, one in report["reasons"].items()},
    }  # fmt: skip


def measure(seed: int) -> dict:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        rows, faults = plant(seed)
        write(folder / "valid.jsonl", read("test.jsonl")[:VALIDATION])
        planted = write(folder / "planted.jsonl", rows)
        before = train(folder, "planted", planted, seed)
        clean, found = curate(folder, planted, faults)
        after = train(folder, "curated", clean, seed)
        return {"seed": seed, "planted": before, "curated": after, "curation": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    seeds = parser.parse_args().seeds
    from run import save

    os.environ["FORGEBOOK_CACHE"] = tempfile.mkdtemp()
    started, runs = time.process_time(), []
    for seed in seeds:
        runs.append(measure(seed))
        print(json.dumps(runs[-1]), flush=True)
        save("accuracy", {
            "rows": GOOD + sum(FAULTS.values()), "good": GOOD, "faults": FAULTS, "steps": STEPS, "batch": BATCH,
            "held_out": len(read("test.jsonl")) - VALIDATION,
            "mean": {name: round(statistics.fmean(one[name] for one in runs), 3)
                     for name in ("planted", "curated")},
            "seeds": runs, "cpu_seconds": round(time.process_time() - started),
        })  # fmt: skip


if __name__ == "__main__":
    main()
