"""Words are read by one table of commands: targets, overrides, typed options; mistakes name the word and the fix."""

import pytest

from forgebook.cli.main import RUNNERS
from forgebook.cli.options import COMMANDS, load_noting_retired, parse_words
from forgebook.errors import ConfigError


def test_a_config_command_parts_its_own_options_from_overrides():
    words = parse_words("plan", ["c.yaml", "mfu=0.5", "learning_rate=1e-4", "fit=true", "--json", "seed=3"])
    assert words.target == "c.yaml" and words.rest == ["learning_rate=1e-4", "seed=3"]
    assert words.options == {"mfu": 0.5, "fit": True} and words.flags.json and not words.flags.default


def test_options_that_are_left_out_have_their_default_or_no_value():
    words = parse_words("serve", ["one", "two", "port=0"])
    assert (words.target, words.rest) == ("one", ["two"])
    assert words.options == {"port": 0, "host": "127.0.0.1", "engine": "auto"}
    assert words.get("port", "dtype") == {"port": 0}


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("plan", ["c.yaml", "mfu=1.5"], "plan: mfu must be a share, above 0 and at most 1, got '1.5'"),
        ("plan", ["c.yaml", "mfu=half"], "plan: mfu must be a share"),
        ("plan", ["c.yaml", "fit=yes"], "plan: fit must be true or false, got 'yes'"),
        ("plan", ["mfu=0.4"], "plan needs a CONFIG"),
        ("preview", ["c.yaml", "n=0"], "preview: n must be a whole number, 1 or more, got '0'"),
        ("serve", ["run", "port=99999"], "serve: port must be a whole number, 0 or more, up to 65535"),
        ("serve", ["run", "dtype=int8"], "serve: dtype must be one of float32, bfloat16, float16, got 'int8'"),
        ("generate", ["run", "top_p=most"], "generate: top_p must be a number, got 'most'"),
        ("generate", ["run", "seed=1.5"], "generate: seed must be a whole number, got '1.5'"),
        ("evaluate", ["run", "row=3"], "evaluate: unknown option row: did you mean 'rows'?"),
        ("merge", ["run"], "merge needs OUT: a folder that does not exist yet"),
        ("merge", ["run", "out", "twice"], "merge: 'twice' is one word too many"),
        ("evaluate", [], "evaluate needs a RUN"),
    ],
)
def test_a_mistake_names_the_word_and_what_it_must_be(name, arguments, message):
    extra = ["OUT: a folder that does not exist yet"] if name == "merge" else []
    with pytest.raises(ConfigError) as error:
        parse_words(name, arguments, extra=extra)
    assert message in str(error.value)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_lists_every_option_of_a_command(name, capsys):
    arguments = ["storage", "--help"] if name == "models" else ["--help"]
    with pytest.raises(SystemExit) as ended:
        parse_words(name, arguments)
    text = capsys.readouterr().out
    assert ended.value.code == 0 and all(f"\n  {option.name}= " in text for option in COMMANDS[name].options)
    assert all(len(line) <= 140 for line in text.splitlines())


def test_every_command_is_in_the_table_and_runs():
    assert set(COMMANDS) == {*RUNNERS, ""}


def test_retired_keys_are_noted_on_the_error_stream(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("model_id: tiny\ntrain_path: x.jsonl\nno_gradient_checkpoint: true\n")
    config = load_noting_retired(str(tmp_path / "c.yaml"), ["num_epochs=2"], False)
    assert config.num_epochs == 2 and not config.gradient_checkpointing
    assert capsys.readouterr().err.startswith("note: ")
