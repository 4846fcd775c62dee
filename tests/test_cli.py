"""The command line as a process of its own: exit codes and messages."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from inception_jax import cli
from inception_jax import config as configs
from inception_jax.config import View
from tests import command

ROOT = pathlib.Path(__file__).parents[1]


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    "module",
    ["main", "tools.prepare", "tools.plot", "tools.diagnose", "tools.report", "tools.find_lr"],
)
def test_help_exits_with_0(module: str) -> None:
    done = run(f"inception_jax.{module}", "--help")
    assert done.returncode == 0
    assert f"python -m inception_jax.{module}" in done.stdout
    if module not in ("tools.plot", "tools.diagnose", "tools.report"):
        assert "--config.train.batch_size=128" in done.stdout
        assert "Experiment files are executed" in done.stdout


def run_script(path: pathlib.Path, *arguments: str) -> subprocess.CompletedProcess:
    """Runs a Python file that imports the package."""
    return subprocess.run(
        [sys.executable, path, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def experiment(folder: pathlib.Path, body: str) -> str:
    path = folder / "experiment.py"
    path.write_text(f"from inception_jax.config import Config\ndef get_config():\n    {body}\n")
    return str(path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config.train.batchsize=3"], "Did you mean --config.train.batch_size?"),
        (["--config.train=3"], "is a group of settings"),
        (["--config.train.batch_size=many"], "many"),
        (["--config.train.batch_size=0"], "config.train.batch_size = 0: must be at least 1"),
        (["--config.model.name=goglenet"], "Did you mean googlenet"),
        (["--noconfig.augment.flop"], "augment.flip"),
        (["--workdri=x"], "--workdri: no such flag. Did you mean --workdir"),
        (["--lr=0.1"], "Did you mean --config.schedule.learning_rate=0.1?"),
        (["--batch-size", "8"], "Did you mean --config.train.batch_size"),
        (["--resume"], "Runs resume automatically"),
        (["--config.train.lr=0.1"], "Did you mean --config.schedule.learning_rate=0.1?"),
        (
            ["--config.train.batch_size=60 images"],
            "without a unit: --config.train.batch_size=60",
        ),
        (
            ["--config.train.length.epochs=9"],
            "It was renamed; use --config.train.duration='9 epochs'.",
        ),
        (["--config.data.image_size=64px"], "of type int, without a unit: --config.data.image_siz"),
        (["--config=experiments/tiny.py"], "--config: given 2 times (experiments/digits.py, e"),
        (["--config.train.batch_size", "--mode=eval"], "--config.train.batch_size: needs a value"),
        (["--checkpoint", "--mode=eval"], "--checkpoint: needs a value"),
        (["--checkpoint=last"], "--checkpoint=last: requires --mode=eval"),
        (["--mode=evaluate"], "train"),
        (["stray"], "'stray'"),
        (["--platform=gpu"], "platform 'gpu': not available"),
        (["--platform=gpo"], "Did you mean gpu"),
        (["--coordinator_address=localhost:1"], "--process_count"),
        (["--process_count=2"], "--process_count=2: requires --coordinator_address"),
        (
            ["--config.log.options=3"],
            "--config.log.options.NAME=VALUE, or remove all with --config.",
        ),
        (["--config.log.options.a=3"], "has no options; --config.log.options= removes those of an"),
        (["--config.model.options.a.b=3"], "there is no mapping config.model.options.a"),
    ],
)
def test_usage_error_gives_one_message_and_exit_code_2(
    arguments: list[str], words: str, tmp_path: pathlib.Path
) -> None:
    base = ["--config", "experiments/digits.py", "--workdir", str(tmp_path / "run")]
    done = run("inception_jax.main", *base, *arguments)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return Config(batch=3)", "Did you mean train.batch_size"),
        ("config = Config(); config.train.lr = 3; return config", "config.train.lr: no such"),
        (
            "config = Config(); config.train.length.epochs = 3",
            "It was renamed; use train.duration=",
        ),
        ("Config().log.every.steps = 3", "A duration is one string, such as '20 epochs'"),
        ("return 3", "must return an inception_jax.config.Config"),
        ("return nothing", "line 3"),
    ],
)
def test_failing_experiment_file_is_named(body: str, words: str, tmp_path: pathlib.Path) -> None:
    path = experiment(tmp_path, body)
    done = run("inception_jax.main", "--config", path, "--workdir", str(tmp_path / "run"))
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("joined", [True, False])
def test_experiment_can_import_its_sibling_from_anywhere(
    joined: bool, tmp_path: pathlib.Path
) -> None:
    folder = tmp_path / "above" / "recipes"
    folder.mkdir(parents=True)
    (folder / "base.py").write_text("SIZE = -7\n")
    path = experiment(folder, "from recipes import base; raise ValueError(f'size {base.SIZE}')")
    flag = [f"--config={path}"] if joined else ["--config", path]
    done = subprocess.run(
        [sys.executable, "-m", "inception_jax.main", *flag, "--workdir=run"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "size -7" in done.stderr


def test_the_experiments_own_values_are_known(tmp_path: pathlib.Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import json\n"
        "from inception_jax import cli\n"
        "config = cli.define_config()\n"
        "def main(_):\n"
        "    found = config.value.train.batch_size, str(config.value.evaluations['mirror'])\n"
        "    print(json.dumps([cli.experiment(), *found]))\n"
        "cli.run(main, '')\n"
    )
    done = subprocess.run(
        [
            sys.executable,
            script,
            "--config=experiments/tiny_cpu.py",
            "--config.train.batch_size=64",
            "--config.train.image_sizes=(16, 32, 64)",
            "--config.model.dtype=float32",
            "--noconfig.evaluation.flip_tta",
            "--config.evaluations.mirror.flip_tta",
            "--config.evaluations.mirror.every=1 epoch",
            "--config.evaluations.mirror.split=train",
            "--config.optimizer.name=muon",  # As it is.
            "--config.name=a, b",
        ],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    experiment, batch_size, mirror = json.loads(done.stdout)
    assert batch_size == 64
    every = "1 epoch"
    assert mirror == str(View(split="train", flip_tta=True, every=every))
    assert experiment == {
        "file": "experiments/tiny_cpu.py",
        "own": {
            "train.batch_size": 256,
            "train.image_sizes": [32, 48, 64],
            "model.dtype": "auto",
            "evaluation.flip_tta": True,
            "evaluations": {},
            "name": "tiny_cpu",
        },
    }


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("none.py", "none.py: file not found"),
        ("tiny", "Did you mean experiments/tiny.py"),
        ("digits.yp", "Did you mean experiments/digits.py"),
        ("experiments", "is a folder; use an experiment file, such as experiments/"),
        ("README.md", "the experiment file failed: SyntaxError"),
        ("", "--config: needs a value"),
    ],
)
def test_path_that_is_not_an_experiment_file_is_named(
    config: str, words: str, tmp_path: pathlib.Path
) -> None:
    done = run("inception_jax.main", f"--config={config}", "--workdir", str(tmp_path / "run"))
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_settings_without_an_experiment_are_refused(tmp_path: pathlib.Path) -> None:
    for flags, words in (
        ([f"--workdir={tmp_path}"], "not a run (it has no config.json). Start one"),
        ([f"--workdir={tmp_path}", "--config.seed=3"], "not a run"),
        (
            ["--config.seed=3", "--weights=x"],
            "--config.seed=3: overrides a setting",
        ),
        (["--weights=x"], "give --config="),
    ):
        done = run("inception_jax.main", *flags)
        assert done.returncode == 2
        assert words in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_experiment_file_may_have_any_name(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "a:b c"
    folder.mkdir()
    path = experiment(folder, "raise ValueError('was executed')")
    done = run("inception_jax.main", "--config", path, "--workdir", str(tmp_path / "run"))
    assert "was executed" in done.stderr


def test_text_after_a_colon_is_passed_to_get_config(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "experiment.py"
    path.write_text(
        "from inception_jax.config import Config\n"
        "def get_config(seed):\n    raise ValueError(f'seed {int(seed)}')\n"
    )
    done = run("inception_jax.main", f"--config={path}:-7", "--workdir", str(tmp_path / "run"))
    assert "seed -7" in done.stderr


@pytest.mark.parametrize("streams", ["1", "2>&1"])
def test_closed_pipe_ends_the_command_quietly(streams: str) -> None:
    merged = " 2>&1" if streams == "2>&1" else ""
    done = subprocess.run(
        [
            "bash",
            "-c",
            f"{sys.executable} -m inception_jax.main --help{merged} | head -n 1; "
            "echo ${PIPESTATUS[0]}",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stdout.splitlines()
    # As a shell reports SIGPIPE, or 0 where all was written before head ended.
    assert len(lines) == 2 and lines[1] in ("141", "0"), done.stdout
    assert done.stderr == ""


def test_missing_required_flags_are_named() -> None:
    done = run("inception_jax.main", "--config", "experiments/digits.py")
    assert done.returncode == 2
    assert "--workdir" in done.stderr


@pytest.mark.parametrize("workdir", ["/proc/no/such", "file/run"])
def test_unwritable_workdir_is_refused(workdir: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("in the way")
    path = tmp_path / workdir
    done = run("inception_jax.main", "--config", "experiments/digits.py", "--workdir", str(path))
    assert done.returncode == 2, done.stderr
    assert f"--workdir={path}" in done.stderr


@pytest.mark.parametrize(
    ("failure", "code", "words"),
    [
        ("KeyError('a bug')", 1, "KeyError: 'a bug'. Unexpected error"),
        ("MemoryError()", 1, "reduce config.train.batch_size"),
        ("RuntimeError('RESOURCE_EXHAUSTED: 80 GB')", 1, "config.train.grad_accum_steps"),
        ("FileNotFoundError(2, 'No such file', 'x.npy')", 2, "x.npy: No such file. Fix this, and"),
        ("OSError(12, 'Cannot allocate memory')", 1, "out of memory: OSError: [Errno 12]"),
        ("RuntimeError('first\\nsecond')", 1, "error: RuntimeError: first. Unexpected error"),
        ("KeyboardInterrupt()", 130, "rerun the same command"),
    ],
)
def test_failed_run_ends_with_the_remedy(
    failure: str, code: int, words: str, tmp_path: pathlib.Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        f"from inception_jax import cli\ndef main(_):\n    raise {failure}\ncli.run(main, '')\n"
    )
    done = run_script(script)
    assert done.returncode == code
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ") and words in last
    assert ("Traceback" in done.stderr) == (code == 1)


@pytest.mark.parametrize(
    ("arguments", "resumes"), [([], True), (["--mode=eval"], False), (["--print_config"], False)]
)
def test_only_an_interrupted_training_is_said_to_resume(
    arguments: list[str], resumes: bool, tmp_path: pathlib.Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from inception_jax import cli, main\n"
        "def interrupted(_):\n    raise KeyboardInterrupt\ncli.run(interrupted, '')\n"
    )
    experiment = ROOT / "experiments" / "digits.py"
    done = run_script(script, f"--config={experiment}", f"--workdir={tmp_path}", *arguments)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: interrupted; rerun the same command")
    assert last.endswith("(training resumes from its last checkpoint, if there is one)") == resumes


def test_requests_that_fail_after_the_first_are_not_reported(tmp_path: pathlib.Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import asyncio\nfrom inception_jax import cli\n"
        "class Request:\n    def __del__(self):\n        loop.call_soon_threadsafe(print)\n"
        "class Other:\n    def __del__(self):\n        raise ValueError('another')\n"
        "async def read(name):\n    raise ValueError(name)\n"
        "async def read_all():\n"
        "    tasks = [asyncio.ensure_future(read(name)) for name in ('first', 'second')]\n"
        "    await asyncio.wait(tasks)\n"
        "loop = asyncio.new_event_loop()\n"
        "def main(_):\n    loop.run_until_complete(read_all())\n    loop.close()\n"
        "    Request()\n    Other()\n    raise cli.UserError('failed')\n"
        "cli.run(main, '')\n"
    )
    done = run_script(script)
    assert done.returncode == 2 and done.stderr.endswith("error: failed\n")
    assert "ValueError: another" in done.stderr and "Event loop" not in done.stderr
    assert "never retrieved" not in done.stderr and "ValueError: second" not in done.stderr


# What stands at the other end of a command, and around it.


def run_in(
    folder: pathlib.Path, *arguments: str, **environment: str
) -> subprocess.CompletedProcess:
    """Runs a command in a folder."""
    return subprocess.run(
        [sys.executable, "-m", f"inception_jax.{arguments[0]}", *arguments[1:]],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("package", ["regular", "namespace"])
def test_installed_package_named_experiments_does_not_interfere(
    package: str, tmp_path: pathlib.Path
) -> None:
    theirs = tmp_path / "experiments"
    theirs.mkdir()
    (theirs / "tiny_base.py").write_text("raise RuntimeError('theirs')")
    if package == "regular":
        (theirs / "__init__.py").write_text("raise RuntimeError('theirs')")
    flag = f"--config={ROOT}/experiments/tiny_cpu.py"
    done = run_in(tmp_path, "main", flag, "--config.seed=seven", "--workdir=run")
    # The file was loaded: the flag's value is what is refused.
    assert done.returncode == 2 and "seven" in done.stderr and "theirs" not in done.stderr


def test_experiment_works_when_copied_with_its_base(tmp_path: pathlib.Path) -> None:
    for name in ("tiny_cpu.py", "tiny_base.py"):
        (tmp_path / name).write_bytes((ROOT / "experiments" / name).read_bytes())
    (tmp_path / "elsewhere").mkdir()
    arguments = ["main", "--config=../tiny_cpu.py", "--config.seed=seven", "--workdir=run"]
    # Without the project beside the package, as where it is installed.
    install = tmp_path / "site"
    install.mkdir()
    (install / "inception_jax").symlink_to(ROOT / "inception_jax")
    place = tmp_path / "elsewhere"
    done = run_in(place, *arguments, PYTHONPATH=str(install))
    assert done.returncode == 2 and "seven" in done.stderr, done.stderr
    (tmp_path / "tiny_base.py").unlink()
    done = run_in(place, *arguments, PYTHONPATH=str(install))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"Copy tiny_base.py to {tmp_path}" in done.stderr


LISTS = r"""
from inception_jax import cli, console
def main(_):
    console.log("gr\xfcn")
    print("gr\xfcn", flush=True)
    with open("next.txt", "w") as file:
        file.write("opened next")
        console.log("written")
        print("more", flush=True)
cli.run(main, "")
"""
DRAWS = r"""
from inception_jax import cli
def main(_):
    import matplotlib.figure
    matplotlib.figure.Figure().savefig("plot.png")
cli.run(main, "")
"""


def run_code(
    code: str, folder: pathlib.Path, environment: dict[str, str]
) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        check=False,
    )


@pytest.mark.parametrize(
    "environment",
    [
        {"MPLBACKEND": "module://matplotlib_inline.backend_inline"},
        {"HOME": "/proc/none", "MPLCONFIGDIR": "/proc/none", "XDG_CACHE_HOME": "/proc/none"},
        {"TMPDIR": "/proc/none"},
    ],
)
def test_plots_are_independent_of_the_environment(
    environment: dict[str, str], tmp_path: pathlib.Path
) -> None:
    done = run_code(DRAWS, tmp_path, environment)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert (tmp_path / "plot.png").stat().st_size


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "ascii:strict"},
        {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    ],
)
def test_output_is_independent_of_the_environment(
    environment: dict[str, str], tmp_path: pathlib.Path
) -> None:
    done = run_code(LISTS, tmp_path, environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.replace(b"\\xfc", "ü".encode()) == "grün\nmore\n".encode()
    assert done.stderr.count(b"\n") == 2


@pytest.mark.parametrize(
    ("closed", "output"),
    [
        (">&-", ""),
        (">&- 2>&- <&-", ""),
        ("2>&-", "grün\nmore\n"),
        ("2>/dev/full", "grün\nmore\n"),
        ("2> >(true)", "grün\nmore\n"),
    ],
)
def test_closed_standard_streams_do_not_fail_a_command(
    closed: str, output: str, tmp_path: pathlib.Path
) -> None:
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -c '{LISTS}' {closed}"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == output
    # Nothing of it went there.
    assert (tmp_path / "next.txt").read_text() == "opened next"


def test_print_config_shows_every_value_and_its_origin() -> None:
    flags = ["--config=experiments/digits.py", "--config.train.duration=3 steps"]
    # An empty value removes the entries before it.
    flags += [
        "--config.evaluations.small.size=8",
        "--config.evaluations.big.size=8",
        "--config.evaluations=",
    ]
    shown = command.check("main", *flags, "--config.evaluations.big.size=48", "--print_config")
    assert "small" not in shown
    lines = dict(line.split("  # ") for line in shown.splitlines())
    origins = {flag.strip(): origin for flag, origin in lines.items()}
    assert origins["--config.train.duration='3 steps'"] == "command line"
    assert origins["--config.evaluations.big.size=48"] == "command line"
    assert origins["--config.data.name=digits"] == "experiments/digits.py"
    assert origins["--config.model.norm=batch"] == "default"
    assert len(origins) >= len(list(configs.leaves())) - 8  # Empty mappings have no flag.


def test_tuples_of_words_need_no_quotes() -> None:
    expected = ["--config.evaluation.metrics=('top1', 'top5')"]
    assert cli.with_tuples(["--config.evaluation.metrics=top1, top5"]) == expected
    assert cli.with_tuples(["--config.evaluation.metrics", "top1,top5"]) == expected
    for empty in ("--config.schedule.boundaries=", "--config.train.image_sizes="):
        assert cli.with_tuples([empty]) == [f"{empty}()"]
    for unchanged in (
        "--config.log.writers=('a',)",
        "--config.train.image_sizes=16,32",
        "--config.name=a,b",
        "--workdir=a,b",
    ):
        assert cli.with_tuples([unchanged]) == [unchanged]
