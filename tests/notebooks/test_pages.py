"""Links lead somewhere, and the maps name what exists."""

import re
import subprocess
import sys

import pytest

from conftest import REPOSITORY

PAGES = sorted(
    path
    for path in REPOSITORY.glob("**/*.md")
    if not {".venv", "runs", ".pytest_cache"} & set(path.relative_to(REPOSITORY).parts)
)


def name(path):
    return str(path.relative_to(REPOSITORY))


def test_there_are_pages():
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "tiny_model/README.md"} <= {name(path) for path in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)#]+)\)", prose):
        if not target.startswith(("https://", "data:")):
            assert (page.parent / target).exists(), f"{name(page)} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_named_in_code_exist(page):
    made_by_a_command = ("runs/", "data/corpus/")
    folders = "forgebook|helpers|tests|training_configs|deepspeed_configs|data|tiny_model"
    for path in re.findall(rf"`?\b(?<!-)(?<!//)((?:{folders})/[\w./+-]+\.\w+)", page.read_text()):
        assert path.startswith(made_by_a_command) or (REPOSITORY / path).exists(), f"{name(page)} names {path}"


def test_contributing_names_every_room_and_no_file_that_is_gone():
    text = (REPOSITORY / "CONTRIBUTING.md").read_text()
    for room in (path.parent.name for path in (REPOSITORY / "forgebook").glob("*/__init__.py")):
        assert f"`{room}/" in text or f"forgebook/{room}/" in text, room


def test_every_failure_has_its_test():
    rows = [line for line in (REPOSITORY / "FAILURES.md").read_text().splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 10
    for row in rows:
        name, file = re.search(r"`(test_\w+)` in (tests/[\w/]+\.py) \|$", row).groups()
        assert f"def {name}(" in (REPOSITORY / file).read_text(), row


def test_every_deepspeed_file_is_explained_and_every_config_listed():
    text = (REPOSITORY / "deepspeed_configs/README.md").read_text()
    for path in (REPOSITORY / "deepspeed_configs").glob("*.json"):
        assert f"- `{path.name}`: " in text
    listed = (REPOSITORY / "training_configs/README.md").read_text()
    for path in (REPOSITORY / "training_configs").glob("[cd]*/**/*.yaml"):
        assert f"]({path.relative_to(REPOSITORY / 'training_configs')})" in listed


def test_words_are_spelt_right():
    aside = {".venv", "runs", "corpus", ".pytest_cache", ".ipynb_checkpoints"}
    kinds = {".md", ".ipynb", ".py", ".yaml"}
    files = [path for path in REPOSITORY.rglob("*.*") if path.suffix in kinds and path.is_file()]
    pages = [name(path) for path in files if not aside & set(path.relative_to(REPOSITORY).parts)]
    assert len(pages) > 100
    command = [sys.executable, "-m", "codespell_lib", *pages]
    told = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert told.returncode == 0, told.stdout
