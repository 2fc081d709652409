#!/usr/bin/env python
"""Prints a JobSet that runs one command on TPU slices or GPU nodes of a Kubernetes cluster, and again after a preemption.

    python launch/jobset.py NAME --image IMAGE --tpu v5p:2x2x4 -- train FILE ... [key=value ...] | kubectl apply -f -
    python launch/jobset.py NAME --image IMAGE --gpus 8 --nodes 4 -- train FILE ... [key=value ...] | kubectl apply -f -

A pod is a process. On TPUs GKE tells jax who the others are; on GPU nodes the completion index is the process. A pod that
fails or is preempted restarts all pods, at most --restarts times; the run resumes from its checkpoints, so `output=` must be
a bucket. Input that cannot be used (exit code 2) ends the JobSet. Fields: the references of jobset.x-k8s.io/v1alpha2
and batch/v1.
"""

import argparse
import math
import sys
from collections.abc import Callable
from typing import Any

import yaml

# The node label of a TPU, see "TPUs in GKE".
ACCELERATORS = {
    "v4": "tpu-v4-podslice",
    "v5e": "tpu-v5-lite-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
}
CONTAINER = "rest-jax"
PORT = 8476
# rest-jax ends with 75 after a save on SIGTERM; the shell makes that 143, the code of a pod that is to be replaced.
STOPPABLE = 'trap \'kill -TERM $!; wait $!; exit 143\' TERM; "$0" "$@" & wait $!'


def at_least(least: int) -> Callable[[str], int]:
    """What reads a whole number, that or more; of another word argparse makes its error."""

    def read(word: str) -> int:
        if not word.isdecimal() or int(word) < least:
            raise argparse.ArgumentTypeError(f"{word}: a whole number, {least} or more, is needed")
        return int(word)

    return read


def main() -> None:
    """Reads the command line, prints the manifest."""
    parser = argparse.ArgumentParser(description="Prints a JobSet for kubectl apply -f -")
    parser.add_argument("name", help="of the JobSet")
    parser.add_argument(
        "words", nargs="+", metavar="WORD", help="after --: train FILE ... [key=value ...]"
    )
    parser.add_argument("--image", required=True, help="made from launch/Dockerfile")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument(
        "--tpu", metavar="TYPE:TOPOLOGY", help=f"a slice; types: {', '.join(ACCELERATORS)}"
    )
    kind.add_argument("--gpus", type=at_least(1), help="GPUs of a node")
    parser.add_argument("--slices", type=at_least(1), default=1, help="TPU slices")
    parser.add_argument(
        "--chips", type=at_least(1), help="of a TPU host; default: 4, or all of a smaller slice"
    )
    parser.add_argument("--nodes", type=at_least(1), default=1, help="GPU nodes")
    parser.add_argument("--gpu-type", help="value of the label cloud.google.com/gke-accelerator")
    parser.add_argument("--spot", action="store_true", help="on spot nodes of GKE")
    parser.add_argument("--restarts", type=at_least(0), default=20, help="at most")
    parser.add_argument(
        "--grace", type=at_least(0), default=300, help="seconds to save when a pod is told to stop"
    )
    parser.add_argument("--service-account", help="of the pods, with access to the bucket")
    parser.add_argument(
        "--secret", help="whose keys become environment variables, such as HF_TOKEN"
    )
    options = parser.parse_args()
    try:
        parts = tpu_slices(options) if options.tpu else gpu_nodes(options)
    except ValueError as error:
        parser.error(str(error))
    yaml.safe_dump(jobset(options, *parts), sys.stdout, sort_keys=False, width=200)


def tpu_slices(
    options: argparse.Namespace,
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Fields of the replicated job, the pod and the container; one pod a host of each slice."""
    kind, _, topology = options.tpu.partition(":")
    sides = topology.split("x")
    if kind not in ACCELERATORS or not all(side.isdecimal() and int(side) for side in sides):
        raise ValueError(
            f"--tpu {options.tpu}: not TYPE:TOPOLOGY such as v5p:2x2x4; types: {', '.join(ACCELERATORS)}"
        )
    chips = math.prod(map(int, sides))
    each = options.chips or min(chips, 4)
    if chips % each:
        raise ValueError(f"--chips {each}: does not divide the {chips} chips of {topology}")
    labels = {
        "cloud.google.com/gke-tpu-accelerator": ACCELERATORS[kind],
        "cloud.google.com/gke-tpu-topology": topology,
    }
    # Slices talk over the data centre network, which is faster without the pods' own.
    network = (
        {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"} if options.slices > 1 else {}
    )
    job = {"name": "slice", "replicas": options.slices, "pods": chips // each}
    # libtpu's between hosts, jax's coordinator, libtpu's between slices
    ports = [{"containerPort": port} for port in (8471, 8482, 8080)]
    return (
        job,
        {"nodeSelector": labels, **network},
        {"ports": ports, **limits("google.com/tpu", each)},
    )


def gpu_nodes(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Fields of the replicated job, the pod and the container; one pod a node, with all its GPUs."""
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    env = [
        # the first pod's name in the network of the JobSet
        {
            "name": "JAX_COORDINATOR_ADDRESS",
            "value": f"{options.name}-node-0-0.{options.name}:{PORT}",
        },
        {"name": "JAX_NUM_PROCESSES", "value": str(options.nodes)},
        {"name": "JAX_PROCESS_ID", "valueFrom": {"fieldRef": {"fieldPath": index}}},
    ]
    labels = {"cloud.google.com/gke-accelerator": options.gpu_type} if options.gpu_type else {}
    # NCCL passes data between the GPUs of a node through it; the default has 64 MB.
    memory = {"volumes": [{"name": "shm", "emptyDir": {"medium": "Memory"}}]}
    mounted = {"volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}]}
    job = {"name": "node", "replicas": 1, "pods": options.nodes}
    container = {
        "env": env,
        "ports": [{"containerPort": PORT}],
        **limits("nvidia.com/gpu", options.gpus),
    }
    return job, {"nodeSelector": labels, **memory}, container | mounted


def limits(resource: str, count: int) -> dict[str, Any]:
    """The accelerators of a container."""
    return {"resources": {"limits": {resource: count}}}


def jobset(
    options: argparse.Namespace, job: dict[str, Any], pod: dict[str, Any], container: dict[str, Any]
) -> dict[str, Any]:
    """The manifest."""
    if options.spot:
        pod["nodeSelector"]["cloud.google.com/gke-spot"] = "true"
    if options.service_account:
        pod["serviceAccountName"] = options.service_account
    if options.secret:
        container["envFrom"] = [{"secretRef": {"name": options.secret}}]
    # Kubernetes reads $(NAME) as a variable, $$ as $.
    command = [word.replace("$", "$$") for word in ("bash", "-c", STOPPABLE, "rest-jax")]
    words = [word.replace("$", "$$") for word in (*options.words, "--distributed", "auto")]
    pod |= {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": options.grace,
        "containers": [
            {
                "name": CONTAINER,
                "image": options.image,
                "command": command,
                "args": words,
                **container,
            }
        ],
    }
    refused = {"containerName": CONTAINER, "operator": "In", "values": [2]}
    spec = {
        "completionMode": "Indexed",
        "parallelism": job["pods"],
        "completions": job["pods"],
        "backoffLimit": 0,
        # The first rule that fits is taken: what a pod that is being preempted ends with says nothing.
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "Count",
                    "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
                },
                {"action": "FailJob", "onExitCodes": refused},
            ]
        },
        "template": {"spec": pod},
    }
    metadata: dict[str, Any] = {"name": options.name}
    if options.tpu:
        # A slice has one job, a job one slice.
        metadata["annotations"] = {
            "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
        }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "failurePolicy": {
                "maxRestarts": options.restarts,
                "rules": [
                    {
                        "name": "refused",
                        "action": "FailJobSet",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                    }
                ],
            },
            "replicatedJobs": [
                {"name": job["name"], "replicas": job["replicas"], "template": {"spec": spec}}
            ],
        },
    }


if __name__ == "__main__":
    main()
