"""A run's best checkpoint on the Hugging Face hub, with a model card.

push_to_hub(run, "owner/name")      as one commit
model_card(run, ...)                its README.md
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from forgebook.catalog import hub_id_of
from forgebook.config.parse import load_config, load_resolved
from forgebook.errors import ConfigError, ModelError, StorageError, first_line
from forgebook.models import adapters
from forgebook.models.load import auto_class
from forgebook.models.tokenizer import copy_of, locate, readable_model_errors
from forgebook.runs import atomic, object_store, registry
from forgebook.runs.checksums import check_files
from forgebook.runs.run import Run, best_checkpoint

__all__ = ["model_card", "push_to_hub"]


def push_to_hub(run: Run, repo_id: str, private: bool = False, base: str | None = None) -> str:
    """Upload a run's best checkpoint and a model card to the hub of HF_ENDPOINT; return its address.

    base: the hub id of the base model, for an adapter that was trained on a local copy of it. The token is HF_TOKEN, or
    what `hf auth login` has stored.

    Raises ConfigError if others could not load it, StorageError if the hub rejects the upload.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    checkpoint = best_checkpoint(run)
    check_files(checkpoint)
    base = base or _public_base(run, checkpoint)
    hub = HfApi(token=os.environ.get("HF_TOKEN") or None)
    with tempfile.TemporaryDirectory() as folder:
        staged = Path(folder)
        for path in checkpoint.iterdir():
            (staged / path.name).symlink_to(path.resolve())
        _replace(staged / "README.md", model_card(run, repo_id, base))
        if (adapter := staged / "adapter_config.json").exists():
            settings = atomic.read_json(adapter) | {"base_model_name_or_path": base}
            _replace(adapter, json.dumps(settings, indent=2, sort_keys=True))
        try:
            address = hub.create_repo(repo_id, private=private, exist_ok=True)
            message = f"{run.name}: {checkpoint.name}"
            hub.upload_folder(repo_id=repo_id, folder_path=staged, commit_message=message)
        except HFValidationError as error:
            raise ConfigError(f"push: {repo_id!r} is not a repository name: {first_line(error)}") from None
        except LocalTokenNotFoundError:
            raise ConfigError("push: the hub needs a token: set HF_TOKEN, or run `hf auth login`") from None
        except HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else None
            fix = ": set HF_TOKEN to a token that may write there" if status in (401, 403) else ""
            raise StorageError(f"{repo_id} could not be written on the hub{fix} ({first_line(error)})") from None
        except OSError as error:
            raise StorageError(f"{repo_id} could not be written on the hub: {first_line(error)}") from None
    return str(address)


def _public_base(run: Run, checkpoint: Path) -> str:
    """Return the base model as others can load it; for full weights, which need no base, only for the card."""
    model_id, lora_config = load_config(run.config).model_id, adapters.read_lora_config(checkpoint)
    if lora_config is None:
        source = model_id if isinstance(model_id, str) and object_store.is_remote(model_id) else locate(model_id)
        return hub_id_of(source) or source
    base = lora_config["base_model_name_or_path"]
    if Path(base).exists() or object_store.is_remote(base):
        raise ConfigError(
            f"push: the adapter's base is {base}, which others cannot load: name its hub id with base=OWNER/NAME, or "
            "merge the adapter into it first"
        )
    return base


def model_card(run: Run, repo_id: str, base: str) -> str:
    """Return the README.md of a model: what it is, what it was trained on, its figures, how to load it."""
    from huggingface_hub import ModelCardData

    config, record = load_resolved(run.config), registry.get_model(run.uri or str(run.folder))
    summary, report = atomic.read_json(run.summary), atomic.read_json(run.data_report)
    is_public = not (Path(base).exists() or object_store.is_remote(base))
    facts = ModelCardData(
        base_model=base if is_public else None,
        library_name="peft" if config.is_lora else "transformers",
        pipeline_tag="text-generation",
        tags=["forgebook", config.task, "lora" if config.is_lora else "full-fine-tuning"],
    )
    training = {
        "base model": base if is_public else Path(base).name,
        "method": record.ft_type,
        "learning rate": f"{config.learning_rate:g}, {config.lr_scheduler_type}",
        "examples per step": f"{config.global_batch_size}",
        "epochs": f"{summary['epochs']:g} ({summary['steps']:,} steps)",
        "context length": f"{config.context_length:,} tokens",
        "training examples": _describe(report["train"]),
        **({"validation examples": _describe(report["valid"])} if "valid" in report else {}),
    }
    numbers = {name: value for name, value in record.figures.items() if isinstance(value, int | float)}
    figures = {
        name.replace("_", " "): f"{value:.4g}" if isinstance(value, float) else f"{value:,}"
        for name, value in numbers.items()
    }
    parts = [
        f"---\n{facts.to_yaml()}\n---",
        f"# {repo_id.rpartition('/')[2]}",
        "Fine-tuned with Forgebook.",
        _table(training),
        *(["## Figures\n\nOf this checkpoint.", _table(figures)] if figures else []),
        "## Use",
        f"```python\n{_loading(repo_id, base, config.is_lora, _class_name(best_checkpoint(run)))}\n```",
    ]
    if (verdict := summary.get("vllm_serves") or "").startswith("no: "):
        parts.append(f"vLLM cannot serve the adapter: {verdict.removeprefix('no: ')}. Merge it into its base first.")
    return "\n\n".join(parts) + "\n"


def _describe(data: dict[str, Any]) -> str:
    """Count a set's examples; name it only if all of it is public."""
    paths = [path.partition("?")[0] for path in data["path"].split(", ")]  # what follows may be a signature
    path = f" of {', '.join(paths)}" if all(one.startswith(("hf://", "https://")) for one in paths) else ""
    return f"{data['rows']:,}{path}, {data['supervised_tokens']:,} supervised tokens"


def _table(rows: dict[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows.items())])


def _class_name(checkpoint: Path) -> str:
    """Name the class of transformers whose layers have the names of a checkpoint's: the published one."""
    from transformers import AutoConfig

    source = copy_of((adapters.read_lora_config(checkpoint) or {}).get("base_model_name_or_path") or str(checkpoint))
    try:
        with readable_model_errors(source, "model"):
            return auto_class(AutoConfig.from_pretrained(source, trust_remote_code=False)).__name__
    except ModelError:  # the base is not here any more
        return "AutoModelForCausalLM"


def _loading(repo_id: str, base: str, is_adapter: bool, class_name: str) -> str:
    if is_adapter:
        lines = [
            "from peft import PeftModel",
            f"from transformers import {class_name}, AutoTokenizer",
            "",
            f'model = {class_name}.from_pretrained("{base}", dtype="auto")',
            f'model = PeftModel.from_pretrained(model, "{repo_id}")',
        ]
    else:
        lines = [
            f"from transformers import {class_name}, AutoTokenizer",
            "",
            f'model = {class_name}.from_pretrained("{repo_id}", dtype="auto")',
        ]
    lines += [
        f'tokenizer = AutoTokenizer.from_pretrained("{repo_id}")',
        "prompt = tokenizer.apply_chat_template(",
        '    [{"role": "user", "content": "..."}], add_generation_prompt=True, return_tensors="pt", return_dict=True',
        ")",
        "print(tokenizer.decode(model.generate(**prompt, max_new_tokens=128)[0]))",
    ]
    return "\n".join(lines)


def _replace(path: Path, text: str) -> None:
    """Write a file in place of a link to another."""
    path.unlink(missing_ok=True)
    path.write_text(text)
