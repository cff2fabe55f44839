"""Files and folders that appear whole or not at all."""

import contextlib
import ctypes
import errno
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from orchestrator.errors import DeltaError

_EXCHANGE = 2  # RENAME_EXCHANGE of renameat2(2)
_AT_FDCWD = -100
_STALE_S = 3600.0


def write_file(path: Path, content: bytes) -> None:
    """Write and fsync one file; raises OSError."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_dir(path: Path) -> None:
    """Fsync a folder, so that its entries survive a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def new_dir(target: Path, what: str) -> Iterator[Path]:
    """A hidden sibling of ``target`` to fill; on success it takes the target's place, else it is removed.

    Whatever goes wrong inside, an existing target stays as it was. Raises DeltaError for a full disk or a
    folder that cannot be written; ``what`` names the thing in that message.
    """
    target = target.absolute()
    scratch = target.parent / f".{target.name}.tmp-{secrets.token_hex(6)}"
    try:
        try:
            if target.exists() and not target.is_dir():
                raise DeltaError(f"cannot write {what} to {target}: a file of that name is in the way")
            target.parent.mkdir(parents=True, exist_ok=True)
            _sweep(target)
            scratch.mkdir()
            yield scratch
            for entry in scratch.rglob("*"):
                if entry.is_dir():
                    sync_dir(entry)
            sync_dir(scratch)
            _swap(scratch, target)
            sync_dir(target.parent)
        except OSError as error:
            reason = "no space left on the disk" if error.errno == errno.ENOSPC else (error.strerror or str(error))
            kept = "; what was there before is untouched" if target.exists() else ""
            raise DeltaError(f"cannot write {what} to {target}: {reason}{kept}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _sweep(target: Path) -> None:
    """Remove what a killed process left beside the target long ago."""
    for old in target.parent.glob(f".{target.name}.tmp-*"):
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > _STALE_S:
                shutil.rmtree(old)


def _swap(scratch: Path, target: Path) -> None:
    """Put ``scratch`` in the place of ``target`` in one step; afterwards ``scratch`` holds the old one, if any."""
    if not target.exists():
        scratch.rename(target)
        return
    if _exchange(scratch, target):
        return
    # No atomic exchange on this file system: two renames, undone if the second fails.
    aside = scratch.with_name(f"{scratch.name}.old")
    target.rename(aside)
    try:
        scratch.rename(target)
    except OSError:
        aside.rename(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):  # not Linux with glibc
        return False
    return bool(renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _EXCHANGE) == 0)


def read_file(directory: Path, name: str, *, most: int) -> bytes | None:
    """The bytes of ``directory/name``; None where there is no such file.

    Raises:
        DeltaError: a file outside the folder (through a link), not a plain file, or larger than ``most`` bytes.
    """
    path = directory / name
    root = directory.resolve()
    try:
        real = path.resolve(strict=True)
    except FileNotFoundError:
        if path.is_symlink():
            raise DeltaError(f"{path}: a link that leads nowhere") from None
        return None
    except (OSError, RuntimeError) as error:
        raise DeltaError(f"{path}: cannot be read: {error}") from error
    # The hub's cache keeps a snapshot's files as links into the repository's own blobs.
    allowed = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    if not any(real.is_relative_to(folder) for folder in allowed):
        raise DeltaError(f"{path}: a link that leaves the folder; copy the file itself")
    try:
        if not stat.S_ISREG(real.stat().st_mode):
            raise DeltaError(f"{path}: not a plain file")
        with real.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > most:
                raise DeltaError(f"{path}: {size:,} bytes, over the limit of {most:,}")
            return file.read(most + 1)
    except OSError as error:
        raise DeltaError(f"{path}: cannot be read: {error.strerror or error}") from error
