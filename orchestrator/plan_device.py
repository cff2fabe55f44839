"""What a plan is made for: a named GPU, an amount of memory, this machine, or a cluster."""

import re
from dataclasses import dataclass, field

from orchestrator.base.memory import host_memory
from orchestrator.errors import ConfigError
from orchestrator.train.devices import GIB, Gpu, find_gpu
from orchestrator.train.estimate import Estimator

_UNITS = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}


@dataclass(frozen=True)
class Device:
    """One of so many equal devices."""

    name: str
    """In words."""
    gpu: bool
    """Whether it is one."""
    memory: int
    """Bytes of each."""
    count: int
    """How many work together, a worker on each."""
    kind: Gpu | None = None
    """Which GPU, where its speed is known."""
    estimators: dict[str, Estimator] = field(default_factory=dict, repr=False, compare=False)
    """Bases that were rehearsed for it."""

    def as_dict(self) -> dict[str, object]:
        """Plain values."""
        return {"name": self.name, "gpu": self.gpu, "memory": self.memory, "count": self.count}


def find_device(
    workers: int,
    *,
    gpu: str | None = None,
    memory: str | None = None,
    gpus: int | None = None,
    address: str | None = None,
    wants_gpu: bool | None = None,
) -> Device:
    """What is named; else the cluster's or this machine's own.

    Args:
        workers: how many work together where ``gpus`` is silent.
        gpu: a known GPU's name.
        memory: bytes of each, such as ``80GiB``.
        gpus: how many.
        address: of a Ray cluster; asked only where no GPU is named.
        wants_gpu: what the config says; None for a GPU where there is any.

    Raises:
        ConfigError: an unknown GPU, no amount of memory, or a cluster that does not say what GPUs it has.
    """
    count = workers if gpus is None else gpus
    room = None if memory is None else read_bytes(memory)
    if gpu is not None:
        kind = find_gpu(gpu)
        return Device(kind.name, True, room or kind.memory, count, kind)
    if room is not None:
        return Device(f"GPU of {room / GIB:.1f} GiB", True, room, count)
    return _of_cluster(count, address) if address else _of_machine(count, wants_gpu)


def known_gpu(name: str) -> Gpu | None:
    """The kind of a GPU that is here; None for one whose speed is not known."""
    try:
        return find_gpu(name)
    except ConfigError:
        return None


def read_bytes(text: str) -> int:
    """Bytes of ``80GiB``, ``24gb`` or ``40`` (GiB).

    Raises:
        ConfigError: it is none.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = "gib" if found and not found[2] else found[2].lower() if found else ""
    if found is None or unit not in _UNITS or float(found[1]) <= 0:
        raise ConfigError(f"--memory: {text!r} is no amount of memory; such as 80GiB or 24GB")
    return round(float(found[1]) * _UNITS[unit])


def _of_cluster(count: int, address: str) -> Device:
    from orchestrator.launch.cluster import describe  # brings in Ray

    offers = describe(address)
    kinds = offers["accelerators"]
    if not offers["gpus"]:
        raise ConfigError("the cluster has no GPU; leave --address out to plan for this machine, or give --memory")
    if not kinds:
        raise ConfigError("the cluster does not say which GPUs it has; name one with --gpu, or give --memory")
    slowest = min((find_gpu(kind) for kind in kinds), key=lambda g: (g.memory, g.tflops))
    return Device(f"{slowest.name} of the cluster", True, slowest.memory, count, slowest)


def _of_machine(count: int, wants_gpu: bool | None) -> Device:
    import torch

    found = torch.cuda.device_count()
    if wants_gpu is not False and found:
        name = torch.cuda.get_device_name(0)
        memory = min(torch.cuda.mem_get_info(i)[1] for i in range(found))
        return Device(name, True, memory, count, known_gpu(name))
    if wants_gpu:
        raise ConfigError("cluster.gpus_per_worker=1, and this machine has no GPU; name one with --gpu")
    return Device("CPU of this machine", False, host_memory()[0] // count, count)
