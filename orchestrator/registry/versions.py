"""``Version``: one registered delta, as the rest of the project sees it."""

import hashlib
import json
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from mlflow.exceptions import MlflowException

KIND = "manta.kind"
"""Tag of registered models that hold deltas; others on the same server are left alone."""
RECORD = "manta.evaluation."
"""Prefix of a version's tags that each hold one evaluation."""


@dataclass(frozen=True)
class Version:
    """One immutable version of a delta.

    Attributes:
        name: Name in the registry.
        version: Number, from 1.
        sha256: Hash of its tensors.
        aliases: Aliases that point to it now.
        run_id: The run that made it.
        source: Where its files are.
        created: UTC time, ISO 8601.
        tags: Lineage (``manta.*``) and free tags.
    """

    name: str
    version: int
    sha256: str
    aliases: tuple[str, ...]
    run_id: str | None
    source: str
    created: str
    tags: dict[str, str] = field(default_factory=dict, hash=False)

    @property
    def ref(self) -> str:
        """``name:version``."""
        return f"{self.name}:{self.version}"

    @property
    def key(self) -> str:
        """What caches are keyed by: two versions may have equal tensors and another scale, or another base."""
        files = json.dumps(self.files, sort_keys=True).encode()
        return f"{self.sha256}-{hashlib.sha256(files).hexdigest()[:16]}"

    @property
    def files(self) -> dict[str, str]:
        """sha256 of its config and manifest, by file name."""
        value = _json(self.tags.get("manta.files"))
        return value if isinstance(value, dict) else {}

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics it was published with."""
        value = _json(self.tags.get("manta.metrics"))
        return value if isinstance(value, dict) else {}

    @property
    def moves(self) -> dict[str, dict[str, Any]]:
        """Every alias it has had: who moved it here, when, and from which version."""
        moves = {k.removeprefix("manta.alias."): _json(v) for k, v in self.tags.items() if k.startswith("manta.alias.")}
        return {alias: move for alias, move in moves.items() if isinstance(move, dict)}

    @property
    def evaluations(self) -> dict[str, dict[str, Any]]:
        """Its evaluations by what they may be compared under: ``data``, ``digest``, ``at``, ``metrics`` and more."""
        found = {k.removeprefix(RECORD): _json(v) for k, v in self.tags.items() if k.startswith(RECORD)}
        return {k: v for k, v in found.items() if isinstance(v, dict) and isinstance(v.get("metrics"), dict)}


@dataclass(frozen=True)
class Listing:
    """A delta's name and its versions, newest first."""

    name: str
    versions: tuple[Version, ...]

    @property
    def newest(self) -> Version:
        """The newest version."""
        return self.versions[0]

    @property
    def aliases(self) -> dict[str, int]:
        """Alias to version number."""
        return {alias: v.version for v in self.versions for alias in v.aliases}


def alias_tag(by: str, previous: int | None) -> str:
    """Value of the tag that records one move of an alias."""
    return json.dumps({"by": by, "at": datetime.now(UTC).isoformat(timespec="seconds"), "from": previous})


def _json(text: str | None) -> Any:
    try:
        return json.loads(text or "null")
    except ValueError:  # written by hand in MLflow's interface
        return None


def to_version(made: Any, aliases: dict[str, Any]) -> Version:
    """From MLflow's ModelVersion and its model's aliases."""
    number = int(made.version)
    sha256 = made.tags.get("manta.sha256", "")
    return Version(
        name=made.name,
        version=number,
        # Used as a folder name, and the registry is not ours alone.
        sha256=sha256 if re.fullmatch(r"[0-9a-f]{64}", sha256) else "",
        aliases=tuple(sorted(alias for alias, holder in aliases.items() if int(holder) == number)),
        run_id=made.run_id or None,
        source=made.source,
        created=datetime.fromtimestamp(made.creation_timestamp / 1000, UTC).isoformat(timespec="seconds"),
        tags=dict(made.tags),
    )


def listing(client: Any, name: str) -> list[Version]:
    """Versions of one registered model, newest first; empty where there is none, or it holds no deltas."""
    try:
        model = client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return []
        raise
    if model.tags.get(KIND) != "delta":
        return []
    found: list[Version] = []
    token = None
    while True:
        page = client.search_model_versions(f"name = '{name}'", page_token=token)
        found += [to_version(made, model.aliases) for made in page]
        if not (token := page.token):
            return sorted(found, key=lambda v: -v.version)
