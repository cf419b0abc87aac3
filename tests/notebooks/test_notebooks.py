"""Every notebook runs from top to bottom as it stands, and is committed clean."""

import ast
import importlib.util
import json
import os
import re
import sys
import time
from pathlib import Path

import pytest

import helpers
from conftest import REPOSITORY

# The longest first, so that none runs alone at the end.
PLACES = ("end-to-end-examples/**/*.ipynb", "*.ipynb", "cookbooks/**/*.ipynb")
NOTEBOOKS = [
    path for place in PLACES for path in sorted(REPOSITORY.glob(place)) if ".ipynb_checkpoints" not in path.parts
]


SECRET = re.compile(r"\b(hf_[A-Za-z0-9]{20,}|AKIA[A-Z0-9]{16}|sk-[A-Za-z0-9_-]{20,}|gh[ps]_[A-Za-z0-9]{30,})\b")


def name(path):
    return str(path.relative_to(REPOSITORY))


def cells_of(path, kind: str) -> list[dict]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def test_there_are_notebooks():
    assert "README.ipynb" in [name(path) for path in NOTEBOOKS]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_notebook_runs_unmodified(path, tmp_path, monkeypatch):
    """papermill runs it, training included; its last cell asserts what its text claims."""
    minutes, limit = (time.time() - float(os.environ["FORGEBOOK_TESTS_BEGAN"])) / 60, os.environ.get("NOTEBOOK_MINUTES")
    if limit and minutes > float(limit):
        pytest.skip(f"not run: {minutes:.0f} minutes are over, notebooks start within {limit} (NOTEBOOK_MINUTES)")
    import papermill

    # `!python` in a cell is to be this Python, as in an activated environment.
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    papermill.execute_notebook(
        path, tmp_path / "out.ipynb", cwd=path.parent, kernel_name="python3", progress_bar=False, execution_timeout=1200
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_notebook_is_committed_clean(path):
    """Run once from a fresh kernel, no errors, no widgets, no paths of somebody's machine, nothing huge."""
    notebook = json.loads(path.read_text())
    assert set(notebook["metadata"]) <= {"kernelspec", "language_info"}
    code = cells_of(path, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1)), "run `make notebooks`"
    for cell in code:
        assert set(cell["metadata"]) <= {"tags"}
        for output in cell["outputs"]:
            assert output["output_type"] != "error"
            assert "application/vnd.jupyter.widget-view+json" not in output.get("data", {})
            text = "".join(output.get("text", output.get("data", {}).get("text/plain", "")))
            assert len(text) <= 4000
            assert not re.search(r"(?<![\w.:/])/(home|root|work|tmp|Users)/", text), "an absolute path"
            assert len(output.get("data", {}).get("image/png", "")) < 270_000  # base64 of 200 kB
    assert not SECRET.search(path.read_text())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_notebook_says_what_it_takes_and_keeps_to_it(path):
    """Its head: what one has at the end, time, hardware, cost, config. Its length: that of one sitting."""
    texts = ["".join(cell["source"]) for cell in cells_of(path, "markdown")]
    head = "".join(texts[:2])
    for promise in ("At the end", "**Time:**", "**Hardware:**", "**Cost:**", "**Config:**"):
        assert promise in head, f"its head lacks {promise}"
    words = len(" ".join(texts).split())
    assert words <= (2_500 if "end-to-end-examples" in path.parts else 1_500)
    code = ["".join(cell["source"]) for cell in cells_of(path, "code")]
    for source in code:
        assert len(source.splitlines()) <= 25
    assert "assert" in code[-1]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_notebook_uses_public_names_only(path):
    for cell in cells_of(path, "code"):
        source = "".join(cell["source"])
        assert "sys.path" not in source and "%run" not in source
        source = re.sub(r"\\\n\s*", "", source)  # a command over several lines
        lines = [re.sub(r"^(\s*)(\w+ = )?[!%].*", r"\1pass", line) for line in source.splitlines()]
        for node in ast.walk(ast.parse("\n".join(lines))):
            assert not (isinstance(node, ast.Import) and node.names[0].name.split(".")[0] in ("forgebook", "helpers"))
            if isinstance(node, ast.ImportFrom) and node.module:
                assert node.module.split(".")[0] != "forgebook", "notebooks import nothing of ours but `helpers`"
                if node.module.split(".")[0] == "helpers":
                    assert node.module == "helpers" and {alias.name for alias in node.names} <= set(helpers.__all__)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_readme_is_the_notebook(path, make_page):
    """README.md is the notebook's Markdown, and README_files/ its figures: run `make notebooks` if they are not."""
    text, figures = make_page.markdown_of(path)
    assert text == path.with_suffix(".md").read_text()
    assert {path.parent / name for name in figures} == set(path.with_name(f"{path.stem}_files").glob("*"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_every_figure_has_a_text(path):
    """What is seen, for those who do not see it."""
    for text in re.findall(r"!\[([^]]*)\]\(README_files", path.with_suffix(".md").read_text()):
        assert len(text) > 20, text


@pytest.fixture(scope="module")
def make_page():
    spec = importlib.util.spec_from_file_location("make_page", REPOSITORY / "cookbooks/make_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
