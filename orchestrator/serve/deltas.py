"""The deltas of an endpoint: names resolved to immutable versions, loaded beside running requests, counted in use.

A name points to a version; the version has a slot of the bank. A moved alias loads the new version first, then turns
the name to it; the old slot is emptied when the last request that uses it is done.
"""

import hashlib
import itertools
import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.config import Classification, Identity
from orchestrator.data.batch import NO_SLOT
from orchestrator.delta import Delta, check_base, load_delta
from orchestrator.errors import DeltaError, MantaError, MethodError, RegistryError, ServeError
from orchestrator.methods import Bank, from_files, knobs_from_peft, method_of
from orchestrator.registry import Registry, check_name, parse_ref
from orchestrator.serve.engine import Engine

log = logging.getLogger("manta.serve")

_MOST_EXTRA = 8
"""Versions beyond the configured ones that requests may have loaded."""


class UnknownModelError(ServeError):
    """No model of that name is served."""


@dataclass(eq=False)
class Held:
    """One version in the bank."""

    key: str
    """What tells versions apart: a hash of tensors, config and manifest."""
    slot: int
    """Where it is in the bank."""
    label: str
    """``name:7``, or the folder's name."""
    sha256: str
    """Hash of its tensors."""
    since: int = field(default_factory=lambda: int(time.time()))
    """Unix time of the load."""
    users: int = 0
    """Requests that run on it."""


class Lease:
    """The right to run ``count`` requests on one version; ``release`` gives one back. Any thread."""

    def __init__(self, slot: int, fingerprint: str, release: Callable[[], None]) -> None:
        self.slot, self.fingerprint, self.release = slot, fingerprint, release


class Deltas:
    """What ``model`` may name at this endpoint.

    Args:
        engine: runs the bank's changes between two of its steps.
        bank: gets the slots.
        identity: the base.
        base_name: what the bare base answers to.
        registry: makes the registry; called when the first registered name is needed.
        refresh_s: seconds between looks for moved aliases.
    """

    def __init__(
        self,
        engine: Engine,
        bank: Bank,
        identity: Identity,
        base_name: str,
        registry: Callable[[], Registry],
        refresh_s: float = 5.0,
    ) -> None:
        self._engine, self._bank, self._identity, self.base_name = engine, bank, identity, base_name
        self._make_registry = registry
        self._registry_made: Registry | None = None
        self._refresh_s = refresh_s
        self._lock = threading.Lock()  # of what is below; held for moments only
        self._loading = threading.RLock()  # one loader at a time; held while files are read
        self._held: dict[str, Held] = {}
        self._names: dict[str, Held] = {}
        self._configured: dict[str, str] = {}  # name that is answered to -> what was configured: a ref or a folder
        self._extra: list[str] = []  # further names that requests asked for, oldest first
        self._slots = itertools.count()
        self._told: dict[str, str] = {}
        self._stop = threading.Event()
        self._poller: threading.Thread | None = None

    # -- requests -------------------------------------------------------------------------------------------------

    def lease(self, model: str, count: int = 1) -> Lease | None:
        """A lease on what ``model`` means now; None where that is not loaded yet (then ``load``). Never waits."""
        if model == self.base_name:
            return Lease(NO_SLOT, f"fp_{self._identity.source_hash[:16]}", lambda: None)
        with self._lock:
            held = self._names.get(model)
            if held is None:
                return None
            held.users += count
        return Lease(held.slot, f"fp_{held.key[:16]}", lambda: self._release(held))

    def load(self, model: str) -> None:
        """Load another version of a configured name (``name:7``, ``name@alias``). Waits for the registry and files.

        Raises:
            UnknownModelError: nothing of that name is served.
            RegistryError: the registry cannot be reached.
            DeltaError: the version does not fit.
        """
        try:
            name, number, alias = parse_ref(model)
        except RegistryError:
            raise self._unknown(model) from None
        if self._configured.get(name) != name or (number is None and alias is None):
            raise self._unknown(model)
        if not self._registry().versions(name):  # tells an unreachable registry from an unknown version
            raise self._unknown(model)
        with self._loading:
            try:
                held = self._load(model)
            except RegistryError as error:
                raise UnknownModelError(str(error)) from error
            with self._lock:
                self._names[model] = held
                self._extra = [ref for ref in self._extra if ref != model] + [model]
                for old in self._extra[:-_MOST_EXTRA]:
                    del self._names[old]
                self._extra = self._extra[-_MOST_EXTRA:]
            self._sweep()

    def models(self) -> dict[str, Held | None]:
        """Every name that is answered to, and the version behind it; None for the base."""
        with self._lock:
            return {self.base_name: None, **self._names}

    def _unknown(self, model: str) -> UnknownModelError:
        return UnknownModelError(f"model {model[:100]!r} is not served here; there is {', '.join(self.models())}")

    def _release(self, held: Held) -> None:
        with self._lock:
            held.users -= 1
        self._sweep()

    # -- the catalogue --------------------------------------------------------------------------------------------

    def configure(self, deltas: Sequence[str]) -> None:
        """Serve exactly these (registered names or folders). All are loaded, or nothing changes.

        Raises:
            DeltaError, WrongBaseError, MethodError, RegistryError: one of them cannot be served.
            ServeError: two answer to one name, or one to the base's.
        """
        with self._loading:
            names: dict[str, Held] = {}
            configured: dict[str, str] = {}
            try:
                for entry in deltas:
                    held = self._load(entry)
                    name = held.label if is_folder(entry) else entry
                    if name in names or name == self.base_name:
                        taken = "the base" if name == self.base_name else configured[name]
                        raise ServeError(f"delta {entry} would answer to {name!r}, but that is {taken}; rename one")
                    names[name], configured[name] = held, entry
                with self._lock:
                    self._names, self._configured, self._extra = names, configured, []
            finally:
                self._sweep()

    def start(self) -> None:
        """Watch the registry for moved aliases."""
        self._poller = threading.Thread(target=self._poll, name="manta-deltas", daemon=True)
        self._poller.start()

    def close(self) -> None:
        """Stop watching."""
        self._stop.set()
        if self._poller is not None:
            self._poller.join(10)

    def refresh(self) -> None:
        """Turn every name to the version that the registry gives for it now; what cannot be had stays as it is."""
        with self._loading:
            with self._lock:
                refs = [name for name in self._names if not is_folder(self._configured.get(name, name))]
            for ref in refs:
                try:
                    if parse_ref(ref)[1] is not None:
                        continue  # a number never moves
                    held = self._load(ref)
                except MantaError as error:
                    if self._told.get(ref) != str(error):
                        log.warning("%s stays at %s: %s", ref, self._names[ref].label, error)
                    self._told[ref] = str(error)
                    continue
                self._told.pop(ref, None)
                with self._lock:
                    before, self._names[ref] = self._names[ref], held
                if before is not held:
                    log.info("%s moved from %s to %s", ref, before.label, held.label)
            self._sweep()

    def _poll(self) -> None:
        while not self._stop.wait(self._refresh_s):
            try:
                self.refresh()
            except Exception:
                log.exception("looking for moved aliases failed; the deltas stay as they are")

    def _registry(self) -> Registry:
        with self._loading:
            if self._registry_made is None:
                self._registry_made = self._make_registry()
            return self._registry_made

    def _load(self, entry: str) -> Held:
        """The version behind a ref or folder, in the bank: the one there, or a new one, checked before it is seen."""
        if is_folder(entry):
            delta = load_delta(entry)
            key = _folder_key(delta)
            label = delta.manifest.name if delta.manifest else check_name(delta.path.name)
        else:
            version = self._registry().resolve(entry)
            key, label = version.key, version.ref
            if key in self._held:
                return self._held[key]
            delta = load_delta(self._registry().fetch(version))
        if key in self._held:
            return self._held[key]
        for warning in check_base(delta.manifest, self._identity):
            log.warning("%s: %s", label, warning)
        if _classifies(delta):
            raise MethodError(
                f"{label} is a classification delta: it gives labels, and an endpoint gives texts; `manta eval` runs it"
            )
        knobs = _knobs(delta)
        if not method_of(knobs).mixes:
            raise MethodError(
                f"{label}: the method {knobs.type} is the peft library's own modules, which cannot stand beside other "
                "deltas; `manta eval` runs it, and the peft library serves or merges it"
            )
        held = Held(key, next(self._slots), label, delta.sha256)
        tensors = from_files(knobs, None, delta.tensors, self._bank.scope)
        self._engine.call(lambda: self._bank.add(held.slot, knobs, tensors=tensors)).result()
        with self._lock:
            self._held[key] = held
        return held

    def _sweep(self) -> None:
        """Empty the slots that no name points to and no request uses."""
        with self._lock:
            named = {id(held) for held in self._names.values()}
            # A loader that runs now may be about to point a name to what it just loaded.
            if not self._loading.acquire(blocking=False):
                return
            try:
                idle = [held for held in self._held.values() if id(held) not in named and held.users == 0]
                for held in idle:
                    del self._held[held.key]
            finally:
                self._loading.release()
        for held in idle:
            try:
                self._engine.call(lambda slot=held.slot: self._bank.remove(slot))  # type: ignore[misc]
            except ServeError:
                log.debug("the engine is closed; slot %d goes with it", held.slot)


def is_folder(entry: str) -> bool:
    """A configured delta that is a folder, not a registered name."""
    return "/" in entry or entry.startswith((".", "~")) or Path(entry, "adapter_config.json").is_file()


def _folder_key(delta: Delta) -> str:
    rest = [delta.peft_config, delta.manifest.model_dump(mode="json") if delta.manifest else None]
    return f"{delta.sha256}-{hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()[:16]}"


def _classifies(delta: Delta) -> bool:
    if delta.manifest is not None:
        return isinstance(delta.manifest.task, Classification)
    return delta.peft_config.get("task_type") == "SEQ_CLS"


def _knobs(delta: Delta) -> Any:
    """Method and size: the manifest's, else read off peft's config."""
    if delta.manifest is not None:
        return delta.manifest.method
    try:
        return knobs_from_peft(delta.peft_config)
    except (TypeError, ValueError) as error:
        if isinstance(error, MantaError):
            raise MethodError(f"{delta.path}: {error}") from error
        raise DeltaError(f"{delta.path}: its config cannot be read: {error}") from error
