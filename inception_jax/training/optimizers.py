"""Optimizers, as chains of optax transformations.

Settings that are disabled keep their place in the chain, so that the structure of a checkpoint does
not depend on them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import optax

from inception_jax import registry
from inception_jax.config import Optimizer
from inception_jax.errors import ConfigError
from inception_jax.models import protocol
from inception_jax.registry import register_optimizer
from inception_jax.training import muon as muon_rule


@dataclasses.dataclass
class Settings(Optimizer):
    """The settings of an optimizer, and the network for optimizers that depend on it.

    Attributes:
      network: the network being trained; None if unknown.
    """

    network: nn.Module | None = None

    def decay_mask(self, params: optax.Params) -> optax.Params:
        """Returns a tree of bools, True for parameters subject to weight decay."""
        if self.decay_norm_and_bias:
            return jax.tree.map(lambda _: True, params)
        return protocol.decay_mask(self.network)(params)

    def decay(self) -> optax.GradientTransformation:
        """Returns the transformation that adds weight_decay times the masked parameters.

        Less for the biases of BatchNorm, by the factor that multiplies their rate afterwards.
        """
        decay = optax.add_decayed_weights(self.weight_decay, mask=self.decay_mask)
        if self.norm_bias_lr_ratio == 1:
            return decay

        def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
            scaled = _scale_norm_biases(params, 1 / self.norm_bias_lr_ratio)
            return decay.update(updates, state, scaled)

        return optax.GradientTransformation(decay.init, update)


def make_optimizer(
    optimizer: Optimizer, schedule: optax.Schedule, network: nn.Module | None = None
) -> optax.GradientTransformation:
    """Builds the optimizer: clipping, weight decay, momentum or Adam, learning rate.

    The gradient is first clipped to a global norm of clip_norm (Pascanu et al. 2013). Then comes
    the optimizer registered under the name: a complete update rule, or a direction between decay
    and learning rate (`registry.register_optimizer`). Last, the updates of BatchNorm's biases are
    multiplied by norm_bias_lr_ratio. Only the parameters selected by
    `models.protocol` decay (kernels, not biases and norm scales), unless decay_norm_and_bias is
    set.

    The state's structure depends on the name alone (sgd and sgd_nesterov share theirs), so any
    other setting can be changed when a run is resumed.

    Args:
      optimizer: the settings.
      schedule: learning rate as a function of the number of previous updates.
      network: the network being trained; None for one that does not follow the Protocol.

    Returns:
      A transformation whose `update` requires the parameters.

    Raises:
      ConfigError: if the registered function does not return a transformation, or needs more
        information about the network.
    """
    part = registry.OPTIMIZERS.get(optimizer.name)
    settings = Settings(**vars(registry.settings_with_defaults(part, optimizer)), network=network)
    with registry.as_config_error(part, f"the optimizer {part.name!r}"):
        built = part.build(settings, schedule)
    if not isinstance(built, optax.GradientTransformation):
        raise ConfigError(
            f"{part.location}: the optimizer {part.name!r} returned {built!r}, a "
            f"{type(built).__name__}; it must return an optax.GradientTransformation"
        )
    clip = (
        optax.clip_by_global_norm(optimizer.clip_norm) if optimizer.clip_norm else optax.identity()
    )
    rate = optax.scale_by_learning_rate(schedule)
    chains = {
        "own": (clip, built),
        "l2": (clip, settings.decay(), built, rate),
        "decoupled": (clip, built, settings.decay(), rate),
    }
    chain = optax.chain(*chains[part.decay])
    return _with_norm_bias_rate(chain, optimizer.norm_bias_lr_ratio)


def _with_norm_bias_rate(
    chain: optax.GradientTransformation, ratio: float
) -> optax.GradientTransformation:
    """Returns an optimizer that multiplies the updates of BatchNorm's biases; the same state.

    Jordan 2024, arXiv:2404.00498 (bias_scaler in KellerJordan/cifar10-airbench), after Page 2019,
    "How to Train Your ResNet", part 8.
    """
    if ratio == 1:
        return chain

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = chain.update(updates, state, params)
        return _scale_norm_biases(updates, ratio), state

    return optax.GradientTransformation(chain.init, update)


def _scale_norm_biases(tree: Any, factor: float) -> Any:
    """Returns parameters, or their updates, with those of BatchNorm's biases multiplied."""
    return jax.tree.map(
        lambda leaf, is_bias: factor * leaf if is_bias else leaf,
        tree,
        protocol.norm_bias_mask(tree),
    )


_ADAM = ("beta1", "beta2", "epsilon")
_DECAY = ("weight_decay", "decay_norm_and_bias")

# Directions by name: the kind of weight decay, the settings that they read, and the rule.
_DIRECTIONS: dict[str, tuple[str, tuple[str, ...], Callable[[Settings, Any], Any]]] = {
    # torch.optim.SGD: g += wd * p; v = momentum * v + g; p -= rate * v
    "sgd": ("l2", ("momentum",), lambda s, _: optax.trace(s.momentum)),
    "sgd_nesterov": ("l2", ("momentum",), lambda s, _: optax.trace(s.momentum, nesterov=True)),
    # torch.optim.Adam: wd * p is added to the gradient and rescaled with it.
    "adam": ("l2", _ADAM, lambda s, _: optax.scale_by_adam(s.beta1, s.beta2, s.epsilon)),
    # torch.optim.AdamW: p -= rate * wd * p in addition (Loshchilov & Hutter 2019).
    "adamw": ("decoupled", _ADAM, lambda s, _: optax.scale_by_adam(s.beta1, s.beta2, s.epsilon)),
    # Chen et al. 2023, arXiv:2302.06675; the authors use a beta2 of 0.99, a rate of 1/10 to 1/3 of
    # AdamW's, and a decay that is larger by the same factor.
    "lion": ("decoupled", _ADAM[:2], lambda s, _: optax.scale_by_lion(s.beta1, s.beta2)),
    # torch.optim.RMSprop, with beta2 as its alpha.
    "rmsprop": (
        "l2",
        ("beta2", "epsilon", "momentum"),
        lambda s, _: optax.chain(
            optax.scale_by_rms(s.beta2, s.epsilon, eps_in_sqrt=False), optax.trace(s.momentum)
        ),
    ),
    # Shazeer & Stern 2018, arXiv:1804.04235, without momentum: the rate is relative to the RMS of
    # each parameter.
    "adafactor": (
        "decoupled",
        (),
        lambda s, _: optax.chain(
            optax.scale_by_factored_rms(),
            optax.clip_by_block_rms(1.0),
            optax.scale_by_param_block_rms(),
        ),
    ),
    # You et al. 2020, arXiv:1904.00962: the trust ratio also scales the decay.
    "lamb": (
        "own",
        _ADAM,
        lambda s, schedule: optax.lamb(
            schedule, s.beta1, s.beta2, s.epsilon, weight_decay=s.weight_decay, mask=s.decay_mask
        ),
    ),
}
for _name, (_decay, _settings, _rule) in _DIRECTIONS.items():
    register_optimizer(
        _name,
        decay=_decay,
        settings=(*_settings, *_DECAY),
        auto_rate=_name.startswith("sgd"),
    )(_rule)


@register_optimizer("muon", settings=("momentum", *_ADAM, "muon_adam_lr_ratio", *_DECAY))
def muon(settings: Settings, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Returns Muon for the kernels of hidden layers and AdamW for the rest."""
    network = settings.network
    if network is None:
        raise ConfigError("config.optimizer.name = 'muon': needs the network; pass network=…")
    decay = settings.decay()
    rules = {
        "muon": optax.chain(
            muon_rule.scale_by_muon(settings.momentum),
            decay,
            optax.scale_by_learning_rate(schedule),
        ),
        "adam": optax.chain(
            optax.scale_by_adam(settings.beta1, settings.beta2, settings.epsilon),
            decay,
            optax.scale_by_learning_rate(
                lambda count: settings.muon_adam_lr_ratio * schedule(count)
            ),
        ),
    }
    return optax.partition(rules, lambda params: muon_rule.param_labels(network, params))
