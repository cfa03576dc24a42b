"""As how many processes a command was started, by torchrun or srun, so that together they make one run."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

from lightning_genmodels.errors import OptionError

_SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # as launchers tell the processes that they start

_ADVICE = (
    r"It is recommended to use `self\.log\(.*sync_dist=True",  # figures are reduced over the processes before
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning's own
    r"The `srun` command is available on your system but is not used",
)
"""Lightning's warnings that a user can do nothing about."""


@dataclass(frozen=True)
class Launch:
    """Processes that were started from outside.

    Attributes:
        by: What started them.
        nodes: Number of nodes.
        per_node: Processes on each of them.
    """

    by: str
    nodes: int
    per_node: int


def launched() -> Launch | None:
    """What started this process and others beside it, or None if Lightning is to start them.

    A shell inside a Slurm allocation, a batch script, and a single task of srun are one process, whatever the
    allocation's number of tasks is.

    Raises:
        OptionError: Not every node has as many processes.
    """
    environ = os.environ
    if "TORCHELASTIC_RUN_ID" in environ:
        nodes, per_node = int(environ["GROUP_WORLD_SIZE"]), int(environ["LOCAL_WORLD_SIZE"])
        return _equal(Launch("torchrun", nodes, per_node), int(environ["WORLD_SIZE"]))
    if "SLURM_STEP_ID" in environ and int(environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        most = max(map(int, re.findall(r"(?<!x)\b\d+", environ["SLURM_STEP_TASKS_PER_NODE"])))
        launch = Launch("srun", int(environ["SLURM_STEP_NUM_NODES"]), most)
        return _equal(launch, int(environ["SLURM_STEP_NUM_TASKS"]))
    return None


def _equal(launch: Launch, total: int) -> Launch:
    if launch.nodes * launch.per_node != total:
        raise OptionError(
            f"{launch.by} started {total} processes on {launch.nodes} nodes, not equally many on each; give it a "
            "number for each node: --nproc-per-node of torchrun, --ntasks-per-node of srun"
        )
    return launch


def trainer_options(options: MutableMapping[str, Any]) -> None:
    """Makes ``devices``, ``num_nodes`` and ``plugins`` of a Trainer those of the processes that were started.

    Args:
        options: Of the Trainer; changed in place.

    Raises:
        OptionError: ``devices`` or ``num_nodes`` is given, and is another number.
    """
    launch = launched()
    plugins = options.get("plugins") or []
    plugins = list(plugins) if isinstance(plugins, list | tuple) else [plugins]
    if launch is not None:
        given = (_count(options.get("devices")), options.get("num_nodes") or 1)
        if given[0] not in (None, launch.per_node) or given[1] not in (1, launch.nodes):
            raise OptionError(
                f"{launch.by} started {launch.per_node} processes on each of {launch.nodes} nodes, and the Trainer is "
                f"told devices {options.get('devices')} and num_nodes {given[1]}; leave both out, they follow from "
                f"{launch.by}"
            )
        options["num_nodes"] = launch.nodes
        if given[0] is None:
            options["devices"] = launch.per_node
    is_slurm = "SLURM_JOB_ID" in os.environ  # which Lightning reads otherwise; of other systems its guess is right
    if (launch is not None or is_slurm) and not any(isinstance(plugin, ClusterEnvironment) for plugin in plugins):
        plugins.append(_environment(launch))
    options["plugins"] = plugins


def _environment(launch: Launch | None) -> ClusterEnvironment:
    """Lightning's, which its own guess would miss in a job called "bash" or by the allocation's number of tasks."""
    if launch is None:
        return LightningEnvironment()
    if launch.by == "torchrun":
        return TorchElasticEnvironment()
    os.environ["SLURM_NTASKS_PER_NODE"] = str(launch.per_node)  # srun leaves it out, or as the allocation has it
    return SLURMEnvironment(auto_requeue=False)


def check_size(world_size: int) -> None:
    """Makes sure that a Trainer counts the processes that a launcher of another kind, such as mpirun, started.

    Raises:
        OptionError: It counts others, so that several would do the same work.
    """
    for name in _SIZES:
        size = os.environ.get(name, "1")
        if size.isdigit() and int(size) not in (1, world_size):
            raise OptionError(
                f"{name} says that {size} processes were started, and the Trainer counts {world_size}, so that each "
                f"would do the whole work; start them by torchrun or srun, or unset {name}"
            )


def _count(devices: Any) -> int | None:
    """How many devices a Trainer's option means; None if it leaves the number open."""
    if devices is None or str(devices) in ("auto", "-1"):
        return None
    if isinstance(devices, list | tuple):
        return len(devices)
    text = str(devices)
    return int(text) if text.isdigit() else len([part for part in text.split(",") if part.strip()])


def hide_advice() -> None:
    """Hides Lightning's warnings that a user can do nothing about, and its tips about other products."""
    for advice in _ADVICE:
        warnings.filterwarnings("ignore", advice)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_tip)


def _is_no_tip(record: logging.LogRecord) -> bool:
    return "Tip: For seamless" not in record.getMessage()
