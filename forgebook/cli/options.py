"""The commands of main.py and their options, as one table: `arguments` parses by it and prints --help from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from forgebook.config.paths import expand_path

__all__ = ["COMMANDS", "Command"]

A_CONFIG = "CONFIG: a YAML file or an https:// URL"
A_RUN = "RUN: a run's folder, its s3:// or gs:// URI, or its name under runs/"
A_MODEL = "RUN: a run's folder or name, a checkpoint or model folder, or a hub id"
A_JOB = "JOB: the id that submit printed"


# Each reader turns an option's text into its value, or raises ValueError with what the value must be.


def number(text: str) -> float:
    """Read a number."""
    try:
        return float(text)
    except ValueError:
        raise ValueError("a number") from None


def share(text: str) -> float:
    """Read a share: above 0, at most 1."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise ValueError("a share, above 0 and at most 1")
    return value


def at_least(least: int, most: int | None = None) -> Callable[[str], int]:
    """Make a reader of whole numbers."""

    def read(text: str) -> int:
        if not text.isdigit() or int(text) < least or (most is not None and int(text) > most):
            raise ValueError(f"a whole number, {least} or more" + (f", up to {most}" if most is not None else ""))
        return int(text)

    return read


def integer(text: str) -> int:
    """Read a whole number of either sign."""
    try:
        return int(text)
    except ValueError:
        raise ValueError("a whole number") from None


def switch(text: str) -> bool:
    """Read true or false."""
    if text not in ("true", "false"):
        raise ValueError("true or false")
    return text == "true"


def one_of(*names: str) -> Callable[[str], str]:
    """Make a reader of one of some names."""

    def read(text: str) -> str:
        if text not in names:
            raise ValueError(f"one of {', '.join(names)}")
        return text

    return read


@dataclass(frozen=True)
class Option:
    """One `key=value` option of a command. default: the text to read where it is left out; None: no value."""

    name: str
    help: str
    read: Callable[[str], Any] = str
    default: str | None = None


@dataclass(frozen=True)
class Flag:
    """One `--flag` of a command; `settings` go to argparse's add_argument, which takes it for a switch if empty."""

    names: tuple[str, ...]
    help: str
    settings: tuple[tuple[str, Any], ...] = (("action", "store_true"),)


@dataclass(frozen=True)
class Command:
    """One command of main.py. target: what its first argument is; needs_target: whether it has to be there.

    takes_config_keys: `key=value` arguments that are none of its options are overrides of CONFIG.
    """

    name: str
    usage: str
    summary: str
    target: str
    options: tuple[Option, ...] = ()
    flags: tuple[Flag, ...] = ()
    takes_config_keys: bool = False
    needs_target: bool = True


DEFAULT = Flag(("--default",), "choose everything that CONFIG leaves out, and print the reasons")
JSON = Flag(("--json",), "print JSON")
CHECKPOINT = Option("checkpoint", "one of the run's checkpoints, such as epoch-2; default: the best")
ADDRESS = Option(
    "address", "the cluster's job server; default: RAY_API_SERVER_ADDRESS, an http RAY_ADDRESS, or this machine's"
)
SAMPLING = (
    Option("temperature", "0 (the default) is greedy", number),
    Option("top_p", "sample among the most likely tokens with this share of the probability; default 1", number),
    Option("seed", "the same seed gives the same answers; default 0", integer),
)

_TABLE = (
    Command(
        "",
        "CONFIG [--default] [key=value ...]",
        "Fine-tune as CONFIG says, or resume the run of that name. The other commands: python main.py --help",
        A_CONFIG,
        flags=(DEFAULT,),
        takes_config_keys=True,
    ),
    Command(
        "plan",
        "CONFIG [hardware=8xA100-80G] [mfu=0.4] [fit=true] [--default] [--json] [key=value ...]",
        "Memory, time and cost of a run; trains nothing. hardware: how many of which GPU.",
        A_CONFIG,
        (
            Option("mfu", "model FLOPs utilization to assume; default: from earlier runs on this machine", share),
            Option("fit", "true: write the fastest settings that fit as RUN_NAME-fit.yaml", switch, "false"),
        ),
        (DEFAULT, JSON),
        takes_config_keys=True,
    ),
    Command(
        "preview",
        "CONFIG [n=3] [--json] [--default] [key=value ...]",
        "Examples as the model will see them, tokens in the loss highlighted.",
        A_CONFIG,
        (Option("n", "number of examples; default 3", at_least(1), "3"),),
        (DEFAULT, JSON),
        takes_config_keys=True,
    ),
    Command(
        "tune",
        "CONFIG 'KEY=[A,B]' 'KEY=loguniform(LOW,HIGH)' [samples=N] [--default] [--json] [key=value ...]",
        "A sweep with Ray Tune: one run for each combination of the values in lists. Runs with a worse evaluation loss "
        "than half of the others are stopped early (ASHA). 'KEY=[A,B]': each of these; 'KEY=uniform(LOW,HIGH)', "
        "'KEY=loguniform(LOW,HIGH)': sampled. A list as one value: 'KEY=[[a,b]]'. The same command resumes the sweep.",
        A_CONFIG,
        (Option("samples", "how many times to sample from uniform and loguniform", at_least(1)),),
        (DEFAULT, JSON),
        takes_config_keys=True,
    ),
    Command(
        "submit",
        "CONFIG [address=http://HEAD:8265] [--no-follow] [--format kuberay|anyscale] [--default] [key=value ...]",
        "The same run as a job on a Ray cluster: uploads this repository, then prints the log (CLUSTERS.md).",
        A_CONFIG,
        (
            ADDRESS,
            Option("image", "with --format: a container image with requirements.txt installed"),
            Option("working_dir", "with --format: a zip of this repository, or its folder in the image"),
            Option("max_retries", "with --format: how often the job is restarted; default 1", at_least(0)),
            Option("gpus_per_node", "with --format kuberay; default 1", at_least(1)),
            Option("secret", "with --format kuberay: name of the Kubernetes secret; default forgebook"),
        ),
        (
            DEFAULT,
            Flag(("--no-follow",), "return as soon as the job is accepted"),
            Flag(("--format",), "print a job file; submit nothing", (("choices", ("kuberay", "anyscale")),)),
        ),
        takes_config_keys=True,
    ),
    Command(
        "curate",
        "CONFIG out=FILE.jsonl [run=RUN] [judge=MODEL] [base_url=URL] [key=value ...]",
        "Write the training examples that are worth training on to a new file, with a report as JSON and as a page: "
        "duplicates, overlap with the validation examples, empty, truncated and refusing answers, personal data. "
        "curation.KEY=VALUE sets what is dropped (forgebook/config/curation_blocks.py). Nothing is changed in place.",
        A_CONFIG,
        (
            Option("out", "the file to write, as JSON lines", expand_path),
            Option("run", "a run or model: examples that it finds unlikely are reported as high_loss", expand_path),
            Option("judge", "the model that scores the answers, as curation.critic.model"),
            Option("base_url", "URL of its OpenAI-compatible endpoint, as curation.critic.base_url"),
        ),
        takes_config_keys=True,
    ),
    Command(
        "synthesize",
        "CONFIG out=FILE.jsonl [teacher=MODEL] [base_url=URL] [count=N] [key=value ...]",
        "Write new training examples with a teacher behind an OpenAI-compatible URL: like the seeds of the config, or "
        "new answers to their questions; checked by a JSON schema, the right final answer or a function of yours; none "
        "that repeats a seed or a validation example. The block synthesis of the config sets how (DATA.md). The same "
        "command resumes.",
        A_CONFIG,
        (
            Option("out", "the file to write, as JSON lines", expand_path),
            Option("teacher", "the model that writes, as synthesis.teacher.model"),
            Option("base_url", "URL of its OpenAI-compatible endpoint, as synthesis.teacher.base_url"),
            Option("count", "examples to accept, as synthesis.count", at_least(1)),
        ),
        takes_config_keys=True,
    ),
    Command("status", "JOB [address=http://HEAD:8265]", "The state of a job.", A_JOB, (ADDRESS,)),
    Command(
        "stop", "JOB [address=http://HEAD:8265]", "Stop a job; its checkpoints and state remain.", A_JOB, (ADDRESS,)
    ),
    Command(
        "evaluate",
        "RUN [data=FILE] [metric=NAME] [rows=N] [checkpoint=epoch-2]",
        "Compare a run with its base model on held-out examples: figures with 95% intervals, a paired test, and the "
        "mistakes in a file to read.",
        A_RUN,
        (
            Option("data", "held-out examples; default: the run's validation file", expand_path),
            Option(
                "metric",
                "exact_match, anls, gsm8k, tool_calls, classification, preference, perplexity or judge; default: by "
                "task",
            ),
            Option("rows", "only the first N examples", at_least(1)),
            CHECKPOINT,
            Option(
                "max_new_tokens",
                "longest answer, in tokens; default: 1.5 times the longest reference, at most 512 more, at least 128",
                at_least(1),
            ),
            Option("engine", "what generates the answers: auto (the default), transformers or vllm"),
            Option("judge", "for metric=judge: the name of the judging model"),
            Option("base_url", "for metric=judge: URL of its OpenAI-compatible endpoint"),
            Option("lm_eval", "tasks of lm-eval instead, such as gsm8k,arc_easy"),
            Option("lm_eval_folder", "folder of your own lm-eval tasks", expand_path),
        ),
    ),
    Command(
        "generate",
        "RUN [data=FILE | -p TEXT ...] [out=FILE] [key=value ...]",
        "Answer prompts, to the terminal or to a file.",
        A_MODEL,
        (
            Option("data", "a file of prompts: examples with messages, also with images", expand_path),
            Option("out", "write JSON lines to this file; an interrupted command resumes", expand_path),
            Option("rows", "only the first N prompts", at_least(1)),
            CHECKPOINT,
            Option("max_new_tokens", "longest answer, in tokens; default 128", at_least(1)),
            *SAMPLING,
            Option("batch_size", "prompts at a time; default: as many as fit in memory", at_least(1)),
            Option("engine", "auto (the default), transformers or vllm"),
            Option("num_devices", "number of Ray workers; default: this process", at_least(1)),
        ),
        (Flag(("-p", "--prompt"), "a prompt; may be repeated", (("action", "append"), ("default", []))),),
    ),
    Command(
        "chat",
        "RUN [checkpoint=epoch-2] [system=TEXT] [temperature=0.7] [top_p=0.9] [key=value ...]",
        "Chat with a model in the terminal. /image PATH shows it an image with the next message, /reset clears the "
        "conversation, /exit or Ctrl-D ends it, Ctrl-C ends an answer.",
        A_MODEL,
        (
            CHECKPOINT,
            Option("system", "the system message"),
            Option("max_new_tokens", "longest answer, in tokens; default 1024", at_least(1), "1024"),
            *SAMPLING,
        ),
    ),
    Command(
        "merge",
        "RUN OUT [checkpoint=NAME]",
        "Merge a run's adapter into its 16-bit base, write the model to the folder OUT, and compare it with adapter "
        "and base. RUN may also be a checkpoint folder.",
        A_RUN,
        (CHECKPOINT,),
    ),
    Command(
        "serve",
        "RUN [RUN ...] [--ui] [port=8000] [host=127.0.0.1] [key_file=FILE] [engine=auto] [dtype=float32]",
        "Serve one or more runs at an OpenAI-compatible endpoint; a request's model is a run's name. --ui: with the "
        "base model, and a page that shows the answers of both side by side.",
        A_RUN,
        (
            Option("port", "0 takes a free one; default 8000", at_least(0, 65535), "8000"),
            Option("host", "default 127.0.0.1; any other host needs a key", default="127.0.0.1"),
            Option("key_file", "a file of mode 600 with what clients must send; or set FORGEBOOK_API_KEY", expand_path),
            Option("key", "the key itself; others can read it while the command starts, until it is moved out of view"),
            Option("engine", "transformers, vllm, or auto: vLLM where it is installed and can", default="auto"),
            Option("dtype", "default: the run's own", one_of("float32", "bfloat16", "float16")),
        ),
        (Flag(("--ui",), "also serve the base model, and a chat page at the address without /v1"),),
    ),
    Command(
        "models",
        "[STORAGE_PATH] [--json]  |  models show RUN [--json]  |  models delete RUN [--yes]",
        "List the models fine-tuned under STORAGE_PATH (runs/, another folder, s3:// or gs://), show or delete one. "
        "delete asks first, and refuses if other runs start from the model.",
        A_RUN,
        flags=(JSON, Flag(("--yes",), "delete without asking")),
    ),
    Command(
        "push",
        "RUN OWNER/NAME [private=true] [base=OWNER/NAME]",
        "Upload a run's best checkpoint to the Hugging Face hub (HF_ENDPOINT, HF_TOKEN), with a model card.",
        A_RUN,
        (
            Option("private", "true: a private repository", switch, "false"),
            Option("base", "hub id of the base model, where the run read it from a folder"),
        ),
    ),
    Command(
        "export",
        "MODEL OUT.gguf [type=q8_0] [ollama=true] [checkpoint=NAME]",
        "Write a model as a GGUF file with llama.cpp's converter, from $LLAMA_CPP or the PATH. An adapter is merged "
        "into its base first, which takes as much disk space as the base.",
        "MODEL: a run's folder or name, or a checkpoint or model folder",
        (
            Option("type", "f32, f16, bf16, q8_0 (the default), ...", default="q8_0"),
            Option("ollama", "true: also OUT.Modelfile, with the prompt template and the stop tokens", switch, "false"),
            CHECKPOINT,
        ),
    ),
    Command(
        "doctor",
        "[CONFIG] [--json] [--default] [key=value ...]",
        "Check this machine: versions, devices, attention kernels, disk, buckets, Ray. With CONFIG, also its template, "
        "end of turn and first example, and the next of six steps that find out why a run does not learn. Exit code: "
        "1 if something needs a fix.",
        A_CONFIG,
        flags=(DEFAULT, JSON),
        takes_config_keys=True,
        needs_target=False,
    ),
    Command(
        "schema",
        "",
        "The keys of a config as a JSON schema, by which an editor completes and checks a YAML (CONFIG.md).",
        "",
        needs_target=False,
    ),
)
COMMANDS = {command.name: command for command in _TABLE}
