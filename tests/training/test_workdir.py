import copy
import json
import pathlib
from typing import Any

import pytest

from inception_jax import config as configs
from inception_jax import registry
from inception_jax.config import Config
from inception_jax.datasets.dataset import prepare
from inception_jax.errors import CheckpointError, UserError
from inception_jax.storage import atomic
from inception_jax.storage.workdir import Workdir
from inception_jax.training import workdir as workdirs
from tests import archives

DATASET: dict[str, Any] = {"name": "digits", "classes": 10, "class names": list("0123456789")}


def start_run(
    path: pathlib.Path, config: Config, *, steps: int = 5, dataset: dict[str, Any] = DATASET
) -> Workdir:
    """Returns a workdir in which a run has saved a checkpoint."""
    folder = Workdir(path)
    path.mkdir(exist_ok=True)
    workdirs.record_start(
        workdirs.load_previous_run(folder), config, step=0, changed=[], dataset=dataset
    )
    (folder.checkpoints / str(steps)).mkdir(parents=True)
    return folder


def test_new_workdir_is_compatible_with_any_config(tmp_path: pathlib.Path) -> None:
    assert (
        workdirs.check_compatible(workdirs.load_previous_run(Workdir(tmp_path / "new")), Config())
        == []
    )


def test_workdir_without_checkpoint_is_compatible_with_any_config(tmp_path: pathlib.Path) -> None:
    folder = Workdir(tmp_path)
    workdirs.record_start(
        workdirs.load_previous_run(folder), Config(), step=0, changed=[], dataset=DATASET
    )
    (folder.checkpoints / "5.orbax-checkpoint-tmp").mkdir(parents=True)
    assert workdirs.check_compatible(workdirs.load_previous_run(folder), Config(seed=1)) == []
    workdirs.check_dataset(
        workdirs.load_previous_run(folder),
        {"name": "other", "classes": 3, "class names": ["a", "b", "c"]},
    )


def test_other_model_and_data_set_are_rejected_by_field(tmp_path: pathlib.Path) -> None:
    folder = start_run(tmp_path, Config())
    other = Config()
    other.model.width, other.data.name = 0.5, "digits"
    with pytest.raises(CheckpointError) as error:
        workdirs.check_compatible(workdirs.load_previous_run(folder), other)
    assert "config.model.width: 1.0 → 0.5" in str(error.value)
    assert "config.data.name: 'tiny_imagenet' → 'digits'" in str(error.value)
    assert "schedule" not in str(error.value)


def test_other_data_set_content_is_rejected(tmp_path: pathlib.Path) -> None:
    folder = start_run(tmp_path, Config())
    workdirs.check_dataset(workdirs.load_previous_run(folder), DATASET)
    with pytest.raises(CheckpointError, match=r"classes: 10 → 12"):
        workdirs.check_dataset(workdirs.load_previous_run(folder), DATASET | {"classes": 12})


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["pear", "plum", "zapple"],
            r"names: without 'apple', with 'zapple'; the first difference is class 0: "
            r"'apple' → 'pear'",
        ),
        # The same order, but another name.
        (
            ["apple", "pears", "plum"],
            r"without 'pear', with 'pears'; the first difference is class 1: 'pear' → 'pears'",
        ),
        (["pear", "apple", "plum"], r"the same names in a different order; the first .* class 0"),
        (["apple", "fig", "pear", "plum"], r"3 classes → 4, with 'fig'; .* class 1"),
    ],
)
def test_other_classes_are_rejected(tmp_path: pathlib.Path, names: list[str], message: str) -> None:
    before = {"name": "image_folder", "class names": ["apple", "pear", "plum"]}
    folder = start_run(tmp_path, Config(), dataset=before)
    workdirs.check_dataset(workdirs.load_previous_run(folder), before)
    with pytest.raises(CheckpointError, match=message):
        workdirs.check_dataset(workdirs.load_previous_run(folder), before | {"class names": names})


def test_other_order_of_the_training_images_is_rejected(tmp_path: pathlib.Path) -> None:
    """As of a folder and its archive, whose paths begin differently."""
    files, datasets = archives.class_folders({"ant": 20, "bee": 20}), []
    for number, root in enumerate(("", "pictures")):
        source = archives.write_files(tmp_path / f"{number}.zip", files, root)
        directory = tmp_path / f"data{number}"
        settings = configs.Data(
            name="image_folder", source=str(source), directory=str(directory), image_size=16
        )
        datasets.append(prepare(settings, log=lambda line: None))
    assert workdirs.dataset_identity(datasets[0]) == workdirs.dataset_identity(datasets[1])
    folder = start_run(tmp_path / "run", Config(), dataset=workdirs.dataset_record(datasets[0]))
    workdirs.check_order(workdirs.load_previous_run(folder), datasets[0])
    with pytest.raises(CheckpointError, match="names or the order of the training files differ"):
        workdirs.check_order(workdirs.load_previous_run(folder), datasets[1])
    older = start_run(tmp_path / "older", Config(), dataset=workdirs.dataset_identity(datasets[0]))
    workdirs.check_order(workdirs.load_previous_run(older), datasets[1])


def test_record_without_class_names_is_accepted(tmp_path: pathlib.Path) -> None:
    folder = start_run(tmp_path, Config(), dataset={"name": "digits", "classes": 10})
    workdirs.check_dataset(workdirs.load_previous_run(folder), DATASET)


def test_records_of_older_versions_imply_bit_depth(tmp_path: pathlib.Path) -> None:
    """They assumed that all 16 bits were used, without recording it."""
    folder, pictures = start_run(tmp_path, Config()), DATASET | {"name": "image_folder"}
    record = json.loads(folder.config.read_text())
    atomic.write_json(folder.config, record | {"dataset": pictures})
    for depth in (0, 16):
        workdirs.check_dataset(workdirs.load_previous_run(folder), pictures | {"bit depth": depth})
    with pytest.raises(CheckpointError, match="data set's bit depth: 16 → 12"):
        workdirs.check_dataset(workdirs.load_previous_run(folder), pictures | {"bit depth": 12})
    atomic.write_json(folder.config, record | {"dataset": pictures | {"bit depth": 12}})
    with pytest.raises(CheckpointError, match="data set's bit depth: 12 → 0"):
        workdirs.check_dataset(workdirs.load_previous_run(folder), pictures | {"bit depth": 0})


def test_changed_settings_are_recorded_with_step(tmp_path: pathlib.Path) -> None:
    folder = start_run(tmp_path, Config())
    for step, rate in ((5, 0.2), (9, 0.3)):
        config = Config(train=Config().train)
        config.schedule.learning_rate = rate
        changed = workdirs.check_compatible(workdirs.load_previous_run(folder), config)
        workdirs.record_start(
            workdirs.load_previous_run(folder), config, step=step, changed=changed, dataset=DATASET
        )
    record = json.loads(folder.config.read_text())
    assert [(change["step"], change["settings"]) for change in record["changes"]] == [
        (5, ["config.schedule.learning_rate: 0.1 → 0.2"]),
        (9, ["config.schedule.learning_rate: 0.2 → 0.3"]),
    ]
    assert record["config"]["schedule"]["learning_rate"] == 0.3
    assert record["environment"]["packages"]["jax"]


def test_experiment_is_recorded(tmp_path: pathlib.Path) -> None:
    folder = Workdir(tmp_path)
    experiment = {"file": "experiments/digits.py", "own": {"train.duration": "12 epochs"}}
    workdirs.record_start(
        workdirs.load_previous_run(folder),
        Config(),
        step=0,
        changed=[],
        dataset=DATASET,
        experiment=experiment,
    )
    assert json.loads(folder.config.read_text())["experiment"] == experiment


def test_on_change_prepare_is_not_recorded(tmp_path: pathlib.Path) -> None:
    folder, config = start_run(tmp_path, Config()), Config()
    config.data.on_change = "prepare"
    workdirs.record_start(
        workdirs.load_previous_run(folder), config, step=0, changed=[], dataset=DATASET
    )
    assert json.loads(folder.config.read_text())["config"]["data"]["on_change"] == "refuse"
    assert config.data.on_change == "prepare"


def test_custom_objects_are_recorded_and_required(tmp_path: pathlib.Path) -> None:
    folder, own = start_run(tmp_path, Config()), {"model": "Net"}
    with pytest.raises(CheckpointError, match="model: as configured → Net, an object"):
        workdirs.check_compatible(workdirs.load_previous_run(folder), Config(), own)
    workdirs.record_start(
        workdirs.PreviousRun(folder),
        Config(),
        step=0,
        changed=[],
        dataset=DATASET,
        custom_objects=own,
    )
    assert workdirs.check_compatible(workdirs.load_previous_run(folder), Config(), own) == []
    with pytest.raises(CheckpointError, match=r"objects passed by its program: model \(Net\)"):
        workdirs.check_compatible(workdirs.load_previous_run(folder), Config())
    with pytest.raises(CheckpointError, match=r"an object passed by a program \(Net\)"):
        workdirs.require_record(folder)


def test_using_a_run_needs_only_its_network_and_data(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for registries in registry.REGISTRIES.values():
        monkeypatch.setattr(
            registries, "_parts", {n: registries.get(n) for n in registries.names()}
        )
    names = {"model": "own_net", "dataset": "own_data", "writer": "own_writer"}
    folder, record = start_run(tmp_path / "run", Config()), tmp_path / "run" / "config.json"
    parts = []
    for kind, name in names.items():
        file = tmp_path / f"{name}.py"
        file.write_text(f"import inception_jax as ij\nij.register_{kind}({name!r})(lambda *_: ...)")
        parts.append({"kind": kind, "name": name, "file": str(file)})
    record.write_text(json.dumps(json.loads(record.read_text()) | {"parts": parts}))
    workdirs.require_record(folder)
    assert [name in registry.REGISTRIES[kind] for kind, name in names.items()] == [1, 0, 0]
    workdirs.require_record(folder, needs_data=True)
    assert [name in registry.REGISTRIES[kind] for kind, name in names.items()] == [1, 1, 0]
    other = tmp_path / "other.py"
    other.write_text((tmp_path / "own_net.py").read_text() + "\n# Another version.")
    parts[0]["file"] = str(other)
    record.write_text(json.dumps(json.loads(record.read_text()) | {"parts": parts}))
    capfd.readouterr()
    workdirs.require_record(folder)
    assert (
        f"was registered by {other}; that of {tmp_path}/own_net.py is used"
        in capfd.readouterr().err
    )


def test_unchanged_start_records_no_change(tmp_path: pathlib.Path) -> None:
    folder = start_run(tmp_path, Config())
    config = Config()
    config.train.duration = "60 epochs"
    assert workdirs.check_compatible(workdirs.load_previous_run(folder), config) == []


def restore_overrides(
    folder: Workdir, config: Config, file: str, given: dict[str, object]
) -> tuple[dict[str, object], list[str]]:
    """Returns the experiment after a start with some overrides, and the log."""
    own: dict[str, object] = {}
    for path, value in given.items():
        mapping, entry = configs.mapping_of(path)
        setting = mapping if entry else path
        own.setdefault(setting, copy.deepcopy(configs.get(config, setting)))
        configs.put(config, path, value)
    own = {path: value for path, value in own.items() if value != configs.get(config, path)}
    experiment = {"file": file, "own": own}
    log: list[str] = []
    return workdirs.restore_overrides(
        workdirs.load_previous_run(folder), config, experiment, given.keys(), log.append
    ), log


def started(path: pathlib.Path, config: Config, own: dict[str, object]) -> Workdir:
    """Returns the workdir of a run that overrode settings; own has the experiment's values."""
    folder = start_run(path, config)
    workdirs.record_start(
        workdirs.load_previous_run(folder),
        config,
        step=0,
        changed=[],
        dataset=DATASET,
        experiment={"file": "a.py", "own": own},
    )
    return folder


def overridden(path: pathlib.Path) -> Workdir:
    """Returns the workdir of a run that overrode two settings of an experiment."""
    config = Config()
    config.model.width, config.train.image_sizes = 0.5, (16,)
    return started(path, config, {"model.width": 1.0, "train.image_sizes": []})


def test_duration_in_another_unit_replaces_recorded_one(
    tmp_path: pathlib.Path,
) -> None:
    config = Config()
    config.train.duration = "20 epochs"
    folder = started(tmp_path, config, {"train.duration": "60 epochs"})
    now = Config()
    restored, log = restore_overrides(folder, now, "a.py", {"train.duration": "300 steps"})
    assert now.train.duration == "300 steps" and not log
    assert restored["own"] == {"train.duration": "60 epochs"}
    configs.validate(now)


def test_overrides_of_first_start_are_restored(tmp_path: pathlib.Path) -> None:
    folder = overridden(tmp_path)
    config = Config()
    experiment, log = restore_overrides(folder, config, "a.py", {"schedule.learning_rate": 0.2})
    assert (config.model.width, config.train.image_sizes) == (0.5, (16,))
    assert config.schedule.learning_rate == 0.2
    assert experiment["own"] == {
        "schedule.learning_rate": 0.1,
        "model.width": 1.0,
        "train.image_sizes": [],
    }
    assert log == [
        "kept from this run's start, as not on this command line: config.model.width = 0.5, "
        "config.train.image_sizes = (16,)"
    ]
    assert len(workdirs.check_compatible(workdirs.load_previous_run(folder), config)) == 1


def test_given_setting_wins_even_if_it_is_the_default(tmp_path: pathlib.Path) -> None:
    folder = overridden(tmp_path)
    config = Config()
    restore_overrides(folder, config, "a.py", {"model.width": 1.0})
    assert config.model.width == 1.0
    with pytest.raises(CheckpointError, match=r"config\.model\.width: 0\.5 → 1\.0"):
        workdirs.check_compatible(workdirs.load_previous_run(folder), config)


def test_entries_of_mappings_are_restored_one_by_one(tmp_path: pathlib.Path) -> None:
    before = Config()
    configs.put(before, "evaluations.a.flip_tta", True)
    configs.put(before, "evaluations.a.examples", 50)
    configs.put(before, "augment.options.strength", 0.3)
    folder = started(tmp_path, before, {"evaluations": {}, "augment.options": {}})
    config = Config()
    given = {
        "evaluations.a.examples": 70,
        "evaluations.b.shift_tta": 2,
        "augment.options.angle": 9,
    }
    _, log = restore_overrides(folder, config, "a.py", given)
    assert config.evaluations == {
        "a": configs.View(flip_tta=True, examples=70),
        "b": configs.View(shift_tta=2),
    }
    assert config.augment.options == {"strength": 0.3, "angle": 9}
    assert log == [
        "kept from this run's start, as not on this command line: "
        "config.augment.options.strength = 0.3, config.evaluations.a.flip_tta = True"
    ]


def test_given_entry_wins_even_if_it_is_the_default(tmp_path: pathlib.Path) -> None:
    own = {"probability": 0.5, "strength": 1}
    before, config = Config(), Config()
    before.augment.options = own | {"probability": 0.2, "strength": 2}
    config.augment.options = dict(own)
    folder = started(tmp_path, before, {"augment.options": own})
    experiment, log = restore_overrides(
        folder, config, "a.py", {"augment.options.probability": 0.5}
    )
    assert config.augment.options == {"probability": 0.5, "strength": 2}
    assert experiment["own"] == {"augment.options": own}
    assert log == [
        "kept from this run's start, as not on this command line: "
        "config.augment.options.strength = 2"
    ]


def test_given_entry_may_be_a_mapping(tmp_path: pathlib.Path) -> None:
    before, config = Config(), Config()
    before.log.options = {"tags": {"a": 1}}
    folder = started(tmp_path, before, {"log.options": {}})
    _, log = restore_overrides(folder, config, "a.py", {"log.options.tags": {"a": 2}})
    assert config.log.options == {"tags": {"a": 2}} and log == []


def test_emptied_mapping_is_not_restored(tmp_path: pathlib.Path) -> None:
    before, config = Config(), Config()
    before.log.options = {"project": "foo"}
    folder = started(tmp_path, before, {"log.options": {}})
    _, log = restore_overrides(folder, config, "a.py", {"log.options": {}})
    assert config.log.options == {} and log == []


def test_entries_are_restored_whatever_they_contain(tmp_path: pathlib.Path) -> None:
    before, config = Config(), Config()
    configs.put(before, "evaluations.plain.flip_tta", False)
    configs.put(before, "evaluations.mirror.flip_tta", True)
    before.log.options = {"tags": {"a": 1}}
    folder = started(tmp_path, before, {"evaluations": {}, "log.options": {}})
    _, log = restore_overrides(folder, config, "a.py", {})
    assert config.evaluations == {"plain": configs.View(), "mirror": configs.View(flip_tta=True)}
    assert config.log.options == {"tags": {"a": 1}}
    assert sorted(log[0].partition(": ")[2].split(", config.")) == [
        "config.evaluations.plain = {}",
        "evaluations.mirror = {'flip_tta': True}",
        "log.options.tags = {'a': 1}",
    ]


def test_overrides_are_restored_only_for_same_experiment(tmp_path: pathlib.Path) -> None:
    folder = overridden(tmp_path)
    other = Config(seed=3)
    assert restore_overrides(folder, other, "b.py", {})[1] == []
    assert other.model.width == 1.0
    # An experiment with another name but the same settings counts as the same.
    copied = Config()
    restore_overrides(folder, copied, "b.py", {})
    assert copied.model.width == 0.5


def test_workdir_without_checkpoint_restores_no_overrides(tmp_path: pathlib.Path) -> None:
    folder = overridden(tmp_path)
    (folder.checkpoints / "5").rmdir()
    config = Config()
    assert restore_overrides(folder, config, "a.py", {})[1] == []
    assert config == Config()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"config": {"seed": "1"}}'])
def test_unreadable_record_is_an_error(text: str, tmp_path: pathlib.Path) -> None:
    folder = start_run(tmp_path, Config())
    folder.config.write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        workdirs.load_previous_run(folder)


def test_json_is_written_atomically(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "result.json"
    atomic.write_json(path, {"top1": 1.5})
    with pytest.raises(TypeError):
        atomic.write_json(path, {"top1": object()})
    assert json.loads(path.read_text()) == {"top1": 1.5}


def test_directory_that_cannot_be_created_is_an_error(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--workdir="):
        workdirs.check_writable(Workdir(tmp_path / "file" / "run"))
    workdirs.check_writable(Workdir(tmp_path / "a" / "b"))
    # Marked as output, as directories of images may be next to it.
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == [".inception_jax"]
