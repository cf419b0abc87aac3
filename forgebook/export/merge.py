"""An adapter and its base -> one model that anybody's transformers can load.

    merge_run("quickstart", "models/quickstart")    a run (its best checkpoint, or a named one) or a checkpoint folder

The base is always read anew from its own weights, unquantised, in the dtype they were published in. Each layer is
merged in float32 and rounded once. What was written is then loaded by plain transformers and compared with the
adapter and with the base, token by token, before it gets its name.
"""

from __future__ import annotations

import gc
import json
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from forgebook.config.parse import PromptFormat, load_config
from forgebook.data import masking, tokenize
from forgebook.data.prompt_formats import as_chat_template, read_prompt_format
from forgebook.errors import CheckpointError, ConfigError, DataError, ModelError, StorageError
from forgebook.inference.generate import load_for_generation
from forgebook.models import adapters, load
from forgebook.models.tokenizer import load_tokenizer
from forgebook.models.vllm_support import vllm_loads
from forgebook.runs import atomic, run

__all__ = ["Merged", "mean_kl", "merge_run", "tell"]

# How much the merged model may differ from the adapter, as a share of what the adapter changed: of the mean KL, which
# grows with the square of the change. Rounding to 16 bits took 2e-6 of it on the tiny model.
LOST = 0.1
# What is compared: the last tokens of so many rows, each cut to so many tokens; the log-probabilities of a
# vocabulary of 150,000 then take 0.3 GB.
ROWS, ROW_TOKENS, COMPARED = 8, 1024, 64

BUILT_IN = (
    "What is the capital of France?",
    "Write a short sentence about the sea.",
    "How many days are there in a leap year?",
    "Explain in one sentence why the sky is blue.",
)


@dataclass(frozen=True)
class Merged:
    """What merging made.

    kl_merged, kl_base: mean KL divergence per token, in nats, of the merged model and of the base from the adapter;
    None where there was no adapter to merge. kl_trained: of the merged model from the adapter on the quantised base
    that it was trained on. of: which tokens were compared. vllm: "yes" or "no: why".
    """

    folder: Path
    vllm: str
    kl_merged: float | None = None
    kl_base: float | None = None
    kl_trained: float | None = None
    of: str = ""


def merge_run(name: str, out: str | Path, checkpoint: str | None = None) -> Merged:
    """Merge a run's checkpoint into its 16-bit base and write the model to `out`; copy a full-parameter checkpoint.

    name: a run's name or folder, or a checkpoint folder. checkpoint: of the run, not its best one.

    Raises StorageError if `out` exists, ModelError if the base cannot be merged into, CheckpointError if the adapter
    changes nothing or the merged model is not the adapter's. Then nothing is left at `out`.
    """
    out = Path(out).expanduser()
    if out.exists():
        raise StorageError(f"{out} exists: name a folder that does not, or delete it first")
    folder = run.find_checkpoint(name, checkpoint)
    with atomic.atomic_folder(out) as aside:
        if not (folder / "adapter_config.json").exists():
            shutil.copytree(folder, aside, dirs_exist_ok=True)
            _write_template(aside)
            return Merged(out, vllm_loads(atomic.read_json(aside / "config.json")))
        return _merge(folder, aside, out)


def tell(merged: Merged) -> list[str]:
    """Say in lines what merging made."""
    lines = []
    if merged.kl_merged is None:
        lines.append("the checkpoint is a whole model, not an adapter: it was copied as it is")
    else:
        lines.append(f"mean KL from the adapter, in nats per token, over {merged.of}:")
        lines.append(f"  merged model  {merged.kl_merged:.2e}")
        lines.append(f"  base model    {merged.kl_base:.2e}")
    if merged.kl_trained is not None:
        lines.append(
            f"the adapter was trained on a quantised base; from it there the merged model is {merged.kl_trained:.2e}"
        )
    lines.append(f"vLLM loads it  {merged.vllm}")
    if (merged.folder / "prompt_format.yaml").exists():
        lines.append("its chat template is the prompt format of the training, prompt_format.yaml")
    return [*lines, f"model folder   {run.display_path(merged.folder)}"]


def mean_kl(of: Sequence[torch.Tensor], to: Sequence[torch.Tensor]) -> float:
    """Average over tokens the KL divergence, in nats, of one model's log-probabilities from another's.

    of: for each row [tokens, vocabulary] the log-probabilities that are taken as true; to: those of the other model.
    """
    each = [(p.exp() * (p - q)).sum(-1) for p, q in zip(of, to, strict=True)]
    return max(0.0, float(torch.cat(each).double().mean()))


def _merge(folder: Path, aside: Path, out: Path) -> Merged:
    overrides = adapters.read_overrides(folder)
    model, tokenizer = _load_unquantised(folder, overrides)
    rows, of = _compared_rows(folder, tokenizer)
    adapter = _log_probabilities(model, rows)
    with model.disable_adapter():
        base = _log_probabilities(model, rows)
    kl_base = mean_kl(adapter, base)
    if kl_base == 0:
        raise CheckpointError(f"the adapter {folder} changes nothing: the base gives the same probabilities ({of})")
    _write(_merged(model), folder, aside)
    del model
    gc.collect()
    merged = _log_probabilities(_load_plainly(aside), rows)
    kl_merged = mean_kl(adapter, merged)
    if mean_kl(base, merged) == 0:
        raise CheckpointError(
            f"merging {folder} did nothing: the merged model is its base ({of}). The adapter's change is lost in "
            "rounding: train it further, or serve the adapter itself"
        )
    if kl_merged > LOST * kl_base:
        raise CheckpointError(
            f"the merged model is not what the adapter {folder} is: mean KL per token {kl_merged:.2e}, of base and "
            f"adapter {kl_base:.2e}, need less than a tenth of it ({of}): serve the adapter itself"
        )
    trained = None
    if overrides.get("quantization"):
        trained = mean_kl(_log_probabilities(load_for_generation(folder)[0], rows), merged)
    return Merged(out, vllm_loads(atomic.read_json(aside / "config.json")), kl_merged, kl_base, trained, of)


# The models -------------------------------------------------------------------------------------------


def _load_unquantised(folder: Path, overrides: dict[str, Any]):
    """Load an adapter over its base, the base in its own dtype, whatever it was quantised to in training."""
    from peft import PeftModel
    from transformers import AutoConfig

    source = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"the base of {folder} could not be read from {source!r}: {str(error).splitlines()[0]}"
        ) from None
    if getattr(config, "quantization_config", None):
        raise ModelError(
            f"the base {source} is itself quantised: an adapter is merged into 16-bit weights only. Put the 16-bit "
            f"model's name into base_model_name_or_path of {folder / 'adapter_config.json'}"
        )
    dtype = str(config.get_text_config().dtype or config.dtype or "bfloat16").removeprefix("torch.")
    # On the CPU, where the whole model fits for sure; its attention runs there and on a GPU.
    model = load.load_model(source, dtype=dtype, rope_scaling=overrides.get("rope_scaling"), on_gpu=False)
    tokenizer = load_tokenizer(str(folder))
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    _untie(model)
    return PeftModel.from_pretrained(model, str(folder)).eval(), tokenizer


def _load_plainly(folder: Path):
    """Load a model folder as anybody would, without this project."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def _untie(model) -> None:
    """Give the output layer weights of its own: an adapter on one of two tied layers changes that one alone."""
    output = model.get_output_embeddings()
    if output is not None and output.weight is model.get_input_embeddings().weight:
        output.weight = torch.nn.Parameter(output.weight.detach().clone(), requires_grad=False)


def _tie_again(model) -> None:
    """Tie what is equal, and let config.json say what is so."""
    embeddings, output = model.get_input_embeddings(), model.get_output_embeddings()
    if output is not None and model.config.tie_word_embeddings:
        model.config.tie_word_embeddings = torch.equal(output.weight, embeddings.weight)
        model.tie_weights()


@torch.no_grad()
def _merged(model):
    """Merge every LoRA layer in float32, one at a time, rounding once; then all else that an adapter may hold."""
    from peft.tuners.lora import LoraLayer

    was_tied = model.get_base_model().config.tie_word_embeddings
    for layer in [module for module in model.modules() if isinstance(module, LoraLayer)]:
        own = layer.get_base_layer()
        dtype = own.weight.dtype
        layer.float().merge(safe_merge=True)
        own.to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that these layers are merged already
        whole = model.merge_and_unload()
    whole.config.tie_word_embeddings = was_tied
    _tie_again(whole)
    return whole


def _write(model, folder: Path, out: Path) -> None:
    """Write the merged model, and of the checkpoint all that is not the adapter: tokenizer, template, generation."""
    model.save_pretrained(out)
    of_the_adapter = {"README.md", adapters.OVERRIDES}
    for path in folder.iterdir():
        if path.is_file() and not path.name.startswith("adapter_") and path.name not in of_the_adapter:
            shutil.copy2(path, out / path.name)
    _write_template(out)


def _write_template(out: Path) -> None:
    """Write the prompt format that a model was trained with as its chat template, for all who know no other thing."""
    prompt_format = read_prompt_format(out)
    if prompt_format is not None:
        (out / "chat_template.jinja").write_text(as_chat_template(prompt_format))


# What is compared -------------------------------------------------------------------------------------


def _compared_rows(folder: Path, tokenizer) -> tuple[list[tuple[list[int], list[int]]], str]:
    """Choose rows and the tokens in them whose predictions are compared; say where they come from."""
    prompt_format = read_prompt_format(folder)
    encoded, of = _validation_rows(folder, tokenizer, prompt_format), "rows of the run's validation file"
    if not encoded:
        of = "built-in prompts"
        conversations = [([{"role": "user", "content": text}], None) for text in BUILT_IN]
        encoded = [
            masking.Encoded(ids, [True] * len(ids))
            for ids in (masking.encode_prompt(messages, tokenizer, prompt_format) for messages, _ in conversations)
        ]
    rows = []
    for one in encoded:
        ids, trained = one.input_ids[:ROW_TOKENS], one.loss_mask[:ROW_TOKENS]
        # The prediction of token k is made at k - 1; a row cut before its answer is compared at its prompt.
        places = [k - 1 for k in range(1, len(ids)) if trained[k]] or list(range(len(ids) - 1))
        rows.append((ids, places[-COMPARED:]))
    return rows, f"{sum(len(places) for _, places in rows)} tokens of {len(rows)} {of}"


def _validation_rows(folder: Path, tokenizer, prompt_format: PromptFormat | None) -> list[masking.Encoded]:
    """Encode the first rows of the run's validation file; none if there is no such file any more."""
    try:
        config = load_config(run.find_run(str(folder.parent.parent)).config)
        if config.valid_path is None:
            return []
        labels = tuple(config.classifier_config.label_tokens) if config.classifier_config else ()
        rows = tokenize.read_rows(config.valid_path, config.task, ROWS, labels, "drop")
    except (ConfigError, DataError, StorageError):
        return []
    texts = [masking.encode_text(row.text, tokenizer) for row in rows if row.text is not None]
    chats = [(row.messages, row.tools) for row in rows if row.messages is not None]
    encoded = masking.encode_many(chats, tokenizer, prompt_format, rewritten_turns="expand")
    return texts + [pieces[-1] for pieces in encoded if not isinstance(pieces, DataError)]


@torch.inference_mode()
def _log_probabilities(model, rows: list[tuple[list[int], list[int]]]) -> list[torch.Tensor]:
    """Compute for each row [places, vocabulary] the log-probabilities of what follows these places."""
    model.to("cuda" if torch.cuda.is_available() and _fits_gpu(model) else "cpu")
    found = []
    for ids, places in rows:
        logits = model(input_ids=torch.tensor([ids], device=model.device)).logits[0, places]
        found.append(torch.log_softmax(logits.float(), -1).cpu())
    return found


def _fits_gpu(model) -> bool:
    """Tell whether the weights and half as much again fit what is free."""
    free, _ = torch.cuda.mem_get_info()
    return sum(p.numel() * p.element_size() for p in model.parameters()) * 1.5 < free
