"""Names of settings in older versions and in other trainers."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from inception_jax.config import durations


@dataclasses.dataclass(frozen=True)
class Renamed:
    """What became of a setting of an older version.

    Attributes:
      path: its dotted path today; '*' matches any name, as in its old path.
      convert: returns today's value from the recorded one and its group; None = unchanged.
      example: a value of today, for messages, if the form of the value changed.
    """

    path: str
    convert: Callable[[Any, Mapping[str, Any]], Any] | None = None
    example: str = ""


def _one_string(value: Any, group: Mapping[str, Any]) -> Any:
    """Returns a duration that older versions recorded as a number for each unit, all but one 0."""
    del group
    if not isinstance(value, Mapping):
        return value
    given = [durations.Duration(value[unit], unit) for unit in durations.UNITS if value.get(unit)]
    return str(given[0]) if given else ""


def _boundaries(
    unit: Callable[[Mapping[str, Any]], str],
) -> Callable[[Any, Mapping[str, Any]], Any]:
    """Returns the conversion of boundaries that older versions recorded as plain numbers."""

    def convert(values: Any, group: Mapping[str, Any]) -> Any:
        if not isinstance(values, list | tuple):
            return values
        return [
            str(durations.Duration(value, unit(group))) if isinstance(value, int | float) else value
            for value in values
        ]

    return convert


# Every setting whose name, place or form differs from an older version, by its dotted path there.
# Recorded settings are read through this map; on the command line an old name is answered with the
# new one.
RENAMED: dict[str, Renamed] = {
    "augment.area_min": Renamed("augment.crop_scale_min"),
    "augment.aspect_max": Renamed("augment.crop_ratio_max"),
    "augment.mix_until": Renamed("augment.mix_end", _one_string, "55 epochs"),
    "checkpoint.every": Renamed("checkpoint.every", _one_string, "500 steps"),
    "data.eval_crop": Renamed("data.eval_crop_pct"),
    "data.eval_share": Renamed("data.val_fraction"),
    "data.unreadable": Renamed("data.on_unreadable"),
    "evaluation.every": Renamed("evaluation.every", _one_string, "1 epoch"),
    "evaluation.flip": Renamed("evaluation.flip_tta"),
    "evaluation.train_examples": Renamed("evaluation.train_eval_examples"),
    "evaluations.*.every": Renamed("evaluations.*.every", _one_string, "1 epoch"),
    "init.weights": Renamed("init.pretrained"),
    "log.every": Renamed("log.every", _one_string, "100 steps"),
    "model.five_by_five": Renamed("model.conv5x5"),
    "optimizer.adam_rate_factor": Renamed("optimizer.muon_adam_lr_ratio"),
    "optimizer.decay_all": Renamed("optimizer.decay_norm_and_bias"),
    "schedule.boundaries": Renamed(
        "schedule.boundaries",
        _boundaries(lambda group: group.get("boundaries_unit", "epochs")),
        "30 epochs,60 epochs",
    ),
    # Read above.
    "schedule.boundaries_unit": Renamed("", example="schedule.boundaries='30 epochs,60 epochs'"),
    "schedule.decay": Renamed("schedule.decay_rate"),
    "schedule.decay_every": Renamed("schedule.decay_period", _one_string, "8 epochs"),
    "schedule.end_factor": Renamed("schedule.final_lr_ratio"),
    "schedule.warmup": Renamed("schedule.warmup", _one_string, "5 epochs"),
    "train.accumulate": Renamed("train.grad_accum_steps"),
    "train.ema": Renamed("train.ema", _one_string, "1 epoch"),
    "train.image_size_epochs": Renamed(
        "train.image_size_boundaries", _boundaries(lambda group: "epochs"), "20 epochs,40 epochs"
    ),
    "train.length": Renamed("train.duration", _one_string, "20 epochs"),
    # Lookahead cost accuracy and was removed. Its average is stored where that of the EMA is.
    "train.lookahead": Renamed("train.ema", example="1 epoch"),
    "train.nonfinite": Renamed("train.on_nonfinite"),
    "watch.host_silence": Renamed("watch.heartbeat_timeout_seconds"),
}


def current_path(path: str) -> str:
    """Returns the dotted path today of a setting that an older version recorded."""
    return RENAMED[path].path if path in RENAMED else path


def with_value(setting: str, value: str) -> str:
    """Returns a suggested setting with the value that the user gave, in place of an example's.

    >>> with_value("train.duration='20 epochs'", "3"), with_value("schedule.learning_rate", "0.1")
    ("train.duration='3 epochs'", 'schedule.learning_rate=0.1')
    """
    path, _, example = setting.partition("=")
    if not example:
        return f"{path}={value}" if value else path
    unit = re.fullmatch(r"'[\d.]+ (\w+)'", example)
    if not unit or not re.fullmatch(r"\d+(\.\d+)?", value):
        return setting
    return f"{path}='{durations.Duration(float(value), unit[1].removesuffix('s') + 's')}'"


def new_name(path: str) -> str:
    """Returns how a setting of an older version is given today; '' if it is unknown.

    Args:
      path: dotted, or its last part alone.
    """
    for old, new in RENAMED.items():
        if new.path == old and path != old and not path.startswith(f"{old}."):
            continue  # Only the form of its value changed, so the last part alone is no hint.
        if f"{path}.".startswith(f"{old}.") or path == old.rpartition(".")[2]:
            if not new.path:
                return new.example
            return new.path + (f"={new.example!r}" if new.example else "")
    return ""


# What Keras, timm, torchvision and Lightning call our settings, if no setting has that name.
_OTHER_NAMES = {
    "augment.color_jitter": "jitter",
    "augment.cutmix": "cutmix_alpha",
    "augment.cutout": "reprob random_erase random_erasing erasing",
    "augment.flip": "hflip horizontal_flip random_flip",
    "augment.mix_probability": "mixup_prob mix_prob",
    "augment.mix_end='55 epochs'": "mixup_off_epoch",
    "augment.mixup": "mixup_alpha",
    "augment.policy": "aa auto_augment autoaugment randaugment",
    "augment.policy_magnitude": "ra_magnitude",
    "checkpoint.every='1 epoch'": "save_every save_freq save_interval checkpoint_freq",
    "checkpoint.keep_best": "save_top_k save_best",
    "checkpoint.keep_last": "max_to_keep checkpoint_hist save_total_limit",
    "data.directory": "cache_dir",
    "data.eval_crop_pct": "crop_pct",
    "data.val_fraction": "validation_split val_split val_ratio test_size",
    "data.image_size": "img_size imgsz input_size resolution size crop_size train_crop_size",
    "data.name": "dataset",
    "data.source": "data_dir data_path data_root dataset_dir dataset_path root train_dir path",
    "data.workers": "num_workers n_workers dataloader_num_workers",
    "evaluation.batch_size": "eval_batch_size val_batch_size validation_batch_size test_batch_size",
    "evaluation.every='1 epoch'": "eval_every eval_freq val_interval validation_freq "
    "check_val_every_n_epoch",
    "evaluation.flip_tta": "tta test_time_augmentation",
    "init.pretrained": "pretrained_weights initial_checkpoint finetune",
    "log.every='100 steps'": "log_every log_interval log_every_n_steps print_freq logging_steps",
    "model.dropout": "drop drop_rate dropout_rate",
    "model.dtype": "amp precision mixed_precision fp16 bf16 half compute_dtype",
    "model.name": "arch architecture backbone network net",
    "model.norm_epsilon": "bn_eps bn_epsilon",
    "model.norm_momentum": "bn_momentum",
    "optimizer.beta1": "betas",
    "optimizer.clip_norm": "clip_grad clip_gradients clipnorm gradient_clip_val max_grad_norm "
    "grad_clip",
    "optimizer.epsilon": "eps opt_eps",
    "optimizer.name": "opt optim",
    "optimizer.weight_decay": "wd decay_rate_l2 l2 weight_decay_rate",
    "schedule.boundaries": "milestones decay_milestones lr_steps",
    "schedule.decay_rate": "gamma lr_gamma",
    "schedule.decay_period='8 epochs'": "decay_epochs lr_step_size step_size",
    "schedule.final_lr_ratio": "min_lr eta_min final_lr",
    "schedule.learning_rate": "lr base_lr max_lr peak_lr init_lr learningrate",
    "schedule.name": "sched scheduler lr_scheduler lr_schedule",
    "schedule.warmup='5 epochs'": "warmup_epochs lr_warmup_epochs",
    "schedule.warmup='500 steps'": "warmup_steps num_warmup_steps warmup_iters",
    "train.grad_accum_steps": "accum_iter accumulate_grad_batches "
    "gradient_accumulation_steps accumulation_steps",
    "train.aux_weight": "aux_loss_weight",
    "train.batch_size": "bs batch per_device_train_batch_size global_batch_size",
    "train.ema='1 epoch'": "model_ema use_ema",
    "train.ema='1000 steps'": "model_ema_decay ema_decay ema_momentum",
    "train.label_smoothing": "smoothing",
    "train.duration='20 epochs'": "epochs num_epochs n_epochs max_epochs num_train_epochs",
    "train.duration='1000 steps'": "steps max_steps num_steps total_steps num_train_steps "
    "iterations max_iter",
    "name": "experiment exp_name run_name",
    "seed": "random_seed random_state rng_seed",
}
SETTING_OF = {name: path for path, names in _OTHER_NAMES.items() for name in names.split()}
# What they have and this package does differently.
_ANSWERS = {
    "Runs resume automatically: rerun the command with the same --workdir": "resume auto_resume "
    "resume_from_checkpoint ckpt_path",
    "Early stopping is not supported; the best checkpoint is kept (checkpoint.keep_best)": ""
    "patience early_stopping early_stop patience_epochs",
    "The number of classes comes from the data set": "num_classes nb_classes n_classes classes",
    "Training examples are always shuffled, with config.seed": "shuffle",
    "The run's folder is --workdir=DIR": "output output_dir out_dir logdir log_dir save_dir "
    "model_dir default_root_dir checkpoint_dir ckpt_dir",
    "Choose devices with --platform=cpu, gpu or tpu": "device devices gpu gpus accelerator cuda "
    "ngpu num_gpus",
}
ANSWER_TO = {name: answer for answer, names in _ANSWERS.items() for name in names.split()}
