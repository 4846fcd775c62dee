"""Set-up of JAX, in processes of their own, for it can be set up once only."""

import os
import pathlib
import subprocess
import sys

import pytest

SCRIPT = (
    "from inception_jax import runtime; runtime.initialize(platform='cpu'); import jax; "
    "print(jax.default_backend(), jax.config.jax_compilation_cache_dir)"
)


def run(**environment: str) -> str:
    base = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XDG_"))}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=base | environment,
        cwd=pathlib.Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("environment", "cache"),
    [
        ({"HOME": "/h"}, "/h/.cache/inception_jax/xla"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/inception_jax/xla"),
        ({"JAX_COMPILATION_CACHE_DIR": "/j"}, "/j"),
        ({"JAX_COMPILATION_CACHE_DIR": ""}, ""),
    ],
)
def test_compiled_programs_are_kept_in_the_users_cache(
    environment: dict[str, str], cache: str
) -> None:
    assert run(**environment) == f"cpu {cache}".strip()
