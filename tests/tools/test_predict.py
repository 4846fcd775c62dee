"""Tests the command predict."""

import csv
import dataclasses
import io
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from inception_jax.config import Data
from inception_jax.datasets.dataset import prepare
from inception_jax.inference.gradcam import encode_png
from inception_jax.inference.predictor import Predictor
from inception_jax.models import weights
from inception_jax.models.weights import Weights
from tests import archives, command, small


@pytest.fixture(scope="module")
def network() -> Weights:
    return small.weights()


@pytest.fixture(scope="module")
def path(network: Weights, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    file = tmp_path_factory.mktemp("weights") / "network.safetensors"
    weights.save(file, network)
    return file


@pytest.fixture
def photos(tmp_path: pathlib.Path) -> pathlib.Path:
    """Ten images of several sizes and formats, a text file and a damaged image."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    random = np.random.default_rng(0)
    for n in range(10):
        pixels = random.integers(0, 256, (20 + n, 30 - 2 * n, 3), np.uint8)
        ending = ("png", "webp", "bmp")[n % 3]
        Image.fromarray(pixels).save(folder / ("more" if n > 7 else "") / f"{n + 1}.{ending}")
    (folder / "notes.txt").write_text("not an image")
    (folder / "5.jpg").write_bytes(b"\xff\xd8\xff\xe0 and no more")
    return folder


def test_folder_to_csv_reports_unreadable_files(
    network: Weights, path: pathlib.Path, photos: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    output = tmp_path / "output.csv"
    done = command.run(
        "tools.predict", str(photos), f"--weights={path}", "--csv", f"--output={output}", "--top=2"
    )
    assert done.returncode == 1, done.stderr
    assert not done.stdout
    assert "images: the center square, resized to 8 × 8 px, as in evaluation" in done.stderr
    assert f"skipped, no image extension: {photos}/notes.txt" in done.stderr
    assert f"{photos}/5.jpg: not a readable image" in done.stderr
    assert "1 of 11 files could not be read" in done.stderr
    assert "Traceback" not in done.stderr
    rows = list(csv.DictReader(io.StringIO(output.read_text())))
    files = [str(file) for file in photos.rglob("[0-9]*") if file.name != "5.jpg"]
    order = sorted(files, key=lambda file: int(pathlib.Path(file).stem))
    assert [row["file"] for row in rows] == [file for file in order for _ in range(2)]
    predictor = Predictor(network, batch_size=1)
    for file, row in zip(order, rows[::2], strict=True):
        pixels = predictor.read(pathlib.Path(file).read_bytes(), file)
        ((best,),) = predictor.predict(pixels[None], 1)
        assert (row["rank"], row["label"], row["name"]) == ("1", str(best.label), best.name)
        assert float(row["probability"]) == pytest.approx(best.probability, rel=1e-4)


def test_cpu_computes_in_float32_and_starts_from_the_cache(
    photos: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = small.weights()
    trained = dataclasses.replace(
        trained, model=dataclasses.replace(trained.model, dtype="bfloat16")
    )
    file, image, cache = tmp_path / "trained.safetensors", str(photos / "1.png"), tmp_path / "cache"
    weights.save(file, trained)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(cache))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

    def probabilities(*flags: str) -> tuple[list[float], str]:
        done = command.run("tools.predict", image, f"--weights={file}", "--json", *flags)
        assert done.returncode == 0, done.stderr
        return [each["probability"] for each in json.loads(done.stdout)["guesses"]], done.stderr

    in_float32 = dataclasses.replace(
        trained, model=dataclasses.replace(trained.model, dtype="float32")
    )
    predictor = Predictor(in_float32, batch_size=1)
    pixels = predictor.read(pathlib.Path(image).read_bytes(), image)
    expected = [each.probability for each in predictor.predict(pixels[None])[0]]
    found, log = probabilities()
    assert found == pytest.approx(expected, rel=1e-5)
    assert "computing in float32, not in bfloat16 as in training: on a CPU that starts" in log
    programs = {each.name for each in cache.glob("*-cache")}
    assert any("compute_logits" in name for name in programs)
    assert probabilities()[0] == found
    assert {each.name for each in cache.glob("*-cache")} == programs, "nothing compiled again"
    found, log = probabilities("--dtype=bfloat16")
    assert found != pytest.approx(expected, rel=1e-5), "it is rounded to 8 bits"
    assert found == pytest.approx(expected, rel=0.1)
    assert "computing in" not in log


def test_standard_input_to_table(
    network: Weights, path: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    image = encode_png(np.full((8, 8, 3), 90, np.uint8))
    process = subprocess.run(
        [sys.executable, "-m", "inception_jax.tools.predict", "-", f"--weights={path}"],
        cwd=command.ROOT,
        input=image,
        capture_output=True,
        check=True,
    )
    lines = process.stdout.decode().splitlines()
    predictor = Predictor(network, batch_size=1)
    (predictions,) = predictor.predict(np.full((1, 8, 8, 3), 90, np.uint8))
    expected = [f"{each.probability:9.2%}  {each.name}" for each in predictions]
    assert lines == ["standard input", *expected]


def test_explain_writes_heat_maps_with_json(path: pathlib.Path, photos: pathlib.Path) -> None:
    output = command.check(
        "tools.predict",
        f"--weights={path}",
        "--json",
        f"--explain={photos / 'maps'}",
        "--explain_class=kind 3",
        "--layer=inception_3d",
        str(photos / "1.png"),
        str(photos / "more"),
    )
    entries = [json.loads(line) for line in output.splitlines()]
    assert [pathlib.Path(each["file"]).name for each in entries] == ["1.png", "9.bmp", "10.png"]
    assert all(len(each["guesses"]) == 5 for each in entries)
    drawn = sorted(file.name for file in (photos / "maps").glob("*.png"))
    assert drawn == ["1.png", "10.png", "9.png"]


def test_heat_maps_do_not_replace_linked_images(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.png").symlink_to(command.ROOT / "docs" / "frontier.png")
    done = command.run("tools.predict", str(tmp_path), f"--explain={tmp_path}", "--weights=none")
    assert done.returncode == 2 and "contains images to classify" in done.stderr


def test_unlabeled_split_becomes_leaderboard_file(tmp_path: pathlib.Path) -> None:
    source = archives.write_tiny_imagenet(tmp_path / "tiny.zip", 10, 2, 1, 12, size=16)
    data = Data(
        name="tiny_imagenet_subset",
        source=str(source),
        directory=str(tmp_path / "data"),
        image_size=16,
    )
    dataset = prepare(data, log=lambda _: None)
    network = small.weights(data=Data(name="tiny_imagenet_subset", image_size=16))
    network = dataclasses.replace(network, class_names=dataset.class_names)
    path = tmp_path / "network.safetensors"
    weights.save(path, network)
    arguments = [
        "tools.predict",
        f"--weights={path}",
        f"--config.data.directory={data.directory}",
    ]
    lines = command.check(*arguments, "--split=test").splitlines()
    assert [line.split()[0] for line in lines] == [f"test_{n}.JPEG" for n in range(12)]
    split = dataset.splits["test"]
    predictor = Predictor(network)
    for line in lines:
        name, wnid = line.split()
        (number,) = (n for n, full in enumerate(split.names) if full.endswith(f"/{name}"))
        ((best,),) = predictor.predict(split.read(np.array([number])), 1)
        assert wnid == archives.wnid(best.label)
    assert len({line.split()[1] for line in lines}) > 1
    done = command.run(*arguments, "--split=tests")
    assert done.returncode == 2
    assert (
        "no such split of tiny_imagenet_subset; use one of train, validation, test" in done.stderr
    )

    weights.save(path, dataclasses.replace(network, dataset=""))
    done = command.run(*arguments, "--split=test")
    assert done.returncode == 2
    assert f"--split=test: {path} does not name its data set" in done.stderr

    weights.save(path, dataclasses.replace(network, dataset="tfds"))
    done = command.run(*arguments, "--split=test")
    assert done.returncode == 2
    assert "does not record which data set of tfds it was trained on" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.jpg"], "'nowhere.jpg': no such file or folder"),
        ([], "give either image files and folders or --split=NAME"),
        (["README.md", "--json", "--csv"], "--json and --csv: cannot be combined"),
        (["README.md", "--layer=conv1"], "--layer=conv1: requires --explain"),
        (["README.md", "--checkpoint=3"], "--checkpoint=3: requires --workdir"),
        (["--split=test", "--top=3"], "--split: cannot be combined with"),
        (["README.md", "--workdir=x"], "give either --workdir=DIR or --weights=FILE"),
        (["README.md", "--config.train.batch_size=2"], "config.train.batch_size"),
        (["README.md", "--config.model.options.a=2"], "--config.model.options.a: settings come"),
        (["docs/frontier.png", "--explain=docs/../docs"], "contains images to classify, such as"),
    ],
)
def test_usage_error_exits_with_2(arguments: list[str], message: str) -> None:
    # The error comes before anything is read: the weights file does not exist.
    done = command.run("tools.predict", *arguments, "--weights=none.safetensors")
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
