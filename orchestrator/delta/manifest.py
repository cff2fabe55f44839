"""What a delta says of itself, and whether it fits a base."""

import functools
import getpass
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import orchestrator
from orchestrator.config import Identity, Manifest
from orchestrator.delta.redact import redacted
from orchestrator.errors import DeltaError, WrongBaseError

_LIBRARIES = ("torch", "transformers", "deepspeed", "bitsandbytes", "peft", "ray", "safetensors")


def new_manifest(**fields: Any) -> Manifest:
    """A manifest with time, versions, commit and owner filled in where the caller left them out.

    ``name``, ``base`` and ``method`` are needed; ``sha256`` is set when the delta is saved.
    Credentials in ``run`` and ``tags`` are masked.

    Raises:
        DeltaError: a field is missing or wrong.
    """
    filled = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "code": commit(),
        "sha256": "0" * 64,
        "parameters": 0,
        **fields,
    }
    filled["owner"] = filled.get("owner") or login()
    filled["run"] = redacted(filled.get("run", {}))
    filled["tags"] = redacted(filled.get("tags", {}))
    try:
        return Manifest.model_validate(filled)
    except ValueError as error:
        raise DeltaError(f"the manifest cannot be made: {error}") from error


def draft(manifest: Manifest | Mapping[str, Any]) -> Manifest:
    """A manifest from one, or from its fields."""
    fields = manifest.model_dump() if isinstance(manifest, Manifest) else dict(manifest)
    return new_manifest(**fields)


@functools.cache
def versions() -> dict[str, str]:
    """Versions of this project, Python and the libraries a delta depends on."""
    found = {"manta-ray": orchestrator.__version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def commit() -> str | None:
    """Commit of the project's own checkout, with ``+`` where it has uncommitted changes; None elsewhere."""
    root = Path(orchestrator.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    try:
        head = _git(root, "rev-parse", "HEAD")
        return f"{head}+" if _git(root, "status", "--porcelain", "--untracked-files=no") else head
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def login() -> str:
    """The user's login name."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return "unknown"


def check_base(manifest: Manifest | None, identity: Identity) -> list[str]:
    """Whether a delta fits a base. Returns what may matter, one sentence each.

    Raises:
        WrongBaseError: it was made for other source weights.
    """
    if manifest is None:
        return ["the delta has no manifest, so nothing tells which base it was made for"]
    made = manifest.base
    if made.source_hash != identity.source_hash:
        raise WrongBaseError(
            f"delta {manifest.name!r} was made for {made.id} with source weights {made.source_hash}, "
            f"but the base is {identity.id} with source weights {identity.source_hash}; "
            "load the base it was made for, or train it on this one"
        )
    warnings = []
    if made.recipe != identity.recipe:
        warnings.append(
            f"delta {manifest.name!r} was trained on a base held as {made.recipe} and now meets it as "
            f"{identity.recipe}; its metrics may differ"
        )
    if made.template_hash and identity.template_hash and made.template_hash != identity.template_hash:
        warnings.append(f"delta {manifest.name!r} was trained with another chat template than the base has now")
    return warnings
