"""The attention kernel follows from the device's facts; one that cannot run is refused with the fix."""

import pytest
import transformers

from conftest import TINY_MODEL
from forgebook.errors import ModelError, ResourceError
from forgebook.models.attention import AttentionFacts, attention_facts, choose_attention, lacking_kernels, padding_note
from forgebook.models.load import check_attention, load_model, model_class

INSTALLED = frozenset({"flash_attention_2", "flash_attention_3"})


@pytest.mark.parametrize(
    ("facts", "kernel"),
    [
        (AttentionFacts("bfloat16", (8, 0), INSTALLED), "flash_attention_2"),
        (AttentionFacts("float16", (9, 0), INSTALLED), "flash_attention_3"),
        (AttentionFacts("float16", (9, 0), frozenset({"flash_attention_2"})), "flash_attention_2"),
        (AttentionFacts("bfloat16", (8, 0)), "varlen"),  # not installed
        (AttentionFacts("bfloat16", (8, 0), not_varlen="its attention logits are capped"), "sdpa"),
        (AttentionFacts("float32", (8, 0), INSTALLED), "sdpa"),
        (AttentionFacts("bfloat16", (7, 5), INSTALLED), "sdpa"),  # a T4
        (AttentionFacts("bfloat16", None, INSTALLED), "sdpa"),  # on the CPU
        (AttentionFacts("bfloat16", (9, 0), INSTALLED, frozenset(INSTALLED)), "varlen"),
        (AttentionFacts("bfloat16", (9, 0), INSTALLED, INSTALLED | {"sdpa"}, "it has none"), "eager"),
    ],
)
def test_auto_takes_the_fastest_that_runs(facts, kernel):
    assert choose_attention("auto", facts) == kernel


@pytest.mark.parametrize(
    ("kind", "facts", "message"),
    [
        ("flash_attention_2", AttentionFacts("bfloat16", None, INSTALLED), "needs a GPU;"),
        (
            "flash_attention_2",
            AttentionFacts("bfloat16", (7, 5), INSTALLED),
            "capability 8.0 or newer, this one has 7.5",
        ),
        (
            "flash_attention_3",
            AttentionFacts("bfloat16", (8, 9), INSTALLED),
            "capability 9.0 or newer, this one has 8.9",
        ),
        ("flash_attention_2", AttentionFacts("float32", (8, 0), INSTALLED), "bfloat16 or float16, dtype is float32"),
        ("flash_attention_2", AttentionFacts("bfloat16", (8, 0)), "needs the package flash-attn "),
        ("varlen", AttentionFacts("bfloat16", (7, 5)), "capability 8.0 or newer, this one has 7.5"),
        ("varlen", AttentionFacts("float32", (9, 0)), "bfloat16 or float16, dtype is float32"),
        ("varlen", AttentionFacts("bfloat16", (9, 0), not_varlen="it has sinks"), "cannot compute this model: it has"),
    ],
)
def test_a_kernel_that_cannot_run_is_refused_with_the_fix(kind, facts, message):
    with pytest.raises(ResourceError, match=f"attention: {kind} .*{message}.*set attention: auto"):
        choose_attention(kind, facts)


@pytest.mark.parametrize(
    ("kind", "kernel"), [("sdpa", "sdpa"), ("eager", "eager"), ("flex", "flex_attention"), ("flash_attention_3",) * 2]
)
def test_a_kernel_that_runs_is_taken_as_named(kind, kernel):
    assert choose_attention(kind, AttentionFacts("bfloat16", (9, 0), INSTALLED)) == kernel


def test_a_gpu_that_computes_padding_along_says_why():
    assert padding_note("auto", AttentionFacts("bfloat16", (9, 0))) is None
    assert padding_note("sdpa", AttentionFacts("bfloat16", (7, 0))) is None  # as the config says
    assert padding_note("auto", AttentionFacts("float32", None)) is None
    assert padding_note("auto", AttentionFacts("float16", (7, 0))) == (
        "attention: sdpa, with padding: varlen needs a GPU of compute capability 8.0 or newer, this one has 7.0"
    )
    capped = AttentionFacts("bfloat16", (9, 0), not_varlen="its attention logits are capped")
    assert padding_note("auto", capped).endswith("varlen cannot compute this model: its attention logits are capped")


def test_a_model_that_stays_on_the_cpu_has_no_gpu_among_its_facts(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    assert attention_facts("bfloat16", on_gpu=False).capability is None
    assert attention_facts("bfloat16").capability == (9, 0)


def test_an_installed_package_alone_changes_nothing_on_a_cpu(monkeypatch):
    """As on a machine where flash-attn is installed: transformers only warned, and failed in the first step."""
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: True)
    assert load_model(str(TINY_MODEL), dtype="float32").config._attn_implementation == "sdpa"
    with pytest.raises(ResourceError, match="flash_attention_2 needs a GPU"):
        load_model(str(TINY_MODEL), attention="flash_attention_2")


@pytest.mark.parametrize(
    ("kind", "lacking", "kernel"),
    [
        ("GptOss", {"sdpa", "flash_attention_2", "flash_attention_3"}, "eager"),  # its flash attention is another one
        ("GPT2", {"flex"}, "sdpa"),
        ("Llama", set(), "sdpa"),
        ("Gemma3", set(), "sdpa"),
    ],
)
def test_auto_takes_a_kernel_that_the_architecture_has(kind, lacking, kernel):
    loaded_as = model_class(getattr(transformers, f"{kind}Config")())
    assert lacking_kernels(loaded_as) == lacking
    facts = attention_facts("bfloat16", False, loaded_as)
    assert choose_attention("auto", facts) == kernel
    for missing in lacking:
        with pytest.raises(ResourceError, match=r"is not implemented for this architecture.*set attention: auto"):
            choose_attention(missing, facts)


def test_a_kernel_of_the_run_that_does_not_run_here_gives_way():
    """A run trained with flash attention is merged on the CPU; one trained with eager attention stays with it."""
    facts = AttentionFacts("bfloat16", None)
    assert choose_attention("flash_attention_2", facts, is_required=False) == "sdpa"
    assert choose_attention("eager", facts, is_required=False) == "eager"


def test_a_kernel_that_the_model_lacks_is_refused_before_its_weights_are_loaded(tmp_path):
    transformers.GptOssConfig().save_pretrained(tmp_path)
    check_attention(str(tmp_path), "auto")
    with pytest.raises(ModelError, match="attention: sdpa is not implemented for the architecture of this model"):
        check_attention(str(tmp_path), "sdpa")
