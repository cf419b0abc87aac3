"""Every key of a config file: its type, its default and what it means.

    FinetuneConfig      as written: what the file leaves open is None
    ResolvedConfig      ready to train: nothing that training needs is None

`parse` reads files into these classes; `blocks` holds the nested ones. Nothing here reads a file or needs a GPU stack.
"""

from functools import cache
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import Field, PrivateAttr, ValidationInfo, field_validator, model_validator

from forgebook.config.block_keys import flatten, marked_keys, prefixes
from forgebook.config.blocks import (
    SHARDING_KEYS,
    TASK_OF_BLOCK,
    CheckpointFrequency,
    ClassifierConfig,
    DeepSpeed,
    DeepSpeedFile,
    EarlyStopping,
    EvalGeneration,
    Fsdp,
    GenerationConfig,
    LigerKernel,
    Logger,
    Loggers,
    Mark,
    PreferenceTuningConfig,
    Sharding,
    StrictBlock,
    Task,
    VisionLanguageConfig,
    WeightsPath,
    with_deepspeed,
    with_one_sharding,
)
from forgebook.config.curation_blocks import CurationConfig, SynthesisConfig
from forgebook.config.data_block import DataPath, ValidPath, with_training_system
from forgebook.config.values import (
    AnswerMetric,
    BestMetric,
    Examples,
    Float,
    Fraction,
    Int,
    LoraBlock,
    Positive,
    Recomputation,
    Resources,
    RopeBlock,
    RunName,
    Switch,
)

__all__ = [
    "DEFAULT_LORA",
    "EVERY_EPOCH",
    "LEARNING_RATES",
    "FinetuneConfig",
    "ResolvedConfig",
    "keys_without_effect",
]

Rate = Annotated[Float, Field(gt=0)]
EVERY_EPOCH = CheckpointFrequency(unit="epochs", frequency=1)
LEARNING_RATES = {"lora": 1e-4, "full": 1e-5}  # LLMForge's
DEFAULT_LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": "all-linear"}  # of --default


class FinetuneConfig(StrictBlock):
    """One fine-tuning run, as written. Only `model_id` and `train_path` are required."""

    # -- model and data
    model_id: str
    """Model to fine-tune: a Hugging Face id or a folder."""
    train_path: DataPath
    """Training examples: JSON lines, JSON, Parquet, Arrow or CSV, also compressed; a file, a folder of them or of
    `datasets.save_to_disk`, s3://, gs://, https:// or hf://owner/name[/config]:split; `*` matches several files. A
    block maps columns: `{path: a.csv, columns: {user: question, assistant: answer}}`; a list mixes: `[a.jsonl,
    {path: b.jsonl, weight: 0.5}]`."""
    valid_path: Annotated[ValidPath | None, Mark.AUTO] = None
    """Validation examples; `{split: 0.05}` holds out a share of the training examples. None: no evaluation loss, and
    the last checkpoint counts as the best."""
    max_examples: Positive | None = None
    """Train on a random sample of so many examples, the same each time, and evaluate on at most as many: to try out a
    config. None: all."""
    task: Annotated[Task | None, Mark.AUTO] = None
    """Which tokens are in the loss. None: the task of the block that is set, else causal_lm (every token)."""
    initial_base_model_ckpt_path: WeightsPath | None = None
    """Start from these weights instead of those of `model_id`: a path or `{repo_id: ...}`."""
    initial_adapter_model_ckpt_path: WeightsPath | None = None
    """Start from this LoRA adapter; needs `lora_config`."""
    generation_config: GenerationConfig = GenerationConfig()
    """Prompt format and stop sequences."""
    context_length: Annotated[Positive | None, Mark.AUTO] = None
    """Longest example, in tokens. None: the base model's own context, or the data's 95th percentile if longer."""
    truncation: Literal["error", "drop", "left", "right"] = "error"
    """Longer examples: reject the data, drop them, or cut their start or end. A tail outside the loss is always cut."""
    padding: Annotated[Literal["longest", "max_length", "packed"], Mark.AUTO] = "longest"
    """Pad a batch to its longest example, or to `context_length` to measure the worst case. packed: fill sequences
    of `context_length` with whole examples, without cross-contamination; a batch then counts sequences."""
    train_on: Literal["all", "last"] = "all"
    """Which assistant turns are in the loss: all, or the last one of an example."""
    rewritten_turns: Literal["refuse", "expand"] = "refuse"
    """Where a template renders earlier answers differently once turns follow: reject, or an example of each answer."""
    on_bad_rows: Literal["fail", "drop"] = "fail"
    """Malformed examples: stop, or drop and report them. A file that cannot be read to its end always stops the run."""
    rope_scaling: RopeBlock | None = None
    """Extend the context, e.g. `{rope_type: linear, factor: 2.0}` (linear, dynamic, yarn, longrope, llama3); saved with
    the checkpoint: in its config.json, or in config_overrides.json next to an adapter."""

    # -- one optimizer step
    lora_config: Annotated[LoraBlock | None, Mark.AUTO] = None
    """Arguments of peft.LoraConfig: r, target_modules, use_dora, init_lora_weights: pissa... None: full fine-tuning."""
    quantization: Annotated[Literal["nf4", "int8"] | None, Mark.AUTO] = None
    """Hold the frozen weights in 4 bits (QLoRA: NF4, double quantization) or 8, through bitsandbytes; embeddings and
    output layer stay as they are. Needs `lora_config`; not with ZeRO-3 or FSDP2."""
    train_batch_size_per_device: Annotated[Examples | None, Mark.AUTO] = None
    """Examples per device and forward pass. None: 16 for contexts to 512, 8 to 1024, 4 to 2048, 2 to 4096, else 1."""
    eval_batch_size_per_device: Annotated[Examples | None, Mark.AUTO, Mark.NO_EFFECT] = None
    """The same for evaluation."""
    gradient_accumulation_steps: Annotated[Examples, Mark.AUTO] = 1
    """Forward passes per optimizer step."""
    learning_rate: Annotated[Rate | None, Mark.AUTO] = None
    """Peak learning rate. None: 1e-4 for LoRA, 1e-5 for full fine-tuning."""
    lr_scheduler_type: Literal["cosine", "linear", "constant", "wsd", "cosine_with_min_lr"] = "cosine"
    """Schedule of the learning rate after the warm-up. wsd: constant, then a cosine over the last steps."""
    min_lr_ratio: Fraction | None = None
    """The learning rate at the end of the schedule, as a share of the peak. None: cosine_with_min_lr 0.1, else 0."""
    lr_decay_ratio: Annotated[Float, Field(gt=0, le=1)] = 0.1
    """wsd: the share of all optimizer steps over which the learning rate falls."""
    num_warmup_steps: Annotated[Int, Field(ge=0), Mark.AUTO] = 10
    """Optimizer steps over which the learning rate rises linearly from zero. Not set, in a run of so few: a tenth."""
    weight_decay: Annotated[Float, Field(ge=0)] = 0.0
    """Weight decay of AdamW."""
    decay_norms_and_biases: bool = False
    """Apply weight_decay to norms and biases, too, as versions before this key did."""
    loraplus_lr_ratio: Annotated[Float, Field(ge=1)] | None = None
    """LoRA+ (arXiv 2402.12354): the learning rate of the B matrices, as a multiple of that of A; 16 in the paper."""
    adam_betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)] = (0.9, 0.999)
    """Decay rates of AdamW's moments."""
    adam_epsilon: Annotated[Float, Field(gt=0)] = 1e-8
    """Added to AdamW's denominator."""
    max_grad_norm: Annotated[Float, Field(ge=0)] = 1.0
    """Clip gradients to this norm; 0: no clipping."""
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "adafactor", "muon"] = "adamw"
    """adamw_8bit: both moments in 8 bits, through bitsandbytes; tensors of fewer than 4,096 elements keep 32.
    paged_adamw_8bit: moves them to the host while the GPU lacks memory. adafactor (arXiv 1804.04235): a row and column
    for a matrix. muon: for matrices of linear layers, with updates of AdamW's size; all other weights by AdamW."""
    neftune_noise_alpha: Rate | None = None
    """Add noise to the embeddings in training, uniform in +-alpha / sqrt(length * width) of the padded batch
    (NEFTune, arXiv 2310.05914). None: no noise."""

    # -- length of the run
    num_epochs: Annotated[Positive | None, Mark.AUTO] = None
    """Passes over the data. None: the fewest that give `min_update_steps` optimizer steps."""
    min_update_steps: Positive = 100
    """Fewest optimizer steps when `num_epochs` is not set."""
    max_steps: Positive | None = None
    """Stop after this many optimizer steps, whatever `num_epochs` says."""
    seed: Int = 42
    """Seed of shuffling, dropout and new weights."""

    # -- memory and speed
    dtype: Annotated[Literal["bfloat16", "float16", "float32"], Mark.AUTO] = "bfloat16"
    """Number format of the forward and backward pass. float16, with a loss scale: for GPUs without bfloat16 (T4)."""
    tf32: bool = False
    """With float32: multiply in TF32, three decimal digits at several times the speed, on Ampere GPUs and later."""
    deepspeed: Annotated[DeepSpeedFile | None, Mark.AUTO] = DeepSpeed()
    """The DeepSpeed file; `zero_2` is short for its file in deepspeed_configs/. None: no DeepSpeed."""
    sharding: Sharding | None = None
    """none: each device holds the whole model (DDP); zero_1 to zero_3: that DeepSpeed file; fsdp: PyTorch's FSDP2."""
    fsdp: Annotated[Fsdp, Mark.NO_EFFECT] = Fsdp()
    """What FSDP2 keeps gathered, and where its parts are."""
    gradient_checkpointing: Annotated[Recomputation, Mark.AUTO, Mark.NO_EFFECT] = "auto"
    """Recompute activations in the backward pass: true is about a third slower and takes far less memory; selective
    keeps the results of matrix products and attention, about half of the memory; offload is true with the inputs of
    layers in the host's memory. auto: the least that fits."""
    tiled_mlp: Annotated[bool, Mark.NO_EFFECT] = False
    """Compute each MLP in tiles of as many tokens as the model is wide, and again in the backward pass: for contexts
    whose inner activations do not fit."""
    attention: Annotated[
        Literal["auto", "flash_attention_2", "flash_attention_3", "varlen", "sdpa", "flex", "eager"], Mark.AUTO
    ] = "auto"
    """Attention kernel. auto: the fastest that the device has. varlen: torch's own for examples of different lengths in
    one line; with it and with flash attention a batch has no padding."""
    liger_kernel: Annotated[LigerKernel, Mark.NO_EFFECT] = LigerKernel()
    """Fused Triton kernels."""
    torch_compile: Switch = False
    """Compile the decoder's layers, at the first step and for new shapes; a block holds arguments of torch.compile."""
    profile: Annotated[bool, Mark.NO_EFFECT] = False
    """Profile steps 5 to 8: a trace for ui.perfetto.dev in the run folder, and a table of where the time goes."""

    # -- machines
    hardware: Annotated[str | None, Mark.AUTO, Mark.NO_EFFECT] = None
    """The hardware that the run is planned for and that --default chooses for, such as `8xA100-80G`
    (forgebook/catalog.yaml lists the GPUs). None: this machine's."""
    num_devices: Annotated[Int, Field(ge=0), Mark.AUTO] = 1
    """Workers, one GPU each; 0: in this process, without a Ray cluster. `{min: 1, max: 2}` also sets min_devices."""
    min_devices: Annotated[Annotated[Int, Field(ge=1)] | None, Mark.NO_EFFECT] = None
    """When machines are lost, continue with as few workers as this; `sharding: none` or fsdp. None: wait for them."""
    sequence_parallel: Positive = 1
    """Workers that share each example, for contexts too long for one GPU; one device to the batch size."""
    address: Annotated[str | None, Mark.NO_EFFECT] = None
    """A running Ray cluster to join, `HOST:6379` or `auto`, unless RAY_ADDRESS is set. None: one is started here."""
    worker_resources: Annotated[Resources, Mark.NO_EFFECT] = Field(default={})
    """Ray resources of every worker, e.g. `accelerator_type:A10G: 0.001` (any value in (0, 1])."""
    trainer_resources: Annotated[Resources, Mark.NO_EFFECT] = Field(default={})
    """Not reserved: Ray Train gives every worker the same resources. Read for compatibility."""
    num_data_blocks_per_device: Annotated[Positive, Mark.NO_EFFECT] = 16
    """Blocks of data per device; with more, separate log-probability workers stay ahead of training."""
    max_failures: Annotated[Int, Field(ge=0), Mark.NO_EFFECT] = 3
    """How often failed workers are restarted from the last checkpoint."""

    # -- evaluation, checkpoints and tracking
    eval_first: Annotated[bool, Mark.NO_EFFECT] = False
    """Evaluate once before training."""
    checkpoint_and_evaluation_frequency: Annotated[CheckpointFrequency | None, Mark.AUTO] = None
    """When to evaluate and save. None: after every epoch."""
    early_stopping: EarlyStopping | None = None
    """End the run once the evaluation loss has stopped falling, as `{patience: 3, min_delta: 0.001}`."""
    eval_generation: Annotated[EvalGeneration | None, Mark.NO_EFFECT] = None
    """Answer validation prompts greedily at evaluations, as `{prompts: 50, every: 1}`; print and log some answers."""
    metrics: Annotated[list[AnswerMetric], Mark.NO_EFFECT] = Field(default=[])
    """Metrics of what follows the thought. exact_match: the reference; tool_calls, tool_accuracy: its calls."""
    best_metric: BestMetric = "eval_loss"
    """What chooses the best checkpoint: the lowest evaluation loss, or the highest of these metrics."""
    num_checkpoints_to_keep: Annotated[Positive, Mark.NO_EFFECT] = 1
    """Keep this many checkpoints, the best by `best_metric`."""
    save_state_minutes: Annotated[Float, Field(ge=0)] = 15
    """Save the state for resuming at least this often between checkpoints; 0: only with them."""
    run_name: Annotated[RunName | None, Mark.NO_EFFECT] = None
    """Folder of the run under `storage_path`. None: the name of the config file without its extension."""
    force: Annotated[bool, Mark.NO_EFFECT] = False
    """Start even if the plan says that the run does not fit."""
    storage_path: Annotated[str, Mark.NO_EFFECT] = "runs"
    """Folder of all runs, or a bucket path, s3:// or gs://: runs then work in $FORGEBOOK_CACHE and are uploaded
    during training."""
    on_existing: Annotated[Literal["resume", "overwrite", "fail"], Mark.NO_EFFECT] = "resume"
    """What happens if the run folder exists."""
    custom_model_tag: Annotated[str | None, Mark.NO_EFFECT] = None
    """Name under which the fine-tuned model is listed. None: generated."""
    logger: Annotated[Loggers | None, Mark.NO_EFFECT] = None
    """Experiment tracker, or a list of them."""

    # -- blocks that choose the task
    classifier_config: ClassifierConfig | None = None
    """Labels to learn; sets the task to `classification`."""
    preference_tuning_config: PreferenceTuningConfig | None = None
    """Pairs to learn from; sets the task to `preference_tuning`."""
    vision_language_config: VisionLanguageConfig | None = None
    """Images in the examples; sets the task to `vision_language`."""

    # -- other commands
    curation: Annotated[CurationConfig | None, Mark.NO_EFFECT] = None
    """What `curate` drops."""
    synthesis: Annotated[SynthesisConfig | None, Mark.NO_EFFECT] = None
    """What `synthesize` writes."""

    _origins: dict[str, str] = PrivateAttr(default_factory=dict)  # dotted key -> file, override, auto, auto: reason
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

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        blocks = [block for block in TASK_OF_BLOCK if values.get(block) is not None]
        filled = with_training_system(with_deepspeed(values))
        filled["task"] = filled.get("task") or (TASK_OF_BLOCK[blocks[0]] if blocks else "causal_lm")
        for block in ("preference_tuning_config", "vision_language_config"):
            if filled["task"] == TASK_OF_BLOCK[block] and filled.get(block) is None:
                filled[block] = {}
        if filled.get("learning_rate") is None:
            filled["learning_rate"] = LEARNING_RATES["full" if filled.get("lora_config") is None else "lora"]
        return filled

    def __eq__(self, other: object) -> bool:
        """Compare values alone: where they came from does not matter."""
        return isinstance(other, FinetuneConfig) and self.model_dump() == other.model_dump()

    @property
    def is_lora(self) -> bool:
        """Report whether an adapter is trained instead of all parameters."""
        return self.lora_config is not None

    @property
    def global_batch_size(self) -> int:
        """Count the examples per optimizer step, over all devices."""
        if self.train_batch_size_per_device is None:
            raise ValueError("train_batch_size_per_device is not chosen yet: resolve() it first")
        shares = max(1, self.num_devices // self.sequence_parallel)
        return self.train_batch_size_per_device * shares * self.gradient_accumulation_steps

    @property
    def loggers(self) -> list[Logger]:
        """List the experiment trackers."""
        return self.logger if isinstance(self.logger, list) else [self.logger] if self.logger else []

    @property
    def source(self) -> str | None:
        """Return the path or URL that the config was loaded from."""
        return self._source

    @property
    def is_default(self) -> bool:
        """Report whether --default chooses what the file leaves open."""
        return self._is_default

    @property
    def explicit_keys(self) -> frozenset[str]:
        """List the top-level keys that the file or an override sets, in whole or in part."""
        return frozenset(key.split(".")[0] for key, origin in self._origins.items() if origin in ("file", "override"))

    @property
    def origins(self) -> dict[str, str]:
        """Map every dotted key to where its value came from: file, override, default, auto, or `auto: reason`."""
        return {key: self._origin_of(key) for key in flatten(self.model_dump())}

    def resolve(self, **values: Any) -> Self:
        """Return a copy with values that the program chose: they are checked, and their origin is auto."""
        return self._rebuilt(type(self), values)

    def resolved(self, **values: Any) -> "ResolvedConfig":
        """Return a config that is ready to train; `values` fill what the file leaves open, with the origin auto.

        Raises pydantic's ValidationError if something that training needs is still None.
        """
        if self.checkpoint_and_evaluation_frequency is None:
            values = {"checkpoint_and_evaluation_frequency": EVERY_EPOCH.model_dump()} | values
        return self._rebuilt(ResolvedConfig, values)

    def _rebuilt(self, kind: "type[_Config]", values: dict[str, Any]) -> "_Config":
        """Check and copy into a class of configs, with the origins, the source and whether --default chooses."""
        copy = kind.model_validate(with_one_sharding(self.model_dump(), values))
        changed = {name for name in {*values, *SHARDING_KEYS} if getattr(copy, name) != getattr(self, name)}
        unchanged = {key: origin for key, origin in self._origins.items() if key.split(".")[0] not in changed}
        copy._is_default = self._is_default
        return copy.with_origins(unchanged | dict.fromkeys(changed, "auto"), self._source)

    def explained(self, reasons: dict[str, str]) -> Self:
        """Return a copy that records why the program chose the values of these dotted keys."""
        noted = {key: f"auto: {reason}" for key, reason in reasons.items()}
        copy = self.model_copy()
        copy._origins = self._origins | noted
        return copy

    def with_origins(self, origins: dict[str, str], source: str | None) -> Self:
        """Record which dotted keys were set, by what, and the path or URL of the file."""
        self._origins, self._source = origins, source
        return self

    def _origin_of(self, key: str) -> str:
        *_, field = parents = prefixes(key)
        for parent in parents:  # `deepspeed=zero_2` sets deepspeed.config_path
            if parent in self._origins:
                return self._origins[parent]
        is_unset = not any(origin.startswith(f"{field}.") for origin in self._origins)
        optional = FinetuneConfig.model_fields[field].default is None
        return "auto" if optional and is_unset and getattr(self, field) is not None else "default"


class ResolvedConfig(FinetuneConfig):
    """A config whose gaps are filled, as training takes it. Made by `FinetuneConfig.resolved`."""

    task: Annotated[Task, Mark.AUTO]
    context_length: Annotated[Positive, Mark.AUTO]
    train_batch_size_per_device: Annotated[Examples, Mark.AUTO]
    eval_batch_size_per_device: Annotated[Examples, Mark.AUTO, Mark.NO_EFFECT]
    learning_rate: Annotated[Rate, Mark.AUTO]
    num_epochs: Annotated[Positive, Mark.AUTO]
    checkpoint_and_evaluation_frequency: Annotated[CheckpointFrequency, Mark.AUTO]
    run_name: Annotated[RunName, Mark.NO_EFFECT]


_Config = TypeVar("_Config", bound=FinetuneConfig)


@cache
def keys_without_effect() -> frozenset[str]:
    """List the dotted keys that may change between two starts of one run: its weights do not depend on them."""
    return frozenset(marked_keys(FinetuneConfig, Mark.NO_EFFECT))
