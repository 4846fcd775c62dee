"""Named devices, and those that a file describes."""

import importlib.util

import pytest

from inception_jax.errors import UserError
from inception_jax.programs import targets

CONFIG = """
gpu_device_info {
  memory_bandwidth: 2039000000000
  device_memory_size: 85899345920
  cuda_compute_capability { major: 8 }
}
device_description_str: "NVIDIA A100-SXM4-80GB"
"""


@pytest.mark.parametrize(
    ("name", "devices", "topology"),
    [
        ("v4-8", 4, "v4:2x2x1"),
        ("v5e-1", 1, "v5e:1x1"),
        ("v5e-8", 8, "v5e:2x4"),
        ("v5e-16", 16, "v5e:4x4"),
        ("v6e-4", 4, "v6e:2x2"),
        ("tpu7x-8", 8, "tpu7x:2x2x1"),
        ("h100x8", 8, "1x1x8"),
    ],
)
def test_a_name_says_how_many_devices_of_which_kind(name: str, devices: int, topology: str) -> None:
    target = targets.get(name)
    assert (target.devices, target.topology) == (devices, topology)


def test_chips_are_shared_by_hosts_as_they_are_rented() -> None:
    """By default, the compiler assumes four chips a host."""
    names = ("v5e-1", "v5e-8", "v5e-16", "v6e-8")
    bounds = [targets.get(name).options["chips_per_host_bounds"] for name in names]
    assert bounds == [(1, 1, 1), (2, 4, 1), (2, 2, 1), (2, 4, 1)]


def test_every_target_has_a_data_sheet_with_its_source() -> None:
    for target in targets.TARGETS.values():
        chip = target.chip
        assert chip.peak and chip.link and "2026" in chip.source
        # A plausible machine: 100 to 600 operations for each byte of memory traffic.
        assert 100 < chip.peak / chip.bandwidth < 600
        assert bool(chip.cycles) == (chip.platform == "tpu")


@pytest.mark.parametrize(
    ("other", "name"), [("V5litepod-8", "v5e-8"), ("ct6e-standard-8t", "v6e-8"), ("H100", "h100")]
)
def test_names_of_machine_types_work(other: str, name: str) -> None:
    assert targets.get(other) is targets.TARGETS[name]


def test_a_wrong_name_is_answered_with_the_nearest_one() -> None:
    with pytest.raises(UserError, match=r"target = 'v6e-7': no such target. Did you mean v6e-\d\?"):
        targets.get("v6e-7")


def test_a_text_describes_another_gpu() -> None:
    target = targets.from_target_config(CONFIG, 2, "a100.pbtxt")
    assert (target.chip.name, target.devices) == ("NVIDIA A100-SXM4-80GB", 2)
    assert (target.chip.memory, target.chip.bandwidth) == (80 * 2**30, 2.039e12)
    assert target.chip.peak is None
    assert target.options == {"target_config": CONFIG}


def test_a_described_gpu_of_a_known_model_has_its_peak() -> None:
    text = CONFIG.replace("NVIDIA A100-SXM4-80GB", "NVIDIA H200")
    chip = targets.from_target_config(text, 1, "own.pbtxt").chip
    assert (chip.peak, chip.link) == (targets.H200.peak, targets.H200.link)
    assert (chip.bandwidth, chip.source) == (2.039e12, "own.pbtxt")


@pytest.mark.parametrize("text", ["", CONFIG.replace("85899345920", "much")])
def test_a_text_that_describes_no_gpu_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"^a100.pbtxt: is not the description of a GPU"):
        targets.from_target_config(text, 1, "a100.pbtxt")


@pytest.mark.parametrize(
    ("name", "words"), [("v5e-1", r"libtpu.*\.\[tpu\]"), ("h100", r"CUDA plugin.*\.\[cuda\]")]
)
def test_a_missing_compiler_is_named_with_its_extra(
    name: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=words):
        targets.make_mesh(targets.get(name))
