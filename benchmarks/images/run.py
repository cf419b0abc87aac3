"""What images cost per second of one core: checked before training, made into pixels, and trained on.

    python benchmarks/images/run.py          a minute; writes results.json beside it

Seconds are of the processor, of one thread, so that other programs on the machine change them little. Tokens are all of
an example, those of its image included. Training is full fine-tuning beside a frozen encoder, float32, after a warm-up.
"""

import io
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests"), str(REPOSITORY / "benchmarks/plan")]

import images  # noqa: E402
from run import environment  # noqa: E402

from support_vision import save_vision_model  # noqa: E402

ROWS, WORDS, STEPS = 4, 64, 5


def picture(side: int):
    """Draw a picture with some detail, as a photo has."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 255, (side // 16, side // 16, 3), np.uint8)).resize((side, side))


def checked_per_second(side: int) -> float:
    """Check JPEGs as the preparation pass does."""
    from forgebook.data.images import Image, check_image

    file = io.BytesIO()
    picture(side).save(file, "jpeg", quality=90)
    began, count = time.process_time(), 0
    while time.process_time() - began < 2:
        check_image(Image("its bytes", file.getvalue()), None)
        count += 1
    return round(count / (time.process_time() - began), 1)


def trained(name: str, folder: str, side: int) -> dict:
    """Train some steps; return examples and tokens per second of the processor."""
    import torch

    from forgebook.config.schema import FinetuneConfig
    from forgebook.data import image_batches
    from forgebook.training.setup import make_accelerator, make_worker

    config = FinetuneConfig.model_validate(
        {
            "model_id": folder, "train_path": "none.jsonl", "train_batch_size_per_device": ROWS, "num_epochs": 1,
            "context_length": 1024, "num_devices": 1, "dtype": "float32", "deepspeed": None,
            "gradient_checkpointing": False, "attention": "sdpa", "vision_language_config": {},
        }
    )  # fmt: skip
    worker = make_worker(config, make_accelerator(config))
    processor, drawn = worker.processor, picture(side)
    [ids] = processor(images=[[drawn]], text=[processor.image_token])["input_ids"]
    input_ids = torch.tensor([*ids, *range(5, 5 + WORDS)]).repeat(ROWS, 1)
    labels = input_ids.clone()
    labels[:, : len(ids)] = -100
    image_batches.open_image = lambda file, store: drawn
    pixels, one = image_batches.Pixels(processor, "float32"), type("One", (), {"file": None})()
    preparing, steps = [], []
    for _ in range(STEPS + 1):
        began = time.process_time()
        inputs = pixels.inputs([[(one, None)]] * ROWS, input_ids)
        made = time.process_time()
        loss = worker.wrapped(input_ids=input_ids, labels=labels, **inputs) / (ROWS * WORDS)
        worker.accelerator.backward(loss)
        worker.optimizer.step()
        worker.optimizer.zero_grad()
        preparing.append(made - began)
        steps.append(time.process_time() - made)
    both = statistics.median(preparing[1:]) + statistics.median(steps[1:])
    return {
        "model": name, "parameters": worker.parameters[0], "image_pixels": side, "image_tokens": len(ids),
        "tokens_per_example": input_ids.shape[1], "pixels_share": round(statistics.median(preparing[1:]) / both, 3),
        "examples_per_cpu_second": round(ROWS / both, 2),
        "tokens_per_cpu_second": round(input_ids.numel() / both),
    }  # fmt: skip


def main() -> None:
    import torch

    torch.set_num_threads(1)
    found = {
        "environment": environment(),
        "checked_jpegs_per_cpu_second": {side: checked_per_second(side) for side in (224, 1024)},
        "training": [trained("tiny_vision_model", str(REPOSITORY / "tiny_vision_model"), 176)],
    }
    with tempfile.TemporaryDirectory() as folder:
        family, larger = images.MODELS["Idefics3"]
        save_vision_model(family, Path(folder), **larger)
        found["training"].append(trained("Idefics3 of random weights, 4 tiles", folder, 448))
    (Path(__file__).parent / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
