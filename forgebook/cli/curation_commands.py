"""The commands that make better data before training: curate and synthesize.

Each takes its arguments and returns an exit code; each imports what it needs when it is called.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from forgebook.cli.arguments import Arguments, load_noting_retired, parse_arguments
from forgebook.errors import ConfigError

if TYPE_CHECKING:
    from forgebook.config.schema import FinetuneConfig
    from forgebook.curation.curate import Judge, OnProgress

__all__ = ["curate_command", "synthesize_command"]


def curate_command(arguments: list[str]) -> int:
    """Write a filtered data set, and a report of what was found."""
    parsed = parse_arguments("curate", arguments)
    shorthand = {"judge": "critic.model", "base_url": "critic.base_url"}
    config, out = _load(parsed, "curation", shorthand), _out("curate", parsed)
    from forgebook.curation.curate import curate, dropped_path, report_paths
    from forgebook.curation.report import as_json, as_page, figure_rows, table_rows
    from forgebook.reporting.console import make_console, make_table, progress_bar
    from forgebook.runs.atomic import atomic_file, write_json

    output = make_console()
    with progress_bar(output, "curating") as show:
        curation = curate(config, out, _judges(config, parsed.options.get("run"), show), show)
    json_path, page_path = report_paths(out)
    write_json(json_path, as_json(curation))
    with atomic_file(page_path) as temporary:
        temporary.write_text(as_page(curation), encoding="utf-8")
    columns = ["reason", "examples", "share", "", "meaning"]
    if rows := table_rows(curation):
        output.print(make_table(f"Curation of {curation.sources}", columns, rows))
    else:
        output.print(f"nothing found in {curation.sources}", markup=False)
    for name, report in curation.judges.items():
        output.print(make_table(name.replace("_", " ").capitalize(), ["", ""], figure_rows(report)))
    for remark in curation.remarks:
        output.print(f"note: {remark}", markup=False)
    output.print(f"{curation.written:,} of {curation.read:,} examples written to {out}", markup=False)
    output.print(f"left out, with the reasons: {dropped_path(out)}; report: {page_path}, {json_path}", markup=False)
    return 0


def synthesize_command(arguments: list[str]) -> int:
    """Write new examples that a teacher makes."""
    parsed = parse_arguments("synthesize", arguments)
    shorthand = {"teacher": "teacher.model", "base_url": "teacher.base_url", "count": "count"}
    config, out = _load(parsed, "synthesis", shorthand), _out("synthesize", parsed)
    from forgebook.curation.report import figure_rows
    from forgebook.curation.synthesize import rejected_path, synthesize
    from forgebook.reporting.console import make_console, make_table, progress_bar

    output = make_console()
    with progress_bar(output, "synthesizing") as show:
        synthesis = synthesize(config, out, show)
    output.print(make_table(f"Synthesis with {synthesis.usage['model']}", ["", ""], figure_rows(synthesis.as_json())))
    if synthesis.accepted < synthesis.wanted:
        output.print(f"note: {synthesis.accepted} of {synthesis.wanted} examples: the requests were used up")
    output.print(f"rejected, with the reasons: {rejected_path(out)}", markup=False)
    return 0


def _load(parsed: Arguments, block: str, shorthand: dict[str, str]) -> FinetuneConfig:
    """Load the config. shorthand: options that stand for keys of a block."""
    more = [
        f"{block}.{key}={json.dumps(parsed.options[name])}" for name, key in shorthand.items() if name in parsed.options
    ]
    return load_noting_retired(parsed.target, [*parsed.rest, *more], default=False)


def _judges(config: FinetuneConfig, run: str | None, on_progress: OnProgress) -> dict[str, Judge]:
    """Make what looks at the examples that are left."""
    judges = {}
    if run is not None:
        from forgebook.curation.label_noise import make_loss_judge
        from forgebook.inference.loading import find_model

        judges["label_noise"] = make_loss_judge(find_model(run), config, on_progress)
    if config.curation is not None and config.curation.critic is not None:
        from forgebook.config.blocks import labels_of
        from forgebook.curation.critic import make_critic

        labels = labels_of(config.classifier_config)
        judges["critic"] = make_critic(config.curation.critic, config.task or "instruction_tuning", labels, on_progress)
    return judges


def _out(name: str, parsed: Arguments):
    """Return the path of the file to write."""
    from pathlib import Path

    if "out" not in parsed.options:
        raise ConfigError(f"{name} needs a file to write: out=FILE.jsonl")
    return Path(parsed.options["out"])
