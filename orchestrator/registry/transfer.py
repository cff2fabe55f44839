"""Downloads into the local cache: bounded, only the files of a delta, checked before they are visible."""

import hashlib
from pathlib import Path

from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from orchestrator.config import home
from orchestrator.delta import CONFIG, FILES, MANIFEST, MAX_BYTES, WEIGHTS, delta_hash, load_delta, new_dir, read_file
from orchestrator.errors import DeltaError, RegistryError
from orchestrator.registry.door import Door
from orchestrator.registry.versions import Version

_MAX_SMALL = 4 * 2**20


def cached(version: Version) -> Path:
    """Where the cache of this machine keeps a version."""
    return home() / "deltas" / version.key


def hash_files(folder: Path) -> dict[str, str]:
    """sha256 of config and manifest, by file name, as far as they are there."""
    contents = {name: read_file(folder, name, most=_MAX_SMALL) for name in (CONFIG, MANIFEST)}
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items() if content is not None}


def fetch(door: Door, version: Version) -> Path:
    """The version's folder on this machine.

    Raises:
        RegistryError: the server or the files are away.
        DeltaError: what the store holds is not what was registered.
    """
    if not version.sha256:
        raise RegistryError(f"{version.ref} at {door.address.shown} has no sha256; publish it again with Manta")
    target = cached(version)
    if target.is_dir() and _sound(target, version):
        return target
    with new_dir(target, f"{version.ref} to the cache") as scratch:
        _download(door, version, scratch)
        load_delta(scratch, finite=False)
        if not _sound(scratch, version):
            raise DeltaError(
                f"{version.ref} at {door.address.shown}: its files have sha256 {delta_hash(scratch)} (tensors) and "
                f"{hash_files(scratch)}, but {version.sha256} and {version.files} were registered: the store is "
                "damaged or was tampered with"
            )
    return target


def _sound(folder: Path, version: Version) -> bool:
    try:
        return delta_hash(folder) == version.sha256 and (not version.files or hash_files(folder) == version.files)
    except DeltaError:
        return False


def _download(door: Door, version: Version, scratch: Path) -> None:
    with door.reach(f"download {version.ref}", timeout_s=60):
        uri = door.client.get_model_version_download_uri(version.name, str(version.version))
        store = get_artifact_repository(uri, tracking_uri=door.address.uri, registry_uri=door.address.uri)
        sizes = {entry.path: entry.file_size or 0 for entry in store.list_artifacts() if not entry.is_dir}
        if WEIGHTS not in sizes:
            raise RegistryError(f"{version.ref}: its files are gone from {door.address.shown}; publish it again")
        for name in FILES:
            most = MAX_BYTES if name == WEIGHTS else _MAX_SMALL
            if sizes.get(name, 0) > most:
                raise DeltaError(f"{version.ref}: {name} has {sizes[name]:,} bytes, over the limit of {most:,}")
            if name in sizes:
                store.download_artifacts(name, dst_path=str(scratch))
