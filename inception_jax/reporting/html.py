"""The pages of a report: one HTML file each, which needs no other file and no network.

Every value is escaped by Jinja, and a policy in the page allows its own script alone (by its hash)
and no connection, so that a class that is called `<script>` is a name and nothing more.
"""

import base64
import datetime
import functools
import hashlib
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jinja2

from inception_jax.reporting import context
from inception_jax.reporting.run_record import RunRecord
from inception_jax.storage import atomic

_TEMPLATES = pathlib.Path(__file__).parent / "templates"


def run_page(record: RunRecord) -> str:
    """Returns the report of one run."""
    return _render(
        "run.html",
        record=record,
        title=record.name,
        result=context.result(record),
        others=context.other_evaluations(record),
        curves=context.curves([record]),
        metrics=context.metrics(record.rows),
        evaluated=context.evaluated(record),
        curve_table=context.curve_table(record),
        classes=context.classes(record),
        confusion=context.confusion(record),
        examples=context.examples(record),
        calibration=context.reliability(record),
        time=context.time(record),
        overridden=context.overridden(record),
        settings=context.settings(record.config),
        machine=context.machine(record),
        diagnosis=record.diagnosis,
    )


def comparison_page(records: Sequence[RunRecord], output: pathlib.Path) -> str:
    """Returns the comparison of several runs.

    Args:
      records: of the runs, at least two.
      output: where the page will lie, from which it links to the runs' own reports.
    """
    evaluations = [row for record in records for row in record.evaluations]
    return _render(
        "compare.html",
        title=f"{len(records)} runs compared",
        curves=context.curves(records),
        metrics=context.metrics([row for record in records for row in record.rows]),
        columns=[each for each in context.metrics(evaluations) if each.name != "top1"],
        paths=context.differing(records),
        rows=context.comparison(records),
        links=[_link(record, output) for record in records],
    )


def write(path: pathlib.Path, page: str) -> None:
    """Writes a page, whole or not at all: a browser may be reading it.

    Raises:
      WriteError: if it cannot be written.
    """
    with atomic.replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _link(record: RunRecord, output: pathlib.Path) -> str:
    """Returns the address of a run's own report, seen from a page; '' if there is none."""
    page = record.workdir.report
    if not page.exists():
        return ""
    return pathlib.Path(os.path.relpath(page.resolve(), output.resolve().parent)).as_posix()


def _render(template: str, **values: Any) -> str:
    script = (_TEMPLATES / "report.js").read_text(encoding="utf-8")
    digest = hashlib.sha256(script.encode()).digest()
    return (
        _environment()
        .get_template(template)
        .render(
            script=script,
            script_hash=base64.b64encode(digest).decode(),
            style=(_TEMPLATES / "report.css").read_text(encoding="utf-8"),
            now=datetime.datetime.now(datetime.UTC),
            **values,
        )
    )


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        # A value that a template misspells is an error, not an empty place in the page.
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # The splits of a curve keep their order.
    environment.policies["json.dumps_kwargs"] = {}
    environment.filters |= {"number": number, "duration": duration, "setting": setting}
    return environment


def number(value: float | None, digits: int = 2) -> str:
    """Returns a number with so many decimals, and a dash where there is none."""
    return "–" if value is None else f"{value:,.{digits}f}"


def duration(seconds: float) -> str:
    """Returns seconds as a reader says them: 42.0 s, 3 min 20 s, 1 h 22 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60:,} h {minutes % 60} min"


def setting(value: Any) -> str:
    """Returns the value of a setting as one would type it."""
    if value is None:
        return "–"
    return str(value) if value != "" else "(empty)"
