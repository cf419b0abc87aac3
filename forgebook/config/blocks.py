"""The nested blocks of a config file. `values` holds the kinds of values that its keys take, `schema` the top level.

Nothing here reads a file or needs a GPU stack.
"""

from enum import Enum
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

from forgebook.config.values import Float, Positive, Resources
from forgebook.errors import near_miss, shown_value

__all__ = [
    "SHARDING_KEYS",
    "CheckpointFrequency",
    "ClassifierConfig",
    "DeepSpeed",
    "DeepSpeedFile",
    "EarlyStopping",
    "EvalGeneration",
    "Fsdp",
    "GenerationConfig",
    "HubRepo",
    "LigerKernel",
    "Logger",
    "Loggers",
    "LogprobProcessor",
    "Mark",
    "PreferenceTuningConfig",
    "PromptFormat",
    "Sharding",
    "StrictBlock",
    "VisionLanguageConfig",
    "WeightsPath",
    "labels_of",
    "needs_reference",
]


class Mark(Enum):
    """Another property of a key, annotated with its type: `Annotated[str, Mark.NO_EFFECT]`."""

    NO_EFFECT = "may change between two starts of one run: it does not change the trained weights"
    AUTO = "--default may choose it"


# -- blocks


class StrictBlock(BaseModel):
    """Reject unknown keys, changes after loading, and values of another type (`true` is not 1)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class PromptFormat(StrictBlock):
    """How messages become text; in every template, `{instruction}` stands for the content of the message."""

    system: str
    """Template of the system message."""
    user: str
    """Template of a user message; with `system_in_user` it also contains `{system}`."""
    assistant: str
    """Template of an answer. End it with the end-of-turn token; one that ends with `{instruction}` gets it after the
    last answer only."""
    trailing_assistant: str = ""
    """Text after the last message that starts the answer; only for generation."""
    bos: str = ""
    """Text at the start of every conversation."""
    default_system_message: str = ""
    """System message of conversations that have none."""
    add_system_tags_even_if_message_is_empty: bool = False
    """Render the system template for an empty system message too."""
    system_in_user: bool = False
    """Put the rendered system message inside the first user message."""
    system_in_last_user: bool = False
    """Put it inside the last user message instead; only for generation, needs `system_in_user`."""
    strip_whitespace: bool = True
    """Strip spaces and line ends around the content of every message."""

    @field_validator("system", "user", "assistant")
    @classmethod
    def _has_instruction(cls, template: str) -> str:
        if "{instruction}" not in template:
            raise ValueError(
                f"got {shown_value(template)}, must contain '{{instruction}}', which stands for the content"
            )
        return template

    @model_validator(mode="after")
    def _has_system(self) -> Self:
        if self.system_in_user and "{system}" not in self.user:
            raise ValueError(
                f"system_in_user: true needs '{{system}}' in the user template, got {shown_value(self.user)}"
            )
        if self.system_in_last_user and not self.system_in_user:
            raise ValueError("system_in_last_user: true needs system_in_user: true")
        return self


TEMPLATE_SETTINGS = "chat_template_kwargs"  # of the block below; read at the top level, too


class GenerationConfig(StrictBlock):
    """How the fine-tuned model is prompted and stopped, in training, generation and serving."""

    prompt_format: Annotated[PromptFormat | None, Mark.AUTO] = None
    """Templates that turn messages into text. None: the catalog's format of the model."""
    chat_template_kwargs: dict[Annotated[str, Field(pattern=r"^[a-zA-Z_]\w*$")], bool | int | float | str] = {}
    """Variables of the model's chat template, such as `enable_thinking: false` or `reasoning_effort: low`; saved with
    the checkpoint, as defaults of its template."""
    stopping_sequences: Annotated[list[str | int], Mark.NO_EFFECT] = []
    """Texts or token ids that end an answer, in generation and serving."""

    @model_validator(mode="after")
    def _one_way_to_prompt(self) -> Self:
        if self.prompt_format is not None and self.chat_template_kwargs:
            raise ValueError("chat_template_kwargs: has no effect together with prompt_format; remove one of them")
        return self


class DeepSpeed(StrictBlock):
    """The DeepSpeed settings of the run."""

    config_path: str = "deepspeed_configs/zero_3_offload_optim+param.json"
    """JSON file, searched for in the working directory, next to the config file, then in this repository."""


def _deepspeed_file(value: Any) -> Any:
    """Read `zero_2` as the block of its file, and `none` as null."""
    if not isinstance(value, str):
        return value
    if value.lower() == "none":
        return None
    return {"config_path": value if value.endswith(".json") else f"deepspeed_configs/{value}.json"}


Task = Literal["causal_lm", "instruction_tuning", "classification", "preference_tuning", "vision_language"]
TASK_OF_BLOCK = {
    "classifier_config": "classification",
    "preference_tuning_config": "preference_tuning",
    "vision_language_config": "vision_language",
}
Sharding = Literal["none", "zero_1", "zero_2", "zero_3", "fsdp"]

SHARDING_KEYS = frozenset(("sharding", "deepspeed"))


def with_deepspeed(values: dict[str, Any]) -> dict[str, Any]:
    """Fill in the DeepSpeed file that `sharding` stands for; what the values say of `deepspeed` stays."""
    sharding = values.get("sharding")
    if sharding is None or "deepspeed" in values:
        return dict(values)
    return values | {"deepspeed": None if sharding in ("none", "fsdp") else sharding}


def with_one_sharding(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Apply changes to the values of a config: what they say of the sharding replaces what the values say of it."""
    replaced = () if SHARDING_KEYS.isdisjoint(changes) else SHARDING_KEYS
    return {key: value for key, value in values.items() if key not in replaced} | changes


class CheckpointFrequency(StrictBlock):
    """When to evaluate, then save a checkpoint."""

    unit: Literal["epochs", "steps"]
    """What is counted; a step is one optimizer step."""
    frequency: Positive
    """Every how many of them."""


DeepSpeedFile = Annotated[DeepSpeed | None, BeforeValidator(_deepspeed_file)]


class EarlyStopping(StrictBlock):
    """When a run ends before its last step; its best checkpoint is the one before."""

    patience: Positive
    """After this many evaluations in a row without a lower loss."""
    min_delta: Annotated[Float, Field(ge=0)] = 0.0
    """By how much a loss must be below the lowest one to count as lower."""


class EvalGeneration(StrictBlock):
    """Answers to validation prompts while the run trains."""

    prompts: Positive = 8
    """How many prompts are answered, spread over the validation examples; the first answers are printed."""
    every: Positive = 1
    """At every how many evaluations; the last one always answers."""
    max_new_tokens: Positive = 128
    """Longest answer, in tokens."""


class ClassifierConfig(StrictBlock):
    """Train the model to answer with one of a few labels."""

    label_tokens: Annotated[list[str], Field(min_length=2)]
    """The labels; each becomes one token, and the last answer of every example is exactly one of them. A label
    that is a word of a question is the same token there: choose labels that are not, such as [[spam]]. A new token's
    embedding starts from the tokens of its text; under LoRA it has a learning rate of 4 / hidden size, in a run of more
    than 40 steps of 160 / (steps x hidden size), or `learning_rate`, whichever is higher."""
    eval_metrics: list[Literal["accuracy", "f1", "precision", "recall", "prauc", "rocauc"]] = ["accuracy"]
    """Metrics to compute on the validation examples."""

    @field_validator("label_tokens")
    @classmethod
    def _distinct(cls, labels: list[str]) -> list[str]:
        if len(set(labels)) < len(labels):
            raise ValueError(f"got {shown_value(labels)}, must not contain a label twice")
        return labels


def labels_of(classifier: ClassifierConfig | None) -> tuple[str, ...]:
    """List the labels that a classifier learns as tokens; none for other tasks."""
    return tuple(classifier.label_tokens) if classifier is not None else ()


class LogprobProcessor(StrictBlock):
    """Workers that compute the reference model's log-probabilities while training runs."""

    custom_resources: Resources = {}
    """Ray resources of one such worker."""
    concurrency: Positive = 1
    """Number of workers, one GPU each."""
    batch_size: Positive | None = None
    """Pairs per forward pass. None: `train_batch_size_per_device`."""


class PreferenceTuningConfig(StrictBlock):
    """Train on pairs of a chosen and a rejected answer."""

    loss: Literal["dpo", "ipo", "simpo", "orpo", "kto"] = "dpo"
    """The loss; simpo and orpo need no reference model."""
    beta: Annotated[Float, Field(gt=0)] = 0.1
    """How strongly the model is kept close to the reference model; higher is closer."""
    label_smoothing: Annotated[Float, Field(ge=0, lt=0.5)] = 0.0
    """dpo: the share of pairs whose labels may be swapped."""
    logprob_processor_scaling_config: Annotated[LogprobProcessor | None, Mark.NO_EFFECT] = None
    """Compute reference log-probabilities on separate workers. None: on the training workers."""


def needs_reference(preference: PreferenceTuningConfig | None) -> bool:
    """Report whether the loss of a run compares the model with a reference model."""
    return preference is not None and preference.loss in ("dpo", "ipo", "kto")


class VisionLanguageConfig(StrictBlock):
    """Train a model that also reads images."""

    freeze_vision_encoder: bool = True
    """Train the language model, and leave the vision encoder and its projector as they are."""
    train_projector: bool = False
    """Train the projector, too, which turns what the encoder sees into embeddings; an adapter saves a whole copy."""


class Fsdp(StrictBlock):
    """How `sharding: fsdp` divides a model."""

    reshard_after_forward: bool | Literal["auto"] = "auto"
    """Free a layer's weights after its forward pass and gather them again for the backward pass. false: they stay
    until then, and a third less is sent. auto: false where that fits."""
    cpu_offload: bool = False
    """Each worker's part of weights, gradients and moments stays in its host's memory, where the optimizer steps; a
    layer's weights are copied to the GPU when it computes."""


class LigerKernel(StrictBlock):
    """Fused Triton kernels that save memory and time on GPUs; they need the package liger-kernel."""

    enabled: bool | Literal["auto"] = "auto"
    """Use them. auto: on a GPU, where liger-kernel is installed and its kernels give this model's own results."""
    kwargs: dict[
        Literal["rms_norm", "rope", "swiglu", "geglu", "layer_norm", "cross_entropy", "fused_linear_cross_entropy"],
        bool,
    ] = {}
    """Kernels to turn on or off; the others are on where the model has them. cross_entropy and
    fused_linear_cross_entropy change nothing: Forgebook's own loss is fused already."""


_LOGGER_KEYS: dict[str, tuple[str, ...]] = {
    "mlflow": ("tracking_uri", "experiment_name", "create_experiment_if_not_exists", "run_name", "tags"),
    "tensorboard": ("log_dir",),
}


class Logger(StrictBlock):
    """An experiment tracker, in addition to metrics.jsonl in the run folder."""

    provider: Literal["wandb", "mlflow", "tensorboard", "trackio"]
    """The tracker."""
    provider_config: dict[str, Any] = {}
    """Its settings. wandb: arguments of wandb.init, such as `project`, `group`, `name`, `tags`. mlflow:
    `tracking_uri`, `experiment_name`, `create_experiment_if_not_exists`, `run_name`, `tags`. tensorboard: `log_dir`.
    trackio: arguments of trackio.init, such as `project`, `group`, `name`, `space_id`."""
    rank_zero_only: bool = True
    """Has no effect: metrics cover all workers and are sent once, by the process that started the run."""

    @model_validator(mode="after")
    def _known_to_provider(self) -> Self:
        known = _LOGGER_KEYS.get(self.provider)
        unknown = next((key for key in self.provider_config if known is not None and key not in known), None)
        if known is not None and unknown is not None:
            hint = f"{near_miss(unknown, known)}; {self.provider} takes {', '.join(known)}"
            raise ValueError(f"provider_config: unknown key {unknown!r}{hint}")
        return self


class HubRepo(StrictBlock):
    """A repository on the Hugging Face Hub."""

    repo_id: str
    """`owner/name`."""
    revision: str | None = None
    """Branch, tag or commit. None: the main branch."""


# The tag makes an error describe the form that was written, not both.
WeightsPath = Annotated[
    Annotated[str, Tag("a path")] | Annotated[HubRepo, Tag("a block")],
    Discriminator(lambda value: "a path" if isinstance(value, str) else "a block"),
]

Loggers = Annotated[
    Annotated[Logger, Tag("a block")] | Annotated[list[Logger], Tag("a list")],
    Discriminator(lambda value: "a list" if isinstance(value, list) else "a block"),
]
