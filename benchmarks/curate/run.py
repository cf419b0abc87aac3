"""What curate finds, at what speed, and what it is worth: python benchmarks/curate/run.py [--part NAME ...]

speed     near duplicates among 1,000,000 made-up examples of 40 words, a tenth of which repeat an earlier one with one
          word changed: seconds and peak memory of DuplicateIndex, in a process of its own; and beside it datasketch's
          own index (MinHashLSH) with the same bands, for fewer examples, because its memory grows with them.
embeddings  close pairs among 100,000 and 1,000,000 made-up embeddings of 384 numbers, a tenth of which are an earlier
          one moved a little: seconds, peak memory, recall.
planted   data/summaries with 600 rows as they are and 30 of each fault planted (tests/support_planted.py): precision
          and recall of every check, and of the loss of a model trained on that data for two epochs.

Each part writes its figures into benchmarks/curate/results.json, with the environment.
"""

import argparse
import collections
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent.parent
RESULTS = Path(__file__).with_name("results.json")
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]
EACH, ROWS = 30, 600
SIZE = 384  # of made-up embeddings, that of small embedding models


PARTS: dict[str, list[tuple[str, int]]] = {
    "speed": [("index", 100_000), ("datasketch", 100_000), ("index", 1_000_000)],
    "embeddings": [("embeddings", 100_000), ("embeddings", 1_000_000)],
    "planted": [],
}


def made_up(count: int):
    """Yield examples of 40 words, one in ten a repetition with one word changed."""
    from forgebook.data.row_formats import Example

    rng = random.Random(0)
    words = ["".join(chr(97 + int(digit)) for digit in str(k)) for k in range(20_000)]
    texts: list[tuple[str, str]] = []
    for number in range(count):
        if number % 10 == 9:
            question, answer = texts[rng.randrange(len(texts))]
            changed = answer.split()
            changed[rng.randrange(len(changed))] = "changed"
            answer = " ".join(changed)
        else:
            question, answer = " ".join(rng.choices(words, k=12)), " ".join(rng.choices(words, k=28))
            if len(texts) < 20_000:
                texts.append((question, answer))
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        yield Example(f"a.jsonl:{number}", messages=messages)


def measure_index(count: int) -> dict:
    """Find the duplicates of made-up examples with this project's index."""
    from forgebook.curation.duplicates import DuplicateIndex

    index = DuplicateIndex(0.8)
    wall, cpu = time.time(), time.process_time()
    for example in made_up(count):
        index.add(example)
    found = collections.Counter(one.kind for one in index.find())
    return _figures(count, wall, cpu) | {"found": sum(found.values()), "planted": count // 10}


def measure_datasketch(count: int) -> dict:
    """Find them with datasketch's MinHashLSH, with the same signatures and bands."""
    from datasketch import MinHash, MinHashLSH

    from forgebook.curation import duplicates

    rows = duplicates.rows_per_band(0.8)
    index = MinHashLSH(num_perm=128, params=(128 // rows, rows))
    empty = MinHash(num_perm=128, hashfunc=int)
    wall, cpu, found = time.time(), time.process_time(), 0
    for number, example in enumerate(made_up(count)):
        signature = empty.copy()
        signature.update_batch(duplicates._word_pairs(duplicates.compared_text(example).split()).tolist())
        found += bool(index.query(signature))
        index.insert(number, signature)
    return _figures(count, wall, cpu) | {"with_a_candidate": found, "planted": count // 10}


def measure_embeddings(count: int) -> dict:
    """Find close pairs among made-up embeddings, a tenth of which are an earlier one moved a little."""
    import numpy as np

    from forgebook.curation.embeddings import close_pairs

    rng = np.random.default_rng(0)
    # Around 1,000 subjects, as texts are: vectors without any structure would be no harder to tell apart.
    subjects = rng.standard_normal((1_000, SIZE), np.float32) * np.float32(0.7)
    vectors = np.empty((count, SIZE), np.float32)
    for start in range(0, count, 10_000):  # the peak is then that of the search
        part = rng.standard_normal((10_000, SIZE), np.float32) + subjects[rng.integers(0, 1_000, 10_000)]
        part[9::10] = part[4::10] + rng.standard_normal((1_000, SIZE), np.float32) * np.float32(0.25)
        vectors[start : start + 10_000] = part / np.linalg.norm(part, axis=1, keepdims=True)
    planted = np.arange(9, count, 10)
    of = planted - 5
    wall, cpu = time.time(), time.process_time()
    found = {(left, right) for left, right, _ in close_pairs(vectors, 0.95)}
    pairs = {(left, right) for left, right in zip(of.tolist(), planted.tolist(), strict=True)
             if float(vectors[left] @ vectors[right]) >= 0.95}  # fmt: skip
    return _figures(count, wall, cpu) | {"size": SIZE, "planted": len(pairs), "recall": len(found & pairs) / len(pairs)}


def _figures(count: int, wall: float, cpu: float) -> dict:
    return {
        "examples": count,
        "seconds": round(time.time() - wall, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "peak_gigabytes": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
        "load_average": round(os.getloadavg()[0], 1),
    }


def write_planted(folder: Path) -> dict[str, set[int]]:
    from support_planted import plant

    rows, faults = plant(ROWS, EACH, seed=1)
    (folder / "planted.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return faults


def settings(folder: Path, train: str, name: str, epochs: int, *more: str) -> list[str]:
    return [
        str(REPOSITORY / "training_configs/tiny/quickstart.yaml"), f"train_path={folder / train}",
        f"valid_path={REPOSITORY / 'data/summaries/test.jsonl'}", f"storage_path={folder / 'runs'}",
        f"run_name={name}", "num_devices=0", "deepspeed=none", f"num_epochs={epochs}", "train_batch_size_per_device=16",
        "context_length=1024", "truncation=drop", *more,
    ]  # fmt: skip


def command(*arguments: str) -> None:
    subprocess.run([sys.executable, "main.py", *arguments], cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)


def measure_planted(folder: Path) -> dict:
    """Precision and recall of each reason, on the planted set."""
    from forgebook.config.parse import load_config
    from forgebook.curation.curate import curate
    from forgebook.curation.label_noise import make_loss_judge
    from forgebook.inference.loading import find_model
    from support_planted import score

    faults = write_planted(folder)
    command(*settings(folder, "planted.jsonl", "planted", 2))
    plain, *rest = settings(folder, "planted.jsonl", "x", 2, "curation.max_characters=2000", "curation.drop=[]")
    config = load_config(plain, rest)
    judge = make_loss_judge(find_model(str(folder / "runs/planted")), config)
    curation = curate(config, folder / "all.jsonl", {"label_noise": judge})
    found = {reason: {one.number for one in group} for reason, group in curation.by_reason().items()}
    table = {}
    for fault, planted in faults.items():
        reason = "high_loss" if fault == "wrong" else fault
        # A high loss is right for any answer that does not fit its question.
        wrong = planted | (faults["refusal"] | faults["mixed_languages"] | faults["truncated"] | faults["empty_answer"])
        precision, _ = score(found.get(reason, set()), wrong if fault == "wrong" else planted)
        _, recall = score(found.get(reason, set()), planted)
        table[reason] = {"planted": len(planted), "precision": round(precision, 3), "recall": round(recall, 3)}
    return {"rows": curation.read, "reasons": table}


def save(part: str, figures: dict) -> None:
    """Write the figures of one part beside the others, with the environment."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[part] = figures
    results["environment"] = {
        "machine": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version(),
        **{name: version(name) for name in ("datasketch", "numpy", "torch", "transformers")},
    }  # fmt: skip
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)  # of a process of its own: NAME COUNT
    arguments = parser.parse_args()
    if arguments.measure:
        name, count = arguments.measure
        measure = {"index": measure_index, "datasketch": measure_datasketch, "embeddings": measure_embeddings}[name]
        print(json.dumps(measure(int(count))))
        return
    with tempfile.TemporaryDirectory() as folder:
        for part in arguments.part:
            if part == "planted":
                figures = measure_planted(Path(folder))
            else:
                figures = {
                    f"{name}, {count:,}": json.loads(
                        subprocess.check_output([sys.executable, __file__, "--measure", name, str(count)], text=True)
                    )
                    for name, count in PARTS[part]
                }
            save(part, figures)


if __name__ == "__main__":
    main()
