"""A plan as people read it: tables, one sentence, JSON."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from forgebook.planning.plan import Plan

__all__ = ["as_json", "comparison", "in_short", "plan_rows", "price_rows", "verdict"]


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _dollars(amount: float) -> str:
    return f"${amount:,.2f}" if amount >= 0.1 else f"${amount:.2g}"


def plan_rows(told: Plan) -> list[list[str]]:
    """Lay a plan out as lines of a table: what, how much, and what of it."""
    need = told.memory
    share = told.trainable_parameters / told.parameters
    lines = [
        ["parameters", f"{told.parameters:,}", f"{told.trainable_parameters:,} trained ({share:.2%})"],
        ["batch", f"{told.micro_batch} x {told.longest_row:,} tokens", f"per device; context {told.context_length:,}"],
    ]
    for name, size in need.terms.items():
        lines.append([name, _gb(size), "the largest" if name == need.largest else ""])
    usable = f"of {_gb(told.capacity)} usable" if told.capacity else ""
    lines.append([f"memory per {_device(told)}", _gb(need.total), usable])
    lines.append(["memory per worker on the host", _gb(need.host), ""])
    if told.steps is not None:
        lines.append(["steps", f"{told.steps:,}", f"{told.tokens:,} tokens, {told.positions:,} with padding"])
        lines.append(["FLOPs", f"{told.flops:.3g}", f"{told.flops_per_token:.3g} per token, recomputing not counted"])
    lines.append(["disk", _gb(told.disk_bytes), f"{_gb(told.checkpoint_bytes)} per checkpoint"])
    lines.append(["vLLM can serve it", told.vllm.split(":")[0], told.vllm.partition(": ")[2]])
    return lines


def price_rows(told: Plan) -> list[list[str]]:
    """Lay time and cost out by GPU: name, whether it fits, time, cost of the run, cost per million tokens."""
    return [
        [
            f"{told.workers}x{one.gpu}", "yes" if one.fits else "no",
            "" if one.seconds is None else _duration(one.seconds), "" if one.cost is None else _dollars(one.cost),
            _dollars(one.cost_per_million_tokens),
        ]
        for one in told.costs
    ]  # fmt: skip


def in_short(told: Plan) -> str:
    """Tell a plan in one line: memory, time, cost, disk."""
    need = told.memory
    usable = f" of {_gb(told.capacity)}" if told.capacity else ""
    held = f"{_gb(need.total)}{usable} per {_device(told)}, most of it {need.largest}"
    if told.seconds is not None:
        cost = f", {_dollars(told.cost)}" if told.cost is not None else ""
        time = f"{_duration(told.seconds)} of steps{cost} {told.pace}"
    else:
        time = f"time unknown: {told.pace if told.cpu else 'no GPU of the catalog is named'}"
    return f"{held}; {time}; disk {_gb(told.disk_bytes)}"


def _device(told: Plan) -> str:
    return "GPU" if told.cpu is None else "worker"


def comparison(planned: dict[str, Any], measured: dict[str, Any]) -> str:
    """Set what was measured beside what was planned in one line; both as in summary.json."""
    told = f"planned {_gb(planned['memory_bytes_per_worker'])} per worker, measured "
    told += f"{_gb(measured['memory_bytes_per_worker'])}"
    if planned["step_seconds"] is not None:
        told += f"; planned {_duration(planned['step_seconds'])} of steps, took {_duration(measured['step_seconds'])}"
    told += f"; MFU {measured['mfu']:.0%}" if measured["mfu"] is not None else ""
    return told + (f"; {_dollars(measured['cost_usd'])}" if measured["cost_usd"] is not None else "")


def verdict(told: Plan) -> str:
    """Say in one sentence whether the run fits, and what would make it."""
    need = told.memory
    if told.fits is None:
        fitting = [one.gpu for one in told.costs if one.fits]
        return f"it needs {_gb(need.total)} per GPU: it fits {', '.join(fitting) or 'no GPU of the catalog'}"
    each = _device(told)
    where = f"{told.workers}x{told.gpu}" if told.cpu is None else f"this machine ({told.cpu})"
    if told.fits:
        return f"it fits {where}: {_gb(need.total)} of {_gb(told.capacity)} usable per {each}"
    short = (
        f"it does not fit {where}: {_gb(need.total)} per {each}, {_gb(told.capacity)} usable, most of it {need.largest}"
    )
    if not told.changes:
        return f"{short}; nothing that this plan knows makes it fit"
    return f"{short}; the cheapest change: {' '.join(told.changes)} ({_gb(told.changed_memory.total)})"


def as_json(told: Plan) -> dict[str, Any]:
    """Turn a plan into JSON values; the totals of its memory beside the terms."""
    values = dataclasses.asdict(told)
    for name in ("memory", "changed_memory"):
        if getattr(told, name) is not None:
            values[name] |= {"total": getattr(told, name).total, "largest": getattr(told, name).largest}
    return values | {"verdict": verdict(told)}
