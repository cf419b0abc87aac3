"""One model shape, one set of examples, one session on one GPU: this project and its peers, side by side.

    python benchmarks/gpu/run.py TRAIN.jsonl                        every run, on random weights of Llama 3.1 8B's shape
    python benchmarks/gpu/run.py TRAIN.jsonl --runs lora trl        some of them
    python benchmarks/gpu/run.py TRAIN.jsonl --shape tiny           seconds on a CPU: that the script itself works

TRAIN.jsonl: conversations, such as GSM8K's. LoRA of rank 8 on all linear layers, 16 examples per optimizer step, one
epoch of 40 steps, bfloat16 on a GPU. Tokens exclude padding; the first five steps do not count. Each run is a process
of its own; its line replaces the one of that name and shape in results.json, with the environment of the measurement.
"""

import argparse
import itertools
import json
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
RESULTS = HERE / "results.json"
WORK = REPOSITORY / "runs/benchmark-gpu"
EXAMPLES, BATCH = 640, 16
SHAPES = {  # hidden, intermediate, layers, heads, key-value heads, head size
    "8b": (4096, 14336, 32, 32, 8, 128),
    "1b": (2048, 8192, 16, 32, 8, 64),
    "tiny": (64, 128, 2, 4, 2, 16),
}
LORA = ["lora_config.r=8", "lora_config.lora_alpha=16", "lora_config.target_modules=all-linear"]
OURS = {
    "lora": LORA,
    "lora_checkpointing": [*LORA, "gradient_checkpointing=true"],
    "lora_liger": [*LORA, "liger_kernel.enabled=true"],
    "lora_packed_4096": [*LORA, "padding=packed", "context_length=4096", "train_batch_size_per_device=1"],
    "qlora": [*LORA, "quantization=nf4"],
    "full_zero_2": ["deepspeed=zero_2", "num_devices=1", "learning_rate=1e-5"],
}
PEERS = ("trainer", "trl", "trl_checkpointing", "unsloth")


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


def ours(name: str, model: Path, data: Path) -> dict:
    """Run this project's command; read what its run folder says."""
    run = WORK / "runs" / name
    config = WORK / f"{name}.yaml"
    config.write_text(
        f"model_id: {model}\ntrain_path: {data}\nnum_devices: 0\nnum_epochs: 1\nlearning_rate: 1.0e-4\n"
        f"context_length: 2048\ntrain_batch_size_per_device: {BATCH}\ngradient_checkpointing: false\ndeepspeed: none\n"
        f"storage_path: {run.parent}\non_existing: overwrite\n"
    )
    command = [sys.executable, "main.py", str(config), *OURS[name]]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    if done.returncode:
        return {"failed": (done.stderr or done.stdout).strip().splitlines()[-1]}
    summary = json.loads((run / "summary.json").read_text())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "train_time_per_step" in row][5:]
    seconds = sum(row["train_time_per_step"] for row in steps)
    planned, measured = (summary[kind]["memory_bytes_per_worker"] for kind in ("planned", "measured"))
    return {
        "tokens_per_second": round(sum(row["trained_tokens_this_iter"] for row in steps) / seconds),
        "milliseconds_per_step": round(1000 * seconds / len(steps), 1),
        "mfu": summary["measured"]["mfu"], "last_loss": round(steps[-1]["train_loss_batch"], 4),
        "peak_gigabytes": round(measured / 1e9, 2), "planned_gigabytes": round(planned / 1e9, 2),
    }  # fmt: skip


def peer(name: str, model: Path, data: Path) -> dict:
    """Run another trainer on the same examples; it prints its figures as the last line."""
    command = [sys.executable, str(HERE / "peer.py"), name, str(model), str(data)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"failed": (done.stderr or done.stdout).strip().splitlines()[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


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
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--tokenizer", default=str(REPOSITORY / "tiny_model"), help="a model's folder or hub id")
    parser.add_argument("--runs", nargs="+", choices=[*OURS, *PEERS], default=[*OURS, *PEERS])
    parser.add_argument("--no-save", action="store_true", help="print, and leave results.json as it is")
    given = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    data = WORK / "train.jsonl"
    with given.train.open(encoding="utf-8") as lines:
        data.write_text("".join(itertools.islice(lines, EXAMPLES)), encoding="utf-8")
    model, where = make_model(given.shape, given.tokenizer), environment()
    for name in given.runs:
        result = {"run": name, "shape": given.shape, **(ours if name in OURS else peer)(name, model, data)}
        print(json.dumps(result), flush=True)
        if not given.no_save:
            results = json.loads(RESULTS.read_text())
            kept = [row for row in results["runs"] if (row["run"], row["shape"]) != (name, given.shape)]
            results["runs"] = [*kept, result | {"environment": where}]
            RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
