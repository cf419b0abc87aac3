"""The table of commands: each has code that runs it, and help that lists its options."""

import pytest

from forgebook.cli.arguments import parse_arguments
from forgebook.cli.main import RUNNERS
from forgebook.cli.options import COMMANDS


def test_every_command_is_in_the_table_and_runs():
    assert set(COMMANDS) == {*RUNNERS, ""}


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_lists_every_option_of_a_command(name, capsys):
    arguments = ["storage", "--help"] if name == "models" else ["--help"]
    with pytest.raises(SystemExit) as ended:
        parse_arguments(name, arguments)
    text = capsys.readouterr().out
    assert ended.value.code == 0 and all(f"\n  {option.name}= " in text for option in COMMANDS[name].options)
    assert all(len(line) <= 140 for line in text.splitlines())
