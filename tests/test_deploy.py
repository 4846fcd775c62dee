"""The Dockerfile, the Kubernetes manifests and the script for hosts, without a cloud."""

import copy
import fnmatch
import functools
import itertools
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from typing import Any, NamedTuple

import jsonschema
import pytest
import yaml

from inception_jax import config as configs
from inception_jax.errors import EXIT_PREEMPTED
from tests import command
from tests.markdown import split

ROOT = command.ROOT
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


class Step(NamedTuple):
    """An instruction of the Dockerfile, in the stage of this number."""

    stage: int
    name: str
    text: str


@functools.cache
def steps() -> tuple[Step, ...]:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    found: list[Step] = []
    stage = -1
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if line.strip():
            name, _, rest = line.partition(" ")
            stage += name == "FROM"
            found.append(Step(stage, name, rest.strip()))
    return tuple(found)


def texts(name: str) -> list[str]:
    return [step.text for step in steps() if step.name == name]


def defaults() -> dict[str, str]:
    """Returns the default of each build argument."""
    return dict(text.split("=") for text in texts("ARG") if "=" in text)


# Dockerfile


def test_the_linter_finds_nothing_in_the_dockerfile() -> None:
    linter = shutil.which("hadolint", path=sysconfig.get_path("scripts")) or "hadolint"
    done = subprocess.run([linter, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_defaults_of_the_build_arguments_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(defaults()) == {"PYTHON", "EXTRAS"}
    assert (ROOT / "requirements" / f"python{defaults()['PYTHON']}.txt").is_file()
    assert {*defaults()["EXTRAS"].split(","), "tpu"} <= set(extras["optional-dependencies"])


def test_what_the_dockerfile_copies_exists_and_is_sent_to_the_builder() -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    kept = {line.removeprefix("!").rstrip("/") for line in ignored if line.startswith("!")}
    assert "*" in ignored
    for text in texts("COPY"):
        if text.startswith("--from="):
            continue
        for source in text.split()[:-1]:
            source = source.replace("${PYTHON}", defaults()["PYTHON"])
            assert (ROOT / source).exists()
            assert pathlib.PurePath(source).parts[0] in kept, f"{source} is in .dockerignore"


def test_both_stages_have_the_same_slim_base() -> None:
    bases = {text.removesuffix(" AS build") for text in texts("FROM")}
    assert len(bases) == 1 and fnmatch.fnmatch(bases.pop(), "python:${PYTHON}-slim-*")


def test_the_container_does_not_run_as_root() -> None:
    assert [int(text) for text in texts("USER")] == [1000]
    # Kubernetes knows only numbers, and the files belong to the last stage's user.
    assert steps()[-1].stage == 1 and "--uid 1000" in texts("RUN")[-1]


def test_signals_reach_the_command() -> None:
    """In the exec form, no shell is between; tini passes them on to Python, unlike process 1."""
    (entrypoint,) = texts("ENTRYPOINT")
    assert json.loads(entrypoint) == ["tini", "--", "python", "-m", "inception_jax.main"]


@pytest.mark.slow
def test_the_build_steps_install_the_command(tmp_path: pathlib.Path) -> None:
    """In a fresh folder and environment.

    The dependencies are those of this environment, so nothing is downloaded; pip still checks that
    they are the pinned ones.
    """
    venv, folder = tmp_path / "venv", tmp_path
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"], "PIP_NO_INDEX": "1"}
    arguments = defaults() | {"PYTHON": PYTHON}

    def filled(text: str) -> str:
        for name, value in (arguments | {"PATH": environment["PATH"]}).items():
            text = text.replace(f"${{{name}}}", value).replace(f"${name}", value)
        return text.replace("/opt/venv", str(venv)).replace("/src", str(tmp_path / "src"))

    for step in steps():
        if step.stage != 0:
            continue
        text = filled(step.text)
        if step.name == "ENV":
            environment |= dict(pair.split("=", 1) for pair in text.split())
        elif step.name == "WORKDIR":
            folder = pathlib.Path(text)
            folder.mkdir()
        elif step.name == "COPY":
            *sources, target = text.split()
            for source in sources:
                to = folder / target
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, to, dirs_exist_ok=True)
                    continue
                if target.endswith("/"):
                    to.mkdir(exist_ok=True)
                shutil.copy(ROOT / source, to)
        elif step.name == "RUN":
            done = subprocess.run(
                ["/bin/sh", "-c", text.replace("python -m venv", f"{sys.executable} -m venv")],
                cwd=folder,
                env=environment,
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
            (packages,) = (venv / "lib").glob("python*/site-packages")
            (packages / "tests.pth").write_text(f"{sysconfig.get_path('purelib')}\n")

    home = tmp_path / "home"
    home.mkdir()
    show = [*json.loads(texts("ENTRYPOINT")[0])[2:], "--config=experiments/digits.py"]
    done = subprocess.run(
        [venv / "bin" / show[0], *show[1:], "--print_config"],
        cwd=home,
        env=environment | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "digits" in done.stdout
    where = "import inception_jax; print(inception_jax.__file__)"
    found = subprocess.run([venv / "bin/python", "-c", where], cwd=home, capture_output=True)
    assert found.stdout.decode().startswith(str(venv))


# Kubernetes


@functools.cache
def schema() -> dict[str, Any]:
    path = ROOT / "tests" / "fixtures" / "jobset" / "schema.json"
    return json.loads(path.read_text(encoding="utf-8"))


def jobset() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "deploy" / "jobset.yaml").read_text(encoding="utf-8"))


def pod_of(job: dict[str, Any]) -> dict[str, Any]:
    return job["spec"]["template"]["spec"]


def test_the_jobset_follows_its_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(schema())
    jsonschema.validate(jobset(), schema())


@pytest.mark.parametrize(
    ("path", "name", "value"),
    [
        (("spec",), "replicatedJob", []),
        (("spec", "failurePolicy"), "maxRestarts", "3"),
        (("spec", "replicatedJobs", 0, "template", "spec"), "parallelism", "four"),
        (("spec", "replicatedJobs", 0, "template", "spec", "template", "spec"), "nodeselector", {}),
    ],
)
def test_the_schema_refuses_a_wrong_name_or_type(
    path: tuple[str | int, ...], name: str, value: object
) -> None:
    wrong = copy.deepcopy(jobset())
    place: Any = wrong
    for key in path:
        place = place[key]
    place[name] = value
    with pytest.raises(jsonschema.ValidationError, match=name):
        jsonschema.validate(wrong, schema())


def test_the_job_in_the_pages_follows_its_schema() -> None:
    blocks = [block for block in split("docs/running.md")[0] if block.language == "yaml"]
    jobs = [yaml.safe_load("\n".join(block.lines)) for block in blocks]
    assert [job["kind"] for job in jobs] == ["Job"]
    of_job = schema()["properties"]["spec"]["properties"]["replicatedJobs"]["items"]
    for job in jobs:
        jsonschema.validate(job["spec"], of_job["properties"]["template"]["properties"]["spec"])


def test_the_jobset_has_a_pod_for_each_host_of_its_slice() -> None:
    (slices,) = jobset()["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    pod = pod_of(slices["template"])
    (container,) = pod["containers"]
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    width, height = map(int, topology.split("x"))
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert slices["replicas"] == 1
    assert job["parallelism"] == job["completions"] == width * height / chips


def test_the_jobset_restarts_a_run_that_saved() -> None:
    (slices,) = jobset()["spec"]["replicatedJobs"]
    policy = slices["template"]["spec"]["podFailurePolicy"]["rules"]
    (codes,) = (rule["onExitCodes"] for rule in policy if "onExitCodes" in rule)
    (container,) = pod_of(slices["template"])["containers"]
    assert codes == {
        "containerName": container["name"],
        "operator": "In",
        "values": [EXIT_PREEMPTED],
    }
    # Kubernetes requires it of a job with such a policy.
    assert pod_of(slices["template"])["restartPolicy"] == "Never"


@pytest.mark.parametrize("manifest", ["deploy/jobset.yaml", "docs/running.md"])
def test_the_arguments_of_the_manifests_exist(manifest: str) -> None:
    text = (ROOT / manifest).read_text(encoding="utf-8")
    if manifest.endswith(".md"):
        (text,) = (
            "\n".join(block.lines) for block in split(manifest)[0] if "yaml" in block.language
        )
    arguments = dict(re.findall(r"--([\w.]+)(?:=([^\s,\]]+))?", text))
    assert {"config", "workdir", "config.data.directory"} <= set(arguments)
    help_text = command.check("main", "--help")
    for name in arguments:
        if name.startswith("config."):
            configs.check_path(name.removeprefix("config."))
        else:
            assert re.search(rf"^  --{name}\b", help_text, re.MULTILINE), name
    assert (ROOT / arguments["config"]).is_file()


def test_the_page_fills_in_the_jobset() -> None:
    text = (ROOT / "docs" / "tpu.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^(sed .*) \| kubectl apply -f -$", text, re.MULTILINE)
    filled = subprocess.run(
        ["sh", "-c", line],
        cwd=ROOT,
        env=os.environ | {"image": "a/b:1", "BUCKET": "c"},
        text=True,
        capture_output=True,
        check=True,
    )
    (slices,) = yaml.safe_load(filled.stdout)["spec"]["replicatedJobs"]
    (container,) = pod_of(slices["template"])["containers"]
    assert container["image"] == "a/b:1"
    assert "--workdir=gs://c/runs/tiny" in container["args"]
    assert "--config.data.directory=gs://c/data" in container["args"]


# The commands of docs/tpu.md, with programs that only record how they are called

CASES = {
    "One host: v6e, v5p": ["One host: v6e, v5p"],
    "Several hosts: v6e, v5p": ["One host: v6e, v5p", "Several hosts: v6e, v5p"],
    "One or several hosts: v5e, v4": ["One or several hosts: v5e, v4"],
}
RECORDER = """#!/bin/sh
for word in "$(basename "$0")" "$@"; do printf '%s\\0' "$word"; done >> "$CALLS"
printf '\\n\\0' >> "$CALLS"
case "$*" in
  *list-instances*) echo host-a ;;
  *"-f -") cat > /dev/null ;;
esac
"""


def script(*headings: str) -> str:
    """Returns the shell code of parts of docs/tpu.md, by their headings."""
    text = (ROOT / "docs" / "tpu.md").read_text(encoding="utf-8")
    parts = dict(part.split("\n", 1) for part in re.split(r"^#+ ", text, flags=re.MULTILINE)[1:])
    blocks = [re.findall(r"```bash\n(.*?)```", parts[heading], re.DOTALL) for heading in headings]
    return "\n".join(itertools.chain.from_iterable(blocks))


def calls_of(folder: pathlib.Path, code: str) -> list[list[str]]:
    """Returns the programs that shell code calls, each with its arguments."""
    for name in ("gcloud", "kubectl", "docker", "tensorboard", "python"):
        (folder / name).write_text(RECORDER, encoding="utf-8")
        (folder / name).chmod(0o755)
    calls = folder / "calls"
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "CALLS": str(calls)}
    command = ["bash", "-euo", "pipefail", "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    recorded = calls.read_text(encoding="utf-8").split("\n\0")
    return [call.split("\0")[:-1] for call in recorded if call]


@pytest.mark.parametrize("case", CASES)
def test_the_commands_for_machines_are_passed_on_as_meant(
    case: str, tmp_path: pathlib.Path
) -> None:
    shared = ("Set up the hosts", "Prepare the data once", "Train", "Watch", "Delete")
    stop = "Stop, resume, clean up"
    code = script("Variables and a bucket", *CASES[case], *shared, stop)
    calls = calls_of(tmp_path, code)
    assert ["create"] in [call[3:4] for call in calls]
    remote = [call[-1].removeprefix("--command=") for call in calls if "ssh" in call]
    assert len(remote) == len(re.findall(r"^\$all ", code, re.MULTILINE))
    for call in calls:
        # All but the commands for the hosts are single words: nothing was split or left unset.
        assert not [word for word in call[:-1] if re.search(r"\s|\$|=$", word)], call
    (started,) = [shlex.split(each) for each in remote if each.startswith("tmux new-session")]
    *tmux, inner = started
    assert tmux == ["tmux", "new-session", "-d", "-s", "train"]
    words = shlex.split(inner)
    assert words[:4] == ["cd", "inception_jax", "&&", "exec"]
    assert ("--distributed" in words) == (case != "One host: v6e, v5p")
    assert "--workdir gs://my-bucket/runs/tiny" in inner and inner.endswith(">> ~/train.log 2>&1")


def test_the_commands_for_kubernetes_are_passed_on_as_meant(tmp_path: pathlib.Path) -> None:
    calls = calls_of(tmp_path, script("Variables and a bucket", "GKE"))
    (build,) = [call for call in calls if call[:2] == ["docker", "build"]]
    image = "us-east5-docker.pkg.dev/my-project/inception-jax/train:1"
    assert build[2:] == ["--build-arg", "EXTRAS=gcs,tpu", "--tag", image, "."]
    for call in calls:
        assert not [word for word in call if re.search(r"\s|\$|=$", word)], call


# deploy/ssh_all.sh

GCLOUD = """#!/bin/sh
# Knows a group of two hosts and an empty one, and runs the commands for hosts here.
case "$*" in
  "compute instance-groups managed list-instances empty "*) ;;
  "compute instance-groups managed list-instances group --project=p --zone=z "*)
    printf 'host-a\\nhost-b\\n' ;;
  "compute ssh host-"?" --project=p --zone=z --command="*) exec sh -c "${6#--command=}" ;;
  *) echo "unexpected: $*" >&2; exit 99 ;;
esac
"""


def on_all(
    folder: pathlib.Path, remote: str, *, group: str = "group"
) -> subprocess.CompletedProcess[str]:
    """Runs a command with deploy/ssh_all.sh on two made-up hosts."""
    gcloud = folder / "gcloud"
    gcloud.write_text(GCLOUD, encoding="utf-8")
    gcloud.chmod(0o755)
    return subprocess.run(
        [ROOT / "deploy" / "ssh_all.sh", *([remote] if remote else [])],
        env={"PATH": f"{folder}:{os.environ['PATH']}", "PROJECT": "p", "ZONE": "z", "NAME": group},
        capture_output=True,
        text=True,
    )


def test_a_command_runs_on_all_hosts_and_its_output_names_them(tmp_path: pathlib.Path) -> None:
    done = on_all(tmp_path, "echo 'one  two'; echo three >&2")
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(done.stdout.splitlines()) == [
        "host-a: one  two",
        "host-a: three",
        "host-b: one  two",
        "host-b: three",
    ]


def test_the_hosts_work_at_the_same_time(tmp_path: pathlib.Path) -> None:
    """Each waits for the other one, as the processes of a run do."""
    meet = f'cd {tmp_path}; touch "$$"; while [ $(ls | grep -c "^[0-9]") -lt 2 ]; do :; done'
    assert on_all(tmp_path, meet).returncode == 0


def test_a_failure_on_one_host_is_the_result(tmp_path: pathlib.Path) -> None:
    done = on_all(tmp_path, f"mkdir {tmp_path}/once || exit 7")
    assert done.returncode == 7


def test_a_group_without_hosts_and_a_missing_command_are_refused(tmp_path: pathlib.Path) -> None:
    done = on_all(tmp_path, "true", group="empty")
    assert done.returncode == 1 and "NAME=empty: the managed instance group has no" in done.stderr
    done = on_all(tmp_path, "")
    assert done.returncode == 2 and done.stderr.startswith("usage: PROJECT=PROJECT")
