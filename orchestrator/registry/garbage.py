"""Deletes versions that nobody points to."""

import shutil

from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from orchestrator.registry.door import Door, Missing
from orchestrator.registry.transfer import cached
from orchestrator.registry.versions import KIND, Version, listing


def collect_garbage(door: Door, names: list[str], keep: int, dry_run: bool) -> list[Version]:
    """Versions without alias beyond the newest ``keep`` of each name: listed, and deleted unless ``dry_run``.

    A version goes with its logged model, its files and this machine's cached copy, each only where no version that
    stays uses it.
    """
    with door.reach("list versions"):
        doomed = [v for name in names for v in listing(door.client, name)[keep:] if not v.aliases]
        if dry_run:
            return doomed
        left = {version.ref: version for version in _all_versions(door)}
    return [version for version in doomed if _delete(door, version, left)]


def _delete(door: Door, version: Version, left: dict[str, Version]) -> bool:
    with door.reach(f"delete {version.ref}"):
        # An alias may have been moved here since it was listed.
        aliases = door.client.get_registered_model(version.name).aliases
        if version.version in {int(number) for number in aliases.values()}:
            return False
        door.client.delete_model_version(version.name, str(version.version))
        left.pop(version.ref, None)
        model_id = version.tags.get("manta.model_id")
        if model_id and all(v.tags.get("manta.model_id") != model_id for v in left.values()):
            _delete_model(door, model_id)
        if all(v.key != version.key for v in left.values()):
            shutil.rmtree(cached(version), ignore_errors=True)
    return True


def _delete_model(door: Door, model_id: str) -> None:
    try:
        with door.reach(f"delete logged model {model_id}"):
            location = door.client.get_logged_model(model_id).artifact_location
            door.client.delete_logged_model(model_id)
            if model_id in location:  # never a folder that holds more than this model
                store = get_artifact_repository(location, tracking_uri=door.address.uri)
                store.delete_artifacts()
    except Missing:
        return  # deleted by hand


def _all_versions(door: Door) -> list[Version]:
    found: list[Version] = []
    token = None
    while True:
        page = door.client.search_registered_models(f"tags.`{KIND}` = 'delta'", page_token=token)
        for model in page:
            found += listing(door.client, model.name)
        if not (token := page.token):
            return found
