"""An adapter and its base -> one model that plain transformers can load.

    merge_run("quickstart", "models/quickstart")    a run (its best checkpoint, or a named one) or a checkpoint folder

The base is always loaded from its own weights, unquantized, in the dtype they were published in. Each layer is merged
in float32 and rounded once. The written model is then loaded with plain transformers and compared with the adapter and
the base, token by token, before the folder gets its name: in the dtype of the weights, and again in float32 if it
differs by more there than rounding of the weights explains. Examples with images are compared with their pixels.
"""

from __future__ import annotations

import gc
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch

from forgebook.config.blocks import PromptFormat, labels_of
from forgebook.config.parse import load_config
from forgebook.data import masking
from forgebook.data.examples import read_examples, validation_source
from forgebook.data.image_batches import Pixels
from forgebook.data.image_tokens import ImageTokens
from forgebook.data.prompt_formats import as_chat_template, read_prompt_format
from forgebook.errors import CheckpointError, ConfigError, DataError, ModelError, StorageError
from forgebook.inference.loading import base_of, load_for_generation, run_config
from forgebook.models import adapters, load, saved_adapters
from forgebook.models.processor import load_processor
from forgebook.models.tokenizer import load_tokenizer, readable_model_errors, refuse_pickled
from forgebook.models.unused_packages import without_unused
from forgebook.models.vllm_support import vllm_loads
from forgebook.runs import atomic, run
from forgebook.runs.checksums import CHECKSUMS, check_files, write_checksums

__all__ = ["mean_kl", "merge_run", "report_lines"]

# How much the merged model may differ from the adapter, as a share of what the adapter changed: of the mean KL, which
# grows with the square of the change. Rounding to 16 bits took 2e-6 of it on the tiny model.
MAX_LOSS = 0.1
TINY_KL = 1e-4  # between base and adapter: as much as weights in 16 bits are apart from those in 32
# What is compared: the last COMPARED tokens of so many examples, each cut to so many tokens. The log-probabilities of a
# vocabulary of 150,000 then take 0.6 GB.
EXAMPLES, EXAMPLE_TOKENS, COMPARED = 8, 1024, 64

BUILT_IN = (
    "What is the capital of France?",
    "Write a short sentence about the sea.",
    "How many days are there in a leap year?",
    "Explain in one sentence why the sky is blue.",
)


@dataclass(frozen=True)
class Compared:
    """An example's ids, the positions whose predictions are compared, and what a forward pass takes of its images."""

    ids: list[int]
    positions: list[int]
    images: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Merged:
    """The result of merging.

    kl_merged, kl_base: mean KL divergence per token, in nats, of the merged model and of the base from the adapter;
    None if there was no adapter to merge. kl_trained: of the merged model from the adapter on the quantized base that
    it was trained on. compared: which tokens. vllm: "yes" or "perhaps: why".
    """

    folder: Path
    vllm: str
    kl_merged: float | None = None
    kl_base: float | None = None
    kl_trained: float | None = None
    compared: str = ""


def merge_run(
    name: str, out: str | Path, checkpoint: str | None = None, on_stage: Callable[[str], None] = lambda stage: None
) -> Merged:
    """Merge a run's checkpoint into its 16-bit base and write the model to `out`; copy a full fine-tuned checkpoint.

    name: a run's name or folder, or a checkpoint folder. checkpoint: a named one of the run instead of its best.
    on_stage: called with what is being done.

    Raises StorageError if `out` exists, ModelError if the base cannot be merged into, CheckpointError if the adapter
    changes nothing or the merged model differs from it. Then nothing is left at `out`.
    """
    out = Path(out).expanduser()
    if out.exists():
        raise StorageError(f"{out} exists: name a new folder, or delete it first")
    folder = run.find_checkpoint(name, checkpoint)
    with atomic.atomic_folder(out) as staged:
        if adapters.read_lora_config(folder) is None:
            check_files(folder)
            shutil.copytree(folder, staged, dirs_exist_ok=True)
            _write_template(staged)
            write_checksums(staged)
            return Merged(out, vllm_loads(atomic.read_json(staged / "config.json")))
        return _merge(folder, staged, out, on_stage)


def report_lines(merged: Merged) -> list[str]:
    """Report the result of merging, as lines for the console."""
    lines = []
    if merged.kl_merged is None:
        lines.append("the checkpoint is a full model, not an adapter: it was copied unchanged")
    else:
        lines.append(f"mean KL from the adapter, in nats per token, over {merged.compared}:")
        lines.append(f"  merged model  {merged.kl_merged:.2e}")
        lines.append(f"  base model    {merged.kl_base:.2e}")
    if merged.kl_trained is not None:
        lines.append(f"  merged model  {merged.kl_trained:.2e}  from the adapter on the quantized base of its training")
    lines.append(f"vLLM loads it  {merged.vllm}")
    if read_prompt_format(merged.folder) is not None:
        lines.append("its chat template is the prompt format of the training, prompt_format.yaml")
    return [*lines, f"model folder   {run.display_path(merged.folder)}"]


def mean_kl(of: Sequence[torch.Tensor], to: Sequence[torch.Tensor]) -> float:
    """Average over tokens the KL divergence, in nats, of one model's log-probabilities from another's.

    of: for each example [tokens, vocabulary] the log-probabilities that are taken as true; to: the other model's.
    """
    each = [(p.exp() * (p - q)).sum(-1) for p, q in zip(of, to, strict=True)]
    return max(0.0, float(torch.cat(each).double().mean()))


def _merge(folder: Path, staged: Path, out: Path, on_stage: Callable[[str], None]) -> Merged:
    on_stage("loading the base and the adapter")
    overrides = adapters.read_overrides(folder)
    rope_scaling = overrides.get("rope_scaling")
    model, tokenizer = _load_base(folder, rope_scaling)
    examples, compared = _compared_examples(folder, tokenizer)
    on_stage("comparing the adapter with the base")
    base, model, adapter = _without_and_with_adapter(model, folder, examples)
    kl_base = mean_kl(adapter, base)
    if kl_base == 0:
        raise CheckpointError(f"the adapter {folder} changes nothing: the base has the same probabilities ({compared})")
    on_stage("merging and writing")
    _write(_merge_layers(model), folder, staged)
    del model
    gc.collect()
    on_stage("loading the merged model and comparing it with the adapter")
    merged = _log_probabilities(_load_plainly(staged), examples)
    kl_merged = mean_kl(adapter, merged)
    if mean_kl(base, merged) == 0:
        raise CheckpointError(
            f"merging {folder} changed nothing: the merged model equals its base ({compared}). The adapter's change is "
            "lost in rounding: train it longer, or serve the adapter itself"
        )
    if kl_merged > MAX_LOSS * kl_base:
        on_stage("comparing again, in float32")
        # Both models round activations to 16 bits, each in other places, and a router may then choose other experts: a
        # small adapter changes less than that. In float32 the weights alone are compared, at twice the memory.
        base, _, adapter = _without_and_with_adapter(_load_base(folder, rope_scaling)[0].float(), folder, examples)
        gc.collect()
        merged = _log_probabilities(_load_plainly(staged).float(), examples)
        kl_base, kl_merged = mean_kl(adapter, base), mean_kl(adapter, merged)
        compared += ", computed in float32"
    if kl_merged > MAX_LOSS * kl_base:
        lost = " the adapter changes so little that it is lost in rounding: train it longer, or" * (kl_base < TINY_KL)
        raise CheckpointError(
            f"the merged model differs from the adapter {folder}: mean KL per token {kl_merged:.2e}, more than "
            f"{MAX_LOSS:.0%} of the {kl_base:.2e} between base and adapter ({compared}):{lost} serve the adapter itself"
        )
    kl_trained = None
    if overrides.get("quantization"):
        kl_trained = mean_kl(_log_probabilities(load_for_generation(folder)[0], examples), merged)
    return Merged(out, vllm_loads(atomic.read_json(staged / "config.json")), kl_merged, kl_base, kl_trained, compared)


# The models -------------------------------------------------------------------------------------------


def _load_base(folder: Path, rope_scaling: dict[str, Any] | None):
    """Load an adapter's base in its own dtype, however it was quantized in training, and the adapter's tokenizer."""
    from transformers import AutoConfig

    refuse_pickled(str(folder))
    check_files(folder)
    source, _ = base_of(folder)
    try:
        with readable_model_errors(source, "model"):
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except ModelError as error:
        raise ModelError(f"the base of {folder} could not be read: {error}") from None
    if getattr(config, "quantization_config", None):
        raise ModelError(
            f"the base {source} is itself quantized: an adapter can be merged into 16-bit weights only. Set "
            f"base_model_name_or_path in {folder / 'adapter_config.json'} to the 16-bit model"
        )
    dtype = str(config.get_text_config().dtype or config.dtype or "bfloat16").removeprefix("torch.")
    config_of_run = run_config(folder)
    # On the CPU, where the whole model fits; its attention kernel has to run there and on a GPU.
    model = load.load_model(
        source,
        dtype=dtype,
        attention=config_of_run.attention if config_of_run else "auto",
        attention_is_required=False,
        rope_scaling=rope_scaling,
        on_gpu=False,
    )
    tokenizer = load_tokenizer(str(folder))
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    _untie(model)
    return model.eval(), tokenizer


def _load_plainly(folder: Path):
    """Load a model folder as any user of transformers would."""
    from transformers import AutoConfig

    kind = load.auto_class(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    return kind.from_pretrained(folder, trust_remote_code=False).eval()


def _untie(model) -> None:
    """Give the output layer its own weights: an adapter on one of two tied layers changes that one alone."""
    output = model.get_output_embeddings()
    if output is not None and output.weight is model.get_input_embeddings().weight:
        output.weight = torch.nn.Parameter(output.weight.detach().clone(), requires_grad=False)


def _tie_again(model) -> None:
    """Tie the output layer to the embeddings if they are equal, and record in the config whether they are."""
    embeddings, output = model.get_input_embeddings(), model.get_output_embeddings()
    if output is not None and model.config.tie_word_embeddings:
        model.config.tie_word_embeddings = torch.equal(output.weight, embeddings.weight)
        model.tie_weights()


@torch.no_grad()
def _merge_layers(model):
    """Merge every LoRA layer in float32, one at a time, rounding once; then everything else that an adapter has."""
    from forgebook.models.peft_library import LoraLayer

    was_tied = model.get_base_model().config.tie_word_embeddings
    for layer in [module for module in model.modules() if isinstance(module, LoraLayer)]:
        own = layer.get_base_layer()
        # An adapter of experts belongs to a parameter that holds all of them: there is no layer with a weight.
        dtype = getattr(own, getattr(layer, "parameter_name", "weight")).dtype
        cast(Any, layer).float().merge(safe_merge=True)  # every LoraLayer is a torch module too
        own.to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that these layers are merged already
        merged = model.merge_and_unload()
    merged.config.tie_word_embeddings = was_tied
    _tie_again(merged)
    return merged


def _write(model, folder: Path, out: Path) -> None:
    """Write the merged model and all files of the checkpoint that are not the adapter's, such as the tokenizer."""
    with without_unused("deepspeed"):
        model.save_pretrained(out)
    of_the_adapter = {"README.md", CHECKSUMS, adapters.OVERRIDES}
    for path in folder.iterdir():
        if path.is_file() and not path.name.startswith("adapter_") and path.name not in of_the_adapter:
            shutil.copy2(path, out / path.name)
    _write_template(out)
    write_checksums(out)


def _write_template(out: Path) -> None:
    """Write a model's prompt format as its chat template, for programs that know chat templates only."""
    prompt_format = read_prompt_format(out)
    if prompt_format is not None:
        (out / "chat_template.jinja").write_text(as_chat_template(prompt_format))


# What is compared -------------------------------------------------------------------------------------


def _compared_examples(folder: Path, tokenizer) -> tuple[list[Compared], str]:
    """Choose examples and the positions in them whose predictions are compared; describe both."""
    prompt_format = read_prompt_format(folder)
    with tempfile.TemporaryDirectory() as store:
        examples, reads_images = _validation_examples(folder, tokenizer, prompt_format, Path(store))
    origin = "examples of the run's validation file"
    if not examples:
        origin = "built-in prompts"
        conversations = [[{"role": "user", "content": text}] for text in BUILT_IN]
        prompts = [masking.encode_prompt(messages, tokenizer, prompt_format) for messages in conversations]
        examples = [_compared(masking.Encoded(ids, [True] * len(ids))) for ids in prompts]
    if reads_images:
        origin += f", {sum(bool(one.images) for one in examples)} of them with images"
    return examples, f"{sum(len(one.positions) for one in examples)} tokens of {len(examples)} {origin}"


def _validation_examples(
    folder: Path, tokenizer, prompt_format: PromptFormat | None, store: Path
) -> tuple[list[Compared], bool]:
    """Encode the first examples of the run's validation file, none if there is no such file any more.

    Also return whether the run reads images. store: where those are kept that are no local files.
    """
    try:
        found = run.find_run(str(folder.parent.parent))
        config = load_config(found.config)
    except (ConfigError, StorageError):
        return [], False
    reads_images = config.vision_language_config is not None
    try:
        source = validation_source(found, config.valid_path)
        if source is None or config.task is None:
            return [], reads_images
        labels = labels_of(config.classifier_config)
        examples = read_examples(source, config.task, EXAMPLES, labels, "drop")
        images = ImageTokens(load_processor(base_of(folder)[0], tokenizer), store) if reads_images else None
        chats = [(one.messages, one.tools) for one in examples if one.messages is not None]
        chats = [(images.checked(messages), tools) for messages, tools in chats] if images else chats
    except (ConfigError, DataError, StorageError):
        return [], reads_images
    texts = [masking.encode_text(one.text, tokenizer) for one in examples if one.text is not None]
    encoded = masking.encode_many(chats, tokenizer, prompt_format, rewritten_turns="expand", images=images)
    valid = texts + [pieces[-1] for pieces in encoded if not isinstance(pieces, DataError)]
    pixels = Pixels(images.processor, "float32") if images else None
    return [_compared(one, pixels, store) for one in valid], reads_images


def _compared(one: masking.Encoded, pixels: Pixels | None = None, store: Path | None = None) -> Compared:
    """Choose what is compared of an encoded example, which is cut behind its images."""
    stop = max(EXAMPLE_TOKENS, *(image.stop + COMPARED for image in one.images), 0)
    ids, mask = one.input_ids[:stop], one.loss_mask[:stop]
    # The prediction of token k is made at k - 1. An example cut before its answer is compared at its prompt.
    positions = [k - 1 for k in range(1, len(ids)) if mask[k]] or list(range(len(ids) - 1))
    inputs = {}
    if pixels is not None and store is not None and one.images:
        inputs = pixels.inputs([[(image, store) for image in one.images]], torch.tensor([ids]))
    return Compared(ids, positions[-COMPARED:], inputs)


def _without_and_with_adapter(base, folder: Path, examples: list[Compared]):
    """Compute a base's log-probabilities, load an adapter onto it, and compute those of the two together.

    The base comes first: what an adapter holds in place of the base's (biases) stays when PEFT turns it off.
    Returns (the base's log-probabilities, the model with its adapter, that model's log-probabilities).
    """
    without = _log_probabilities(base, examples)
    model = saved_adapters.attach_adapter(base, str(folder)).eval()
    return without, model, _log_probabilities(model, examples)


@torch.inference_mode()
def _log_probabilities(model, examples: list[Compared]) -> list[torch.Tensor]:
    """Compute for each example [positions, vocabulary] the log-probabilities of the token that follows.

    In float64: a KL divergence is of second order in differences, and one of 1e-8 is rounding in float32.
    """
    model.to("cuda" if torch.cuda.is_available() and _fits_gpu(model) else "cpu")
    log_probabilities = []
    for one in examples:
        inputs = {"input_ids": torch.tensor([one.ids]), **one.images}
        sent = {name: value.to(model.device) for name, value in inputs.items()}
        sent = {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in sent.items()}
        logits = model(**sent).logits[0, one.positions]
        log_probabilities.append(torch.log_softmax(logits.double(), -1).cpu())
    return log_probabilities


def _fits_gpu(model) -> bool:
    """Return whether the weights and half as much again fit in the GPU's free memory."""
    free, _ = torch.cuda.mem_get_info()
    return sum(p.numel() * p.element_size() for p in model.parameters()) * 1.5 < free
