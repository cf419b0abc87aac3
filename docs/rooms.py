"""Draw the rooms of forgebook/ and which imports which, from their import statements: `python docs/rooms.py`.

An arrow is drawn from a room to those it imports, except where another arrow's path already leads there. Level, order
and color of a box are computed, so the picture changes only when imports or a room's docstring do.
"""

from __future__ import annotations

import ast
import itertools
import textwrap
from collections.abc import Iterator
from html import escape
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PICTURE = REPOSITORY / "docs/rooms.svg"
HEAVY = {"torch", "ray", "transformers", "peft", "accelerate", "deepspeed"}
ENTRIES = {"main.py": "The one command.", "helpers": "What notebooks call."}
WIDTH, HEIGHT, GAP_X, GAP_Y, MARGIN = 232, 74, 28, 32, 12
# Solid fills with white text: legible on a light page and on a dark one.
LIGHT_FILL, HEAVY_FILL, ENTRY_FILL, LINE = "#1f6f5c", "#2f5d93", "#6b5b8a", "#8a8f98"

Graph = dict[str, set[str]]


def module_of(path: Path) -> str:
    """Name a file's module, `forgebook.data.readers` or `main`."""
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


def imports_of(tree: ast.AST, modules: set[str], deferred: bool) -> Iterator[str]:
    """Yield the modules that a file imports. deferred: also those imported inside functions or for type checkers."""
    nodes = ast.walk(tree) if deferred else iter(getattr(tree, "body", []))
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in modules else node.module


def room_of(module: str) -> str:
    """Name the box that a module belongs to; empty for what is in none, such as forgebook.errors."""
    parts = module.split(".")
    if parts[0] != "forgebook":
        return {"main": "main.py", "helpers": "helpers"}.get(parts[0], "")
    is_room = len(parts) > 1 and (REPOSITORY / "forgebook" / parts[1]).is_dir()
    return parts[1] if is_room else ""


def read_graph() -> tuple[Graph, set[str]]:
    """Read which box imports which, and which boxes load torch or Ray as soon as they are imported."""
    paths = [*(REPOSITORY / "forgebook").rglob("*.py"), REPOSITORY / "helpers/__init__.py", REPOSITORY / "main.py"]
    trees = {module_of(path): ast.parse(path.read_text()) for path in sorted(paths)}
    modules = set(trees)
    graph: Graph = {}
    for module, tree in trees.items():
        here = room_of(module)
        if here:
            others = {room_of(name) for name in imports_of(tree, modules, deferred=True)} - {"", here}
            graph.setdefault(here, set()).update(others)
    at_import = {module: set(imports_of(tree, modules, deferred=False)) for module, tree in trees.items()}
    loads = {module: {name.split(".")[0] for name in reachable(at_import, module)} for module in modules}
    return graph, {room_of(module) for module in modules if loads[module] & HEAVY} - {""}


def reachable(graph: Graph, start: str) -> set[str]:
    """List all that can be reached from a node."""
    seen: set[str] = set()
    waiting = [*graph.get(start, ())]
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting += graph.get(node, ())
    return seen


def reduced(graph: Graph) -> Graph:
    """Leave out each arrow to what another arrow's path leads to."""
    return {
        node: {other for other in others if not any(other in reachable(graph, one) for one in others - {other})}
        for node, others in graph.items()
    }


def levels_of(graph: Graph) -> list[list[str]]:
    """Sort the boxes into levels: each stands above all that it imports. The first level imports nothing."""
    level: dict[str, int] = {}
    while len(level) < len(graph):
        ready = [node for node, others in graph.items() if node not in level and others <= level.keys()]
        if not ready:
            raise SystemExit(f"rooms import each other in a circle: {sorted(graph.keys() - level.keys())}")
        level |= {node: 1 + max((level[other] for other in graph[node]), default=-1) for node in ready}
    return [sorted(node for node in graph if level[node] == k) for k in range(max(level.values()) + 1)]


def centers(levels: list[list[str]]) -> dict[str, tuple[float, float]]:
    """Place the boxes: the first level at the bottom, each level in the middle of the page."""
    widest = max(map(len, levels))
    return {
        node: (
            (k + (widest - len(level)) / 2) * (WIDTH + GAP_X) + WIDTH / 2,
            (len(levels) - 1 - row) * (HEIGHT + GAP_Y),
        )
        for row, level in enumerate(levels)
        for k, node in enumerate(level)
    }


def clutter(arrows: Graph, place: dict[str, tuple[float, float]]) -> float:
    """Count what makes a picture hard to read: arrows that cross, arrows behind boxes; and their length."""
    lines = [(place[one], place[other]) for one, others in arrows.items() for other in others]
    length = sum(abs(start[0] - end[0]) for start, end in lines) / 1000
    crossings = behind = 0
    for (start, end), (begin, stop) in itertools.combinations(lines, 2):
        top, bottom = max(start[1], begin[1]), min(end[1], stop[1])
        if top < bottom:
            left, right = (
                (_x_at(start, end, y) - _x_at(begin, stop, y)) for y in (top + HEIGHT / 2, bottom - HEIGHT / 2)
            )
            crossings += left * right < 0
    for start, end in lines:
        for x, y in place.values():
            behind += start[1] < y < end[1] and abs(_x_at(start, end, y) - x) < WIDTH / 2 + 8
    return crossings + 3 * behind + length


def _x_at(start: tuple[float, float], end: tuple[float, float], y: float) -> float:
    return start[0] + (end[0] - start[0]) * (y - start[1]) / (end[1] - start[1])


def draw() -> str:
    """Return the picture as SVG."""
    graph, heavy = read_graph()
    arrows, levels = reduced(graph), levels_of(graph)
    orders = itertools.product(*(list(map(list, itertools.permutations(level))) for level in levels))
    place = min((centers(list(order)) for order in orders), key=lambda one: clutter(arrows, one))
    width = 2 * MARGIN + max(x for x, _ in place.values()) + WIDTH / 2
    legend = max(y for _, y in place.values()) + HEIGHT + 2 * MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {legend + 34:.0f}" '
        'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">',
        "<title>The rooms of forgebook/: an arrow leads from a room to one that it imports</title>",
        f'<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0L8 4L0 8z" fill="{LINE}"/></marker></defs>',
        f'<g transform="translate({MARGIN} {MARGIN})">',
    ]
    for one, others in sorted(arrows.items()):
        for other in sorted(others):
            path = route(place, one, other)
            parts.append(f'<path d="{path}" fill="none" stroke="{LINE}" stroke-width="1.6" marker-end="url(#tip)"/>')
    for node, (x, y) in sorted(place.items()):
        fill = ENTRY_FILL if node in ENTRIES else HEAVY_FILL if node in heavy else LIGHT_FILL
        parts += box(node, x - WIDTH / 2, y, fill)
    for k, (fill, text) in enumerate(
        [(LIGHT_FILL, "imports no torch or Ray"), (HEAVY_FILL, "imports torch or Ray"), (ENTRY_FILL, "entry")]
    ):
        x = k * 190
        parts.append(f'<rect x="{x}" y="{legend - 12:.0f}" width="14" height="14" rx="3" fill="{fill}"/>')
        parts.append(f'<text x="{x + 20}" y="{legend:.0f}" font-size="13" fill="{LINE}">{text}</text>')
    return "\n".join([*parts, "</g>", "</svg>"]) + "\n"


def route(place: dict[str, tuple[float, float]], one: str, other: str) -> str:
    """Lead an arrow from the bottom of a box to the top of another, past the boxes of the levels between."""
    (x, y), (to_x, to_y) = start, end = place[one], place[other]
    points = []
    for level in sorted({there for _, there in place.values() if y < there < to_y}):
        boxes = [at for at, there in place.values() if there == level]
        here = _x_at(start, end, level)
        free = [here, *(at + side * (WIDTH + GAP_X) / 2 for at in boxes for side in (-1, 1))]
        free = [at for at in free if all(abs(at - other) >= WIDTH / 2 + 10 for other in boxes)]
        points.append((min(free, key=lambda at: abs(at - here)), level))
    if points:  # leave and arrive on the side that is nearer to the way
        x = min(max(points[0][0], x - WIDTH / 2 + 20), x + WIDTH / 2 - 20)
        to_x = min(max(points[-1][0], to_x - WIDTH / 2 + 20), to_x + WIDTH / 2 - 20)
    stops = [(x, y + HEIGHT), *(stop for at, level in points for stop in ((at, level), (at, level + HEIGHT)))]
    path = f"M{x:.0f} {y + HEIGHT:.0f}"
    for (x, y), (next_x, next_y) in itertools.pairwise([*stops, (to_x, to_y - 2)]):
        bend = (next_y - y) / 2
        path += f"C{x:.0f} {y + bend:.0f} {next_x:.0f} {next_y - bend:.0f} {next_x:.0f} {next_y:.0f}"
    return path


def box(node: str, x: float, y: float, fill: str) -> list[str]:
    """Draw a box: the room's name and the first line of its docstring."""
    if node in ENTRIES:
        name, purpose = node, ENTRIES[node]
    else:
        init = ast.parse((REPOSITORY / "forgebook" / node / "__init__.py").read_text())
        name, purpose = f"{node}/", ast.get_docstring(init) or ""
    lines = textwrap.wrap(purpose.replace("->", "→").rstrip("."), 37)
    text = [f'<text x="{x + 10:.0f}" y="{y + 20:.0f}" font-size="15" font-weight="600" fill="#fff">{name}</text>']
    for k, line in enumerate(lines):
        text.append(
            f'<text x="{x + 10:.0f}" y="{y + 36 + 14 * k:.0f}" font-size="11" fill="#fff">{escape(line)}</text>'
        )
    return [f'<rect x="{x:.0f}" y="{y:.0f}" width="{WIDTH}" height="{HEIGHT}" rx="7" fill="{fill}"/>', *text]


if __name__ == "__main__":
    PICTURE.write_text(draw())
