"""Arguments are parsed by the table of commands: targets, overrides, typed options; a mistake is named with its fix."""

import pytest

from forgebook.cli.arguments import load_noting_retired, parse_arguments
from forgebook.errors import ConfigError


def test_a_config_commands_options_are_separated_from_overrides():
    parsed = parse_arguments("plan", ["c.yaml", "mfu=0.5", "learning_rate=1e-4", "fit=true", "--json", "seed=3"])
    assert parsed.target == "c.yaml" and parsed.rest == ["learning_rate=1e-4", "seed=3"]
    assert parsed.options == {"mfu": 0.5, "fit": True} and parsed.flags.json and not parsed.flags.default


def test_options_left_out_have_their_default_or_no_value():
    parsed = parse_arguments("serve", ["one", "two", "port=0"])
    assert (parsed.target, parsed.rest) == ("one", ["two"])
    assert parsed.options == {"port": 0, "host": "127.0.0.1", "engine": "auto"}
    assert parsed.get("port", "dtype") == {"port": 0}


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
        ("merge", ["run", "out", "twice"], "merge: 'twice' is one argument too many"),
        ("evaluate", [], "evaluate needs a RUN"),
    ],
)
def test_a_mistake_names_the_argument_and_what_it_must_be(name, arguments, message):
    extra = ["OUT: a folder that does not exist yet"] if name == "merge" else []
    with pytest.raises(ConfigError) as error:
        parse_arguments(name, arguments, extra=extra)
    assert message in str(error.value)


def test_retired_keys_are_noted_on_the_error_stream(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("model_id: tiny\ntrain_path: x.jsonl\nno_gradient_checkpoint: true\n")
    config = load_noting_retired(str(tmp_path / "c.yaml"), ["num_epochs=2"], False)
    assert config.num_epochs == 2 and not config.gradient_checkpointing
    assert capsys.readouterr().err.startswith("note: ")
