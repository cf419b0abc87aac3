"""A room whose coverage falls below its floor is named; each room has a floor."""

import tomllib

from conftest import REPOSITORY
from coverage_floors import coverage_by_room, rooms_below
from test_rooms import FILES


def test_lines_and_branches_are_added_up_by_room():
    def file(statements, lines, branches, taken):
        summary = {"num_statements": statements, "covered_lines": lines}
        return {"summary": summary | {"num_branches": branches, "covered_branches": taken}}

    files = {
        "forgebook/data/masking.py": file(60, 60, 20, 10),
        "forgebook/data/tools.py": file(15, 10, 5, 0),
        "forgebook/errors.py": file(10, 10, 0, 0),
        "helpers/__init__.py": file(10, 0, 0, 0),
        "forgebook/data/__init__.py": file(0, 0, 0, 0),
    }
    assert coverage_by_room(files) == {"data": 80.0, "top": 50.0}


def test_a_room_below_its_floor_or_without_one_is_named():
    floors = {"config": 90, "data": 80, "runs": 10}
    assert rooms_below({"config": 89.9, "data": 80.0, "top": 50.0}, floors) == [
        "config: 89.9% is below its floor of 90%",
        "runs: 0.0% is below its floor of 10%",
        "top has no floor in pyproject.toml",
    ]


def test_every_room_has_a_floor():
    rooms = {path.parts[1] if len(path.parts) > 2 else "top" for path in FILES}
    floors = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["forgebook"]["coverage_floors"]
    assert floors.keys() == rooms
