"""The coverage of each room, and the floors below which it must not fall: `make coverage`, `make coverage-floors`.

pytest-cov measures (.coverage); this compares what was measured last with [tool.forgebook.coverage_floors] of
pyproject.toml. Exit code 1 if a room is below its floor or has none.
"""

import json
import sys
import tempfile
import tomllib
from collections import Counter
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


def coverage_by_room(files: dict[str, dict]) -> dict[str, float]:
    """Compute the percentage of lines and branches that ran. files: of coverage's JSON report."""
    total: Counter[str] = Counter()
    covered: Counter[str] = Counter()
    for name, file in files.items():
        parts, summary = Path(name).parts, file["summary"]
        room = parts[1] if parts[0] == "forgebook" and len(parts) > 2 else "top"
        total[room] += summary["num_statements"] + summary["num_branches"]
        covered[room] += summary["covered_lines"] + summary["covered_branches"]
    return {room: 100 * covered[room] / count for room, count in sorted(total.items()) if count}


def rooms_below(measured: dict[str, float], floors: dict[str, float]) -> list[str]:
    """List what is wrong with each room that is below its floor, has no floor, or was not measured."""
    problems = [
        f"{room}: {measured.get(room, 0):.1f}% is below its floor of {floor}%"
        for room, floor in floors.items()
        if measured.get(room, 0) < floor
    ]
    return problems + [f"{room} has no floor in pyproject.toml" for room in measured if room not in floors]


def main() -> int:
    """Print the rooms with their floors; return 1 if one is below."""
    import coverage

    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "coverage.json"
        measurement = coverage.Coverage(config_file=str(REPOSITORY / "pyproject.toml"))
        measurement.load()
        measurement.json_report(outfile=str(report))
        measured = coverage_by_room(json.loads(report.read_text())["files"])
    floors = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["forgebook"]["coverage_floors"]
    for room, percent in measured.items():
        print(f"{room:<12}{percent:6.1f}%   floor {floors.get(room, 'missing')}")
    problems = rooms_below(measured, floors)
    print("\n".join(problems), file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
