"""vLLM itself answers what training's own code does: an adapter on its base, the merged model, and both as a server.

`make test-engines` runs them: vLLM's CPU build has an environment of its own, which `make vllm` makes.
"""

import json
import operator
import os
import shutil
import subprocess
import time
from pathlib import Path

import openai
import pytest

from conftest import LORA, REPOSITORY
from forgebook.catalog import model_folder
from forgebook.config.parse import load_config
from forgebook.data.masking import encode_prompt
from forgebook.launch.fine_tune import fine_tune
from forgebook.models.tokenizer import load_tokenizer
from forgebook.runs.run import best_checkpoint

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
VLLM = REPOSITORY / ".venv-vllm/bin"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not model_folder(SMOLLM2).is_dir(), reason=f"{SMOLLM2} is not here: make models"),
    pytest.mark.skipif(not (VLLM / "vllm").exists(), reason="vLLM has no environment here: make vllm"),
]
ROWS = [json.loads(line) for line in (REPOSITORY / "data/quickstart/train.jsonl").read_text().splitlines()]
QUESTIONS = [
    "What is the capital of France?", "Name three colors.", "What is 2 + 2?", "Who wrote Hamlet?",
    "Write one sentence about the sea.", "What do bees make?", "Translate 'good morning' to Spanish.",
    "What is the largest planet?", "Give me a synonym of happy.", "How many days has a week?",
]  # fmt: skip
PROMPTS = [{"messages": [{"role": "user", "content": text}]} for text in QUESTIONS] + [
    {"messages": row["messages"][:-1]} for row in ROWS[100:110]
]


def command(*words: str, vllm: bool = False) -> subprocess.Popen:
    """Start a command of ours, in vLLM's environment or in this one."""
    environment = dict(os.environ, VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="WARNING")
    if vllm:
        environment["PATH"] = f"{REPOSITORY / 'tests/engines'}:{VLLM}:{environment['PATH']}"
    return subprocess.Popen(
        ["python", str(REPOSITORY / "main.py"), *words], env=environment, cwd=REPOSITORY, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def run_command(*words: str, vllm: bool = False) -> None:
    process = command(*words, vllm=vllm)
    printed = process.communicate()[0]
    assert process.returncode == 0, printed


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A few steps of LoRA in float32: their folder, the checkpoint, and its answers to twenty prompts."""
    folder = tmp_path_factory.mktemp("vllm")
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:32]))
    settings = {
        "model_id": SMOLLM2, "train_path": str(folder / "train.jsonl"), "task": "instruction_tuning",
        "num_devices": 0, "num_epochs": 1, "train_batch_size_per_device": 8, "learning_rate": 1e-3, "dtype": "float32",
        "num_warmup_steps": 0, "deepspeed": None, "lora_config": LORA, "storage_path": str(folder / "runs"),
    }  # fmt: skip
    (folder / "run.yaml").write_text(json.dumps(settings))
    adapter = best_checkpoint(fine_tune(load_config(folder / "run.yaml")))
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    run_command("merge", str(adapter), str(folder / "merged"))
    return folder, adapter, answers_of(folder, str(adapter), "transformers")


def answers_of(folder: Path, source: str, engine: str) -> list[str]:
    out = folder / f"{engine}-{Path(source).name}.jsonl"
    words = [f"data={folder / 'prompts.jsonl'}", f"out={out}", f"engine={engine}", "max_new_tokens=32"]
    run_command("generate", source, *words, vllm=engine == "vllm")
    return [json.loads(line)["messages"][-1]["content"] for line in out.read_text().splitlines()]


def test_an_adapter_on_its_base_answers_as_generate(trained):
    """Twenty prompts in float32, greedy, up to 32 tokens each: equal to the last one."""
    folder, adapter, expected = trained
    assert answers_of(folder, str(adapter), "vllm") == expected


def test_an_evaluation_has_the_answers_of_transformers(trained):
    """Of base and tuned model, in one engine; each engine saves its answers in a file of its own."""
    folder, adapter, _ = trained
    run = adapter.parent.parent
    (folder / "held-out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[100:104]))
    answers = {}
    for engine in ("transformers", "vllm"):
        words = [f"data={folder / 'held-out.jsonl'}", f"engine={engine}", "metric=exact_match", "max_new_tokens=32"]
        run_command("evaluate", str(run), *words, vllm=engine == "vllm")
        files = {path.name: path.read_text().splitlines() for path in (run / "evaluation").glob("answers-*.jsonl")}
        new = {name: lines for name, lines in files.items() if name not in answers}
        answers |= new
        by_model = [[json.loads(line) for line in new[name][1:]] for name in sorted(new)]  # base, tuned
        if engine == "transformers":
            expected = by_model
    key = operator.itemgetter("prompt")
    assert len(answers) == 4 and expected[0] != expected[1]
    assert [sorted(one, key=key) for one in by_model] == [sorted(one, key=key) for one in expected]


@pytest.mark.parametrize("is_merged", [False, True], ids=["adapters", "merged"])
def test_a_server_answers_as_generate(trained, is_merged):
    """Through openai's client, by the chat template that vLLM renders: the adapter twice over one base, or merged."""
    folder, adapter, expected = trained
    if is_merged:
        models = {"merged": folder / "merged"}
    else:
        models = {"run": adapter, "again": Path(shutil.copytree(adapter, folder / "again"))}
    words = [*map(str, models.values()), "engine=vllm", "port=8765", "dtype=float32"]
    process = command("serve", *words, vllm=True)
    try:
        client = openai.OpenAI(base_url="http://127.0.0.1:8765/v1", api_key="none")
        served = wait_for_models(process, client)
        assert set(models) <= set(served)
        for row, answer in list(zip(PROMPTS, expected, strict=True))[8:12]:
            for name in models:
                done = client.chat.completions.create(
                    model=name, messages=row["messages"], temperature=0, max_tokens=32
                )
                assert done.choices[0].message.content == answer
    finally:
        process.terminate()
        process.communicate(timeout=60)


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name, "description": f"To {name}.",
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
        },
    }
    for name in ("read_sensor", "look_up")
]  # fmt: skip
CALL = {"name": "read_sensor", "arguments": '{"place": "Oslo"}'}


def test_tools_are_shown_and_calls_read_as_in_training(tmp_path):
    """Of the tiny model, whose template shows tools: a call that it has learned, from as many tokens of prompt."""
    called = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]}
    questions = [{"role": "user", "content": f"How warm is it, {row['messages'][1]['content'][:20]}?"} for row in ROWS]
    rows = [{"messages": [question, called], "tools": TOOLS} for question in questions[:32]]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model_id": "tiny", "train_path": str(tmp_path / "train.jsonl"), "task": "instruction_tuning", "num_devices": 0,
        "num_epochs": 10, "train_batch_size_per_device": 8, "learning_rate": 5e-3, "dtype": "float32",
        "num_warmup_steps": 0, "deepspeed": None, "lora_config": LORA, "storage_path": str(tmp_path / "runs"),
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(json.dumps(settings))
    checkpoint = best_checkpoint(fine_tune(load_config(tmp_path / "run.yaml")))
    process = command("serve", str(checkpoint), "engine=vllm", "port=8766", "dtype=float32", vllm=True)
    try:
        client = openai.OpenAI(base_url="http://127.0.0.1:8766/v1", api_key="none")
        name = wait_for_models(process, client)[-1]
        prompt = rows[0]["messages"][:1]
        done = client.chat.completions.create(model=name, messages=prompt, tools=TOOLS, temperature=0, max_tokens=64)
        [call] = done.choices[0].message.tool_calls
        assert {"name": call.function.name, "arguments": json.loads(call.function.arguments)} == {
            **CALL, "arguments": json.loads(CALL["arguments"])
        }  # fmt: skip
        assert done.choices[0].finish_reason == "tool_calls"
        assert done.usage.prompt_tokens == len(encode_prompt(prompt, load_tokenizer(str(checkpoint)), tools=TOOLS))
    finally:
        process.terminate()
        process.communicate(timeout=60)


def wait_for_models(process: subprocess.Popen, client: openai.OpenAI) -> list[str]:
    """Wait until a server answers, and return the models it serves; fail with what it printed if it ends before."""
    deadline = time.monotonic() + 900
    while process.poll() is None and time.monotonic() < deadline:
        try:
            return [model.id for model in client.models.list()]
        except openai.APIConnectionError:
            time.sleep(2)
    process.kill()
    pytest.fail(process.communicate()[0])
