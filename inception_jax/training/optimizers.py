"""Learning-rate schedules and update rules.

A schedule is a function of the step alone, so a resumed run needs none of its history, and may be
given another one. For the same reason the optimizer is always the same chain of transformations:
settings that are switched off leave their place in the chain, and with it the structure of a
checkpoint, as it is.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from inception_jax import config
from inception_jax.errors import ConfigError

_Factor = Callable[[jax.Array], jax.Array]


def make_schedule(
    schedule: config.Schedule, *, timeline: config.Timeline, total_steps: int
) -> optax.Schedule:
    """Returns the learning rate as a function of t, the number of updates already made.

    So the first update has rate(0) and the last rate(total_steps - 1). With W steps of warm-up, T =
    total_steps and `peak` the setting learning_rate::

      rate(t) = peak * t / W        for t < W
      rate(t) = peak * factor(t)    for t >= W, where factor(W) is exactly 1

      constant      1
      steps         decay ^ (how many boundaries lie in (W, t])
      exponential   decay ^ ((t - W) / E), E the setting decay_every
        staircase   decay ^ (t // E - W // E), falling at whole multiples of E
      cosine        end + (1 - end) * (1 + cos(pi * p)) / 2, with p = (t - W) / (T - W)
      linear        end + (1 - end) * (1 - p)
      polynomial    end + (1 - end) * (1 - p) ^ power

    `end`, the setting end_factor, is reached at t = T, so the last update is made just above it:
    for linear at peak * (end + (1 - end) / (T - W)). After T these three stay at the end, the
    others go on. Boundaries and multiples of E count from the start of training, warm-up included.
    Durations are rounded up to whole steps.

    Args:
      schedule: the settings.
      timeline: turns their durations into steps.
      total_steps: length of the run.

    Returns:
      A function of an integer, or an integer array of any shape, to float32 of the same shape.

    Raises:
      ConfigError: if the warm-up is not shorter than the run, or a boundary lies in the warm-up.
    """
    warmup = timeline.steps(schedule.warmup)
    if schedule.boundaries_unit == "epochs":
        boundaries = [timeline.steps(config.Duration(epochs=b)) for b in schedule.boundaries]
    else:
        boundaries = [int(step) for step in schedule.boundaries]
    _check(schedule, warmup, boundaries, total_steps)
    factor = _factor(schedule, timeline, warmup, boundaries, total_steps)

    def rate(count: jax.typing.ArrayLike) -> jax.Array:
        count = jnp.asarray(count, jnp.int32)
        rise = count / max(warmup, 1)
        return schedule.learning_rate * jnp.where(count < warmup, rise, factor(count))

    return rate


def _check(schedule: config.Schedule, warmup: int, boundaries: list[int], total_steps: int) -> None:
    if warmup and warmup >= total_steps:
        raise ConfigError(
            f"config.schedule.warmup = {schedule.warmup}, {warmup} steps: must be shorter than the "
            f"run of {total_steps} steps; shorten it, or lengthen config.train.length"
        )
    if schedule.name == "steps" and boundaries[0] <= warmup:
        raise ConfigError(
            f"config.schedule.boundaries = {schedule.boundaries}: the first is at step "
            f"{boundaries[0]}, and must be after the warm-up, which ends at step {warmup}; move "
            "it, or shorten config.schedule.warmup"
        )


def _factor(
    schedule: config.Schedule,
    timeline: config.Timeline,
    warmup: int,
    boundaries: list[int],
    total_steps: int,
) -> _Factor:
    """Returns rate(t) / peak after the warm-up, as `make_schedule` defines it."""
    if schedule.name == "constant":
        return lambda count: jnp.ones(count.shape)
    if schedule.name == "steps":
        passed = np.asarray(boundaries, np.int32)
        return lambda count: schedule.decay ** _float(jnp.searchsorted(passed, count, side="right"))
    if schedule.name == "exponential":
        every = timeline.steps(schedule.decay_every)
        if schedule.staircase:
            return lambda count: schedule.decay ** _float(count // every - warmup // every)
        return lambda count: schedule.decay ** ((count - warmup) / every)

    shape = _shape(schedule)

    def factor(count: jax.Array) -> jax.Array:
        progress = jnp.clip((count - warmup) / (total_steps - warmup), 0, 1)
        left = shape(progress)
        # Written so that it is exactly 1 where `left` is, whatever the rounding of end_factor.
        return schedule.end_factor * (1 - left) + left

    return factor


def _shape(schedule: config.Schedule) -> _Factor:
    """Returns the fall from 1 to 0 as a function of progress from 0 to 1."""
    if schedule.name == "cosine":
        return lambda progress: (1 + jnp.cos(jnp.pi * progress)) / 2
    power = schedule.power if schedule.name == "polynomial" else 1.0
    return lambda progress: (1 - progress) ** power


def _float(number: jax.Array) -> jax.Array:
    return number.astype(jnp.float32)


def make_optimizer(
    optimizer: config.Optimizer, schedule: optax.Schedule
) -> optax.GradientTransformation:
    """Returns the update rule: clip, weight decay, momentum or Adam, learning rate.

    First the gradient is scaled down to a global norm of clip_norm, where it is larger (Pascanu et
    al. 2013). Then, as in PyTorch's classes of the same settings:

      sgd            torch.optim.SGD: g += wd * p; v = momentum * v + g; p -= rate * v
      sgd_nesterov   torch.optim.SGD(nesterov=True): p -= rate * (g + momentum * v)
      adam           torch.optim.Adam: wd * p is added to the gradient (L2), so rescaled with it
      adamw          torch.optim.AdamW: p -= rate * wd * p besides (Loshchilov & Hutter 2019)
      muon           see `_muon`

    Unlike there, only leaves named "kernel" decay (not biases and norm scales), unless decay_all.

    The state's structure depends on the name alone (sgd and sgd_nesterov share theirs), so a run
    can be resumed with any other setting changed.

    Args:
      optimizer: the settings.
      schedule: learning rate as a function of the updates already made.

    Returns:
      A transformation whose `update` needs the parameters.
    """
    clip = (
        optax.clip_by_global_norm(optimizer.clip_norm) if optimizer.clip_norm else optax.identity()
    )
    decay = optax.add_decayed_weights(
        optimizer.weight_decay, mask=_everything if optimizer.decay_all else _kernels
    )
    adam = optax.scale_by_adam(optimizer.beta1, optimizer.beta2, optimizer.epsilon)
    rate = optax.scale_by_learning_rate(schedule)
    if optimizer.name == "muon":
        adam_rate = optax.scale_by_learning_rate(
            lambda count: optimizer.adam_rate_factor * schedule(count)
        )
        muon = _muon(optimizer.momentum)
        rules = {
            "muon": optax.chain(muon, decay, rate),
            "adam": optax.chain(adam, decay, adam_rate),
        }
        return optax.chain(clip, optax.partition(rules, _muon_or_adam))
    if optimizer.name in ("sgd", "sgd_nesterov"):
        trace = optax.trace(optimizer.momentum, nesterov=optimizer.name == "sgd_nesterov")
        return optax.chain(clip, decay, trace, rate)
    return optax.chain(clip, *((adam, decay) if optimizer.name == "adamw" else (decay, adam)), rate)


def _muon(momentum: float) -> optax.GradientTransformation:
    """Returns Muon's direction (Jordan et al. 2024, "Muon: An optimizer for hidden layers").

    The Nesterov momentum of each kernel, as the matrix [H * W * I, O], is replaced by
    `orthogonalized`, and multiplied by sqrt(max(1, O / (H * W * I))). The Frobenius norm of the
    direction is then about sqrt(O) whatever the kernel's shape, and that of a kernel from
    `layers.he_normal` sqrt(2 O): the first update changes every kernel by the same share,
    rate / sqrt(2). (The "consistent RMS" scale of Liu et al. 2025 would change kernels of large
    fan-in more.) Unlike airbench94_muon of the same author, a step does not reset the kernels'
    norms: weight decay bounds them.
    """

    def direction(kernel: jax.Array) -> jax.Array:
        matrix = kernel.reshape(-1, kernel.shape[-1])
        scale = max(1.0, matrix.shape[1] / matrix.shape[0]) ** 0.5
        return (scale * orthogonalized(matrix)).reshape(kernel.shape)

    return optax.chain(
        optax.trace(momentum, nesterov=True),
        optax.stateless_with_tree_map(lambda update, _: direction(update)),
    )


def orthogonalized(matrix: jax.Array) -> jax.Array:
    """Returns about U V^T, where U S V^T is the matrix's singular value decomposition.

    Five Newton-Schulz iterations X <- a X + b (X X^T) X + c (X X^T)^2 X from X = matrix / its
    Frobenius norm, with the coefficients of Jordan et al. 2024, bring each singular value that was
    at least 1/500 of the norm to between 0.68 and 1.21. They are carried out on
    G = X X^T of the smaller side: with P = a + b G + c G^2, X becomes P X and G becomes P G P.
    optax.contrib.scale_by_muon multiplies X itself each time, and takes two to four times as long.

    Args:
      matrix: float32 [M, N].

    Returns:
      float32 [M, N]; zeros for zeros.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonalized(matrix.T).T
    a, b, c = 3.4445, -4.7750, 2.0315
    # A rounding error in G grows twelvefold each time: too much for the fast modes of accelerators.
    with jax.default_matmul_precision("highest"):
        x = matrix / (jnp.linalg.norm(matrix) + 1e-12)
        gram, identity = x @ x.T, jnp.eye(len(x), dtype=x.dtype)
        product = identity
        for _ in range(5):
            polynomial = a * identity + b * gram + c * gram @ gram
            product = polynomial @ product
            gram = polynomial @ gram @ polynomial
        return product @ x


def _muon_or_adam(params: optax.Params) -> optax.Params:
    """Returns a tree of names: "muon" for hidden layers' kernels, "adam" for all else.

    The first convolution ("conv1") maps pixels and the classifiers give logits: neither is a
    hidden layer, and the reference gives both to Adam.
    """

    def rule(path: jax.tree_util.KeyPath, _: jax.Array) -> str:
        names = [jax.tree_util.keystr((key,), simple=True) for key in path]
        hidden = names[0] != "conv1" and "classifier" not in names
        return "muon" if hidden and names[-1] == "kernel" else "adam"

    return jax.tree_util.tree_map_with_path(rule, params)


def _kernels(params: optax.Params) -> optax.Params:
    """Returns a tree of bools, true for the leaves named "kernel"."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: jax.tree_util.keystr(path[-1:], simple=True) == "kernel", params
    )


def _everything(params: optax.Params) -> optax.Params:
    return jax.tree.map(lambda _: True, params)
