"""Memory of the machine this process may use."""

from contextlib import suppress
from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")


def host_memory(cgroup: Path = _CGROUP) -> tuple[int, int]:
    """Total and free bytes, the container's limit counted: beyond it the kernel kills."""
    machine = psutil.virtual_memory()
    total, free = machine.total, machine.available
    with suppress(OSError, ValueError):  # no container, or one without a limit
        limit = int((cgroup / "memory.max").read_text())
        used = int((cgroup / "memory.current").read_text())
        total, free = min(total, limit), min(free, limit - used)
    return total, free
