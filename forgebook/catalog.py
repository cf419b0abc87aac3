"""Facts: GPUs with memory, peak and price; the shapes of core models. Read from catalog.yaml, without torch.

shape = shape_of(model_id)              from the catalog, or from config.json in a local folder
count, gpu = hardware_of("8xA100-80G")
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from forgebook.errors import ConfigError, ModelError, near_miss, shown_value
from forgebook.layer_counts import CountedDecoder, ImageLoad, LayerKind, counted_from

__all__ = [
    "TINY_MODEL",
    "Catalog",
    "Family",
    "Gpu",
    "Shape",
    "hardware_of",
    "hub_id_of",
    "model_folder",
    "model_mirrors",
    "read_catalog",
    "shape_from",
    "shape_of",
]

_HERE = Path(__file__).resolve().parent
_OWN = _HERE / "catalog.yaml"
# Shapes of published models whose parameters do not follow from a few figures, as models/shapes.py counts them.
_COUNTED = _HERE / "counted_shapes.json"
# The model in this repository: what `model_id: tiny` means.
TINY_MODEL = _HERE.parent / "tiny_model"
# Norms of a decoder layer, in the families whose parameters follow from config.json.
NORMS = tuple(f"{name}_layernorm" for name in ("input", "post_attention", "pre_feedforward", "post_feedforward"))
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_NEEDED = {
    "num_hidden_layers": "layers", "hidden_size": "hidden", "intermediate_size": "intermediate",
    "num_attention_heads": "heads", "vocab_size": "vocab",
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
class Family:
    """What sets the decoders of one model_type apart from Llama's: a row of catalog.yaml's `families`.

    architecture: the class name in config.json. norms: RMS norms per layer. qk_norm: norms of queries and keys, too.
    qkv_bias: biases of q, k and v. fused: q, k and v are one linear layer, gate and up another. experts: a mixture.
    softcap: the logits pass through a tanh. tied: one embedding table where config.json does not specify it. defaults:
    values that config.json may leave out. counted: whether the parameters follow from config.json by the rules of
    `Shape`; those of others are counted on the model's own class. vllm: whether vLLM runs it with code of its own.
    """

    architecture: str
    norms: int = 2
    qk_norm: bool = False
    qkv_bias: bool = False
    fused: bool = False
    experts: bool = False
    softcap: bool = False
    tied: bool = False
    defaults: tuple[tuple[str, int], ...] = ()
    counted: bool = True
    vllm: bool = True


@dataclass(frozen=True)
class Shape:
    """The shape of a decoder: all that its parameters, activations and FLOPs depend on.

    towers: parameters of vision and audio towers and projectors, which are loaded, but no text passes through them.
    counted: the layers of a family whose parameters do not follow from the other figures. images: of a run with images.
    """

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
    towers: int = 0
    counted: CountedDecoder | None = None
    images: ImageLoad | None = None

    @property
    def family(self) -> Family:
        """Look up what sets the model_type apart; one that the catalog does not list counts as Llama-like."""
        return read_catalog().families.get(self.model_type, Family(architecture=""))

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """Return the kinds of decoder layers, each with the numbers of its layers."""
        if self.counted:
            return self.counted.kinds
        linears, width = self._linears, self.intermediate
        gate_up = ("mlp.experts.gate_up_proj", self.experts, self.hidden, 2 * width)
        experts = (gate_up, ("mlp.experts.down_proj", self.experts, width, self.hidden)) if self.experts > 1 else ()
        norms = [f"self_attn.{norm}" for norm in ("q_norm", "k_norm") if self.family.qk_norm]
        modules = ("self_attn", "mlp", *NORMS, *norms, *(name for name, _, _ in linears))
        numbers = tuple(range(self.layers))
        return (LayerKind(numbers, self._layer_parameters, self.family.norms, linears, experts, modules),)

    @property
    def layers_name(self) -> str:
        """Return the whole name of the list of decoder layers."""
        if self.counted:
            return self.counted.layers
        return "model.language_model.layers" if self.towers else "model.layers"

    @property
    def inner(self) -> int:
        """Return the width inside the MLP, over all experts that work on a token."""
        if self.counted:
            return self.counted.inner(self.active_experts)
        return self.intermediate * self.active_experts

    @property
    def softcap(self) -> bool:
        """Report whether the logits pass through a tanh."""
        return self.counted.softcap if self.counted else self.family.softcap

    @property
    def adapts_experts(self) -> bool:
        """Report whether all-linear reaches the experts' tensors."""
        return self.counted.adapts_experts if self.counted else self.experts > 1

    @property
    def _linears(self) -> tuple[tuple[str, int, int], ...]:
        """Name the linear layers of a decoder layer of a family that follows the rules, as transformers does."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        if self.family.fused:
            attention, mlp = {"qkv_proj": q + 2 * kv}, {"gate_up_proj": 2 * self.intermediate}
        else:
            attention, mlp = (
                {"q_proj": q, "k_proj": kv, "v_proj": kv},
                dict.fromkeys(("gate_proj", "up_proj"), self.intermediate),
            )
        layers = [(f"self_attn.{name}", self.hidden, outputs) for name, outputs in attention.items()]
        layers.append(("self_attn.o_proj", q, self.hidden))
        if self.experts == 1:  # those of a mixture share tensors
            layers += [(f"mlp.{name}", self.hidden, outputs) for name, outputs in mlp.items()]
            layers.append(("mlp.down_proj", self.intermediate, self.hidden))
        return tuple(layers)

    @property
    def _layer_parameters(self) -> int:
        """Count the parameters of one decoder layer of a family that follows the rules."""
        products = sum(inputs * outputs for _, inputs, outputs in self._linears)
        products += self.experts * 3 * self.hidden * self.intermediate if self.experts > 1 else 0
        router = self.hidden * self.experts if self.experts > 1 else 0
        norms = self.hidden * self.family.norms + (2 * self.head_dim if self.family.qk_norm else 0)
        biases = 0
        if self.family.qkv_bias or self.attention_bias:
            biases += (self.heads + 2 * self.kv_heads) * self.head_dim
            biases += 0 if self.family.qkv_bias else self.hidden  # attention_bias covers the output layer, too
        biases += (2 * self.intermediate + self.hidden) if self.mlp_bias else 0
        return products + router + norms + biases

    @property
    def embedding_parameters(self) -> int:
        """Count the parameters of the input embeddings."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """Count all parameters; tied embeddings once."""
        return self.text_parameters + self.towers

    @property
    def text_parameters(self) -> int:
        """Count the parameters that a text passes through."""
        if self.counted:
            return self.counted.parameters
        tables = self.embedding_parameters * (1 if self.tied else 2)
        return tables + self.layers * self._layer_parameters + self.hidden

    @property
    def active_parameters(self) -> int:
        """Count the parameters that one token is multiplied with: no look-up table, the chosen experts only."""
        all_experts = sum(len(kind.layers) * kind.expert_parameters for kind in self.kinds)
        idle = all_experts * (self.experts - self.active_experts) // self.experts
        tables = self.counted.embeddings if self.counted else self.embedding_parameters
        return self.text_parameters - tables + self.embedding_parameters * self.tied - idle


@dataclass(frozen=True)
class Catalog:
    """The facts. shapes, rates, formats: by model id in lower case; priced: source and date of the prices.

    rates: peak learning rates of `lora` and `full` training, for models that need other ones than most.
    formats: prompt formats, as generation_config takes them, of models without a chat template.
    families: by the model_type of config.json.
    """

    gpus: dict[str, Gpu]
    shapes: dict[str, Shape]
    priced: str
    rates: dict[str, dict[str, float]]
    formats: dict[str, dict[str, Any]]
    families: dict[str, Family]


def read_catalog(path: str | Path | None = None) -> Catalog:
    """Read the facts from `path`, else $FORGEBOOK_CATALOG, else this package's own file.

    Raises ConfigError if that is no catalog.
    """
    return _read(Path(path or os.environ.get("FORGEBOOK_CATALOG") or _OWN))


@functools.cache
def _read(path: Path) -> Catalog:
    try:
        facts = yaml.safe_load(path.read_text(encoding="utf-8"))
        gpus = {name: _gpu(name, one) for name, one in facts["gpus"].items()}
        entries = [*json.loads(_COUNTED.read_text(encoding="utf-8")), *facts["models"]]
        shapes = {model.lower(): shape_from(entry["shape"]) for entry in entries for model in entry["ids"]}
        rates = {model.lower(): rates for model, rates in facts.get("learning_rates", {}).items()}
        formats = {model.lower(): one["format"] for one in facts.get("prompt_formats", []) for model in one["ids"]}
        families = _families(facts["families"]) if "families" in facts else _read(_OWN).families
        priced = f"{facts['prices']['source']} ({facts['prices']['date']})"
        return Catalog(gpus, shapes, priced, rates, formats, families)
    except OSError as error:
        raise ConfigError(f"the catalog {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path} is no catalog, must be like forgebook/catalog.yaml: {error}") from None


def _gpu(name: str, facts: dict[str, Any]) -> Gpu:
    """Read a GPU; raise ValueError for a figure that is no positive number. Peak and price may be null or left out."""
    figures: dict[str, float | None] = {}
    for key, is_optional in (("memory_mib", False), ("peak_tflops", True), ("price", True)):
        value = facts.get(key)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf
        if not ((is_number and (value or key == "price")) or (is_optional and value is None)):
            null = ", or null where it is not known" if is_optional else ""
            raise ValueError(f"gpus.{name}.{key}: got {shown_value(value)}, must be a positive number{null}")
        figures[key] = value
    memory, peak = figures["memory_mib"] or 0, figures["peak_tflops"]
    return Gpu(
        name,
        int(memory * 2**20),
        None if peak is None else peak * 1e12,
        figures["price"],
        facts.get("note", ""),
        facts.get("bfloat16", True),
    )


def _families(rows: dict[str, dict[str, Any]]) -> dict[str, Family]:
    return {
        model_type: Family(**{**row, "defaults": tuple(row.get("defaults", {}).items())})
        for model_type, row in rows.items()
    }


def shape_from(facts: dict[str, Any]) -> Shape:
    """Read a shape from a catalog's entry, or from the JSON of one that was counted."""
    counted = facts.get("counted")
    return Shape(**facts | {"counted": counted_from(counted) if counted else None})


def shape_of(model_id: str, catalog: Catalog | None = None) -> Shape:
    """Find the shape of a model: in the catalog by its id, or in config.json of a local folder.

    Raises ModelError where neither knows it.
    """
    folder = model_folder(model_id)
    if (folder / "config.json").is_file():
        return _shape_in(folder / "config.json", catalog)
    shapes = (catalog or read_catalog()).shapes
    if model_id.lower() in shapes:
        return shapes[model_id.lower()]
    raise ModelError(
        f"model_id: the shape of {model_id!r} is not known{near_miss(model_id.lower(), shapes)}: name a local folder "
        "with its config.json, or add it to a copy of forgebook/catalog.yaml that $FORGEBOOK_CATALOG names"
    )


def model_folder(model_id: str) -> Path:
    """Name the local folder of a model: `model_id` itself, or the copy of a hub's model; it need not exist."""
    if model_id == "tiny":
        return TINY_MODEL
    folder = Path(model_id).expanduser()
    if folder.is_dir() or not _HUB_ID.fullmatch(model_id):
        return folder
    copies = (mirror / model_id for mirror in model_mirrors())
    return next((copy for copy in copies if (copy / "config.json").is_file()), folder)


def model_mirrors() -> list[Path]:
    """List the folders where `owner/name` is looked up before the hub: $FORGEBOOK_MODELS, and .models/ beside main.py.

    A machine without a network has its models there, and configs name them as everyone does.
    """
    named = os.environ.get("FORGEBOOK_MODELS")
    return [*([Path(named).expanduser().absolute()] if named else []), _HERE.parent / ".models"]


def hub_id_of(folder: str | Path) -> str | None:
    """Return the hub id of a model's folder in a mirror: what is published names that; None for other folders."""
    mirror = next((mirror for mirror in model_mirrors() if Path(folder).is_relative_to(mirror)), None)
    name = Path(folder).relative_to(mirror).as_posix() if mirror else ""
    return name if _HUB_ID.fullmatch(name) else None


def _shape_in(path: Path, catalog: Catalog | None) -> Shape:
    """Read a shape from a model's config.json."""
    try:
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from None
    towers, whole = _tower_parameters(facts), str(facts.get("model_type"))
    facts = facts.get("text_config", facts)  # models that read images wrap their text decoder
    kind, families = str(facts.get("model_type")), (catalog or read_catalog()).families
    family = families.get(kind) if kind == whole or whole == "gemma3" else None  # no rule for the towers of others
    facts = (dict(family.defaults) if family else {}) | facts
    missing = [key for key in _NEEDED if not isinstance(facts.get(key), int)]
    is_counted = family is not None and family.counted
    if family is None or not is_counted or missing:
        problem = f"lacks {', '.join(missing)}" if is_counted else f"has model_type {whole!r}"
        counted = ", ".join(name for name, one in families.items() if one.counted)
        raise ModelError(f"{path} {problem}: the shape is known for {counted}")
    heads = facts["num_attention_heads"]
    return Shape(
        model_type=kind,
        **{ours: facts[theirs] for theirs, ours in _NEEDED.items()},
        kv_heads=facts.get("num_key_value_heads") or heads,
        head_dim=facts.get("head_dim") or facts["hidden_size"] // heads,
        context=facts.get("max_position_embeddings"),
        tied=facts.get("tie_word_embeddings", family.tied),
        experts=facts.get("num_local_experts", 1) if family.experts else 1,
        active_experts=facts.get("num_experts_per_tok", 1) if family.experts else 1,
        attention_bias=bool(facts.get("attention_bias", False)),
        mlp_bias=bool(facts.get("mlp_bias", False)),
        towers=towers,
    )


def _tower_parameters(facts: dict[str, Any]) -> int:
    """Count the parameters of a vision tower and its projector: SigLIP, as Gemma 3 has it."""
    vision = facts.get("vision_config") or {}
    hidden, layers = vision.get("hidden_size"), vision.get("num_hidden_layers")
    if not isinstance(hidden, int) or not isinstance(layers, int):
        return 0
    inner, patch = vision.get("intermediate_size", 4 * hidden), vision.get("patch_size", 16)
    layer = 4 * hidden * (hidden + 1) + 2 * hidden * inner + inner + hidden + 4 * hidden
    pixels, positions = vision.get("num_channels", 3) * patch**2, (vision.get("image_size", 0) // patch) ** 2
    projector = hidden * (facts.get("text_config", {}).get("hidden_size", 0) + 1)
    return layers * layer + hidden * (pixels + 1 + positions + 2) + projector


def hardware_of(text: str) -> tuple[int, Gpu]:
    """Read `8xA100-80G` as (8, the GPU); a name alone is one of it.

    Raises ConfigError for a GPU that the catalog does not have.
    """
    gpus = read_catalog().gpus
    by_name = {name.lower(): gpu for name, gpu in gpus.items()}
    match = re.fullmatch(r"(?:([1-9]\d{0,5})\s*x\s*)?(\S+)", text.strip(), flags=re.IGNORECASE)
    name = match[2].lower() if match else ""
    if match is None or name not in by_name:
        raise ConfigError(
            f"hardware: got {shown_value(text)}{near_miss(name, by_name)}, must be like 8xA100-80G, with one of "
            f"{', '.join(gpus)}"
        )
    return int(match[1] or 1), by_name[name]
