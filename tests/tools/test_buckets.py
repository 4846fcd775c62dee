"""The tools with inputs and outputs in a bucket, compared with the same tools on local files."""

import pathlib

import numpy as np
import pytest
from PIL import Image

from inception_jax import api
from inception_jax.config import Bucket
from inception_jax.errors import UserError
from inception_jax.models import weights
from inception_jax.reporting import report
from inception_jax.storage import access, buckets, integrity, paths
from tests import command, random_weights, run_folders, small
from tests.gcs import FlipBit, Proxy, Status


@pytest.fixture
def files(bucket: str, tmp_path: pathlib.Path) -> tuple[pathlib.Path, paths.Path]:
    """A local folder and one in a bucket with the same network and images."""
    (tmp_path / "in" / "images").mkdir(parents=True)
    weights.save(tmp_path / "in" / "w.safetensors", random_weights.make())
    pixels = np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3)
    for n in range(3):
        Image.fromarray(np.roll(pixels, n)).save(tmp_path / "in" / "images" / f"{n}.png")
    remote = paths.user_path(f"{bucket}/in", "")
    for file in (path for path in (tmp_path / "in").rglob("*") if path.is_file()):
        name = file.relative_to(tmp_path / "in").as_posix()
        buckets.write_bytes(remote / name, file.read_bytes())
    return tmp_path, remote.parent


@pytest.mark.parametrize(
    ("arguments", "outputs"),
    [
        (
            "predict --weights=IN/w.safetensors --csv IN/images --output=OUT/p.csv --explain=OUT/x",
            ["p.csv", "x/0.png", "x/1.png", "x/2.png"],
        ),
        pytest.param(
            "export --to=stablehlo --weights=IN/w.safetensors --output=OUT/w.stablehlo",
            ["w.stablehlo", "w.stablehlo.json"],
            marks=pytest.mark.slow,
        ),
        (
            "export --to=savedweights --weights=IN/w.safetensors --output=OUT/w.safetensors",
            ["w.safetensors"],
        ),
        pytest.param(
            "summarize --weights=IN/w.safetensors --image=IN/images/1.png --output=OUT",
            ["architecture.md", "architecture.csv", "filters.png", "activations.png"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["predict", "stablehlo", "savedweights", "summarize"],
)
def test_tools_give_the_same_files_in_a_bucket(
    arguments: str,
    outputs: list[str],
    files: tuple[pathlib.Path, paths.Path],
) -> None:
    contents = []
    for place in files:
        place_in_text = arguments.replace("IN/", f"{place}/in/").replace("OUT", f"{place}/out")
        printed = command.check(*f"tools.{place_in_text}".split())
        found = [access.read_bytes(place / "out" / name) for name in outputs]
        contents.append([each.replace(str(place).encode(), b"PLACE") for each in found])
        assert arguments.startswith("predict") or f"{place}/out" in printed
    assert contents[0] == contents[1]
    assert set(outputs) <= set(buckets.list_files(files[1] / "out"))
    assert not list(command.ROOT.glob("gs:*"))


def test_unwritable_bucket_is_reported_before_an_export(
    files: tuple[pathlib.Path, paths.Path], gcs: Proxy
) -> None:
    remote = files[1]
    gcs.make_read_only()
    done = command.run(
        "tools.export",
        "--to=onnx",
        f"--weights={remote}/in/w.safetensors",
        f"--output={remote}/out/w.onnx",
    )
    assert done.returncode == 2 and not done.stdout
    message = f"error: --output={remote}/out/w.onnx: permission denied; grant roles/storage"
    assert done.stderr.startswith(message) and done.stderr.count("\n") == 1
    assert not buckets.list_files(remote / "out")


@pytest.mark.slow
def test_find_lr_writes_to_a_bucket(bucket: str, data_directory: pathlib.Path) -> None:
    done = command.run(
        "tools.find_lr",
        "--config=experiments/digits.py",
        f"--config.data.directory={data_directory}",
        "--config.data.image_size=8",
        "--config.model.width=0.125",
        f"--output={bucket}/lr",
        "--steps=10",
    )
    # So few steps allow no proposal.
    assert done.returncode == 2, done.stderr
    assert done.stdout.splitlines() == [f"{bucket}/lr/find_lr.{end}" for end in ("json", "png")]
    assert set(buckets.list_files(paths.user_path(f"{bucket}/lr", ""))) == {
        "find_lr.json",
        "find_lr.png",
    }


def test_outage_is_logged_and_waited_for_as_long_as_the_command_says(
    bucket: str, gcs: Proxy
) -> None:
    gcs.inject(Status(503))
    done = command.run(
        "tools.find_lr",
        "--config=experiments/digits.py",
        "--config.bucket.retry_seconds=0.5",
        f"--output={bucket}/lr",
    )
    retrying, failed = done.stderr.splitlines()
    assert done.returncode == 2
    assert retrying.startswith(f"{bucket}/lr: ServiceUnavailable: 503 ")
    assert retrying.endswith("; retrying for up to 0.5 s (config.bucket.retry_seconds)")
    assert failed.startswith(
        f"error: --output={bucket}/lr: Google Cloud Storage did not answer within 0.5 s "
    )


def test_wrong_weights_in_a_bucket_are_named(files: tuple[pathlib.Path, paths.Path]) -> None:
    remote = files[1]
    done = command.run(
        "tools.import_weights",
        f"--input={remote}/in/w.safetensors",
        f"--output={remote}/out/w.safetensors",
    )
    # These are no torchvision weights, as their names tell.
    assert done.returncode == 2 and f"--input={remote}/in/w.safetensors" in done.stderr
    assert "Traceback" not in done.stderr and not buckets.list_files(remote / "out")


def test_tilde_is_expanded_in_every_argument(
    files: tuple[pathlib.Path, paths.Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    local, _ = files
    monkeypatch.setenv("HOME", str(local))
    command.check(
        "tools.predict",
        "--weights=~/in/w.safetensors",
        "~/in/images",
        "--csv",
        "--output=~/out/p.csv",
    )
    assert (local / "out" / "p.csv").exists()
    assert not list(command.ROOT.glob("~*"))


@pytest.fixture(scope="module")
def run(data_directory: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A finished run, to be copied to a bucket."""
    config = small.config(data_directory, bucket=Bucket(retry_seconds=0.25))
    return small.finished(config, tmp_path_factory.mktemp("run"))[1].path


def test_weights_and_runs_are_loaded_from_a_bucket(bucket: str, run: pathlib.Path) -> None:
    remote = copy_run(run, bucket)
    expected = api.load_weights(run)
    loaded = api.load_weights(str(remote))
    assert loaded.origin.startswith(f"{remote}, step ")
    weights.save(remote.parent / "w.safetensors", expected)
    saved = api.load_weights(f"{bucket}/w.safetensors")
    for each in (loaded, saved):
        for name, value in weights.flatten(expected.variables).items():
            np.testing.assert_array_equal(weights.flatten(each.variables)[name], value)


def copy_run(folder: pathlib.Path, bucket: str) -> paths.Path:
    """Copies a run to a bucket, as gcloud storage cp does."""
    remote = paths.user_path(f"{bucket}/run", "")
    for file in (path for path in folder.rglob("*") if path.is_file()):
        buckets.write_bytes(remote / file.relative_to(folder).as_posix(), file.read_bytes())
    return remote


def test_run_says_how_long_to_wait_unless_this_process_does(
    bucket: str,
    gcs: Proxy,
    run: pathlib.Path,
    data_directory: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    remote = copy_run(run, bucket)
    # A process that has used no settings yet.
    monkeypatch.setattr(buckets, "_retry_seconds", 300.0)
    monkeypatch.setattr(buckets, "_has_setting", False)
    monkeypatch.setattr(buckets, "_log", None)
    gcs.inject(Status(503), name="run/checkpoints/*")
    with pytest.raises(buckets.BucketError, match=r"within 0\.25 s"):
        api.load_weights(str(remote))
    gcs.clear()
    config = small.config(data_directory, bucket=Bucket(retry_seconds=0.75))
    shown = copy_run(run_folders.write(tmp_path / "shown", settings=config), f"{bucket}/shown")
    gcs.inject(Status(503), operation="write", name="*/report.html")
    with pytest.raises(UserError, match=r"within 0\.75 s"):
        report.write_page(shown)
    gcs.clear()
    config.bucket.retry_seconds = 0.5
    api.load_dataset(config)
    gcs.inject(Status(503), name="run/checkpoints/*")
    with pytest.raises(buckets.BucketError, match=r"within 0\.5 s"):
        api.load_weights(str(remote))


@pytest.mark.parametrize(
    "damaged",
    [
        "model/manifest.ocdbt",
        # tests/training/test_bucket_checkpoints.py damages it without a command.
        pytest.param("model/ocdbt.process_0/d/*", marks=pytest.mark.slow),
    ],
)
def test_weights_that_arrive_damaged_are_one_message(
    damaged: str, bucket: str, gcs: Proxy, run: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    remote = copy_run(run, bucket)
    for step in integrity.list_steps(remote / "checkpoints"):
        integrity.write_manifest(remote / "checkpoints" / str(step))  # As one written there.
    gcs.inject(FlipBit(3), operation="read", name=f"run/checkpoints/*/{damaged}")
    output = tmp_path / "w.safetensors"
    arguments = [f"--workdir={remote}", "--to=savedweights", f"--output={output}"]
    done = command.run("tools.export", *arguments)
    assert done.returncode == 1 and not done.stdout and not output.exists()
    *others, message = done.stderr.splitlines()
    assert message.startswith(f"error: {remote}/checkpoints/")
    assert message.endswith(". Rerun the command")
    assert all("Using GOOGLE_AUTH_TOKEN_FOR_TESTING" in line for line in others)
    gcs.clear()
    command.check("tools.export", *arguments)


def test_missing_weights_in_a_bucket_are_named(bucket: str) -> None:
    with pytest.raises(UserError, match=rf"^{bucket}/x: cannot be read: No such file"):
        api.load_weights(f"{bucket}/x")
    with pytest.raises(UserError, match=r"^gs://no-such-bucket/x: bucket not found"):
        api.load_weights("gs://no-such-bucket/x")


@pytest.mark.parametrize("arguments", [["--config"], ["--parts", "--weights=w"]], ids=str)
def test_files_to_execute_must_be_local(arguments: list[str]) -> None:
    flag, *others = arguments
    done = command.run("tools.summarize", f"{flag}=gs://bucket/e.py", *others)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: {flag}=gs://bucket/e.py: is executed, so it must be a local file; copy it, and "
        "the files that it imports, with gcloud storage cp gs://bucket/e.py .\n"
    )
