"""Launch scripts: each is parsed, and run against stand-ins for the programs of a cluster."""

from __future__ import annotations

import os
import shlex
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from train import launch
from train.__main__ import _take_workdir
from train.checkpoint import MANIFEST
from train.config import RunConfig, load_recipe, parse_overrides
from train.distributed import Processes, take_flags
from train.errors import UserError

ROOT = Path(__file__).parents[2]
# What a shell or YAML could take for its own.
OVERRIDES = [
    "--schedule.steps",
    "7",
    "--data.source",
    "text/*.jsonl",
    'a b\'s "$HOME": #1',
    "--schedule.seconds",
    "None",
]
SLURM = "slurm pydoc_lm --nodes 4 --gpus-per-node 8 --workdir"
GKE = "gke lm_1b --image us-docker.pkg.dev/p/r/jattn:1 --claim runs --workdir /runs/a"
TPU_VM = "tpu_vm lm_1b --share 10.0.0.2:/vol --zone us-east5-a --workdir /mnt/share/a"


def script(capsys, *words: str, overrides: list[str] = OVERRIDES) -> str:
    launch.main([*" ".join(words).split(), "--dry-run", "--", *overrides])
    text = capsys.readouterr().out
    assert "%%" not in text
    return text


def assert_is_bash(text: str) -> None:
    done = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def assert_trains(words: list[str], recipe: str, workdir: str) -> None:
    """`words`, after `python`, mean to the trainer what was asked for."""
    assert words[:4] == ["-m", "train", "run", recipe]
    found, rest = _take_workdir(words[4:], Path("elsewhere"))
    assert found == Path(workdir)
    processes, rest = take_flags(rest)
    assert processes == Processes(automatic=True)
    config = parse_overrides(load_recipe(recipe), rest)
    assert isinstance(config, RunConfig)
    assert config.schedule.steps == 7
    assert config.data.source == ("text/*.jsonl", 'a b\'s "$HOME": #1')


def program(folder: Path, name: str, source: str = "") -> Path:
    """A stand-in that keeps its arguments in NAME.N, one file for each call, and then does `source`."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(
        f'#!/bin/bash\nn=$(ls {folder} | grep -c "^{name}\\.") || true\n'
        f'[[ $# == 0 ]] || printf "%s\\0" "$@" > {folder}/{name}.$(printf %02d "$n")\n{source}\n'
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def calls(folder: Path, name: str) -> list[list[str]]:
    return [path.read_text().split("\0")[:-1] for path in sorted(folder.glob(f"{name}.*"))]


def with_programs(folder: Path, **more: str) -> dict[str, str]:
    return os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"} | more


# Slurm


def run_slurm(text: str, folder: Path, srun: str) -> subprocess.CompletedProcess[str]:
    program(folder, "srun", srun)
    program(folder, "scontrol")
    (folder / "job").write_text(text)
    more = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "123", "SLURM_CPUS_PER_TASK": "8"}
    return subprocess.run(
        ["bash", str(folder / "job")],
        env=with_programs(folder, **more),
        cwd=folder,
        text=True,
        capture_output=True,
        check=False,
    )


def test_slurm_job_asks_for_what_jax_expects(capsys):
    text = script(capsys, SLURM, "/lustre/runs/a", "--time", "2-00:30:00")
    assert_is_bash(text)
    assert text.startswith("#!/bin/bash\n")
    head = text[: text.index("set -uo")]  # sbatch reads no option after the first command
    options = dict(line[8:].partition("=")[::2] for line in head.splitlines() if line.startswith("#SBATCH "))
    assert options == {
        "--job-name": "pydoc-lm",
        "--nodes": "4",
        "--ntasks-per-node": "8",
        "--gpus-per-node": "8",
        "--cpus-per-task": "8",
        "--exclusive": "",
        "--time": "2-00:30:00",
        "--signal": "TERM@120",
        "--requeue": "",
        "--open-mode": "append",
        "--output": "%x-%j.log",
    }
    assert text.count("#SBATCH") == len(options)


SEALS = "mkdir -p {w}/checkpoints/step_00000003; touch {w}/checkpoints/step_00000003/" + MANIFEST
FINISHES = "touch {w}/summary.json {w}/report.html"


@pytest.mark.parametrize(
    ("srun", "code", "requeued"),
    [
        (f"{SEALS}; {FINISHES}", 0, False),
        (SEALS, 0, True),  # stopped by its signal: saved, but not finished
        (f"{SEALS}; exit 3", 3, True),  # a node was lost
        (f"{SEALS}; exit 2", 2, False),
        ("exit 3", 3, False),  # it would fail for ever
        ("exit 143", 143, True),  # the signal came before the run could save
        ("exit 0", 1, False),
    ],
)
def test_slurm_queues_again_while_the_run_gets_on(capsys, tmp_path, srun, code, requeued):
    workdir = tmp_path / "runs of mine"
    old = workdir / "checkpoints" / "step_00000001"
    old.mkdir(parents=True)
    (old / MANIFEST).touch()
    os.utime(old / MANIFEST, (1e9, 1e9))  # an earlier attempt's
    text = launch.render(launch.Slurm(str(workdir), nodes=4), "pydoc_lm", OVERRIDES)
    assert_is_bash(text)
    done = run_slurm(text, tmp_path / "bin", srun.format(w=shlex.quote(str(workdir))))
    assert done.returncode == code, done.stderr
    ((first, python, *words),) = calls(tmp_path / "bin", "srun")
    assert (first, python) == ("--cpus-per-task=8", ".venv/bin/python")
    assert_trains(words, "pydoc_lm", str(workdir))
    assert calls(tmp_path / "bin", "scontrol") == [["requeue", "123"]] * requeued


def test_slurm_script_outlives_a_signal_that_its_processes_get_too(tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    srun = "kill -TERM $PPID; sleep 0.3; " + SEALS.format(w=workdir)
    done = run_slurm(launch.render(launch.Slurm(str(workdir), 1), "pydoc_lm", []), tmp_path / "bin", srun)
    assert done.returncode == 0, done.stderr
    assert calls(tmp_path / "bin", "scontrol") == [["requeue", "123"]]


# GKE


@pytest.mark.parametrize(
    ("slice_", "label", "hosts", "chips"),
    [
        ("--accelerator v5p --topology 8x8x8", "tpu-v5p-slice", 128, 4),
        ("--accelerator v6e --topology 16x16", "tpu-v6e-slice", 64, 4),
        ("--accelerator v6e --topology 2x4 --chips-per-host 8", "tpu-v6e-slice", 1, 8),
        ("--accelerator v5e --topology 1x1", "tpu-v5-lite-podslice", 1, 1),
        ("--accelerator tpu7x --topology 2x2x2", "tpu7x", 2, 4),
        ("--accelerator v4 --topology 2x2x4", "tpu-v4-podslice", 4, 4),
    ],
)
def test_jobset_has_a_pod_for_each_host(capsys, slice_, label, hosts, chips):
    jobset = yaml.safe_load(script(capsys, GKE, slice_))
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert jobset["metadata"]["name"] == "lm-1b"
    assert jobset["metadata"]["annotations"] == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }
    (group,) = jobset["spec"]["replicatedJobs"]
    assert (group["name"], group["replicas"]) == ("worker", 1)
    job = group["template"]["spec"]
    assert (job["parallelism"], job["completions"], job["completionMode"]) == (hosts, hosts, "Indexed")
    assert job["backoffLimit"] == 0
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    assert pod["terminationGracePeriodSeconds"] == 120
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": label,
        "cloud.google.com/gke-tpu-topology": slice_.split()[3],
    }
    (container,) = pod["containers"]
    assert container["image"] == "us-docker.pkg.dev/p/r/jattn:1"
    assert [port["containerPort"] for port in container["ports"]] == [8471, 8431, 8482]
    assert container["resources"]["limits"] == {"google.com/tpu": chips}
    assert container["volumeMounts"] == [{"name": "runs", "mountPath": "/runs"}]
    assert pod["volumes"] == [{"name": "runs", "persistentVolumeClaim": {"claimName": "runs"}}]
    # Code 2 fails all at once, anything else starts all again.
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [2]}
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] > 0
    assert policy["rules"] == [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]


def pod_command(capsys, workdir: Path) -> list[str]:
    jobset = yaml.safe_load(script(capsys, GKE, "--accelerator v5p --topology 4x4x4"))
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    *shell, text = pod["containers"][0]["command"]
    assert shell == ["bash", "-c"]
    assert_is_bash(text)
    # The claim is not mounted here; the command line keeps the path.
    return [*shell, text.replace("workdir=/runs/a\n", f"workdir={workdir}\n")]


@pytest.mark.parametrize(
    ("python", "index", "code"),
    [
        (FINISHES, 0, 0),
        ("exit 0", 0, 75),  # stopped and saved: Kubernetes must not take it for finished
        ("exit 0", 1, 0),  # only the first writes the report
        ("exit 2", 0, 2),
        ("exit 3", 1, 3),
    ],
)
def test_a_pod_ends_in_the_code_of_the_run(capsys, tmp_path, python, index, code):
    folder = tmp_path / "bin"
    program(folder, "python", python.format(w=tmp_path))
    environment = with_programs(folder, JOB_COMPLETION_INDEX=str(index))
    done = subprocess.run(pod_command(capsys, tmp_path), env=environment, cwd=tmp_path, check=False)
    assert done.returncode == code
    (words,) = calls(folder, "python")
    assert_trains(words, "lm_1b", "/runs/a")


def test_a_pod_that_is_evicted_lets_the_run_save(capsys, tmp_path):
    folder = tmp_path / "bin"
    saves = (
        f"trap 'sleep 0.3; touch {tmp_path}/saved; exit 0' TERM; touch {tmp_path}/began; while :; do sleep 0.05; done"
    )
    program(folder, "python", saves)
    pod = subprocess.Popen(pod_command(capsys, tmp_path), env=with_programs(folder), cwd=tmp_path)
    deadline = time.monotonic() + 20
    while not (tmp_path / "began").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    pod.send_signal(signal.SIGTERM)
    assert pod.wait(20) == 75
    assert (tmp_path / "saved").exists()


# Cloud TPU VMs


def run_tpu_vm(text: str, folder: Path, state: str | None, **more: str) -> str:
    answer = "exit 1" if state is None else f"echo {state}"
    program(folder, "gcloud", f"if [[ $4 == describe ]]; then {answer}; else cat > {folder}/stdin; fi")
    program(folder, "git", 'touch "${3#--output=}"')
    done = subprocess.run(
        ["bash"], input=text, env=with_programs(folder, **more), cwd=folder, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not (folder / "stdin").exists() or not (folder / "stdin").read_text()  # ssh must not eat the script
    return done.stdout


@pytest.mark.parametrize(
    ("accelerator", "runtime"),
    [
        ("v5p-32", "v2-alpha-tpuv5"),
        ("v6e-64", "v2-alpha-tpuv6e"),
        ("v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v4-32", "tpu-ubuntu2204-base"),
    ],
)
def test_tpu_vm_runs_the_same_command_on_all_workers(capsys, tmp_path, accelerator, runtime):
    text = script(capsys, TPU_VM, "--accelerator-type", accelerator)
    assert_is_bash(text)
    run_tpu_vm(text, tmp_path / "bin", None)
    describe, create, scp, *ssh = calls(tmp_path / "bin", "gcloud")
    assert describe[:5] == ["compute", "tpus", "tpu-vm", "describe", "lm-1b"]
    assert create[3:] == [
        "create",
        "lm-1b",
        "--zone=us-east5-a",
        f"--accelerator-type={accelerator}",
        f"--version={runtime}",
    ]
    (archive,) = calls(tmp_path / "bin", "git")
    assert archive[2] == f"--output={scp[4]}"
    assert scp[5:] == ["lm-1b:jattn.tar.gz", "--zone=us-east5-a", "--worker=all"]
    for call in ssh:
        assert call[:6] == ["compute", "tpus", "tpu-vm", "ssh", "lm-1b", "--zone=us-east5-a"]
        assert_is_bash(call[7].removeprefix("--command="))
    assert [call[6] for call in ssh] == ["--worker=all"] * 4 + ["--worker=0"]
    assert "mount -t nfs 10.0.0.2:/vol /mnt/share" in ssh[2][7]
    # The last of them, as the shell of a worker reads it.
    worker = tmp_path / "worker"
    program(worker, "sudo")
    program(worker, "systemctl", "exit 3")
    environment = with_programs(worker, HOME="/home/me")
    subprocess.run(["bash", "-c", ssh[3][7].removeprefix("--command=")], env=environment, check=True)
    reset, service = calls(worker, "sudo")
    assert reset == ["systemctl", "reset-failed", "jattn"]
    start = service.index("/home/me/jattn/.venv/bin/python")
    assert service[0] == "systemd-run"
    assert f"--uid={os.getuid()}" in service[:start]
    assert "--property=WorkingDirectory=/home/me/jattn" in service[:start]
    assert "--property=RestartPreventExitStatus=2" in service[:start]
    assert_trains(service[start + 1 :], "lm_1b", "/mnt/share/a")


@pytest.mark.parametrize(
    ("state", "verbs"),
    [(None, ["create"]), ("READY", []), ("PREEMPTED", ["delete", "create"])],
)
def test_tpu_vm_is_made_when_it_is_not_there(capsys, tmp_path, state, verbs):
    run_tpu_vm(script(capsys, TPU_VM, "--accelerator-type v5p-32 --spot"), tmp_path / "bin", state)
    found = [call for call in calls(tmp_path / "bin", "gcloud") if call[3] not in ("describe", "scp", "ssh")]
    assert [call[3] for call in found] == verbs
    assert all("--spot" in call for call in found if call[3] == "create")


def test_tpu_vm_dry_run_prints_the_commands_that_it_would_run(capsys, tmp_path):
    text = script(capsys, TPU_VM, "--accelerator-type v5p-32")
    printed = run_tpu_vm(text, tmp_path / "dry", None, DRY_RUN="1")
    assert not calls(tmp_path / "dry", "gcloud")
    assert not calls(tmp_path / "dry", "git")
    run_tpu_vm(text, tmp_path / "real", None)
    commands = [shlex.split(line) for line in printed.splitlines()]
    real = [call for call in calls(tmp_path / "real", "gcloud") if call[3] != "describe"]
    shown = [command[1:] for command in commands if command[0] == "gcloud"]
    archive = ("scp",)  # its temporary folder has another name
    assert [call for call in shown if call[3] not in archive] == [call for call in real if call[3] not in archive]
    assert len(shown) == len(real) == 7


# The command


def test_without_dry_run_the_script_goes_to_the_scheduler(capsys, tmp_path, monkeypatch):
    folder = tmp_path / "bin"
    for name in ("sbatch", "kubectl"):
        program(folder, name, f"cat > {folder}/given_{name}")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    for name, words in (("sbatch", f"{SLURM} /lustre/a"), ("kubectl", f"{GKE} --accelerator v5p --topology 4x4x4")):
        text = script(capsys, words)
        launch.main([*words.split(), "--", *OVERRIDES])
        assert (folder / f"given_{name}").read_text() == text
    assert calls(folder, "kubectl") == [["apply", "-f", "-"]]
    program(folder, "sbatch", "exit 1")
    with pytest.raises(UserError, match="launch: sbatch ended with code 1"):
        launch.main([*SLURM.split(), "/lustre/a", "--", *OVERRIDES])
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="launch: kubectl is not here; --dry-run prints"):
        launch.main(f"{GKE} --accelerator v5p --topology 4x4x4".split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("pbs lm_1b", "launch: no target is called 'pbs'; there are slurm, gke, tpu_vm"),
        ("slurm", "launch: expected a recipe after slurm, as in python -m train launch slurm lm_1b"),
        ("slurm lm_1c --workdir /a --nodes 2", "no recipe is called 'lm_1c'; did you mean lm_1b?"),
        ("slurm lm_1b --nodes 2", "Missing.*--workdir"),
        ("slurm lm_1b --workdir runs/a --nodes 2", "workdir: expected an absolute path.*got 'runs/a'"),
        ("slurm lm_1b --workdir /a --nodes 0", "nodes: expected at least 1, got 0"),
        ("slurm lm_1b --workdir /a --nodes 2 --time tomorrow", "time: expected hours.*got 'tomorrow'"),
        ("slurm lm_1b --workdir /a --nodes 2 -- --shedule.steps 3", "no field is called --shedule.steps; did you"),
        ("slurm pydoc_lm --workdir /a --nodes 2", "schedule.seconds: .*own clock.*give -- --schedule.steps N"),
        (f"{GKE} --accelerator v5p --topology 16x16", "topology: expected 3 sizes as in 4x4x4 for v5p, got '16x16'"),
        (f"{GKE} --accelerator v6e --topology 2x2 --chips-per-host 3", "chips_per_host: 3 does not divide the 4"),
        (f"{GKE} --accelerator v6e --topology 2x2 --name Lm_1b", "name: expected .* got 'Lm_1b'"),
        (f"{GKE}/../b --accelerator v6e --topology 2x2 --claim a;b", "claim: 'a;b' is no name"),
        (f"{TPU_VM} --accelerator-type h100-8", "accelerator_type: expected one of v6e-N.*got 'h100-8'"),
        (
            "gke lm_1b --image a --claim b --workdir /b --accelerator v6e --topology 2x2",
            "expected a folder below /runs",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_queued(words, message):
    with pytest.raises(UserError, match=message) as caught:
        launch.main(words.split())
    assert "\n" not in str(caught.value)


def test_line_breaks_would_break_the_script():
    with pytest.raises(UserError, match="expected no line break"):
        launch.main([*SLURM.split(), "/a", "--", *OVERRIDES[:-2], "x\nrm -rf /", *OVERRIDES[-2:]])


def test_a_template_without_a_place_for_a_value(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "__file__", str(tmp_path / "__init__.py"))
    (tmp_path / "slurm.sbatch").write_text("%%{nodes} $HOME\n")
    assert launch._fill("slurm.sbatch", {"nodes": 3}) == "3 $HOME\n"
    with pytest.raises(AssertionError, match=r"no place for \{'time'\}"):
        launch._fill("slurm.sbatch", {"nodes": 3, "time": 1})
    with pytest.raises(KeyError, match="nodes"):
        launch._fill("slurm.sbatch", {})


def test_the_module_as_it_is_typed(capsys):
    command = [sys.executable, "-m", "train.launch", "pbs"]
    wrong = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    assert wrong.stderr.startswith("error: launch: no target is called 'pbs'")
    launch.main(["--help"])
    assert capsys.readouterr().out.startswith("usage: python -m train launch TARGET RECIPE")
    with pytest.raises(SystemExit, match="0"):
        launch.main(["gke", "--help"])
    assert "--chips-per-host" in capsys.readouterr().out
