"""The preflight: what is installed, what this machine and the cluster offer, what would go wrong and what to do."""

import os
import platform
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich.console import Console
from rich.markup import escape

from orchestrator.base.memory import host_memory
from orchestrator.config import Tracking, home
from orchestrator.errors import ClusterError, RegistryError

DISTRIBUTION = "manta-ray"
GIB = 1 << 30
PORTS = {8000: "the endpoint", 8265: "Ray's dashboard and job server"}

Level = Literal["good", "warn", "stop"]


@dataclass(frozen=True)
class Finding:
    """One line of the report; ``advice`` says what to do about a problem, ``stop`` means that no run gets past it."""

    topic: str
    text: str
    level: Level = "good"
    advice: str = ""


def examine(address: str | None = None, console: Console | None = None) -> bool:
    """Print what was found, each problem with what to do; False when something would stop a run.

    ``address`` is a Ray cluster's, such as ``auto`` or ``ray://head:10001``; without one no cluster is looked at.
    """
    console = console or Console()
    checks: list[Callable[[], Iterator[Finding]]] = [
        versions,
        devices,
        memory,
        disk,
        shared_memory,
        compiler,
        ports,
        tracking,
        lambda: cluster(address),
    ]
    marks = {"good": "[green]ok  [/]", "warn": "[yellow]warn[/]", "stop": "[red]stop[/]"}
    stops = 0
    for check in checks:
        for finding in _caught(check):
            stops += finding.level == "stop"
            console.print(f"{marks[finding.level]} {finding.topic:<10} {escape(finding.text)}", soft_wrap=True)
            if finding.advice:
                console.print(f"     {'':<10} [bold]{escape(finding.advice)}[/]", soft_wrap=True)
    if stops:
        console.print(f"[red]{stops} thing{'s' if stops > 1 else ''} would stop a run.[/]")
    else:
        console.print("[green]Nothing would stop a run.[/]")
    return not stops


def _caught(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """The findings of a check; a package that is there but cannot be imported is one more."""
    try:
        yield from check()
    except ImportError as error:
        yield Finding("package", f"cannot be imported: {error}", "stop", "install anew: make clean setup")


# ---- this installation


def versions() -> Iterator[Finding]:
    """Python and every required package against the ranges of this project."""
    try:
        own = metadata.distribution(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        advice = "install it: make setup, or pip install -e . in the project's folder"
        yield Finding("package", f"{DISTRIBUTION} is not installed", "stop", advice)
        return
    python, wanted = platform.python_version(), own.metadata["Requires-Python"] or ""
    if python in SpecifierSet(wanted):
        yield Finding("package", f"{DISTRIBUTION} {own.version} on Python {python}")
    else:
        yield Finding("package", f"Python {python}", "stop", f"Python {wanted} is needed")
    requirements = [Requirement(text) for text in own.requires or ()]
    yield from compare([r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})], _installed())


def compare(requirements: list[Requirement], installed: Mapping[str, str]) -> Iterator[Finding]:
    """Installed versions (by lower-case name) against requirements."""
    good = []
    for wanted in requirements:
        version = installed.get(_canonical(wanted.name))
        advice = f'pip install "{wanted.name}{wanted.specifier}"'
        if version is None:
            yield Finding("package", f"{wanted.name} is not installed", "stop", advice)
        elif not wanted.specifier.contains(version, prereleases=True):
            yield Finding("package", f"{wanted.name} {version} is outside {wanted.specifier}", "stop", advice)
        else:
            good.append(f"{wanted.name} {version}")
    if good:
        yield Finding("package", ", ".join(good))


def _canonical(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def _installed() -> dict[str, str]:
    return {_canonical(d.name): d.version for d in metadata.distributions() if d.name}


# ---- this machine


def devices() -> Iterator[Finding]:
    """GPUs with their memory, and whether this torch can use them."""
    import torch

    yield Finding("devices", f"{os.cpu_count()} CPU cores, {platform.machine()}")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(i)
            text = f"GPU {i}: {torch.cuda.get_device_name(i)}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
            if free < total / 2:
                yield Finding("devices", text, "warn", "another process holds over half of it; see nvidia-smi")
            else:
                yield Finding("devices", text)
    elif Path("/proc/driver/nvidia").exists() and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        build = "a CPU build" if torch.version.cuda is None else f"made for CUDA {torch.version.cuda}"
        text = f"there is an NVIDIA driver, but torch {torch.__version__} ({build}) sees no GPU"
        advice = "install a torch build that fits the driver, else everything runs on the CPU"
        yield Finding("devices", text, "warn", advice)
    else:
        yield Finding("devices", "no GPU: runs compute on the CPU, in fp32")


def memory() -> Iterator[Finding]:
    """Free memory, the container's limit counted."""
    total, free = host_memory()
    text = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
    if free < 2 * GIB:
        yield Finding("memory", text, "stop", "free some: Ray, two processes and the demo base need about 2 GiB")
    else:
        yield Finding("memory", text)


def disk() -> Iterator[Finding]:
    """Whether the home folder can be written, and the room there."""
    folder = home()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        advice = "set MANTA_HOME to a folder that can be written"
        yield Finding("disk", f"{folder}: {error.strerror or error}", "stop", advice)
        return
    free = shutil.disk_usage(folder).free
    text = f"{free / GIB:.1f} GiB free in {folder}"
    if free < GIB:
        yield Finding("disk", text, "stop", "free at least 1 GiB, or set MANTA_HOME to another disk")
    elif free < 10 * GIB:
        yield Finding("disk", text, "warn", "enough for the demo; bases from the hub take tens of GiB")
    else:
        yield Finding("disk", text)


def shared_memory(folder: str = "/dev/shm", need: int = 2 * GIB) -> Iterator[Finding]:  # noqa: S108 - only measured
    """Room in shared memory, where Ray's object store and NCCL live. ``need`` in bytes."""
    if not Path(folder).is_dir():
        yield Finding("shm", f"there is no {folder}", "warn", "Ray will use the disk instead, which is slow")
        return
    total = shutil.disk_usage(folder).total
    text = f"{folder} holds {total / GIB:.1f} GiB"
    if total < need:
        yield Finding("shm", text, "warn", "enlarge it, in Docker by --shm-size=8g; Ray and NCCL keep data there")
    else:
        yield Finding("shm", text)


def compiler() -> Iterator[Finding]:
    """A C compiler, which Triton's and DeepSpeed's kernels are built with at run time."""
    names = [os.environ["CC"]] if os.environ.get("CC") else ["cc", "gcc", "clang"]
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found:
        yield Finding("compiler", found)
    else:
        advice = "install one (Debian and Ubuntu: gcc); kernels for GPUs and CPU offload are compiled at run time"
        yield Finding("compiler", f"no C compiler ({', '.join(names)})", "warn", advice)


def ports(numbers: Mapping[int, str] = PORTS) -> Iterator[Finding]:
    """Whether the ports that serving and Ray take are free on this machine."""
    for port, purpose in numbers.items():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                advice = "stop what listens there, or serve elsewhere: port=8001" if port == 8000 else ""
                advice = advice or "fine if that is your Ray cluster; a second one takes the next free port"
                yield Finding("ports", f"{port} ({purpose}) is taken", "warn", advice)
            else:
                yield Finding("ports", f"{port} ({purpose}) is free")


# ---- what lies outside


def tracking(uri: str | None = None) -> Iterator[Finding]:
    """Whether the tracking store answers; ``uri`` defaults to the environment's, else the embedded sqlite file."""
    from orchestrator.registry import Registry  # brings in MLflow
    from orchestrator.registry.address import resolve_address

    try:
        shown = resolve_address(uri).shown
        Registry(Tracking(uri=uri))
    except RegistryError as error:
        advice = "start the server, or set MLFLOW_TRACKING_URI to another; unset it for the embedded store"
        yield Finding("tracking", str(error), "stop", advice)
    else:
        yield Finding("tracking", f"{shown} answers")


def cluster(address: str | None) -> Iterator[Finding]:
    """What the Ray cluster at ``address`` offers, and whether its versions are ours."""
    if address is None:
        yield Finding("cluster", "none named; a run starts Ray on this machine")
        return
    from orchestrator.launch.cluster import describe  # brings in Ray

    try:
        offers = describe(address)
    except ClusterError as error:
        advice = "start one with `ray start --head`, or name another address"
        yield Finding("cluster", f"{address}: {error}", "stop", advice)
        return
    yield from judge(offers)


def judge(offers: Mapping[str, Any]) -> Iterator[Finding]:
    """The description of a cluster (keys ``nodes``, ``cpus``, ``gpus``, ``ray``, ``python``) against this process."""
    text = f"{offers['nodes']} nodes, {offers['cpus']:g} CPUs, {offers['gpus']:g} GPUs"
    if offers["cpus"] < 1:
        yield Finding("cluster", text, "stop", "no CPU is offered; start nodes with --num-cpus")
    else:
        yield Finding("cluster", text)
    ours = {"ray": _installed().get("ray"), "python": platform.python_version()}
    for name, mine in ours.items():
        theirs = str(offers[name])
        # Ray refuses other versions of itself, and pickles of another minor version of Python.
        same = theirs == mine if name == "ray" else theirs.split(".")[:2] == str(mine).split(".")[:2]
        if same:
            yield Finding("cluster", f"{name} {theirs}, as here")
        else:
            yield Finding("cluster", f"{name} {theirs}, here {mine}", "stop", f"use the same {name} on both sides")
