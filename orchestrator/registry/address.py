"""Where runs and versions are kept: a tracking URI made absolute, or refused with what would be right."""

import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from orchestrator.config import home
from orchestrator.delta import redact
from orchestrator.errors import RegistryError

_DATABASES = ("postgresql", "mysql", "mssql")


@dataclass(frozen=True)
class Address:
    """A resolved tracking URI.

    Attributes:
        uri: As MLflow takes it, credentials included. Never shown.
        file: The sqlite file, where it is one.
        artifacts: Artifact location of experiments made here; None where the server decides.
    """

    uri: str
    file: Path | None
    artifacts: str | None

    @property
    def shown(self) -> str:
        """The URI without credentials."""
        return redact(self.uri)

    @property
    def remote(self) -> bool:
        """Whether it is a tracking server."""
        return self.uri.startswith(("http://", "https://"))


def resolve_address(uri: str | None) -> Address:
    """The given URI, else ``$MLFLOW_TRACKING_URI``, else a sqlite file in ``$MANTA_HOME``.

    Raises:
        RegistryError: a plain path, a ``file:`` URI or a scheme that cannot hold a model registry.
    """
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home() / 'mlflow.db'}"
    scheme = urlsplit(uri).scheme.lower().partition("+")[0]
    if scheme in ("http", "https"):
        return Address(uri.rstrip("/"), None, None)
    if scheme == "sqlite":
        return _sqlite(uri)
    if scheme in _DATABASES:
        return Address(uri, None, (home() / "artifacts").as_uri())
    raise RegistryError(
        f"tracking.uri {redact(uri)!r} cannot hold a model registry; use http(s)://host:port of an MLflow server, "
        "sqlite:////absolute/file.db, or a postgresql:// or mysql:// URI"
    )


def _sqlite(uri: str) -> Address:
    head, _, query = uri.partition("?")
    _, slashes, name = head.partition(":///")
    if not slashes or not name or name == ":memory:":
        raise RegistryError(f"tracking.uri {redact(uri)!r} names no file; use sqlite:////absolute/file.db")
    # Workers and jobs start in other folders, so a relative path would be another store for each.
    file = Path(name).expanduser().absolute()
    full = f"{head.partition(':')[0]}:///{file}" + (f"?{query}" if query else "")
    return Address(full, file, (file.parent / "artifacts").as_uri())
