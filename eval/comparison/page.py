"""A comparison as one HTML file: no script, no request, readable in light and dark, at a desk and on a phone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.comparison.frontier import Frontier, Point, interval_of, root
from eval.comparison.markup import Markup, el, joined, table
from eval.comparison.page_style import STYLE
from eval.comparison.page_tasks import anchor, forced_mark, task_section
from eval.comparison.paired import LEVEL
from eval.comparison.plots import Mark, PlotRow, Spot, dot_plot, scatter
from eval.comparison.plots import Path as Line
from eval.comparison.tree import Comparison, TaskComparison
from eval.comparison.wording import FORCED, PERCENT, metric_text, p_text, spread_text
from prefopt.errors import DataError
from prefopt.storage.cache import atomic_write

# Nothing may be fetched or run, whatever an answer holds: escaping is the first wall, this is the second.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def write_page(comparison: Comparison, path: Path) -> None:
    """Writes the page, whole or not at all. Raises: DataError if it cannot be written."""
    try:
        with atomic_write(path) as temporary:
            temporary.write_text(page(comparison), encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror or error}") from error


def page(comparison: Comparison) -> str:
    """The page's HTML."""
    title = " · ".join(output.name for output in comparison.outputs)
    sections = [task_section(task, index) for index, task in enumerate(comparison.tasks)]
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        el("title", f"Comparison: {title}"),
        el("style", Markup(STYLE)),
    )
    main = el(
        "main",
        _header(comparison),
        _forced(comparison),
        _forest(comparison),
        *sections,
        _frontier(comparison.frontier),
        _provenance(comparison),
        _remarks(comparison),
    )
    return f"<!doctype html>\n{el('html', head, el('body', main), lang='en')}\n"


def _header(comparison: Comparison) -> Markup:
    names = [output.name for output in comparison.outputs]
    links = [
        el("a", task.name, href=f"#{anchor(index)}") for index, task in enumerate(comparison.tasks)
    ]
    links += [el("a", "frontier", href="#frontier")] if comparison.frontier else []
    links.append(el("a", "what it was made with", href="#made"))
    models = [
        el("li", el("b", output.name), f": {_model(output.head)}") for output in comparison.outputs
    ]
    mark = el("span", "forced", class_="forced") if comparison.forced else ""
    return el(
        "header",
        el("h1", f"{', '.join(names[1:])} against {names[0]} ", mark),
        el("ul", *models),
        el("nav", *(joined([link, " "]) for link in links)),
    )


def _model(head: Mapping[str, Any]) -> str:
    model = head.get("model") or {}
    adapters = f" with {', '.join(model['adapters'])}" if model.get("adapters") else ""
    return f"{model.get('path', 'model unknown')}{adapters}"


def _forced(comparison: Comparison) -> Markup:
    if not comparison.forced:
        return Markup()
    items = [el("li", str(mismatch)) for mismatch in comparison.forced]
    return el("div", el("b", FORCED), el("ul", *items), class_="forced", role="alert")


def _forest(comparison: Comparison) -> Markup:
    """All paired differences, those of one unit on one axis; filled where Holm's p is below 0.05."""
    plots = []
    for unit in dict.fromkeys(task.unit for task in comparison.tasks):
        rows = [row for task in comparison.tasks if task.unit == unit for row in _forest_rows(task)]
        if rows:
            plots.append(dot_plot(rows, title=f"Second − first, in {unit}", zero=True))
    words = (
        f"Paired by example, {PERCENT} bootstrap intervals ({comparison.resamples:,} resamples, seed "
        f"{comparison.seed}). A filled dot: p < {1 - LEVEL:.2g} after Holm's correction for all "
        f"{sum(len(task.pairs) for task in comparison.tasks)} differences here. Intervals are not corrected."
    )
    if not plots:
        words = "No two results have examples in common: there are no paired differences."
    return el("section", el("h2", "Paired differences"), el("p", words, class_="quiet"), *plots)


def _forest_rows(task: TaskComparison) -> list[PlotRow]:
    rows = []
    names = list(task.results)
    for pair in task.pairs:
        found = pair.difference
        if found is None or pair.p_holm is None:
            continue
        numbers = spread_text(found.mean, found.interval, signed=True)
        forced = ", forced" if task.forced else ""
        better = {"higher": "", "lower": ", lower is better", "none": ", neither is better"}
        label = f"{task.name}{forced}: {pair.second} − {pair.first}{better[task.direction]}"
        mark = Mark(
            found.mean,
            found.interval,
            names.index(pair.second),
            f"{label}: {numbers}, p = {p_text(pair.p_holm)} (Holm)",
            hollow=pair.p_holm >= 1 - LEVEL,
        )
        rows.append(PlotRow(label, numbers, (mark,)))
    return rows


def _frontier(found: Frontier | None) -> Markup:
    if found is None:
        return Markup()
    words = (
        "Bars: 95 % intervals. Ringed and joined by dots: on the Pareto front, where no other result has as "
        "little KL and as good a reward. Lines join the checkpoints of one run."
    )
    plots = [
        _scatter(found, "sqrt(KL)", lambda point: root(point.kl)),
        _scatter(found, "KL", lambda point: point.kl),
    ]
    rows = [
        [
            f"{point.name}{' *' if point.on_front else ''}",
            metric_text(point.kl),
            metric_text(point.reward),
        ]
        for point in found.points
    ]
    lacking = f"Without either number: {', '.join(found.without)}." if found.without else ""
    return el(
        "section",
        el("h2", f"{found.reward} against KL", id="frontier"),
        el("p", words, class_="quiet"),
        el("div", *plots, class_="two"),
        table(["result (* on the front)", "KL (± one s.e.)", f"{found.reward} (± one s.e.)"], rows),
        el("p", lacking) if lacking else "",
    )


def _scatter(found: Frontier, x_label: str, x: Callable[[Point], Any]) -> Markup:
    runs = list(dict.fromkeys(point.run for point in found.points))
    spots = [
        Spot(
            x(point).value,
            point.reward.value,
            interval_of(x(point)),
            interval_of(point.reward),
            point.name,
            runs.index(point.run),
            point.on_front,
        )
        for point in found.points
    ]
    lines = []
    for index, run in enumerate(runs):
        steps = sorted(
            (point for point in found.points if point.run == run and point.step is not None),
            key=lambda point: point.step or 0,
        )
        if len(steps) > 1:
            lines.append(Line(tuple((x(p).value, p.reward.value) for p in steps), "run", index))
    front = sorted((x(p).value, p.reward.value) for p in found.points if p.on_front)
    if len(front) > 1:
        lines.append(Line(tuple(front), "front"))
    title = f"{found.reward} against {x_label}"
    return scatter(spots, lines, title=title, x_label=x_label, y_label=found.reward)


def _provenance(comparison: Comparison) -> Markup:
    """What every number was made with, a column a result; what differs from the first is marked."""
    heads = [output.head for output in comparison.outputs]
    whole = _facts_table(
        [output.name for output in comparison.outputs], [_flat(head) for head in heads]
    )
    parts = [el("h2", "What it was made with", id="made"), whole]
    for task in comparison.tasks:
        facts = [
            {"version": each.version, "kind": each.kind, **_flat(each.made)}
            for each in task.results.values()
        ]
        inner = _facts_table(list(task.results), facts)
        parts.append(el("details", el("summary", task.name, *forced_mark(task)), inner))
    return el("section", *parts)


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """``{"engine.name": "vllm"}``; lists as JSON."""
    found: dict[str, str] = {}
    for key, each in value.items():
        name = f"{prefix}{key}"
        if isinstance(each, Mapping) and each:
            found |= _flat(each, f"{name}.")
        else:
            found[name] = each if isinstance(each, str) else json.dumps(each, ensure_ascii=False)
    return found


def _facts_table(names: Sequence[str], facts: Sequence[Mapping[str, str]]) -> Markup:
    rows = []
    for key in dict.fromkeys(key for each in facts for key in each):
        values = [each.get(key, "–") for each in facts]
        cells = [
            value if value == values[0] else el("span", value, class_="other") for value in values
        ]
        rows.append([key, *cells])
    return el("div", table(["", *names], rows, texts=1 + len(names)), class_="made")


def _remarks(comparison: Comparison) -> Markup:
    lines = [*comparison.remarks]
    lines += [
        f"{task}: only {name} has it; not compared" for task, name in comparison.alone.items()
    ]
    if not lines:
        return Markup()
    items = [el("li", line) for line in lines]
    return el("section", el("h2", "What else differs, and what was left out"), el("ul", *items))
