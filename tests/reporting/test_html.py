"""The pages of a report, parsed; test_browser.py opens them in a browser."""

import json
import pathlib
import re
import shutil
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

import inception_jax
from inception_jax import config as configs
from inception_jax.config import Expected, Train
from inception_jax.errors import UserError
from inception_jax.evaluation import calibration, predictions
from inception_jax.reporting import context, html, report, run_record
from inception_jax.storage.workdir import Workdir
from tests import command, run_folders

PACKAGE = pathlib.Path(inception_jax.__file__).parent
HOSTILE = "<script>window.hacked = 1</script>"
BROKEN_OUT = '"><img src=x onerror="window.hacked = 1">{{ 7 * 7 }}'


class Page(HTMLParser):
    """Parses a page into elements with attributes, and text outside scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.data: dict[str, Any] = {}
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""
        if tag in ("td", "th"):
            self.text += " "

    def handle_data(self, data: str) -> None:
        if self._inside == "script" and self.elements[-1][1].get("type"):
            self.data = json.loads(data)
        elif self._inside not in ("script", "style"):
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


def page_of(folder: pathlib.Path) -> Page:
    return Page(report.write_page(folder).read_text(encoding="utf-8"))


def test_page_has_all_sections(tmp_path: pathlib.Path) -> None:
    page = page_of(run_folders.write(tmp_path))
    ids = {attributes["id"] for _, attributes in page.elements if attributes.get("id")}
    parts = {"curves", "diagnosis", "classes", "confusion", "mistakes", "calibration", "time"}
    assert parts | {"settings", "machine", "data"} <= ids
    # All links within the page have a target.
    targets = {str(a["href"])[1:] for a in page.all("a") if str(a["href"]).startswith("#")}
    assert targets <= ids
    last = run_folders.lines()[-1]
    assert f"{last['top1']:.2f}" in page.words
    assert "(95% interval for n = 600 images)" in page.words
    assert "3 min 20 s" in page.words  # 200 seconds in total.


def test_page_names_the_evaluation_of_each_figure(tmp_path: pathlib.Path) -> None:
    folder = run_folders.write(tmp_path)
    page = page_of(folder)
    assert "Best and last evaluation, step 400" in page.words
    assert "come from the evaluation at step 400 (best and last), split test" in page.words
    # Makes the evaluation at step 360 better than the last one.
    lines = run_folders.lines()
    for line in lines:
        if line["split"] == "test" and line["step"] == 360:
            line["top1"] = 99.0
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = page_of(folder)
    assert "Last evaluation, step 400" in page.words
    assert "The best evaluation was 99.00% at step 360" in page.words
    assert "(last), split test" in page.words


def test_top5_is_omitted_for_up_to_five_classes(tmp_path: pathlib.Path) -> None:
    """Also for runs of older versions, whose files have it."""
    few = run_folders.write(tmp_path / "few", names=tuple("abcde"))
    many = run_folders.write(tmp_path / "many", names=tuple("abcdef"))
    for folder, shown in ((few, False), (many, True)):
        page = report.write_page(folder).read_text(encoding="utf-8")
        curves = Page(page).data["runs"][0]["splits"]
        assert all(("top5" in curve["metrics"]) == shown for curve in curves.values())
        assert bool(re.search("top-5", page, re.IGNORECASE)) == shown
    for folders, shown in (([few, few], False), ([few, many], True)):
        output = tmp_path / "comparison.html"
        report.write_comparison(folders, output)
        page = output.read_text(encoding="utf-8")
        assert bool(re.search("top-5", page, re.IGNORECASE)) == shown
        heads, *rows = re.findall("<tr>(.*?)</tr>", page.partition("run-table")[2], re.DOTALL)
        rows = [row for row in rows if "swatch" in row]
        assert {row.count("<td") + row.count("<th") for row in rows} == {heads.count("<th")}


def with_rows(folder: pathlib.Path, *more: dict[str, Any], **values: float) -> pathlib.Path:
    """Adds values to each evaluation of a run, and further rows."""
    rows = [row | (values if row["split"] == "test" else {}) for row in run_folders.lines()]
    text = "".join(json.dumps(row) + "\n" for row in [*rows, *more])
    (folder / "metrics.jsonl").write_text(text)
    return folder


def test_custom_metrics_are_shown_by_name(tmp_path: pathlib.Path) -> None:
    values = {"top10": 97.5, "macro_accuracy": 0.654321, "<b>": 12345.6}
    folder = with_rows(run_folders.write(tmp_path / "one"), **values)
    page = page_of(folder)
    heads = "loss top-1, % top-5, % top10 macro_accuracy <b> training loss"
    assert f"epoch step split {heads}" in page.words
    assert "97.5 0.65432 12,346" in page.words
    assert "macro_accuracy0.65432" in page.words.partition("Horizontal axis")[0]  # A tile.
    columns = page.data["runs"][0]["splits"]["test"]["metrics"]
    assert {name: columns[name][-1] for name in values} == values
    names = [figure["data-metric"] for figure in page.all("figure") if "data-metric" in figure]
    known = ["loss", "top1", "top5", "learning_rate", "gradient_norm"]
    assert names == [*known, *values]
    # And next to a run without these metrics.
    output = tmp_path / "both.html"
    report.write_comparison([folder, run_folders.write(tmp_path / "other")], output)
    words = Page(output.read_text(encoding="utf-8")).words
    assert "top-5, % top10 macro_accuracy <b> best top-1, %" in words
    assert "97.5 0.65432 12,346" in words and "– – –" in words


def test_all_evaluations_are_shown_and_the_result_is_the_main_one(tmp_path: pathlib.Path) -> None:
    """Including the horizontal-flip average, which older versions stored in the same row."""
    row = {"step": 400, "epoch": 10.0, "split": "crops", "top1": 99.9, "loss": 0.01, "count": 7}
    flip = {"flip_loss": 0.5, "flip_top1": 88.8, "flip_top5": 99.0}
    folder = with_rows(run_folders.write(tmp_path), row, **flip)
    record = run_record.read(Workdir(folder))
    assert (record.split, len(record.evaluations)) == ("test", 10)
    assert record.diagnosis is not None
    assert record.diagnosis.evidence.top1 == run_folders.lines()[-1]["top1"]
    assert record.role(400) == "best and last"
    page = page_of(folder)
    words = page.words.partition("Horizontal axis")[0].partition("Other evaluations")[2]
    assert "horizontal-flip average 400 0.5000 88.80 99.00 600" in words
    assert "crops 400 0.0100 99.90 – 7" in words
    splits = page.data["runs"][0]["splits"]
    assert list(splits) == ["train", "crops", "flip", "test"]
    assert len({columns["color"] for columns in splits.values()}) == 4
    assert splits["flip"]["metrics"]["top1"] == [88.8] * 10
    # Comparisons use the main evaluation of each run.
    assert list(context.curves([record, record])["runs"][0]["splits"]) == ["train", "test"]


def test_finish_reads_and_diagnoses_a_run_once(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def count(module: Any, name: str) -> None:
        original = getattr(module, name)

        def counted(*args: Any, **more: Any) -> Any:
            calls.append(name)
            return original(*args, **more)

        monkeypatch.setattr(module, name, counted)

    for name in ("read_metrics", "diagnose"):
        count(run_record, name)
    for module, name in (
        (configs, "read_record"),
        (predictions, "read"),
        (calibration, "confusion"),
    ):
        count(module, name)
    report.finish(Workdir(run_folders.write(tmp_path)), lambda line: None)
    assert sorted(calls) == ["confusion", "diagnose", "read", "read_metrics", "read_record"]


def test_page_is_self_contained(tmp_path: pathlib.Path) -> None:
    page = page_of(run_folders.write(tmp_path))
    addresses = [
        value
        for _, attributes in page.elements
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "data", "action", "poster")
    ]
    assert addresses
    assert all(str(address).startswith(("data:", "#")) for address in addresses)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "@import" not in text and "url(" not in re.sub(r"url\(#", "", text)
    assert len(text) < 3_000_000


def test_curves_match_the_metrics(tmp_path: pathlib.Path) -> None:
    page = page_of(run_folders.write(tmp_path))
    (run,) = page.data["runs"]
    for split in ("train", "test"):
        lines = [line for line in run_folders.lines() if line["split"] == split]
        columns = run["splits"][split]
        columns |= columns["metrics"]
        for key in ("step", "epoch", "loss", "top1", "top5"):
            np.testing.assert_allclose(columns[key], [line[key] for line in lines], rtol=1e-5)
        hours = [line["seconds"] / 3600 for line in lines]
        np.testing.assert_allclose(columns["hours"], hours, rtol=1e-5)
    assert "learning_rate" not in run["splits"]["test"]


def test_long_curves_are_subsampled() -> None:
    lines = [{"step": n, "loss": None if n == 3 else n} for n in range(1, 5001)]
    kept = context.subsample(lines, 1000)
    assert len(kept) == 1000
    assert (kept[0], kept[-1]) == (lines[0], lines[-1])
    assert context.subsample(lines[:5], 1000) == lines[:5]


def test_hostile_names_are_text(tmp_path: pathlib.Path) -> None:
    names = [HOSTILE, BROKEN_OUT, "$x$", "  ", "</style>", "Größe · 猫", "", "a" * 300]
    settings = run_folders.config(name=HOSTILE)
    folder = run_folders.write(tmp_path, names=names, settings=settings)
    plain = page_of(run_folders.write(tmp_path / "plain", names=tuple("abcdefgh")))
    page = page_of(folder)
    # The same elements and attributes as with plain names.
    for tag in ("script", "img", "style", "h1"):
        assert len(page.all(tag)) == len(plain.all(tag)), tag
    known = {name for _, attributes in plain.elements for name in attributes}
    assert {name for _, attributes in page.elements for name in attributes} == known
    assert page.words.count(HOSTILE) >= 3
    assert "{{ 7 * 7 }}" in page.words
    assert page.data["runs"][0]["name"] == HOSTILE
    # They can be plotted too.
    assert len(report.plot(folder)) == 8


def test_scripts_never_create_markup_from_text() -> None:
    scripts = [*PACKAGE.rglob("*.js"), *PACKAGE.rglob("*.html")]
    assert {"report.js", "page.html"} <= {path.name for path in scripts}
    unsafe = re.compile(r"innerHTML|outerHTML|AdjacentHTML|eval\(|document\.write|new Function")
    for path in scripts:
        assert not unsafe.findall(path.read_text(encoding="utf-8")), path


def test_content_security_policy_allows_only_the_page_script(tmp_path: pathlib.Path) -> None:
    page = page_of(run_folders.write(tmp_path))
    (policy,) = [m["content"] for m in page.all("meta") if "http-equiv" in m]
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert re.search(r"script-src 'sha256-[\w+/]{43}='$", policy)


def expected_of(tmp_path: pathlib.Path, top1: float, **experiment: Any) -> str:
    source = "a paper's table 3" if top1 else ""
    settings = run_folders.config(expected=Expected(top1=top1, source=source))
    folder = run_folders.write(tmp_path, settings=settings, **experiment)
    return page_of(folder).words


def test_result_is_compared_with_the_expected_one(tmp_path: pathlib.Path) -> None:
    last = run_folders.lines()[-1]["top1"]
    words = expected_of(tmp_path, last - 1.5)
    assert f"As expected or better: {last:.2f}%, expected {last - 1.5:.2f}% (+1.50 points)" in words
    assert "a paper's table 3" in words
    assert "Below the expected result" in expected_of(tmp_path, last + 2)
    assert "sets no expected result" in expected_of(tmp_path, 0.0)


def test_overridden_settings_are_listed(tmp_path: pathlib.Path) -> None:
    own = {
        "train.duration": "4000 steps",
        "schedule.learning_rate": 0.05,
        "data.directory": "elsewhere",
    }
    experiment = {"file": "experiments/made_up.py", "own": own}
    words = expected_of(tmp_path, 50.0, experiment=experiment)
    # The rate equals that of the experiment, and the data directory is not part of a recipe.
    assert "this run changed 1 of its settings" in words
    assert "setting experiment this run train.duration 4000 steps 400 steps" in words
    assert "Unchanged from experiments/made_up.py." in expected_of(
        tmp_path, 50.0, experiment=experiment | {"own": {}}
    )


def test_workdir_with_only_metrics_has_curves(tmp_path: pathlib.Path) -> None:
    complete = run_folders.write(tmp_path / "complete")
    shutil.copy(complete / "metrics.jsonl", tmp_path / "metrics.jsonl")
    page = page_of(tmp_path)
    assert page.data["runs"][0]["splits"]["train"]["metrics"]["loss"]
    assert "This workdir has no predictions" in page.words
    assert tmp_path.name in page.words
    assert not page.all("img")


def test_unfinished_run_is_marked(tmp_path: pathlib.Path) -> None:
    page = page_of(run_folders.write(tmp_path, steps=120))
    assert "step 120, not finished" in page.words
    assert "Time: 3 min 20 s" in page.words  # From predictions.npz.
    (tmp_path / "metrics.jsonl").write_text(json.dumps(run_folders.lines()[0]) + "\n")
    assert "No evaluation yet." in page_of(tmp_path).words


def test_images_in_both_splits_are_listed(tmp_path: pathlib.Path) -> None:
    folder = run_folders.write(tmp_path)
    config_record = json.loads((folder / "config.json").read_text())
    for count, pairs in ((0, []), (2, [["val/<b>.jpg", "train/1.jpg"]])):
        config_record["dataset"]["evaluated and trained on"] = {"total": count, "pairs": pairs}
        (folder / "config.json").write_text(json.dumps(config_record))
        assert ("Evaluated on training images" in page_of(folder).words) == bool(count)
    words = page_of(folder).words
    assert "2 images of the evaluation split" in words
    assert "val/<b>.jpg = train/1.jpg and more" in words


def test_files_of_an_earlier_run_are_ignored(tmp_path: pathlib.Path) -> None:
    run_folders.write(tmp_path)
    other = run_folders.lines(skill=0.5)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in other))
    record = run_record.read(Workdir(tmp_path))
    assert record.evaluated is None
    assert record.result == {}


def test_evaluation_on_another_machine_is_shown(tmp_path: pathlib.Path) -> None:
    run_folders.write(tmp_path)
    lines = [line | {"loss": line["loss"] * 1.0001} for line in run_folders.lines()]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run_record.read(Workdir(tmp_path)).evaluated is not None


def test_result_with_a_loss_of_zero_is_shown(tmp_path: pathlib.Path) -> None:
    run_folders.write(tmp_path)
    lines = [line | {"loss": 0.0} for line in run_folders.lines()]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = json.loads((tmp_path / "result.json").read_text()) | {"loss": 0.0}
    (tmp_path / "result.json").write_text(json.dumps(result))
    assert run_record.read(Workdir(tmp_path)).result["loss"] == 0


def test_hours_are_those_of_the_last_evaluation(tmp_path: pathlib.Path) -> None:
    run_folders.write(tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    row = run_folders.lines()[-1] | {"step": 500, "seconds": 3 * 3600.0}
    with_rows(tmp_path, row)
    (tmp_path / "result.json").write_text(json.dumps(result | {"seconds": 3600.0}))
    shown = context.result(run_record.read(Workdir(tmp_path)))
    assert shown is not None and (shown["last"]["step"], shown["hours"]) == (500, 3.0)


def test_comparison_lists_differing_settings(tmp_path: pathlib.Path) -> None:
    one = run_folders.write(tmp_path / "one")
    settings = run_folders.config(
        train=Train(batch_size=36, duration="800 steps", label_smoothing=0.1)
    )
    other = run_folders.write(tmp_path / "other & more", settings=settings, skill=2.0)
    report.write_page(other)
    output = tmp_path / "pages" / "comparison.html"
    output.parent.mkdir()
    report.write_comparison([one, other], output)
    page = Page(output.read_text(encoding="utf-8"))
    assert [run["name"] for run in page.data["runs"]] == ["one", "other & more"]
    assert context.differing_settings(
        [run_record.read(Workdir(one)), run_record.read(Workdir(other))]
    ) == [
        "train.duration",
        "train.label_smoothing",
    ]
    assert "train.label_smoothing 0.0 0.1" in page.words
    assert "not finished" in page.words  # 400 of 800 steps.
    # A link, relative to the page, to the report of the run that has one.
    links = [a["href"] for a in page.all("a") if "report.html" in str(a["href"])]
    assert links == ["../other%20%26%20more/report.html"]
    with pytest.raises(UserError, match="is the report of one of the compared runs"):
        report.write_comparison([one, other], other / "report.html")


def test_runs_with_equal_directory_names_are_distinguished(tmp_path: pathlib.Path) -> None:
    folders = [run_folders.write(tmp_path / name / "run") for name in ("a", "b")]
    records = [run_record.read(Workdir(folder)) for folder in folders]
    assert run_record.display_names(records) == ["a/run", "b/run"]
    assert len(set(run_record.display_names([records[0], records[0]]))) == 2


def test_command_writes_report_and_comparison(tmp_path: pathlib.Path) -> None:
    one, other = run_folders.write(tmp_path / "one"), run_folders.write(tmp_path / "other")
    assert command.check("tools.report", str(one)) == f"{one / 'report.html'}\n"
    output = tmp_path / "both.html"
    output_text = command.check("tools.report", str(one), str(other), f"--output={output}")
    assert output_text == f"{output}\n"
    assert "2 runs compared" in output.read_text(encoding="utf-8")
    done = command.run("tools.report", str(one), f"--output={tmp_path / 'none' / 'page.html'}")
    assert done.returncode == 2
    assert "cannot be written" in done.stderr


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.04, "0.0 s"),
        (59.9, "59.9 s"),
        (200, "3 min 20 s"),
        (3599.7, "1 h 0 min"),
        (9e4, "25 h 0 min"),
    ],
)
def test_durations_are_human_readable(seconds: float, words: str) -> None:
    assert html.format_duration(seconds) == words
