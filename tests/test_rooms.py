"""The engine's rooms: imports point one way, light rooms stay light, everything public is named and documented."""

import ast
import importlib
import subprocess
import sys

import pytest

from conftest import REPOSITORY

ENGINE = REPOSITORY / "forgebook"
# A room imports itself, the rooms before it, and the files at the top.
ROOMS = "config runs models data planning training inference evaluation curation export reporting launch cli".split()
FILES = sorted(path.relative_to(REPOSITORY) for path in ENGINE.rglob("*.py"))
MODULES = [path for path in FILES if path.name != "__init__.py"]
LIGHT = ("config", "runs", "data", "planning", "cli")
HEAVY = {"torch", "ray", "transformers", "peft", "accelerate", "deepspeed"}


def module_of(path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def imports_of(path) -> list[tuple[int, str]]:
    """List (line, module) of every import of a file, wherever in it."""
    imports = []
    for node in ast.walk(ast.parse((REPOSITORY / path).read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module == "forgebook":
            imports += [(node.lineno, f"forgebook.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imports.append((node.lineno, node.module or ""))
        elif isinstance(node, ast.Import):
            imports += [(node.lineno, alias.name) for alias in node.names]
    return imports


def test_every_folder_is_a_known_room():
    rooms = {path.parent.name for path in ENGINE.rglob("*.py")} - {"forgebook"}
    assert rooms <= set(ROOMS) and len(rooms) > 10 and len(FILES) > 80


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_room_imports_only_rooms_before_it(path):
    here = path.parts[1] if path.parts[1] in ROOMS else None
    later = ROOMS[ROOMS.index(here) + 1 :] if here else ROOMS
    for line, module in imports_of(path):
        parts = module.split(".")
        assert parts[0] != "helpers", f"{path}:{line} imports the face of the notebooks"
        assert parts[0] != "forgebook" or parts[1] not in later, f"{path}:{line} imports {module}"


def test_peft_is_imported_where_it_is_kept_from_importing_bitsandbytes():
    importers = {str(path) for path in FILES for _, module in imports_of(path) if module.split(".")[0] == "peft"}
    assert importers == {"forgebook/models/peft_library.py"}


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_every_public_name_exists_and_is_documented(path):
    """A dataclass has an automatic `__doc__`, so docstrings are looked for in the source."""
    tree = ast.parse((REPOSITORY / path).read_text())
    assert ast.get_docstring(tree), f"{path} has no docstring"
    definitions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    module = importlib.import_module(module_of(path))
    assert len(set(module.__all__)) == len(module.__all__)
    for name in module.__all__:
        assert hasattr(module, name), f"{path}: {name} is not there"
        assert name not in definitions or ast.get_docstring(definitions[name]), f"{path}: {name} has no docstring"


@pytest.mark.parametrize("path", [p for p in FILES if p.name == "__init__.py"], ids=str)
def test_a_rooms_init_is_one_docstring_line(path):
    body = ast.parse((REPOSITORY / path).read_text()).body
    assert len(body) == 1 and len((REPOSITORY / path).read_text().splitlines()) == 1


@pytest.mark.parametrize("room", LIGHT)
def test_light_rooms_import_no_gpu_stack(room):
    modules = [module_of(path) for path in FILES if path.parts[1] == room]
    code = f"import sys\nfor name in {modules}: __import__(name)\nprint(sorted({HEAVY} & set(sys.modules)))"
    printed = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == "[]"


def test_help_imports_only_what_it_prints():
    code = "import sys; from forgebook.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += f"print(sorted({HEAVY | {'pydantic', 'yaml', 'rich', 'numpy'}} & set(sys.modules)))"
    printed = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert "python main.py CONFIG" in printed.stdout and printed.stdout.strip().endswith("[]")


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_is_no_longer_than_400_lines(path):
    assert len((REPOSITORY / path).read_text().splitlines()) <= 400


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_every_file_has_its_tests(path):
    room = path.relative_to("forgebook")
    assert (REPOSITORY / "tests" / room.with_name(f"test_{path.name}")).exists()


def test_main_is_small():
    assert len((REPOSITORY / "main.py").read_text().splitlines()) <= 20
