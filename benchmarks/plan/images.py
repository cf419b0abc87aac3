"""Memory of runs with images as planned against memory as measured: small random models of three families, on a CPU.

    python benchmarks/plan/images.py [results.json] [case ...]     ten minutes on two cores; about 2 GB of memory
    python benchmarks/plan/images.py results.json --replan         set the plan anew beside what was measured

As benchmarks/plan/run.py, which see: what is measured is the peak above what the process held before. No number of the
plan was fitted to these cases. tests/planning/test_image_memory.py plans all of them anew and holds the plan to 15%.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests"), str(Path(__file__).parent)]

from run import ALLOCATOR, LORA, Peak, anonymous_bytes, compared, environment, summary_of  # noqa: E402

from support_vision import save_vision_files, save_vision_model  # noqa: E402

TEXT = {
    "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 64,
}  # fmt: skip
TOWER = {
    "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 6,
    "image_size": 224, "patch_size": 14,
}  # fmt: skip
QWEN_TOWER = {
    "depth": 6, "hidden_size": 384, "intermediate_size": 1152, "num_heads": 6, "out_hidden_size": 512,
    "window_size": 112, "fullatt_block_indexes": [2, 5],
}  # fmt: skip
# name: family, settings in the place of the family's
MODELS = {
    "Idefics3": ("SmolVLM", {
        "text": TEXT, "tower": TOWER,
        "pixels": {"size": {"longest_edge": 448}, "max_image_size": {"longest_edge": 224}},
        "config": {"scale_factor": 4}, "processor": {"image_seq_len": 16},
    }),
    "Qwen 2.5 VL": ("Qwen 2.5 VL", {
        "text": TEXT | {"rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]}},
        "tower": QWEN_TOWER, "pixels": {"max_pixels": 784 * 400},
    }),
    "Gemma 3": ("Gemma 3", {
        "text": TEXT | {"query_pre_attn_scalar": 64, "layer_types": ["sliding_attention", "full_attention"] * 3},
        "tower": TOWER, "pixels": {"size": {"height": 224, "width": 224}},
        "config": {"mm_tokens_per_image": 16}, "processor": {"image_seq_length": 16},
    }),
}  # fmt: skip
SIZE = (448, 448)  # pixels of every image
ENCODER = {"vision_language_config": {"freeze_vision_encoder": False}}
PROJECTOR = {"vision_language_config": {"train_projector": True}}
CHECKPOINTING = {"gradient_checkpointing": True}
# name: model, rows, images of a row, tokens of a row, settings
CASES = {
    "Idefics3, LoRA": ("Idefics3", 2, 2, 256, {"lora_config": LORA}),
    "Idefics3, LoRA, checkpointing": ("Idefics3", 2, 2, 256, {"lora_config": LORA, **CHECKPOINTING}),
    "Idefics3, full, frozen encoder": ("Idefics3", 2, 2, 256, {}),
    "Idefics3, full, frozen, checkpointing": ("Idefics3", 2, 2, 256, CHECKPOINTING),
    "Idefics3, full, projector": ("Idefics3", 2, 2, 256, PROJECTOR),
    "Idefics3, full, encoder": ("Idefics3", 2, 1, 256, ENCODER),
    "Idefics3, full, encoder, checkpointing": ("Idefics3", 2, 2, 256, ENCODER | CHECKPOINTING),
    "Qwen 2.5 VL, LoRA": ("Qwen 2.5 VL", 2, 2, 640, {"lora_config": LORA}),
    "Qwen 2.5 VL, full, frozen encoder": ("Qwen 2.5 VL", 2, 2, 640, {}),
    "Qwen 2.5 VL, full, encoder": ("Qwen 2.5 VL", 2, 1, 320, ENCODER),
    "Qwen 2.5 VL, full, encoder, checkpointing": ("Qwen 2.5 VL", 2, 2, 640, ENCODER | CHECKPOINTING),
    "Gemma 3, LoRA": ("Gemma 3", 2, 6, 256, {"lora_config": LORA}),
    "Gemma 3, full, frozen encoder": ("Gemma 3", 2, 6, 256, {}),
    "Gemma 3, full, encoder": ("Gemma 3", 2, 6, 256, ENCODER),
}


def config_of(case: str, folder: str):
    """Make the config of a case."""
    from forgebook.config.schema import FinetuneConfig

    _, rows, _, length, settings = CASES[case]
    return FinetuneConfig.model_validate(
        {
            "model_id": folder, "train_path": "none.jsonl", "train_batch_size_per_device": rows, "num_epochs": 1,
            "context_length": length, "num_devices": 1, "dtype": "float32", "deepspeed": None,
            "gradient_checkpointing": False, "attention": "sdpa", "vision_language_config": {}, **settings,
        }
    )  # fmt: skip


def planned(case: str, folder: str):
    """Plan a case as `prepare` does, from the model's folder and the sizes of its images."""
    from forgebook.data.image_tokens import ImageTokens
    from forgebook.data.images import ImageFile
    from forgebook.models.image_load import with_images
    from forgebook.models.processor import processor_of
    from forgebook.models.shapes import find_shape
    from forgebook.models.tokenizer import tokenizer_of
    from forgebook.planning.memory import memory_of

    _, _, images, length, _ = CASES[case]
    config = config_of(case, folder)
    resized = ImageTokens(processor_of(config, tokenizer_of(config))).resized(ImageFile("", "", *SIZE))
    shape = with_images(find_shape(folder), config, images * resized.pixels / length)
    return memory_of(config, shape, workers=1, length=length, on_gpu=False)


def batch_of(case: str, worker, dtype: str) -> dict:
    """Make a batch as training does: its images processed, their tokens, and words up to the length of a row."""
    import numpy as np
    import torch
    from PIL import Image

    from forgebook.data import image_batches

    _, rows, images, length, _ = CASES[case]
    rng = np.random.default_rng(0)
    pictures = iter(Image.fromarray(rng.integers(0, 255, (*SIZE, 3), np.uint8)) for _ in range(rows * images))
    image_batches.open_image = lambda file, store: next(pictures)
    processor, picture = worker.processor, Image.new("RGB", SIZE, "white")
    marks = "\n".join([processor.image_token] * images)
    [ids] = processor(images=[[picture] * images], text=[marks])["input_ids"]
    assert len(ids) < length, f"{case}: the images of a row take {len(ids)} tokens of {length}"
    ids = torch.tensor(ids + np.random.default_rng(0).integers(5, 2000, length - len(ids)).tolist())
    input_ids = ids.repeat(rows, 1)
    labels = input_ids.clone()
    labels[:, : length // 2] = -100
    pixels = image_batches.Pixels(processor, dtype)
    one = type("One", (), {"file": None})()
    return {"input_ids": input_ids, "labels": labels, **pixels.inputs([[(one, None)] * images] * rows, input_ids)}


def measure(case: str, folder: str) -> int:
    """Train three steps; return the peak of memory above the start, in bytes."""
    import peft  # noqa: F401  imported before the start is measured
    import torch
    from PIL import Image
    from transformers import AutoModelForImageTextToText

    from forgebook.models.processor import processor_of
    from forgebook.models.tokenizer import tokenizer_of
    from forgebook.training.setup import make_accelerator, make_worker

    config = config_of(case, folder)
    torch.set_num_threads(os.cpu_count() or 1)
    # The code of the model and its processor is imported, and kernels' caches are filled, before the start.
    processor = processor_of(config, tokenizer_of(config))
    processor(images=[[Image.new("RGB", SIZE)]], text=[processor.image_token], return_tensors="pt")
    with torch.device("meta"):
        AutoModelForImageTextToText.from_config(worker_config(folder))
    accelerator = make_accelerator(config)
    small, patches = torch.nn.Linear(256, 256), torch.nn.Conv2d(3, 8, 14, 14)
    (small(torch.zeros(64, 256)).sum() + patches(torch.zeros(1, 3, 28, 28)).sum()).backward()
    before = anonymous_bytes()
    worker = make_worker(config, accelerator)
    with Peak() as peak:
        # As in training, two more batches wait for their step.
        batches = [batch_of(case, worker, config.dtype) for _ in range(3)]
        for batch in batches:
            supervised = int((batch["labels"] != -100).sum())
            accelerator.backward(worker.wrapped(**batch) / supervised)
            torch.nn.utils.clip_grad_norm_(worker.optimizer.trained, 1.0)
            worker.optimizer.step()
            worker.optimizer.zero_grad()
    return peak.bytes - before


def worker_config(folder: str):
    """Read a model's config."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder)


def result_of(case: str, folder: str, measured: int) -> dict:
    """Set what was measured beside the plan."""
    model, rows, images, length, settings = CASES[case]
    return {
        "case": case, "model": model, "rows": rows, "images": images, "length": length, "settings": settings,
        **compared(planned(case, folder), measured),
    }  # fmt: skip


def replan(results: list[dict], scratch: Path) -> list[dict]:
    """Set the plan of now beside what was measured; needs no weights."""
    for name in {one["model"] for one in results}:
        family, larger = MODELS[name]
        save_vision_files(family, scratch / name, **larger)
    return [result_of(one["case"], str(scratch / one["model"]), one["measured"]) for one in results]


def run_case(case: str, scratch: Path) -> int:
    """Measure a case in a process of its own."""
    name = CASES[case][0]
    if not (scratch / name).exists():  # in float16, as benchmarks/plan/run.py says
        family, larger = MODELS[name]
        save_vision_model(family, scratch / name, "float16", **larger)
    env = {**os.environ, "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32", "HF_HUB_OFFLINE": "1", **ALLOCATOR}
    command = [sys.executable, __file__, "--measure", case, str(scratch / name)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    if done.returncode:
        sys.exit(f"{case}: {done.stderr[-2000:]}")
    return int(done.stdout.split("peak:")[1].split()[0])


def main(target: str, only: list[str], is_measured: bool) -> None:
    known: dict[str, dict] = {}
    if target and Path(target).exists():
        known = {one["case"]: one for one in json.loads(Path(target).read_text())["results"]}
    with tempfile.TemporaryDirectory() as scratch:
        for case in (only or CASES) if is_measured else ():
            measured = run_case(case, Path(scratch))
            known[case] = result_of(case, str(Path(scratch) / CASES[case][0]), measured)
            print("{case:44} planned {planned:12,}  measured {measured:12,}  {error:+.1%}".format(**known[case]))
    with tempfile.TemporaryDirectory() as scratch:
        results = replan([known[case] for case in CASES if case in known], Path(scratch))
    summary = summary_of(results) | environment()
    if target:
        Path(target).write_text(json.dumps({"summary": summary, "results": results}, indent=1) + "\n")
    print(summary)


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if arguments[:1] == ["--measure"]:
        print(f"peak: {measure(*arguments[1:])} ")
    else:
        file = next((one for one in arguments if one.endswith(".json")), "")
        main(file, [one for one in arguments if one in CASES], "--replan" not in arguments)
