"""From training to a client: train, evaluate, merge, serve, ask; as a user does, by the commands alone."""

import json
import os
import subprocess
import sys

import openai
import pytest

from conftest import LORA, REPOSITORY, TINY_MODEL, chat

QUESTIONS = ("alpha", "bravo", "carol", "delta")


@pytest.mark.slow
def test_train_evaluate_merge_serve_ask(tmp_path, write_rows):
    rows = write_rows([chat(question, f"{question} and out") for question in QUESTIONS])
    config = tmp_path / "four.yaml"
    config.write_text(json.dumps({
        "model_id": str(TINY_MODEL), "train_path": rows, "valid_path": rows, "task": "instruction_tuning",
        "run_name": "four", "storage_path": str(tmp_path / "runs"), "num_devices": 0, "num_epochs": 40,
        "train_batch_size_per_device": 8, "eval_batch_size_per_device": 8, "learning_rate": 3e-3,
        "num_warmup_steps": 1, "dtype": "float32", "deepspeed": "none", "gradient_checkpointing": False,
        "checkpoint_and_evaluation_frequency": {"unit": "steps", "frequency": 40}, "lora_config": LORA,
    }))  # fmt: skip
    run, merged = tmp_path / "runs" / "four", tmp_path / "merged"

    command(str(config))
    command("evaluate", str(run))
    assert json.loads((run / "evaluation.json").read_text())
    output = command("merge", str(run), str(merged))
    assert "merged model" in output and "vLLM loads it  yes" in output
    assert "exists" in command("merge", str(run), str(merged), fails=2)

    server = [sys.executable, "main.py", "serve", str(run), str(merged), "port=0"]
    with subprocess.Popen(server, cwd=REPOSITORY, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        line = next(line for line in process.stdout if line.startswith("serving"))
        client = openai.OpenAI(base_url=line.split(" at ")[1].split()[0], api_key="none", max_retries=0)
        try:
            assert [model.id for model in client.models.list()] == ["four", "merged"]
            for model in ("four", "merged"):
                for question in QUESTIONS:
                    messages = chat(question, "")["messages"][:-1]
                    answer = client.chat.completions.create(model=model, messages=messages, max_tokens=20)
                    assert answer.choices[0].message.content == f"{question} and out"
        finally:
            process.terminate()
            process.communicate(timeout=60)
    assert process.returncode == 0
    refused = command("serve", str(run), "host=0.0.0.0", fails=2)
    assert "FORGEBOOK_API_KEY" in refused and "Traceback" not in refused


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "FORGEBOOK_API_KEY"}


def command(*words: str, fails: int = 0) -> str:
    """Run main.py; return what it printed."""
    done = subprocess.run(
        [sys.executable, "main.py", *words], cwd=REPOSITORY, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == fails, done.stdout + done.stderr
    return done.stdout + done.stderr
