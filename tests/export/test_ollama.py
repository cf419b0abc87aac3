"""Modelfiles: Ollama's template, run by Go's own engine, writes what the model's chat template does."""

import json
import shutil
import subprocess
import sys

import pytest
import yaml
from transformers import GenerationConfig

from conftest import REPOSITORY, TINY_MODEL
from forgebook.config.blocks import PromptFormat
from forgebook.config.parse import dump_config
from forgebook.data.chat_template import render
from forgebook.errors import ForgebookError, ModelError
from forgebook.export.ollama import CONVERSATIONS, modelfile, read_modelfile

FAMILIES = yaml.safe_load((REPOSITORY / "tests/oracles/chat_templates.yaml").read_text())
# Go's runtime in a process of its own: it does not survive a fork.
GO = """
import json, pathlib, sys
from go_template import render_template
folder = pathlib.Path(sys.argv[1])
for k, (template, values) in enumerate(json.loads((folder / "cases.json").read_text())):
    (folder / "template").write_text(template)
    (folder / "values").write_text(json.dumps(values))
    render_template(str(folder / "template"), str(folder / "values"), str(folder / f"{k}.txt"))
"""


def in_go(templates: list[str], conversation: list[tuple[str, str]], folder) -> list[str]:
    """Render a conversation with each template as Ollama does: .System holds the system messages' text."""
    values = {
        "System": "\n".join(text for role, text in conversation if role == "system"),
        "Messages": [{"Role": role, "Content": text} for role, text in conversation],
    }
    folder.mkdir()
    (folder / "cases.json").write_text(json.dumps([(template, values) for template in templates]))
    subprocess.run([sys.executable, "-c", GO, str(folder)], check=True)
    return [(folder / f"{k}.txt").read_text() for k in range(len(templates))]


def template_in(text: str) -> str:
    return text.partition('TEMPLATE """')[2].partition('"""\n')[0]


@pytest.fixture
def modelfile_of(with_template, tokenizer):
    """Write the Modelfile of the tiny model with another chat template or a prompt format."""

    def write(template=None, prompt_format=None, **generation):
        changed = with_template(template or tokenizer.chat_template)
        ends = GenerationConfig(**{"eos_token_id": changed.eos_token_id} | generation)
        return modelfile("model.gguf", changed, prompt_format, ends, 4096)

    return write


def test_public_families_prompts_are_written_or_refused(modelfile_of, with_template, tokenizer, tmp_path):
    written, refused = {}, {}
    for family in FAMILIES:
        try:
            written[family["family"]] = (template_in(modelfile_of(family["template"])), family["template"])
        except ModelError as error:
            refused[family["family"]] = str(error)
            assert "llama-server" in str(error)
    # A role or a message that the template rejects or leaves out, or a system text beside the last question.
    assert len(written) == len(FAMILIES) - 6 and {"Gemma 1, 2", "Mistral v3", "Orion"} < set(refused)
    others = [[*CONVERSATIONS[0], ("assistant", 'It says "{{ a }}".'), ("user", "Why?\n\nSo.")], *CONVERSATIONS]
    for k, conversation in enumerate(others):
        messages = [{"role": role, "content": text} for role, text in conversation]
        found = in_go([template for template, _ in written.values()], conversation, tmp_path / str(k))
        for name, text in zip(written, found, strict=True):
            prompt = render(messages, with_template(written[name][1]), for_generation=True)
            assert text == prompt.removeprefix(tokenizer.bos_token), name  # Ollama writes the BOS token itself


def test_a_prompt_format_is_written_too(modelfile_of, tokenizer, tmp_path):
    fmt = PromptFormat(
        system="<<{instruction}>>\n", user="Q: {instruction}\n", assistant="A: {instruction}\n", trailing_assistant="A:"
    )
    [text] = in_go([template_in(modelfile_of(prompt_format=fmt))], CONVERSATIONS[3], tmp_path / "go")
    messages = [{"role": role, "content": text} for role, text in CONVERSATIONS[3]]
    assert text == render(messages, tokenizer, fmt, for_generation=True)


def test_the_context_is_the_runs_or_the_models(tmp_path, make_config):
    checkpoint = tmp_path / "runs/run/checkpoints/epoch-1"
    shutil.copytree(TINY_MODEL, checkpoint)
    (tmp_path / "runs/run/config.yaml").write_text(dump_config(make_config(context_length=512)))
    for source, context in ((checkpoint, 512), (TINY_MODEL, 1024)):
        assert f"PARAMETER num_ctx {context}\n" in read_modelfile(source, "model.gguf")


def test_ends_and_sampling_are_those_of_the_model(modelfile_of, tokenizer):
    greedy = modelfile_of(stop_strings=['"END"'])
    end = tokenizer.eos_token
    assert f'PARAMETER stop "{end}"\nPARAMETER stop "\\"END\\""\n' in greedy and "temperature 0\n" in greedy
    assert "PARAMETER repeat_penalty 1.0\n" in greedy and "repeat_last_n" not in greedy  # Ollama's default is 1.1
    assert "repeat_penalty 1.05\nPARAMETER repeat_last_n -1\n" in modelfile_of(repetition_penalty=1.05)
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    assert 'PARAMETER stop "\\n"\n' in modelfile_of(eos_token_id=newline)
    assert "sets no_repeat_ngram_size, which Ollama does not have" in modelfile_of(no_repeat_ngram_size=3)
    drawn = modelfile_of(do_sample=True, temperature=0.7, top_p=0.8)
    assert "PARAMETER temperature 0.7\nPARAMETER top_p 0.8\n" in drawn and "temperature 0\n" not in drawn


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ loop.index }}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}",
    ],
    ids=["counts", "no system", "twice"],
)
def test_what_ollama_cannot_write_is_refused(modelfile_of, template):
    with pytest.raises(ForgebookError, match=r"no template of Ollama's writes this model's prompts: .* llama-server"):
        modelfile_of(template)
