"""Model weights: loaded from a local folder, a hub id, s3:// or gs://, and fitted to their tokenizer.

source = locate(config.model_id)                  a local folder or a hub id
model  = load_model(source, dtype=..., attention=...)
model  = load_start(config, tokenizer)            what a run begins with: the base, and the adapter it continues
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from forgebook.errors import ModelError
from forgebook.models.adapters import continue_lora
from forgebook.models.attention import attention_facts, choose_attention
from forgebook.models.tokenizer import locate, readable_model_errors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from forgebook.config.parse import FinetuneConfig

__all__ = ["fit_vocabulary", "load_model", "load_start", "parameter_counts"]


def fit_vocabulary(model: PreTrainedModel, tokenizer, config: FinetuneConfig) -> dict[str, Any]:
    """Give the model a row for each token of its tokenizer; return what LoRA has to know to train the labels' rows."""
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    if config.classifier_config is None or not config.is_lora:
        return {}
    rows = [tokenizer.convert_tokens_to_ids(label) for label in config.classifier_config.label_tokens]
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    names = {id(module): name.rsplit(".", 1)[-1] for name, module in model.named_modules()}
    is_tied = layers[0].weight is layers[1].weight
    chosen = [names[id(layer)] for layer in layers[: 1 if is_tied else 2]]
    # The config may say itself how the embeddings are trained; other modules to save train no label.
    if "trainable_token_indices" in config.lora_config or set(chosen) & set(
        config.lora_config.get("modules_to_save") or []
    ):
        return {}
    return {"trainable_token_indices": dict.fromkeys(chosen, rows)}


def load_model(
    source: str,
    *,
    dtype: str = "bfloat16",
    attention: str = "auto",
    rope_scaling: dict[str, Any] | None = None,
    quantization: str | None = None,
    gradient_checkpointing: bool = False,
    device_map: str | None = None,
    on_gpu: bool | None = None,
) -> PreTrainedModel:
    """Load a causal language model for training, on the CPU (ZeRO-3: in partitions, as DeepSpeed has arranged).

    device_map: "auto" loads it for use instead: on the GPU, or over several if one cannot hold it.
    quantization: "nf4" or "int8": the linear layers but the output layer, for training an adapter on them; such
    a model is loaded where it stays, on this process's GPU if there is one.
    on_gpu: False if the model stays on the CPU; None: it runs on this process's GPU if there is one.

    Raises ModelError if there is none at `source`, ResourceError if `attention` cannot run here.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with readable_model_errors(source, "model"):
        model_config = AutoConfig.from_pretrained(source)
        if rope_scaling is not None:
            model_config.rope_parameters = {**(model_config.rope_parameters or {}), **rope_scaling}
        model = AutoModelForCausalLM.from_pretrained(
            source,
            config=model_config,
            dtype=getattr(torch, dtype),
            attn_implementation=choose_attention(attention, attention_facts(dtype, on_gpu)),
            **{"device_map": device_map, **_quantized(quantization, dtype)},
        )
    for module in model.modules():
        # On some CPUs an evaluation would repack 4-bit weights for kernels that have no backward pass, for good.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if gradient_checkpointing:
        # The reentrant kind loses the gradients of LoRA when the inputs themselves need none.
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    return model


def _quantized(kind: str | None, dtype: str) -> dict[str, Any]:
    """Say to `from_pretrained` how bitsandbytes is to hold the weights."""
    if kind is None:
        return {}
    import logging

    import torch
    from transformers import BitsAndBytesConfig

    # It tells of its float16 at every call of every layer.
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
    place = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    return {"quantization_config": settings, "device_map": {"": place}}


def load_start(config: FinetuneConfig, tokenizer) -> PreTrainedModel:
    """Load what a run begins with, not to be trained: the base, with the adapter that it continues if it does."""
    model = load_model(
        locate(config.initial_base_model_ckpt_path or config.model_id), dtype=config.dtype, attention=config.attention,
        rope_scaling=config.rope_scaling, quantization=config.quantization,
    )  # fmt: skip
    fit_vocabulary(model, tokenizer, config)
    if config.initial_adapter_model_ckpt_path is not None:
        adapter = locate(config.initial_adapter_model_ckpt_path)
        model = continue_lora(model, adapter, config.lora_config, config.rope_scaling)
    return model


def parameter_counts(model) -> tuple[int, int]:
    """Count (all, trainable) parameters; ZeRO-3's partitioned ones at their full size.

    Raises ModelError if nothing is trainable.
    """
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    trainable = sum(size for size, trains in sizes if trains)
    if not trainable:
        raise ModelError("no parameter is trainable: is the adapter of initial_adapter_model_ckpt_path frozen?")
    return sum(size for size, _ in sizes), trainable
