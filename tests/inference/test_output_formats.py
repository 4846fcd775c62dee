import csv
import io
import json
import pathlib

import pytest

from inception_jax.errors import UserError
from inception_jax.inference import output_formats
from inception_jax.inference.predictor import Prediction

GUESSES = [Prediction(3, 'cat, "tabby"', 0.75), Prediction(0, "Hündin", 0.2)]


def test_table_format() -> None:
    text = output_formats.FORMATS["table"].entry("a/b.jpg", GUESSES)
    assert text == 'a/b.jpg\n   75.00%  cat, "tabby"\n   20.00%  Hündin\n'


def test_table_escapes_control_characters() -> None:
    name = "\x1b[2J\x1b]0;owned\x07../../etc\nsecond <b>"
    text = output_formats.FORMATS["table"].entry("a.jpg", [Prediction(0, name, 0.5)])
    assert "\x1b" not in text and "\x07" not in text
    assert text.splitlines()[1] == r"   50.00%  \x1b[2J\x1b]0;owned\x07../../etc\nsecond <b>"
    # Programs get it unchanged.
    assert (
        json.loads(output_formats.FORMATS["json"].entry("a", [Prediction(0, name, 0.5)]))[
            "guesses"
        ][0]["name"]
        == name
    )
    rows = list(
        csv.reader(
            io.StringIO(output_formats.FORMATS["csv"].entry("a", [Prediction(0, name, 0.5)]))
        )
    )
    assert rows == [["a", "1", "0", name, "0.5"]]


def test_json_has_one_object_per_line() -> None:
    text = output_formats.FORMATS["json"].entry("a/b.jpg", GUESSES)
    assert text.count("\n") == 1 and text.endswith("\n")
    entry = json.loads(text)
    assert entry["file"] == "a/b.jpg"
    assert entry["guesses"][0] == {"label": 3, "name": 'cat, "tabby"', "probability": 0.75}
    assert [guess["name"] for guess in entry["guesses"]] == ['cat, "tabby"', "Hündin"]


def test_csv_has_one_row_per_class() -> None:
    format = output_formats.FORMATS["csv"]
    text = format.header + format.entry("a, b.jpg", GUESSES)
    rows = list(csv.DictReader(io.StringIO(text)))
    assert rows[0] == {
        "file": "a, b.jpg",
        "rank": "1",
        "label": "3",
        "name": 'cat, "tabby"',
        "probability": "0.75",
    }
    assert [row["rank"] for row in rows] == ["1", "2"]


def test_split_format_uses_ids_or_names() -> None:
    ids = output_formats.split_format(["n0", "n1", "n2", "n3"])
    assert ids.header + ids.entry("test/images/test_0.JPEG", GUESSES[:1]) == "test_0.JPEG n3\n"
    names = output_formats.split_format([])
    rows = list(csv.reader(io.StringIO(names.header + names.entry("test/0.jpg", GUESSES[:1]))))
    assert rows == [["file", "class"], ["test/0.jpg", 'cat, "tabby"']]


def test_output_is_written_atomically(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out.csv"
    path.write_text("before")

    def fail() -> None:
        with output_formats.open_output(path) as file:
            file.write("half")
            raise ValueError

    with pytest.raises(ValueError):
        fail()
    assert [each.read_text() for each in tmp_path.iterdir()] == ["before"]
    with output_formats.open_output(path) as file:
        file.write("ä")
    assert [each.read_text("utf-8") for each in tmp_path.iterdir()] == ["ä"]
    with output_formats.open_output(None) as file:
        file.write("out")
    assert capsys.readouterr().out == "out"
    with (
        pytest.raises(UserError, match=r"none/x: cannot be written: No such file"),
        output_formats.open_output(tmp_path / "none" / "x"),
    ):
        pass
