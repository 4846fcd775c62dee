"""Tests the drawing of a network, parsed from Graphviz's output."""

import pathlib
import shutil
import xml.etree.ElementTree as ElementTree

import pytest
from PIL import Image

from inception_jax.config import Model
from inception_jax.errors import UserError
from inception_jax.inspection import drawing, structure
from inception_jax.models import networks

graphviz = pytest.importorskip("graphviz")
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def analyzed() -> structure.Structure:
    return structure.analyze(networks.create(Model(aux_heads=True), 200), 64)


def write(
    analyzed: structure.Structure, folder: pathlib.Path
) -> tuple[list[pathlib.Path], list[str]]:
    log: list[str] = []
    written = drawing.write(drawing.draw(analyzed, "a <title> & more"), folder, log=log.append)
    return written, log


@pytest.mark.skipif(shutil.which("dot") is None, reason="needs the program dot, of Graphviz")
def test_every_layer_edge_and_module_is_drawn(
    analyzed: structure.Structure, tmp_path: pathlib.Path
) -> None:
    written, log = write(analyzed, tmp_path)
    assert [path.name for path in written] == [
        f"architecture.{kind}" for kind in ("dot", "svg", "png")
    ]
    assert log == []
    groups = ElementTree.parse(tmp_path / "architecture.svg").getroot().iter(f"{SVG}g")
    drawn: dict[str, list[str]] = {"node": [], "edge": [], "cluster": []}
    for group in groups:
        words = " ".join(text.text or "" for text in group.iter(f"{SVG}text"))
        drawn.get(group.get("class", ""), []).append(words)
    # Plus the image, three outputs, and the forks at module inputs.
    forks = sum(name.startswith("inception") for name in analyzed.module_classes if "/" not in name)
    assert len(drawn["node"]) == len(analyzed.layers) + 4 + forks
    assert len(drawn["edge"]) == sum(len(layer.inputs) for layer in analyzed.layers) + 3 + forks
    modules = [block.name for block in analyzed.blocks() if len(block.layers) > 1]
    assert sorted(words.split()[0] for words in drawn["cluster"]) == sorted(modules)
    assert "conv 7×7/2, 64 BatchNorm, ReLU" in drawn["node"]
    assert " ".join(drawn["edge"]).count("64×64×3") == 1
    assert "200" in " ".join(drawn["edge"])
    with Image.open(tmp_path / "architecture.png") as image:
        assert min(image.size) > 500


def test_without_graphviz_only_the_source_is_written(
    analyzed: structure.Structure, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    written, log = write(analyzed, tmp_path)
    assert written == [tmp_path / "architecture.dot"]
    source = written[0].read_text(encoding="utf-8")
    assert "a &lt;title&gt; &amp; more" in source
    assert "cluster_inception_3a" in source
    assert "apt-get install graphviz" in log[0]
    assert log[0].endswith("dot -Tsvg -O architecture.dot")


def test_unwritable_folder_is_reported(analyzed: structure.Structure) -> None:
    with pytest.raises(UserError, match="/proc/no"):
        write(analyzed, pathlib.Path("/proc/no"))
