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
        # Pages of read files count as used, though the kernel takes them back first: a base that was just downloaded
        # or hashed would look like memory that is gone.
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        cached = int(stat["inactive_file"]) + int(stat["active_file"])
        total, free = min(total, limit), min(free, limit - used + cached)
    return total, free
