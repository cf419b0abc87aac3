"""SmolLM2 as users meet it: preview, plan, a run in default mode, and its checkpoint evaluated, merged and served."""

import asyncio
import json

import httpx
import openai
import pytest

from conftest import REPOSITORY, losses_of
from forgebook.catalog import model_folder
from forgebook.cli.main import main
from forgebook.export.merge import merge_run
from forgebook.inference.engine import Engine
from forgebook.inference.server import make_app, name_models
from forgebook.runs.atomic import read_json
from forgebook.runs.run import find_run

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not model_folder(SMOLLM2).is_dir(), reason=f"{SMOLLM2} is not here: make models"),
]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Short records of customers' messages, without their system message: the model's template brings its own."""
    folder = tmp_path_factory.mktemp("smollm2")
    rows = [json.loads(line) for line in (REPOSITORY / "data/quickstart/train.jsonl").read_text().splitlines()[:20]]
    for row in rows:
        del row["messages"][0]
    for name, part in (("train", rows[:16]), ("valid", rows[16:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    path = folder / "records.yaml"
    path.write_text(json.dumps({
        "model_id": SMOLLM2, "train_path": str(folder / "train.jsonl"), "valid_path": str(folder / "valid.jsonl"),
        "storage_path": str(folder / "runs"), "run_name": "records", "train_batch_size_per_device": 4, "max_steps": 4,
        "gradient_accumulation_steps": 1, "learning_rate": 1e-3,
    }))  # fmt: skip
    return path


@pytest.fixture(scope="module")
def run(config):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("forgebook.planning.prepare.local_hardware", lambda: None)
        assert main([str(config), "--default"]) == 0
    return find_run(str(config.parent / "runs" / "records"))


def test_preview_shows_the_system_message_of_the_template_and_the_answer_in_the_loss(config, capsys):
    assert main(["preview", str(config), "--default", "n=1", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    texts = [token if isinstance(token, str) else json.dumps(token) for token in shown.values()]
    assert any("named SmolLM" in text for text in texts)


def test_default_mode_measures_the_cpu_and_learns(run):
    choices = {choice["key"]: choice for choice in read_json(run.data_report)["choices"]}
    assert "measured on this CPU" in choices["dtype"]["reason"] and choices["num_devices"]["value"] == 0
    losses = losses_of(run)
    assert len(losses) == 4 and losses[-1] < losses[0] - 0.2
    planned, measured = (read_json(run.summary)[name] for name in ("planned", "measured"))
    assert planned["tokens"] == measured["tokens"] and planned["process_bytes_per_worker"] > 1.4e9


def test_the_plan_chooses_what_the_run_has_chosen(config, run, capsys, monkeypatch):
    monkeypatch.setattr("forgebook.planning.hardware.local_hardware", lambda: None)
    assert main(["plan", str(config), "--default", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    chosen = {choice["key"]: choice["value"] for choice in planned["choices"]}
    assert chosen == {choice["key"]: choice["value"] for choice in read_json(run.data_report)["choices"]}


def test_it_is_evaluated_against_its_base(run, capsys):
    assert main(["evaluate", str(run.folder), "rows=2", "max_new_tokens=8"]) == 0
    assert "base model" in capsys.readouterr().out and (run.folder / "evaluation" / "mistakes.jsonl").exists()


def test_adapter_and_merged_model_are_served_to_an_openai_client(run, tmp_path):
    merged = merge_run(str(run.folder), str(tmp_path / "merged"))
    # In the base's bfloat16, so that an answer may take another word where two are about as likely.
    assert merged.vllm == "yes" and merged.kl_merged < 0.05 * merged.kl_base
    engine = Engine(name_models([str(run.folder), str(merged.folder)]), dtype="float32").start()
    try:
        answers = asyncio.run(ask(make_app(engine), ["records", "merged"]))
    finally:
        engine.stop()
    assert all(answers), answers


async def ask(app, models: list[str]) -> list[str]:
    """Ask each model for a record by the OpenAI client, which reaches the application without a socket."""
    transport = httpx.AsyncClient(transport=httpx.ASGITransport(app=app))
    client = openai.AsyncOpenAI(base_url="http://127.0.0.1/v1", api_key="none", max_retries=0, http_client=transport)
    question = "Hello, I am Ada Byron. My lamp is broken, order number 12345. Please repair it."
    answers = [
        await client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": question}], max_tokens=8, temperature=0
        )
        for model in models
    ]
    return [answer.choices[0].message.content or "" for answer in answers]
