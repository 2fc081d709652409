"""launch/jobset.py: the manifest, what its pods run, and what restarts them; launch/Dockerfile has what an image needs."""

import itertools
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib

import pytest
import yaml

from tests.conftest import REPOSITORY

TPU = ("--tpu", "v5p:2x2x4")
GPU = ("--gpus", "8", "--nodes", "4")


def manifest(*options: str, words: tuple[str, ...] = ("train", "x")) -> dict:
    command = [
        sys.executable,
        "launch/jobset.py",
        "run",
        "--image",
        "image:1",
        *options,
        "--",
        *words,
    ]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return yaml.safe_load(done.stdout)


def parts(jobset: dict) -> tuple[dict, dict, dict, dict]:
    """The replicated job, its job's spec, its pod's, and the container."""
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    return replicated, job, pod, container


def expanded(container: dict) -> list[str]:
    """The words as Kubernetes starts them: $(NAME) is a variable of the container, if it has it, and $$ is $."""
    variables = {
        variable["name"]: variable.get("value", "") for variable in container.get("env", [])
    }

    def replace(match: re.Match) -> str:
        return "$" if match[0] == "$$" else variables.get(match[1], match[0])

    return [
        re.sub(r"\$\$|\$\(([^)]*)\)", replace, word)
        for word in itertools.chain(container["command"], container["args"])
    ]


@pytest.mark.parametrize(
    ("tpu", "label", "pods", "chips"),
    [
        ("v5p:2x2x4", "tpu-v5p-slice", 4, 4),
        ("v5e:4x4", "tpu-v5-lite-podslice", 4, 4),
        ("v6e:16x16", "tpu-v6e-slice", 64, 4),
        ("v6e:1x1", "tpu-v6e-slice", 1, 1),
    ],
)
def test_a_tpu_slice(tpu, label, pods, chips):
    jobset = manifest("--tpu", tpu)
    replicated, job, pod, container = parts(jobset)
    assert replicated["replicas"] == 1
    assert job["parallelism"] == job["completions"] == pods
    assert container["resources"] == {"limits": {"google.com/tpu": chips}}
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": label,
        "cloud.google.com/gke-tpu-topology": tpu.partition(":")[2],
    }
    assert jobset["metadata"]["annotations"] == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }
    assert "env" not in container and "hostNetwork" not in pod


def test_several_slices_on_spot_nodes_with_eight_chips():
    replicated, job, pod, container = parts(
        manifest("--tpu", "v6e:2x4", "--slices", "3", "--chips", "8", "--spot")
    )
    assert (replicated["replicas"], job["completions"]) == (3, 1)
    assert container["resources"]["limits"] == {"google.com/tpu": 8}
    assert pod["hostNetwork"] is True and pod["dnsPolicy"] == "ClusterFirstWithHostNet"
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"


def test_gpu_nodes():
    jobset = manifest(*GPU, "--gpu-type", "nvidia-h100-80gb")
    replicated, job, pod, container = parts(jobset)
    assert (replicated["name"], replicated["replicas"], job["completions"]) == ("node", 1, 4)
    assert job["completionMode"] == "Indexed"
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 8}}
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
    variables = {variable["name"]: variable for variable in container["env"]}
    # JobSet's host names: set, replicated job, its number, the pod's number, in the set's subdomain
    assert variables["JAX_COORDINATOR_ADDRESS"]["value"] == "run-node-0-0.run:8476"
    assert variables["JAX_NUM_PROCESSES"]["value"] == "4"
    field = variables["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert field == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert container["volumeMounts"][0]["name"] == pod["volumes"][0]["name"]
    assert "annotations" not in jobset["metadata"]


def test_the_variables_are_those_that_auto_reads():
    from rest_jax.run import processes

    *_, container = parts(manifest(*GPU))
    assert {variable["name"] for variable in container["env"]} == set(processes._VARIABLES)


@pytest.mark.parametrize("hardware", [TPU, GPU])
def test_what_is_tried_again(hardware):
    """Everything, so often; but exit code 2 ends it, unless the pod was being preempted."""
    jobset = manifest(*hardware, "--restarts", "7", "--grace", "99")
    _, job, pod, container = parts(jobset)
    policy = jobset["spec"]["failurePolicy"]
    (rule,) = policy["rules"]
    assert policy["maxRestarts"] == 7
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    preempted, refused = job["podFailurePolicy"]["rules"]
    assert preempted == {
        "action": "Count",
        "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
    }
    codes = {"containerName": container["name"], "operator": "In", "values": [2]}
    assert refused == {"action": "FailJob", "onExitCodes": codes}
    # Kubernetes takes a podFailurePolicy only with restartPolicy Never.
    assert (pod["restartPolicy"], job["backoffLimit"]) == ("Never", 0)
    assert pod["terminationGracePeriodSeconds"] == 99


def test_access():
    _, _, pod, container = parts(manifest(*TPU, "--service-account", "trainer", "--secret", "keys"))
    assert pod["serviceAccountName"] == "trainer"
    assert container["envFrom"] == [{"secretRef": {"name": "keys"}}]


@pytest.mark.parametrize("hardware", [TPU, GPU])
def test_words_reach_the_pod(fakes, words, hardware):
    words += ["$(JAX_NUM_PROCESSES)", "$$", "$(HOME)", "--dry-run"]
    *_, container = parts(manifest(*hardware, words=tuple(words)))
    fakes.run(*expanded(container))
    assert fakes.calls() == [["rest-jax", *words, "--distributed", "auto"]]


def test_the_exit_code_is_the_runs(fakes):
    fakes.answer(("rest-jax", [{"code": 2}]))
    *_, container = parts(manifest(*TPU))
    fakes.run(*expanded(container), code=2)


def test_a_pod_that_is_told_to_stop_saves_and_has_failed(fakes):
    fakes.answer(("rest-jax", [{"seconds": 60}]))
    *_, container = parts(manifest(*TPU))
    pod = fakes.start(*expanded(container))
    fakes.process("rest-jax", "train")
    pod.send_signal(signal.SIGTERM)
    assert pod.wait(30) == 143
    assert fakes.calls()[-1] == ["rest-jax", "saved"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tpu", "v5p"], "--tpu v5p: not TYPE:TOPOLOGY"),
        (["--tpu", "v9:2x2"], "types: v4, v5e, v5p, v6e"),
        (["--tpu", "v6e:2x4", "--chips", "3"], "--chips 3: does not divide the 8 chips of 2x4"),
        (["--tpu", "v5p:0x2"], "--tpu v5p:0x2: not TYPE:TOPOLOGY"),
        (["--tpu", "v6e:2x4", "--chips", "0"], "argument --chips: 0: a whole number, 1 or more"),
        (["--tpu", "v6e:2x4", "--chips", "-4"], "argument --chips: -4: a whole number"),
        (["--tpu", "v6e:2x4", "--slices", "0"], "argument --slices: 0: a whole number"),
        (["--gpus", "0"], "argument --gpus: 0: a whole number"),
        (["--gpus", "8", "--nodes", "0"], "argument --nodes: 0: a whole number"),
        (["--gpus", "8", "--restarts", "-1"], "argument --restarts: -1: a whole number, 0 or more"),
        (["--gpus", "8", "--grace", "x"], "argument --grace: x: a whole number"),
        ([], "one of the arguments --tpu --gpus is required"),
    ],
)
def test_what_is_refused(options, said):
    command = [sys.executable, "launch/jobset.py", "run", "--image", "i", *options, "--", "train"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2 and said in done.stderr


def dockerfile() -> list[list[str]]:
    lines = (REPOSITORY / "launch" / "Dockerfile").read_text().splitlines()
    return [shlex.split(line) for line in lines if line and not line.startswith("#")]


def test_the_image_gets_what_it_is_built_from():
    copied = [word for name, *words in dockerfile() if name == "COPY" for word in words[:-1]]
    assert all((REPOSITORY / word).exists() for word in copied)
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    dynamic = project["tool"]["setuptools"]["dynamic"]["dependencies"]["file"]
    needed = ["pyproject.toml", "setup.py", "rest_jax", "configs", project["project"]["readme"]]
    assert {*needed, *dynamic, *project["project"]["license-files"]} <= set(copied)
    (extras,) = (words[1].partition("=")[2] for words in dockerfile() if words[0] == "ARG")
    assert set(extras.split(",")) <= project["project"]["optional-dependencies"].keys()


@pytest.mark.parametrize(("extras", "asked"), [("", "."), ("cuda,trackio", ".[cuda,trackio]")])
def test_the_extras_of_an_image_may_be_none(extras, asked):
    (install,) = (words for name, *words in dockerfile() if name == "RUN")
    done = subprocess.run(
        ["sh", "-c", f'echo "{install[-1]}"'],
        env={"EXTRAS": extras},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == asked


def test_the_dockerfile_is_linted():
    beside = pathlib.Path(sys.executable).parent / "hadolint"
    linter = shutil.which("hadolint") or (str(beside) if beside.exists() else None)
    if linter is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run(
        [linter, "launch/Dockerfile"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_the_image_s_files_make_a_wheel(tmp_path):
    context = tmp_path / "context"
    for name, *words in dockerfile():
        if name == "COPY":
            for word in words[:-1]:
                target = context / word
                target.parent.mkdir(parents=True, exist_ok=True)
                os.symlink(REPOSITORY / word, target)
    # without links, since the build writes beside them
    subprocess.run(["cp", "-rL", context, tmp_path / "copy"], check=True)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", tmp_path, tmp_path / "copy"]
    subprocess.run(build, check=True, capture_output=True)
    assert len(list(tmp_path.glob("rest_jax-*.whl"))) == 1
