"""Families that people start with: counted, trained with LoRA and whole, with the loss of plain transformers.

`python tests/models/test_shapes.py` writes tests/oracles/families.md, the table of what these tests show.
"""

import dataclasses
import json
import sys
import tempfile
from pathlib import Path

import pytest
import torch

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[level]) for level in (1, 2)]

from conftest import REPOSITORY, config_for
from forgebook.catalog import hardware_of, shape_from, shape_of
from forgebook.data.batching import IGNORED
from forgebook.errors import ModelError
from forgebook.models import adapters, load, shapes
from forgebook.models.families import freeze_towers
from forgebook.models.vllm_support import vllm_loads
from forgebook.planning.plan import plan
from forgebook.planning.settings import check_written
from forgebook.planning.trainable import trainable_parameters
from forgebook.training.losses import SupervisedLM
from support_families import FAMILIES, TEMPLATES, save_family

TABLE = REPOSITORY / "tests/oracles/families.md"
MASKS = REPOSITORY / "tests/oracles/chat_templates.md"
LORA = {"r": 2, "target_modules": "all-linear"}
COLUMNS = "family, class, loads, LoRA, full, plan = model, masks, vLLM, vLLM with the adapter, all-linear leaves frozen"
INTRODUCTION = (
    """# Model families

Written by `python tests/models/test_shapes.py`, whose tests hold each row. `+`: shown on a tiny random model of the
class that the family is published as.

- loads: through the engine's own loading function.
- LoRA (all-linear), full: the loss of a batch is that of plain transformers, every trainable parameter has a gradient,
  and three steps lower the loss.
- plan = model: parameters, and those of the adapter, are counted exactly without weights.
- masks: of 17 shapes of examples, how many the family's chat template renders with a right loss mask; the rest is
  refused ([why](chat_templates.md)).
- vLLM: whether its registry has the class, and, by the settings of an all-linear adapter, whether it can load that on
  top of the base. A run compares the names of the layers, too.

"""
    + f"| {COLUMNS.replace(', ', ' | ')} |\n{'|---' * (COLUMNS.count(',') + 1)}|"
)


def batch():
    """Make two examples, and the labels that the engine and transformers take: theirs are shifted by one."""
    ids = torch.arange(3, 35).reshape(2, 16)
    theirs = ids.clone()
    theirs[:, :5] = IGNORED
    ours = torch.full_like(ids, IGNORED)
    ours[:, :-1] = theirs[:, 1:]
    return ids, ours, theirs


def step_losses(model) -> tuple[float, float, list[str]]:
    """Return the loss before and after a step, and the parameters that train without a gradient."""
    ids, labels, _ = batch()
    wrapped = SupervisedLM(model).train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(3):
        loss = wrapped(ids, labels) / (labels != IGNORED).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    return losses[0], losses[-1], without


def row_of(name: str, folder: Path) -> str:
    """Check one family; return its row of the table."""
    source = save_family(name, folder)
    model_config = json.loads((folder / "config.json").read_text())
    model = load.load_model(source, dtype="float32")
    freeze_towers(model)
    ids, _, theirs = batch()
    with torch.no_grad():
        plain = type(model).from_pretrained(source, dtype=torch.float32)(input_ids=ids, labels=theirs).loss.item()
    counted = shapes.count_shape(load.load_skeleton(source))
    assert shape_from(json.loads(json.dumps(dataclasses.asdict(counted)))) == counted
    every = {"total": sum(p.numel() for p in model.parameters())}
    every["text"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert {"total": counted.parameters, "text": counted.text_parameters} == every
    first, last, without = step_losses(model)
    assert first == pytest.approx(plain, abs=1e-5) and last < first and without == []

    adapted = adapters.add_lora(load.load_model(source, dtype="float32"), LORA)
    first, last, without = step_losses(adapted)
    assert first == pytest.approx(plain, abs=1e-5) and last < first and without == []
    config = config_for(source, lora_config=LORA, context_length=64, train_batch_size_per_device=2)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    known = shapes.find_shape(source)
    assert (
        trainable_parameters(config.lora_config, counted) == trainable_parameters(config.lora_config, known) == trained
    )
    assert known.parameters == every["total"] and known.active_parameters == counted.active_parameters

    planned = plan(config, known, hardware_of("1xL4"))
    frozen = [text.split(" leaves ")[1].split(" frozen")[0] for text in check_written(config, known, None)]
    assert check_written(config, counted, None) == check_written(config, known, None)
    [masks] = [
        line for line in MASKS.read_text("utf-8").splitlines() if line.startswith(f"| {TEMPLATES.get(name, name)} |")
    ]
    cells = masks.split("|")[2:-1]
    verdicts = [verdict.partition(":")[0] for verdict in (vllm_loads(model_config), planned.vllm)]
    right = f"{sum(cell.strip().startswith('+') for cell in cells)} of {len(cells)}"
    row = [name, type(model).__name__, "+", "+", "+", "+", right, *verdicts, "; ".join(frozen) or "nothing"]
    return f"| {' | '.join(row)} |"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_counted_and_trained_as_transformers_has_it(name, tmp_path):
    row = row_of(name, tmp_path)
    assert row in TABLE.read_text("utf-8").splitlines(), f"python {Path(__file__).relative_to(REPOSITORY)}"


def test_what_was_counted_once_needs_no_model_again(tmp_path, monkeypatch):
    source = save_family("LFM 2", tmp_path / "model")
    monkeypatch.setenv("FORGEBOOK_CACHE", str(tmp_path / "cache"))
    first = shapes.find_shape(source)
    [remembered] = tmp_path.glob("cache/shapes/*.json")
    remembered.write_text('{"counted": {"kinds": [], "of_another_version": 1}}')
    assert shapes.find_shape(source) == first
    monkeypatch.setattr(load, "load_skeleton", None)
    assert shapes.find_shape(source) == first
    with pytest.raises(ModelError, match="did you mean 'qwen/qwen3-8b'"):
        shapes.find_shape("Qwen/Qwen3-8")


def test_towers_of_other_models_than_gemma_3_are_counted_exactly(tmp_path):
    """Pixtral's tower, beside a decoder whose parameters follow from config.json."""
    source = save_family("Mistral Small 3", tmp_path)
    with pytest.raises(ModelError, match="has model_type 'mistral3'"):
        shape_of(source)
    assert shapes.find_shape(source).towers == 65_248 - 19_616  # all, without the decoder and its tied embeddings


def test_an_architecture_that_transformers_lacks_is_one_sentence(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "newcomer", "architectures": ["NewForCausalLM"]}))
    with pytest.raises(ModelError, match="no model could be loaded from"):
        shapes.find_shape(str(tmp_path))


if __name__ == "__main__":
    rows = [row_of(name, Path(tempfile.mkdtemp())) for name in FAMILIES]
    TABLE.write_text("\n".join([INTRODUCTION, *rows, ""]), encoding="utf-8")
