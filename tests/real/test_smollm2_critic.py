"""SmolLM2 as a critic behind `serve`, over HTTP: it scores right answers higher than wrong ones, on average."""

import statistics
import subprocess
import sys

import pytest

from conftest import REPOSITORY
from forgebook.catalog import model_folder
from forgebook.config.curation_blocks import CriticConfig
from forgebook.curation.critic import make_critic
from forgebook.data.row_formats import parse_row
from support_facts import SHOTS, graded

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not model_folder(SMOLLM2).is_dir(), reason=f"{SMOLLM2} is not here: make models"),
]


@pytest.fixture(scope="module")
def url():
    command = [sys.executable, "main.py", "serve", str(model_folder(SMOLLM2)), "port=0"]
    server = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    line = next(line for line in server.stdout if " at http" in line)
    yield next(word for word in line.split() if word.startswith("http"))
    server.terminate()
    server.wait()


def test_a_small_model_by_probabilities(url, tmp_path, monkeypatch):
    monkeypatch.setenv("FORGEBOOK_CACHE", str(tmp_path))
    rows = graded(stop=6)
    settings = CriticConfig(
        model="SmolLM2-135M-Instruct", base_url=url, shots=SHOTS, max_tokens=5, probabilities=True, threshold=9,
        rubric="5: the answer fits the question and is right\n1: the answer does not answer the question",
    )  # fmt: skip
    examples = {
        k: parse_row({"messages": row["messages"]}, f"facts:{k + 1}", "instruction_tuning")[0]
        for k, row in enumerate(rows)
    }
    judged = make_critic(settings, "instruction_tuning")(examples)
    assert judged.report["scored"] == len(rows) and judged.report["without_score"] == 0
    scores = {one.number: float(one.detail.split()[0]) for one in judged.findings}  # all are below 9
    right, wrong = ([scores[k] for k, row in enumerate(rows) if row["good"] is good] for good in (True, False))
    assert statistics.fmean(right) > statistics.fmean(wrong) + 0.02
    assert len(set(scores.values())) > 6  # no two or three scores for everything, as votes are
