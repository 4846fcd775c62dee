import json
import pathlib
from typing import Any

import pytest

from inception_jax import config as configs
from inception_jax.config import Config
from inception_jax.errors import CheckpointError, UserError
from inception_jax.storage import atomic
from inception_jax.storage.workdir import Workdir
from inception_jax.training import workdir as workdirs

DATASET: dict[str, Any] = {"name": "digits", "classes": 10, "class names": list("0123456789")}


def started(
    path: pathlib.Path, config: Config, *, steps: int = 5, dataset: dict[str, Any] = DATASET
) -> Workdir:
    """A folder in which a run has saved a checkpoint."""
    folder = Workdir(path)
    workdirs.record_start(workdirs.previous(folder), config, step=0, changed=[], dataset=dataset)
    (folder.checkpoints / str(steps)).mkdir(parents=True)
    return folder


def test_a_new_folder_belongs_to_nobody(tmp_path: pathlib.Path) -> None:
    assert workdirs.check_compatible(workdirs.previous(Workdir(tmp_path / "new")), Config()) == []


def test_a_folder_without_a_checkpoint_belongs_to_nobody(tmp_path: pathlib.Path) -> None:
    folder = Workdir(tmp_path)
    workdirs.record_start(workdirs.previous(folder), Config(), step=0, changed=[], dataset=DATASET)
    (folder.checkpoints / "5.orbax-checkpoint-tmp").mkdir(parents=True)
    assert workdirs.check_compatible(workdirs.previous(folder), Config(seed=1)) == []
    workdirs.check_dataset(
        workdirs.previous(folder), {"name": "other", "classes": 3, "class names": ["a", "b", "c"]}
    )


def test_another_model_and_data_set_are_refused_by_field(tmp_path: pathlib.Path) -> None:
    folder = started(tmp_path, Config())
    other = Config()
    other.model.width, other.data.name = 0.5, "digits"
    with pytest.raises(CheckpointError) as error:
        workdirs.check_compatible(workdirs.previous(folder), other)
    assert "config.model.width: 1.0 → 0.5" in str(error.value)
    assert "config.data.name: 'tiny_imagenet' → 'digits'" in str(error.value)
    assert "schedule" not in str(error.value)


def test_another_content_of_the_data_set_is_refused(tmp_path: pathlib.Path) -> None:
    folder = started(tmp_path, Config())
    workdirs.check_dataset(workdirs.previous(folder), DATASET)
    with pytest.raises(CheckpointError, match=r"classes: 10 → 12"):
        workdirs.check_dataset(workdirs.previous(folder), DATASET | {"classes": 12})


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["pear", "plum", "zapple"],
            r"names: without 'apple', with 'zapple'; the first that differs is class 0: "
            r"'apple' → 'pear'",
        ),
        # The same places, but other words for them.
        (
            ["apple", "pears", "plum"],
            r"without 'pear', with 'pears'; the first that differs is class 1: 'pear' → 'pears'",
        ),
        (["pear", "apple", "plum"], r"the same names in another order; the first .* class 0"),
        (["apple", "fig", "pear", "plum"], r"3 classes → 4, with 'fig'; .* class 1"),
    ],
)
def test_other_classes_are_refused(tmp_path: pathlib.Path, names: list[str], message: str) -> None:
    before = {"name": "image_folder", "class names": ["apple", "pear", "plum"]}
    folder = started(tmp_path, Config(), dataset=before)
    workdirs.check_dataset(workdirs.previous(folder), before)
    with pytest.raises(CheckpointError, match=message):
        workdirs.check_dataset(workdirs.previous(folder), before | {"class names": names})


def test_a_record_without_class_names_is_taken(tmp_path: pathlib.Path) -> None:
    folder = started(tmp_path, Config(), dataset={"name": "digits", "classes": 10})
    workdirs.check_dataset(workdirs.previous(folder), DATASET)


def test_runs_of_older_versions_have_the_bit_depth_of_their_images(tmp_path: pathlib.Path) -> None:
    """They took all of 16 bits for used, and recorded nothing of it."""
    folder, pictures = started(tmp_path, Config()), DATASET | {"name": "image_folder"}
    record = json.loads(folder.config.read_text())
    atomic.write_json(folder.config, record | {"dataset": pictures})
    for depth in (0, 16):
        workdirs.check_dataset(workdirs.previous(folder), pictures | {"bit depth": depth})
    with pytest.raises(CheckpointError, match="data set's bit depth: 16 → 12"):
        workdirs.check_dataset(workdirs.previous(folder), pictures | {"bit depth": 12})
    atomic.write_json(folder.config, record | {"dataset": pictures | {"bit depth": 12}})
    with pytest.raises(CheckpointError, match="data set's bit depth: 12 → 0"):
        workdirs.check_dataset(workdirs.previous(folder), pictures | {"bit depth": 0})


def test_changed_settings_are_recorded_with_their_step(tmp_path: pathlib.Path) -> None:
    folder = started(tmp_path, Config())
    for step, rate in ((5, 0.2), (9, 0.3)):
        config = Config(train=Config().train)
        config.schedule.learning_rate = rate
        changed = workdirs.check_compatible(workdirs.previous(folder), config)
        workdirs.record_start(
            workdirs.previous(folder), config, step=step, changed=changed, dataset=DATASET
        )
    record = json.loads(folder.config.read_text())
    assert [(change["step"], change["settings"]) for change in record["changes"]] == [
        (5, ["config.schedule.learning_rate: 0.1 → 0.2"]),
        (9, ["config.schedule.learning_rate: 0.2 → 0.3"]),
    ]
    assert record["config"]["schedule"]["learning_rate"] == 0.3
    assert record["environment"]["packages"]["jax"]


def test_the_experiment_is_recorded(tmp_path: pathlib.Path) -> None:
    folder = Workdir(tmp_path)
    experiment = {"file": "experiments/digits.py", "own": {"train.duration": "12 epochs"}}
    workdirs.record_start(
        workdirs.previous(folder),
        Config(),
        step=0,
        changed=[],
        dataset=DATASET,
        experiment=experiment,
    )
    assert json.loads(folder.config.read_text())["experiment"] == experiment


def test_preparing_changed_data_again_is_asked_for_once(tmp_path: pathlib.Path) -> None:
    folder, config = started(tmp_path, Config()), Config()
    config.data.on_change = "prepare"
    workdirs.record_start(workdirs.previous(folder), config, step=0, changed=[], dataset=DATASET)
    assert json.loads(folder.config.read_text())["config"]["data"]["on_change"] == "refuse"
    assert config.data.on_change == "prepare"


def test_objects_of_a_program_are_recorded_and_asked_for(tmp_path: pathlib.Path) -> None:
    folder, own = started(tmp_path, Config()), {"model": "Net"}
    with pytest.raises(CheckpointError, match="model: that of the settings → Net, an object"):
        workdirs.check_compatible(workdirs.previous(folder), Config(), own)
    workdirs.record_start(
        workdirs.Previous(folder), Config(), step=0, changed=[], dataset=DATASET, own=own
    )
    assert workdirs.check_compatible(workdirs.previous(folder), Config(), own) == []
    with pytest.raises(CheckpointError, match=r"objects that its program gave: model \(Net\)"):
        workdirs.check_compatible(workdirs.previous(folder), Config())
    with pytest.raises(CheckpointError, match=r"an object that a program gave \(Net\)"):
        workdirs.recorded_run(folder)


def test_an_unchanged_start_records_no_change(tmp_path: pathlib.Path) -> None:
    folder = started(tmp_path, Config())
    config = Config()
    config.train.duration = "60 epochs"
    assert workdirs.check_compatible(workdirs.previous(folder), config) == []


def recall(
    folder: Workdir, config: Config, file: str, given: dict[str, object]
) -> tuple[dict[str, object], list[str]]:
    """What a start with some overrides is given back, and what is said of it."""
    own = {}
    for path, value in given.items():
        own[path] = configs.get(config, path)
        configs.put(config, path, value)
    experiment = {"file": file, "own": own}
    said: list[str] = []
    return workdirs.recall(
        workdirs.previous(folder), config, experiment, given.keys(), said.append
    ), said


def overridden(path: pathlib.Path) -> Workdir:
    """The folder of a run that overrode two settings of an experiment."""
    config = Config()
    config.model.width, config.train.image_sizes = 0.5, (16,)
    experiment = {"file": "a.py", "own": {"model.width": 1.0, "train.image_sizes": []}}
    folder = started(path, config)
    workdirs.record_start(
        workdirs.previous(folder),
        config,
        step=0,
        changed=[],
        dataset=DATASET,
        experiment=experiment,
    )
    return folder


def test_a_duration_in_another_unit_replaces_the_one_of_the_run(
    tmp_path: pathlib.Path,
) -> None:
    config = Config()
    config.train.duration = "20 epochs"
    folder = started(tmp_path, config)
    experiment: dict[str, object] = {"file": "a.py", "own": {"train.duration": "60 epochs"}}
    workdirs.record_start(
        workdirs.previous(folder),
        config,
        step=0,
        changed=[],
        dataset=DATASET,
        experiment=experiment,
    )
    now = Config()
    found, said = recall(folder, now, "a.py", {"train.duration": "300 steps"})
    assert now.train.duration == "300 steps" and not said
    assert found["own"] == {"train.duration": "60 epochs"}
    configs.validate(now)


def test_what_the_run_overrode_needs_no_second_time(tmp_path: pathlib.Path) -> None:
    folder = overridden(tmp_path)
    config = Config()
    experiment, said = recall(folder, config, "a.py", {"schedule.learning_rate": 0.2})
    assert (config.model.width, config.train.image_sizes) == (0.5, (16,))
    assert config.schedule.learning_rate == 0.2
    assert experiment["own"] == {
        "schedule.learning_rate": 0.1,
        "model.width": 1.0,
        "train.image_sizes": [],
    }
    assert said == [
        "not given, so as the run was started: config.model.width = 0.5, "
        "config.train.image_sizes = (16,)"
    ]
    assert len(workdirs.check_compatible(workdirs.previous(folder), config)) == 1


def test_what_is_given_counts_even_where_it_is_the_experiments_own(tmp_path: pathlib.Path) -> None:
    folder = overridden(tmp_path)
    config = Config()
    recall(folder, config, "a.py", {"model.width": 1.0})
    assert config.model.width == 1.0
    with pytest.raises(CheckpointError, match=r"config\.model\.width: 0\.5 → 1\.0"):
        workdirs.check_compatible(workdirs.previous(folder), config)


def test_another_experiment_is_compared_as_it_is(tmp_path: pathlib.Path) -> None:
    folder = overridden(tmp_path)
    other = Config(seed=3)
    assert recall(folder, other, "b.py", {})[1] == []
    assert other.model.width == 1.0
    # Of another name, but with the same settings, it is the same.
    copied = Config()
    recall(folder, copied, "b.py", {})
    assert copied.model.width == 0.5


def test_a_folder_without_a_checkpoint_gives_nothing_back(tmp_path: pathlib.Path) -> None:
    folder = overridden(tmp_path)
    (folder.checkpoints / "5").rmdir()
    config = Config()
    assert recall(folder, config, "a.py", {})[1] == []
    assert config == Config()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"config": {"seed": "1"}}'])
def test_an_unreadable_record_is_an_error(text: str, tmp_path: pathlib.Path) -> None:
    folder = started(tmp_path, Config())
    folder.config.write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        workdirs.previous(folder)


def test_json_is_written_whole_or_not_at_all(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "result.json"
    atomic.write_json(path, {"top1": 1.5})
    with pytest.raises(TypeError):
        atomic.write_json(path, {"top1": object()})
    assert json.loads(path.read_text()) == {"top1": 1.5}


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--workdir="):
        workdirs.check_writable(tmp_path / "file" / "run")
    workdirs.check_writable(tmp_path / "a" / "b")
    # Marked, as pictures may lie in folders beside it.
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == [".inception_jax"]
