"""Versions, aliases and addresses on a real sqlite store; MLflow's own client is the truth."""

import json
import logging
import os
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from orchestrator.config import Tracking, home
from orchestrator.delta import load_delta
from orchestrator.errors import DeltaError, RegistryError
from orchestrator.registry import Registry, TrackedRun, Version, check_alias, parse_ref
from orchestrator.registry.limits import clean_key, flat_params
from tests.registry_kit import IDENTITY, make


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


@pytest.fixture(scope="module")
def registry(store: str) -> Registry:
    return Registry(Tracking(uri=store, system_metrics=False, owner="ann"))


@pytest.fixture(scope="module")
def client(store: str, registry: Registry) -> MlflowClient:
    return MlflowClient(store, store)


# References


def test_references() -> None:
    assert parse_ref("support") == ("support", None, None)
    assert parse_ref("support:7") == ("support", 7, None)
    assert parse_ref("a.b-c_1@candidate") == ("a.b-c_1", None, "candidate")
    for bad in ("../x", "a/b", "A", "", "a:", "a:0", "a:x", "a@", "a@latest", "a@v1", "a@1", "a:1@b", "x" * 64, "a b"):
        with pytest.raises(RegistryError):
            parse_ref(bad)
    with pytest.raises(RegistryError, match="lower-case"):
        check_alias("Champion")


# Versions


@pytest.fixture(scope="module")
def published(registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> tuple[Version, Path, TrackedRun]:
    folder = make(tmp_path_factory.mktemp("d") / "d", 1)
    (folder / "stray.bin").write_bytes(b"never uploaded")
    run = registry.start_run("train")
    version = registry.publish(
        folder, name="support", run=run, metrics={"eval_loss": 0.25}, alias="candidate", tags={"team": "nlp"}
    )
    run.finish()
    return version, folder, run


def test_published_version_has_lineage(published: tuple[Version, Path, TrackedRun], client: MlflowClient) -> None:
    version, folder, run = published
    seen = client.get_model_version_by_alias("support", "candidate")
    assert (int(seen.version), seen.run_id) == (version.version, run.id)
    tags = seen.tags
    assert tags["manta.sha256"] == version.sha256 == load_delta(folder).sha256
    assert tags["manta.base.source_hash"] == "a" * 64
    assert tags["manta.parent"] == "b" * 64
    assert tags["manta.data_digest"] == "d" * 64
    assert (tags["manta.owner"], tags["team"]) == ("ann", "nlp")
    assert version.metrics == {"eval_loss": 0.25}
    model = client.get_logged_model(tags["manta.model_id"])
    assert (str(model.status), model.source_run_id) == ("READY", run.id)
    assert model.metrics[0].value == 0.25


def test_mlflow_itself_gives_the_peft_folder_back(
    published: tuple[Version, Path, TrackedRun], store: str, tmp_path: Path
) -> None:
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(store)
    try:
        got = Path(mlflow.artifacts.download_artifacts("models:/support@candidate", dst_path=str(tmp_path / "x")))
    finally:
        mlflow.set_tracking_uri(before)
        os.environ.pop("MLFLOW_TRACKING_URI", None)
    names = {p.name for p in got.iterdir()} - {"registered_model_meta"}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "manta.json", "README.md"}
    assert load_delta(got).sha256 == published[0].sha256


def test_publishing_again_changes_nothing(
    registry: Registry, published: tuple[Version, Path, TrackedRun], client: MlflowClient
) -> None:
    version, folder, run = published
    assert registry.publish(folder, name="support", run=run, alias="candidate") == version
    assert registry.publish(folder, name="support") == version
    assert len(client.search_model_versions("name = 'support'")) == 1
    other = registry.start_run("other")
    second = registry.publish(folder, name="support-copy", run=other)
    other.finish()
    assert (second.version, second.run_id) == (1, other.id)


def test_fetch_is_cached_by_hash_and_verified(registry: Registry, published: tuple[Version, Path, TrackedRun]) -> None:
    version, _, _ = published
    path = registry.fetch("support@candidate")
    assert path == home() / "deltas" / version.key
    assert path.name.startswith(version.sha256)
    assert load_delta(path).sha256 == version.sha256
    (path / "adapter_model.safetensors").write_bytes(b"rotten")
    assert load_delta(registry.fetch(version)).sha256 == version.sha256


def test_tampered_store_is_refused(registry: Registry, client: MlflowClient, tmp_path: Path) -> None:
    version = registry.publish(make(tmp_path / "t", 77, "tampered"), name="tampered")
    uri = client.get_model_version_download_uri("tampered", "1").removeprefix("file://")
    config = Path(uri) / "adapter_config.json"
    honest = config.read_text()
    config.write_text(honest.replace("32.0", "3200.0"))
    with pytest.raises(DeltaError, match="tampered with"):
        registry.fetch(version)
    config.write_text(honest)
    shutil.copytree(make(tmp_path / "evil", 78, "tampered"), uri, dirs_exist_ok=True)
    with pytest.raises(DeltaError, match="tampered with"):
        registry.fetch(version)
    assert not (home() / "deltas" / version.key).exists()
    shutil.rmtree(uri)
    with pytest.raises(RegistryError, match="files are gone"):
        registry.fetch(version)


def test_names_resolve_to_champion_else_newest(registry: Registry, tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        registry.publish(make(tmp_path / str(seed), seed, "chain"), name="chain")
    assert registry.resolve("chain").version == 3
    moved = registry.promote("chain:2", "champion", by="bob")
    assert moved.aliases == ("champion",)
    assert registry.resolve("chain").version == registry.resolve("chain@champion").version == 2
    assert registry.resolve("chain:1").version == 1
    registry.promote("chain:1", by="eve")
    assert registry.resolve("chain").version == 1
    first, second = registry.resolve("chain:1").moves["champion"], registry.resolve("chain:2").moves["champion"]
    assert (first["by"], first["from"], second["by"], second["from"]) == ("eve", 2, "bob", None)
    assert first["at"] >= second["at"]
    at = first["at"]
    registry.promote("chain:1", by="somebody else")
    assert registry.resolve("chain:1").moves["champion"] == {"by": "eve", "at": at, "from": 2}
    with pytest.raises(RegistryError, match=r"has versions 3, 2, 1@champion"):
        registry.resolve("chain:9")
    with pytest.raises(RegistryError, match="has versions"):
        registry.resolve("chain@candidate")
    with pytest.raises(RegistryError, match="there is chain"):
        registry.resolve("chian")
    assert [entry.name for entry in registry.deltas()] == sorted(entry.name for entry in registry.deltas())
    (entry,) = [entry for entry in registry.deltas() if entry.name == "chain"]
    assert (entry.newest.version, entry.aliases) == (3, {"champion": 1})


def test_publishing_again_does_not_take_an_alias_back(registry: Registry, tmp_path: Path) -> None:
    first, second = (make(tmp_path / str(seed), seed, "again") for seed in (61, 62))
    registry.publish(first, name="again", alias="candidate")
    registry.publish(second, name="again", alias="candidate")
    assert registry.publish(first, name="again", alias="candidate").aliases == ()
    assert registry.resolve("again@candidate").version == 2


def test_garbage_is_old_and_without_alias(registry: Registry, client: MlflowClient, tmp_path: Path) -> None:
    for seed in range(11, 17):
        registry.publish(make(tmp_path / str(seed), seed, "heap"), name="heap")
    registry.promote("heap:1", "champion")
    registry.promote("heap:3", "candidate")
    old = registry.resolve("heap:2")
    files = Path(client.get_model_version_download_uri("heap", "2").removeprefix("file://"))
    cache = registry.fetch(old)
    listed = registry.collect_garbage(keep=2, name="heap")
    assert [v.version for v in listed] == [4, 2]
    assert len(registry.versions("heap")) == 6
    deleted = registry.collect_garbage(keep=2, dry_run=False, name="heap")
    assert deleted == listed
    assert [v.version for v in registry.versions("heap")] == [6, 5, 3, 1]
    assert not files.exists()
    assert not cache.exists()
    with pytest.raises(MlflowException):
        client.get_logged_model(old.tags["manta.model_id"])
    registry.fetch("heap:1")
    registry.collect_garbage(keep=0, dry_run=False, name="heap")
    assert [v.version for v in registry.versions("heap")] == [3, 1]
    with pytest.raises(RegistryError, match="keep is -1"):
        registry.collect_garbage(keep=-1)


def test_an_alias_moved_after_listing_saves_the_version(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in (21, 22):
        registry.publish(make(tmp_path / str(seed), seed, "late"), name="late")
    from orchestrator.registry import garbage

    real = garbage._all_versions

    def promoted(door: Any) -> Any:
        registry.promote("late:1", "champion")
        return real(door)

    monkeypatch.setattr(garbage, "_all_versions", promoted)
    assert registry.collect_garbage(keep=1, dry_run=False, name="late") == []
    assert len(registry.versions("late")) == 2


def test_failed_upload_leaves_no_version(
    registry: Registry, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(tmp_path / "f", 31, "half")
    real, calls = registry._door.client.log_model_artifact, []

    def failing(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(*args)

    monkeypatch.setattr(registry._door.client, "log_model_artifact", failing)
    with pytest.raises(RegistryError, match="No space left"):
        registry.publish(folder, name="half")
    monkeypatch.undo()
    assert registry.versions("half") == []
    assert registry.publish(folder, name="half").version == 1


def test_bad_publications_are_refused(registry: Registry, client: MlflowClient, tmp_path: Path) -> None:
    folder = make(tmp_path / "b", 41)
    for name in ("../x", "Upper", "a/b", ""):
        with pytest.raises(RegistryError, match="is not a delta name"):
            registry.publish(folder, name=name)
    with pytest.raises(RegistryError, match="base's own id"):
        registry.publish(folder, name="tiny")
    with pytest.raises(RegistryError, match="is not an alias"):
        registry.publish(folder, name="support", alias="latest")
    (folder / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(DeltaError, match="sha256"):
        registry.publish(folder, name="support")
    client.create_registered_model("theirs")
    with pytest.raises(RegistryError, match="no delta; choose another"):
        registry.publish(make(tmp_path / "c", 42), name="theirs")
    assert "theirs" not in [entry.name for entry in registry.deltas()]


def test_import_of_a_plain_peft_folder(registry: Registry, tmp_path: Path) -> None:
    folder = make(tmp_path / "p", 51)
    (folder / "manta.json").unlink()
    plain = registry.import_peft(folder, "plain", owner="zoe", alias="candidate")
    assert (plain.tags["manta.owner"], plain.tags["imported_from"], plain.aliases) == ("zoe", "p", ("candidate",))
    assert load_delta(registry.fetch(plain)).manifest is None
    assert registry.import_peft(folder, "plain").version == 1
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 64.0}))
    assert registry.import_peft(folder, "plain").version == 2
    (folder / "adapter_config.json").write_text(json.dumps(config))
    known = registry.import_peft(folder, "plain", identity=IDENTITY, tags={"team": "nlp"})
    manifest = load_delta(registry.fetch(known)).manifest
    assert known.version == 3
    assert manifest is not None
    assert manifest.base == IDENTITY
    assert (manifest.method.rank, manifest.method.alpha, manifest.tags) == (2, 32.0, {"team": "nlp"})


# Addresses


@pytest.mark.parametrize("uri", ["file:///tmp/x", "/tmp/x", "mlruns", "sqlite://", "sqlite:///:memory:", "ftp://a:b@c"])
def test_unusable_addresses_say_what_would_be_right(uri: str) -> None:
    with pytest.raises(RegistryError, match=r"sqlite:////absolute/file\.db") as caught:
        Registry(Tracking(uri=uri))
    assert "a:b" not in str(caught.value)


def test_default_store_is_in_home_and_environment_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str
) -> None:
    from orchestrator.registry.address import resolve_address

    monkeypatch.setenv("MANTA_HOME", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    default = resolve_address(None)
    assert default.uri == f"sqlite:///{tmp_path}/mlflow.db"
    assert default.artifacts == f"file://{tmp_path}/artifacts"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://u:p@host:5000/")
    assert resolve_address(None).shown == "http://***@host:5000"
    assert resolve_address(store).uri == store
    monkeypatch.chdir(tmp_path)
    assert resolve_address("sqlite:///x/y.db").uri == f"sqlite:///{tmp_path}/x/y.db"


def test_unreachable_server_fails_soon_with_one_message(caplog: pytest.LogCaptureFixture) -> None:
    start = time.monotonic()
    with caplog.at_level(logging.INFO), pytest.raises(RegistryError) as caught:
        Registry(Tracking(uri="http://me:s3cret@127.0.0.1:9"))
    assert time.monotonic() - start < 10
    text = str(caught.value)
    assert "cannot reach MLflow at http://***@127.0.0.1:9" in text
    assert "connection refused" in text
    assert "s3cret" not in text + caplog.text
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ
    assert caught.value.__cause__ is None


def test_deaf_server_fails_soon() -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(8)
        start = time.monotonic()
        with pytest.raises(RegistryError, match="timed out"):
            Registry(Tracking(uri=f"http://127.0.0.1:{deaf.getsockname()[1]}"))
        assert time.monotonic() - start < 11


def test_limits() -> None:
    assert clean_key("a b/c:d.e-f_1é!") == "a b/c:d.e-f_1__"
    assert clean_key("/../x//y/") == "__/x/y"
    assert len(clean_key("k" * 300)) == 250
    assert flat_params({"a": {"b": [1, 2], "c": {}}, "u": "http://u:p@h"}) == {
        "a.b": "[1, 2]",
        "a.c": "{}",
        "u": "http://***@h",
    }
