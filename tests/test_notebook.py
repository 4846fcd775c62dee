"""The quickstart notebook: its stored outputs, and a run of its cells in a user's environment.

After changing a cell, store the outputs again:
`.venv/bin/jupyter execute --inplace docs/notebooks/quickstart.ipynb`.
"""

import os
import pathlib
import re
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "notebooks" / "quickstart.ipynb"
# As for a user: one device, optimized programs, JAX's default promotion rules.
USERS = {
    "JAX_NUM_CPU_DEVICES": "1",
    "JAX_NUMPY_RANK_PROMOTION": "allow",
    "JAX_NUMPY_DTYPE_PROMOTION": "standard",
    "XLA_FLAGS": "",
}
ACCURACY = re.compile(r"top-1: ([\d.]+)% of 360 test images")
BEST_PREDICTION = re.compile(r"^ *([\d.]+)%  (\S+)$", re.MULTILINE)


def read() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text_of(notebook: Any) -> str:
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return "".join(output.text for output in outputs if output.output_type == "stream")


def drawings(notebook: Any) -> int:
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def test_stored_notebook_is_small_and_complete() -> None:
    notebook = read()
    nbformat.validate(notebook)
    assert NOTEBOOK.stat().st_size < 600_000
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [o for cell in cells for o in cell.outputs if o.output_type == "error"]
    assert float(ACCURACY.findall(text_of(notebook))[0]) >= 97
    assert drawings(notebook) == 4


def test_stored_outputs_contain_no_local_paths() -> None:
    assert not re.search(r"/(home|root|tmp|work|Users)/", text_of(read()))


@pytest.mark.parametrize("python", ["3.11", "3.14"])
def test_notebook_names_supported_python_versions(python: str) -> None:
    assert python in read().cells[0].source


@pytest.mark.slow
def test_cells_run(tmp_path: pathlib.Path) -> None:
    notebook = read()
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
    client = NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    client.execute(env={**os.environ, **USERS, "PYTHONPATH": path})
    text = text_of(notebook)
    assert float(ACCURACY.findall(text)[0]) >= 95
    assert drawings(notebook) == 4
    probability, name = BEST_PREDICTION.findall(text)[0]
    assert name == "3" and float(probability) > 50
    assert (tmp_path / "runs" / "quickstart" / "report.html").is_file()
