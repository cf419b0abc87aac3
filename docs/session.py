"""Draw docs/session.svg, the picture on the first page: preview, plan and run, as a terminal shows them.

python docs/session.py    runs preview and plan; training and evaluation are those that README.ipynb shows
"""

import io
import json
import re
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

REPOSITORY = Path(__file__).resolve().parent.parent
QUICKSTART = "training_configs/tiny/quickstart.yaml"
BIG = "training_configs/real/Qwen/Qwen3-8B/lora/1xA100-80G-4096.yaml"
WIDTH = 98


def output_of(*words: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "main.py", *words], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def cell_output(command: str) -> list[str]:
    """List the lines that README.ipynb shows below a command."""
    cells = json.loads((REPOSITORY / "README.ipynb").read_text())["cells"]
    cell = next(cell for cell in cells if "".join(cell["source"]).startswith(f"!python main.py {command}"))
    return "".join("".join(output.get("text", "")) for output in cell["outputs"]).splitlines()


def text_of(line: str) -> Text:
    """Highlight what stands ⟦in brackets⟧, as a terminal does with tokens in the loss."""
    text = Text()
    for k, part in enumerate(re.split("[⟦⟧]", line)):
        text.append(part, "#101418 on #98d8a0" if k % 2 else "")
    return text


def main() -> None:
    preview = output_of("preview", QUICKSTART, "n=1")
    start = next(k for k, line in enumerate(preview) if "tokens" in line)
    plan = output_of("plan", BIG)
    wanted = ("parameters", "weights", "activations", "memory per GPU")
    rows = [re.sub(" *│ *", "  ", line).strip() for line in plan if line.lstrip("│ ").startswith(wanted)]
    trained = cell_output(QUICKSTART)
    evaluated = cell_output("evaluate readme")
    sections = [
        (f"preview {QUICKSTART} n=1", "\n".join(preview[start + 1 :]).strip().splitlines()),
        (f"plan {BIG}", [*rows, plan[-1]]),
        (QUICKSTART, [line for line in trained if "evaluation loss" in line]),
        ("evaluate quickstart", [line for line in evaluated if "exact match on" in line]),
    ]
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, highlight=False)
    for command, lines in sections:
        console.print(Text(f"$ python main.py {command}", "bold #8cc8ff"))
        for line in lines:
            console.print(text_of(line))
        console.print()
    # Without the web's font: a picture on a page loads nothing.
    svg = re.sub(r"@font-face \{.*?\}\s*", "", console.export_svg(title="Forgebook"), flags=re.DOTALL)
    (REPOSITORY / "docs/session.svg").write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
