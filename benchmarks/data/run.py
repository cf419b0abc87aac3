"""Preparing data: this project's rows -> tokens at several sizes, and beside TRL's preparation of the same rows.

python benchmarks/data/run.py [--sizes 10000 100000 1000000] [--trl-python /tmp/trl-venv/bin/python]
python benchmarks/data/run.py --rows 10000 --to rows.jsonl          (the generated rows alone)

Rows are made up, with a seed: chats of 2 to 5 messages, in all a log-normal number of words (median 90, about
GSM8K's) from some 24,000 words as frequent as words are (Zipf), 15 % of them made up. Per size, in a new process
and with an empty cache: forgebook.data.tokenize.tokenize with the tiny model's tokenizer, which is reading, checking,
rendering, tokenising, marking and writing shards; then the same call again, which finds them. Large sets go through
Ray Data; its start is measured apart.

TRL's python is one of another environment:

    python3 -m venv /tmp/trl-venv && /tmp/trl-venv/bin/pip install torch==2.13.0
    /tmp/trl-venv/bin/pip install trl==1.16.0 transformers==5.23.0 datasets==5.2.0 torch==2.13.0 accelerate peft

Side by side both train the last answer alone (the tiny model's template has no {% generation %}, which TRL needs for
all answers): TRL gets the rows as prompt and completion, without truncation and packing, so that it makes as few
passes as it can. Its seconds are load_dataset("json"), with an empty cache, and SFTTrainer._prepare_dataset. Imports,
models and a first rendering are left out for both. The systems take turns; figures are medians. Results and
environment go to benchmarks/data/results.json.
"""

import argparse
import hashlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent.parent
RESULTS = Path(__file__).with_name("results.json")
TINY_MODEL = REPOSITORY / "tiny_model"
# name -> (is it TRL's, its processes, environment)
SYSTEMS = {
    "forgebook": (False, None, {}),
    "forgebook, one thread": (False, None, {"RAYON_NUM_THREADS": "1"}),
    "trl, dataset_num_proc=None": (True, None, {}),
    "trl, dataset_num_proc=2": (True, 2, {}),
}
WITHOUT_AXOLOTL = "not measured: 0.19.0 requires CUDA packages (xformers, triton, bitsandbytes, flash-linear-attention)"


# Rows -------------------------------------------------------------------------------------------------


def make_sentences(rng) -> list[str]:
    """Make sentences of tiny_world's words and of pronounceable ones, frequent and rare."""
    import numpy as np

    def strings(value):
        if isinstance(value, str):
            yield value
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            yield from strings(item)

    world = json.loads((REPOSITORY / "data" / "tiny_world.json").read_text(encoding="utf-8"))
    known = sorted({word for text in strings(world) for word in text.split() if word.isalpha()})
    syllables = [start + vowel for start in (*"bdfghklmnprstvw", "ch", "st", "tr", "") for vowel in "aeiou"]
    ends = ["", "", "n", "r", "s", "t", "ing", "ed", "ly"]
    made = {
        "".join(syllables[k] for k in rng.integers(len(syllables), size=rng.integers(1, 5))) + ends[rng.integers(9)]
        for _ in range(24_000)
    }
    words = [*rng.permutation(known).tolist(), *sorted(made - set(known), key=lambda word: (len(word), word))]
    frequencies = 1 / (np.arange(len(words)) + 10)
    frequencies[len(known) :] *= 0.15 / 0.85 * frequencies[: len(known)].sum() / frequencies[len(known) :].sum()
    drawn = iter(rng.choice(len(words), size=1_400_000, p=frequencies / frequencies.sum()).tolist())
    lengths = rng.integers(5, 22, size=60_000).tolist()
    marks = rng.choice([".", ".", ".", ".", "?", "!", ":", ",\n", ".\n\n"], size=60_000).tolist()
    sentences = []
    for length, mark in zip(lengths, marks, strict=True):
        sentence = [words[next(drawn)] for _ in range(length)]
        if length % 7 == 0:
            sentence[length // 2] = f"{len(sentences) * 37 % 9973},"
        text = " ".join(sentence)
        sentences.append(text[0].upper() + text[1:] + mark)
    return sentences


def write_rows(rows: int, path: Path, seed: int, pairs: Path | None = None) -> dict:
    """Write chat rows as JSON lines; the same as prompt and completion to `pairs`."""
    import numpy as np

    began = time.perf_counter()
    rng = np.random.default_rng(seed)
    sentences = make_sentences(rng)
    words_each = statistics.mean(sentence.count(" ") + 1 for sentence in sentences)
    systems = [" ".join(sentences[k : k + 1 + k % 3]) for k in range(300)]
    with open(path, "w", encoding="utf-8") as file, open(pairs or os.devnull, "w", encoding="utf-8") as paired:
        for first in range(0, rows, 10_000):
            count = min(10_000, rows - first)
            words = np.clip(rng.lognormal(np.log(90), 0.5, count), 20, 800)
            turns = 1 + (rng.random(count) < 0.4)
            shares = rng.uniform(0.15, 0.4, count)  # of the user
            asked = np.maximum(1, np.rint(words * shares / turns / words_each)).astype(int).tolist()
            said = np.maximum(1, np.rint(words * (1 - shares) / turns / words_each)).astype(int).tolist()
            system = np.where(rng.random(count) < 0.7, rng.integers(300, size=count), -1).tolist()
            chosen = iter(rng.integers(len(sentences), size=2 * (sum(asked) + sum(said))).tolist())
            lines, pair_lines = [], []
            for k in range(count):
                messages = [] if system[k] < 0 else [{"role": "system", "content": systems[system[k]]}]
                for _ in range(turns[k]):
                    for role, length in (("user", asked[k]), ("assistant", said[k])):
                        text = " ".join([sentences[next(chosen)] for _ in range(length)])
                        messages.append({"role": role, "content": text.strip()})
                lines.append(json.dumps({"messages": messages}, ensure_ascii=False))
                if pairs:
                    pair = {"prompt": messages[:-1], "completion": messages[-1:]}
                    pair_lines.append(json.dumps(pair, ensure_ascii=False) + "\n")
            file.write("\n".join(lines) + "\n")
            paired.write("".join(pair_lines))
    return {"rows": rows, "megabytes": round(path.stat().st_size / 1e6, 1), "seconds": seconds_since(began)}


# What is measured, each in a process of its own -------------------------------------------------------


def seconds_since(began: float) -> float:
    return round(time.perf_counter() - began, 2)


def peak_gigabytes(who: int = resource.RUSAGE_SELF) -> float:
    return round(resource.getrusage(who).ru_maxrss / 1e6, 3)


def cpu_seconds() -> float:
    """Count the processor's time of this process and of its ended children (Ray's workers are not among them)."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def run_forgebook(path: str, folder: str, train_on: str, ray_above: int | None) -> dict:
    import numpy as np
    import pyarrow.ipc  # noqa: F401

    from forgebook import ray_cluster
    from forgebook.catalog import TINY_MODEL
    from forgebook.data import readers as rows
    from forgebook.data import tokenize
    from forgebook.data.data_sources import find_sources
    from forgebook.models.tokenizer import load_tokenizer

    if ray_above is not None:
        tokenize.CHUNKS_HERE = ray_above
    tokenizer = load_tokenizer(str(TINY_MODEL))
    tokenizer.apply_chat_template(tokenize.PROBE, tokenize=False)
    options = tokenize.EncodingOptions(train_on=train_on)
    sources = find_sources(path)
    pieces = sum(len(rows.split_source(source)) for source in sources)
    found = {"pieces": pieces, "way": "in process"}
    if pieces > tokenize.CHUNKS_HERE:
        began = time.perf_counter()
        import ray.data

        found |= {"ray_import_seconds": seconds_since(began)}
        began = time.perf_counter()
        ray_cluster.start_ray()
        found |= {"ray_start_seconds": seconds_since(began), "ray_cpus": ray.cluster_resources().get("CPU")}
        found["way"] = "Ray Data"
    found["peak_gigabytes_before"] = peak_gigabytes()
    began, used = time.perf_counter(), cpu_seconds()
    tokens, notes = tokenize.tokenize(sources, tokenizer, options, Path(folder))
    found["seconds"] = seconds_since(began)
    found["cpu_seconds"] = round(cpu_seconds() - used, 2)
    assert not notes.problems, notes.problems[:3]
    found["peak_gigabytes"] = peak_gigabytes()  # of this process; Ray's workers have their own
    began = time.perf_counter()
    tokenize.tokenize(sources, tokenizer, options, Path(folder))
    found["cache_hit_seconds"] = seconds_since(began)
    trained = sum(int(marks.sum()) for _, marks in tokens.parts)
    digest = hashlib.sha256()
    for ids, marks in tokens.parts:
        digest.update(np.where(marks, ids, -100).astype(np.int32).tobytes())
    return found | {
        "rows": len(tokens), "tokens": int(tokens.lengths.sum()), "trained_tokens": trained,
        "labels_sha256": digest.hexdigest()[:16],
        "peak_gigabytes_with_mapped_pages": peak_gigabytes(),
        "rows_per_second": round(len(tokens) / found["seconds"]),
        "cache_megabytes": round(sum(one.stat().st_size for one in Path(folder).rglob("*.arrow")) / 1e6, 1),
    }  # fmt: skip


def run_trl(pairs: str, folder: str, processes: int | None) -> dict:
    import datasets
    import numpy as np
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    datasets.disable_caching()
    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    model = AutoModelForCausalLM.from_pretrained(TINY_MODEL)
    found = {}

    class Timed(SFTTrainer):
        def _prepare_dataset(self, *args, **kwargs):
            began = time.perf_counter()
            prepared = super()._prepare_dataset(*args, **kwargs)
            found["prepare_seconds"] = seconds_since(began)
            found["cpu_seconds"] = round(cpu_seconds() - used, 2)
            return prepared

    found["peak_gigabytes_before"] = peak_gigabytes()
    began, used = time.perf_counter(), cpu_seconds()
    raw = datasets.load_dataset("json", data_files=pairs, split="train", cache_dir=folder)
    found["load_seconds"] = seconds_since(began)
    args = SFTConfig(
        output_dir=folder, max_length=None, packing=False, dataset_num_proc=processes, completion_only_loss=True,
        shuffle_dataset=False, report_to="none", use_cpu=True, bf16=False, disable_tqdm=True,
    )  # fmt: skip
    prepared = Timed(model=model, args=args, train_dataset=raw, processing_class=tokenizer).train_dataset
    found["seconds"] = round(found["load_seconds"] + found["prepare_seconds"], 2)
    found["peak_gigabytes"] = peak_gigabytes()
    found["peak_gigabytes_of_largest_child"] = peak_gigabytes(resource.RUSAGE_CHILDREN) if processes else None
    digest, trained = hashlib.sha256(), 0
    count = 0
    for batch in prepared.select_columns(["labels", "input_ids"]).iter(batch_size=1_000):
        for labels, ids in zip(batch["labels"], batch["input_ids"], strict=True):
            trained += sum(label != -100 for label in labels)
            count += len(ids)
            digest.update(np.array(labels, np.int32).tobytes())
    return found | {
        "rows": len(prepared), "tokens": count, "trained_tokens": trained, "labels_sha256": digest.hexdigest()[:16],
        "rows_per_second": round(len(prepared) / found["seconds"]),
        "versions": {name: version(name) for name in ("trl", "transformers", "datasets", "tokenizers", "torch")},
    }  # fmt: skip


def run_rows(rows: int, path: str, seed: int, pairs: str | None) -> dict:
    return write_rows(rows, Path(path), seed, Path(pairs) if pairs else None)


JOBS = {"rows": run_rows, "forgebook": run_forgebook, "trl": run_trl}


def in_process_of_its_own(job: str, python: str, environment: dict, **given) -> dict:
    """Run a job; return what it found, and the machine's load: others on it spoil the seconds.

    This process stays small: a child's peak begins with its parent's.
    """
    command = [python, __file__, "--job", job, "--given", json.dumps(given)]
    with tempfile.TemporaryDirectory() as home:
        variables = {"HF_HOME": home, "HF_HUB_OFFLINE": "1"} | environment
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables}, cwd=REPOSITORY)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        sys.exit(f"{job} {given} failed:\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
    return json.loads(lines[-1].removeprefix("RESULT ")) | {"load_average": round(os.getloadavg()[0], 1)}


def prepare_here(path: Path, train_on: str, ray_above: int | None, environment: dict) -> dict:
    """Measure this project with an empty cache."""
    variables = {"PYTHONPATH": str(REPOSITORY)} | environment
    with tempfile.TemporaryDirectory() as folder:
        return in_process_of_its_own(
            "forgebook", sys.executable, variables, path=str(path), folder=folder, train_on=train_on,
            ray_above=ray_above,
        )  # fmt: skip


# Parts of the report ----------------------------------------------------------------------------------


def by_size(sizes: list[int], seed: int, ray_above: int | None):
    """Yield what each size takes; rows/s also as a share of the first size's."""
    first = None
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows.jsonl"
            made = in_process_of_its_own("rows", sys.executable, {}, rows=size, path=str(path), seed=seed, pairs=None)
            measured = prepare_here(path, "all", ray_above, {})
        first = first or measured["rows_per_second"]
        share = round(measured["rows_per_second"] / first, 3)
        yield {
            **measured, "megabytes": made["megabytes"], "seconds_to_generate": made["seconds"],
            "rows_per_second_against_first_size": share,
        }  # fmt: skip


def side_by_side(rows: int, repeats: int, seed: int, trl_python: str) -> dict:
    """Measure all systems in turn on the same rows; medians and ratios."""
    runs: dict[str, list[dict]] = {name: [] for name in SYSTEMS}
    with tempfile.TemporaryDirectory() as folder:
        path, pairs = Path(folder) / "rows.jsonl", Path(folder) / "pairs.jsonl"
        in_process_of_its_own("rows", sys.executable, {}, rows=rows, path=str(path), seed=seed, pairs=str(pairs))
        for _ in range(repeats):
            for name, (is_trl, processes, environment) in SYSTEMS.items():
                if is_trl:
                    with tempfile.TemporaryDirectory() as cache:
                        found = in_process_of_its_own(
                            "trl", trl_python, environment, pairs=str(pairs), folder=cache, processes=processes
                        )
                else:
                    found = prepare_here(path, "last", None, environment)
                runs[name].append(found)
                print(json.dumps({"system": name} | found), flush=True)
    medians = {}
    for name, measured in runs.items():
        numbers = (
            "seconds", "cpu_seconds", "load_seconds", "prepare_seconds", "rows_per_second", "peak_gigabytes_before",
            "peak_gigabytes", "peak_gigabytes_of_largest_child",
        )  # fmt: skip
        medians[name] = {
            key: statistics.median(one[key] for one in measured) for key in numbers if measured[0].get(key) is not None
        }
        medians[name]["all_seconds"] = [one["seconds"] for one in measured]
    ours = medians["forgebook"]["seconds"]
    answers = {(one["tokens"], one["trained_tokens"], one["labels_sha256"]) for all_ in runs.values() for one in all_}
    trl = [name for name, (is_trl, _, _) in SYSTEMS.items() if is_trl]
    return {
        "rows": rows, "repeats": repeats, "medians": medians,
        "same_tokens_and_labels": len(answers) == 1,
        "tokens": runs["forgebook"][0]["tokens"],
        "trl_seconds_to_forgebook_seconds": {name: round(medians[name]["seconds"] / ours, 2) for name in trl},
        "trl_prepare_seconds_alone_to_forgebook_seconds": {
            name: round(medians[name]["prepare_seconds"] / ours, 2) for name in trl
        },
        "trl_versions": runs[trl[0]][0]["versions"],
        "axolotl": WITHOUT_AXOLOTL,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="*", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--trl-python", help="python of an environment with TRL; without it TRL is skipped")
    parser.add_argument("--trl-rows", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=3, help="of the side by side")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ray-above", type=int, help="pieces above which Ray is used, if not tokenize's own")
    parser.add_argument("--rows", type=int, help="only write this many rows, to --to")
    parser.add_argument("--to", type=Path, default=Path("rows.jsonl"))
    parser.add_argument("--job", choices=list(JOBS), help=argparse.SUPPRESS)
    parser.add_argument("--given", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.job:
        print("RESULT " + json.dumps(JOBS[given.job](**given.given)))
        return
    if given.rows:
        print(json.dumps(write_rows(given.rows, given.to, given.seed)))
        return
    cpu = next(line.split(": ")[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line)
    names = ("transformers", "tokenizers", "pyarrow", "numpy", "ray")
    output = {
        "environment": {
            "cpu": cpu, "machine": platform.machine(), "cores": len(os.sched_getaffinity(0)),
            "memory_gigabytes": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
            "python": platform.python_version(), **{name: version(name) for name in names},
        },
        "seed": given.seed, "sizes": [],
    }  # fmt: skip

    def write() -> None:
        RESULTS.write_text(json.dumps(output, indent=2) + "\n")

    for measured in by_size(given.sizes, given.seed, given.ray_above):
        output["sizes"].append(measured)
        print(json.dumps(measured), flush=True)
        write()
    if given.trl_python:
        output["side_by_side"] = side_by_side(given.trl_rows, given.repeats, given.seed, given.trl_python)
        write()
    else:
        print("TRL is skipped: give --trl-python (see --help)")
    print(json.dumps(output, indent=2))


if __name__ == "__main__":
    main()
