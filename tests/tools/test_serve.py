"""Tests the command serve: it reports when it is ready, and stops on Ctrl-C."""

import json
import pathlib
import socket
import subprocess
import sys
import urllib.request

import numpy as np
import pytest

from inception_jax.inference.gradcam import encode_png
from tests import command, served

pytest.importorskip("uvicorn", reason="needs the extra 'serve'")


def test_serves_until_interrupted(tmp_path: pathlib.Path) -> None:
    with served.running(tmp_path, "--layer=inception_3d") as (address, process):
        with urllib.request.urlopen(address) as answer:
            assert b"Classify an image" in answer.read()
        data = encode_png(np.zeros((8, 8, 3), np.uint8))
        with urllib.request.urlopen(f"{address}/predict", data=data) as answer:
            assert len(json.load(answer)["guesses"]) == 5
        code, written = served.interrupt(process)
    assert code == 0, written
    assert "Traceback" not in written and "error" not in written


def test_port_in_use_is_reported_immediately() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = command.run("tools.serve", "--weights=none.safetensors", f"--port={port}")
    assert done.returncode == 2
    assert f"--port={port}: cannot listen: Address already in use" in done.stderr


def test_name_of_no_host_is_reported() -> None:
    done = command.run("tools.serve", "--weights=none.safetensors", "--host=127..0.1")
    assert done.returncode == 2
    assert done.stderr == "error: --host=127..0.1: is not the name or address of a host\n"


def test_missing_extra_says_how_to_install_it() -> None:
    code = (
        "import sys; sys.modules['uvicorn'] = None; sys.argv = ['serve', '--weights=x'];"
        "from inception_jax import cli; from inception_jax.tools import serve;"
        "cli.run(serve.main, '')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=command.ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "needs uvicorn, which is not installed; run pip install -e '.[serve]'" in done.stderr
