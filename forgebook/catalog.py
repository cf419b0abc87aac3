"""Facts: GPUs with memory, peak and price; the shapes of core models. Read from catalog.yaml, without torch.

shape = shape_of(model_id)              from the catalog, or from config.json in a local folder
count, gpu = hardware_of("8xA100-80G")
"""

from __future__ import annotations

import functools
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from forgebook.errors import ConfigError, ModelError, near_miss

__all__ = ["TINY_MODEL", "Catalog", "Gpu", "Linear", "Shape", "hardware_of", "model_folder", "read_catalog", "shape_of"]

_HERE = Path(__file__).resolve().parent
# The model in this repository: what `model_id: tiny` means.
TINY_MODEL = _HERE.parent / "tiny_model"
# What sets an architecture apart from Llama's: norms per layer, norms of queries and keys, biases of q, k and v,
# and products that are made as one layer.
_QK_NORM = ("qwen3", "gemma3_text")
_FOUR_NORMS = ("gemma2", "gemma3_text")
_KNOWN = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "mixtral", "phi3")
_NEEDED = {
    "num_hidden_layers": "layers", "hidden_size": "hidden", "intermediate_size": "intermediate",
    "num_attention_heads": "heads", "vocab_size": "vocab",
}  # fmt: skip

# What Gemma 3's config.json leaves to transformers' defaults (Gemma3TextConfig).
_LEFT_OUT = {
    "gemma3_text": {
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208,
        "max_position_embeddings": 131072,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU. memory: bytes; peak: FLOP/s of dense bfloat16 products; price: USD per hour; None: unknown.

    bfloat16: whether it computes in that format itself.
    """

    name: str
    memory: int
    peak: float | None
    price: float | None
    note: str = ""
    bfloat16: bool = True


@dataclass(frozen=True)
class Linear:
    """A linear layer that occurs once per decoder layer. holder: attention, mlp or experts."""

    inputs: int
    outputs: int
    holder: str


@dataclass(frozen=True)
class Shape:
    """The shape of a decoder: all that its parameters, activations and FLOPs depend on."""

    model_type: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int | None
    tied: bool = False
    experts: int = 1
    active_experts: int = 1
    attention_bias: bool = False
    mlp_bias: bool = False

    @property
    def linears(self) -> dict[str, Linear]:
        """Name the linear layers of one decoder layer, as transformers does; experts are not among them."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        if self.model_type == "phi3":
            found = {"qkv_proj": Linear(self.hidden, q + 2 * kv, "attention")}
        else:
            found = {"q_proj": Linear(self.hidden, q, "attention")}
            found |= {name: Linear(self.hidden, kv, "attention") for name in ("k_proj", "v_proj")}
        found["o_proj"] = Linear(q, self.hidden, "attention")
        if self.model_type == "phi3":
            found["gate_up_proj"] = Linear(self.hidden, 2 * self.intermediate, "mlp")
        elif self.experts == 1:
            found |= {name: Linear(self.hidden, self.intermediate, "mlp") for name in ("gate_proj", "up_proj")}
        if self.experts == 1:
            found["down_proj"] = Linear(self.intermediate, self.hidden, "mlp")
        return found

    @property
    def expert_parameters(self) -> int:
        """Count the parameters of all experts of one layer; 0 if it has an ordinary MLP."""
        return self.experts * 3 * self.hidden * self.intermediate if self.experts > 1 else 0

    @property
    def layer_parameters(self) -> int:
        """Count the parameters of one decoder layer."""
        products = sum(one.inputs * one.outputs for one in self.linears.values()) + self.expert_parameters
        router = self.hidden * self.experts if self.experts > 1 else 0
        norms = self.hidden * (4 if self.model_type in _FOUR_NORMS else 2)
        norms += 2 * self.head_dim if self.model_type in _QK_NORM else 0
        biases = 0
        if self.model_type == "qwen2" or self.attention_bias:
            biases += (self.heads + 2 * self.kv_heads) * self.head_dim
            biases += self.hidden if self.model_type != "qwen2" else 0
        biases += (2 * self.intermediate + self.hidden) if self.mlp_bias else 0
        return products + router + norms + biases

    @property
    def embedding_parameters(self) -> int:
        """Count the parameters of the input embeddings."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """Count all parameters; tied embeddings once."""
        tables = self.embedding_parameters * (1 if self.tied else 2)
        return tables + self.layers * self.layer_parameters + self.hidden

    @property
    def active_parameters(self) -> int:
        """Count the parameters that one token is multiplied with: no look-up table, the chosen experts only."""
        idle = self.expert_parameters * (self.experts - self.active_experts) // self.experts
        return self.embedding_parameters + self.layers * (self.layer_parameters - idle) + self.hidden


@dataclass(frozen=True)
class Catalog:
    """The facts. shapes, rates, formats: by model id in small letters; priced: when and where the prices were taken.

    rates: peak learning rates of `lora` and `full` training, of models that want others than most.
    formats: prompt formats, as generation_config takes them, of models without a chat template.
    """

    gpus: dict[str, Gpu]
    shapes: dict[str, Shape]
    priced: str
    rates: dict[str, dict[str, float]]
    formats: dict[str, dict[str, Any]]


def read_catalog(path: str | Path | None = None) -> Catalog:
    """Read the facts from `path`, else $FORGEBOOK_CATALOG, else this package's own file.

    Raises ConfigError if that is no catalog.
    """
    return _read(Path(path or os.environ.get("FORGEBOOK_CATALOG") or _HERE / "catalog.yaml"))


@functools.cache
def _read(path: Path) -> Catalog:
    try:
        facts = yaml.safe_load(path.read_text(encoding="utf-8"))
        gpus = {
            name: Gpu(
                name,
                one["memory_mib"] * 2**20,
                one["peak_tflops"] * 1e12,
                one["price"],
                one.get("note", ""),
                one.get("bfloat16", True),
            )
            for name, one in facts["gpus"].items()
        }
        shapes = {
            model.lower(): Shape(**{"tied": False, **entry["shape"]})
            for entry in facts["models"]
            for model in entry["ids"]
        }
        rates = {model.lower(): rates for model, rates in facts.get("learning_rates", {}).items()}
        formats = {model.lower(): one["format"] for one in facts.get("prompt_formats", []) for model in one["ids"]}
        return Catalog(gpus, shapes, f"{facts['prices']['source']} ({facts['prices']['date']})", rates, formats)
    except OSError as error:
        raise ConfigError(f"the catalog {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is no catalog, must be like forgebook/catalog.yaml: {error}") from None


def shape_of(model_id: str, catalog: Catalog | None = None) -> Shape:
    """Find the shape of a model: in the catalog by its id, or in config.json of a local folder.

    Raises ModelError where neither knows it.
    """
    folder = model_folder(model_id)
    if (folder / "config.json").is_file():
        return _shape_in(folder / "config.json")
    shapes = (catalog or read_catalog()).shapes
    if model_id.lower() in shapes:
        return shapes[model_id.lower()]
    raise ModelError(
        f"model_id: the shape of {model_id!r} is not known{near_miss(model_id.lower(), shapes)}: name a local folder "
        "with its config.json, or add it to a copy of forgebook/catalog.yaml that $FORGEBOOK_CATALOG names"
    )


def model_folder(model_id: str) -> Path:
    """Name the local folder that `model_id` would be; it need not exist."""
    return TINY_MODEL if model_id == "tiny" else Path(model_id).expanduser()


def _shape_in(path: Path) -> Shape:
    """Read a shape from a model's config.json."""
    try:
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from None
    facts = facts.get("text_config", facts)  # models that read images wrap their text decoder
    kind = facts.get("model_type")
    facts = _LEFT_OUT.get(kind, {}) | facts
    missing = [key for key in _NEEDED if not isinstance(facts.get(key), int)]
    if kind not in _KNOWN or missing:
        what = f"lacks {', '.join(missing)}" if kind in _KNOWN else f"has model_type {kind!r}"
        raise ModelError(f"{path} {what}: its shape can be told of {', '.join(_KNOWN)}")
    heads = facts["num_attention_heads"]
    return Shape(
        model_type=kind,
        **{ours: facts[theirs] for theirs, ours in _NEEDED.items()},
        kv_heads=facts.get("num_key_value_heads") or heads,
        head_dim=facts.get("head_dim") or facts["hidden_size"] // heads,
        context=facts.get("max_position_embeddings"),
        # Gemma's file leaves it out: it is true unless said otherwise.
        tied=facts.get("tie_word_embeddings", kind.startswith("gemma")),
        experts=facts.get("num_local_experts", 1) if kind == "mixtral" else 1,
        active_experts=facts.get("num_experts_per_tok", 1) if kind == "mixtral" else 1,
        attention_bias=bool(facts.get("attention_bias", False)),
        mlp_bias=bool(facts.get("mlp_bias", False)),
    )


def hardware_of(text: str, catalog: Catalog | None = None) -> tuple[int, Gpu]:
    """Read `8xA100-80G` as (8, the GPU); a name alone is one of it.

    Raises ConfigError for a GPU that the catalog does not have.
    """
    gpus = (catalog or read_catalog()).gpus
    by_name = {name.lower(): gpu for name, gpu in gpus.items()}
    match = re.fullmatch(r"(?:([1-9]\d*)\s*x\s*)?(\S+)", text.strip(), flags=re.IGNORECASE)
    name = match[2].lower() if match else ""
    if name not in by_name:
        raise ConfigError(
            f"hardware: got {text!r}{near_miss(name, by_name)}, must be like 8xA100-80G, with one of {', '.join(gpus)}"
        )
    return int(match[1] or 1), by_name[name]
