"""The compilation cache, in subprocesses, because JAX opens it once per process."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import warnings

import jax
import pytest

from inception_jax.errors import UserError
from inception_jax.runtime import compilation_cache

ROOT = pathlib.Path(__file__).parents[2]

# Prints the result and whether it came from the cache.
COMPILE = """
from inception_jax.runtime import compilation_cache, devices
def log(line):
    print("log:", line)
devices.initialize(platform="cpu", log=log)
errors = compilation_cache.log_cache_errors(log)
errors.__enter__()
import atexit
atexit.register(errors.__exit__, None, None, None)
import jax
hits = []
jax.monitoring.register_event_listener(
    lambda event, **_: event.endswith("cache_hits") and hits.append(event))
print(jax.config.jax_compilation_cache_dir)
print(jax.jit(lambda x: x * 2 + 1)(20), "cached" if hits else "compiled")
"""
# Requests the program again, as a later start does, from disk.
AGAIN = """
hits.clear()
jax.clear_caches()
print(jax.jit(lambda x: x * 2 + 1)(20), "cached" if hits else "compiled")
"""
# A file that grows beyond this fails as on a full disk.
FULL = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))\n"
# The same, but the system kills the process in the middle of the write.
KILLED = FULL + "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_DFL)\n"


def run(script: str, **environment: str) -> subprocess.CompletedProcess:
    base = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XDG_"))}
    base |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "PYTHONWARNINGS": "default"}
    return subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", script],
        env=base | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


def compile_in(script: str = COMPILE, **environment: str) -> list[str]:
    """Returns the output of a process that compiles a program; stderr must be empty."""
    done = run(script, **environment)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout.splitlines()


def entries(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(folder.glob("*-cache"))


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"HOME": "{}/h"}, "{}/h/.cache/inception_jax/xla"),
        ({"HOME": "{}/h", "JAX_COMPILATION_CACHE_DIR": "~/j"}, "{}/h/j"),
        ({"HOME": "{}/h", "JAX_COMPILATION_CACHE_DIR": ""}, ""),
    ],
)
def test_programs_are_cached_in_the_user_folder(
    environment: dict[str, str], folder: str, tmp_path: pathlib.Path
) -> None:
    filled = {name: value.format(tmp_path) for name, value in environment.items()}
    where = folder.format(tmp_path)
    again = "41 cached" if where else "41 compiled"
    assert compile_in(COMPILE + AGAIN, **filled) == [where, "41 compiled", again]
    if where and "JAX_COMPILATION_CACHE_DIR" not in environment:
        assert pathlib.Path(where).stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"XDG_CACHE_HOME": "{}/x"}, "{}/x/inception_jax/xla"),
        ({"XDG_CACHE_HOME": "relative"}, "{}/h/.cache/inception_jax/xla"),
        ({"JAX_COMPILATION_CACHE_DIR": "{}/j"}, "{}/j"),
    ],
)
def test_environment_selects_the_folder(
    environment: dict[str, str],
    folder: str,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path / "h"))
    for name, value in environment.items():
        monkeypatch.setenv(name, value.format(tmp_path))
    updates: dict[str, object] = {}
    # Do not change the settings of this process.
    monkeypatch.setattr(jax.config, "update", updates.__setitem__)
    compilation_cache.enable(print)
    where = folder.format(tmp_path)
    assert updates.get("jax_compilation_cache_dir") == where
    if "JAX_COMPILATION_CACHE_DIR" not in environment:
        assert pathlib.Path(where).stat().st_mode & 0o777 == 0o700


def test_cache_may_be_in_a_bucket(bucket: str) -> None:
    where = f"{bucket}/programs"
    found = compile_in(COMPILE + AGAIN, JAX_COMPILATION_CACHE_DIR=where)
    assert found == [where, "41 compiled", "41 cached"]


def test_other_urls_are_no_cache_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "s3://b/x")
    with pytest.raises(UserError, match=r"^JAX_COMPILATION_CACHE_DIR=s3://b/x: is a URL"):
        compilation_cache.enable(print)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A cache with the program."""
    folder = tmp_path_factory.mktemp("cache")
    compile_in(JAX_COMPILATION_CACHE_DIR=str(folder))
    return folder


@pytest.mark.parametrize("damage", [0, 1, 100])
def test_corrupt_entry_is_logged_once_and_rewritten(damage: int, filled: pathlib.Path) -> None:
    # In place, because older versions of JAX find no entries in another folder.
    for entry in entries(filled):
        entry.write_bytes(entry.read_bytes()[:damage])
    where = {"JAX_COMPILATION_CACHE_DIR": str(filled)}
    folder, logged, *results = compile_in(COMPILE + AGAIN, **where)
    assert logged.startswith(f"log: {folder}: cannot read compiled programs: ")
    assert results == ["41 compiled", "41 cached"]


def test_kill_during_write_does_not_affect_later_starts(tmp_path: pathlib.Path) -> None:
    where = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path)}
    assert run(KILLED + COMPILE, **where).returncode == -signal.SIGXFSZ
    assert [entry.stat().st_size for entry in entries(tmp_path)] == [500]
    assert compile_in(COMPILE + AGAIN, **where)[-2:] == ["41 compiled", "41 cached"]


def test_full_disk_is_logged_once_and_leaves_no_partial_entry(tmp_path: pathlib.Path) -> None:
    where = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path)}
    # Two programs that cannot be cached.
    script = FULL + COMPILE + "print(jax.jit(lambda x: x - 1)(20))"
    done = run(script, **where)
    assert not done.stderr
    folder, logged, *results = done.stdout.splitlines()
    assert logged.startswith(f"log: {folder}: cannot write compiled programs: ")
    assert "File too large" in logged
    assert results == ["41 compiled", "19"]
    assert not entries(tmp_path)


@pytest.mark.parametrize("name", [".cache", ".cache/inception_jax/xla"])
def test_unwritable_folder_is_logged_and_the_run_continues(
    name: str, tmp_path: pathlib.Path
) -> None:
    # A file is in the way; permissions would not stop root.
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    logged, folder, result = compile_in(HOME=str(tmp_path))
    assert logged.startswith("log: compilation cache disabled; ")
    assert str(path) in logged
    assert (folder, result) == ("None", "41 compiled")


def test_unknown_home_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> pathlib.Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pathlib.Path, "home", no_home)
    logged: list[str] = []
    compilation_cache.enable(logged.append)
    assert logged == [
        "compilation cache disabled; programs are recompiled at every start: Could not determine "
        "home directory."
    ]


def test_folder_of_another_user_is_not_used(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its owner could make this process run arbitrary programs."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    logged: list[str] = []
    compilation_cache.enable(logged.append)
    assert len(logged) == 1
    assert "owned by another user" in logged[0]


def test_least_recently_used_entries_are_evicted(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "inception_jax" / "xla"
    folder.mkdir(parents=True)
    for name, read, written in [("a", 5, 1), ("b", 2, 2), ("c", 3, 3), ("d", 1, 4)]:
        path = folder / f"{name}-cache"
        path.write_bytes(bytes(100))
        os.utime(path, (read, written))
    logged: list[str] = []
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compilation_cache, "MAX_BYTES", 250)
    # Do not change the settings of this process.
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    compilation_cache.enable(logged.append)
    assert [path.name for path in entries(folder)] == ["a-cache", "d-cache"]
    assert not logged


def test_concurrent_processes_share_the_cache(tmp_path: pathlib.Path) -> None:
    where = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path)}
    base = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XDG_"))}
    base |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"} | where
    started = [
        subprocess.Popen(
            [sys.executable, "-c", COMPILE], env=base, cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    for process in started:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0
        assert "\n41 " in output
    assert compile_in(**where) == [str(tmp_path), "41 cached"]


READING = "Error reading persistent compilation cache entry for 'x': no"


@pytest.mark.parametrize("fails", [False, True])
def test_warnings_are_restored_after_the_block(fails: bool) -> None:
    before = (list(warnings.filters), warnings.showwarning)
    lines: list[str] = []
    shown: list[str] = []
    with contextlib.suppress(KeyError), warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_, **__: shown.append(str(message))
        inside = (list(warnings.filters), warnings.showwarning)
        with contextlib.suppress(KeyError), compilation_cache.log_cache_errors(lines.append):
            for _ in range(2):
                warnings.warn(READING, stacklevel=1)
                warnings.warn("another", stacklevel=1)
            if fails:
                raise KeyError
        assert (list(warnings.filters), warnings.showwarning) == inside
    assert len(lines) == 1 and lines[0].endswith("cannot read compiled programs: no")
    assert shown == ["another"] * 2
    assert (list(warnings.filters), warnings.showwarning) == before
