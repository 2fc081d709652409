"""The launchers of sweeps name what there is, and ask their scheduler for time to save."""

import pathlib
import re
import shlex
import shutil
import subprocess

import yaml

from rest_jax import config

LAUNCH = pathlib.Path(__file__).resolve().parents[2] / "launch"


def understood(words: list[str]) -> None:
    """A sweep of files and a space that exist, on a database."""
    assert words[:2] == ["rest-jax", "sweep"]
    options = {words[i]: words[i + 1] for i in range(len(words) - 1) if words[i].startswith("--")}
    assert options.keys() == {"--space", "--storage"}
    assert config.builtin_file(options["--space"], "sweeps").is_file()
    files = [word for word in words[2:] if "/" in word and "=" not in word and "://" not in word]
    assert files and all(config.builtin_file(file).is_file() for file in files)


def test_kubernetes():
    job = yaml.safe_load((LAUNCH / "sweep_job.yaml").read_text())
    assert job["spec"]["completionMode"] == "Indexed"
    pod = job["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] >= 60
    (container,) = pod["containers"]
    (script,) = container["args"]
    lines = script.replace("\\\n", " ").splitlines()
    (command,) = (line for line in lines if line.startswith("rest-jax"))
    understood(shlex.split(command.removesuffix("&")))
    assert [variable["name"] for variable in container["env"]] == ["STORAGE"]
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    for key in ("output", "data.train", "data.eval"):
        assert re.search(rf" {key}={mounted['sweeps']}\b", command), key
    assert {volume["name"] for volume in pod["volumes"]} == mounted.keys()


def test_a_pod_told_to_stop_passes_it_on_and_counts_as_failed(tmp_path):
    """Its script around a worker that, as ours, ends with 0 on SIGTERM."""
    job = yaml.safe_load((LAUNCH / "sweep_job.yaml").read_text())
    (script,) = job["spec"]["template"]["spec"]["containers"][0]["args"]
    said = tmp_path / "said"
    worker = tmp_path / "rest-jax"
    worker.write_text(
        f'#!/bin/sh\ntrap "echo saved >> {said}; exit 0" TERM\necho started >> {said}\n'
        "while :; do sleep 0.05; done\n"
    )
    worker.chmod(0o755)
    pod = subprocess.Popen(["/bin/sh", "-c", script], env={"PATH": f"{tmp_path}:/usr/bin:/bin"})
    while not (said.is_file() and said.read_text()):
        assert pod.poll() is None
    pod.terminate()
    assert pod.wait(30) == 143
    assert said.read_text() == "started\nsaved\n"


def test_a_preempted_pod_is_not_counted_and_bad_input_ends_the_job():
    job = yaml.safe_load((LAUNCH / "sweep_job.yaml").read_text())
    preempted, refused = job["spec"]["podFailurePolicy"]["rules"]
    assert preempted["action"] == "Ignore"
    assert preempted["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    (container,) = job["spec"]["template"]["spec"]["containers"]
    codes = {"containerName": container["name"], "operator": "In", "values": [2]}
    assert refused == {"action": "FailJob", "onExitCodes": codes}


def test_slurm(fakes):
    given = "scale/qwen3_1p7b method/rest output=/shared/runs --space curriculum --storage postgresql+psycopg://host/x"
    words = shlex.split(fakes.dry_run("launch/sweep_slurm.sh", *given.split()))
    assert words[:3] == ["srun", "bash", "-c"]
    understood(words[4:])
    assert shlex.join(words[6:]) == given


def test_slurm_starts_it_from_where_the_sweep_was_submitted(fakes, tmp_path):
    """SLURM runs a copy of the script, elsewhere."""
    shutil.copy(LAUNCH / "sweep_slurm.sh", tmp_path / "slurm_script")
    command = ("cd / && bash ~/slurm_script tiny --space x",)
    fakes.run("bash", "-c", *command, SLURM_SUBMIT_DIR=str(LAUNCH.parent), SLURM_JOB_ID="7")
    assert fakes.calls("srun")[0][-5:] == ["rest-jax", "sweep", "tiny", "--space", "x"]
