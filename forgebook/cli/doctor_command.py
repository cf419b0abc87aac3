"""The command that checks the machine and a config: doctor."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from forgebook.cli.arguments import load_noting_retired, parse_arguments

if TYPE_CHECKING:
    from rich.console import Console

    from forgebook.reporting.debugging import DebuggingStep
    from forgebook.reporting.doctor import Finding

__all__ = ["doctor_command"]


def doctor_command(arguments: list[str]) -> int:
    """Print what the machine has and what a config's model and data are; return 1 if something needs a fix."""
    parsed = parse_arguments("doctor", arguments)
    # A mistake in CONFIG is reported before torch is imported.
    config = load_noting_retired(parsed.target, parsed.rest, parsed.flags.default) if parsed.target else None
    from forgebook.reporting.doctor import config_findings, machine_findings

    findings = list(machine_findings(config))
    steps: list[DebuggingStep] = []
    if config is not None:
        about_config = list(config_findings(config))
        findings += about_config
        if not about_config[0].problem:  # the model is there
            from forgebook.reporting.debugging import debugging_steps

            steps = debugging_steps(config)
    if parsed.flags.json:
        print(json.dumps({"findings": list(map(asdict, findings)), "steps": list(map(asdict, steps))}, indent=2))
    else:
        from forgebook.reporting.console import make_console

        output = make_console()
        _print_findings(findings, output)
        if steps:
            _print_steps(steps, output)
    return int(any(finding.problem for finding in findings))


def _print_findings(findings: list[Finding], output: Console) -> None:
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        mark = "[red]x[/red]" if finding.problem else "[green]+[/green]"
        output.print(f"{mark} ", end="")
        output.print(f"{finding.name:<{width}}  {finding.text}", markup=False, highlight=False)
        if finding.problem:
            output.print(f"  {'':<{width}}  fix: {finding.problem}", style="red", markup=False, highlight=False)


def _print_steps(steps: list[DebuggingStep], output: Console) -> None:
    from forgebook.reporting.debugging import next_step

    following = next_step(steps)
    output.print("\nIf it does not learn, check in this order:", highlight=False)
    for k, step in enumerate(steps):
        state = "x" if step.problem else "+" if step.is_done and k < following else " "
        output.print(f"{state} {k + 1}. {step.title}", markup=False, highlight=False)
        if step.evidence:
            output.print(f"     {step.evidence}", markup=False, highlight=False)
        if step.problem:
            output.print(f"     {step.problem}", style="red", markup=False, highlight=False)
    output.print(
        f"next: step {following + 1}\n{steps[following].command}", markup=False, highlight=False, soft_wrap=True
    )
