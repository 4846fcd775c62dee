"""The comparison of compiled training steps with those of plain Flax."""

import json
import pathlib
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from benchmarks import programs_peers
from benchmarks.contenders import linen_networks, network
from inception_jax.programs import projection, targets
from inception_jax.programs.audit import Audit, Operation
from inception_jax.programs.compile import Memory, Program
from inception_jax.runtime import sharding


@pytest.fixture(autouse=True)
def promotion() -> Iterator[None]:
    """Plain Flax mixes bfloat16 and float32, which the tests of our code do not permit."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def parameters(model: nn.Module, side: int) -> int:
    images = jnp.zeros((1, side, side, 3))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))


@pytest.mark.parametrize("stem", ["s16", "paper"])
def test_plain_googlenet_has_the_parameters_of_ours(stem: str) -> None:
    assert parameters(linen_networks.GoogLeNet(stem, 200), 64) == network.parameters(stem, 200)


def test_plain_resnet_has_the_published_number_of_parameters() -> None:
    assert parameters(linen_networks.ResNet50(1000), 64) == 25_557_032


def test_the_plain_step_donates_its_state_and_takes_uint8() -> None:
    model = linen_networks.ResNet50(10, width=4)
    lowered = linen_networks.lower_train_step(
        model, sharding.make_mesh(jax.devices()[:1]), batch_size=4, image_size=32
    )
    (state, batch, _), _ = lowered.args_info
    assert batch["image"].dtype == jnp.uint8 and not batch["image"].donated
    assert all(leaf.donated for leaf in jax.tree.leaves(state))
    new, loss = lowered.out_info
    shapes = [[leaf.shape for leaf in jax.tree.leaves(tree)] for tree in (state, new)]
    assert shapes[0] == shapes[1] and loss.shape == ()


FOUND = Audit(
    (Operation("a", "fusion", "other", "(none)", 1, 4e12, 6 * 10**9, None),),
    collectives={},
    convolutions={},
    arguments={},
    state_bytes=0,
    donated_bytes=0,
    host_transfers=(),
    dynamic_shapes=(),
)
PROGRAM = Program("train", 224, 400, 20.0, 0, Memory(1, 2, 3, 4, 0), FOUND)


def test_a_row_has_the_estimate_beside_the_published_time() -> None:
    row = programs_peers.row("resnet50", "h100", PROGRAM)
    times = projection.times(PROGRAM, targets.get("h100"))
    assert (row["fastest"], row["slowest"]) == (times.fastest, times.slowest)
    assert row["published"] == pytest.approx(400 / 6_997)
    assert "training_results_v3.0" in row["published_source"]
    assert programs_peers.row("linen", "v5e-1", PROGRAM)["published"] is None
    line = programs_peers.table([row]).splitlines()[-1]
    assert [cell.strip() for cell in line.split("|")[1:5]] == [
        "resnet50, 224 px, h100",
        "400",
        "10.00",
        "15.0",
    ]


def test_pairs_that_are_recorded_are_not_compiled_once_more(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[tuple[str, str]] = []

    def compile_(contender: str, target: str) -> dict[str, Any]:
        made.append((contender, target))
        return programs_peers.row(contender, target, PROGRAM)

    monkeypatch.setattr(programs_peers, "compile_one", compile_)
    path = tmp_path / "peers.json"
    for contenders in (["resnet50"], ["resnet50", "linen"]):
        flags = ["--targets", "h100", "--json", str(path), "--contenders", *contenders]
        monkeypatch.setattr("sys.argv", ["programs_peers", *flags])
        programs_peers.main()
    assert made == [("resnet50", "h100"), ("linen", "h100")]
    assert len(json.loads(path.read_text())["programs"]) == 2
    assert "published, ms" in capsys.readouterr().out
