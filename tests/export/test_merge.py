"""Merging: every kind of adapter gives, merged, what it gave on its base; the result needs plain transformers only."""

import json
import subprocess
import sys

import pytest
import torch
import transformers
from peft.tuners.lora import Linear
from safetensors import safe_open

from conftest import LORA, TINY_MODEL, uneven_rows
from forgebook.config.blocks import labels_of
from forgebook.data.masking import encode_prompt
from forgebook.errors import CheckpointError, ModelError, StorageError
from forgebook.export.merge import mean_kl, merge_run, report_lines
from forgebook.inference.loading import load_for_generation
from forgebook.models import adapters, load
from forgebook.models.tokenizer import load_tokenizer, tokenizer_of
from forgebook.training import checkpoints
from support_models import TEXT

LABELS = ["[[yes]]", "[[no]]"]
ROPE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
KINDS = {
    "lora": {"lora_config": LORA},
    "rslora": {"lora_config": LORA | {"use_rslora": True}},
    "dora": {"lora_config": LORA | {"use_dora": True}},
    "embeddings": {"lora_config": LORA | {"target_modules": ["q_proj", "embed_tokens"]}},
    "saved layer": {"lora_config": LORA | {"modules_to_save": ["lm_head"]}},
    "rope": {"lora_config": LORA, "rope_scaling": ROPE},
    "nf4": {"lora_config": LORA, "quantization": "nf4"},
    "labels": {"lora_config": LORA, "task": "classification", "classifier_config": {"label_tokens": LABELS}},
}


@pytest.fixture
def make_checkpoint(make_config, write_rows, tmp_path):
    """Save an adapter as a run does, its weights random instead of trained."""

    def make(size: float = 0.05, prompt_format: str | None = None, **settings):
        settings.setdefault("lora_config", LORA)
        if settings.get("task") == "classification":
            rows = [{"messages": [{"role": "user", "content": "is it"}, {"role": "assistant", "content": LABELS[0]}]}]
            settings["train_path"] = settings["valid_path"] = write_rows(rows, "labels.jsonl")
        config = make_config(**settings)
        tokenizer = tokenizer_of(config)
        model = load.load_model(
            str(TINY_MODEL), dtype="float32", rope_scaling=config.rope_scaling, quantization=config.quantization
        )
        extra = load.fit_vocabulary(model, tokenizer, labels_of(config.classifier_config), config.lora_config)
        model = adapters.add_lora(model, {**config.lora_config, **extra})
        torch.manual_seed(0)
        for name, p in model.named_parameters():
            if p.requires_grad and "lora_A" not in name:
                p.data += size * torch.randn_like(p) * (0.2 if "modules_to_save" in name else 1)
        overrides = {key: settings[key] for key in ("rope_scaling", "quantization") if key in settings}
        folder = tmp_path / "checkpoint"
        checkpoints.save_checkpoint(
            model, tokenizer, folder, prompt_format=prompt_format, overrides=overrides, trained=False
        )
        return folder

    return make


def log_probabilities(model, tokenizer):
    with torch.no_grad():
        rows = [encode_prompt(row["messages"][:-1], tokenizer) for row in uneven_rows(4)]
        return [torch.log_softmax(model.float()(input_ids=torch.tensor([ids])).logits[0], -1) for ids in rows]


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_model_is_its_adapter(make_checkpoint, tmp_path, kind):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = make_checkpoint(**KINDS[kind])
    merged = merge_run(str(folder), tmp_path / "out")
    assert 0 <= merged.kl_merged < 1e-3 < merged.kl_base and merged.vllm == "yes"
    assert (merged.kl_trained is not None) == (kind == "nf4")

    model, tokenizer = AutoModelForCausalLM.from_pretrained(merged.folder), AutoTokenizer.from_pretrained(merged.folder)
    assert model.dtype == torch.bfloat16 and not (merged.folder / "adapter_config.json").exists()
    rope = adapters.read_overrides(folder).get("rope_scaling")
    whole, own_tokenizer = load_without_quantization(folder, rope)
    assert mean_kl(log_probabilities(whole, own_tokenizer), log_probabilities(model, tokenizer)) < 1e-4
    if kind == "rope":
        assert ROPE.items() <= model.config.rope_parameters.items()
    if kind == "labels":
        assert len(tokenizer) == 2050 and model.get_input_embeddings().num_embeddings == 2050
        assert tokenizer.encode("[[yes]]", add_special_tokens=False) == [2048]
    assert model.config.tie_word_embeddings == (kind not in ("embeddings", "saved layer"))
    generation = json.loads((merged.folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 2 and tokenizer.chat_template == own_tokenizer.chat_template


def test_a_base_is_compared_without_the_biases_of_its_adapter(tokenizer, tmp_path):
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = transformers.Qwen2Config(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, **sizes)
    transformers.Qwen2ForCausalLM(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = adapters.add_lora(load.load_model(str(tmp_path / "base"), dtype="float32"), LORA | {"bias": "all"})
    for name, p in model.named_parameters():
        if name.endswith("bias"):  # all that it changes
            p.data += torch.randn_like(p)
    checkpoints.save_checkpoint(model, tokenizer, tmp_path / "adapter", trained=False)
    merged = merge_run(str(tmp_path / "adapter"), tmp_path / "out")
    assert merged.kl_merged < 1e-3 < merged.kl_base


EXPERTS = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


def save_expert_adapter(kind: str, size: float, tokenizer, folder) -> str:
    """Save a random adapter of a random mixture of experts; return its folder."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**TEXT, **EXPERTS[kind])
    transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    model = adapters.add_lora(
        load.load_model(str(folder / "base"), dtype="float32"), {"r": 4, "target_modules": "all-linear"}
    )
    for name, p in model.named_parameters():
        if p.requires_grad and "lora_B" in name:
            p.data += size * torch.randn_like(p)
    checkpoints.save_checkpoint(model, tokenizer, folder / "checkpoint", trained=False)
    return str(folder / "checkpoint")


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3Moe"])
def test_an_adapter_of_fused_experts_is_merged(kind, tokenizer, tmp_path):
    """transformers 5 holds all experts of a layer in one parameter, which has an adapter, but no layer of its own."""
    folder = save_expert_adapter(kind, 0.05, tokenizer, tmp_path)
    with safe_open(f"{folder}/adapter_model.safetensors", framework="pt") as saved:
        assert any("experts" in name for name in saved.keys())  # noqa: SIM118  (not a dict)
    merged = merge_run(folder, tmp_path / "out")
    assert merged.kl_merged < 0.02 * merged.kl_base


@pytest.mark.parametrize("is_right", [True, False])
def test_an_adapter_smaller_than_the_rounding_of_activations_is_compared_in_float32(
    tokenizer, tmp_path, monkeypatch, is_right
):
    """In bfloat16 the router of an adapter and of its merged weights may choose other experts, which changes more."""
    folder = save_expert_adapter("GptOss", 2e-4, tokenizer, tmp_path)
    if is_right:
        merged = merge_run(folder, tmp_path / "out")
        assert merged.kl_merged < 0.1 * merged.kl_base and merged.compared.endswith("computed in float32")
        return
    right = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda layer, adapter: 0.5 * right(layer, adapter))
    with pytest.raises(CheckpointError, match=r"differs from the adapter .* computed in float32"):
        merge_run(folder, tmp_path / "out")


def load_without_quantization(folder, rope):
    """Load the adapter on the float32 base as a user of PEFT would."""
    from peft import PeftModel

    model = load.load_model(str(TINY_MODEL), dtype="float32", rope_scaling=rope)
    tokenizer = load_tokenizer(str(folder))
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    return PeftModel.from_pretrained(model, folder).eval(), tokenizer


@pytest.mark.slow
def test_it_loads_without_this_project(make_checkpoint, tmp_path):
    fmt = "system: '{instruction}'\nuser: 'Q {instruction}'\nassistant: ' A {instruction}<|end|>'\n"
    merge_run(str(make_checkpoint(prompt_format=fmt)), tmp_path / "out")
    _, tokenizer, prompt_format = load_for_generation(tmp_path / "out")
    asked = uneven_rows(1)[0]["messages"][:-1]
    plainly = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    assert plainly == encode_prompt(asked, tokenizer, prompt_format)
    code = (
        "import sys\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model, tokenizer = AutoModelForCausalLM.from_pretrained('out'), AutoTokenizer.from_pretrained('out')\n"
        "ids = tokenizer.apply_chat_template([{'role': 'user', 'content': 'hello'}], add_generation_prompt=True,\n"
        "                                    return_tensors='pt', return_dict=True)\n"
        "model.generate(**ids, max_new_tokens=2)\n"
        "print(sorted(name for name in sys.modules if name.split('.')[0] in ('forgebook', 'helpers', 'peft')))\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True
    )
    assert process.stdout.strip().endswith("[]"), process.stderr


@pytest.mark.parametrize("size", [0.0, 1e-9], ids=["zero", "lost in rounding"])
def test_an_adapter_that_changes_nothing_is_refused(make_checkpoint, tmp_path, size):
    folder = make_checkpoint(size=size)
    with pytest.raises(CheckpointError, match=r"changes nothing|changed nothing|differs from the adapter"):
        merge_run(str(folder), tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_an_adapter_that_changes_little_is_named_as_the_cause(make_checkpoint, tmp_path):
    folder = make_checkpoint(size=3e-5, lora_config=LORA)
    with pytest.raises(CheckpointError, match=r"changes so little that it is lost in rounding: train it longer, or se"):
        merge_run(str(folder), tmp_path / "out")


def test_a_merge_that_differs_from_the_adapter_is_refused(make_checkpoint, tmp_path, monkeypatch):
    right = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda layer, adapter: 0.5 * right(layer, adapter))
    folder = make_checkpoint(lora_config=LORA)
    with pytest.raises(CheckpointError, match="differs from the adapter"):
        merge_run(str(folder), tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_a_whole_model_is_copied(tmp_path):
    merged = merge_run(str(TINY_MODEL), tmp_path / "out")
    assert merged.kl_merged is None and "copied unchanged" in report_lines(merged)[0]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (TINY_MODEL / "model.safetensors").read_bytes()


def test_checkpoints_that_cannot_be_merged_are_errors(make_checkpoint, tmp_path):
    folder = make_checkpoint()
    with pytest.raises(StorageError, match="exists"):
        merge_run(str(folder), folder)
    quantized = tmp_path / "quantized"
    quantized.mkdir()
    config = json.loads((TINY_MODEL / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (quantized / "config.json").write_text(json.dumps(config))
    settings = json.loads((folder / "adapter_config.json").read_text())
    for base, error in ((str(quantized), "is itself quantized"), (str(tmp_path / "gone"), "could not be read")):
        (folder / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": base}))
        with pytest.raises(ModelError, match=error):
            merge_run(str(folder), tmp_path / "out")
    with pytest.raises(StorageError, match="no run"):
        merge_run("nothing", tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_kl_is_zero_for_the_same_and_known_for_two_coins():
    fair, loaded = torch.log(torch.tensor([[0.5, 0.5]])), torch.log(torch.tensor([[0.9, 0.1]]))
    assert mean_kl([fair], [fair]) == 0
    assert mean_kl([fair], [loaded]) == pytest.approx(0.5108, abs=1e-4)
