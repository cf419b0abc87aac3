"""Several machines: two real Ray nodes in network namespaces train what one does, and survive what happens to nodes."""

import sys
from pathlib import Path

import pytest

from conftest import LORA, REPOSITORY, losses_of
from helpers.launch import fine_tune
from helpers.storage import Run, read_json
from support_nodes import Nodes, why_not

SECRET = "hf_told-to-workers-alone"


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    """Two nodes of two cores each. The second sees another, empty disk at nodes.hidden[2]."""
    if reason := why_not():
        pytest.skip(reason)
    nodes = Nodes(hidden={2: tmp_path_factory.mktemp("private")})
    try:
        nodes.up(2, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
        yield nodes
    finally:
        nodes.down()


def command(config) -> list[str]:
    """Write a config down and make the command that trains it on both nodes."""
    path = Path(config.storage_path).parent / f"{config.run_name}.yaml"
    return [sys.executable, str(REPOSITORY / "main.py"), str(path)]


@pytest.mark.slow
def test_two_nodes_train_what_one_does(nodes, make_config):
    """LoRA with ZeRO-2, a worker on each node: equal to one process; the secrets of the head reach both, and no log."""
    alone = fine_tune(make_config(run_name="alone", lora_config=LORA, num_epochs=2))
    config = make_config(
        run_name="both", lora_config=LORA, num_epochs=2, num_devices=2, train_batch_size_per_device=4,
        deepspeed="zero_2", address=nodes.address,
    )  # fmt: skip
    told = nodes.run(command(config), HF_TOKEN=SECRET, RAY_ADDRESS="")
    run = Run(Path(config.storage_path) / "both")
    assert losses_of(run) == pytest.approx(losses_of(alone), abs=1e-4) and len(losses_of(run)) == 6
    summary = read_json(run.summary)
    assert summary["workers"] == 2 and summary["zero_stage"] == 2
    assert SECRET not in told
    logs = [*run.logs.rglob("*"), *nodes.temporary.rglob("*.log"), *nodes.temporary.rglob("*.out"), run.config]
    assert len(logs) > 10 and not any(SECRET in path.read_text(errors="replace") for path in logs if path.is_file())
