"""Write CONFIG.md, AGENTS.md and llms.txt from the code, its docstrings and the other pages: `python docs/pages.py`.

CONFIG.md      every key of a config, from the docstrings in forgebook/config
AGENTS.md      what a coding agent needs, from the Makefile, the table of commands, the rooms and CONTRIBUTING.md
llms.txt       the pages, each with its first sentences (https://llmstxt.org)
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from forgebook.cli.options import COMMANDS  # noqa: E402
from forgebook.config import schema as config_keys  # noqa: E402
from forgebook.config.json_schema import config_schema  # noqa: E402

WRITTEN_BY = "<!-- `python docs/pages.py` writes this page: change the docstrings that it is made of. -->"


# -- CONFIG.md


def sections() -> dict[str, list[str]]:
    """List the keys under each `# -- title` of FinetuneConfig."""
    lines, first = inspect.getsourcelines(config_keys.FinetuneConfig)
    titles = {first + k: line.strip()[5:] for k, line in enumerate(lines) if line.strip().startswith("# -- ")}
    tree = ast.parse(Path(config_keys.__file__).read_text(encoding="utf-8"))
    found: dict[str, list[str]] = {title: [] for title in titles.values()}
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == "FinetuneConfig":
            for item in node.body:
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and item.target.id[0] != "_":
                    found[titles[max(line for line in titles if line < item.lineno)]].append(item.target.id)
    return found


def values_of(node: dict[str, Any]) -> str:
    """Describe in a few words which values a JSON schema accepts."""
    if "$ref" in node:
        name = node["$ref"].rpartition("/")[2]
        return f"[block](#{name.lower()})"
    for key in ("anyOf", "oneOf"):
        if key in node:
            texts = [values_of(item) for item in node[key] if not is_variable(item)]
            return " or ".join(dict.fromkeys(texts)).replace("true or false or", "true, false or")
    if "const" in node:
        return f"`{node['const']}`"
    if "enum" in node:
        return ", ".join(f"`{value}`" for value in node["enum"])
    kind = node.get("type")
    if isinstance(kind, list):
        kind = kind[0]
    if kind == "array":
        items = node.get("prefixItems") or [node.get("items", {})]
        text = ", ".join(dict.fromkeys(values_of(item) for item in items))
        count = f"{len(items)} " if "prefixItems" in node else ""
        return f"list of {count}({text})" if " or " in text or ", " in text else f"list of {count}{text}"
    names = {"string": "text", "boolean": "true or false", "integer": "whole number", "object": "block", "null": "null"}
    bounds = {"exclusiveMinimum": "above", "minimum": "from", "exclusiveMaximum": "below", "maximum": "to"}
    limits = [f"{word} {node[key]}" for key, word in bounds.items() if key in node and abs(node[key]) < 2**63]
    return " ".join([names.get(str(kind), str(kind)), *limits])


def is_variable(node: dict[str, Any]) -> bool:
    """Report whether a schema stands for `${VARIABLE}` alone, which any key takes."""
    return node.get("type") == "string" and node.get("pattern", "").startswith("\\$")


def key_row(key: str, node: dict[str, Any], is_required: bool) -> str:
    """Write the table row of one key."""
    default = node.get("default")
    shown = "required" if is_required else f"`{json.dumps(default)}`" if default is not None else ""
    if isinstance(default, dict) and default and all(value in (None, [], {}) for value in default.values()):
        shown = ""
    cells = (f"`{key}`", values_of(node), shown, node.get("description", ""))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def table_of(properties: dict[str, Any], required: list[str]) -> list[str]:
    """Write the table of some keys."""
    rows = [key_row(key, node, key in required) for key, node in properties.items()]
    return ["| key | values | default | what it does |", "|---|---|---|---|", *rows, ""]


def all_keys(schema: dict[str, Any]) -> list[tuple[str, Any]]:
    """List the keys of the top level and of all blocks, with their schemas."""
    blocks = [schema, *schema["$defs"].values()]
    return [(key, node) for block in blocks for key, node in block["properties"].items()]


def config_page() -> str:
    """Write CONFIG.md."""
    schema = config_schema()
    lines = [
        "# Keys of a config", "", WRITTEN_BY, "",
        "A config is a YAML file; `python main.py CONFIG key=value` overrides a key, `block.key=value` one in a block.",
        "An unknown key, a wrong value and a combination that does not work are errors with the line of the file.",
        "`${NAME}` and `${NAME:-default}` are replaced by environment variables, except in the model's texts:",
        "`system`, `columns`, `labels`, `generation_config`, `classifier_config`. [SUPPORT.md](SUPPORT.md) lists what",
        "works together, [training_configs/](training_configs/README.md) has configs to start from.", "",
        "**In an editor:** `python main.py schema > config.schema.json` writes the same as a JSON schema. With",
        "`# yaml-language-server: $schema=config.schema.json` as the first line of a config, VS Code (YAML extension),",
        "Neovim and others complete keys, show these texts and underline mistakes.", "",
    ]  # fmt: skip
    for title, keys in sections().items():
        properties = {key: schema["properties"][key] for key in keys}
        lines += [f"## {title[0].upper()}{title[1:]}", "", *table_of(properties, schema["required"])]
    lines += ["## Blocks", ""]
    for name, block in sorted(schema["$defs"].items()):
        description = block.get("description", "")
        users = [key for key, node in all_keys(schema) if f'/$defs/{name}"' in json.dumps(node)]
        of = f"Of {', '.join(f'`{key}`' for key in users)}."
        lines += [f"### {name}", "", f"{description} {of}", ""]
        lines += table_of(block["properties"], block.get("required", []))
    retired = {key: node for key, node in schema["properties"].items() if node.get("deprecated")}
    lines += ["## Retired names", "", "They load with a warning.", "", "| key | |", "|---|---|"]
    lines += [f"| `{key}` | {node['description']} |" for key, node in sorted(retired.items())]
    return "\n".join(lines) + "\n"


# -- AGENTS.md


def section_of(page: Path, title: str) -> str:
    """Read the text under a heading of a page."""
    text = page.read_text(encoding="utf-8")
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0].strip()


def agents_page() -> str:
    """Write AGENTS.md."""
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    targets = [
        (name, text) for name, text in re.findall(r"^([a-z-]+):.*?## (.+)$", makefile, re.MULTILINE) if name != "help"
    ]
    rooms = {
        path.parent.name: ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        for path in sorted((REPOSITORY / "forgebook").glob("*/__init__.py"))
    }
    lines = [
        "# For coding agents", "", WRITTEN_BY, "",
        textwrap.fill(paragraphs_of(REPOSITORY / "README.md")[0].replace("**", ""), 120), "",
        "The pages are listed in [llms.txt](llms.txt); [CONTRIBUTING.md](CONTRIBUTING.md) has a tour of the code and a",
        "table \"to change X, open Y\"; [CONFIG.md](CONFIG.md) describes every key of a config.", "",
        "## To fine-tune", "",
        "1. Write a YAML with at least `model_id` and `train_path`, from the closest in training_configs/. Validate it",
        "   against `python main.py schema`.",
        "2. `python main.py preview CONFIG --json`: examples as the model sees them, and which tokens are in the loss.",
        "3. `python main.py plan CONFIG --json`: memory, time and cost, before a GPU is paid for.",
        "4. `python main.py CONFIG`: the same command resumes a run that was interrupted.",
        "5. `python main.py evaluate RUN`: compare with the base model; the mistakes are in a file.", "",
        "Exit codes: 0 for a result worth having; 2 for a mistake in the config, the data or the arguments, with one",
        "message that names the key or `file:line` and the fix; 1 for what fails while it runs, such as a full disk;",
        "130 for Ctrl-C, 143 for SIGTERM. Results go to stdout, notes to stderr.",
        "",
        "## Commands", "",
    ]  # fmt: skip
    for command in COMMANDS.values():
        usage = " ".join(f"python main.py {command.name} {command.usage}".split())
        lines.append(wrapped(f"- `{usage}`: {command.summary}"))
    lines += ["", "## Chores", ""]
    lines += [wrapped(f"- `make {name}`: {text}") for name, text in targets]
    lines += ["", "## Rooms of forgebook/", ""]
    lines += [wrapped(f"- `{name}/`: {text}") for name, text in rooms.items()]
    lines += ["", "## Rules for changes", "", section_of(REPOSITORY / "CONTRIBUTING.md", "Rules")]
    lines += ["", "## Tests", "", section_of(REPOSITORY / "CONTRIBUTING.md", "Tests")]
    return "\n".join(lines) + "\n"


def wrapped(text: str) -> str:
    """Wrap an item of a list."""
    return textwrap.fill(text, 120, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


# -- llms.txt


def paragraphs_of(page: Path) -> list[str]:
    """List the paragraphs of a page, without headings, tables, pictures, comments and code."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    blocks = [" ".join(block.split()) for block in text.split("\n\n")]
    return [block for block in blocks if block and not block.startswith(("#", "|", "!", "[!", "<!--", "- ", "    "))]


def page_line(page: Path) -> str:
    """Write a page's line of llms.txt: its title, and its first sentences."""
    title = re.search(r"^# (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    first = re.sub(r"\[([^]]+)\]\([^)]+\)", r"\1", paragraphs_of(page)[0]).replace("**", "")
    first = re.sub(r"(?<=[.]) [^.]+:$", "", first)  # leads to a list
    sentences = re.split(r"(?<=[.!?]) (?=[A-Z])", first)
    text = sentences[0] if len(sentences[0]) > 60 else " ".join(sentences[:2])
    return f"- [{title[1] if title else page.stem}]({page.relative_to(REPOSITORY)}): {text}"


def llms_page() -> str:
    """Write llms.txt."""
    first = re.sub(r"\*\*", "", paragraphs_of(REPOSITORY / "README.md")[0])
    start = ["README.md", "CONFIG.md", "DATA.md", "SUPPORT.md", "CLUSTERS.md", "FAILURES.md"]
    start += ["training_configs/README.md", "deepspeed_configs/README.md", "tiny_model/README.md"]
    start += ["tiny_vision_model/README.md"]
    develop = ["AGENTS.md", "CONTRIBUTING.md", "SECURITY.md"]
    lines = ["# Forgebook", "", f"> {first}", "", "## Guide and reference", ""]
    lines += [page_line(REPOSITORY / name) for name in start]
    for title, folder in (("Cookbooks", "cookbooks"), ("End-to-end examples", "end-to-end-examples")):
        lines += ["", f"## {title}", ""]
        lines += [page_line(page) for page in sorted((REPOSITORY / folder).glob("*/README.md"))]
    lines += ["", "## Development", "", *(page_line(REPOSITORY / name) for name in develop)]
    return "\n".join(lines) + "\n"


PAGES = {"CONFIG.md": config_page, "AGENTS.md": agents_page, "llms.txt": llms_page}

if __name__ == "__main__":
    for name, write in PAGES.items():  # in this order: llms.txt reads the two others
        (REPOSITORY / name).write_text(write(), encoding="utf-8")
