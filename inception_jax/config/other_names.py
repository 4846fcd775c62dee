"""What settings were called in older versions, and what other trainers call them."""

from collections.abc import Callable, Mapping
from typing import Any

# Every setting or group of settings that has another name, place or form than in an older version,
# by the dotted path that it had there. What older versions recorded is read through this map, and
# on the command line an old name is answered with the new one. The value is the dotted path of
# today or, where the value changes too, a function that returns what to set today, by dotted path;
# the first line of its docstring is the answer: "train.duration, such as '20 epochs'."
RENAMED: dict[str, str | Callable[[Any], Mapping[str, Any]]] = {}


def new_name(path: str, prefix: str = "") -> str:
    """Returns what a setting of an older version is called today, in words; '' if it is unknown.

    Args:
      path: dotted, or the last part of it alone.
      prefix: what to put before the path of today.
    """
    for old, new in RENAMED.items():
        if f"{path}.".startswith(f"{old}.") or path == old.rpartition(".")[2]:
            if not isinstance(new, str):
                return prefix + (new.__doc__ or "").partition("\n")[0].rstrip(".")
            return repr(prefix + new + (path.removeprefix(old) if path.startswith(old) else ""))
    return ""


# What Keras, timm, torchvision and Lightning call our settings, where no setting has that name.
_OTHER_NAMES = {
    "augment.color_jitter": "jitter",
    "augment.cutmix": "cutmix_alpha",
    "augment.cutout": "reprob random_erase random_erasing erasing",
    "augment.flip": "hflip horizontal_flip random_flip",
    "augment.mix_probability": "mixup_prob mix_prob",
    "augment.mix_until.epochs": "mixup_off_epoch",
    "augment.mixup": "mixup_alpha",
    "augment.policy": "aa auto_augment autoaugment randaugment",
    "augment.policy_magnitude": "ra_magnitude",
    "checkpoint.every.epochs": "save_every save_freq save_interval checkpoint_freq",
    "checkpoint.keep_best": "save_top_k save_best",
    "checkpoint.keep_last": "max_to_keep checkpoint_hist save_total_limit",
    "data.directory": "cache_dir",
    "data.eval_crop": "crop_pct",
    "data.eval_share": "validation_split val_split val_ratio val_fraction test_size",
    "data.image_size": "img_size imgsz input_size resolution size crop_size train_crop_size",
    "data.name": "dataset",
    "data.source": "data_dir data_path data_root dataset_dir dataset_path root train_dir path",
    "data.workers": "num_workers n_workers dataloader_num_workers",
    "evaluation.batch_size": "eval_batch_size val_batch_size validation_batch_size test_batch_size",
    "evaluation.every.epochs": "eval_every eval_freq val_interval validation_freq "
    "check_val_every_n_epoch",
    "evaluation.flip": "tta flip_tta test_time_augmentation",
    "init.weights": "pretrained pretrained_weights initial_checkpoint finetune",
    "log.every.steps": "log_every log_interval log_every_n_steps print_freq logging_steps",
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
    "schedule.decay": "gamma lr_gamma decay_rate",
    "schedule.decay_every.epochs": "decay_epochs lr_step_size step_size",
    "schedule.end_factor": "min_lr eta_min final_lr",
    "schedule.learning_rate": "lr base_lr max_lr peak_lr init_lr learningrate",
    "schedule.name": "sched scheduler lr_scheduler lr_schedule",
    "schedule.warmup.epochs": "warmup_epochs lr_warmup_epochs",
    "schedule.warmup.steps": "warmup_steps num_warmup_steps warmup_iters",
    "train.accumulate": "grad_accum_steps accum_iter accumulate_grad_batches "
    "gradient_accumulation_steps accumulation_steps",
    "train.aux_weight": "aux_loss_weight",
    "train.batch_size": "bs batch per_device_train_batch_size global_batch_size",
    "train.ema.epochs": "model_ema use_ema",
    "train.ema.steps": "model_ema_decay ema_decay ema_momentum",
    "train.label_smoothing": "smoothing",
    "train.length.epochs": "epochs num_epochs n_epochs max_epochs num_train_epochs",
    "train.length.steps": "steps max_steps num_steps total_steps num_train_steps iterations "
    "max_iter",
    "name": "experiment exp_name run_name",
    "seed": "random_seed random_state rng_seed",
}
SETTING_OF = {name: path for path, names in _OTHER_NAMES.items() for name in names.split()}
# What they have and this package does in another way.
_ANSWERS = {
    "A run resumes by itself: give the same --workdir": "resume resume_from_checkpoint ckpt_path "
    "auto_resume",
    "There is no early stopping; the best checkpoint is kept (checkpoint.keep_best)": "patience "
    "early_stopping early_stop patience_epochs",
    "The data set says how many classes there are": "num_classes nb_classes n_classes classes",
    "Training examples are always shuffled, by config.seed": "shuffle",
    "The folder of a run is --workdir=DIR": "output output_dir out_dir logdir log_dir save_dir "
    "model_dir default_root_dir checkpoint_dir ckpt_dir",
    "Devices are chosen by --platform=cpu, gpu or tpu": "device devices gpu gpus accelerator cuda "
    "ngpu num_gpus",
}
ANSWER_TO = {name: answer for answer, names in _ANSWERS.items() for name in names.split()}
