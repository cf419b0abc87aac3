"""Every key of a config file: its type, its default and what it means.

`parse` reads files into these classes; `legacy_keys` translates names that LLMForge has dropped. Nothing here reads a
file or needs a GPU stack.
"""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

from forgebook.errors import near_miss

__all__ = [
    "LORA_KEYS",
    "CheckpointFrequency",
    "ClassifierConfig",
    "DataSource",
    "DeepSpeed",
    "FinetuneConfig",
    "GenerationConfig",
    "HubRepo",
    "LigerKernel",
    "Logger",
    "LogprobProcessor",
    "PreferenceTuningConfig",
    "PromptFormat",
    "VisionLanguageConfig",
    "flatten",
    "prefixes",
]

# The constructor arguments of peft.LoraConfig, written out so that a typo is found without importing peft
# (which imports torch); a test compares them with the installed peft.
# fmt: off
LORA_KEYS = frozenset({
    "alora_invocation_tokens", "alpha_pattern", "arrow_config", "auto_mapping", "base_model_name_or_path",
    "bias", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "init_lora_weights", "kasa_config", "layer_replication", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_bias", "lora_dropout", "lora_ga_config",
    "megatron_config", "megatron_core", "modules_to_save", "monteclora_config", "peft_type",
    "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config",
    "target_modules", "target_parameters", "task_type", "trainable_token_indices", "use_bdlora",
    "use_dora", "use_qalora", "use_rslora", "velora_config",
})
# fmt: on

# Ways to start an adapter: those that leave the base as it was, and PiSSA, which checkpoints.py converts.
_ADAPTER_STARTS = re.compile(r"gaussian|orthogonal|pissa(_niter_\d+)?")
_ROPE_TYPES = ("linear", "dynamic", "yarn", "longrope", "llama3")
# fmt: off
_ROPE_KEYS = frozenset({
    "attention_factor", "beta_fast", "beta_slow", "factor", "high_freq_factor", "long_factor", "low_freq_factor",
    "mscale", "mscale_all_dim", "original_max_position_embeddings", "partial_rotary_factor", "rope_theta",
    "rope_type", "short_factor", "truncate",
})
# fmt: on

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


def _number(value: Any) -> Any:
    """Turn `1e-4` into a number: YAML 1.1, hence PyYAML, reads it as text."""
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value


def _whole_number(value: Any) -> Any:
    """Turn `1e3` into 1000; leave 1.5 to be refused."""
    value = _number(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _numbers_inside(value: Any) -> Any:
    """Turn `1e-4` into a number at any depth of a free-form block."""
    if isinstance(value, dict):
        return {key: _numbers_inside(item) for key, item in value.items()}
    return [_numbers_inside(item) for item in value] if isinstance(value, list) else _number(value)


def _amount(value: Any) -> Any:
    """Keep whole amounts whole: 53687091200 bytes are not 53687091200.0."""
    value = _number(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise ValueError(f"got {value!r}, must be a number, 0 or more")
    return value


def _switch_or_block(value: Any) -> Any:
    if not isinstance(value, bool | dict):
        raise ValueError(f"got {value!r}, must be true, false or a block of options")
    return _numbers_inside(value)


Int = Annotated[int, BeforeValidator(_whole_number)]
Float = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Fraction = Annotated[Float, Field(ge=0, lt=1)]
Positive = Annotated[Int, Field(gt=0)]
Block = Annotated[dict[str, Any], BeforeValidator(_numbers_inside)]
Resources = dict[str, Annotated[int | float, BeforeValidator(_amount)]]


class _Block(BaseModel):
    """Refuse unknown keys, changes after loading, and values of another type (`true` is not 1)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class PromptFormat(_Block):
    """How messages become text; every template holds `{instruction}`, the place of a message's content."""

    system: str
    """Template of the system message."""
    user: str
    """Template of a user message; with `system_in_user` it also holds `{system}`."""
    assistant: str
    """Template of an answer. It must end with the end-of-turn token, or the model never learns to stop."""
    trailing_assistant: str = ""
    """Text after the last message that opens the answer; only for generation."""
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
            raise ValueError(f"got {template!r}, must contain '{{instruction}}', the place of the content")
        return template

    @model_validator(mode="after")
    def _has_system(self) -> Self:
        if self.system_in_user and "{system}" not in self.user:
            raise ValueError(f"system_in_user: true needs '{{system}}' in the user template, got {self.user!r}")
        if self.system_in_last_user and not self.system_in_user:
            raise ValueError("system_in_last_user: true needs system_in_user: true")
        return self


class GenerationConfig(_Block):
    """How the fine-tuned model is prompted and stopped, in training, generation and serving."""

    prompt_format: PromptFormat | None = None
    """Templates that turn messages into text. None: the catalog's format of the model."""
    stopping_sequences: list[str | int] = []
    """Texts or token ids that end an answer when serving."""


class DeepSpeed(_Block):
    """Which DeepSpeed settings the workers share."""

    config_path: str = "deepspeed_configs/zero_3_offload_optim+param.json"
    """JSON file, looked up in the working directory, beside the config file, then in this repository."""


class CheckpointFrequency(_Block):
    """When to evaluate, then save a checkpoint."""

    unit: Literal["epochs", "steps"]
    """What is counted; a step is one update of the weights."""
    frequency: Positive
    """Every how many of them."""


class ClassifierConfig(_Block):
    """Train the model to answer with one of a few labels."""

    label_tokens: Annotated[list[str], Field(min_length=2)]
    """The labels; each becomes one special token, and the last answer of every row is exactly one of them."""
    eval_metrics: list[Literal["accuracy", "f1", "precision", "recall", "prauc", "rocauc"]] = ["accuracy"]
    """Scores to compute on the validation rows."""

    @field_validator("label_tokens")
    @classmethod
    def _distinct(cls, labels: list[str]) -> list[str]:
        if len(set(labels)) < len(labels):
            raise ValueError(f"got {labels!r}, must not name a label twice")
        return labels


class LogprobProcessor(_Block):
    """Workers that compute the reference model's log-probabilities while training runs."""

    custom_resources: Resources = {}
    """Ray resources of one such worker."""
    concurrency: Positive = 1
    """Number of workers, one GPU each."""
    batch_size: Positive | None = None
    """Pairs per forward pass. None: the training batch per device."""


class PreferenceTuningConfig(_Block):
    """Train on pairs of a chosen and a rejected answer."""

    loss: Literal["dpo", "ipo", "simpo", "orpo", "kto"] = "dpo"
    """What is minimised; simpo and orpo need no reference model."""
    beta: Annotated[Float, Field(gt=0)] = 0.1
    """How strongly the model is held to the reference model; higher is closer."""
    label_smoothing: Annotated[Float, Field(ge=0, lt=0.5)] = 0.0
    """dpo: the share of pairs that may be the wrong way round."""
    logprob_processor_scaling_config: LogprobProcessor | None = None
    """Compute reference log-probabilities on workers of their own. None: on the training workers."""


class VisionLanguageConfig(_Block):
    """Train a model that reads images too."""

    freeze_vision_encoder: bool = True
    """Train only the projection and the language model."""


class LigerKernel(_Block):
    """Fused Triton kernels that save memory and time on GPUs; needs the package liger-kernel."""

    enabled: bool = False
    """Use them."""
    kwargs: dict[
        Literal["rms_norm", "rope", "swiglu", "geglu", "layer_norm", "cross_entropy", "fused_linear_cross_entropy"],
        bool,
    ] = {}
    """Single kernels to switch; those not named are on where the model has them. cross_entropy and
    fused_linear_cross_entropy change nothing: the loss is Forgebook's own, which is fused already."""


_LOGGER_KEYS = {
    "mlflow": ("tracking_uri", "experiment_name", "create_experiment_if_not_exists", "run_name", "tags"),
    "tensorboard": ("log_dir",),
}


class Logger(_Block):
    """Where metrics go besides metrics.jsonl in the run folder."""

    provider: Literal["wandb", "mlflow", "tensorboard"]
    """The tracker."""
    provider_config: dict[str, Any] = {}
    """Its settings. wandb: arguments of wandb.init, such as `project`, `group`, `name`, `tags`. mlflow:
    `tracking_uri`, `experiment_name`, `create_experiment_if_not_exists`, `run_name`, `tags`. tensorboard: `log_dir`."""
    rank_zero_only: bool = True
    """Changes nothing: the figures are those of all workers together, sent once, by the process that started them."""

    @model_validator(mode="after")
    def _known_to_provider(self) -> Self:
        known = _LOGGER_KEYS.get(self.provider)
        for key in self.provider_config if known else ():
            if key not in known:
                takes = f"{self.provider} takes {', '.join(known)}"
                raise ValueError(f"provider_config: unknown key {key!r}{near_miss(key, known)}; {takes}")
        return self


class HubRepo(_Block):
    """A repository on the Hugging Face hub."""

    repo_id: str
    """`owner/name`."""
    revision: str | None = None
    """Branch, tag or commit. None: the main branch."""


class DataSource(_Block):
    """Rows of one path in a mix of several."""

    path: str
    """A path, glob or address, as in train_path."""
    weight: Annotated[Float, Field(gt=0)] = 1.0
    """How often each row is taken per epoch: 2 twice, 0.5 a random half of them (the same one every epoch)."""


# The tag makes an error speak of the form that was written, not of both.
WeightsPath = Annotated[
    Annotated[str, Tag("a path")] | Annotated[HubRepo, Tag("a block")],
    Discriminator(lambda value: "a path" if isinstance(value, str) else "a block"),
]

DataPath = Annotated[
    Annotated[str, Tag("a path")]
    | Annotated[
        list[
            Annotated[
                Annotated[str, Tag("a path")] | Annotated[DataSource, Tag("a block")],
                Discriminator(lambda value: "a path" if isinstance(value, str) else "a block"),
            ]
        ],
        Tag("a list"),
        Field(min_length=1),
    ],
    Discriminator(lambda value: "a list" if isinstance(value, list) else "a path"),
]

Loggers = Annotated[
    Annotated[Logger, Tag("a block")] | Annotated[list[Logger], Tag("a list")],
    Discriminator(lambda value: "a list" if isinstance(value, list) else "a block"),
]

Task = Literal["causal_lm", "instruction_tuning", "classification", "preference_tuning", "vision_language"]
TASK_OF_BLOCK = {
    "classifier_config": "classification",
    "preference_tuning_config": "preference_tuning",
    "vision_language_config": "vision_language",
}


class FinetuneConfig(_Block):
    """One fine-tuning run. Only `model_id` and `train_path` are required."""

    # -- model and data
    model_id: str
    """Model to fine-tune: a Hugging Face id or a folder."""
    train_path: DataPath
    """Training rows: JSON lines, JSON, Parquet or CSV, maybe gzip; a local path, s3://, gs://, https:// or
    hf://owner/name[/config]:split; `*` stands for several files. A list mixes: `[a.jsonl, {path: b.jsonl,
    weight: 0.5}]`."""
    valid_path: DataPath | None = None
    """Validation rows. None: no evaluation loss, and the last checkpoint counts as the best."""
    task: Task | None = None
    """Which tokens carry the loss. None: what the task's own block says, else causal_lm (every token)."""
    initial_base_model_ckpt_path: WeightsPath | None = None
    """Start from these weights instead of those of `model_id`: a path or `{repo_id: ...}`."""
    initial_adapter_model_ckpt_path: WeightsPath | None = None
    """Start from this LoRA adapter; needs `lora_config`."""
    generation_config: GenerationConfig = GenerationConfig()
    """Prompt format and stop sequences."""
    context_length: Positive | None = None
    """Longest row, in tokens. None: chosen from the data."""
    truncation: Literal["error", "drop", "left", "right"] = "error"
    """What happens to longer rows: refuse the data, leave the row out, or cut it at its start or end."""
    padding: Literal["longest", "max_length", "packed"] = "longest"
    """Pad a batch to its longest row, or to `context_length` to measure the worst case. packed: fill sequences
    of `context_length` with whole rows that do not see each other; a batch then counts sequences."""
    train_on: Literal["all", "last"] = "all"
    """Which assistant turns carry the loss: all, or the last one of a row."""
    rewritten_turns: Literal["refuse", "expand"] = "refuse"
    """Where a chat template shows an earlier answer otherwise once later turns follow (it strips the thinking):
    refuse such rows, or make one row of each answer, as it was when it was given."""
    on_bad_rows: Literal["fail", "drop"] = "fail"
    """Rows that cannot be used: stop before training, or leave them out and say so."""
    rope_scaling: Block | None = None
    """Stretch the context of the model, e.g. `{rope_type: linear, factor: 2.0}` (linear, dynamic, yarn, longrope,
    llama3). Kept with the checkpoint: in its config.json, beside an adapter in config_overrides.json."""

    # -- one update
    lora_config: Block | None = None
    """Arguments of peft.LoraConfig, e.g. r, target_modules, use_rslora, use_dora, modules_to_save,
    init_lora_weights: pissa. None: train all parameters."""
    quantization: Literal["nf4", "int8"] | None = None
    """Hold the frozen weights in 4 bits (QLoRA: NF4 with double quantisation) or 8 bits, through bitsandbytes;
    embeddings and output layer stay as they are. Needs `lora_config`; not with ZeRO-3."""
    train_batch_size_per_device: Positive | None = None
    """Rows per device in one forward pass. None: chosen from the model, the context and the memory."""
    eval_batch_size_per_device: Positive | None = None
    """Likewise for evaluation."""
    gradient_accumulation_steps: Positive = 1
    """Forward passes per update."""
    learning_rate: Annotated[Float, Field(gt=0)] | None = None
    """Peak learning rate. None: 1e-4 for LoRA, 1e-5 for all parameters."""
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    """Course of the learning rate after the warm-up."""
    num_warmup_steps: Annotated[Int, Field(ge=0)] = 10
    """Updates over which the learning rate rises linearly from zero."""
    weight_decay: Annotated[Float, Field(ge=0)] = 0.0
    """Decay of AdamW."""
    adam_betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)] = (0.9, 0.999)
    """Averaging factors of AdamW."""
    adam_epsilon: Annotated[Float, Field(gt=0)] = 1e-8
    """Smallest denominator of AdamW."""
    max_grad_norm: Annotated[Float, Field(ge=0)] = 1.0
    """Clip gradients to this norm; 0: no clipping."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """adamw_8bit: both moments in 8 bits, through bitsandbytes; tensors of fewer than 4,096 elements keep 32."""
    neftune_noise_alpha: Annotated[Float, Field(gt=0)] | None = None
    """Add noise to the embeddings in training, uniform in +-alpha / sqrt(length * width) of the padded batch
    (NEFTune, arXiv 2310.05914). None: none."""

    # -- length of the run
    num_epochs: Positive | None = None
    """Passes over the data. None: as many as give `min_update_steps` updates."""
    min_update_steps: Positive = 100
    """Fewest updates when `num_epochs` is not given."""
    max_steps: Positive | None = None
    """Stop after this many updates, whatever the epochs say."""
    seed: Int = 42
    """Seed of shuffling, dropout and new weights."""

    # -- memory and speed
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Number format of the forward and backward pass."""
    deepspeed: DeepSpeed | None = DeepSpeed()
    """How devices share the model; `zero_2` is short for its file in deepspeed_configs/.
    None: every device holds all of it (DDP)."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: about a third slower, far less memory."""
    attention: Literal["auto", "flash_attention_2", "flash_attention_3", "sdpa", "flex", "eager"] = "auto"
    """Attention kernel. auto: the fastest that the device has."""
    liger_kernel: LigerKernel = LigerKernel()
    """Fused Triton kernels."""
    torch_compile: Annotated[bool | dict[str, Any], BeforeValidator(_switch_or_block)] = False
    """Compile the decoder, at its first step and for every new shape; a block holds arguments of torch.compile."""

    # -- machines
    hardware: str | None = None
    """What the run is planned and, with --default, chosen for, such as `8xA100-80G` (forgebook/catalog.yaml names the
    GPUs). None: what this machine has."""
    num_devices: Annotated[Int, Field(ge=0)] = 1
    """Workers, one GPU each; 0: in this process, without a Ray cluster. `{min: 1, max: 2}` sets min_devices, too."""
    min_devices: Annotated[Int, Field(ge=1)] | None = None
    """When machines go, go on with as few workers as this, and with num_devices again when they come back; needs
    `deepspeed: none`. None: wait until there are num_devices again."""
    address: str | None = None
    """A running Ray cluster to join, `HOST:6379` or `auto`, unless RAY_ADDRESS names one. None: this machine's own."""
    worker_resources: Resources = {}
    """Ray resources of every worker, e.g. `accelerator_type:A10G: 0.001` (any value in (0, 1])."""
    trainer_resources: Resources = {}
    """Ray resources of the first worker only, e.g. `memory` in bytes: it gathers the weights."""
    num_data_blocks_per_device: Positive = 16
    """Blocks of data per device; more let separate log-probability workers keep ahead of training."""
    max_failures: Annotated[Int, Field(ge=0)] = 3
    """Times that failed workers are restarted from the last checkpoint."""

    # -- evaluation, checkpoints and tracking
    eval_first: bool = False
    """Evaluate once before training."""
    checkpoint_and_evaluation_frequency: CheckpointFrequency | None = None
    """When to evaluate and save. None: after every epoch."""
    num_checkpoints_to_keep: Positive = 1
    """Keep this many, those with the lowest evaluation loss."""
    save_state_minutes: Annotated[Float, Field(ge=0)] = 15
    """Save the state for continuing at least this often between checkpoints; 0: only with them."""
    run_name: str | None = None
    """Folder of the run under `storage_path`. None: the name of the config file without its ending."""
    force: bool = False
    """Start although the plan says that it does not fit."""
    storage_path: str = "runs"
    """Folder for runs, or a place in a bucket, s3:// or gs://: runs then work in $FORGEBOOK_CACHE and are uploaded
    beside the training."""
    on_existing: Literal["resume", "overwrite", "fail"] = "resume"
    """What happens when the run folder exists already."""
    custom_model_tag: str | None = None
    """Name under which the fine-tuned model is listed. None: generated."""
    logger: Loggers | None = None
    """Experiment tracker, or a list of them."""

    # -- blocks that choose the task
    classifier_config: ClassifierConfig | None = None
    """Labels to learn; makes the task `classification`."""
    preference_tuning_config: PreferenceTuningConfig | None = None
    """Pairs to learn from; makes the task `preference_tuning`."""
    vision_language_config: VisionLanguageConfig | None = None
    """Images in the rows; makes the task `vision_language`."""

    _given: dict[str, str] = PrivateAttr(default_factory=dict)  # dotted key -> file, override, auto, auto: reason
    _is_default: bool = PrivateAttr(default=False)  # --default: planning.auto_config chooses the rest
    _source: str | None = PrivateAttr(default=None)  # the path or URL that was loaded

    @field_validator("num_devices", mode="before")
    @classmethod
    def _one_number(cls, value: Any) -> Any:
        if isinstance(value, dict):  # load_config has divided those that it can
            raise ValueError(f"got {value}, must be a whole number, or two: {{min: 1, max: 2}}")
        return value

    @field_validator("min_devices")
    @classmethod
    def _at_most_num_devices(cls, value: int | None, info: ValidationInfo) -> int | None:
        most = info.data.get("num_devices")
        if value is not None and most is not None and value > most:
            raise ValueError(f"got {value}, num_devices is only {most}")
        return value

    @field_validator("deepspeed", mode="before")
    @classmethod
    def _read_shorthand(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if value.lower() == "none":
            return None
        return {"config_path": value if value.endswith(".json") else f"deepspeed_configs/{value}.json"}

    @field_validator("lora_config")
    @classmethod
    def _known_to_peft(cls, block: dict[str, Any] | None) -> dict[str, Any] | None:
        problems = [f"unknown key {key!r}{near_miss(key, LORA_KEYS)}" for key in block or {} if key not in LORA_KEYS]
        rank = (block or {}).get("r", 8)
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            problems.append(f"r: got {rank!r}, must be a whole number greater than 0")
        start = (block or {}).get("init_lora_weights", True)
        if not isinstance(start, bool) and not _ADAPTER_STARTS.fullmatch(str(start)):
            problems.append(
                f"init_lora_weights: got {start!r}, must be true, gaussian, orthogonal, pissa or pissa_niter_16: "
                "the others need data, or change the base so that a saved adapter would not fit it"
            )
        elif str(start).startswith("pissa") and (block or {}).get("use_dora"):
            problems.append(
                "init_lora_weights: pissa with use_dora cannot be saved as an adapter of the unchanged base"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return block

    @field_validator("rope_scaling")
    @classmethod
    def _known_to_transformers(cls, block: dict[str, Any] | None) -> dict[str, Any] | None:
        if block is None:
            return None
        # transformers once said `type`; today it would take that for no scaling at all.
        block = {("rope_type" if key == "type" else key): value for key, value in block.items()}
        problems = [f"unknown key {key!r}{near_miss(key, _ROPE_KEYS)}" for key in block if key not in _ROPE_KEYS]
        kind = block.get("rope_type")
        if kind not in _ROPE_TYPES:
            problems.append(f"rope_type: got {kind!r}, must be one of {', '.join(_ROPE_TYPES)}")
        factor = block.get("factor")
        if kind != "longrope" and (not isinstance(factor, int | float) or isinstance(factor, bool) or factor < 1):
            problems.append(f"factor: got {factor!r}, must be a number, 1 or more")
        if problems:
            raise ValueError("; ".join(problems))
        return block

    @field_validator("run_name")
    @classmethod
    def _fit_for_a_folder(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"[^/\\.][^/\\]*", name):
            raise ValueError(f"got {name!r}, must be a folder name: not empty, no slash, no dot at its start")
        return name

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        blocks = [block for block in TASK_OF_BLOCK if values.get(block) is not None]
        filled = dict(values)
        if filled.get("task") is None:
            filled["task"] = TASK_OF_BLOCK[blocks[0]] if blocks else "causal_lm"
        for block in ("preference_tuning_config", "vision_language_config"):
            if filled["task"] == TASK_OF_BLOCK[block] and filled.get(block) is None:
                filled[block] = {}
        if filled.get("learning_rate") is None:
            filled["learning_rate"] = 1e-5 if filled.get("lora_config") is None else 1e-4
        return filled

    @model_validator(mode="after")
    def _agree(self) -> Self:
        for block, task in TASK_OF_BLOCK.items():
            if getattr(self, block) is not None and self.task != task:
                raise ValueError(f"{block} means task: {task}, which contradicts task: {self.task}; drop one of them")
        if self.task == "classification" and self.classifier_config is None:
            raise ValueError("task: classification needs classifier_config with its label_tokens")
        if self.task == "preference_tuning" and self.padding == "packed":
            raise ValueError("padding: packed does not pack the pairs of preference_tuning; use longest")
        if self.initial_adapter_model_ckpt_path is not None and not self.is_lora:
            raise ValueError("initial_adapter_model_ckpt_path continues a LoRA adapter: it needs lora_config")
        if self.quantization is not None and not self.is_lora:
            raise ValueError(
                f"quantization: {self.quantization} needs lora_config: quantised weights cannot be trained"
            )
        if self.quantization is not None and str(self.lora_config.get("init_lora_weights")).startswith("pissa"):
            raise ValueError("init_lora_weights: pissa needs weights that are not quantised: drop quantization")
        return self

    def __eq__(self, other: object) -> bool:
        """Compare values alone: where they came from does not matter."""
        return isinstance(other, FinetuneConfig) and self.model_dump() == other.model_dump()

    @property
    def is_lora(self) -> bool:
        """Say whether an adapter is trained instead of all parameters."""
        return self.lora_config is not None

    @property
    def global_batch_size(self) -> int:
        """Count the rows per update over all devices."""
        if self.train_batch_size_per_device is None:
            raise ValueError("train_batch_size_per_device is not chosen yet: resolve() it first")
        return self.train_batch_size_per_device * max(1, self.num_devices) * self.gradient_accumulation_steps

    @property
    def source(self) -> str | None:
        """Tell the path or URL that the config was loaded from."""
        return self._source

    @property
    def is_default(self) -> bool:
        """Say whether what the file leaves open is to be chosen (--default)."""
        return self._is_default

    @property
    def given(self) -> frozenset[str]:
        """Name the keys that the file or an override gives, whole or in part."""
        return frozenset(key.split(".")[0] for key, origin in self._given.items() if origin in ("file", "override"))

    @property
    def origins(self) -> dict[str, str]:
        """Tell of every dotted key where its value came from: file, override, default, auto, or `auto: reason`."""
        return {key: self._origin_of(key) for key in flatten(self.model_dump())}

    def resolve(self, **values: Any) -> Self:
        """Return a copy with values that the program chose: they are checked, and their origin is auto."""
        resolved = type(self).model_validate(self.model_dump() | values)
        changed = {name for name in values if getattr(resolved, name) != getattr(self, name)}
        kept = {key: origin for key, origin in self._given.items() if key.split(".")[0] not in changed}
        resolved._is_default = self._is_default
        return resolved.with_origins(kept | dict.fromkeys(changed, "auto"), self._source)

    def explained(self, reasons: dict[str, str]) -> Self:
        """Return a copy that notes why the program chose the values of these dotted keys."""
        noted = {key: f"auto: {reason}" for key, reason in reasons.items()}
        blocks = {key.split(".")[0]: "auto" for key in reasons if "." in key}
        copy = self.model_copy()
        copy._given = self._given | blocks | noted
        return copy

    def with_origins(self, given: dict[str, str], source: str | None) -> Self:
        """Note which dotted keys were given, by what, and the path or URL of the file."""
        self._given, self._source = given, source
        return self

    def _origin_of(self, key: str) -> str:
        *_, field = parents = prefixes(key)
        for parent in parents:  # `deepspeed=zero_2` gives deepspeed.config_path
            if parent in self._given:
                return self._given[parent]
        untouched = not any(given.startswith(f"{field}.") for given in self._given)
        optional = type(self).model_fields[field].default is None
        return "auto" if optional and untouched and getattr(self, field) is not None else "default"


def flatten(block: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Name every value of a nested block by its dotted key."""
    leaves: dict[str, Any] = {}
    for key, value in block.items():
        dotted = f"{prefix}{key}"
        leaves |= flatten(value, f"{dotted}.") if isinstance(value, dict) and value else {dotted: value}
    return leaves


def prefixes(key: str) -> list[str]:
    """List a dotted key and the blocks around it, innermost first."""
    parts = key.split(".")
    return [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
