"""What curate found, for people and programs: rows of a table, an object for JSON, and one self-contained page."""

from __future__ import annotations

import html
import json
from typing import Any

from forgebook.config.curation_blocks import REASONS
from forgebook.curation.checks import Finding, mask_personal_data
from forgebook.curation.curate import Curation
from forgebook.data.messages import texts_of
from forgebook.data.row_formats import Example

__all__ = ["as_json", "as_page", "figure_rows", "table_rows"]

LONGEST_TEXT = 1_200  # characters of a message on the page

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { text-align: left; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--line); }
td.n { text-align: right; font-variant-numeric: tabular-nums; }
article { border: 1px solid var(--line); border-radius: 6px; padding: .6rem .9rem; margin: .8rem 0; }
article header { color: GrayText; margin-bottom: .4rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .2rem 0; padding: .3rem .5rem; background: var(--soft); }
pre b { color: GrayText; font-weight: normal; display: block; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; }
summary { cursor: pointer; }
"""


def table_rows(curation: Curation) -> list[list[str]]:
    """Write a row for each reason: its count, its share, what was done, what it means."""
    rows = []
    for reason, count in _counts(curation).items():
        done = "dropped" if reason == "unusable" or reason in curation.drop else "reported"
        rows.append([reason, f"{count:,}", f"{count / _rows(curation):.1%}", done, REASONS[reason]])
    return rows


def figure_rows(report: dict[str, Any]) -> list[list[str]]:
    """Write a row for each figure of a judge."""
    return [[key.replace("_", " "), _figure(value)] for key, value in report.items() if key not in ("shown", "lists")]


def as_json(curation: Curation) -> dict[str, Any]:
    """Describe what was found. Personal data is masked."""
    return {
        "sources": curation.sources,
        "out": str(curation.out),
        "rows": _rows(curation),
        "written": curation.written,
        "dropped": _rows(curation) - curation.written,
        "reasons": {
            reason: {
                "count": count,
                "dropped": reason == "unusable" or reason in curation.drop,
                "examples": [_example_as_json(curation, finding) for finding in _shown(curation, reason)],
            }
            for reason, count in _counts(curation).items()
        },
        "unusable": [mask_personal_data(problem) for problem in curation.notes.problems[:100]],
        **{name: _judge_as_json(curation, report) for name, report in curation.judges.items()},
        "notes": curation.remarks,
    }


def as_page(curation: Curation) -> str:
    """Write the report as one HTML page that loads nothing from elsewhere. Personal data is masked."""
    table = "".join(
        f"<tr><td><a href='#{reason}'>{reason}</a></td><td class=n>{count}</td><td class=n>{share}</td><td>{done}</td>"
        f"<td>{html.escape(meaning)}</td></tr>"
        for reason, count, share, done, meaning in table_rows(curation)
    )
    sections = "".join(_section(curation, reason) for reason in _counts(curation))
    judged = "".join(_judge_section(curation, name, report) for name, report in curation.judges.items())
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in curation.remarks)
    title = html.escape(f"Curation of {curation.sources}")
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{_STYLE}</style>"
        f"<h1>{title}</h1><p>{_rows(curation):,} rows read, {curation.written:,} examples written to "
        f"<code>{html.escape(str(curation.out))}</code></p>{notes}"
        "<table><tr><th>reason<th>examples<th>share<th>done<th>meaning</tr>"
        f"{table}</table>{judged}{sections}</html>\n"
    )


def _rows(curation: Curation) -> int:
    return curation.read + len(curation.notes.problems)


def _counts(curation: Curation) -> dict[str, int]:
    """Count the examples of each reason, malformed rows first."""
    counts = {reason: len({one.number for one in found}) for reason, found in curation.by_reason().items()}
    return ({"unusable": len(curation.notes.problems)} if curation.notes.problems else {}) | counts


def _shown(curation: Curation, reason: str) -> list[Finding]:
    found = curation.by_reason().get(reason, [])
    return [one for one in found if one.number in curation.shown][: curation.examples_per_reason]


def _example_as_json(curation: Curation, finding: Finding) -> dict[str, Any]:
    example = curation.shown[finding.number]
    of = {} if finding.of is None else {"of": curation.shown[finding.of].where}
    texts = [[role, text] for role, text in _texts(example)]
    return {"where": example.where, "detail": mask_personal_data(finding.detail), **of, "texts": texts}


def _judge_as_json(curation: Curation, report: dict[str, Any]) -> dict[str, Any]:
    """Describe a judge's figures; the examples that it lists by their file:line."""
    figures = {key: value for key, value in report.items() if key not in ("shown", "lists")}
    lists = {
        title: [{"where": curation.shown[number].where, "detail": detail} for number, detail in entries]
        for title, entries in report.get("lists", {}).items()
    }
    return figures | lists


def _texts(example: Example) -> list[tuple[str, str]]:
    """List (role, text) of an example's messages, long ones cut in their middle, personal data masked."""
    if example.messages is None:
        return [("text", _limited(example.text or ""))]
    messages = [(str(message["role"]), message) for message in example.messages]
    messages += [("rejected", message) for message in (example.rejected or ())[-1:]]
    return [(role, _limited("\n".join(texts_of(message)))) for role, message in messages]


def _limited(text: str) -> str:
    text = mask_personal_data(text)  # first: a cut could leave half of a key
    half = LONGEST_TEXT // 2
    return text if len(text) <= LONGEST_TEXT else f"{text[:half]} … {text[-half:]}"


def _section(curation: Curation, reason: str) -> str:
    if reason == "unusable":
        problems = curation.notes.problems[: curation.examples_per_reason]
        lines = "".join(f"<pre>{html.escape(mask_personal_data(problem))}</pre>" for problem in problems)
        return f"<h2 id=unusable>unusable</h2>{lines}"
    cards = "".join(_card(curation, finding) for finding in _shown(curation, reason))
    return f"<h2 id={reason}>{reason}</h2><p>{html.escape(REASONS[reason])}</p>{cards}"


def _card(curation: Curation, finding: Finding) -> str:
    example = curation.shown[finding.number]
    body = f"<div>{_messages(example)}</div>"
    where = html.escape(example.where)
    if finding.of is not None:
        other = curation.shown[finding.of]
        where += f" repeats {html.escape(other.where)}"
        body = f"<div class=pair>{body}<div>{_messages(other)}</div></div>"
    detail = html.escape(mask_personal_data(finding.detail))
    return f"<article><header>{where}: {detail}</header>{body}</article>"


def _messages(example: Example) -> str:
    return "".join(f"<pre><b>{html.escape(role)}</b>{html.escape(text)}</pre>" for role, text in _texts(example))


def _judge_section(curation: Curation, name: str, report: dict[str, Any]) -> str:
    """Show the figures of a judge, and the examples that it names, such as those of the lowest loss."""
    rows = figure_rows(report)
    lines = "".join(f"<tr><td>{html.escape(key)}</td><td>{html.escape(value)}</td></tr>" for key, value in rows)
    lists = ""
    for title, entries in report.get("lists", {}).items():
        cards = "".join(
            f"<article><header>{html.escape(curation.shown[number].where)}: {html.escape(detail)}</header>"
            f"{_messages(curation.shown[number])}</article>"
            for number, detail in entries
        )
        lists += f"<details><summary>{html.escape(title)}</summary>{cards}</details>"
    return f"<h2>{html.escape(name.replace('_', ' '))}</h2><table>{lines}</table>{lists}"


def _figure(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return (
            ", ".join(map(_figure, value))
            if not any(isinstance(one, list) for one in value)
            else "\n".join(" / ".join(map(_figure, one)) for one in value)
        )
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
