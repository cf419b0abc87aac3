"""Compare coverage of each room, lines and branches, with its floor: `make coverage` runs it after the fast tests.

Rooms whose work happens in Ray's processes (launch, training in part) are covered further by the slow tests, which
are not measured here.
"""

import collections
import json
import sys
from pathlib import Path

# Percent. A floor follows what is reached, and only rises.
FLOORS: dict[str, int] = {}


def coverage_by_room(report: Path) -> dict[str, float]:
    """Read coverage.py's JSON report; return the percentage of lines and branches run, room by room."""
    reached, there = collections.Counter[str](), collections.Counter[str]()
    for name, file in json.loads(report.read_text())["files"].items():
        parts = Path(name).parts
        room = parts[1] if len(parts) == 3 else parts[0]
        summary = file["summary"]
        reached[room] += summary["covered_lines"] + summary["covered_branches"]
        there[room] += summary["num_statements"] + summary["num_branches"]
    return {room: 100 * reached[room] / there[room] for room in sorted(there)}


def main(report: str) -> int:
    """Print each room's coverage beside its floor; return 1 if one is below it."""
    shares = coverage_by_room(Path(report))
    for room, share in shares.items():
        below = "  below" if share < FLOORS.get(room, 0) else ""
        print(f"{room:<11}{share:6.1f}%   floor {FLOORS.get(room, 0)}%{below}")
    return int(any(share < FLOORS.get(room, 0) for room, share in shares.items()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
