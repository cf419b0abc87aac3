"""Serving with vLLM: what it cannot, and the command; without vLLM."""

import itertools
import json
import shutil

import pytest

from conftest import TINY_MODEL
from forgebook.config.parse import dump_config
from forgebook.inference.vllm_command import obstacle_for_vllm, vllm_command
from forgebook.models.vllm_support import vllm_ignores

LORA = {"r": 8, "target_modules": ["q_proj"], "base_model_name_or_path": "someone/base"}


@pytest.fixture
def make_folder(tmp_path):
    """Make a checkpoint folder of the tiny model's tokenizer: an adapter's without its weights, or a full model's."""

    def make(name: str, lora: dict | None = LORA, template: str | None = None, overrides: dict | None = None):
        folder = tmp_path / name
        folder.mkdir()
        for pattern in ("tokenizer*", "chat_template*", *(("config.json",) if lora is None else ())):
            for path in TINY_MODEL.glob(pattern):
                shutil.copy2(path, folder)
        if lora is not None:
            (folder / "adapter_config.json").write_text(json.dumps(lora))
        if template is not None:
            (folder / "chat_template.jinja").write_text(template)
        if overrides is not None:
            (folder / "config_overrides.json").write_text(json.dumps(overrides))
        return folder

    return make


def test_adapters_are_served_over_their_base_with_the_template(make_folder):
    one = make_folder("one")
    (one / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    folders = {"one": one, "two": make_folder("two", LORA | {"rank_pattern": {"q_proj": 20}})}
    assert obstacle_for_vllm(folders) is None
    command = vllm_command(folders, host="127.0.0.1", port=8001)
    assert command[:3] == ["vllm", "serve", "someone/base"] and command[-4:] == [
        "--host",
        "127.0.0.1",
        "--port",
        "8001",
    ]
    at = command.index("--lora-modules")
    assert command[at + 1 : at + 3] == [f"one={folders['one']}", f"two={folders['two']}"]
    options = dict(itertools.pairwise(command))
    assert options["--max-lora-rank"] == "32" and options["--max-loras"] == "2"
    assert options["--tokenizer"] == options["--generation-config"] == str(folders["one"])
    assert options["--chat-template"] == str(folders["one"] / "chat_template.jinja")
    assert options["--tool-call-parser"] == "hermes"  # the tiny model's template writes <tool_call>


def test_a_full_model_is_served_under_its_runs_name(make_folder):
    folder = make_folder("full", lora=None, template="{{ messages }}")
    command = vllm_command({"mine": folder}, host="::1", port=1)
    assert command[2:5] == [str(folder), "--served-model-name", "mine"] and "--enable-lora" not in command
    assert "--tool-call-parser" not in command


def test_a_base_is_loaded_as_in_training(make_folder):
    scaling = {"rope_type": "yarn", "factor": 4.0}
    lora = LORA | {"base_model_name_or_path": str(TINY_MODEL)}
    folder = make_folder("one", lora, overrides={"rope_scaling": scaling, "quantization": "nf4"})
    command = vllm_command({"one": folder}, host="127.0.0.1", port=1)
    options = dict(itertools.pairwise(command))
    rope = json.loads(options["--hf-overrides"])["rope_parameters"]
    assert rope["factor"] == 4.0 and rope["rope_theta"] and options["--quantization"] == "bitsandbytes"


def test_the_dtype_is_the_runs_unless_another_is_passed(tmp_path, make_config):
    checkpoint = tmp_path / "runs/run/checkpoints/epoch-1"
    shutil.copytree(TINY_MODEL, checkpoint)
    (tmp_path / "runs/run/config.yaml").write_text(dump_config(make_config(dtype="float32")))
    for dtype, expected in ((None, "float32"), ("bfloat16", "bfloat16")):
        command = vllm_command({"run": checkpoint}, host="127.0.0.1", port=1, dtype=dtype)
        assert dict(itertools.pairwise(command))["--dtype"] == expected


def test_what_one_vllm_process_cannot_serve(make_folder):
    one = make_folder("one")
    other_base = make_folder("other", LORA | {"base_model_name_or_path": "someone/else"})
    assert "holds one base" in obstacle_for_vllm({"one": one, "other": other_base})
    quantized = make_folder("quantized", overrides={"quantization": "nf4"})
    assert "holds one base" in obstacle_for_vllm({"one": one, "quantized": quantized})
    other_template = make_folder("template", template="{{ messages }}")
    assert "chat templates differ" in obstacle_for_vllm({"one": one, "template": other_template})
    dora = make_folder("dora", LORA | {"use_dora": True})
    assert obstacle_for_vllm({"dora": dora}) == "dora: use_dora is set; merge it first"


@pytest.mark.parametrize(
    ("settings", "ignored"),
    [
        ({"no_repeat_ngram_size": 3}, "no_repeat_ngram_size"),
        ({"bad_words_ids": [[3]], "min_new_tokens": 4}, "bad_words_ids, min_new_tokens"),
        ({"no_repeat_ngram_size": 0, "suppress_tokens": [], "guidance_scale": 1.0, "repetition_penalty": 1.2}, None),
    ],
)
def test_what_a_generation_config_does_and_vllm_does_not_is_an_obstacle(make_folder, settings, ignored):
    folder = make_folder("one")
    (folder / "generation_config.json").write_text(json.dumps(settings))
    obstacle = f"one: its generation_config.json sets {ignored}, which vLLM does not apply" if ignored else None
    assert obstacle_for_vllm({"one": folder}) == obstacle
    assert bool(vllm_ignores(folder)) == bool(ignored)


def test_a_prompt_format_must_be_merged_into_the_template_first(make_folder):
    from forgebook.data.prompt_formats import as_chat_template, read_prompt_format

    folder = make_folder("one")
    (folder / "prompt_format.yaml").write_text(
        "system: S {instruction}\nuser: Q {instruction}\nassistant: A {instruction}\n"
    )
    assert obstacle_for_vllm({"one": folder}).startswith("one has a prompt format")
    (folder / "chat_template.jinja").write_text(as_chat_template(read_prompt_format(folder)))
    assert obstacle_for_vllm({"one": folder}) is None


def test_a_model_that_reads_images_gets_no_memory_for_videos(make_folder):
    folder = make_folder("scans")
    assert "--limit-mm-per-prompt" not in vllm_command({"scans": folder}, host="127.0.0.1", port=1)
    (folder / "preprocessor_config.json").write_text("{}")
    command = vllm_command({"scans": folder}, host="127.0.0.1", port=1)
    assert command[command.index("--limit-mm-per-prompt") + 1] == '{"video": 0}'
