"""A plan and the choices of --default as people read them: tables, one sentence, JSON."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from forgebook.planning.auto_config import Choice
    from forgebook.planning.plan import Plan

__all__ = [
    "choice_rows",
    "compare_with_plan",
    "format_bytes",
    "format_duration",
    "plan_as_json",
    "plan_rows",
    "plan_summary",
    "price_rows",
    "verdict",
]


def format_bytes(size: float) -> str:
    """Write bytes as GB, small ones as MB."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"


def format_duration(seconds: float) -> str:
    """Write seconds as s, min or h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _dollars(amount: float) -> str:
    return f"${amount:,.2f}" if amount >= 0.1 else f"${amount:.2g}"


def plan_rows(plan: Plan) -> list[list[str]]:
    """Lay a plan out as lines of a table: what, how much, and a remark."""
    need = plan.memory
    share = plan.trainable_parameters / plan.parameters
    lines = [
        ["parameters", f"{plan.parameters:,}", f"{plan.trainable_parameters:,} trained ({share:.2%})"],
        [
            "batch",
            f"{plan.micro_batch} x {plan.longest_sequence:,} tokens",
            f"per device; context {plan.context_length:,}",
        ],
    ]
    for name, size in need.terms.items():
        lines.append([name, format_bytes(size), "the largest" if name == need.largest else ""])
    usable = f"of {format_bytes(plan.capacity)} usable" if plan.capacity else ""
    lines.append([f"memory per {_device(plan)}", format_bytes(need.total), usable])
    if plan.cpu is None:
        lines.append(["memory per worker on the host", format_bytes(need.host), ""])
    if plan.steps is not None:
        lines.append(["steps", f"{plan.steps:,}", f"{plan.tokens:,} tokens, {plan.positions:,} with padding"])
        lines.append(["FLOPs", f"{plan.flops:.3g}", f"{plan.flops_per_token:.3g} per token, recomputation not counted"])
    lines.append(["disk", format_bytes(plan.disk_bytes), f"{format_bytes(plan.checkpoint_bytes)} per checkpoint"])
    lines.append(["vLLM can serve it", plan.vllm.split(":")[0], plan.vllm.partition(": ")[2]])
    return lines


def price_rows(plan: Plan) -> list[list[str]]:
    """Lay time and cost out by GPU: name, whether it fits, time, cost of the run, cost per million tokens."""
    return [
        [
            f"{plan.workers}x{one.gpu}",
            "yes" if one.fits else "no",
            "" if one.seconds is None else format_duration(one.seconds),
            "" if one.cost is None else _dollars(one.cost),
            "" if one.cost_per_million_tokens is None else _dollars(one.cost_per_million_tokens),
        ]
        for one in plan.costs
    ]


def plan_summary(plan: Plan) -> str:
    """Write a plan in one line: memory, disk, time, cost."""
    need = plan.memory
    usable = f" of {format_bytes(plan.capacity)}" if plan.capacity else ""
    memory = f"{format_bytes(need.total)}{usable} per {_device(plan)}, most of it {need.largest}"
    if plan.seconds is not None:
        cost = f", {_dollars(plan.cost)}" if plan.cost is not None else ""
        time = f"{format_duration(plan.seconds)} of steps{cost} {plan.assumption}"
    else:
        time = f"time unknown: {plan.assumption if plan.cpu else 'the config names no GPU of the catalog'}"
    return f"{memory}; disk {format_bytes(plan.disk_bytes)}; {time}"


def _device(plan: Plan) -> str:
    return "GPU" if plan.cpu is None else "worker"


def compare_with_plan(planned: dict[str, Any], measured: dict[str, Any]) -> str:
    """Write in one line what was planned and what was measured; both as in summary.json.

    Memory per worker is that of model, optimizer and activations; on a CPU, that of the whole process stands beside it.
    """
    memory = measured["memory_bytes_per_worker"]
    expected = format_bytes(planned["memory_bytes_per_worker"])
    parts = [
        f"memory per worker: planned {expected}, "
        + ("not measured" if memory is None else f"measured {format_bytes(memory)}")
    ]
    if (process := measured["process_bytes_per_worker"]) is not None:
        expected = format_bytes(planned["process_bytes_per_worker"])
        parts.append(f"process: planned {expected}, measured {format_bytes(process)}")
    if planned["step_seconds"] is not None:
        seconds = format_duration(planned["step_seconds"]), format_duration(measured["step_seconds"])
        parts.append("time of steps: planned {}, measured {}".format(*seconds))
    if measured["mfu"] is not None:
        parts.append(f"MFU {measured['mfu']:.0%}")
    if measured["cost_usd"] is not None:
        parts.append(_dollars(measured["cost_usd"]))
    return "; ".join(parts)


def verdict(plan: Plan) -> str:
    """Write in one sentence whether the run fits, and what would make it fit."""
    need = plan.memory
    if plan.fits is None or plan.capacity is None:
        fitting = [one.gpu for one in plan.costs if one.fits]
        return f"it needs {format_bytes(need.total)} per GPU: it fits {', '.join(fitting) or 'no GPU of the catalog'}"
    device = _device(plan)
    where = f"{plan.workers}x{plan.gpu}" if plan.cpu is None else f"this machine ({plan.cpu})"
    if plan.fits:
        return f"it fits {where}: {format_bytes(need.total)} of {format_bytes(plan.capacity)} usable per {device}"
    problem = (
        f"it does not fit {where}: {format_bytes(need.total)} per {device}, {format_bytes(plan.capacity)} usable, "
        f"most of it {need.largest}"
    )
    if plan.changed_memory is None:
        return f"{problem}; no change that the plan tries makes it fit"
    return f"{problem}; the cheapest change: {' '.join(plan.changes)} ({format_bytes(plan.changed_memory.total)})"


def plan_as_json(plan: Plan) -> dict[str, Any]:
    """Convert a plan to JSON values, with the totals of its memory next to the terms."""
    values = dataclasses.asdict(plan)
    for name, memory in (("memory", plan.memory), ("changed_memory", plan.changed_memory)):
        if memory is not None:
            values[name] |= {"total": memory.total, "largest": memory.largest}
    return values | {"verdict": verdict(plan)}


def choice_rows(choices: list[Choice]) -> list[list[str]]:
    """Lay choices out as lines of a table: key, value, reason."""
    return [[choice.key, _format_value(choice), choice.reason] for choice in choices]


def _format_value(choice: Choice) -> str:
    value = choice.value
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if choice.key == "deepspeed":
        return Path(value["config_path"]).stem
    if choice.key == "lora_config":
        return ", ".join(f"{name} {setting}" for name, setting in value.items())
    if choice.key == "generation_config.prompt_format":
        return value["user"].replace("\n", "\\n")
    if choice.key == "checkpoint_and_evaluation_frequency":
        return f"{value['frequency']} {value['unit']}"
    return f"{value:g}" if isinstance(value, float) else str(value)
