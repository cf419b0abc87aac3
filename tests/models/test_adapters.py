"""Quantised bases and varieties of LoRA: what is saved gives the evaluation loss with plain transformers and PEFT."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import LORA, TINY_MODEL, losses_of
from forgebook.data import batching
from forgebook.errors import CheckpointError, ConfigError, ModelError
from forgebook.inference.loading import load_for_generation
from forgebook.launch.fine_tune import fine_tune
from forgebook.models import adapters, load
from forgebook.planning.prepare import prepare
from forgebook.runs.atomic import read_json
from forgebook.runs.metrics import read_metrics
from forgebook.runs.run import open_run
from forgebook.training.losses import SupervisedLM
from forgebook.training.optimizers import learning_rates
from support_models import TEXT, model_with_towers


def plain_base(dtype=torch.float32, quantization=None, **settings):
    """Load the tiny model as a user of transformers would."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if quantization == "nf4":
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    elif quantization == "int8":
        settings["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(TINY_MODEL, dtype=dtype, **settings)
    for module in model.modules():  # on some CPUs its 4-bit evaluation would compute in bfloat16, whatever the dtype
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def plain_loss(model, config, tokenizer) -> float:
    """Measure the validation loss per trained token, row by row, with transformers' own loss."""
    total, count = 0.0, 0
    for line in Path(config.valid_path).read_text().splitlines():
        messages = json.loads(line)["messages"]
        ids = tokenizer.apply_chat_template(messages, return_dict=False, return_tensors="pt")
        prompt = tokenizer.apply_chat_template(
            messages[:-1], add_generation_prompt=True, return_dict=False, return_tensors="pt"
        )
        labels = ids.clone()
        labels[:, : prompt.shape[1]] = -100
        n = int((labels != -100).sum())
        with torch.no_grad():
            total += model(input_ids=ids, labels=labels).loss.item() * n
        count += n
    return total / count


def saved_loss(run, config, tokenizer, **base) -> tuple[float, float]:
    """Return a finished run's evaluation loss, and that of its checkpoint loaded plainly."""
    from peft import PeftModel

    summary = read_json(run.summary)
    model = PeftModel.from_pretrained(plain_base(**base), run.folder / summary["best_checkpoint"]).eval()
    return summary["eval_loss"], plain_loss(model, config, tokenizer)


# Quantised bases --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_quantised_base_trains_as_in_a_loop_of_peft(make_config, tokenizer, kind, dtype):
    """The same batches through PEFT's own model, loss and torch's AdamW on float32 masters, written by hand."""
    config = make_config(quantization=kind, lora_config=LORA, dtype=dtype, gradient_checkpointing=True)
    run = fine_tune(config)
    theirs = losses_by_hand(config, tokenizer, kind, getattr(torch, dtype))
    assert len(theirs) == 3 and theirs[0] != theirs[2]
    assert losses_of(run) == pytest.approx(theirs, rel=1e-3 if dtype == "float32" else 5e-3)
    ours, plainly = saved_loss(run, config, tokenizer, dtype=getattr(torch, dtype), quantization=kind)
    assert plainly == pytest.approx(ours, abs=1e-4 if (dtype, kind) == ("float32", "nf4") else 0.02)
    # Generation puts the adapter on the base that it was trained on.
    model, _, _ = load_for_generation(run.folder / read_json(run.summary)["best_checkpoint"])
    assert model.get_base_model().config.quantization_config.quantization_method() == (
        "nf4" if kind == "nf4" else "llm_int8"
    )


def losses_by_hand(config, tokenizer, kind, dtype) -> list[float]:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(config.seed)
    model = plain_base(dtype, kind)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **LORA), autocast_adapter_dtype=False).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.data = p.data.to(dtype)
    masters = [p.detach().float() for p in trained]
    optimizer = torch.optim.AdamW(masters, weight_decay=config.weight_decay)
    rows = prepare(config, open_run(config)).train
    sequences = batching.single_sequences(rows)
    steps = batching.epoch_batches(rows, sequences, 8, config.seed, 0)
    losses = []
    for step, rate in zip(steps, learning_rates("cosine", config.learning_rate, 1, 3), strict=True):
        part = batching.split_batch(step, rows, 1, 1)[0][0]
        batch = batching.collate(rows, part, tokenizer.pad_token_id, None)
        logits = model(input_ids=batch["input_ids"]).logits.float()
        losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()))
        optimizer.param_groups[0]["lr"] = rate
        losses[-1].backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for p, master in zip(trained, masters, strict=True):
            master.grad, p.grad = p.grad.float(), None
        optimizer.step()
        for p, master in zip(trained, masters, strict=True):
            p.data.copy_(master)
    return [float(loss.detach()) for loss in losses]


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantized_weights_are_counted_as_the_parameters_that_they_are(kind):
    whole = adapters.add_lora(load.load_model(str(TINY_MODEL)), LORA)
    quantized = adapters.add_lora(load.load_model(str(TINY_MODEL), quantization=kind), LORA)
    assert load.parameter_counts(quantized) == load.parameter_counts(whole)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_base_is_packed_and_frozen_and_the_rest_is_as_it_was(kind):
    model = adapters.add_lora(load.load_model(str(TINY_MODEL), quantization=kind), LORA)
    packed = {name for name, p in model.named_parameters() if p.dtype in (torch.uint8, torch.int8)}
    assert len(packed) == 7 * 4 and all("base_layer" in name for name in packed)
    others = {p.dtype for name, p in model.named_parameters() if name not in packed}
    assert others == {torch.bfloat16}
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())
    # The output layer is plain: the loss takes its fused path.
    assert type(SupervisedLM(model)._parts[1]) is torch.nn.Linear


def test_an_evaluation_leaves_the_gradient_of_4_bit_weights_whole():
    """bitsandbytes would repack them in evaluation mode, on a CPU with AVX512-BF16, for a kernel without backward."""
    model = adapters.add_lora(
        load.load_model(str(TINY_MODEL), quantization="nf4"), {**LORA, "init_lora_weights": False}
    )
    ids = torch.arange(5, 37)[None]
    gradients = []
    for _ in range(2):
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
        model.zero_grad()
        with torch.no_grad():
            model.eval()(input_ids=ids)
    assert all(one.any() and torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_quantised_weights_need_an_adapter_and_no_zero_3(make_config):
    with pytest.raises(ConfigError, match="quantization needs lora_config"):
        make_config(quantization="nf4")
    with pytest.raises(ConfigError, match="quantization does not work with ZeRO-3"):
        make_config(quantization="int8", lora_config=LORA, deepspeed="zero_3")
    with pytest.raises(ConfigError, match="pissa needs weights that are not quantized"):
        make_config(quantization="nf4", lora_config={**LORA, "init_lora_weights": "pissa"})


def test_a_quantised_run_continues_exactly(make_config):
    from conftest import fine_tune_until

    settings = {
        "quantization": "nf4", "lora_config": LORA, "max_steps": 4, "num_epochs": 2,
        "checkpoint_and_evaluation_frequency": {"unit": "steps", "frequency": 2},
    }  # fmt: skip
    whole = fine_tune(make_config(run_name="whole", **settings))
    halves = make_config(run_name="halves", **settings)
    with pytest.raises(KeyboardInterrupt):
        fine_tune_until(halves, step=3)
    assert losses_of(fine_tune(halves)) == losses_of(whole)


# Varieties of LoRA ------------------------------------------------------------------------------------

VARIETIES = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "head saved whole": {"modules_to_save": ["lm_head"]},
    "head adapted": {"target_modules": ["q_proj", "lm_head"]},
    "embedding adapted": {"target_modules": ["q_proj", "embed_tokens"]},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa niter, rslora": {"init_lora_weights": "pissa_niter_4", "use_rslora": True},
    "pissa, patterns": {"init_lora_weights": "pissa", "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 5}},
}


@pytest.mark.parametrize("variety", VARIETIES)
def test_every_variety_trains_and_fits_the_plain_base(make_config, tokenizer, variety):
    config = make_config(lora_config={**LORA, **VARIETIES[variety]}, num_epochs=2, eval_first=True)
    run = fine_tune(config)
    evaluations = [row["eval_loss"] for row in read_metrics(run.metrics) if "eval_loss" in row]
    assert len(losses_of(run)) == 6 and evaluations[-1] < evaluations[0]
    # Whatever the start, the model begins as its base.
    assert evaluations[0] == pytest.approx(plain_loss(plain_base().eval(), config, tokenizer), abs=1e-4)
    ours, plainly = saved_loss(run, config, tokenizer)
    assert plainly == pytest.approx(ours, abs=1e-4)


def test_pissa_in_bfloat16_fits_within_its_rounding(make_config, tokenizer):
    config = make_config(lora_config={**LORA, "init_lora_weights": "pissa"}, dtype="bfloat16")
    ours, plainly = saved_loss(fine_tune(config), config, tokenizer, dtype=torch.bfloat16)
    assert plainly == pytest.approx(ours, abs=0.03)


def test_a_pissa_run_continues_exactly_and_its_adapter_further(make_config):
    from conftest import fine_tune_until

    settings = {
        "lora_config": {**LORA, "init_lora_weights": "pissa_niter_2"}, "max_steps": 4, "num_epochs": 2,
        "checkpoint_and_evaluation_frequency": {"unit": "steps", "frequency": 2},
    }  # fmt: skip
    whole = fine_tune(make_config(run_name="whole", **settings))
    halves = make_config(run_name="halves", **settings)
    with pytest.raises(KeyboardInterrupt):
        fine_tune_until(halves, step=3)
    halves = fine_tune(halves)
    assert losses_of(halves) == losses_of(whole)
    best = whole.folder / read_json(whole.summary)["best_checkpoint"]
    assert json.loads((best / "adapter_config.json").read_text())["r"] == 2 * LORA["r"]
    as_saved = {"target_modules": "all-linear"}  # its rank is twice that of the config
    further = fine_tune(
        make_config(run_name="f", lora_config=as_saved, eval_first=True, initial_adapter_model_ckpt_path=str(best))
    )
    assert read_metrics(further.metrics)[0]["eval_loss"] == pytest.approx(
        read_json(whole.summary)["eval_loss"], abs=1e-4
    )


def test_a_base_is_made_the_same_where_the_decomposition_differs():
    """Another machine may find other directions: the base that a run goes on with is the one it began with."""
    settings = {**LORA, "init_lora_weights": "pissa_niter_1"}
    first, second = (_pissa(settings, seed) for seed in (0, 1))
    weights = [model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight for model in (first, second)]
    assert not torch.allclose(*weights, atol=1e-5)
    adapters.align_base(second, adapters.start_of(first))
    torch.testing.assert_close(*weights, atol=1e-5, rtol=0)


def _pissa(settings, seed):
    torch.manual_seed(seed)
    return adapters.add_lora(load.load_model(str(TINY_MODEL), dtype="float32"), settings)


def test_a_pissa_adapter_that_did_not_move_is_found():
    start = {"a.lora_A.default.weight": torch.ones(2, 3), "a.lora_B.default.weight": torch.ones(3, 2)}
    with pytest.raises(CheckpointError, match="equals its start"):
        adapters.fit_original_base(dict(start), start, trained=True)
    joined = adapters.fit_original_base(dict(start), start, trained=False)
    assert not (joined["a.lora_B.default.weight"] @ joined["a.lora_A.default.weight"]).any()


@pytest.mark.parametrize("start", ["olora", "corda", "eva", "loftq", "lora_ga", "pisa", "pissa_niter_x"])
def test_starts_that_would_not_fit_the_base_are_refused(make_config, start):
    with pytest.raises(ConfigError, match=f"init_lora_weights: got '{start}', must be true, gaussian"):
        make_config(lora_config={**LORA, "init_lora_weights": start})


def test_pissa_is_refused_where_it_cannot_be_saved_or_made(make_config):
    with pytest.raises(ConfigError, match="pissa with use_dora cannot be saved"):
        make_config(lora_config={**LORA, "init_lora_weights": "pissa", "use_dora": True})
    with pytest.raises(ConfigError, match="pissa does not work with ZeRO-3"):
        make_config(lora_config={**LORA, "init_lora_weights": "pissa"}, deepspeed="zero_3")


# Stretched contexts -----------------------------------------------------------------------------------

ROPES = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "old spelling": {"type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}  # fmt: skip


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("method", [None, LORA], ids=["full", "lora"])
def test_a_stretched_context_is_kept_with_the_checkpoint(make_config, tokenizer, rope, method):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    config = make_config(rope_scaling=ROPES[rope], lora_config=method, max_steps=2)
    run = fine_tune(config)
    summary = read_json(run.summary)
    folder = run.folder / summary["best_checkpoint"]
    model, _, _ = load_for_generation(folder)
    causal = model.get_base_model() if method else model
    assert causal.config.rope_parameters["rope_type"] == config.rope_scaling["rope_type"]
    overrides = adapters.read_overrides(folder)
    assert overrides == ({"rope_scaling": config.rope_scaling} if method else {})
    if method:
        base = load.load_model(str(TINY_MODEL), dtype="float32", **overrides)
        model = PeftModel.from_pretrained(base, folder)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert plain_loss(model.eval(), config, tokenizer) == pytest.approx(summary["eval_loss"], abs=1e-4)


def test_an_adapter_is_continued_on_the_positions_it_was_trained_with(make_config):
    run = fine_tune(make_config(lora_config=LORA, rope_scaling=ROPES["linear"], max_steps=2))
    start = {"initial_adapter_model_ckpt_path": str(run.folder / read_json(run.summary)["best_checkpoint"])}
    with pytest.raises(ModelError, match=r"was trained with rope_scaling: .*linear.*, the config says null"):
        fine_tune(make_config(run_name="other", lora_config=LORA, **start))
    same = make_config(
        run_name="same", lora_config=LORA, rope_scaling=ROPES["linear"], max_steps=1, num_warmup_steps=0, **start
    )
    assert math.isfinite(losses_of(fine_tune(same))[0])


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"factor": 2.0}, "rope_type: got nothing, must be one of linear"),
        ({"rope_type": "liner", "factor": 2.0}, "rope_type: got 'liner'"),
        ({"rope_type": "linear"}, "factor: got nothing"),
        ({"rope_type": "linear", "factor": 2.0, "factr": 3.0}, "unknown key 'factr': did you mean 'factor'"),
    ],
)
def test_a_scaling_that_would_do_nothing_is_refused(make_config, scaling, message):
    with pytest.raises(ConfigError, match=message):
        make_config(rope_scaling=scaling)


@pytest.mark.parametrize(
    ("context", "scaling", "warned"),
    [(1024, None, False), (2048, None, True), (2048, ROPES["linear"], False), (4096, ROPES["linear"], True)],
)
def test_a_context_beyond_the_models_positions_is_a_warning(make_config, capsys, context, scaling, warned):
    fine_tune(make_config(context_length=context, rope_scaling=scaling, max_steps=1, num_warmup_steps=0))
    assert ("is beyond the" in " ".join(capsys.readouterr().out.split())) == warned


# Embedding noise --------------------------------------------------------------------------------------


def test_packing_is_not_refused_for_noise_or_dropout(make_config):
    settings = {**LORA, "lora_dropout": 0.2, "init_lora_weights": "pissa"}
    run = fine_tune(
        make_config(
            padding="packed", context_length=160, neftune_noise_alpha=5, lora_config=settings, num_warmup_steps=0
        )
    )
    assert math.isfinite(losses_of(run)[-1])


# Serving ----------------------------------------------------------------------------------------------


def test_the_summary_and_the_plan_say_whether_vllm_can_serve(make_config, capsys):
    run = fine_tune(make_config(run_name="lora", lora_config=LORA, max_steps=1, num_warmup_steps=0))
    assert read_json(run.summary)["vllm_serves"] == "yes"
    assert "vLLM can serve the adapter: yes" in capsys.readouterr().out
    assert (
        read_json(fine_tune(make_config(run_name="full", max_steps=1, num_warmup_steps=0)).summary)["vllm_serves"]
        is None
    )


def test_the_start_of_a_pissa_run_is_kept_in_its_folder(make_config):
    run = fine_tune(make_config(lora_config={**LORA, "init_lora_weights": "pissa"}, max_steps=1, num_warmup_steps=0))
    assert len(load_file(run.adapter_start)) == 2 * 7 * 4


# Several workers --------------------------------------------------------------------------------------

SHARDED = {
    "nf4": ({"quantization": "nf4"}, ["none", "zero_1", "zero_2"]),
    "pissa": ({"lora_config": {**LORA, "init_lora_weights": "pissa"}}, ["zero_2"]),
    "dora": ({"lora_config": {**LORA, "use_dora": True}}, ["zero_3"]),
    "head saved whole": ({"lora_config": {**LORA, "modules_to_save": ["lm_head"]}}, ["zero_3"]),
    "8-bit moments": ({"optimizer": "adamw_8bit"}, ["zero_2"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("method", SHARDED)
def test_two_workers_train_and_save_as_one(without_ray, make_config, method):
    """Two workers, with plain DDP or a ZeRO stage, and one process: the same losses, the same saved tensors."""
    values, stages = SHARDED[method]
    values = {"lora_config": LORA, **values}
    one = fine_tune(make_config(run_name="one", **values))
    for stage in stages:
        two = fine_tune(
            make_config(run_name=stage, deepspeed=stage, num_devices=2, train_batch_size_per_device=4, **values)
        )
        assert losses_of(two) == pytest.approx(losses_of(one), abs=2e-3), stage
        saved = [
            load_file(run.folder / read_json(run.summary)["best_checkpoint"] / "adapter_model.safetensors")
            for run in (one, two)
        ]
        assert {name: t.shape for name, t in saved[0].items()} == {name: t.shape for name, t in saved[1].items()}, stage


# Settings that reach nothing -----------------------------------------------------------------------------


def skeleton(kind, **values):
    """A model without weights."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(**TEXT, **values)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


LLAMA_NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"]


@pytest.mark.parametrize(
    "kind, settings, words",
    [
        ("Llama", {"target_modules": ["q_proj", "query"]}, ["is named query", "its linear layers are down_proj, gate"]),
        ("Llama", {"target_modules": ["q_proj"], "modules_to_save": ["score"]}, ["modules_to_save", "is named score"]),
        ("Llama", {"target_modules": ["q_proj"], "layers_to_transform": [0, 7]}, ["there is no layer 7"]),
        ("Llama", {"target_modules": ["q_proj"], "rank_pattern": {"query": 2}}, ["rank_pattern", "query"]),
        ("Llama", {"target_modules": ["q_proj"], "exclude_modules": ["query"]}, ["exclude_modules", "query"]),
        ("Phi3", {"target_modules": LLAMA_NAMES}, ["k_proj, q_proj, v_proj are fused into qkv_proj"]),
        ("Phi3", {"target_modules": LLAMA_NAMES}, ["gate_proj, up_proj are fused into gate_up_proj"]),
        ("GptOss", {"target_modules": LLAMA_NAMES}, ["gate_up_proj: name that instead in target_parameters"]),
        ("Llama", {"target_modules": LLAMA_NAMES}, []),
        ("Llama", {"target_modules": "all-linear"}, []),
        ("Mixtral", {"target_modules": "all-linear"}, []),
        ("Mixtral", {"target_modules": ["q_proj", "w1", "w2", "w3"]}, []),
        ("Qwen3Moe", {"target_parameters": ["gate_up_proj"], "rank_pattern": {"experts.gate_up_proj": 2}}, []),
        ("Qwen3Moe", {"target_modules": ["q_proj"], "alpha_pattern": {"q_proj": 2, ".*w1": 2}}, ["alpha_p", "'.*w1'"]),
        ("Qwen3Moe", {"target_modules": LLAMA_NAMES}, []),
    ],
)  # fmt: skip
def test_a_setting_that_reaches_nothing_is_a_warning(kind, settings, words):
    warned = adapters.check_lora(skeleton(kind), {"r": 4, **settings})
    assert bool(warned) == bool(words) and all(word in "\n".join(warned) for word in words)


@pytest.mark.parametrize(
    "kind, settings, message",
    [
        ("Llama", {"target_modules": ["query", "value"]}, "no layer that a text passes through is named query, value"),
        (
            "Llama",
            {"target_modules": "q_proj"},
            "q_proj is a pattern over whole names such as model.layers.0.self_attn",
        ),
        ("Phi3", {"target_modules": ["q_proj", "v_proj"]}, "q_proj, v_proj are fused into qkv_proj"),
        ("GPT2", {"target_modules": ["q_proj"]}, "q_proj is fused into c_attn"),
        ("Llama", {"target_modules": ["q_proj"], "rank": 4}, "rank"),
    ],
)
def test_an_adapter_that_reaches_nothing_is_an_error(kind, settings, message):
    with pytest.raises(ModelError, match=message):
        adapters.check_lora(skeleton(kind), {"r": 4, **settings})


def test_a_target_in_a_tower_alone_is_no_target():
    with pytest.raises(ModelError, match="no layer that a text passes through is named fc1"):
        adapters.check_lora(model_with_towers("Gemma3"), {"target_modules": ["fc1"]})


@pytest.mark.parametrize(
    ("settings", "is_continued", "reason"),
    [
        ({}, False, None),
        ({"init_lora_weights": "gaussian", "modules_to_save": ["lm_head"]}, False, None),
        ({"use_dora": True}, False, "use_dora"),
        ({"init_lora_weights": "olora"}, False, "init_lora_weights: olora"),
        ({"init_lora_weights": "olora"}, True, None),
        ({"modules_to_save": ["lm_head"]}, True, "modules_to_save"),
    ],
)
def test_adapters_that_start_from_the_base_need_whole_weights(settings, is_continued, reason):
    assert adapters.needs_whole_base(settings, is_continued) == reason
