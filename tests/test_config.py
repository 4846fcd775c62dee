import ast
import copy
import dataclasses
import json
import pathlib

import pytest

from inception_jax import config as configs
from inception_jax.config import (
    Config,
    Optimizer,
    Schedule,
    Timeline,
    Train,
    View,
    other_names,
    reference,
    serialization,
)
from inception_jax.errors import ConfigError


def test_default_config_is_valid_and_round_trips_through_json() -> None:
    default = Config(schedule=Schedule(name="steps", boundaries=("2.5 epochs", "4 epochs")))
    configs.validate(default)
    assert configs.from_dict(json.loads(json.dumps(configs.to_dict(default)))) == default


def test_configs_do_not_share_groups() -> None:
    first, second = Config(), Config()
    first.train.batch_size = 7
    assert second.train.batch_size == 128


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
        ("augment.policy", "trivialaugmnt", "Did you mean trivialaugment"),
        ("augment.policy_magnitude", 31, "at most 30"),
        ("augment.hue_jitter", 0.6, "at most 0.5"),
        ("model.stem", "s23", "paper, s16, s32. Did you mean s32?"),
        ("schedule.boundaries", ("1 epoch", 2), "of type tuple[str, ...]"),
        ("schedule.boundaries", ("3 epochs", "2 epochs"), "must increase from one to the next"),
        ("schedule.boundaries", ("3 epochs", ""), "must increase from one to the next"),
        ("schedule.boundaries", ("3 epochs", "40 steps"), "must all have the same unit"),
        ("train.duration", "", "must be a duration such as '20 epochs'"),
        ("train.duration", "0 epochs", "must be a duration such as '20 epochs'"),
        ("train.duration", "20", "the unit is missing"),
        ("train.duration", "20 hours", "must be a duration such as"),
        ("train.ema", "2.5 steps", "must be a whole number of steps"),
        ("log.every", "-2 steps", "must not be negative"),
        ("log.every", "1e999 epochs", "must be finite"),
        ("log.every", "1e-7 epochs", "must be at least 1e-06 epochs"),
        ("seed", 2**32, "must be at most 4294967295"),
        ("augment.pad", 64, "less than data.image_size = 64"),
        ("data.name", "tiny_imagnet", "Did you mean tiny_imagenet"),
        ("augment.crop", "inception", "set data.storage to 'records', or augment.crop to"),
        ("data.eval_crop_pct", 0.875, "must be 1 with config.data.storage = 'decoded'"),
        ("data.eval_crop_pct", 0.0, "more than 0"),
        ("model.norm_group_size", 48, "must divide the 128 images of a batch; set it to 32 or 64"),
        ("model.norm_group_size", 256, "set it to 128"),
        ("expected.top1", 50.0, "needs a source"),
        ("optimizer.norm_bias_lr_ratio", 0.0, "more than 0"),
        ("evaluation.metrics", ("top1", "top_5"), "Did you mean top5?"),
        ("evaluation.metrics", ("top5",), "must contain 'top1', which selects the best"),
        ("evaluations", {"mine": 3}, "a mapping of names to View"),
        ("evaluations", {"a/b": View()}, "use letters, digits"),
        ("evaluations", {"mine": View(examples=-1)}, ".mine.examples = -1: must be at least 0"),
        ("evaluations", {"mine": View(size=1.5)}, ".mine.size = 1.5: must be of type int"),
        (
            "evaluations",
            {"mine": View(crop=0.5)},
            "mine.crop = 0.5: must be 0 or 1",
        ),
        (
            "evaluations",
            {"mine": View(shift_tta=64)},
            "shift_tta = 64: must be less than",
        ),
        ("evaluations", {"mine": View(every="1")}, ".mine.every = '1': must be a duration"),
    ],
)
def test_invalid_value_is_reported_with_allowed_values(
    path: str, value: object, words: str
) -> None:
    config = Config(schedule=Schedule(name="steps", boundaries=("1 epoch",)))
    parent, _, name = path.rpartition(".")
    setattr(configs.get(config, parent) if parent else config, name, value)
    with pytest.raises(ConfigError) as error:
        configs.validate(config)
    assert f"config.{path}" in str(error.value)
    assert words in str(error.value)


def test_inception_crop_is_allowed_with_records_storage() -> None:
    config = Config(data=configs.Data(storage="records", eval_crop_pct=0.875))
    config.augment.crop = "inception"
    configs.validate(config)


def test_groups_for_batch_norm_are_parts_of_a_micro_batch() -> None:
    config = Config(train=Train(batch_size=96, grad_accum_steps=4))
    config.model.norm_group_size = 12
    configs.validate(config)
    config.model.norm_group_size = 32
    words = r"norm_group_size = 32: must divide the 24 images of a micro-batch .*set it to 24$"
    with pytest.raises(ConfigError, match=words):
        configs.validate(config)
    # The batch size will be chosen for the data.
    config.train.auto_size, config.train.batch_size = True, 0
    configs.validate(config)


def test_all_invalid_values_are_reported_together() -> None:
    config = Config(train=Train(batch_size=-1), optimizer=Optimizer(name="sdg"))
    with pytest.raises(ConfigError, match=r"batch_size(.|\n)*optimizer\.name"):
        configs.validate(config)


def test_settings_unused_by_the_model_are_refused() -> None:
    config = Config()
    config.model.name, config.model.stem, config.model.aux_heads = "mini_googlenet", "s16", True
    with pytest.raises(ConfigError, match=r"model\.stem(.|\n)*aux_heads"):
        configs.validate(config)


@pytest.mark.parametrize(
    ("path", "value", "other", "words"),
    [
        ("init.whiten", True, "init.pretrained='x.safetensors'", "must be False"),
        ("init.identity_convs", True, "init.pretrained='x.safetensors'", "must be False"),
        ("optimizer.sam_rho", 0.1, "init.whiten=True", "must be 0"),
        ("init.whiten_bias", "3 epochs", "init.whiten=False", "needs config.init.whiten"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(
    path: str, value: object, other: str, words: str
) -> None:
    config = Config()
    configs.put(config, path, value)
    if path != "init.whiten_bias":
        configs.validate(config)
    name, _, text = other.partition("=")
    configs.put(config, name, ast.literal_eval(text))
    with pytest.raises(ConfigError, match=rf"config\.{path} = .*{words}"):
        configs.validate(config)


def test_alternating_flips_need_flips() -> None:
    config = Config()
    config.augment.alternating_flip = True
    configs.validate(config)
    config.augment.flip = False
    with pytest.raises(ConfigError, match=r"alternating_flip = True: needs config\.augment\.flip;"):
        configs.validate(config)


@pytest.mark.parametrize(
    ("path", "value", "off"),
    [
        ("optimizer.norm_bias_lr_ratio", 64.0, 1),
        ("model.norm_group_size", 64, 0),
        ("evaluation.norm_examples", 1000, 0),
    ],
)
def test_settings_of_batch_norm_need_it(path: str, value: float, off: int) -> None:
    config = Config()
    configs.put(config, path, value)
    configs.validate(config)
    config.model.norm = "lrn"
    with pytest.raises(ConfigError, match=rf"{path} = {value:g}: must be {off} with .*'lrn'"):
        configs.validate(config)


def test_evaluations_of_the_same_name_are_refused() -> None:
    config = Config(evaluations={"flip": View(flip_tta=True)})
    configs.validate(config)
    config.evaluation.flip_tta = True
    with pytest.raises(ConfigError, match=r"evaluation\.flip_tta = True: .* named 'flip'"):
        configs.validate(config)


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        (Schedule(name="steps"), "boundaries"),
        (Schedule(name="steps", boundaries=("1 step", "2.5 steps")), "must be a whole number"),
        (Schedule(name="exponential"), "decay_period"),
    ],
)
def test_schedules_require_their_settings(schedule: Schedule, words: str) -> None:
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
        ("epochs", "train.duration='20 epochs'"),
        ("train.epochs", "train.duration='20 epochs'"),
        ("max_epochs", "train.duration='20 epochs'"),
        ("steps", "train.duration='1000 steps'"),
        ("batch_size", "train.batch_size"),
        ("batch-size", "train.batch_size"),
        ("bs", "train.batch_size"),
        ("weight_decay", "optimizer.weight_decay"),
        ("train.wd", "optimizer.weight_decay"),
        ("opt", "optimizer.name"),
        ("sched", "schedule.name"),
        ("warmup_epochs", "schedule.warmup='5 epochs'"),
        ("mixup", "augment.mixup"),
        ("smoothing", "train.label_smoothing"),
        ("model_ema_decay", "train.ema='1000 steps'"),
        ("grad_accum_steps", "train.grad_accum_steps"),
        ("drop_rate", "model.dropout"),
        ("crop_pct", "data.eval_crop_pct"),
        ("workers", "data.workers"),
        ("num_workers", "data.workers"),
        ("data_dir", "data.source"),
        ("img_size", "data.image_size"),
        ("amp", "model.dtype"),
        ("pretrained", "init.pretrained"),
        ("val_batch_size", "evaluation.batch_size"),
        ("evaluation.epochs", "train.duration"),
        ("LR", "schedule.learning_rate"),
    ],
)
def test_unknown_setting_gets_a_suggestion(path: str, hint: str) -> None:
    assert f"Did you mean {hint}" in configs.unknown_field(path)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("resume", "with the same --workdir"),
        ("train.patience", "Early stopping is not supported"),
        ("output_dir", "--workdir=DIR"),
        ("device", "--platform=cpu, gpu or tpu"),
        ("num_classes", "comes from the data set"),
    ],
)
def test_unsupported_names_are_explained(path: str, words: str) -> None:
    assert words in configs.unknown_field(path)


def test_names_of_other_trainers_map_to_existing_settings() -> None:
    paths = {path for path, _, _ in configs.leaves()}
    assert {path.partition("=")[0] for path in other_names.SETTING_OF.values()} <= paths
    ends = {path.rpartition(".")[2] for path in paths}
    assert not ends & (other_names.SETTING_OF.keys() | other_names.ANSWER_TO.keys())


def test_unknown_attributes_are_refused() -> None:
    config = Config()
    config.train.lr = 0.1  # type: ignore[attr-defined]
    with pytest.raises(ConfigError) as error:
        configs.validate(config)
    assert "config.train.lr: no such setting. Did you mean schedule.lear" in str(error.value)


def test_a_group_is_not_a_setting() -> None:
    with pytest.raises(ConfigError, match=r"give one of init\.identity_convs, init\.pre"):
        configs.check_path("init")


def test_from_dict_refuses_unknown_settings() -> None:
    with pytest.raises(ConfigError, match=r"config\.train\.rate"):
        configs.from_dict({"train": {"rate": 1}})


def test_settings_unknown_to_this_version_are_logged_and_ignored() -> None:
    values = configs.to_dict(Config(seed=3))
    values["train"]["rate"] = 1
    values["spare"] = {"time": {"much": True}}
    values["train"]["duration"] = 7
    found, notes = configs.read_settings(values)
    assert found == Config(seed=3)
    assert notes == [
        "config.train.duration = 7: must be of type str; the default is used, '60 epochs'",
        "config.train.rate = 1: ignored, because this version has no such setting",
        "config.spare.time.much = True: ignored, because this version has no such setting",
    ]


def test_wrong_type_of_a_structural_setting_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"config\.model\.width = '1': must be of type float"):
        configs.read_settings({"model": {"width": "1"}})


def test_read_settings_does_not_validate() -> None:
    found, notes = configs.read_settings(
        {"schedule": {"name": "gone"}, "model": {"name": "lost", "dropout": 3.0}}
    )
    assert (found.schedule.name, found.model.name, found.model.dropout) == ("gone", "lost", 3.0)
    assert not notes


def test_unknown_settings_inside_mappings_are_ignored() -> None:
    notes: list[str] = []
    found = serialization._without_unknown(
        "evaluations",
        {"half": {"examples": 2, "days": 3, "crop": "x"}, "all": 7},
        dict[str, View],
        notes,
    )
    assert found == {"half": {"examples": 2}, "all": {}}
    assert [note.partition(":")[0] for note in notes] == [
        "config.evaluations.half.days = 3",
        "config.evaluations.half.crop = 'x'",
        "config.evaluations.all. = 7",
    ]


def test_settings_of_revision_56edb8b_are_read_under_todays_names() -> None:
    none = {"epochs": 0.0, "steps": 0, "examples": 0}
    found, notes = configs.read_settings(
        {
            "data": {"eval_share": 0.3, "unreadable": "skip", "eval_crop": 0.9},
            "augment": {"area_min": 0.2, "aspect_max": 2.0, "mix_until": none | {"steps": 7}},
            "model": {"five_by_five": "3x3"},
            "optimizer": {"adam_rate_factor": 0.1, "decay_all": True},
            "schedule": {
                "warmup": none | {"epochs": 2.5},
                "boundaries": [10.0, 20.0],
                "boundaries_unit": "steps",
                "decay": 0.2,
                "decay_every": none | {"examples": 100},
                "end_factor": 0.1,
            },
            "init": {"weights": "a.safetensors"},
            "train": {
                "length": none | {"epochs": 20.0},
                "accumulate": 4,
                "image_sizes": [16, 32],
                "image_size_epochs": [1.5],
                "ema": none,
                "nonfinite": "skip",
            },
            "evaluation": {"every": none | {"steps": 1}, "flip": True, "train_examples": 9},
            "evaluations": {"mine": {"every": none | {"epochs": 1.0}}},
            "watch": {"host_silence": 10.0},
        }
    )
    assert not notes
    assert found == Config(
        data=configs.Data(val_fraction=0.3, on_unreadable="skip", eval_crop_pct=0.9),
        augment=configs.Augment(crop_scale_min=0.2, crop_ratio_max=2.0, mix_end="7 steps"),
        model=configs.Model(conv5x5="3x3"),
        optimizer=Optimizer(muon_adam_lr_ratio=0.1, decay_norm_and_bias=True),
        schedule=Schedule(
            warmup="2.5 epochs",
            boundaries=("10 steps", "20 steps"),
            decay_rate=0.2,
            decay_period="100 examples",
            final_lr_ratio=0.1,
        ),
        init=configs.Init(pretrained="a.safetensors"),
        train=Train(
            duration="20 epochs",
            grad_accum_steps=4,
            image_sizes=(16, 32),
            image_size_boundaries=("1.5 epochs",),
            on_nonfinite="skip",
        ),
        evaluation=configs.Evaluation(every="1 step", flip_tta=True, train_eval_examples=9),
        evaluations={"mine": View(every="1 epoch")},
        watch=configs.Watch(heartbeat_timeout_seconds=10.0),
    )


def test_todays_settings_are_read_as_they_are() -> None:
    config = Config(train=Train(duration="7 steps", ema="2 epochs"))
    config.schedule.boundaries = ("1 epoch",)
    config.evaluations["mine"] = View(every="3 steps")
    assert configs.read_settings(json.loads(json.dumps(configs.to_dict(config)))) == (config, [])


@pytest.mark.parametrize(
    ("lookahead", "average", "expected"),
    [("5 steps", "", "5 steps"), ("", "1 epoch", "1 epoch"), ("", "", "")],
)
def test_recorded_lookahead_is_read_as_an_average(
    lookahead: str, average: str, expected: str
) -> None:
    found, notes = configs.read_settings({"train": {"lookahead": lookahead, "ema": average}})
    assert (found.train.ema, notes) == (expected, [])


def test_a_setting_recorded_under_both_names_keeps_the_new_one() -> None:
    found, notes = configs.read_settings({"train": {"accumulate": 4, "grad_accum_steps": 2}})
    assert found.train.grad_accum_steps == 2
    assert notes == [
        "config.train.accumulate = 4: ignored, because config.train.grad_accum_steps is set too"
    ]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("train.lookahead", "train.ema='1 epoch'"),
        ("train.accumulate", "train.grad_accum_steps"),
        ("accumulate", "train.grad_accum_steps"),
        ("train.length.epochs", "train.duration='20 epochs'"),
        ("length", "train.duration='20 epochs'"),
        ("evaluation.every.steps", "evaluation.every='1 epoch'"),
        ("schedule.boundaries_unit", "schedule.boundaries='30 epochs,60 epochs'"),
    ],
)
def test_old_name_gets_the_new_one_as_suggestion(old: str, new: str) -> None:
    assert f"no such setting. It was renamed; use {new}." in configs.unknown_field(old)


def test_old_name_that_another_setting_has_today_suggests_that_setting() -> None:
    assert configs.did_you_mean("flip", "--config.") == " Did you mean --config.augment.flip?"
    assert configs.did_you_mean("evaluation.flip") == " It was renamed; use evaluation.flip_tta."


def test_renamed_settings_map_to_existing_ones() -> None:
    known = {path for path, _, _ in configs.leaves()} | {"evaluations.*.every"}
    for old, new in configs.RENAMED.items():
        assert new.path in known or (not new.path and new.example), old
        assert old not in known or new.path == old, old


def test_record_includes_the_experiments_own_values(tmp_path: pathlib.Path) -> None:
    values = configs.to_dict(Config(seed=3))
    del values["train"]["grad_accum_steps"]
    values["train"]["accumulate"] = 4
    own = {"train.accumulate": 2, "seed": 0, "model.gate": "sigmoid"}
    record = {"config": values, "experiment": {"file": "a.py", "own": own}, "dataset": {"a": 1}}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(record))
    found = configs.read_record(path)
    assert found.config.train.grad_accum_steps == 4
    assert found.experiment == {"file": "a.py", "own": {"seed": 0, "train.grad_accum_steps": 2}}
    assert (found.dataset, found.changes, found.notes) == ({"a": 1}, [], [])


def test_resumed_run_may_keep_settings_that_are_now_invalid() -> None:
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


def test_options_compare_equal_after_a_json_round_trip() -> None:
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
    new.train.duration = "90 epochs"
    refused, allowed = configs.changes(old, new)
    assert refused == ["config.seed: 0 → 1", "config.model.stem: 'paper' → 's32'"]
    assert allowed == [
        "config.schedule.learning_rate: 0.1 → 0.2",
        "config.train.duration: '60 epochs' → '90 epochs'",
    ]


def test_ema_may_change_its_duration_but_not_be_added() -> None:
    old, new = Config(), Config()
    new.train.ema = "10 steps"
    assert configs.changes(old, new)[0] == ["config.train.ema: '' → '10 steps'"]
    old.train.ema = "20 steps"
    assert configs.changes(old, new) == ([], ["config.train.ema: '20 steps' → '10 steps'"])


def test_every_setting_is_in_the_help_and_the_reference() -> None:
    text, page = reference.help_text(Config()), reference.page()
    for path, _, field in configs.leaves():
        assert field.metadata["help"]
        if configs.entry_group(path) is None:
            name = f"{path}.NAME" if configs.is_mapping(path) else path
            assert f"--config.{name}=" in text
            assert f"| `{path}`" in page


def test_help_shows_an_experiments_values_with_the_defaults() -> None:
    text = reference.help_text(Config(train=Train(duration="7 steps")), is_default=False)
    assert "--config.train.duration='7 steps'   (default: '60 epochs')" in text
    assert "--config.train.batch_size=128\n" in text


@pytest.mark.parametrize("text", ["2.5 epochs", "2.5epochs", " 2.5 EPOCHS ", "25e-1 epoch"])
def test_equivalent_spellings_of_a_duration(text: str) -> None:
    assert configs.parse_duration(text) == configs.Duration(2.5, "epochs")
    old, new = Config(train=Train(duration=text)), Config(train=Train(duration="2.5 epochs"))
    assert configs.changes(old, new) == ([], [])


def test_evaluations_are_set_by_name_and_round_trip_through_json() -> None:
    config = Config()
    for path, value in (("flip_tta", True), ("split", "train"), ("every", "5 steps")):
        configs.check_path(f"evaluations.mine.{path}")
        configs.put(config, f"evaluations.mine.{path}", value)
    assert config.evaluations == {"mine": View(split="train", flip_tta=True, every="5 steps")}
    configs.validate(config)
    again = configs.from_dict(json.loads(json.dumps(configs.to_dict(config))))
    assert again == config and again.evaluations["mine"] is not config.evaluations["mine"]
    assert configs.shared(config) == json.loads(json.dumps(configs.shared(config)))
    assert configs.changes(Config(), config)[0] == []
    (change,) = configs.changes(Config(), config)[1]
    assert change.startswith("config.evaluations.mine: None → View(split='train'")
    with pytest.raises(ConfigError, match=r"Did you mean flip_tta\? .* has split, examples, crop"):
        configs.check_path("evaluations.mine.flip")
    with pytest.raises(ConfigError, match=r"config\.evaluations\.mine has split"):
        configs.check_path("evaluations.mine")
    assert "--config.evaluations.NAME.flip_tta=False" in reference.help_text(Config())


def test_shorthand_settings_add_evaluations() -> None:
    config = Config()
    assert configs.views(config) == {}
    config.evaluation.flip_tta, config.evaluation.train_eval_examples = True, 70
    config.evaluations["flip"] = View(flip_tta=True, size=32)
    assert configs.views(config) == {
        "train_eval": View(split="train", examples=70),
        "flip": View(flip_tta=True, size=32),
    }


def test_timeline_in_each_unit() -> None:
    timeline = Timeline(batch_size=32, train_examples=100)
    assert timeline.steps("2 epochs") == 7  # 200 / 32 = 6.25
    assert timeline.steps("5 steps") == 5
    assert timeline.steps("64 examples") == 2
    assert timeline.steps("65 examples") == 3
    assert timeline.steps("") == 0
    assert timeline.epoch(25) == 8.0


def test_timeline_is_due_once_per_period() -> None:
    timeline = Timeline(batch_size=32, train_examples=100)
    due = [step for step in range(1, 14) if timeline.due("1 epoch", step)]
    # The first step by which 100, 200, 300, 400 examples were seen.
    assert due == [4, 7, 10, 13]
    assert [s for s in range(1, 10) if timeline.due("3 steps", s)] == [3, 6, 9]
    # A period of less than a step is due at each.
    assert all(timeline.due("10 examples", step) for step in range(1, 10))


def test_tenths_of_epochs_are_exact() -> None:
    timeline = Timeline(batch_size=1, train_examples=10)
    due = [step for step in range(1, 21) if timeline.due("0.1 epochs", step)]
    assert due == list(range(1, 21))


def test_groups_are_dataclasses() -> None:
    assert all(
        dataclasses.is_dataclass(getattr(Config(), field.name))
        or field.name in ("name", "seed", "evaluations")
        for field in dataclasses.fields(Config)
    )


@pytest.mark.parametrize(
    ("sizes", "boundaries", "message"),
    [
        ((32, 64), (), "one entry for each of train.image_sizes"),
        ((), ("3 epochs",), "one entry for each of train.image_sizes"),
        ((16, 32, 64), ("3 epochs", "2 epochs"), "must increase from one to the next"),
        ((4,), (), "must be at least 8"),
        ((32, 64), ("60 epochs",), r"would never be used.*train\.duration = '60 epochs'; "),
        ((32, 48, 64), ("3 epochs", "70 epochs"), "would never be used"),
    ],
)
def test_invalid_progressive_resizing_is_refused(
    sizes: tuple[int, ...], boundaries: tuple[str, ...], message: str
) -> None:
    config = Config()
    config.train.image_sizes, config.train.image_size_boundaries = sizes, boundaries
    with pytest.raises(ConfigError, match=message):
        configs.validate(config)


def test_progressive_resizing_with_size_dependent_heads_is_refused() -> None:
    config = Config()
    config.train.image_sizes, config.model.aux_heads = (32,), True
    with pytest.raises(ConfigError, match="auxiliary heads"):
        configs.validate(config)


def test_size_dependent_heads_need_one_size_to_re_estimate_batch_norm() -> None:
    config = Config()
    config.model.aux_heads, config.evaluation.norm_examples = True, 64
    for size in (0, config.data.image_size):
        config.evaluation.image_size = size
        configs.validate(config)
    config.evaluation.image_size = config.data.image_size + 16
    with pytest.raises(ConfigError, match=r"evaluation\.image_size = 80: the auxiliary heads"):
        configs.validate(config)
    config.evaluation.norm_examples = 0
    configs.validate(config)


def test_hosts_share_all_settings_except_data_locations() -> None:
    one, other = Config(), Config()
    other.data.directory, other.data.source, other.data.workers = "/disk", "a.zip", 8
    assert configs.shared(one) == configs.shared(other)
    other.train.batch_size = 64
    assert configs.shared(one) != configs.shared(other)
    assert configs.shared(other)["config.train.batch_size"] == 64
