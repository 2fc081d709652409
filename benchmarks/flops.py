"""The FLOPs of an update's compiled gradient, in groups and row by row: its record as one JSON line.

    python -m benchmarks.flops [--model Qwen/Qwen3-1.7B] [--topology cpu:1] [--group 8] [--prompt-tokens 1024] ...

Row by row is what trainers without groups compute: every response behind a prompt of its own. Here it is the same code, weights
and packing, with groups of one response each. FLOPs are those of matrix products on one device, recomputation included, as
`rest-jax plan` counts them: what is in a loop as often as it runs. Nothing is run; `--topology` is one of `rest-jax plan`.
"""

import argparse
import json
import os
import pathlib
import sys
import tempfile
from typing import Any

from benchmarks.process import Parser, positive
from rest_jax.errors import UserError
from rest_jax.planning import topology
from rest_jax.planning.topology import Topology

DESCRIPTION = "FLOPs of a compiled update, in groups and row by row; one JSON line on stdout."


def main(argv: list[str] | None = None) -> int:
    """0; 2 for bad arguments, or a topology whose compiler is missing."""
    parser = Parser(prog="python -m benchmarks.flops", description=DESCRIPTION)
    parser.add_argument("--model", default="Qwen/Qwen3-1.7B", help="a preset, or an HF folder")
    parser.add_argument("--topology", default="cpu:1")
    sizes = {"prompts": 1, "group": 8, "prompt-tokens": 1024, "response-tokens": 256}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=positive, default=default)
    parser.add_argument("--remat", choices=("none", "block", "dots"), default="block")
    args = parser.parse_args(argv)
    try:
        where = topology.parse(args.topology)
        topology.check_compiler(where)
        with tempfile.TemporaryDirectory() as folder:
            dump = pathlib.Path(folder)
            os.environ.update(topology.child_environment(where, dump))  # jax has no backend yet
            print(json.dumps(compare(args, where, dump)))
    except UserError as error:
        parser.error(str(error))
    return 0


def compare(args: argparse.Namespace, where: Topology, dump: pathlib.Path) -> dict[str, Any]:
    """Compiles both and counts."""
    grouped, by_row = (gradient_flops(args, where, dump, size) for size in (args.group, 1))
    return {
        "case": "flops",
        **vars(args),
        "grouped": grouped,
        "by_row": by_row,
        "ratio": grouped / by_row,
    }


def gradient_flops(
    args: argparse.Namespace, where: Topology, dump: pathlib.Path, group: int
) -> float:
    """Of all responses, on one device, in groups of `group`."""
    from rest_jax import config as config_lib
    from rest_jax import train
    from rest_jax.planning import hlo
    from rest_jax.planning.compiler import compile_program
    from rest_jax.planning.measure import Sizes, measure
    from rest_jax.planning.programs import update_programs
    from rest_jax.planning.setup import Lengths, StepRows, abstract_setup, all_groups, row_of

    devices = topology.devices(where)
    groups = args.prompts * args.group // group
    values = {
        "model.source": args.model,
        "model.remat": args.remat,
        "data.max_prompt_tokens": args.prompt_tokens,
        "rollout.max_response_tokens": args.response_tokens,
        "rollout.group_size": args.group,
        "rollout.prompts_per_step": groups,
        "train.prompts_per_update": groups,
    }
    config = config_lib.load(
        ["scale/qwen3_1p7b", "method/rest"], [f"{key}={value}" for key, value in values.items()]
    )
    # A run refuses groups of one: their advantages would be zero.
    rollout = config.rollout.model_copy(update={"group_size": group})
    setup = abstract_setup(
        config.model_copy(update={"rollout": rollout}), devices, train.step_config
    )
    lengths = Lengths(args.prompt_tokens, args.response_tokens)
    row = row_of(setup, all_groups(setup, lengths)[0])
    program = update_programs(setup, StepRows(row, row))["update"]
    model = setup.policy.config
    text = compile_program(program, setup, where, dump).text
    found = measure(hlo.parse(text), Sizes(model.n_layers, model.n_experts, program.trips))
    return sum(work.flops for part in (found.once, found.each) for work in part.values())


if __name__ == "__main__":
    sys.exit(main())
