"""Renders the pages of a report: self-contained HTML files that need no network.

Jinja escapes every value, and the page's content security policy allows only its own script (by
hash) and no connections, so a class named `<script>` is just text.
"""

import base64
import datetime
import functools
import hashlib
import os
import pathlib
import urllib.parse
from collections.abc import Sequence
from typing import Any

import jinja2

from inception_jax.reporting import context
from inception_jax.reporting.run_record import RunRecord
from inception_jax.storage import atomic, paths

# Shows an object in a bucket to users who are logged in and may read it.
_BROWSER_URL = "https://storage.cloud.google.com/"
_TEMPLATES = pathlib.Path(__file__).parent / "templates"


def run_page(record: RunRecord) -> str:
    """Renders the report of one run."""
    return _render(
        "run.html",
        record=record,
        title=record.name,
        result=context.result(record),
        others=context.other_evaluations(record),
        curves=context.curves([record]),
        metrics=context.metrics(record.rows),
        evaluated=context.evaluation_info(record),
        curve_table=context.curve_table(record),
        classes=context.class_accuracy(record),
        confusion=context.confusion(record),
        examples=context.examples(record),
        calibration=context.reliability(record),
        time=context.time_by_phase(record),
        overridden=context.overridden_settings(record),
        settings=context.all_settings(record.config),
        machine=context.environment(record),
        diagnosis=record.diagnosis,
    )


def comparison_page(records: Sequence[RunRecord], output: paths.Path) -> str:
    """Renders the comparison of several runs.

    Args:
      records: the runs, at least two.
      output: path of the page, to which links to the runs' own reports are relative.
    """
    evaluations = [row for record in records for row in record.evaluations]
    return _render(
        "compare.html",
        title=f"{len(records)} runs compared",
        curves=context.curves(records),
        metrics=context.metrics([row for record in records for row in record.rows]),
        columns=[each for each in context.metrics(evaluations) if each.name != "top1"],
        paths=context.differing_settings(records),
        rows=context.comparison_rows(records),
        links=[_report_link(record, output) for record in records],
    )


def write(path: paths.Path, page: str) -> None:
    """Writes a page atomically, because a browser may be reading it.

    Raises:
      WriteError: if the file cannot be written.
    """
    with atomic.replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _report_link(record: RunRecord, output: paths.Path) -> str:
    """Returns the URL of a run's own report in a page; '' if it does not exist.

    It is relative, except from a page elsewhere to a report in a bucket. From a page in a bucket, a
    local report cannot be reached.
    """
    workdir = record.workdir
    if not workdir.report.exists():
        return ""
    page = workdir.location_of(workdir.report)
    if paths.is_local(page):
        if not paths.is_local(output):
            return ""
        relative = pathlib.Path(os.path.relpath(page.resolve(), output.resolve().parent))
        return urllib.parse.quote(relative.as_posix())
    same_bucket = not paths.is_local(output) and page.parts[:3] == output.parts[:3]
    if same_bucket:
        return urllib.parse.quote(os.path.relpath(str(page), str(output.parent)))
    return _BROWSER_URL + urllib.parse.quote(str(page).removeprefix("gs://"))


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
        # A misspelled value in a template is an error instead of an empty string.
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # Keeps the order of splits, which tojson would sort.
    environment.policies["json.dumps_kwargs"] = {}
    environment.filters |= {
        "number": format_number,
        "duration": format_duration,
        "setting": format_setting,
    }
    return environment


def format_number(value: float | None, digits: int = 2) -> str:
    """Returns a number with a fixed number of decimals; a dash for None."""
    return "–" if value is None else f"{value:,.{digits}f}"


def format_duration(seconds: float) -> str:
    """Formats a duration.

    >>> format_duration(42), format_duration(200), format_duration(4920)
    ('42.0 s', '3 min 20 s', '1 h 22 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60:,} h {minutes % 60} min"


def format_setting(value: Any) -> str:
    """Returns the value of a setting as text; a dash for None."""
    if value is None:
        return "–"
    return str(value) if value != "" else "(empty)"
