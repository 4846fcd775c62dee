"""The evaluations of a run by name."""

from inception_jax.config.schema import Config, View

TRAIN_EVAL = "train_eval"


def views(config: Config) -> dict[str, View]:
    """Returns the additional evaluations by name.

    They are those of `config.evaluations`, and the two that have a setting of their own.
    """
    short: dict[str, View] = {}
    if config.evaluation.train_eval_examples:
        short[TRAIN_EVAL] = View(split="train", examples=config.evaluation.train_eval_examples)
    if config.evaluation.flip_tta:
        short["flip"] = View(flip_tta=True)
    return short | config.evaluations
