"""2,000 damaged configs: each loads and can be planned, or is refused with a readable error; none hangs."""

import os
import random
import warnings

import pytest
import yaml

import support_fuzz as fuzz
from conftest import REPOSITORY
from forgebook.catalog import shape_of
from forgebook.config.parse import dump_config, load_config
from forgebook.config.rules import check_rules
from forgebook.config.unread_keys import unread_keys
from forgebook.planning.hardware import hardware_in
from forgebook.planning.plan import plan
from forgebook.planning.plan_report import plan_as_json, plan_rows, price_rows, verdict
from forgebook.planning.prepare import check_rows

INPUTS, SEED = 2000, int(os.environ.get("FUZZ_SEED", "14"))
FOLDERS = ("training_configs", "cookbooks", "end-to-end-examples")
SEEDS = sorted(path for folder in FOLDERS for path in (REPOSITORY / folder).rglob("*.yaml"))


def damaged(generator: random.Random) -> bytes:
    """Make one damaged config from one that is committed."""
    data = generator.choice(SEEDS).read_bytes()
    match generator.randrange(5):
        case 0:
            return fuzz.damage_bytes(data, generator)
        case 1 | 2:
            return fuzz.encode(fuzz.damage_tokens(data.decode(), generator))
        case _:
            value = fuzz.damage_values(yaml.safe_load(data), generator)
            return fuzz.encode(
                yaml.dump(value, allow_unicode=True, default_flow_style=generator.choice((None, True, False)))
            )


def use(path, default: bool) -> None:
    """Do what `python main.py CONFIG` and `plan CONFIG` do before anything that takes long."""
    config = load_config(path, default=default)
    check_rules(config, () if not default else {"task"})
    unread_keys(config)
    written = path.with_name("written.yaml")
    written.write_text(dump_config(config))
    load_config(written)
    if "://" not in str(config.train_path) + str(config.valid_path):
        check_rows(config)
    planned = plan(config, shape_of(config.model_id), hardware_in(config), None)
    assert plan_as_json(planned) and plan_rows(planned) and verdict(planned)
    price_rows(planned)


@pytest.mark.slow
def test_a_damaged_config_loads_or_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    generator, answers = random.Random(SEED), {}
    before = fuzz.peak_megabytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for k in range(INPUTS):
            path = tmp_path / "c.yaml"
            path.write_bytes(damaged(generator))
            answers[k] = fuzz.answer_to(lambda path=path, k=k: use(path, default=k % 4 == 0))
    counts, wrong = fuzz.report(answers)
    assert not wrong, "\n".join(wrong)
    assert counts["fine"] > INPUTS // 20 and counts["refused"] > INPUTS // 4
    assert fuzz.peak_megabytes() - before < fuzz.MEGABYTES
