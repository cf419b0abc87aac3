"""Tokenizer and weights: from a local folder, a hub id, s3:// or gs://; LoRA or full parameter.

source    = locate(config.model_id)               a local folder or a hub id
tokenizer = load_tokenizer(source)
model     = load_model(source, dtype=..., attention=...)
model     = add_lora(model, config.lora_config)   or continue_lora(model, adapter_folder)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forgebook.errors import ModelError
from forgebook.models import adapters
from forgebook.models.vllm_support import vllm_serves
from forgebook.runs import run

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from forgebook.config.parse import FinetuneConfig, HubRepo

__all__ = [
    "TINY_MODEL",
    "add_embedding_noise",
    "add_lora",
    "check_adapter",
    "context_limit",
    "continue_lora",
    "fit_vocabulary",
    "load_model",
    "load_start",
    "load_tokenizer",
    "locate",
    "native_context_length",
    "parameter_counts",
    "tokenizer_of",
    "tokenizer_source",
    "vllm_serves",
]

# The embedded model: what `model_id: tiny` means.
TINY_MODEL = Path(__file__).resolve().parents[2] / "tiny_model"


def locate(model: str | HubRepo) -> str:
    """Turn a config's model path, URI, hub id or {repo_id: ...} into what `from_pretrained` takes.

    Raises StorageError for a URI or path that holds nothing.
    """
    if not isinstance(model, str):
        return _fetch_repo(model)
    if model == "tiny":
        return str(TINY_MODEL)
    looks_local = model.startswith((".", "/", "~")) or Path(model).is_dir()
    if run.is_remote(model) or looks_local:
        return str(run.fetch_folder(model).resolve())
    return model


def _fetch_repo(repo: HubRepo) -> str:
    """Download a repository's snapshot from the hub, once; return its folder."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return snapshot_download(repo.repo_id, revision=repo.revision)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(f"{repo.repo_id} could not be fetched from the hub: {_first_line(error)}") from None


def tokenizer_source(config: FinetuneConfig) -> str:
    """Name where the tokenizer comes from: the checkpoint continued from, if it has one, else the base model."""
    for start in (config.initial_adapter_model_ckpt_path, config.initial_base_model_ckpt_path):
        if start is not None:
            source = locate(start)
            if (Path(source) / "tokenizer_config.json").exists():
                return source
    return locate(config.model_id)


def tokenizer_of(config: FinetuneConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer that a config trains with; a classifier's labels are tokens of it."""
    labels = config.classifier_config.label_tokens if config.classifier_config else []
    return load_tokenizer(tokenizer_source(config), labels)


def load_tokenizer(source: str, labels: Sequence[str] = ()) -> PreTrainedTokenizerBase:
    """Load a tokenizer that can pad on the right; add a token for each label that it does not have."""
    from tokenizers import AddedToken
    from transformers import AutoTokenizer

    with _readable_errors(source, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(source)
    if not tokenizer.is_fast:
        raise ModelError(f"the tokenizer of {source} has no fast version, which the masks need (character offsets)")
    if tokenizer.pad_token is None:
        # Harmless: masks go by position, so padding with the end token hides no end token.
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    # Not "special" ones: they are answers, to be seen when a text is decoded. A word is a label only as a whole.
    tokenizer.add_tokens([AddedToken(label, normalized=False, single_word=label.isalnum()) for label in labels])
    return tokenizer


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
) -> PreTrainedModel:
    """Load a causal language model for training, on the CPU (ZeRO-3: in partitions, as DeepSpeed has arranged).

    device_map: "auto" loads it for use instead: on the GPU, or over several if one cannot hold it.
    quantization: "nf4" or "int8": the linear layers but the output layer, for training an adapter on them; such
    a model is loaded where it stays, on this process's GPU if there is one.

    Raises ModelError if there is none at `source`, or it cannot run as asked.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with _readable_errors(source, "model"):
        model_config = AutoConfig.from_pretrained(source)
        if rope_scaling is not None:
            model_config.rope_parameters = {**(model_config.rope_parameters or {}), **rope_scaling}
        model = AutoModelForCausalLM.from_pretrained(
            source,
            config=model_config,
            dtype=getattr(torch, dtype),
            attn_implementation=_attention(attention),
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


def _attention(kind: str) -> str:
    """Name the attention that transformers is to use; "auto" is flash attention where it can run, else SDPA."""
    from transformers.utils import is_flash_attn_2_available

    if kind == "auto":
        return "flash_attention_2" if is_flash_attn_2_available() else "sdpa"
    if kind == "flash_attention_2" and not is_flash_attn_2_available():
        raise ModelError(
            "attention: flash_attention_2 needs a GPU and the package flash-attn; auto takes what is there"
        )
    return "flex_attention" if kind == "flex" else kind


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


def add_lora(model: PreTrainedModel, lora_config: dict[str, Any]):
    """Put a new LoRA adapter on a model; only the adapter trains. Raises ModelError if it fits nowhere."""
    from peft import LoraConfig, get_peft_model

    try:
        config = LoraConfig(**{"task_type": "CAUSAL_LM", **lora_config})
        return _in_dtype_of_base(get_peft_model(model, config, autocast_adapter_dtype=False))
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ModelError(f"lora_config does not fit this model: {_first_line(error)}") from None


def check_adapter(source: str, lora_config: dict[str, Any], rope_scaling: dict[str, Any] | None = None) -> None:
    """Raise ModelError unless a saved adapter is the one that a config speaks of."""
    earlier, named = adapters.read_overrides(source).get("rope_scaling"), run.shown(Path(source))
    if earlier != rope_scaling:
        raise ModelError(
            f"the adapter {named} was trained with rope_scaling: {earlier or 'null'}, the config says "
            f"{rope_scaling or 'null'}: give it the same"
        )
    with _readable_errors(source, "adapter"):
        if Path(source).is_dir():  # PEFT is slow to import, and not quiet
            saved = json.loads((Path(source) / "adapter_config.json").read_text())
        else:
            from peft import PeftConfig

            saved = PeftConfig.from_pretrained(source).to_dict()
    for key in ("r", "lora_alpha", "use_dora", "use_rslora"):
        if key in lora_config and lora_config[key] != saved.get(key, False):
            raise ModelError(
                f"the adapter {named} has {key}: {saved.get(key, False)}, lora_config says {lora_config[key]}: "
                "an adapter is continued as it is; leave the key out or give it the same"
            )


def continue_lora(
    model: PreTrainedModel,
    source: str,
    lora_config: dict[str, Any],
    rope_scaling: dict[str, Any] | None = None,
):
    """Put a trained LoRA adapter on a model, to be trained further.

    lora_config: what the config says of the adapter; rope_scaling: that of `model`.

    Raises ModelError if the adapter is another one than these say.
    """
    from peft import PeftModel

    check_adapter(source, lora_config, rope_scaling)
    with _readable_errors(source, "adapter"):
        model = PeftModel.from_pretrained(model, source, is_trainable=True, autocast_adapter_dtype=False)
    return _in_dtype_of_base(model)


def _in_dtype_of_base(model):
    """Give the adapter the base's dtype, which PEFT cannot see in packed weights; the optimizer keeps float32."""
    for p in model.parameters():
        if p.requires_grad and p.dtype != model.dtype:
            p.data = p.data.to(model.dtype)
    return model


def add_embedding_noise(model, alpha: float) -> None:
    """Add NEFTune's noise to the input embeddings whenever the model is in training mode.

    alpha: the noise is uniform in +-alpha / sqrt(length * width). It comes from torch's random numbers, which a
    run seeds and keeps when it is continued.
    """
    import torch

    def noisy(layer, inputs, output: torch.Tensor) -> torch.Tensor:
        if not layer.training:
            return output
        size = alpha / (output.shape[-2] * output.shape[-1]) ** 0.5
        return output + torch.empty_like(output).uniform_(-size, size)

    model.get_input_embeddings().register_forward_hook(noisy)


def parameter_counts(model) -> tuple[int, int]:
    """Count (all, trainable) parameters; ZeRO-3's partitioned ones at their full size.

    Raises ModelError if nothing is trainable.
    """
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    trainable = sum(size for size, trains in sizes if trains)
    if not trainable:
        raise ModelError("no parameter is trainable: is the adapter of initial_adapter_model_ckpt_path frozen?")
    return sum(size for size, _ in sizes), trainable


def native_context_length(source: str) -> int:
    """Read the longest context, in tokens, that a model was made for."""
    from transformers import AutoConfig

    with _readable_errors(source, "model"):
        config: PretrainedConfig = AutoConfig.from_pretrained(source)
    native = getattr(config.get_text_config(), "max_position_embeddings", None)
    if native is None:  # Mamba has no such limit
        raise ModelError(f"the config of {source} names no longest context: set context_length")
    return native


def context_limit(source: str, rope_scaling: dict[str, Any] | None = None) -> int | None:
    """Tell how long a context the model's positions reach, stretched as `rope_scaling` says; None if any."""
    from transformers import AutoConfig

    with _readable_errors(source, "model"):
        config = AutoConfig.from_pretrained(source).get_text_config()
    native = getattr(config, "max_position_embeddings", None)
    if native is None:
        return None
    # Without one of ours: the base may be a checkpoint that was stretched already.
    scaling = rope_scaling or getattr(config, "rope_parameters", None) or {}
    original = scaling.get("original_max_position_embeddings") or native
    return max(native, int(original * (scaling.get("factor") or 1)))


class _readable_errors:
    """Turn what transformers raises for a missing or broken model into a ModelError of one sentence."""

    def __init__(self, source: str, what: str):
        self.source, self.what = source, what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, traceback) -> None:
        # OSError: not there, no network; ValueError: unknown architecture, unusable attention; KeyError: bad config.
        if isinstance(error, OSError | ValueError | KeyError) and not isinstance(error, ModelError):
            raise ModelError(f"no {self.what} could be loaded from {self.source!r}: {_first_line(error)}") from None


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]
