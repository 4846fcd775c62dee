"""Tests real-world variants of torchvision's GoogLeNet state dict, without PyTorch."""

import pathlib
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from inception_jax.config import Model
from inception_jax.errors import ConfigError, DataError
from inception_jax.inference.predictor import Predictor
from inception_jax.models import networks, torchvision_weights, weights
from inception_jax.models.torchvision_weights import ImportedWeights, from_torchvision
from inception_jax.models.weights import Weights
from inception_jax.storage import buckets, paths
from inception_jax.tools import import_weights
from tests import command

State = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def state() -> State:
    """A state dict of ten classes with auxiliary heads, in which all numbers differ."""
    model = Model(name="googlenet_torchvision", aux_heads=True)
    module = networks.create(model, 10)
    variables = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
    state_dict: State = {}
    start = 0
    for path, leaf in weights.flatten(variables).items():
        axes = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[len(leaf.shape)]
        shape = [leaf.shape[axis] for axis in axes]
        numbers = np.arange(start, start + leaf.size, dtype=np.float32)
        state_dict[torchvision_weights.torch_name(path)] = (numbers * 1e-7).reshape(shape)
        start += leaf.size
    return state_dict


def renamed(state: State, rename: Callable[[str], str]) -> State:
    return {rename(name): value for name, value in state.items()}


def without(state: State, *starts: str) -> State:
    return {name: value for name, value in state.items() if not name.startswith(starts)}


def assert_same(imported: ImportedWeights, expected: ImportedWeights) -> None:
    ours, theirs = (weights.flatten(each.variables) for each in (imported, expected))
    assert ours.keys() == theirs.keys() and imported.model == expected.model
    for name, leaf in ours.items():
        np.testing.assert_array_equal(leaf, theirs[name], err_msg=name)


def resized_heads(state: State, classes: int) -> State:
    heads = {
        f"{head}.fc2.{leaf}": np.zeros((classes, *state[f"{head}.fc2.{leaf}"].shape[1:]))
        for head in ("aux1", "aux2")
        for leaf in ("weight", "bias")
    }
    return state | heads


def test_matching_state_dict_is_converted_completely(state: State) -> None:
    imported = from_torchvision(state)
    assert imported.model.aux_heads and not imported.notes
    leaves = weights.flatten(imported.variables)
    assert len(leaves) == len(state)
    np.testing.assert_array_equal(leaves["params/classifier/dense/kernel"], state["fc.weight"].T)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: resized_heads(s, 1000), "aux1 and aux2, auxiliary heads .*1000,"),
        (lambda s: without(s, "aux2"), "skipped: aux1, auxiliary heads .*missing: aux2"),
        (lambda s: without(s, "aux1.fc2"), "missing: aux1.fc2.bias and 1 more of aux1"),
        (
            lambda s: renamed(s, lambda name: name.replace("aux1.fc2.", "aux1.fc2.1.")),
            "missing: aux1.fc2",
        ),
        (lambda s: without(s, "aux"), None),
    ],
    ids=["other-classes", "one-head", "half-a-head", "sequential", "no-heads"],
)
def test_mismatched_heads_are_skipped_and_logged(
    state: State, change: Callable[[State], State], message: str | None
) -> None:
    imported = from_torchvision(change(state))
    assert not imported.model.aux_heads
    assert_same(imported, from_torchvision(without(state, "aux")))
    if message is None:
        assert not imported.notes
    else:
        (note,) = imported.notes
        assert re.search(message, note), note


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "_orig_mod.",
        "model.",
        "net.",
        "module._orig_mod.",
        "_orig_mod.module.",
        "state_dict.backbone.network.",
        "conv1.",
    ],
)
def test_any_prefix_is_detected(state: State, prefix: str) -> None:
    imported = from_torchvision(renamed(state, lambda name: prefix + name))
    assert_same(imported, from_torchvision(state))
    plain = prefix.replace("_orig_mod.", "")
    assert imported.notes == ([f"network: {plain}*"] if plain else [])


def test_wrapper_names_are_ignored(state: State) -> None:
    wrapped = renamed(state, lambda name: name.replace(".", "._fsdp_wrapped_module.", 1))
    assert_same(from_torchvision(wrapped), from_torchvision(state))


def test_several_networks_require_prefix(state: State) -> None:
    average = {name: value + np.float32(1) for name, value in state.items()}
    both = renamed(state, lambda n: f"model.{n}") | renamed(average, lambda n: f"ema.module.{n}")
    with pytest.raises(DataError, match=r"2 networks, named model, ema\.module, .*--prefix"):
        from_torchvision(both)
    for prefix in ("ema.module", "ema.module."):
        imported = from_torchvision(both, prefix=prefix)
        assert_same(imported, from_torchvision(average))
        assert "skipped: model." in imported.notes[1] and "more" in imported.notes[1]
    with pytest.raises(DataError, match=r"not torchvision's GoogLeNet.*below 'teacher'"):
        from_torchvision(both, prefix="teacher")


@pytest.mark.parametrize("inside", ["0", "1", "head.linear"])
def test_only_layer_inside_fc_is_the_classifier(state: State, inside: str) -> None:
    imported = from_torchvision(renamed(state, lambda n: re.sub(r"^fc\.", f"fc.{inside}.", n)))
    assert_same(imported, from_torchvision(state))
    assert imported.notes == [f"classifier: fc.{inside}"]


def test_classifier_without_bias_gets_zeros(state: State) -> None:
    imported = from_torchvision(without(state, "fc.bias"))
    assert not imported.variables["params"]["classifier"]["dense"]["bias"].any()
    assert imported.model.aux_heads


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: without(s, "fc."), "fc not found"),
        (
            lambda s: (
                without(s, "fc.")
                | {"fc.0.weight": np.ones((64, 1024)), "fc.3.weight": np.ones((10, 64))}
            ),
            "fc is not a single linear layer: fc.0.weight, fc.3.weight",
        ),
        (lambda s: s | {"fc.weight": np.ones((10, 2048), np.float32)}, "has shape"),
        (
            lambda s: s | {"fc.weight": np.ones((1, 1024)), "fc.bias": np.ones(1)},
            "has one output",
        ),
    ],
    ids=["none", "several-layers", "other-features", "one-logit"],
)
def test_without_matching_classifier_the_rest_is_converted(
    state: State, change: Callable[[State], State], message: str
) -> None:
    imported = from_torchvision(change(state))
    assert any(message in note for note in imported.notes), imported.notes
    converted, complete = (
        weights.flatten(from_torchvision(s).variables) for s in (change(state), state)
    )
    assert converted.keys() == {n for n in complete if "/aux_" not in n and "/classifier/" not in n}
    headless = Weights(
        variables=imported.variables,
        model=imported.model,
        image_size=224,
        class_names=(),
        mean=np.zeros(3, np.float32),
        std=np.ones(3, np.float32),
    )
    assert "no classifier" in str(headless)
    with pytest.raises(ConfigError, match=r"without a classifier .* config\.init\.pretrained"):
        Predictor(headless)


def test_classifier_can_be_named(state: State) -> None:
    head = renamed(state, lambda n: re.sub(r"^body\.fc\.", "head.1.", f"body.{n}"))
    assert "no classifier: body.fc not found" in from_torchvision(head).notes
    imported = from_torchvision(head, classifier="head.1")
    assert_same(imported, from_torchvision(state))
    assert imported.notes == ["network: body.*", "classifier: head.1"]
    with pytest.raises(DataError, match=r"--classifier=head\.2: head\.2 not found"):
        from_torchvision(head, classifier="head.2")


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float64])
def test_floating_dtypes_become_float32(state: State, dtype: type) -> None:
    typed: State = {name: value.astype(dtype) for name, value in state.items()}
    expected = {name: value.astype(np.float32) for name, value in typed.items()}
    assert_same(from_torchvision(typed), from_torchvision(expected))


def test_unrelated_entries_are_skipped_and_logged(state: State) -> None:
    unrelated = {
        "conv1.bn.num_batches_tracked": np.array(7),
        "total_ops": np.zeros(1),
        "inception3a.branch1.total_params": np.zeros(1),
        "optimizer.state.0.exp_avg": np.zeros((64, 3, 7, 7)),
        "n_averaged": np.array(3),
    }
    imported = from_torchvision(state | unrelated)
    assert_same(imported, from_torchvision(state))
    assert imported.notes == [
        "skipped: inception3a.branch1.total_params, n_averaged, optimizer.state.0.exp_avg, "
        "total_ops"
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: without(s, "inception3a.", "conv2.bn.weight"),
            r"31 entries .*missing: inception3a\S+ and 29 more of inception3a\n.*conv2\.bn\.w",
        ),
        (
            lambda s: s | {"conv3.bn.weight": np.zeros(7, np.float32)},
            r"1 entries .*conv3\.bn\.weight: has shape \(7,\), must be \(192,\)",
        ),
        (
            lambda s: s | {"inception3a.attention.weight": np.zeros((9, 9), np.float32)},
            r"unexpected: inception3a\.attention\.weight",
        ),
        (
            lambda s: s | {"conv1.conv.weight": np.zeros((64, 3, 7, 7), np.int8)},
            r"conv1\.conv\.weight: has type int8, must be floating-point",
        ),
        (
            lambda s: s | {"conv1.bn.bias": np.full(64, np.nan, np.float32)},
            r"conv1\.bn\.bias: has non-finite values",
        ),
        (
            lambda s: s | {"conv1.bn.bias": np.full(64, 1e300)},
            r"conv1\.bn\.bias: has non-finite values",
        ),
        (
            lambda s: {f"layer1.{n}.conv1.weight": np.zeros((9, 9)) for n in range(60)},
            r"not torchvision's GoogLeNet: has 0 of its \d+ entries.*60 arrays: layer1\.0\.conv1",
        ),
        (lambda s: {}, "contains 0 arrays"),
    ],
    ids=["missing", "shape", "more", "type", "nan", "overflow", "resnet", "empty"],
)
def test_another_network_is_rejected_with_differences(
    state: State, change: Callable[[State], State], message: str
) -> None:
    with pytest.raises(DataError, match=f"(?s){message}"):
        from_torchvision(change(state))


def test_missing_entries_are_reported_with_skipped_ones(state: State) -> None:
    other = renamed(state, lambda name: name.replace("conv2.conv.weight", "second.weight"))
    with pytest.raises(DataError, match=r"(?s)missing: conv2\.conv\.weight.*skipped: second\.w"):
        from_torchvision(other)


def test_command_logs_what_it_skipped(state: State, tmp_path: pathlib.Path, bucket: str) -> None:
    local = tmp_path / "tuned.bin"
    save_file(renamed(without(state, "fc."), lambda name: f"model.{name}"), local)
    source, target = (paths.user_path(f"{bucket}/{name}", "") for name in ("tuned.bin", "weights"))
    buckets.write_bytes(source, local.read_bytes())
    done = command.run("tools.import_weights", f"--input={source}", f"--output={target}")
    assert done.returncode == 0, done.stderr
    for message in (
        "network: model.*",
        "no classifier: model.fc",
        "skipped: model.aux1 and model.",
    ):
        assert message in done.stderr
    assert "googlenet_torchvision, no classifier" in done.stdout
    assert weights.load(target).num_classes == 0


def test_class_names_may_begin_with_a_byte_order_mark(tmp_path: pathlib.Path) -> None:
    """As in files that Windows programs write."""
    path = tmp_path / "names.txt"
    path.write_text("cat\ndog\n", encoding="utf-8-sig")
    assert import_weights.read_names(path, 2) == ("cat", "dog")
