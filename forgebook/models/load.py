"""Model weights: loaded from a local folder, a hub id, s3:// or gs://, and fitted to their tokenizer.

source = locate(config.model_id)                  a local folder or a hub id
model  = load_model(source, dtype=..., attention=...)
model  = load_start(config, tokenizer)            what a run begins with: the base, and the adapter it continues
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from forgebook.catalog import hub_id_of
from forgebook.errors import ModelError
from forgebook.models import attention as attention_kernels
from forgebook.models import cpu_bfloat16, varlen_attention
from forgebook.models.attention import attention_facts, choose_attention, lacking_kernels
from forgebook.models.saved_adapters import continue_lora
from forgebook.models.tokenizer import locate, readable_model_errors, refuse_pickled
from forgebook.models.unused_packages import without_unused
from forgebook.runs.checksums import check_files

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from forgebook.config.schema import FinetuneConfig

__all__ = [
    "auto_class",
    "check_attention",
    "check_slices",
    "fit_vocabulary",
    "load_model",
    "load_skeleton",
    "load_start",
    "model_class",
    "padding_note",
    "parameter_counts",
    "start_labels",
]


def fit_vocabulary(
    model: PreTrainedModel, tokenizer, labels: Sequence[str], lora_config: dict[str, Any] | None
) -> dict[str, Any]:
    """Give the model an embedding for each token of its tokenizer; return additions to `lora_config` for the labels.

    labels: a classifier's label tokens. An adapter alone would leave their embeddings untrained, so LoRA gets them as
    trainable_token_indices, unless `lora_config` says itself how the embeddings are trained.
    """
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    if not labels or lora_config is None:
        return {}
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    names = {id(module): name.rsplit(".", 1)[-1] for name, module in model.named_modules()}
    is_tied = layers[0].weight is layers[1].weight
    embeddings = [names[id(layer)] for layer in layers[: 1 if is_tied else 2]]
    if "trainable_token_indices" in lora_config or set(embeddings) & set(lora_config.get("modules_to_save") or []):
        return {}
    return {"trainable_token_indices": dict.fromkeys(embeddings, tokenizer.convert_tokens_to_ids(list(labels)))}


def start_labels(model: PreTrainedModel, pieces: dict[int, list[int]]) -> None:
    """Start the embeddings of new labels, in input and output layer, from the mean over the pieces of their texts.

    pieces: token ids by the label's. The rows that resizing adds have no relation to the labels' meaning: a real model
    gives them probabilities of e^-18, and an epoch of a few hundred examples ends before its adapter has learned both
    to answer with a label and with which one. Collective under ZeRO-3, which partitions the rows.
    """
    import torch
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    weights = {
        id(layer.weight): layer.weight for layer in (model.get_input_embeddings(), model.get_output_embeddings())
    }
    for weight in weights.values() if pieces else ():
        gathered: Any = contextlib.nullcontext()
        if is_deepspeed_zero3_enabled():
            import deepspeed

            gathered = deepspeed.zero.GatheredParameters([weight], modifier_rank=0)
        with gathered, torch.no_grad():
            for label, ids in pieces.items():
                weight[label] = weight[ids].float().mean(0)


def auto_class(model_config: PretrainedConfig) -> Any:
    """Choose the class to load a causal language model with: the published one, whose names an adapter must fit.

    transformers would load Qwen3.5 and Llama 4 without their vision towers, as models whose layers have other names.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.utils.import_utils import is_scipy_available

    with without_unused("scipy", is_scipy_available):
        import transformers.loss.loss_utils  # noqa: F401  # those of object detection alone need SciPy
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as READS_IMAGES

    published = READS_IMAGES.get(model_config.model_type)
    is_published = published is not None and published in (model_config.architectures or [])
    return AutoModelForImageTextToText if is_published else AutoModelForCausalLM


def model_class(model_config: PretrainedConfig) -> type | None:
    """Return the class that a model is loaded as; None if transformers has none for it."""
    mapping = auto_class(model_config)._model_mapping
    return mapping.get(type(model_config), None)


def load_model(
    source: str,
    *,
    dtype: str = "bfloat16",
    attention: str = "auto",
    rope_scaling: dict[str, Any] | None = None,
    quantization: str | None = None,
    gradient_checkpointing: bool | str = False,
    device_map: str | None = None,
    on_gpu: bool | None = None,
    reads_images: bool = False,
    attention_is_required: bool = True,
    in_parts: Callable[[Any], Any] | None = None,
) -> PreTrainedModel:
    """Load a causal language model for training, on the CPU (under ZeRO-3 in partitions, one per rank).

    device_map: "auto" loads it for inference instead: on the GPU, or over several if one cannot hold it.
    quantization: "nf4" or "int8" for all linear layers but the output layer, for training an adapter on them; such a
    model is loaded where it stays, on this process's GPU if there is one.
    on_gpu: False if the model stays on the CPU; None: it runs on this process's GPU if there is one.
    gradient_checkpointing: recompute activations in the backward pass; "selective": all but products and attention;
        "offload": all, with the layers' inputs in the host's memory.
    reads_images: whether its forward pass will get images.
    attention_is_required: False takes another kernel where `attention` cannot run here.
    in_parts: makes a class that reads a part of each weight, as `parts.read_in_parts` does; weights stay whole where
        the files lack some, or hold packed ones.

    Raises ModelError if there is none at `source`, ResourceError if `attention` cannot run here.
    """
    import torch
    from transformers import AutoConfig

    from forgebook.models.checkpointing import checkpointing_settings, drop_input_gradients, offload_inputs

    if dtype == "bfloat16" and not torch.cuda.is_available() and cpu_bfloat16.is_needed():
        cpu_bfloat16.use_float32_products()
    varlen_attention.register()
    refuse_pickled(source)
    check_files(source)
    with readable_model_errors(source, "model"), _bars_in_terminals_only():
        model_config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        if rope_scaling is not None:
            text_config = model_config.get_text_config()
            text_config.rope_parameters = {**(text_config.rope_parameters or {}), **rope_scaling}
        facts = attention_facts(dtype, on_gpu, model_class(model_config), model_config)
        if device_map is not None:
            facts = replace(facts, not_varlen="it is used for inference")
        if reads_images:
            facts = replace(facts, not_varlen="it reads images")
        settings = {"device_map": device_map, **_whole_experts(model_config), **_quantized(quantization, dtype)}
        model = _from_pretrained(
            source,
            model_config,
            None if "quantization_config" in settings else in_parts,
            config=model_config,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=getattr(torch, dtype),
            attn_implementation=choose_attention(attention, facts, attention_is_required),
            **settings,
        )
    if hub_id := hub_id_of(source):  # others have no such mirror: an adapter names its base as the hub does
        model.name_or_path = model.config._name_or_path = hub_id
    for module in model.modules():
        # On some CPUs an evaluation would repack 4-bit weights, for good, for kernels without a backward pass.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if gradient_checkpointing:
        settings = checkpointing_settings(gradient_checkpointing)
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
        drop_input_gradients(model)
    if gradient_checkpointing == "offload":
        offload_inputs(model)
    return model


def _from_pretrained(
    source: str, model_config: PretrainedConfig, in_parts: Callable[[Any], Any] | None, **settings: Any
) -> Any:
    own = model_class(model_config) if in_parts is not None else None
    if in_parts is not None and own is not None:
        import torch

        random = torch.get_rng_state()
        model, report = in_parts(own).from_pretrained(source, output_loading_info=True, **settings)
        if not report["missing_keys"]:
            return model
        # Those are random: sampled whole, they are the same however many ranks there are.
        torch.set_rng_state(random)
    return auto_class(model_config).from_pretrained(source, **settings)


def _whole_experts(model_config: PretrainedConfig) -> dict[str, Any]:
    """Make the argument of `from_pretrained` that unpacks the MXFP4 weights of gpt-oss, which cannot be trained."""
    from transformers import Mxfp4Config

    stated = getattr(model_config, "quantization_config", None) or {}
    method = stated.get("quant_method") if isinstance(stated, dict) else stated.quant_method
    return {"quantization_config": Mxfp4Config(dequantize=True)} if method == "mxfp4" else {}


@contextlib.contextmanager
def _bars_in_terminals_only() -> Iterator[None]:
    """Keep transformers from drawing progress bars into logs and notebooks, where each of their states is text."""
    from transformers.utils import logging

    terminal = sys.stderr.isatty() and "JPY_PARENT_PID" not in os.environ  # a notebook's cannot move its cursor
    if terminal or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def _quantized(kind: str | None, dtype: str) -> dict[str, Any]:
    """Make the arguments of `from_pretrained` for weights held by bitsandbytes."""
    if kind is None:
        return {}
    import logging

    import torch
    from transformers import BitsAndBytesConfig

    # It logs a cast to float16 at every call of every layer.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    if kind == "nf4":  # as in the QLoRA paper, arXiv 2305.14314
        settings = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, dtype),
        )
    else:
        settings = BitsAndBytesConfig(load_in_8bit=True)
    device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    return {"quantization_config": settings, "device_map": {"": device}}


def padding_note(model: Any, attention: str, dtype: str) -> str | None:
    """Return why a loaded model computes padding along on this GPU, which is slower; None if it does not."""
    facts = attention_facts(dtype, None, model_class(model.config), model.config)
    return attention_kernels.padding_note(attention, facts)


def load_skeleton(source: str) -> PreTrainedModel:
    """Build a model without weights from its config.json: its layers have names and shapes alone."""
    import torch
    from transformers import AutoConfig

    with readable_model_errors(source, "model"), torch.device("meta"):
        model_config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        return auto_class(model_config).from_config(model_config, trust_remote_code=False)


def check_attention(source: str, attention: str) -> None:
    """Raise ModelError if a model has no code for the attention kernel that the config names."""
    from transformers import AutoConfig

    with readable_model_errors(source, "model"):
        lacking = lacking_kernels(model_class(AutoConfig.from_pretrained(source, trust_remote_code=False)))
    if attention in lacking:
        raise ModelError(
            f"attention: {attention} is not implemented for the architecture of this model: set attention: auto"
        )


def check_slices(source: str, size: int) -> None:
    """Raise ModelError if workers cannot share the examples of a model in groups of this size."""
    from transformers import AutoConfig

    from forgebook.models.sequence_parallel import why_not_divided

    with readable_model_errors(source, "model"):
        reason = why_not_divided(AutoConfig.from_pretrained(source, trust_remote_code=False), size)
    if reason is not None:
        raise ModelError(f"sequence_parallel: {size} does not work with this model: {reason}; set it to 1")


def load_start(config: FinetuneConfig, tokenizer) -> PreTrainedModel:
    """Load what a run starts from, for use, not training: the base, with the adapter that it continues if any."""
    model = load_model(
        locate(config.initial_base_model_ckpt_path or config.model_id),
        dtype=config.dtype,
        attention=config.attention,
        rope_scaling=config.rope_scaling,
        quantization=config.quantization,
    )
    fit_vocabulary(model, tokenizer, (), None)
    if config.initial_adapter_model_ckpt_path is None:
        return model
    adapter = locate(config.initial_adapter_model_ckpt_path)
    return continue_lora(model, adapter, config.lora_config or {}, config.rope_scaling)


def parameter_counts(model) -> tuple[int, int]:
    """Count (all, trainable) parameters; ZeRO-3's partitioned and 4-bit packed ones at their full size.

    Raises ModelError if nothing is trainable.
    """
    sizes = [(_full_size(p), p.requires_grad) for p in model.parameters()]
    trainable = sum(size for size, trains in sizes if trains)
    if not trainable:
        raise ModelError("no parameter is trainable: is the adapter of initial_adapter_model_ckpt_path frozen?")
    return sum(size for size, _ in sizes), trainable


def _full_size(parameter) -> int:
    packed = getattr(parameter, "quant_state", None)  # bitsandbytes holds two 4-bit weights in one byte
    return packed.shape.numel() if packed is not None else getattr(parameter, "ds_numel", parameter.numel())
