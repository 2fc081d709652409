"""launch/tpu_vm.sh and tpu_queued.sh: the same words on every host, and again on new slices after a preemption."""

import os
import shlex
import signal
import time

import pytest

from tests.launch.conftest import alive

VM, QUEUED = "launch/tpu_vm.sh", "launch/tpu_queued.sh"
SOURCE = "rest-jax[tpu,gcs] @ git+https://host/rest_jax@main"
INSTALL = (
    "gcloud compute tpus tpu-vm ssh {node} --zone=z --worker=all '--command=curl -LsSf https://astral.sh/uv/install.sh | sh"
    " && ~/.local/bin/uv venv --quiet --allow-existing --python 3.12 ~/rest_jax"
    " && ~/.local/bin/uv pip install --quiet --reinstall-package rest-jax --python ~/rest_jax/bin/python {package}'\n"
)
RUN = (
    "gcloud compute tpus tpu-vm ssh {node} --zone=z --worker=all"
    " '--command=pkill -F ~/.rest_jax.pid -x rest-jax 2>/dev/null"
    " && while pgrep -F ~/.rest_jax.pid -x rest-jax >/dev/null; do sleep 1; done;"
    " trap '\\''kill -TERM $!; wait $!; exit 143'\\'' TERM;"
    " ~/rest_jax/bin/rest-jax {words} --distributed auto & echo $! > ~/.rest_jax.pid; wait $!'\n"
)
PACKAGE = r"rest-jax\[tpu\,gcs\]\ @\ git+https://host/rest_jax@main"
READY = ("tpu-vm describe", [{"out": "READY\n"}])


def test_dry_run(fakes):
    printed = fakes.dry_run(VM, "pod", "z", "train", "scale/tiny", "output=gs://b/runs")
    assert printed == RUN.format(node="pod", words="train scale/tiny output=gs://b/runs")


def test_dry_run_with_a_requirement(fakes):
    printed = fakes.dry_run(VM, "pod", "z", "train", "x", INSTALL=SOURCE)
    assert printed == INSTALL.format(node="pod", package=PACKAGE) + RUN.format(
        node="pod", words="train x"
    )


def test_dry_run_with_a_wheel(fakes):
    wheel = fakes.folder / "rest_jax-1-py3-none-any.whl"
    wheel.touch()
    copy, install, _ = fakes.dry_run(VM, "pod", "z", "train", "x", INSTALL=str(wheel)).splitlines(
        True
    )
    assert copy == f"gcloud compute tpus tpu-vm scp {wheel} pod: --zone=z --worker=all\n"
    package = r"./rest_jax-1-py3-none-any.whl\[tpu\,gcs\]"
    assert install == INSTALL.format(node="pod", package=package)


def test_the_extras_of_a_wheel_are_the_users(fakes):
    wheel = fakes.folder / "rest_jax-1-py3-none-any.whl"
    wheel.touch()
    printed = fakes.dry_run(VM, "pod", "z", "train", "x", INSTALL=str(wheel), EXTRAS="tpu")
    assert INSTALL.format(node="pod", package=r"./rest_jax-1-py3-none-any.whl\[tpu\]") in printed


def test_words_reach_the_host(fakes, words):
    """Through the printed command, the launcher itself, and the host's shell."""
    fakes.answer(("gcloud", [{"run": "command"}]))
    printed = fakes.dry_run(VM, "pod", "z", *words)
    fakes.run("bash", "-c", printed)
    fakes.run(VM, "pod", "z", *words)
    first, second = fakes.calls("gcloud")
    assert first == second
    assert fakes.calls("rest-jax") == [["rest-jax", *words, "--distributed", "auto"]] * 2


def test_the_exit_code_is_the_runs(fakes):
    fakes.answer(("gcloud", [{"run": "command"}]), ("rest-jax", [{"code": 2}]))
    fakes.run(VM, "pod", "z", "train", "x", code=2)


def test_a_host_that_is_told_to_stop_saves_and_says_so(fakes):
    fakes.answer(("gcloud", [{"run": "command"}]), ("rest-jax", [{"seconds": 60}]))
    launcher = fakes.start(VM, "pod", "z", "train", "x")
    fakes.process("rest-jax", "train")
    os.kill(fakes.process("gcloud"), signal.SIGTERM)
    assert launcher.wait(30) == 143
    assert fakes.calls()[-1] == ["rest-jax", "saved"]


def test_an_earlier_run_saves_first(fakes):
    """One whose connection is lost: its host keeps running. Its save takes longer than the launcher waits between looks."""
    slow = {"seconds": 60, "save_seconds": 1.5}
    fakes.answer(("gcloud", [{"run": "command"}]), ("rest-jax", [slow, {}]))
    fakes.start(VM, "pod", "z", "train", "first")
    earlier = fakes.process("rest-jax", "train", "first")
    fakes.run(VM, "pod", "z", "train", "second")
    assert fakes.calls("rest-jax")[1:] == [
        ["rest-jax", "saved"],
        ["rest-jax", "train", "second", "--distributed", "auto"],
    ]
    assert not alive(earlier)


def create(*options: str, kind: str = "v5p-32", runtime: str = "v2-alpha-tpuv5") -> str:
    words = " ".join(options)
    return (
        "gcloud compute tpus queued-resources create pod --zone=z"
        f" --accelerator-type={kind} --runtime-version={runtime} {words}\n"
    )


DELETE = "gcloud compute tpus queued-resources delete pod --zone=z --force --quiet\n"


def test_dry_run_of_a_queued_resource(fakes):
    printed = fakes.dry_run(QUEUED, "pod", "z", "v5p-32", "train", "a b", INSTALL=SOURCE)
    install = INSTALL.format(node="pod", package=PACKAGE)
    # the quotes of the host's shell, in those of this one
    run = RUN.format(node="pod", words=r"train a\ b")
    assert printed == create("--spot", "--node-id=pod") + install + run + DELETE


def test_dry_run_of_two_reserved_slices(fakes):
    printed = fakes.dry_run(
        QUEUED, "pod", "z", "v6e-16", "train", "x", INSTALL=SOURCE, SLICES="2", TIER="reserved", KEEP="1"
    )  # fmt: skip
    request = create(
        "--reserved",
        "--node-count=2",
        "--node-prefix=pod",
        kind="v6e-16",
        runtime="v2-alpha-tpuv6e",
    )
    slices = "".join(
        INSTALL.format(node=node, package=PACKAGE) + RUN.format(node=node, words="train x")
        for node in ("pod-0", "pod-1")
    )
    assert printed == request + slices


def test_an_unknown_tier(fakes):
    said = fakes.run(QUEUED, "pod", "z", "v5p-8", "train", "x", code=2, INSTALL=SOURCE, TIER="free")
    assert "TIER=free: none of spot, reserved, on-demand" in said


def queued(fakes, code: int = 0, **variables: str) -> list[str]:
    """Runs it; what gcloud was asked, in short."""
    words = (QUEUED, "pod", "z", "v5p-32", "train", "x")
    fakes.run(*words, code=code, **{"INSTALL": SOURCE, "POLL": "0", **variables})
    short = {"queued-resources": "", "tpu-vm": "vm "}
    asked = []
    for _, _, _, kind, verb, *rest in fakes.calls("gcloud"):
        install = verb == "ssh" and "uv pip" in rest[-1]
        asked.append("vm install" if install else short[kind] + verb)
    return asked


ABSENT = {"code": 1, "err": "ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND\n"}
NO_NETWORK = {"code": 1, "err": "ERROR: gcloud crashed (TransportError)\n"}


def states(*found: str | dict | None) -> tuple[str, list[dict]]:
    """What the queued resource says, call by call; None: there is none."""
    answers = [
        {"out": f"{state}\n"} if isinstance(state, str) else state or ABSENT for state in found
    ]
    return ("queued-resources describe", answers)


def test_a_finished_run_is_run_once(fakes):
    fakes.answer(states(None, "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"), READY)
    assert queued(fakes) == [
        "describe", "create", "describe", "describe", "describe", "vm describe",
        "vm install", "vm ssh", "delete",
    ]  # fmt: skip


def test_a_preempted_run_is_run_again_on_new_slices(fakes):
    again = ("ACTIVE", "SUSPENDING", "SUSPENDING", "SUSPENDED", None, "ACTIVE")
    fakes.answer(states(None, *again), READY, ("pkill", [{"code": 255}, {"code": 0}]))
    asked = queued(fakes, RETRIES="0")
    assert asked == [
        "describe", "create", "describe", "vm describe", "vm install", "vm ssh",
        "describe", "describe", "describe", "delete",
        "describe", "create", "describe", "vm describe", "vm install", "vm ssh", "delete",
    ]  # fmt: skip
    creates = [words for words in fakes.calls("gcloud") if "create" in words]
    runs = [words for words in fakes.calls("gcloud") if "pkill" in words[-1]]
    assert creates[0] == creates[1] == shlex.split(create("--spot", "--node-id=pod"))
    assert runs[0] == runs[1] == shlex.split(RUN.format(node="pod", words="train x"))


@pytest.mark.parametrize("lost", ["PREEMPTED", "TERMINATED"])
def test_a_lost_node_is_seen_before_the_resource_says_so(fakes, lost):
    nodes = (
        "tpu-vm describe",
        [{"out": "READY\n"}, {"out": f"{lost}\n"}, {"out": f"{lost}\n"}, {"out": "READY\n"}],
    )
    fakes.answer(
        states("ACTIVE", "ACTIVE", "ACTIVE", None, "ACTIVE"), nodes, ("pkill", [{"code": 1}, {}])
    )
    asked = queued(fakes, RETRIES="0")
    assert [verb for verb in asked if "describe" not in verb] == [
        "vm install", "vm ssh", "delete", "create", "vm install", "vm ssh", "delete",
    ]  # fmt: skip


def test_a_look_that_fails_deletes_nothing(fakes):
    nodes = ("tpu-vm describe", [{"code": 1}, {"out": "READY\n"}])
    fakes.answer(states("ACTIVE"), nodes)
    assert [verb for verb in queued(fakes, KEEP="1") if "describe" not in verb] == [
        "vm install",
        "vm ssh",
    ]


def test_a_watcher_without_a_network_waits_for_it(fakes):
    """Whether the slice is there it cannot know: it neither requests it again nor uses up a try."""
    outage = (NO_NETWORK,) * 3
    fakes.answer(states("ACTIVE", *outage, "ACTIVE"), READY, ("pkill", [{"code": 255}, {}]))
    assert [verb for verb in queued(fakes, RETRIES="0") if "describe" not in verb] == [
        "vm install", "vm ssh", "vm install", "vm ssh", "delete",
    ]  # fmt: skip


def test_what_has_never_answered_is_not_waited_for(fakes):
    """No login, no network or no gcloud: nothing was requested."""
    fakes.answer(states(NO_NETWORK))
    words = (QUEUED, "pod", "z", "v5p-32", "train", "x")
    said = fakes.run(*words, code=1, INSTALL=SOURCE, POLL="0")
    assert "TransportError" in said and "may still be there" not in said
    assert len(fakes.calls("gcloud")) == 1


@pytest.mark.parametrize("kept", ["", "1"])
def test_what_may_still_be_there_is_said(fakes, kept):
    fakes.answer(states("ACTIVE"), READY, ("pkill", [{"code": 2}]))
    words = (QUEUED, "pod", "z", "v5p-32", "train", "x")
    said = fakes.run(*words, code=2, INSTALL=SOURCE, POLL="0", KEEP=kept)
    assert (f"pod may still be there; to end it: {DELETE}" in said) == bool(kept)


def test_a_request_that_is_refused_is_made_again_so_often(fakes):
    fakes.answer(states(None), ("create", [{"code": 1}]))
    assert queued(fakes, 1, RETRIES="2") == ["describe", "create"] * 3


def test_bad_input_is_not_tried_again(fakes):
    fakes.answer(states("ACTIVE"), READY, ("pkill", [{"code": 2}]))
    asked = queued(fakes, 2)
    assert asked.count("vm ssh") == 1 and asked[-1] == "delete"


def test_bad_input_of_one_slice_is_seen_beside_the_failure_of_another(fakes):
    hosts = [("uv pip", [{}]), ("ssh pod-0", [{"code": 2}]), ("ssh pod-1", [{"code": 255}])]
    fakes.answer(states("ACTIVE"), READY, *hosts)
    assert queued(fakes, 2, SLICES="2").count("vm ssh") == 2


def test_a_failure_is_tried_again_so_often(fakes):
    fakes.answer(states("ACTIVE"), READY, ("pkill", [{"code": 1}]))
    asked = queued(fakes, 1, RETRIES="2", KEEP="1")
    assert asked.count("vm ssh") == 3
    assert "delete" not in asked and "create" not in asked


def test_hosts_that_were_told_to_stop_are_no_failure(fakes):
    """143: the first of them; 75: another one, with which it has saved."""
    fakes.answer(states("ACTIVE"), READY, ("pkill", [{"code": 143}, {"code": 75}, {}]))
    assert queued(fakes, RETRIES="0").count("vm ssh") == 3


def test_all_slices_run_at_once_and_a_signal_ends_the_calls(fakes):
    fakes.answer(states("ACTIVE"), READY, ("pkill", [{"seconds": 60}]))
    variables = {"INSTALL": SOURCE, "SLICES": "2"}
    launcher = fakes.start(QUEUED, "pod", "z", "v5p-32", "train", "x", **variables)
    while sum("pkill" in words[-1] for words in fakes.calls("gcloud")) < 2:
        assert launcher.poll() is None
        time.sleep(0.01)
    launcher.send_signal(signal.SIGTERM)
    _, said = launcher.communicate(timeout=30)
    assert launcher.returncode == 130
    assert f"to end it: {DELETE.strip()}" in said
    assert fakes.calls("gcloud")[-2:] == [["gcloud", "saved"]] * 2
