"""Whether this process is one of several that train together, as torchrun or Slurm starts them. Light: no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from kdpipe.data.errors import KdpipeError

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_FIRST_PORT, _PORTS = 20_000, 20_000


@dataclass(frozen=True)
class Launch:
    """One of several processes.

    Attributes:
        rank: of this process, from 0.
        size: processes.
        local_rank: of this process on its machine: its GPU.
        address: host of rank 0.
        port: at which rank 0 listens there.
        local_size: processes on this machine.
    """

    rank: int
    size: int
    local_rank: int
    address: str
    port: int
    local_size: int = 1


def find_launch(environment: Mapping[str, str]) -> Launch | None:
    """How this process was started together with others; None: alone, or the only one.

    torchrun says it all. Of `srun kdpipe train` the host of rank 0 is the first of the step's nodes, and the port
    follows from the job's number, so that two jobs on one machine do not meet.

    Args:
        environment: `os.environ`.

    Raises:
        KdpipeError: what the environment says of it is not whole.
    """
    if environment.get("WORLD_SIZE", "1") != "1":
        values = {name: environment.get(name, "") for name in _TORCHRUN}
        numbers = [name for name in _TORCHRUN if name != "MASTER_ADDR" and not values[name].isdigit()]
        if numbers or not values["MASTER_ADDR"]:
            raise KdpipeError(
                f"{(numbers or ['MASTER_ADDR'])[0]}: not set as torchrun sets it, though WORLD_SIZE is. "
                "Start kdpipe with torchrun, or unset WORLD_SIZE."
            )
        rank, size, local = (int(values[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        here = environment.get("LOCAL_WORLD_SIZE", "")
        return _checked(
            Launch(
                rank,
                size,
                local,
                values["MASTER_ADDR"],
                int(values["MASTER_PORT"]),
                int(here) if here.isdigit() else 1,
            )
        )
    if environment.get("SLURM_STEP_NUM_TASKS", "1") != "1" and "SLURM_PROCID" in environment:
        job = int(environment.get("SLURM_JOB_ID", "0")) * 7 + int(environment.get("SLURM_STEP_ID", "0"))
        return _checked(
            Launch(
                int(environment["SLURM_PROCID"]),
                int(environment["SLURM_STEP_NUM_TASKS"]),
                int(environment.get("SLURM_LOCALID", "0")),
                _first_host(environment.get("SLURM_STEP_NODELIST", "localhost")),
                _FIRST_PORT + job % _PORTS,
                _tasks_here(environment),
            )
        )
    return None


def _checked(launch: Launch) -> Launch:
    if not 0 <= launch.rank < launch.size:
        raise KdpipeError(f"rank {launch.rank} of {launch.size} processes: not from 0 to {launch.size - 1}")
    return launch


def _tasks_here(environment: Mapping[str, str]) -> int:
    """Tasks of the step on this node, of a list such as `8(x2),4`: one entry a node, in the nodes' order."""
    each: list[int] = []
    for entry in environment.get("SLURM_STEP_TASKS_PER_NODE", "1").split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", entry)
        if found is None:
            raise KdpipeError(f"SLURM_STEP_TASKS_PER_NODE: {entry!r} is no number of tasks")
        each += [int(found[1])] * int(found[2] or 1)
    node = environment.get("SLURM_NODEID", "0")
    return each[int(node)] if node.isdigit() and int(node) < len(each) else max(each)


def _first_host(nodes: str) -> str:
    """The first host of a Slurm list such as `gpu[07-09,12],big1`."""
    first = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,]*))?", nodes)
    if first is None:
        raise KdpipeError(f"SLURM_STEP_NODELIST: {nodes!r} names no host")
    return "".join(part or "" for part in first.groups())
