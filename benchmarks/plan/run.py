"""Memory as planned against memory as measured: training steps of models with random weights, on CPUs.

    python benchmarks/plan/run.py [results.json] [case ...]     half an hour on two cores; about 6 GB of memory
    python benchmarks/plan/run.py results.json --replan         set the plan anew beside what was measured; seconds

Each case runs in processes of its own. Measured is the peak of a worker's anonymous resident memory during two
optimizer steps, above what it held before the model was made (imports, and a small model trained to fill the
kernels' caches). The plan is `memory_of(..., on_gpu=False).tensors`: without the process's libraries. Cases that are
named replace those of the file. tests/planning/test_plan.py plans all of them anew and holds the plan to 25 %.
"""

import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

REPOSITORY = Path(__file__).resolve().parents[2]
SHAPES = {
    # hidden, intermediate, layers, heads, kv heads, vocabulary, tied
    "40M": (512, 1536, 8, 8, 4, 16384, True),
    "110M": (768, 2048, 12, 12, 4, 32768, True),
    "170M": (768, 2048, 12, 12, 12, 65536, False),
    "350M": (1024, 3072, 16, 16, 8, 65536, False),
    "500M": (1280, 3584, 20, 20, 5, 65536, False),
}
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
BASE = {"dtype": "float32", "deepspeed": None, "gradient_checkpointing": False, "attention": "sdpa"}
# Buckets that the model does not fit into, as those of a model of billions of parameters do not.
SMALL_BUCKETS = {stage: {"config_path": f"benchmarks/plan/small_buckets_zero_{stage}.json"} for stage in (1, 2)}
# glibc keeps freed memory by rules of its own; with fixed thresholds what is measured is what tensors hold.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
KEPT = {"reshard_after_forward": False}
# name: shape, rows, length, workers, settings
CASES = {
    "full": ("110M", 2, 256, 1, {}),
    "full, checkpointing": ("110M", 2, 256, 1, {"gradient_checkpointing": True}),
    "full, bfloat16": ("110M", 2, 256, 1, {"dtype": "bfloat16"}),
    "full, one short row": ("170M", 1, 128, 1, {}),
    "full, long rows": ("40M", 1, 1024, 1, {}),
    "full, long rows, eager": ("40M", 1, 1024, 1, {"attention": "eager"}),
    "full, eager, checkpointing": ("40M", 1, 1024, 1, {"attention": "eager", "gradient_checkpointing": True}),
    "full, accumulation": ("110M", 2, 256, 1, {"gradient_accumulation_steps": 2}),
    "LoRA": ("170M", 2, 256, 1, {"lora_config": LORA}),
    "LoRA, dropout": ("110M", 2, 256, 1, {"lora_config": {**LORA, "lora_dropout": 0.05}}),
    "LoRA, checkpointing": ("500M", 2, 256, 1, {"lora_config": LORA, "gradient_checkpointing": True}),
    "LoRA, bfloat16": ("170M", 2, 256, 1, {"lora_config": LORA, "dtype": "bfloat16"}),
    "full, 350M": ("350M", 1, 128, 1, {"gradient_checkpointing": True}),
    "full, DDP, 2 workers": ("110M", 2, 256, 2, {}),
    "LoRA, DDP, 2 workers": ("110M", 2, 256, 2, {"lora_config": LORA}),
    "full, ZeRO-1, 2 workers": ("110M", 1, 256, 2, {"deepspeed": "zero_1"}),
    "full, ZeRO-2, 2 workers": ("110M", 1, 256, 2, {"deepspeed": "zero_2"}),
    "full, ZeRO-2, bfloat16, 2 workers": ("110M", 1, 256, 2, {"deepspeed": "zero_2", "dtype": "bfloat16"}),
    "LoRA, ZeRO-2, 2 workers": ("170M", 2, 256, 2, {"deepspeed": "zero_2", "lora_config": LORA}),
    "full, ZeRO-1, small buckets": ("40M", 1, 256, 2, {"deepspeed": SMALL_BUCKETS[1]}),
    "full, ZeRO-2, small buckets": ("40M", 1, 256, 2, {"deepspeed": SMALL_BUCKETS[2]}),
    "full, ZeRO-3, 2 workers": ("40M", 1, 256, 2, {"deepspeed": "zero_3"}),
    "full, FSDP2, 2 workers": ("110M", 1, 256, 2, {"sharding": "fsdp"}),
    "full, FSDP2, accumulation": ("40M", 1, 256, 2, {"sharding": "fsdp", "gradient_accumulation_steps": 2}),
    "full, FSDP2, bfloat16": ("110M", 1, 256, 2, {"sharding": "fsdp", "dtype": "bfloat16"}),
    "full, FSDP2, checkpointing": ("40M", 4, 512, 2, {"sharding": "fsdp", "gradient_checkpointing": True}),
    "full, FSDP2, weights kept": ("110M", 1, 256, 2, {"sharding": "fsdp", "fsdp": KEPT}),
    "full, FSDP2, offload": ("110M", 1, 256, 2, {"sharding": "fsdp", "fsdp": {"cpu_offload": True}}),
    "LoRA, FSDP2, weights kept": ("170M", 2, 256, 2, {"sharding": "fsdp", "lora_config": LORA, "fsdp": KEPT}),
    "LoRA, FSDP2, 2 workers": ("170M", 2, 256, 2, {"sharding": "fsdp", "lora_config": LORA}),
    "LoRA, tiled MLP": ("40M", 4, 1024, 1, {"lora_config": LORA, "tiled_mlp": True}),
    "full, tiled MLP, checkpointing": ("40M", 4, 1024, 1, {"tiled_mlp": True, "gradient_checkpointing": True}),
    "full, FSDP2, tiled MLP": ("40M", 2, 1024, 2, {"sharding": "fsdp", "tiled_mlp": True}),
    "LoRA, FSDP2, checkpointing": (
        "110M",
        2,
        512,
        2,
        {"sharding": "fsdp", "lora_config": LORA, "gradient_checkpointing": True},
    ),
}


def anonymous_bytes() -> int:
    """Read how much memory of its own this process holds; files that are mapped do not count."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


class Peak:
    """The highest memory seen while a block runs, looked at every few milliseconds."""

    def __enter__(self):
        self.bytes, self._ended = anonymous_bytes(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self):
        while not self._ended.wait(0.002):
            self.bytes = max(self.bytes, anonymous_bytes())

    def __exit__(self, *_):
        self._ended.set()
        self._thread.join()


def write_model(name: str, folder: Path) -> None:
    """Write a Llama of random weights, with the tiny model's tokenizer.

    In float16, which no case trains in: what is read is converted, and does not stay a file that is mapped.
    """
    import shutil

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, intermediate, layers, heads, kv_heads, vocab, tied = SHAPES[name]
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=kv_heads, vocab_size=vocab, tie_word_embeddings=tied, max_position_embeddings=4096,
        )
    )  # fmt: skip
    model.to(torch.float16).save_pretrained(folder)
    for file in (REPOSITORY / "tiny_model").glob("*token*"):
        shutil.copy(file, folder)


def config_of(case: str, folder: str = "model"):
    """Make the config of a case."""
    from forgebook.config.schema import FinetuneConfig

    _, rows, length, workers, settings = CASES[case]
    return FinetuneConfig.model_validate(
        {
            "model_id": folder, "train_path": "none.jsonl", "train_batch_size_per_device": rows, "num_epochs": 1,
            "context_length": length, "num_devices": workers, **BASE, **settings,
        }
    )  # fmt: skip


def measure(case: str, folder: str) -> int:
    """Train some steps; return the peak of memory above the start, in bytes."""
    import peft  # noqa: F401  imported before the start is measured
    import torch
    from transformers.models.llama import modeling_llama  # noqa: F401

    from forgebook.training import fsdp
    from forgebook.training.setup import make_accelerator, make_worker

    config = config_of(case, folder)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // config.num_devices))
    accelerator = make_accelerator(config)
    for dtype in (torch.float32, torch.bfloat16):
        small = torch.nn.Linear(256, 256, dtype=dtype)
        small(torch.zeros(64, 256, dtype=dtype)).sum().backward()
    before = anonymous_bytes()
    worker = make_worker(config, accelerator)
    ids = torch.randint(5, 2000, (config.train_batch_size_per_device, config.context_length))
    # DDP makes its buckets anew after the first step and writes to them in the second: from then on they are there.
    steps = 3 if config.num_devices > 1 and config.deepspeed is None else 2
    with Peak() as peak:
        for _ in range(steps):
            for micro_batch in range(1, config.gradient_accumulation_steps + 1):
                if worker.is_fsdp:
                    fsdp.sync_gradients(worker.wrapped, micro_batch == config.gradient_accumulation_steps)
                loss = worker.wrapped(input_ids=ids, labels=ids) / ids.numel()
                if worker.deepspeed_engine is None:
                    accelerator.backward(loss)
                else:
                    accelerator.deepspeed_engine_wrapped.backward(loss, sync_gradients=True)
            if worker.deepspeed_engine is None:
                clip = fsdp.clip_gradients if worker.is_fsdp else torch.nn.utils.clip_grad_norm_
                clip(worker.optimizer.trained, 1.0)
                worker.optimizer.step()
                worker.optimizer.zero_grad()
    return peak.bytes - before


def run_case(case: str, folder: str) -> int:
    """Measure a case in new processes, one per worker; return the largest of their peaks."""
    workers = CASES[case][3]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = []
    for rank in range(workers):
        env = {**os.environ, "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32", "HF_HUB_OFFLINE": "1", **ALLOCATOR}
        if workers > 1:
            env |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(workers), "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(workers),
            }  # fmt: skip
        command = [sys.executable, __file__, "--measure", case, folder]
        started.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    peaks = []
    try:
        for process in started:
            out, err = process.communicate(timeout=900)
            if process.returncode:
                raise RuntimeError(f"{case}: {err[-2000:]}")
            peaks.append(int(out.split("peak:")[1].split()[0]))
    finally:
        for process in started:  # a worker waits for the others
            process.kill()
    return max(peaks)


def planned(case: str):
    """Plan a case; needs no torch."""
    from forgebook.catalog import Shape
    from forgebook.planning.memory import memory_of

    name, _, length, workers, _ = CASES[case]
    hidden, intermediate, layers, heads, kv_heads, vocab, tied = SHAPES[name]
    shape = Shape("llama", layers, hidden, intermediate, heads, kv_heads, hidden // heads, vocab, 4096, tied=tied)
    return memory_of(config_of(case), shape, workers=workers, length=length, on_gpu=False)


def main(target: str, only: list[str]) -> None:
    results, failed = {}, []
    if target and only and Path(target).exists():
        results = {one["case"]: one for one in json.loads(Path(target).read_text())["results"]}
    with tempfile.TemporaryDirectory() as scratch:
        for case in only or CASES:
            folder = Path(scratch) / CASES[case][0]
            if not folder.exists():
                write_model(CASES[case][0], folder)
            try:
                measured = run_case(case, str(folder))
            except (RuntimeError, subprocess.TimeoutExpired, IndexError) as error:
                print(f"{case}: failed: {error}", file=sys.stderr)
                failed.append(case)
                continue
            results[case] = result_of(case, measured)
            terms = {name: size >> 20 for name, size in results[case]["terms"].items()}
            line = "{case:34} planned {planned:12,}  measured {measured:12,}  {error:+.1%}".format(**results[case])
            print(line, terms, flush=True)
            write_results(target, results, failed)
    print(write_results(target, results, failed))


def replan(target: str) -> None:
    """Set the plan of now beside the measurements of a file."""
    held = json.loads(Path(target).read_text())
    held["results"] = [result_of(one["case"], one["measured"]) for one in held["results"]]
    held["summary"] |= summary_of(held["results"])
    Path(target).write_text(json.dumps(held, indent=1) + "\n")
    print(held["summary"])


def summary_of(results: list[dict]) -> dict:
    """Count the cases and tell how far off the plan is."""
    errors = [abs(one["error"]) for one in results]
    return {"cases": len(results), "median_error": round(statistics.median(errors), 4), "worst_error": max(errors)}


def result_of(case: str, measured: int) -> dict:
    """Set what was measured beside the plan."""
    need = planned(case)
    shape, rows, length, workers, settings = CASES[case]
    return {
        "case": case, "model": shape, "rows": rows, "length": length, "workers": workers, "settings": settings,
        **compared(need, measured),
    }  # fmt: skip


def compared(need, measured: int) -> dict:
    """Compare planned memory with what was measured, the process's own libraries left out."""
    return {
        "planned": need.tensors, "measured": measured, "error": round(need.tensors / measured - 1, 4),
        "terms": {name: size for name, size in need.terms.items() if name != "overhead"},
    }  # fmt: skip


def environment() -> dict:
    """Describe the machine and the packages that all cases depend on."""
    return {
        "cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(),
        "python": platform.python_version(), "torch": version("torch"), "transformers": version("transformers"),
    }  # fmt: skip


def write_results(target: str, found: dict[str, dict], failed: list[str]) -> dict:
    """Write what is measured so far, in the order of the cases, with its environment; return the summary."""
    results = [found[case] for case in CASES if case in found]
    summary = {
        **summary_of(results), "failed": failed, **environment(), "deepspeed": version("deepspeed"),
    }  # fmt: skip
    if target:
        Path(target).write_text(json.dumps({"summary": summary, "results": results}, indent=1) + "\n")
    return summary


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(f"peak: {measure(*sys.argv[2:])} ")
    elif "--replan" in sys.argv:
        replan(sys.argv[1])
    else:
        arguments = sys.argv[1:]
        wanted = [name for name in arguments if name in CASES]
        main(next((one for one in arguments if one.endswith(".json")), ""), wanted)
