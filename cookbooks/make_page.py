"""Run a notebook from top to bottom, keep its outputs, and write the README.md that GitHub shows.

python cookbooks/make_page.py NOTEBOOK [NOTEBOOK ...] [--only-markdown]

The outputs of a cell become one text without terminal codes, and every figure gets the text that its output carries.
"""

import argparse
import re
import shutil
from pathlib import Path

import nbformat
from nbconvert.exporters import MarkdownExporter
from nbconvert.preprocessors import ExecutePreprocessor

TERMINAL_CODE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
FIGURE = re.compile(r"!\[png\]\((README_files/README_(\d+)_(\d+)\.png)\)")


def run(path: Path) -> None:
    """Execute a notebook in its own folder, as papermill and Jupyter do, and save its outputs."""
    notebook = nbformat.read(path, as_version=4)
    runner = ExecutePreprocessor(timeout=1800, kernel_name="python3", record_timing=False)
    runner.preprocess(notebook, {"metadata": {"path": str(path.parent)}})
    notebook.metadata = {key: notebook.metadata[key] for key in ("kernelspec", "language_info")}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = one_text(cell.outputs)
    nbformat.write(notebook, path)


def one_text(outputs: list) -> list:
    """Join what a cell printed in pieces; drop codes that move or color a terminal's text."""
    joined: list = []
    for output in outputs:
        if output.output_type == "stream":
            output.text = TERMINAL_CODE.sub("", output.text).replace(
                "\r\n", "\n"
            )  # a subprocess has a terminal
            if joined and joined[-1].output_type == "stream" and joined[-1].name == output.name:
                joined[-1].text += output.text
                continue
        joined.append(output)
    return joined


def markdown_of(path: Path) -> tuple[str, dict[str, bytes]]:
    """Return the README.md of a notebook, and the figures that belong to it by their paths beside it."""
    notebook = nbformat.read(path, as_version=4)
    names = {"unique_key": path.stem, "output_files_dir": f"{path.stem}_files"}
    text, resources = MarkdownExporter().from_notebook_node(notebook, resources=names)

    def with_text(match: re.Match) -> str:
        output = notebook.cells[int(match[2])].outputs[int(match[3])]
        return f"![{output.metadata.get('image/png', {}).get('alt', 'figure')}]({match[1]})"

    return FIGURE.sub(with_text, text).replace("\r\n", "\n").strip() + "\n", resources[
        "outputs"
    ]


def write_markdown(path: Path) -> None:
    text, figures = markdown_of(path)
    shutil.rmtree(path.with_name(f"{path.stem}_files"), ignore_errors=True)
    for name, content in figures.items():
        target = path.parent / name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(content)
    path.with_suffix(".md").write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument(
        "--only-markdown", action="store_true", help="of the outputs that are there"
    )
    given = parser.parse_args()
    for path in given.notebooks:
        if not given.only_markdown:
            run(path)
        write_markdown(path)
        print(path)


if __name__ == "__main__":
    main()
