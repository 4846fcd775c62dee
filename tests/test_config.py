import copy
import dataclasses
import json
import pathlib

import pytest

from inception_jax import config as configs
from inception_jax.config import (
    Config,
    Duration,
    Optimizer,
    Schedule,
    Timeline,
    Train,
    View,
    other_names,
    serialization,
)
from inception_jax.errors import ConfigError


def test_the_default_is_valid_and_survives_json() -> None:
    default = Config(schedule=Schedule(name="steps", boundaries=(2.5, 4.0)))
    configs.validate(default)
    assert configs.from_dict(json.loads(json.dumps(configs.to_dict(default)))) == default


def test_configurations_share_no_group() -> None:
    first, second = Config(), Config()
    first.train.batch_size = 7
    first.train.length.epochs = 7
    assert second.train.batch_size == 128
    assert second.train.length.epochs == 60


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("train.batch_size", 0, "at least 1"),
        ("train.batch_size", 2.5, "of type int"),
        ("train.batch_size", True, "of type int"),
        ("model.dropout", 1.0, "less than 1"),
        ("model.width", 0, "more than 0"),
        ("model.width", float("nan"), "finite"),
        ("augment.mix_probability", 1.5, "at most 1"),
        ("augment.policy", "trivialaugmnt", "Did you mean 'trivialaugment'"),
        ("augment.policy_magnitude", 31, "at most 30"),
        ("augment.hue_jitter", 0.6, "at most 0.5"),
        ("model.stem", "s23", "paper, s16, s32. Did you mean 's32'?"),
        ("schedule.boundaries", (1.0, "2"), "of type tuple[float, ...]"),
        ("schedule.boundaries", (3.0, 2.0), "must rise"),
        ("train.length.steps", 5, "give one unit"),
        ("train.length.epochs", 0.0, "more than zero"),
        ("augment.pad", 64, "less than data.image_size = 64"),
        ("data.name", "tiny_imagnet", "Did you mean 'tiny_imagenet'"),
        ("augment.crop", "inception", "set data.storage to 'records', or augment.crop to"),
        ("data.eval_crop", 0.875, "with config.data.storage = 'decoded' it must be 1"),
        ("data.eval_crop", 0.0, "more than 0"),
        ("expected.top1", 50.0, "a figure needs its source"),
        ("evaluation.metrics", ("top1", "top_5"), "Did you mean 'top5'?"),
        ("evaluation.metrics", ("top5",), "must have 'top1', by which the best checkpoint"),
        ("evaluations", {"mine": 3}, "a mapping of names to View"),
        ("evaluations", {"a/b": View()}, "give it a name of letters"),
        ("evaluations", {"mine": View(examples=-1)}, ".mine.examples = -1: must be at least 0"),
        ("evaluations", {"mine": View(size=1.5)}, ".mine.size = 1.5: must be of type int"),
        ("evaluations", {"mine": View(crop=0.5)}, "config.evaluations.mine.crop = 0.5: with"),
        ("evaluations", {"mine": View(every=Duration(1, 2))}, "mine.every has epochs=1 and steps"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(path: str, value: object, words: str) -> None:
    config = Config(schedule=Schedule(name="steps", boundaries=(1.0,)))
    parent, _, name = path.rpartition(".")
    setattr(configs.get(config, parent) if parent else config, name, value)
    with pytest.raises(ConfigError) as error:
        configs.validate(config)
    assert f"config.{path.removesuffix('.steps').removesuffix('.epochs')}" in str(error.value)
    assert words in str(error.value)


def test_mixing_ends_after_one_duration() -> None:
    config = Config()
    config.augment.mix_until = Duration(epochs=3, steps=5)
    with pytest.raises(ConfigError, match=r"augment\.mix_until has epochs=3 and steps=5"):
        configs.validate(config)


def test_original_images_are_cut_where_they_are_streamed() -> None:
    config = Config(data=configs.Data(storage="records", eval_crop=0.875))
    config.augment.crop = "inception"
    configs.validate(config)


def test_all_wrong_values_are_named_at_once() -> None:
    config = Config(train=Train(batch_size=-1), optimizer=Optimizer(name="sdg"))
    with pytest.raises(ConfigError, match=r"batch_size(.|\n)*optimizer\.name"):
        configs.validate(config)


def test_settings_that_a_model_does_not_have_are_refused() -> None:
    config = Config()
    config.model.name, config.model.stem, config.model.aux_heads = "mini_googlenet", "s16", True
    with pytest.raises(ConfigError, match=r"model\.stem(.|\n)*aux_heads"):
        configs.validate(config)


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        (Schedule(name="steps"), "boundaries"),
        (
            Schedule(name="steps", boundaries=(1.0, 2.5), boundaries_unit="steps"),
            r"boundaries = \(1.0, 2.5\): must be whole",
        ),
        (Schedule(name="exponential"), "decay_every"),
    ],
)
def test_schedules_need_their_settings(schedule: Schedule, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        configs.validate(Config(schedule=schedule))


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("train.batchsize", "train.batch_size"),
        ("learning_rate", "schedule.learning_rate"),
        ("optimizer.learning_rate", "schedule.learning_rate"),
        # The names of timm, torchvision, Keras and Lightning.
        ("lr", "schedule.learning_rate"),
        ("train.lr", "schedule.learning_rate"),
        ("optimizer.lr", "schedule.learning_rate"),
        ("epochs", "train.length.epochs"),
        ("train.epochs", "train.length.epochs"),
        ("max_epochs", "train.length.epochs"),
        ("steps", "train.length.steps"),
        ("batch_size", "train.batch_size"),
        ("batch-size", "train.batch_size"),
        ("bs", "train.batch_size"),
        ("weight_decay", "optimizer.weight_decay"),
        ("train.wd", "optimizer.weight_decay"),
        ("opt", "optimizer.name"),
        ("sched", "schedule.name"),
        ("warmup_epochs", "schedule.warmup.epochs"),
        ("mixup", "augment.mixup"),
        ("smoothing", "train.label_smoothing"),
        ("model_ema_decay", "train.ema.steps"),
        ("grad_accum_steps", "train.accumulate"),
        ("drop_rate", "model.dropout"),
        ("crop_pct", "data.eval_crop"),
        ("workers", "data.workers"),
        ("num_workers", "data.workers"),
        ("data_dir", "data.source"),
        ("img_size", "data.image_size"),
        ("amp", "model.dtype"),
        ("pretrained", "init.weights"),
        ("val_batch_size", "evaluation.batch_size"),
        ("evaluation.epochs", "evaluation.every.epochs"),
        ("LR", "schedule.learning_rate"),
    ],
)
def test_an_unknown_field_gets_the_nearest(path: str, hint: str) -> None:
    assert f"Did you mean {hint!r}" in configs.unknown_field(path)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("resume", "give the same --workdir"),
        ("train.patience", "There is no early stopping"),
        ("output_dir", "--workdir=DIR"),
        ("device", "--platform=cpu, gpu or tpu"),
        ("num_classes", "The data set says"),
    ],
)
def test_what_needs_no_setting_is_said(path: str, words: str) -> None:
    assert words in configs.unknown_field(path)


def test_names_of_other_trainers_stand_for_settings_there_are() -> None:
    paths = {path for path, _, _ in configs.leaves()}
    assert set(other_names.SETTING_OF.values()) <= paths
    ends = {path.rpartition(".")[2] for path in paths} - {"epochs", "steps"}
    assert not ends & (other_names.SETTING_OF.keys() | other_names.ANSWER_TO.keys())


def test_what_a_program_assigns_beside_the_settings_is_refused() -> None:
    config = Config()
    config.train.lr = 0.1  # type: ignore[attr-defined]
    config.train.length.epoch = 3  # type: ignore[attr-defined]
    with pytest.raises(ConfigError) as error:
        configs.validate(config)
    assert "config.train.lr: there is no such setting" in str(error.value)
    assert "Did you mean 'train.length.epochs'" in str(error.value)


def test_a_group_is_no_setting() -> None:
    with pytest.raises(ConfigError, match=r"give one of train\.length\.epochs, train\.length\.ex"):
        configs.check_path("train.length")


def test_an_unknown_field_of_a_record_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"config\.train\.rate"):
        configs.from_dict({"train": {"rate": 1}})


def test_settings_of_another_version_are_named_and_left_out() -> None:
    values = configs.to_dict(Config(seed=3))
    values["train"]["rate"] = 1
    values["spare"] = {"time": {"much": True}}
    values["train"]["length"]["epochs"] = "many"
    found, notes = configs.read_settings(values)
    assert found == Config(seed=3)
    assert notes == [
        "config.train.length.epochs = 'many': must be of type float; the default is taken, 60",
        "config.train.rate = 1: no setting of this version; it is left out",
        "config.spare.time.much = True: no setting of this version; it is left out",
    ]


def test_a_wrong_type_that_decides_on_the_network_is_no_default() -> None:
    with pytest.raises(ConfigError, match=r"config\.model\.width = '1': must be of type float"):
        configs.read_settings({"model": {"width": "1"}})


def test_what_was_recorded_is_not_held_against_todays_rules() -> None:
    found, notes = configs.read_settings(
        {"schedule": {"name": "gone"}, "model": {"name": "lost", "dropout": 3.0}}
    )
    assert (found.schedule.name, found.model.name, found.model.dropout) == ("gone", "lost", 3.0)
    assert not notes


def test_groups_of_a_mapping_are_read_tolerantly_too() -> None:
    notes: list[str] = []
    found = serialization._without_strangers(
        "evaluations",
        {"half": {"epochs": 2, "days": 3, "steps": "x"}, "all": 7},
        dict[str, Duration],
        notes,
    )
    assert found == {"half": {"epochs": 2}, "all": {}}
    assert [note.partition(":")[0] for note in notes] == [
        "config.evaluations.half.days = 3",
        "config.evaluations.half.steps = 'x'",
        "config.evaluations.all. = 7",
    ]


def test_renamed_settings_are_read_by_their_names_of_today(monkeypatch: pytest.MonkeyPatch) -> None:
    def duration(value: dict[str, float]) -> dict[str, float]:
        """schedule.warmup, in epochs."""
        return {"schedule.warmup.epochs": value["count"] / value["per"]}

    monkeypatch.setitem(configs.RENAMED, "train.parts", "train.accumulate")
    monkeypatch.setitem(configs.RENAMED, "head", "model")
    monkeypatch.setitem(configs.RENAMED, "train.rise", duration)
    monkeypatch.setitem(configs.RENAMED, "own.depth", "model.options.depth")
    monkeypatch.setitem(
        configs.RENAMED, "data.image_size", lambda size: {"data.image_size": 2 * size}
    )
    found, notes = configs.read_settings(
        {
            "train": {"parts": 4, "rise": {"count": 12, "per": 4}},
            "head": {"width": 0.5},
            "own": {"depth": 3},
            "data": {"image_size": 24},
        }
    )
    assert not notes
    assert (found.train.accumulate, found.model.width, found.data.image_size) == (4, 0.5, 48)
    assert found.schedule.warmup == Duration(epochs=3.0)
    assert found.model.options == {"depth": 3}

    _, notes = configs.read_settings({"train": {"parts": 4, "accumulate": 2}})
    assert notes == ["config.train.parts = 4: is config.train.accumulate now, which is there too"]
    for old, new in (
        ("train.parts", "'train.accumulate'"),
        ("parts", "'train.accumulate'"),
        ("head.width", "'model.width'"),
        ("train.rise.count", "schedule.warmup, in epochs"),
    ):
        assert f"there is no such setting. It is {new} now." in configs.unknown_field(old)


def test_no_renamed_setting_is_one_of_today() -> None:
    known = {path for path, _, _ in configs.leaves()}
    for old, new in configs.RENAMED.items():
        if isinstance(new, str):
            assert old not in known, old
            assert any(f"{path}.".startswith(f"{new}.") for path in known), new
        else:
            assert new.__doc__, old


def test_a_record_is_read_with_the_experiments_own_values(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(configs.RENAMED, "train.parts", "train.accumulate")
    values = configs.to_dict(Config(seed=3))
    values["train"] |= {"parts": 4}
    del values["train"]["accumulate"]
    own = {"train.parts": 2, "seed": 0, "model.gate": "sigmoid"}
    record = {"config": values, "experiment": {"file": "a.py", "own": own}, "dataset": {"a": 1}}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(record))
    found = configs.read_record(path)
    assert found.config.train.accumulate == 4
    assert found.experiment == {"file": "a.py", "own": {"seed": 0, "train.accumulate": 2}}
    assert (found.dataset, found.changes, found.notes) == ({"a": 1}, [], [])


def test_a_run_goes_on_with_what_its_start_allowed() -> None:
    recorded = Config()
    recorded.train.aux_weight, recorded.schedule.learning_rate = -2.0, -1.0
    found = configs.validate(copy.deepcopy(recorded), recorded=recorded)
    assert {line.partition(":")[0] for line in found} == {
        "config.train.aux_weight = -2.0",
        "config.schedule.learning_rate = -1.0",
    }
    with pytest.raises(ConfigError, match="aux_weight"):
        configs.validate(recorded)
    # Without a part that it names it could not go on.
    gone = Config()
    gone.schedule.name = "gone"
    with pytest.raises(ConfigError, match="gone"):
        configs.validate(gone, recorded=copy.deepcopy(gone))
    changed = copy.deepcopy(recorded)
    changed.schedule.learning_rate = -2.0
    with pytest.raises(ConfigError, match=r"^config\.schedule\.learning_rate = -2\.0: [^\n]*$"):
        configs.validate(changed, recorded=recorded)


def test_options_are_equal_whether_read_back_or_given() -> None:
    old, new = Config(), Config()
    new.model.options = {"sizes": [1, 2]}
    recorded, _ = configs.read_settings(json.loads(json.dumps(configs.to_dict(new))))
    given = Config()
    configs.put(given, "model.options.sizes", (1, 2))
    assert configs.changes(recorded, given) == configs.changes(new, given) == ([], [])
    assert configs.changes(old, given)[0] == ["config.model.options.sizes: None → (1, 2)"]


def test_changes_are_split_into_refused_and_allowed() -> None:
    old, new = Config(), Config(seed=1)
    new.model.stem = "s32"
    new.schedule.learning_rate = 0.2
    new.train.length = Duration(epochs=90)
    refused, allowed = configs.changes(old, new)
    assert refused == ["config.seed: 0 → 1", "config.model.stem: 'paper' → 's32'"]
    assert allowed == [
        "config.schedule.learning_rate: 0.1 → 0.2",
        "config.train.length.epochs: 60 → 90",
    ]


def test_an_average_can_change_its_length_but_not_appear() -> None:
    old, new = Config(), Config()
    new.train.ema = Duration(steps=10)
    assert configs.changes(old, new)[0] == ["config.train.ema: none → 10 steps"]
    old.train.ema = Duration(steps=20)
    assert configs.changes(old, new) == ([], ["config.train.ema.steps: 20 → 10"])


def test_each_field_has_a_meaning_and_shows_in_the_help() -> None:
    text = configs.describe(Config())
    for path, _, field in configs.leaves():
        assert field.metadata["help"]
        assert f"--config.{path}=" in text


def test_evaluations_are_put_by_name_and_survive_json() -> None:
    config = Config()
    for path, value in (("flip_tta", True), ("split", "train"), ("every.steps", 5)):
        configs.check_path(f"evaluations.mine.{path}")
        configs.put(config, f"evaluations.mine.{path}", value)
    assert config.evaluations == {
        "mine": View(split="train", flip_tta=True, every=Duration(steps=5))
    }
    configs.validate(config)
    again = configs.from_dict(json.loads(json.dumps(configs.to_dict(config))))
    assert again == config and again.evaluations["mine"] is not config.evaluations["mine"]
    assert configs.shared(config) == json.loads(json.dumps(configs.shared(config)))
    assert configs.changes(Config(), config)[0] == []
    (change,) = configs.changes(Config(), config)[1]
    assert change.startswith("config.evaluations.mine: None → View(split='train'")
    with pytest.raises(
        ConfigError, match=r"Did you mean 'flip_tta'\? .* has split, examples, crop"
    ):
        configs.check_path("evaluations.mine.flip")
    with pytest.raises(ConfigError, match=r"config\.evaluations\.mine has split"):
        configs.check_path("evaluations.mine")
    assert "--config.evaluations.NAME.flip_tta=False" in configs.describe(Config())


def test_the_short_settings_stand_for_evaluations() -> None:
    config = Config()
    assert configs.views(config) == {}
    config.evaluation.flip, config.evaluation.train_examples = True, 70
    config.evaluations["flip"] = View(flip_tta=True, size=32)
    assert configs.views(config) == {
        "train_eval": View(split="train", examples=70),
        "flip": View(flip_tta=True, size=32),
    }


def test_timeline_in_each_unit() -> None:
    timeline = Timeline(batch_size=32, train_examples=100)
    assert timeline.steps(Duration(epochs=2)) == 7  # 200 / 32 = 6.25
    assert timeline.steps(Duration(steps=5)) == 5
    assert timeline.steps(Duration(examples=64)) == 2
    assert timeline.steps(Duration(examples=65)) == 3
    assert timeline.steps(Duration()) == 0
    assert timeline.epoch(25) == 8.0


def test_timeline_is_due_once_a_period() -> None:
    timeline = Timeline(batch_size=32, train_examples=100)
    due = [step for step in range(1, 14) if timeline.due(Duration(epochs=1), step)]
    # The first step by which 100, 200, 300, 400 examples were seen.
    assert due == [4, 7, 10, 13]
    assert [s for s in range(1, 10) if timeline.due(Duration(steps=3), s)] == [3, 6, 9]
    # A period of less than a step is due at each.
    assert all(timeline.due(Duration(examples=10), step) for step in range(1, 10))


def test_the_reading_of_tenths_of_epochs_is_exact() -> None:
    timeline = Timeline(batch_size=1, train_examples=10)
    due = [step for step in range(1, 21) if timeline.due(Duration(epochs=0.1), step)]
    assert due == list(range(1, 21))


def test_groups_are_dataclasses_all_the_way() -> None:
    assert all(
        dataclasses.is_dataclass(getattr(Config(), field.name))
        or field.name in ("name", "seed", "evaluations")
        for field in dataclasses.fields(Config)
    )


@pytest.mark.parametrize(
    ("sizes", "epochs", "message"),
    [
        ((32, 64), (), "an entry for each of train.image_sizes"),
        ((), (3.0,), "an entry for each of train.image_sizes"),
        ((16, 32, 64), (3.0, 2.0), "must rise from each to the next"),
        ((4,), (), "must be at least 8"),
        ((32, 64), (60.0,), r"image_size_epochs = \(60\.0,\): .*train\.length\.epochs = 60, "),
        ((32, 48, 64), (3.0, 70.0), r"image_size_epochs = \(3\.0, 70\.0\).* never reached"),
    ],
)
def test_progressive_sizes_that_do_not_fit_are_refused(
    sizes: tuple[int, ...], epochs: tuple[float, ...], message: str
) -> None:
    config = Config()
    config.train.image_sizes, config.train.image_size_epochs = sizes, epochs
    with pytest.raises(ConfigError, match=message):
        configs.validate(config)


def test_progressive_sizes_and_heads_that_depend_on_the_size_are_refused() -> None:
    config = Config()
    config.train.image_sizes, config.model.aux_heads = (32,), True
    with pytest.raises(ConfigError, match="auxiliary heads"):
        configs.validate(config)


def test_hosts_share_all_settings_but_where_their_data_are() -> None:
    one, other = Config(), Config()
    other.data.directory, other.data.source, other.data.workers = "/disk", "a.zip", 8
    assert configs.shared(one) == configs.shared(other)
    other.train.batch_size = 64
    assert configs.shared(one) != configs.shared(other)
    assert configs.shared(other)["config.train.batch_size"] == 64
