"""Public tests of TRL, axolotl and PEFT, as inputs and expected values (peers.yaml), against ours.

Each case is right when ours has the peer's value, or, where it says why ours differs, our value and not the peer's.
The outcome is the table peers.md; `PYTHONPATH=.:tests python tests/oracles/test_peers.py` writes it anew.
"""

import collections
import copy
import functools
import itertools
import re
from pathlib import Path

import pytest
import yaml
from test_chat_templates import FAMILIES, plain, tokenizer_with

from forgebook.config.lora_block import lora_problems
from forgebook.data import batching, token_store, truncation
from forgebook.data.examples import read_examples
from forgebook.data.masking import encode_prompt
from forgebook.data.template_facts import template_facts
from forgebook.data.tokenize import EncodingOptions, encode_examples
from forgebook.errors import DataError, ModelError
from forgebook.models import adapters
from forgebook.models.template_settings import set_template_defaults

FOLDER = Path(__file__).parent
PEERS = yaml.safe_load((FOLDER / "peers.yaml").read_text("utf-8"))
TEMPLATES = FAMILIES | {one["family"]: one for one in PEERS["templates"]}
TABLE = FOLDER / "peers.md"


@functools.cache
def tokenizer_of(family: str):
    return tokenizer_with(TEMPLATES[family])


def end_of(family: str) -> str:
    return TEMPLATES[family].get("ends", [TEMPLATES[family]["eos"]])[0]


def cases_of(key: str) -> list:
    return [
        pytest.param(case, family, id=f"{number}-{case['test'].split()[-1]}-{family}")
        for number, case in enumerate(PEERS["cases"])
        if key in case
        for family in case.get("families", [None])
    ]


def assert_outcome(case: dict, value: dict) -> None:
    """Assert that a case has the peer's value, or ours where that differs."""
    wrong = {key: value.get(key) for key in case["expect"] if not holds(key, case["expect"][key], value)}
    if "differs" not in case:
        assert not wrong, f"expected {case['expect']}, got {wrong}, of {value}"
        return
    assert wrong, f"ours no longer differs: {case['differs']}"
    ours = {key: value.get(key) for key in case["ours"] if not holds(key, case["ours"][key], value)}
    assert not ours, f"ours was {case['ours']}, got {ours}, of {value}"


def holds(key: str, expected, value: dict) -> bool:
    text = value.get("text", "")
    if key == "refused":
        return expected in value.get("refused", "")
    if key == "shows":
        return "refused" not in value and all(part in text for part in expected)
    if key == "hides":
        return "refused" not in value and not any(part in text for part in expected)
    if key == "shows_in_loss":
        return all(part in "".join(value["supervised"]) for part in expected)
    return key in value and value[key] == expected


# Rows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "family"), cases_of("row"))
def test_a_row_is_trained_as_the_peer_expects(case, family, write_rows, tmp_path):
    end = end_of(family)
    case = {key: _with_end(value, end) for key, value in case.items()}
    tokenizer = tokenizer_of(family)
    if case.get("settings"):
        tokenizer = tokenizer_with(TEMPLATES[family])
        set_template_defaults(tokenizer, case["settings"])
    path = write_rows([case["row"]])
    if case.get("parquet"):
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = str(tmp_path / "rows.parquet")
        pq.write_table(pa.Table.from_pylist([case["row"]]), path)
    assert_outcome(case, observe(path, tokenizer, end, case))


def observe(path: str, tokenizer, end: str, case: dict) -> dict:
    """Read, render and encode the row of a file.

    text, supervised:  the example as text, and each stretch of it that is in the loss; rejected: those of the other
                       answer of a pair. texts: how often it is encoded. regions: the number of stretches in the loss,
                       ends: of ends of turns.
    prompt:            what the model reads before the last answer.
    is_plain, prompt_is_plain: whether the text, and the prompt, are what transformers renders.
    messages, rejected_messages: what is read. refused: the error.
    """
    task = case.get("task", "instruction_tuning")
    options = EncodingOptions(task=task, rewritten_turns=case.get("rewritten_turns", "refuse"))
    try:
        [example] = read_examples(path, task)
    except DataError as error:
        return {"refused": str(error)}
    [encoded] = encode_examples([example], tokenizer, options)
    if isinstance(encoded, DataError):
        return {"refused": str(encoded)}
    of_pair = task == "preference_tuning"
    texts = encoded[:1] if of_pair else encoded
    value = {
        "text": tokenizer.decode(texts[0].input_ids),
        "supervised": [part for one in texts for part in _supervised(one, tokenizer)],
        "rejected": _supervised(encoded[1], tokenizer) if of_pair else None,
        "texts": len(texts),
        "first_in_loss": texts[0].loss_mask[0],
        "last_in_loss": texts[0].loss_mask[-1],
        "ends": sum(token == tokenizer.convert_tokens_to_ids(end) for token in texts[0].input_ids),
    }
    value["regions"] = len(value["supervised"])
    if example.messages is not None:
        asked, tools = example.messages[:-1], example.tools
        value["prompt"] = tokenizer.decode(encode_prompt(asked, tokenizer, tools=tools))
        value["is_plain"] = value["text"] == plain(tokenizer, example.messages, tools, False)
        value["prompt_is_plain"] = value["prompt"] == plain(tokenizer, asked, tools, True)
        value["messages"], value["rejected_messages"] = example.messages, example.rejected
    return value


def _supervised(encoded, tokenizer) -> list[str]:
    pairs = zip(encoded.input_ids, encoded.loss_mask, strict=True)
    runs = itertools.groupby(pairs, key=lambda pair: pair[1])
    return [tokenizer.decode([token for token, _ in run]) for in_loss, run in runs if in_loss]


def _with_end(value, end: str):
    if isinstance(value, str):
        return value.replace("EOT", end)
    if isinstance(value, dict):
        return {key: _with_end(item, end) for key, item in value.items()}
    return [_with_end(item, end) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize(
    ("case", "family"),
    [one for one in cases_of("test") if "native_tools" in one.values[0]["expect"]],
)
def test_a_template_shows_tools_as_the_peer_expects(case, family):
    tokenizer = tokenizer_of(family)
    # Calls without a list of tools: TRL asks whether the template shows a call and its result.
    calls = template_facts(tokenizer, tokenizer.chat_template, False).calls
    assert_outcome(case, {"native_tools": calls is not None})


# Batches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "family"), cases_of("batch"))
def test_a_batch_has_the_targets_that_the_peer_expects(case, family):
    """A peer's label is of its own position, ours of the next: what is compared is what predicts what."""
    tokens = token_store.Tokens.from_examples([(ids, list(map(bool, mask))) for ids, mask in case["batch"]])
    packed = case.get("packed", False)
    sequences = [list(range(len(tokens)))] if packed else [[k] for k in range(len(tokens))]
    batch = batching.collate(tokens, sequences, case.get("pad", 0), packed=packed)
    targets, positions = [], []
    for line, labels in enumerate(batch["labels"].tolist()):
        ids = batch["input_ids"][line].tolist()
        places = batch["position_ids"][line].tolist() if packed else list(range(len(ids)))
        for k, label in enumerate(labels):
            if label != -100:
                targets.append([ids[k - places[k] : k + 1], label])
                positions.append(places[k])
    assert_outcome(case, {"targets": targets, "lines": len(batch["labels"]), "positions": positions})


@pytest.mark.parametrize(("case", "family"), cases_of("cut"))
def test_lengths_are_cut_and_packed_as_the_peer_expects(case, family):
    tokens = token_store.Tokens.from_examples([(ids, [True] * len(ids)) for ids in case["cut"]])
    fitted = truncation.fit_tokens(tokens, case["to"], "right").tokens
    packs = batching.pack(fitted.lengths, case["to"])
    examples = [fitted.example(k)[0].tolist() for k in range(len(fitted))]
    value = {"cut": examples, "packs": [[i for k in pack for i in examples[k]] for pack in packs]}
    assert_outcome(case, value)


# Adapters -----------------------------------------------------------------------------------------------------


@functools.cache
def base_model(kind: str):
    import torch
    from transformers import AutoModelForCausalLM, GptOssConfig, LlamaConfig

    from support_models import TEXT

    torch.manual_seed(0)
    config = (
        GptOssConfig(**TEXT, num_local_experts=4, num_experts_per_tok=2) if kind == "gpt-oss" else LlamaConfig(**TEXT)
    )
    return AutoModelForCausalLM.from_config(config).eval()


def adapted(kind: str, lora: dict):
    import torch

    from forgebook.models.adapters import add_lora

    torch.manual_seed(1)
    return add_lora(copy.deepcopy(base_model(kind)), lora).eval()


def logits(model):
    import torch

    with torch.no_grad():
        return model(input_ids=torch.arange(3, 23).view(2, 10)).logits


@pytest.mark.parametrize(("case", "family"), cases_of("lora"))
def test_an_adapter_is_as_the_peer_expects(case, family, tmp_path):
    assert_outcome(case, observe_adapter(case, tmp_path))


def observe_adapter(case: dict, folder: Path) -> dict:
    """Add an adapter; save and load what changes its base.

    same_output: the model answers as its base. saved_...: of the adapter as it is saved, on the unchanged base.
    equal: another lora_config with the same weights answers alike.
    """
    import torch
    from peft.tuners.lora import LoraLayer

    kind, lora = case.get("model", "llama"), case["lora"]
    if problems := lora_problems(lora):
        return {"refused": "; ".join(problems)}
    try:
        model = adapted(kind, lora)
    except ModelError as error:
        return {"refused": str(error)}
    base = logits(base_model(kind))
    layers = {name.rsplit(".", 1)[-1]: one for name, one in model.named_modules() if isinstance(one, LoraLayer)}
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    value = {
        "same_output": torch.allclose(logits(model), base, atol=1e-5),
        "b_is_zero": all(not p.any() for name, p in model.named_parameters() if "lora_B." in name),
        "trainable": sorted({name.split(".lora_")[0].rsplit(".", 1)[-1] for name in trained}),
        "scaling": {name: round(layer.scaling["default"], 6) for name, layer in layers.items()},
        "ranks": {name: layer.r["default"] for name, layer in layers.items()},
        "scaling_of_layers": [m.scaling["default"] for m in model.modules() if isinstance(m, LoraLayer)],
    }
    if "equals" in case:
        return value | {"equal": _answers_alike(model, adapted(kind, case["equals"]))}
    if any(key in case["expect"] for key in ("gradient_of_magnitudes", "all_have_gradients")):
        model(input_ids=torch.arange(3, 23).view(2, 10)).logits.pow(2).sum().backward()
        gradients = {name: p.grad is not None for name, p in model.named_parameters() if p.requires_grad}
        magnitudes = [has for name, has in gradients.items() if "magnitude" in name]
        value |= {
            "all_have_gradients": all(gradients.values()),
            "gradient_of_magnitudes": any(magnitudes) and all(magnitudes),
        }
    if str(lora.get("init_lora_weights")).startswith("pissa"):
        value |= _saved(model, kind, folder)
    return value


def _answers_alike(model, other) -> bool:
    import torch

    weights = {name: p for name, p in model.named_parameters() if ".lora_" in name}
    with torch.no_grad():
        for name, p in other.named_parameters():
            if ".lora_" in name:
                p.copy_(torch.randn_like(p))
                weights[name].copy_(p)
    return torch.allclose(logits(model), logits(other), atol=1e-5)


def _saved(model, kind: str, folder: Path) -> dict:
    """Move an adapter from its start, save it as a run does, and load it on the unchanged base."""
    import torch
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    from forgebook.training.checkpoints import save_checkpoint

    start = adapters.start_of(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B." in name:
                p.mul_(2)
    moved = logits(model)
    save_checkpoint(model, tokenizer_of("Llama 3"), folder / "checkpoint", start=start)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base_model(kind)), folder / "checkpoint").eval()
    layers = {name.rsplit(".", 1)[-1]: one for name, one in loaded.named_modules() if isinstance(one, LoraLayer)}
    return {
        "saved_same_output": torch.allclose(logits(loaded), moved, atol=1e-4),
        "saved_ranks": {name: layer.r["default"] for name, layer in layers.items()},
        "saved_scaling": {name: round(layer.scaling["default"], 6) for name, layer in layers.items()},
    }


# The table ----------------------------------------------------------------------------------------------------


def table() -> str:
    tests, cases = collections.defaultdict(set), collections.defaultdict(list)
    for case in PEERS["cases"]:
        name, test = case["test"].split()
        tests[name].add(test)
        cases[name].append(case)
    rows = []
    for name, file in PEERS["files"].items():
        differ = sum("differs" in case for case in cases[name])
        rows.append(
            (file["of"], file["tests"], len(tests[name]), sum(file.get("elsewhere", {}).values()),
             sum(file.get("not_here", {}).values()), len(cases[name]), len(cases[name]) - differ, differ)
        )  # fmt: skip
    totals = [sum(row[k] for row in rows) for k in range(1, 8)]
    lines = [INTRODUCTION, "| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in [*rows, ("all", *totals)]]
    lines += ["", "## Where ours differs on purpose", ""]
    reasons = collections.defaultdict(list)
    for case in PEERS["cases"]:
        if "differs" in case:
            reasons[case["differs"]].append(case["test"].replace(" ", " `") + "`")
    lines += [f"- {reason.strip()} ({', '.join(dict.fromkeys(names))})" for reason, names in reasons.items()]
    lines += ["", "## What has no counterpart here", ""]
    for name, file in PEERS["files"].items():
        if "not_here" in file:
            lines.append(f"- {name}: " + "; ".join(f"{what} ({count})" for what, count in file["not_here"].items()))
    return "\n".join([*lines, "", FAULTS])


COLUMNS = ("file", "tests read", "with cases", "held by a test of ours", "no counterpart", "cases", "agree", "differ")
INTRODUCTION = """# Peers' own tests

Public tests of TRL, axolotl and PEFT, as inputs and expected values (peers.yaml), against ours. Written by
test_peers.py, which also checks each case; one case may run on several chat templates. Files are named from the
projects' tests/.
"""
FAULTS = """## Faults of ours that the comparison found, all fixed

- Earlier answers inside the `prompt` of a prompt/completion row were in the loss (TRL's completion_only_loss).
- A row with `label: false`, an answer to avoid, was trained as one to follow (TRL, axolotl: unpaired preference).
- `train_detail`, which takes parts of a turn out of the loss, was ignored (axolotl).
- Null arguments that one schema for all calls fills in were trained, where the rows came from JSON (axolotl).
- A thought that a message has was accepted after a generation prompt that closes it, where a call follows.
- Calls of DeepSeek V3 and V3.1 in rows without a list of tools were written as text, though the templates show them
  (TRL).
- The role `ai` was unknown (axolotl).
"""


def test_the_table_is_that_of_the_cases():
    assert TABLE.read_text("utf-8") == table()


@pytest.mark.parametrize("name", PEERS["files"])
def test_every_test_that_was_read_is_accounted_for(name):
    file = PEERS["files"][name]
    tests = {case["test"].split()[1] for case in PEERS["cases"] if case["test"].split()[0] == name}
    others = sum([*file.get("elsewhere", {}).values(), *file.get("not_here", {}).values()])
    assert len(tests) + others == file["tests"]
    for held in file.get("elsewhere", {}):
        path, test = held.split("::")
        assert re.search(rf"^def {test}\(", (FOLDER.parent.parent / path).read_text("utf-8"), re.MULTILINE)


def test_cases_are_complete():
    known = "test families row task settings rewritten_turns parquet batch packed pad cut to lora equals model".split()
    for case in PEERS["cases"]:
        assert case.keys() <= {*known, "expect", "ours", "differs"} and ("ours" in case) == ("differs" in case), case
    assert len(PEERS["cases"]) >= 60 and {case["test"].split()[0] for case in PEERS["cases"]} <= PEERS["files"].keys()


if __name__ == "__main__":
    TABLE.write_text(table(), encoding="utf-8")
