"""Runs, versions, aliases, lineage: what the rest of the project knows of MLflow."""

import contextlib
import difflib
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from orchestrator.config import Identity, Manifest, Task, Tracking
from orchestrator.delta import CARD, CONFIG, FILES, Delta, load_delta, login, new_manifest, read_file, save_delta
from orchestrator.errors import RegistryError
from orchestrator.registry.door import Door
from orchestrator.registry.evaluations import Evaluation, log_evaluation
from orchestrator.registry.garbage import collect_garbage
from orchestrator.registry.limits import PARAMS_PER_CALL, clean_key, flat_params, flat_tags
from orchestrator.registry.names import CHAMPION, check_alias, check_name, parse_ref
from orchestrator.registry.tracked import TrackedRun
from orchestrator.registry.transfer import fetch, hash_files
from orchestrator.registry.versions import KIND, Listing, Version, alias_tag, listing, to_version

_MAX_CARD = 4 * 2**20


class Registry:
    """The tracking store and model registry of one ``tracking`` section.

    Raises:
        RegistryError: an unusable URI, or a server that cannot be reached.
    """

    def __init__(self, tracking: Tracking | None = None):
        self._door = Door(tracking or Tracking())

    @property
    def uri(self) -> str:
        """The tracking URI, without credentials."""
        return self._door.address.shown

    # Runs

    def start_run(
        self,
        name: str,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, Any] | None = None,
        run_id: str | None = None,
        parent: str | None = None,
    ) -> TrackedRun:
        """Start a run, or go on with ``run_id``. ``parent`` is the id of the run that this one belongs to.

        A resumed run keeps its first parameters; what differs now is kept as tags ``resumed.<parameter>``.
        """
        tracking, client = self._door.tracking, self._door.client
        marks = {**tracking.tags, **(tags or {}), "mlflow.user": tracking.owner or login()}
        if parent:
            marks["mlflow.parentRunId"] = parent
        experiment = self._door.experiment()
        flat, system_step = flat_params(params or {}), 0
        with self._door.reach(f"start run {name!r}"):
            if run_id is None:
                run = client.create_run(experiment, tags=flat_tags(marks), run_name=name)
            else:
                run = client.get_run(run_id)
                if run.info.lifecycle_stage != "active":
                    raise RegistryError(f"run {run_id} at {self.uri} is deleted; start a new one")
                client.update_run(run_id, status="RUNNING")
                old = run.data.params
                changed = {f"resumed.{k}": v for k, v in flat.items() if k in old and old[k] != v}
                flat = {k: v for k, v in flat.items() if k not in old}
                client.log_batch(run_id, tags=[RunTag(k, v) for k, v in flat_tags({**marks, **changed}).items()])
                seen = client.get_metric_history(run_id, "system/cpu_utilization_percentage")
                system_step = max((metric.step for metric in seen), default=-1) + 1
            items = [Param(k, v) for k, v in flat.items()]
            for at in range(0, len(items), PARAMS_PER_CALL):
                client.log_batch(run.info.run_id, params=items[at : at + PARAMS_PER_CALL], synchronous=True)
        url = self._run_url(run.info.experiment_id, run.info.run_id)
        return TrackedRun(
            self._door, run.info.run_id, url, system_step=system_step if tracking.system_metrics else None
        )

    def _run_url(self, experiment: str, run_id: str) -> str:
        if self._door.address.remote:
            return f"{self.uri.replace('***@', '')}/#/experiments/{experiment}/runs/{run_id}"
        return f"{self.uri} (run {run_id}; look at it with `mlflow ui --backend-store-uri {self.uri}`)"

    # Versions

    def publish(
        self,
        directory: Path | str,
        *,
        name: str,
        run: TrackedRun | None = None,
        metrics: Mapping[str, float] | None = None,
        alias: str | None = None,
        tags: Mapping[str, Any] | None = None,
        owner: str | None = None,
    ) -> Version:
        """Register a delta folder as the next version of ``name``. Doing it again for the same run changes nothing.

        Without ``run`` a short run of its own holds the lineage, and the same tensors are registered once per name.

        Raises:
            DeltaError: the folder is no sound delta.
            RegistryError: a bad name or alias, or the server is away; nothing half-registered stays visible.
        """
        check_name(name)
        if alias is not None:
            check_alias(alias)
        delta = load_delta(directory)
        read_file(delta.path, CARD, most=_MAX_CARD)
        if delta.manifest and delta.manifest.base.id == name:
            raise RegistryError(f"{name!r} is the base's own id, which no delta may take; choose another name")
        owner = owner or (delta.manifest.owner if delta.manifest else None) or self._door.tracking.owner or login()
        self._own_name(name)
        lineage = _lineage(delta, owner, metrics or {}, {**self._door.tracking.tags, **(tags or {})})
        version = self._same(name, lineage, run)
        if version is None:
            version = self._register(delta, name, run.id if run else None, lineage, metrics or {})
        # A driver that starts again must not take an alias back that has moved on since.
        return self.promote(version, alias, by=owner) if alias and alias not in version.moves else version

    def _own_name(self, name: str) -> None:
        client = self._door.client
        with self._door.reach(f"register {name!r}"):
            try:
                client.create_registered_model(name, tags={KIND: "delta"})
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                if client.get_registered_model(name).tags.get(KIND) != "delta":
                    raise RegistryError(
                        f"{self.uri} has a registered model {name!r} that is no delta; choose another name"
                    ) from None

    def _same(self, name: str, lineage: dict[str, str], run: TrackedRun | None) -> Version | None:
        """The version that already is this delta: equal tensors, config and base, from the same run."""
        config = json.loads(lineage["manta.files"])[CONFIG]
        for version in self.versions(name):
            base = version.tags.get("manta.base.source_hash")
            same = version.sha256 == lineage["manta.sha256"] and version.files.get(CONFIG) == config
            if same and base == lineage.get("manta.base.source_hash") and (run is None or version.run_id == run.id):
                return version
        return None

    def _register(
        self, delta: Delta, name: str, run_id: str | None, lineage: dict[str, str], metrics: Mapping[str, float]
    ) -> Version:
        client, experiment, own_run = self._door.client, self._door.experiment(), run_id is None
        with self._door.reach(f"register {name!r}", timeout_s=60):
            if run_id is None:
                tags = {"mlflow.user": lineage["manta.owner"]}
                run_id = client.create_run(experiment, tags=tags, run_name=f"publish {name}").info.run_id
            else:
                experiment = client.get_run(run_id).info.experiment_id  # a resumed run may be of another one
            model = None
            try:
                model = client.create_logged_model(experiment, name, run_id, tags=lineage, model_type="delta")
                for file in FILES:
                    if (delta.path / file).exists():
                        client.log_model_artifact(model.model_id, str(delta.path / file))
                client.finalize_logged_model(model.model_id, "READY")
                if metrics:
                    now = int(time.time() * 1000)
                    values = [Metric(clean_key(k), v, now, 0, model_id=model.model_id) for k, v in metrics.items()]
                    client.log_batch(run_id, metrics=values, synchronous=True)
                # A database store would look `models:/<id>` up in the process's default store, not in this one.
                source = f"models:/{model.model_id}" if self._door.address.remote else model.artifact_location
                tags = {**lineage, "manta.model_id": model.model_id}
                made = client.create_model_version(name, source, run_id, tags=tags, model_id=model.model_id)
            except BaseException:
                with contextlib.suppress(Exception):  # the first error is the one to tell
                    if model is not None:
                        client.finalize_logged_model(model.model_id, "FAILED")
                        client.delete_logged_model(model.model_id)
                    if own_run:
                        client.set_terminated(run_id, "FAILED")
                raise
            if own_run:
                client.set_terminated(run_id)
        return to_version(made, {})

    def versions(self, name: str) -> list[Version]:
        """All versions of a delta, newest first. Empty where the name is unknown."""
        check_name(name)
        with self._door.reach(f"list versions of {name!r}"):
            return listing(self._door.client, name)

    def deltas(self) -> list[Listing]:
        """Every registered delta with its newest version, by name."""
        found, token = [], None
        with self._door.reach("list deltas"):
            while True:
                page = self._door.client.search_registered_models(f"tags.`{KIND}` = 'delta'", page_token=token)
                found += [(model.name, listing(self._door.client, model.name)) for model in page]
                if not (token := page.token):
                    break
        return [Listing(name, tuple(versions)) for name, versions in sorted(found) if versions]

    def resolve(self, ref: str) -> Version:
        """``name`` (its champion, else its newest version), ``name:7`` or ``name@alias`` as a version.

        Raises:
            RegistryError: not a reference, or nothing has that name, number or alias.
        """
        name, number, alias = parse_ref(ref)
        versions = self.versions(name)
        if not versions:
            known = [entry.name for entry in self.deltas()]
            near = difflib.get_close_matches(name, known, 3) or known[:10]
            have = f"; there is {', '.join(near)}" if near else "; the registry holds no delta yet"
            raise RegistryError(f"no delta {name!r} at {self.uri}{have}")
        if number is not None:
            chosen = [v for v in versions if v.version == number]
        else:
            chosen = [v for v in versions if (alias or CHAMPION) in v.aliases] or ([] if alias else versions)
        if not chosen:
            have = ", ".join(f"{v.version}{''.join(f'@{a}' for a in v.aliases)}" for v in versions[:20])
            raise RegistryError(f"no delta {ref!r} at {self.uri}; {name!r} has versions {have}")
        return chosen[0]

    def fetch(self, ref: str | Version) -> Path:
        """Folder with the delta on this machine, checked; downloaded where the cache lacks it."""
        return fetch(self._door, ref if isinstance(ref, Version) else self.resolve(ref))

    def promote(self, ref: str | Version, alias: str = CHAMPION, by: str | None = None) -> Version:
        """Move an alias to a version; tags of the version keep who did it, when, and from which version."""
        check_alias(alias)
        version = self.resolve(ref) if isinstance(ref, str) else ref
        holder = next((v for v in self.versions(version.name) if alias in v.aliases), None)
        if holder is None or holder.version != version.version:
            value = alias_tag(by or login(), holder.version if holder else None)
            number = str(version.version)
            with self._door.reach(f"move alias {alias!r} of {version.name!r}"):
                self._door.client.set_model_version_tag(version.name, number, f"manta.alias.{alias}", value)
                self._door.client.set_registered_model_alias(version.name, alias, number)
        return self.resolve(f"{version.name}:{version.version}")

    def log_evaluation(self, done: Evaluation, version: Version | None, predictions: Path) -> str:
        """Keep an evaluation as a run, and on the version that it is of. Returns where to look at the run."""
        run_id = log_evaluation(self._door, done, version, predictions)
        return self._run_url(self._door.experiment(), run_id)

    def collect_garbage(self, keep: int = 5, dry_run: bool = True, name: str | None = None) -> list[Version]:
        """Versions without an alias that are older than the newest ``keep`` of their name; deleted unless dry run."""
        if keep < 0:
            raise RegistryError(f"keep is {keep}; 0 or more is needed")
        names = [check_name(name)] if name else [entry.name for entry in self.deltas()]
        return collect_garbage(self._door, names, keep, dry_run)

    def import_peft(
        self,
        directory: Path | str,
        name: str,
        *,
        identity: Identity | None = None,
        alias: str | None = None,
        tags: Mapping[str, Any] | None = None,
        owner: str | None = None,
    ) -> Version:
        """Publish a plain peft folder. With the base's ``identity`` it gets a manifest, and wrong bases are refused.

        Raises:
            DeltaError: the folder is no sound delta.
            MethodError: peft's type has no counterpart here.
        """
        check_name(name)
        delta = load_delta(directory)
        owner = owner or self._door.tracking.owner or login()
        manifest: Manifest | None = None
        if identity is not None:
            knobs = _knobs(delta.peft_config)
            lineage = {
                "base": identity,
                "method": knobs,
                "task": _task(delta),
                "owner": owner,
                "tags": dict(tags or {}),
            }
            manifest = new_manifest(name=name, **lineage)
        marks = {**(tags or {}), "imported_from": Path(directory).name}
        with tempfile.TemporaryDirectory() as scratch:
            copy = save_delta(Path(scratch) / name, delta.tensors, manifest, delta.peft_config)
            return self.publish(copy.path, name=name, alias=alias, tags=marks, owner=owner)


def _knobs(config: Mapping[str, Any]) -> Any:
    from orchestrator.methods.table import knobs_from_peft  # here, so that listing deltas does not load torch

    return knobs_from_peft(dict(config))


def _task(delta: Delta) -> Task:
    from orchestrator.methods.exchange import task_from_peft

    return task_from_peft(delta.peft_config, delta.tensors)


def _lineage(delta: Delta, owner: str, metrics: Mapping[str, float], tags: Mapping[str, Any]) -> dict[str, str]:
    made = delta.manifest
    known: dict[str, Any] = {
        **tags,
        "manta.sha256": delta.sha256,
        "manta.files": hash_files(delta.path),
        "manta.owner": owner,
        "manta.peft_type": delta.peft_config["peft_type"],
        "manta.base.id": made.base.id if made else delta.peft_config.get("base_model_name_or_path"),
        "manta.metrics": {**(made.metrics if made else {}), **metrics},
    }
    if made:
        known |= {
            "manta.base.source_hash": made.base.source_hash,
            "manta.base.recipe": made.base.recipe,
            "manta.base.licence": made.base.licence,
            "manta.method": made.method.type,
            "manta.task": made.task.type,
            "manta.knobs": made.method.model_dump(mode="json"),
            "manta.parent": made.parent,
            "manta.data_digest": made.data_digest,
            "manta.parameters": made.parameters,
            "manta.code": made.code,
        }
    return flat_tags(known)
