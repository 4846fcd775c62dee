import json
import pathlib

import pytest

from inception_jax.config import Config, Duration
from inception_jax.errors import CheckpointError, UserError
from inception_jax.training import workdir as workdirs
from inception_jax.training.workdir import Workdir

DATASET = {"name": "digits", "classes": 10}


def started(path: pathlib.Path, config: Config, *, steps: int = 5) -> Workdir:
    """A folder in which a run has saved a checkpoint."""
    folder = Workdir(path)
    workdirs.record_start(folder, config, step=0, changed=[], dataset=DATASET)
    (folder.checkpoints / str(steps)).mkdir(parents=True)
    return folder


def test_a_new_folder_belongs_to_nobody(tmp_path: pathlib.Path) -> None:
    assert workdirs.check_owner(Workdir(tmp_path / "new"), Config()) == []


def test_a_folder_without_a_checkpoint_belongs_to_nobody(tmp_path: pathlib.Path) -> None:
    folder = Workdir(tmp_path)
    workdirs.record_start(folder, Config(), step=0, changed=[], dataset=DATASET)
    (folder.checkpoints / "5.orbax-checkpoint-tmp").mkdir(parents=True)
    assert workdirs.check_owner(folder, Config(seed=1)) == []
    workdirs.check_dataset(folder, {"name": "other", "classes": 3})


def test_another_model_and_data_set_are_refused_by_field(tmp_path: pathlib.Path) -> None:
    folder = started(tmp_path, Config())
    other = Config()
    other.model.width, other.data.name = 0.5, "digits"
    with pytest.raises(CheckpointError) as error:
        workdirs.check_owner(folder, other)
    assert "config.model.width: 1.0 → 0.5" in str(error.value)
    assert "config.data.name: 'tiny_imagenet' → 'digits'" in str(error.value)
    assert "schedule" not in str(error.value)


def test_another_content_of_the_data_set_is_refused(tmp_path: pathlib.Path) -> None:
    folder = started(tmp_path, Config())
    workdirs.check_dataset(folder, DATASET)
    with pytest.raises(CheckpointError, match=r"classes: 10 → 12"):
        workdirs.check_dataset(folder, DATASET | {"classes": 12})


def test_runs_of_older_versions_have_the_bit_depth_of_their_images(tmp_path: pathlib.Path) -> None:
    """They took all of 16 bits for used, and recorded nothing of it."""
    folder, pictures = started(tmp_path, Config()), DATASET | {"name": "image_folder"}
    record = workdirs.recorded(folder)
    assert record is not None
    workdirs.write_json(folder.config, record | {"dataset": pictures})
    for depth in (0, 16):
        workdirs.check_dataset(folder, pictures | {"bit depth": depth})
    with pytest.raises(CheckpointError, match="data set's bit depth: 16 → 12"):
        workdirs.check_dataset(folder, pictures | {"bit depth": 12})
    workdirs.write_json(folder.config, record | {"dataset": pictures | {"bit depth": 12}})
    with pytest.raises(CheckpointError, match="data set's bit depth: 12 → 0"):
        workdirs.check_dataset(folder, pictures | {"bit depth": 0})


def test_changed_settings_are_recorded_with_their_step(tmp_path: pathlib.Path) -> None:
    folder = started(tmp_path, Config())
    for step, rate in ((5, 0.2), (9, 0.3)):
        config = Config(train=Config().train)
        config.schedule.learning_rate = rate
        changed = workdirs.check_owner(folder, config)
        workdirs.record_start(folder, config, step=step, changed=changed, dataset=DATASET)
    record = json.loads(folder.config.read_text())
    assert [(change["step"], change["settings"]) for change in record["changes"]] == [
        (5, ["config.schedule.learning_rate: 0.1 → 0.2"]),
        (9, ["config.schedule.learning_rate: 0.2 → 0.3"]),
    ]
    assert record["config"]["schedule"]["learning_rate"] == 0.3
    assert record["environment"]["packages"]["jax"]


def test_the_experiment_is_recorded(tmp_path: pathlib.Path) -> None:
    folder = Workdir(tmp_path)
    experiment = {"file": "experiments/digits.py", "own": {"train.length.epochs": 12.0}}
    workdirs.record_start(
        folder, Config(), step=0, changed=[], dataset=DATASET, experiment=experiment
    )
    assert json.loads(folder.config.read_text())["experiment"] == experiment


def test_an_unchanged_start_records_no_change(tmp_path: pathlib.Path) -> None:
    folder = started(tmp_path, Config())
    config = Config()
    config.train.length = Duration(epochs=60)
    assert workdirs.check_owner(folder, config) == []


@pytest.mark.parametrize("text", ["", "{", "[]", '{"config": {"no": 1}}'])
def test_an_unreadable_record_is_an_error(text: str, tmp_path: pathlib.Path) -> None:
    folder = started(tmp_path, Config())
    folder.config.write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        workdirs.check_owner(folder, Config())


def test_json_is_written_whole_or_not_at_all(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "result.json"
    workdirs.write_json(path, {"top1": 1.5})
    with pytest.raises(TypeError):
        workdirs.write_json(path, {"top1": object()})
    assert json.loads(path.read_text()) == {"top1": 1.5}


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--workdir="):
        workdirs.check_writable(Workdir(tmp_path / "file" / "run"))
    workdirs.check_writable(Workdir(tmp_path / "a" / "b"))
    assert list((tmp_path / "a" / "b").iterdir()) == []
