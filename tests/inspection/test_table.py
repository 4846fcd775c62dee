"""Tests the table of a network and its comparison with the paper's."""

import csv
import pathlib

import pytest

from inception_jax.config import Model
from inception_jax.errors import UserError
from inception_jax.inspection import structure
from inception_jax.inspection.table import Cell, Table, make_table
from inception_jax.models import networks


def table(model: Model, size: int, classes: int = 1000) -> Table:
    return make_table(structure.analyze(networks.create(model, classes), size))


@pytest.fixture(scope="module")
def paper() -> Table:
    return table(Model(norm="lrn", aux_heads=True), 224)


def column(table: Table, name: str) -> dict[str, Cell]:
    index = table.head.index(name)
    return {str(line[0]): line[index] for line in table.lines}


def test_deviations_are_where_the_paper_contradicts_itself(
    paper: Table,
) -> None:
    """By arithmetic: 4c has 512 · 344 + 9 · 128 · 256 + 25 · 24 · 64 weights, 497.5 K for 463."""
    deviations = column(paper, "deviation")
    assert deviations["inception_4c"] == "weights +7.5%"
    assert deviations["inception_5a"] == "weights -5.0%, operations -5.4%"
    assert deviations["conv1"] == "weights +240.3%, operations +247.1%"
    for same in ("conv2", "inception_3a", "classifier", "mean", "max_pool_4"):
        assert deviations[same] == "", same
    operations = {name for name, text in deviations.items() if "operations" in str(text)}
    assert operations == {"conv1", "inception_5a"}
    assert not any("output" in str(text) for text in deviations.values())


def test_totals_exclude_auxiliary_heads(paper: Table) -> None:
    parameters = column(paper, "parameters")
    assert parameters["total"] == 6_998_552
    with_heads = 6_998_552 + sum(int(parameters[head] or 0) for head in ("aux_4a", "aux_4d"))
    assert parameters["with auxiliary heads"] == with_heads
    assert column(paper, "type")["aux_4a"] == "auxiliary head (training only)"
    assert column(paper, "type")["conv1"] == "convolution 7×7/2, bias, ReLU"


def test_other_networks_and_sizes_are_not_compared() -> None:
    for model, size in ((Model(), 64), (Model(name="deeper_googlenet"), 224)):
        assert "deviation" not in table(model, size).head


def test_deviations_of_torchvision_are_marked() -> None:
    deviations = column(table(Model(name="googlenet_torchvision"), 224), "deviation")
    assert "weights" in str(deviations["inception_3a"])
    assert deviations["conv2"] == ""


def test_files_contain_the_table(paper: Table, tmp_path: pathlib.Path) -> None:
    markdown, comma = paper.write(tmp_path)
    with comma.open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["block"] for line in lines] == [str(line[0]) for line in paper.lines]
    assert int(lines[-2]["parameters"]) == 6_998_552
    text = markdown.read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == len(paper.lines) + 2
    assert len({len(row) for row in rows}) == 1, "columns are aligned"
    assert "6,998,552" in text
    assert "separable" in text


def test_unwritable_folder_is_reported(paper: Table) -> None:
    with pytest.raises(UserError, match="/proc/no"):
        paper.write(pathlib.Path("/proc/no"))
