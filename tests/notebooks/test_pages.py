"""Links lead somewhere, and the maps name what exists."""

import ast
import importlib.util
import re
import subprocess
import sys

import pytest

from conftest import REPOSITORY

ENGINE = REPOSITORY / "forgebook"
PAGES = sorted(
    path
    for path in REPOSITORY.glob("**/*.md")
    if not {".venv", ".venv-vllm", "runs", ".pytest_cache"} & set(path.relative_to(REPOSITORY).parts)
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
    for path in re.findall(rf"`?\b(?<!-)(?<!//)((?:{folders})/[\w./+-]+\.\w+)(?![\w/-])", page.read_text()):
        exists = (REPOSITORY / path).exists() or (page.name == "CONTRIBUTING.md" and (ENGINE / path).exists())
        assert path.startswith(made_by_a_command) or exists, f"{name(page)} names {path}"


def test_contributing_names_every_room_and_no_file_that_is_gone():
    text = (REPOSITORY / "CONTRIBUTING.md").read_text()
    for room in (path.parent.name for path in (REPOSITORY / "forgebook").glob("*/__init__.py")):
        assert f"`{room}/" in text or f"forgebook/{room}/" in text, room
    named = re.findall(r"`([\w/.-]+\.(?:py|yaml|md|svg))`", text)
    assert len(named) > 40
    for path in named:
        assert (REPOSITORY / path).exists() or (REPOSITORY / "forgebook" / path).exists(), path


def test_contributing_is_a_page_to_start_from():
    """A tour of about 15 lines, a table of at most 30; the picture is of the code as it is."""
    text = (REPOSITORY / "CONTRIBUTING.md").read_text()
    assert len(re.findall(r"^\d+\. ", text.partition("## To change")[0], re.MULTILINE)) <= 15
    assert len(re.findall(r"^\| (?!to \|)", text, re.MULTILINE)) <= 30
    spec = importlib.util.spec_from_file_location("rooms", REPOSITORY / "docs/rooms.py")
    rooms = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rooms)
    assert (REPOSITORY / "docs/rooms.svg").read_text() == rooms.draw(), "run `python docs/rooms.py`"


def written_pages():
    spec = importlib.util.spec_from_file_location("pages", REPOSITORY / "docs/pages.py")
    pages = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pages)
    return pages.PAGES


@pytest.mark.parametrize("page", ["CONFIG.md", "AGENTS.md", "llms.txt"])
def test_a_page_that_is_written_from_the_code_is_up_to_date(page):
    assert (REPOSITORY / page).read_text() == written_pages()[page](), "run `python docs/pages.py`"


def test_the_list_of_pages_leads_to_every_page_and_to_none_that_is_gone():
    text = (REPOSITORY / "llms.txt").read_text()
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert all((REPOSITORY / target).is_file() for target in targets) and text.startswith("# Forgebook\n\n> ")
    guides = [name(page) for page in PAGES if {"cookbooks", "end-to-end-examples"} & set(page.parts)]
    assert len(guides) > 10 and set(guides) <= set(targets)


def test_the_page_of_keys_has_every_key_under_its_section():
    from forgebook.config.schema import FinetuneConfig

    text = (REPOSITORY / "CONFIG.md").read_text()
    keys = re.findall(r"^\| `(\w+)` \|", text.partition("## Blocks\n")[0], re.MULTILINE)
    assert keys == list(FinetuneConfig.model_fields)


def test_every_failure_has_its_test():
    """Each row of FAILURES.md has the number of a test that pytest collects and does not skip on every machine."""
    text = (REPOSITORY / "FAILURES.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| failure |")]
    assert len(rows) > 10
    listed = re.findall(r"^(\d+)\. `(test_\w+)` in (tests/[\w/]+\.py)$", text, re.MULTILINE)
    assert {number for number, _, _ in listed} == {row.split("|")[-2].strip() for row in rows}
    tests = [(name, file) for _, name, file in listed]
    files = sorted({file for _, file in tests})
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--collect-only",
        "-q",
        "-m",
        "not skip",
        "-p",
        "no:cacheprovider",
        *files,
    ]
    collected = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert collected.returncode == 0, collected.stdout[-1500:]
    ids = {line.partition("[")[0] for line in collected.stdout.splitlines()}
    for name, file in tests:
        assert f"{file}::{name}" in ids, f"{file} has no test {name} that runs"
        assert not _skips_always(REPOSITORY / file, name), f"{file}: {name} is skipped on every machine"


def _skips_always(file, test: str) -> bool:
    """Tell whether a test calls `pytest.skip` under no condition, or is marked `skipif(True)`."""
    functions = (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef))
    (function,) = (node for node in functions if node.name == test)
    skips = any(ast.unparse(statement).startswith("pytest.skip(") for statement in function.body)
    return skips or any("skipif(True" in ast.unparse(mark) for mark in function.decorator_list)


def test_every_deepspeed_file_is_explained_and_every_config_listed():
    text = (REPOSITORY / "deepspeed_configs/README.md").read_text()
    for path in (REPOSITORY / "deepspeed_configs").glob("*.json"):
        assert f"- `{path.name}`: " in text
    listed = (REPOSITORY / "training_configs/README.md").read_text()
    for path in (REPOSITORY / "training_configs").glob("[cd]*/**/*.yaml"):
        assert f"]({path.relative_to(REPOSITORY / 'training_configs')})" in listed


def test_words_are_spelled_right():
    aside = {".venv", ".venv-vllm", "runs", "corpus", ".pytest_cache", ".ipynb_checkpoints"}
    kinds = {".md", ".ipynb", ".py", ".yaml"}
    files = [path for path in REPOSITORY.rglob("*.*") if path.suffix in kinds and path.is_file()]
    pages = [name(path) for path in files if not aside & set(path.relative_to(REPOSITORY).parts)]
    assert len(pages) > 100
    command = [sys.executable, "-m", "codespell_lib", *pages]
    checked = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


# Words that readers of the field stumble over, and what to write instead.
WORDING = {
    r"\bcolour": "color",
    r"\blearnt\b": "learned",
    r"\btrained tokens\b": "supervised tokens, tokens in the loss",
    r"\ball parameters\b": "full fine-tuning",
    r"\buntouched model\b": "base model",
    r"\b(goes|carries|go|carry) on (to|from|after|with|at)\b": "resumes, continues",
    r"\bat the seam\b": "at the stage boundary",
    r"\bdear(est)?\b": "expensive",
    r"\bmends?\b": "fix",
    r"\b(is|are|was|were) told\b": "see, get, print",
    r"\bforetells?\b": "predicts",
    r"\bupside down\b": "in reverse order",
    r"\bas a tiny model likes\b": "because the model is tiny",
    r"\bstands a learning rate\b": "needs a learning rate",
    r"\d %": "95%, without a space",
    r"\bbelongs into\b": "belongs in",
    r"\bchange one line\b": "the exact commands",
}


WITH_OTHER_WORDS = {REPOSITORY / "CHANGELOG.md", REPOSITORY / "tests/oracles/chat_templates.yaml"}  # history; templates


@pytest.mark.parametrize("path", sorted({*PAGES, *REPOSITORY.glob("[!.r]*/**/*.yaml")} - WITH_OTHER_WORDS), ids=name)
def test_pages_use_the_words_of_the_field(path):
    prose = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    found = {f"{match[0]!r}: write {better}" for word, better in WORDING.items() for match in re.finditer(word, prose)}
    assert not found, found


def test_the_reference_names_all_values_of_a_key():
    lines = (REPOSITORY / "CONFIG.md").read_text().splitlines()
    for key, values in {
        "gradient_checkpointing": "true, false or `auto`, `selective`, `offload`",
        "reshard_after_forward": "true, false or `auto`",
        "enabled": "true, false or `auto`",
        "torch_compile": "true, false or block",
    }.items():
        assert any(line.startswith(f"| `{key}` | {values} |") for line in lines), key
