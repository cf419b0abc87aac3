"""One training step, side by side: transformers.Trainer against this project's loop, on the same rows.

python benchmarks/step/run.py ../shared/data/gsm8k/train_1.jsonl [--steps 30] [--threads 2]

Work: a Llama of 36 M parameters (hidden 256, 4 layers, vocabulary 128,256, tied, random weights), bfloat16,
full parameter, batch 8, AdamW, no gradient checkpointing; GSM8K rows in Llama 3's chat layout. The vocabulary
needs a gated download, so a token's id is a hash of the piece that Llama 3's pre-tokenizer would make: lengths
and supervised share are those of the real rows, and the loss is that of a model learning them.

Each system runs in a process of its own, one after the other. Tokens counted are real (no padding), the first
steps are left out, times are medians. Results and environment go to benchmarks/step/results.json.
"""

import argparse
import hashlib
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent.parent
BATCH, WARM_UP, VOCABULARY = 8, 3, 128_256
PIECES = re.compile(r"[^\r\n\w]?[^\W\d_]+|\d{1,3}| ?[^\s\w]+[\r\n]*|\s*[\r\n]+|\s+")
SYSTEMS = {
    "trainer": "transformers.Trainer, its own random batches",
    "trainer-same-batches": "transformers.Trainer, this project's batches",
    "forgebook": "this project",
    "forgebook-float32": "this project in float32 (for the loss)",
}


def encode(row: dict) -> tuple[list[int], list[bool]]:
    """Encode one chat row: ids, and True where the assistant's words and end token stand."""
    ids, trained = [128_000], [False]
    for message in row["messages"]:
        words = [
            int(hashlib.md5(piece.encode()).hexdigest(), 16) % 128_000 for piece in PIECES.findall(message["content"])
        ]
        header = [128_006, 882, 128_007, 271]
        answers = message["role"] == "assistant"
        ids += [*header, *words, 128_009]
        trained += [False] * len(header) + [answers] * (len(words) + 1)
    return ids, trained


def prepare(rows_path: str, folder: Path) -> None:
    """Write the model, the tokenised rows and a config."""
    sys.path.insert(0, str(REPOSITORY))
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from forgebook.catalog import TINY_MODEL
    from forgebook.data import token_store as tokens
    from forgebook.data.masking import Encoded
    from forgebook.models.tokenizer import load_tokenizer

    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=2048,
    )  # fmt: skip
    LlamaForCausalLM(shape).to(torch.bfloat16).save_pretrained(folder / "model")
    load_tokenizer(str(TINY_MODEL)).save_pretrained(folder / "model")
    rows = [encode(json.loads(line)) for line in Path(rows_path).read_text().splitlines()]
    tokens.write_shard(
        [(Encoded(*row), line, None) for line, row in enumerate(rows, 1)], folder / "train.arrow", "rows"
    )


def run_forgebook(folder: Path, steps: int, dtype: str) -> dict:
    sys.path.insert(0, str(REPOSITORY))
    from forgebook.config.parse import load_config
    from forgebook.data.token_store import map_shards, save_view
    from forgebook.runs.metrics import read_metrics
    from forgebook.runs.run import Run
    from forgebook.training.loop import train_loop

    settings = {
        "model_id": str(folder / "model"), "train_path": "-", "task": "instruction_tuning", "num_devices": 0,
        "num_epochs": 1, "max_steps": steps, "train_batch_size_per_device": BATCH, "eval_batch_size_per_device": BATCH,
        "learning_rate": 1e-4, "num_warmup_steps": 0, "gradient_checkpointing": False, "deepspeed": None,
        "dtype": dtype, "storage_path": str(folder),
    }  # fmt: skip
    (folder / "config.yaml").write_text(json.dumps(settings))
    run = Run(folder / f"run-{dtype}")
    for path in (run.tokens, run.checkpoints, run.resume):
        path.mkdir(parents=True)
    save_view(map_shards([folder / "train.arrow"]), run.tokens / "train.npz")
    train_loop(load_config(folder / "config.yaml").resolved(context_length=4096, run_name="run"), run)
    rows = [row for row in read_metrics(run.metrics) if "train_loss_batch" in row]
    return {
        "seconds": [row["train_time_per_step"] for row in rows],
        "tokens": [row["trained_tokens_this_iter"] for row in rows],
        "losses": [row["train_loss_batch"] for row in rows],
        # The first step's end, on the clock of the process: what came before the loop is in it.
        "first_step_ends": time.time() - sum(row["train_time_per_step"] for row in rows[1:]),
    }


def run_trainer(folder: Path, steps: int, same_batches: bool) -> dict:
    sys.path.insert(0, str(REPOSITORY))
    import numpy as np
    import torch
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from forgebook.data import batching
    from forgebook.data.token_store import map_shards

    tokens = map_shards([folder / "train.arrow"])
    sequences = list(np.arange(len(tokens))[:, None])
    epoch = batching.epoch_batches(tokens, sequences, BATCH, 42, 0)
    order = np.concatenate([row for step in epoch for row in step])
    measured = {"seconds": [], "tokens": [], "losses": []}

    def stack(rows):
        measured["tokens"].append(int(tokens.lengths[rows].sum()))
        batch = [[torch.tensor(np.array(part)) for part in tokens.example(k)] for k in rows]
        pad = torch.nn.utils.rnn.pad_sequence
        ids = pad([ids.long() for ids, _ in batch], batch_first=True)
        mask = pad([torch.ones_like(ids) for ids, _ in batch], batch_first=True)
        labels = [torch.where(trained, ids.long(), -100) for ids, trained in batch]
        return {"input_ids": ids, "attention_mask": mask, "labels": pad(labels, batch_first=True, padding_value=-100)}

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.begun = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            measured["seconds"].append(time.perf_counter() - self.begun)
            measured.setdefault("first_step_ends", time.time())

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                measured["losses"].append(logs["loss"])

    class SameBatches(Trainer):
        def get_train_dataloader(self):
            return DataLoader(order.tolist(), batch_size=BATCH, collate_fn=stack)

    (SameBatches if same_batches else Trainer)(
        model=AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16),
        args=TrainingArguments(
            output_dir=str(folder / "trainer"), max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=1e-4,
            lr_scheduler_type="cosine", bf16=True, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True,
            disable_tqdm=True, dataloader_num_workers=0, remove_unused_columns=False,
        ),
        train_dataset=list(range(len(tokens))),
        data_collator=stack,
        callbacks=[Clock()],
    ).train()  # fmt: skip
    return measured


def measure(system: str, folder: Path, steps: int) -> dict:
    """Run one system in this process; return its medians."""
    began = time.time()
    if system.startswith("trainer"):
        found = run_trainer(folder, steps, system == "trainer-same-batches")
    else:
        found = run_forgebook(folder, steps, "float32" if system.endswith("float32") else "bfloat16")
    pairs = list(zip(found["tokens"], found["seconds"], strict=False))[WARM_UP:]
    return {
        "system": SYSTEMS[system],
        "real_tokens_per_second": round(statistics.median(tokens / seconds for tokens, seconds in pairs)),
        "milliseconds_per_step": round(1000 * statistics.median(seconds for _, seconds in pairs)),
        "peak_gigabytes": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
        "seconds_to_first_step": round(found["first_step_ends"] - began, 1),
        "first_losses": [round(loss, 5) for loss in found["losses"][:3]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--system", choices=list(SYSTEMS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.system:
        print("RESULT " + json.dumps(measure(given.system, given.folder, given.steps)))
        return
    with tempfile.TemporaryDirectory() as folder:
        prepare(given.rows, Path(folder))
        results = []
        for system in SYSTEMS:
            command = [sys.executable, __file__, given.rows, "--system", system, "--folder", folder]
            steps = 4 if system.endswith("float32") else given.steps
            done = subprocess.run(
                [*command, "--steps", str(steps)], capture_output=True, text=True,
                env={**os.environ, "OMP_NUM_THREADS": str(given.threads)},
            )  # fmt: skip
            lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            if done.returncode or not lines:
                sys.exit(f"{system} failed:\n{done.stderr[-3000:]}")
            results.append(json.loads(lines[0].removeprefix("RESULT ")))
            print(json.dumps(results[-1]), flush=True)
    cpu = next(
        (
            line.split(": ")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        "",
    )
    environment = {
        "cpu": cpu, "machine": platform.machine(), "threads": given.threads,
        **{name: version(name) for name in ("torch", "transformers", "accelerate")},
    }  # fmt: skip
    ratio = results[2]["real_tokens_per_second"] / results[0]["real_tokens_per_second"]
    same = results[2]["real_tokens_per_second"] / results[1]["real_tokens_per_second"]
    output = {"environment": environment, "results": results, "speed_ratio": round(ratio, 2)}
    output |= {"speed_ratio_same_batches": round(same, 2)}
    output |= {"memory_ratio": round(results[2]["peak_gigabytes"] / results[0]["peak_gigabytes"], 2)}
    Path(__file__).with_name("results.json").write_text(json.dumps(output, indent=2) + "\n")
    print(json.dumps(output, indent=2))


if __name__ == "__main__":
    main()
