"""Train two steps of every method and task under one sharding, reload what was saved, and print what came of it.

    PYTHONPATH=.:tests python tests/support_runs.py zero_2 FOLDER

tests/test_support.py runs it, a process for each sharding: accelerate takes one kind per process. One line of
JSON per combination: how far the reloaded checkpoint is from the evaluation at the end of training, or the refusal.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from accelerate.state import AcceleratorState
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from conftest import LORA, TINY_MODEL, chat, uneven_rows
from forgebook.config.parse import load_config
from forgebook.config.schema import FinetuneConfig
from forgebook.data import batching
from forgebook.data.image_batches import Pixels
from forgebook.data.token_store import load_view
from forgebook.errors import ForgebookError
from forgebook.inference import loading
from forgebook.launch import ray_train
from forgebook.launch.fine_tune import fine_tune
from forgebook.models.processor import processor_of
from forgebook.runs.metrics import read_metrics
from forgebook.runs.run import Run
from forgebook.training.losses import SupervisedLM
from forgebook.training.objectives import Objective
from forgebook.training.reference import ExampleSet
from support_ranks import train_in_ranks
from support_vision import draw, image_row, save_vision_model

METHODS = {
    "full": {},
    "lora": {"lora_config": LORA},
    "dora": {"lora_config": LORA | {"use_dora": True}},
    "qlora": {"lora_config": LORA, "quantization": "nf4"},
}
LABELS = ["[[1]]", "[[2]]"]
TASKS = {
    "causal_lm": {},
    "instruction_tuning": {},
    "classification": {"classifier_config": {"label_tokens": LABELS}},
    "preference_tuning": {},
    "vision_language": {"vision_language_config": {}},
}
SHARDINGS = ["none", "zero_1", "zero_2", "zero_3", "fsdp"]


def sharded(sharding: str) -> dict:
    """Return the settings of a sharding, with four examples a step: FSDP2 has two workers, the others this process."""
    devices = {"num_devices": 2, "train_batch_size_per_device": 2}
    return {"sharding": sharding} | (
        devices if sharding == "fsdp" else {"num_devices": 0, "train_batch_size_per_device": 4}
    )


def rows_of(task: str) -> list[dict]:
    if task == "classification":
        return [chat(f"the lamp {k}", LABELS[k % 2]) for k in range(8)]
    if task == "preference_tuning":
        sides = {"chosen": "on the table", "rejected": "no"}
        return [
            {side: chat("where? " * (1 + k % 3), text)["messages"] for side, text in sides.items()} for k in range(8)
        ]
    if task == "vision_language":  # of different sizes, two of a row, and rows without an image
        names = [f"{k}.png" for k in range(8)]
        images = [[name] for name in names[:5]] + [names[5:7], [], []]
        return [image_row("what? " * (1 + k % 3), f"the lamp {k}", *paths) for k, paths in enumerate(images)]
    return uneven_rows(8)


def model_of(task: str, folder: Path) -> str:
    """Return the model of a task: the tiny one, or one that reads images, with pictures for its rows."""
    if task != "vision_language":
        return str(TINY_MODEL)
    for k in range(8):
        draw(folder / f"{k}.png", f"n {k}", (40 + 9 * (k % 4), 30))
    path = folder / "model"
    return str(path) if path.exists() else save_vision_model("SmolVLM", path)


def settings_of(method: str, task: str, sharding: str, folder: Path) -> dict:
    path = folder / f"{task}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows_of(task)))
    return {
        "model_id": model_of(task, folder), "train_path": str(path), "valid_path": str(path), "task": task,
        "run_name": f"{method}-{task}", "storage_path": str(folder / "runs"), "num_epochs": 1,
        "eval_batch_size_per_device": 8, "learning_rate": 1e-3,
        "num_warmup_steps": 0, "dtype": "float32", **sharded(sharding), **METHODS[method], **TASKS[task],
    }  # fmt: skip


def reloaded_loss(config: FinetuneConfig, run: Run, checkpoint: str) -> float:
    """Measure the saved checkpoint on the validation rows, loaded as anyone would."""
    unset_hf_deepspeed_config()  # or under ZeRO-3 transformers would load this model in partitions, too
    model, tokenizer, _ = loading.load_for_generation(run.checkpoints / checkpoint, config.dtype)
    valid = load_view(run.tokens / "valid.npz")
    kept = run.tokens / "reference-validation.npy"
    sequences = batching.single_sequences(valid, batching.group_size(config.task))
    order = [row for rows in sequences for row in rows]
    reference = torch.from_numpy(np.load(kept)[order]) if kept.exists() else None
    processor = processor_of(config, tokenizer)
    pixels = Pixels(processor, config.dtype) if processor else None
    batch = ExampleSet(valid, tokenizer.pad_token_id, torch.device("cpu"), pixels=pixels).batch(sequences)
    objective = Objective(config.preference_tuning_config)
    with torch.no_grad():
        wrapped = SupervisedLM(model, reads_images=pixels is not None).eval()
        measurement = objective.measure(wrapped, batch, reference)
    return float(measurement.loss) / objective.count_units(valid, np.arange(len(valid)))


def main() -> None:
    sharding, folder = sys.argv[1], Path(sys.argv[2])
    ray_train.run_on_ray = train_in_ranks
    for method in METHODS:
        for task in sys.argv[3:] or TASKS:
            path = folder / f"{method}-{task}.yaml"
            path.write_text(json.dumps(settings_of(method, task, sharding, folder)))
            record = {"method": method, "task": task}
            try:
                config = load_config(path)
                run = fine_tune(config)
                evaluation = [row for row in read_metrics(run.metrics) if "eval_loss" in row][-1]
                again = reloaded_loss(config, run, evaluation["checkpoint_dir_name"])
                record |= {"eval_loss": evaluation["eval_loss"], "reloaded": again}
            except ForgebookError as error:
                record |= {"refused": str(error)}
            AcceleratorState._reset_state(reset_partial_state=True)
            print("RESULT " + json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
