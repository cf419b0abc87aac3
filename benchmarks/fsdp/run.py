"""FSDP2 beside ZeRO-2 and ZeRO-3 on two CPU workers: seconds of a step, what a save takes of it, memory to load.

    python benchmarks/fsdp/run.py results.json

A Llama of 40M parameters, full fine-tuning in float32, one sequence of 256 tokens per worker. saved at once: until the
state is complete on the disk; saved in the background: until training may continue. loading: the highest anonymous
resident memory of a worker while a model of 350M is loaded and divided for LoRA in bfloat16, above that before; the
model's weights have 700 MB. fsdp_whole: FSDP2 where each worker reads the whole model, as it does for DoRA.
"""

import importlib.util
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))
SHARDINGS, MODEL, LENGTH, STEPS, SAVES = ("none", "zero_2", "zero_3", "fsdp"), "40M", 256, 8, 3
LOADED = "350M"


def load(sharding: str, folder: str) -> dict:
    """Load a model for LoRA in this worker; return the memory that it takes at the most, and afterwards."""
    import peft  # noqa: F401  imported before the start is measured
    import torch
    from transformers.models.llama import modeling_llama  # noqa: F401

    from forgebook.models import adapters
    from forgebook.training.setup import make_accelerator, make_worker

    plan = plan_benchmark()
    if sharding == "fsdp_whole":
        adapters.needs_whole_base = lambda *_: "this benchmark"
    settings = {"sharding": sharding.removesuffix("_whole"), "dtype": "bfloat16", "lora_config": plan.LORA}
    config = config_of(f"{folder}/{LOADED}", settings)
    torch.set_num_threads(1)
    accelerator = make_accelerator(config)
    before = plan.anonymous_bytes()
    with plan.Peak() as peak:
        worker = make_worker(config, accelerator)
    held = plan.anonymous_bytes() - before
    assert worker.parameters[0] > 1e8
    return {"loading_bytes": peak.bytes - before, "loaded_bytes": held}


def config_of(model: str, settings: dict):
    """Make a config for two workers."""
    from forgebook.config.schema import FinetuneConfig

    return FinetuneConfig.model_validate(
        {
            "model_id": model, "train_path": "none.jsonl", "train_batch_size_per_device": 1, "num_epochs": 1,
            "context_length": LENGTH, "num_devices": 2, "gradient_checkpointing": False, "attention": "sdpa",
            **settings,
        }
    )  # fmt: skip


def measure(sharding: str, folder: str) -> dict:
    """Train some steps in this worker and save; return its figures."""
    import torch

    from forgebook.runs.run import Run
    from forgebook.training import distributed, fsdp, training_state
    from forgebook.training.background_save import BackgroundSave
    from forgebook.training.setup import make_accelerator, make_worker

    config = config_of(f"{folder}/{MODEL}", {"dtype": "float32", "sharding": sharding})
    torch.set_num_threads(1)
    accelerator = make_accelerator(config)
    worker = make_worker(config, accelerator)
    ids, seconds = torch.randint(5, 2000, (1, LENGTH)), []
    for _ in range(STEPS):
        started = time.perf_counter()
        loss = worker.wrapped(input_ids=ids, labels=ids) / ids.numel()
        if worker.deepspeed_engine is not None:
            accelerator.deepspeed_engine_wrapped.backward(loss, sync_gradients=True)
        else:
            loss.backward()
            clip = fsdp.clip_gradients if worker.is_fsdp else torch.nn.utils.clip_grad_norm_
            clip(worker.optimizer.trained, 1.0)
            worker.optimizer.step()
            worker.optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
    figures = {"step_seconds": statistics.median(seconds[2:])}
    run = Run(Path(folder, f"run-{sharding}"))
    weights = worker.model, worker.optimizer, worker.deepspeed_engine
    for name, saving in [("at_once", None), ("in_background", BackgroundSave())][: 2 if worker.is_fsdp else 1]:
        waits = []
        for number in range(SAVES):
            distributed.gathered(0)
            started = time.perf_counter()
            training_state.save_state(run, training_state.Position(number + 1), *weights, background=saving)
            waits.append(time.perf_counter() - started)
            if saving is not None:
                saving.wait()
        figures[f"save_{name}_seconds"] = statistics.median(waits)
    return figures


def plan_benchmark():
    """Return the benchmark of the memory plan, which has the models."""
    spec = importlib.util.spec_from_file_location("plan_benchmark", REPOSITORY / "benchmarks/plan/run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def in_two_workers(what: str, sharding: str, folder: str) -> dict:
    """Measure a sharding in new processes; return the larger of each figure.

    what: "load" or "measure".
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, __file__, f"--{what}", sharding, folder]
    workers = [
        subprocess.Popen(
            command, env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    outputs = [worker.communicate()[0] for worker in workers]
    found = [json.loads(output.split("figures:")[1]) for output in outputs]
    return {name: round(max(each[name] for each in found), 4) for name in found[0]}


def main(target: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for model in (MODEL, LOADED):
            plan_benchmark().write_model(model, Path(folder, model))
        results = {sharding: in_two_workers("measure", sharding, folder) for sharding in SHARDINGS}
        for sharding in (*SHARDINGS, "fsdp_whole"):
            results.setdefault(sharding, {}).update(in_two_workers("load", sharding, folder))
    environment = {"cpu": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
    environment |= {name: version(name) for name in ("torch", "deepspeed", "accelerate")}
    Path(target).write_text(json.dumps({"environment": environment, "results": results}, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    if sys.argv[1:2] in (["--measure"], ["--load"]):
        print("figures:" + json.dumps({"--measure": measure, "--load": load}[sys.argv[1]](*sys.argv[2:])))
    else:
        main(sys.argv[1])
