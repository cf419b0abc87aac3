"""One set of examples, one session on one GPU: this project and its peers, side by side.

    python benchmarks/gpu/run.py TRAIN.jsonl                        every run, on random weights of its shape
    python benchmarks/gpu/run.py TRAIN.jsonl --runs lora trl        some of them
    python benchmarks/gpu/run.py TRAIN.jsonl --shape tiny           seconds on a CPU: that the script itself works

TRAIN.jsonl: conversations, such as GSM8K's; the first 640. 16 examples per optimizer step, one epoch of 40 steps,
bfloat16 on a GPU. LoRA is of rank 8 on all linear layers, without dropout. Runs that are packed have lines of 4,096
tokens, one per step. A pair of DPO is an answer and that of the next conversation. Tokens exclude padding; the first
five steps do not count. MFU: 4 FLOPs per parameter and token for LoRA, 6 for full fine-tuning, of the catalog's peak;
attention, adapters and recomputation are not counted. Seconds to the first step are from the start of the process.

Each run is a process of its own; its line replaces the one of that name and shape in results.json, with the environment
of the measurement. What is not in the file has not been measured.
"""

import argparse
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
sys.path.insert(0, str(REPOSITORY))

from forgebook.planning.hardware import this_gpu  # noqa: E402

RESULTS = HERE / "results.json"
WORK = REPOSITORY / "runs/benchmark-gpu"
EXAMPLES, BATCH = 640, 16
SHAPES = {  # hidden, intermediate, layers, heads, key-value heads, head size
    "8b": (4096, 14336, 32, 32, 8, 128),
    "1b": (2048, 8192, 16, 32, 8, 64),
    "tiny": (64, 128, 2, 4, 2, 16),
}
LORA = ["lora_config.r=8", "lora_config.lora_alpha=16", "lora_config.target_modules=all-linear"]
PACKED = ["padding=packed", "context_length=4096", "train_batch_size_per_device=1"]
# name: shape, settings. With nothing else set, kernels are those that `auto` finds.
OURS = {
    "lora": ("8b", LORA),
    "lora_sdpa": ("8b", [*LORA, "attention=sdpa", "liger_kernel.enabled=false"]),
    "lora_checkpointing": ("8b", [*LORA, "gradient_checkpointing=true"]),
    "lora_packed": ("8b", [*LORA, *PACKED]),
    "lora_packed_compiled": ("8b", [*LORA, *PACKED, "torch_compile=true"]),
    "qlora": ("8b", [*LORA, "quantization=nf4"]),
    "full": ("1b", ["learning_rate=1e-5"]),
    "full_packed": ("1b", ["learning_rate=1e-5", *PACKED]),
    "dpo": ("8b", [*LORA, "task=preference_tuning", "train_batch_size_per_device=8"]),
}
PEERS = {
    "trainer": "8b", "trl": "8b", "trl_checkpointing": "8b", "trl_liger": "8b", "trl_packed": "8b", "trl_qlora": "8b",
    "trl_full": "1b", "trl_full_packed": "1b", "trl_dpo": "8b", "unsloth": "8b", "unsloth_packed": "8b",
    "unsloth_qlora": "8b",
}  # fmt: skip


def make_model(shape: str, tokenizer_of: str) -> Path:
    """Save random weights of a shape, with the tokenizer of another model."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = WORK / f"model-{shape}"
    if (folder / "config.json").exists():
        return folder
    names = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim".split()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if device == "cuda" else torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    settings = dict(zip(names, SHAPES[shape], strict=True))
    vocabulary = 128_256 if shape != "tiny" else len(tokenizer)
    with torch.device(device):
        config = LlamaConfig(**settings, vocab_size=vocabulary, max_position_embeddings=8192, pad_token_id=0)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder, max_shard_size="4GB")
    tokenizer.save_pretrained(folder)
    return folder


def make_data(train: Path) -> None:
    """Write the first conversations, and pairs of their answers and other ones."""
    with train.open(encoding="utf-8") as lines:
        rows = [json.loads(line)["messages"] for line in itertools.islice(lines, EXAMPLES)]
    pairs = [{"chosen": row, "rejected": [*row[:-1], other[-1]]} for row, other in itertools.pairwise([*rows, rows[0]])]
    for name, written in (("train", [{"messages": row} for row in rows]), ("pairs", pairs)):
        (WORK / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in written), encoding="utf-8")


def data_of(name: str) -> Path:
    return WORK / ("pairs.jsonl" if name.endswith("dpo") else "train.jsonl")


def ours(name: str, model: Path) -> dict:
    """Run this project's command; read what its run folder says."""
    run = WORK / "runs" / name
    config = WORK / f"{name}.yaml"
    config.write_text(
        f"model_id: {model}\ntrain_path: {data_of(name)}\nnum_devices: 0\nnum_epochs: 1\nlearning_rate: 1.0e-4\n"
        f"context_length: 2048\ntrain_batch_size_per_device: {BATCH}\ngradient_checkpointing: false\ndeepspeed: none\n"
        f"storage_path: {run.parent}\non_existing: overwrite\nforce: true\n"
    )
    shutil.rmtree(run, ignore_errors=True)
    command, metrics = [sys.executable, "main.py", str(config), *OURS[name][1]], run / "metrics.jsonl"
    started, first = time.perf_counter(), None
    with open(WORK / f"{name}.log", "w") as log:
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=log, stderr=subprocess.STDOUT)
        while process.poll() is None:
            time.sleep(0.1)
            if first is None and metrics.exists() and metrics.stat().st_size:
                first = time.perf_counter() - started
    if process.returncode:
        return {"failed": (WORK / f"{name}.log").read_text().strip().splitlines()[-1]}
    summary = json.loads((run / "summary.json").read_text())
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    all_steps = [row for row in rows if "train_time_per_step" in row]
    steps = all_steps[5:] or all_steps
    seconds = sum(row["train_time_per_step"] for row in steps)
    planned, measured = (summary[kind]["memory_bytes_per_worker"] for kind in ("planned", "measured"))
    return {
        "tokens_per_second": round(sum(row["trained_tokens_this_iter"] for row in steps) / seconds),
        "milliseconds_per_step": round(1000 * seconds / len(steps), 1),
        "seconds_to_first_step": first and round(first, 1), "last_loss": round(steps[-1]["train_loss_batch"], 4),
        "peak_gigabytes": round(measured / 1e9, 2), "planned_gigabytes": round(planned / 1e9, 2),
    }  # fmt: skip


def peer(name: str, model: Path) -> dict:
    """Run another trainer on the same examples; it prints its figures as the last line."""
    command = [sys.executable, str(HERE / "peer.py"), name, str(model), str(data_of(name)), str(time.time())]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"failed": (done.stderr or done.stdout).strip().splitlines()[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def flops_per_token(model: Path, *, is_full: bool) -> int:
    """Count 4 FLOPs per parameter and token, or 6 where all are trained; the input embeddings multiply nothing."""
    from forgebook.models.shapes import find_shape

    return (6 if is_full else 4) * find_shape(str(model)).active_parameters


def environment() -> dict:
    import torch

    packages = {}
    for name in ("torch", "transformers", "peft", "trl", "unsloth", "liger-kernel", "bitsandbytes", "flash-attn"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {"device": device, "date": time.strftime("%Y-%m"), **packages}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path)
    parser.add_argument("--shape", choices=SHAPES, help="of all runs; default: that of each")
    parser.add_argument("--tokenizer", default=str(REPOSITORY / "tiny_model"), help="a model's folder or hub id")
    parser.add_argument("--runs", nargs="+", choices=[*OURS, *PEERS], default=[*OURS, *PEERS])
    parser.add_argument("--no-save", action="store_true", help="print, and leave results.json as it is")
    given = parser.parse_args()
    # Figures alone go to standard output: libraries log to it, too.
    figures = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    WORK.mkdir(parents=True, exist_ok=True)
    make_data(given.train)
    where, gpu = environment(), this_gpu()
    for name in given.runs:
        shape = given.shape or (OURS[name][0] if name in OURS else PEERS[name])
        model = make_model(shape, given.tokenizer)
        result = {"run": name, "shape": shape, **(ours if name in OURS else peer)(name, model)}
        if gpu is not None and gpu.peak is not None and "failed" not in result:
            flops = flops_per_token(model, is_full="full" in name)
            result["mfu"] = round(result["tokens_per_second"] * flops / gpu.peak, 3)
        print(json.dumps(result), file=figures, flush=True)
        if not given.no_save:
            results = json.loads(RESULTS.read_text())
            kept = [row for row in results["runs"] if (row["run"], row["shape"]) != (name, shape)]
            results["runs"] = [*kept, result | {"environment": where}]
            RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
