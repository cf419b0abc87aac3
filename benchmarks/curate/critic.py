"""A small real model as the critic: python benchmarks/curate/critic.py (needs `make models`)

SmolLM2-135M-Instruct behind `serve`, over HTTP, scores 60 answers to questions of general knowledge, half of them the
right answer to another question (tests/support_facts.py), with four shots; the threshold is chosen on 20 other answers
of known quality. Once with `probabilities`, once with three votes.

precision, recall: of the dropped examples, for the wrong ones. ranked: of all pairs of a right and a wrong answer, the
share where the right one has the higher score (half of a tie); 0.5 is chance. The figures go to
benchmarks/curate/results.json.
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests"), str(Path(__file__).parent)]
MODEL = "SmolLM2-135M-Instruct"
LABELED_QUESTIONS, QUESTIONS = 10, 40
RUBRIC = "5: the answer fits the question and is right\n1: the answer does not answer the question"
MODES = {
    "probabilities": {"votes": 1, "probabilities": True},
    "three votes": {"votes": 3},
}


def measure(mode: dict, url: str, folder: Path) -> dict:
    from forgebook.config.curation_blocks import CriticConfig
    from forgebook.curation import critic
    from forgebook.curation.endpoint import Endpoint
    from forgebook.data.row_formats import parse_row
    from support_facts import SHOTS, graded

    labeled = folder / "labeled.jsonl"
    labeled.write_text("".join(json.dumps(row) + "\n" for row in graded(stop=LABELED_QUESTIONS)))
    rows = graded(LABELED_QUESTIONS, QUESTIONS)
    examples = {
        k: parse_row({"messages": row["messages"]}, f"planted:{k + 1}", "instruction_tuning")[0]
        for k, row in enumerate(rows)
    }
    settings = CriticConfig(
        model=MODEL, base_url=url, rubric=RUBRIC, shots=SHOTS, max_tokens=5, labeled=str(labeled), timeout=600, **mode
    )
    started = time.time()
    judged = critic.make_critic(settings, "instruction_tuning")(examples)
    seconds = time.time() - started
    # Asked again, which costs nothing: the replies are saved.
    again = critic._ask(Endpoint(settings), examples.values(), "answers", lambda name, done, total: None)
    scores = [score.mean for score in again]
    found = {finding.number for finding in judged.findings}
    bad = {k for k, row in enumerate(rows) if not row["good"]}
    pairs = [(scores[k], scores[other]) for k, other in itertools.product(set(examples) - bad, bad)]
    ranked = statistics.fmean(0.5 if a is None or b is None else (a > b) + (a == b) / 2 for a, b in pairs)
    report = judged.report
    return {
        "examples": len(rows), "wrong": len(bad), "dropped": len(found), "ranked": round(ranked, 3),
        "precision": round(len(found & bad) / max(1, len(found)), 3), "recall": round(len(found & bad) / len(bad), 3),
        **{name: round(report[name], 3)
           for name in ("threshold", "labeled_precision", "labeled_recall", "agreement") if name in report},
        **{name: report[name] for name in ("without_score", "asked", "input_tokens", "output_tokens")},
        "seconds": round(seconds, 1), "load_average": round(os.getloadavg()[0], 1),
    }  # fmt: skip


def main() -> None:
    from run import save

    model = REPOSITORY / ".models" / "HuggingFaceTB" / MODEL
    if not model.is_dir():
        raise SystemExit(f"{MODEL} is not here: make models")
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["FORGEBOOK_CACHE"] = temporary
        command = [sys.executable, "main.py", "serve", str(model), "port=0"]
        server = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            line = next(line for line in server.stdout if " at http" in line)
            url = next(word for word in line.split() if word.startswith("http"))
            figures = {}
            for name, mode in MODES.items():
                figures[name] = measure(mode, url, Path(temporary))
                print(name, json.dumps(figures[name]), flush=True)
                save("critic", {"model": MODEL, **figures})
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
