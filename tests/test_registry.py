"""The registry on a real sqlite store, and on a real server where it says slow; MLflow's own client is the truth."""

import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import mlflow
import pytest
import torch
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from orchestrator.config import Identity, Lora, Tracking, home
from orchestrator.delta import load_delta, save_delta
from orchestrator.errors import DeltaError, RegistryError
from orchestrator.registry import Registry, TrackedRun, Version, check_alias, parse_ref
from orchestrator.registry.limits import clean_key, flat_params

IDENTITY = Identity(id="tiny", source_hash="a" * 64, recipe="none/fp32")


def make(path: Path, seed: int, name: str = "support", **fields: Any) -> Path:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "model.layers.0.q_proj.lora_A.weight": torch.randn(2, 8, generator=generator),
        "model.layers.0.q_proj.lora_B.weight": torch.randn(8, 2, generator=generator),
    }
    knobs = {"method": Lora(rank=2, targets=("q_proj",)), "data_digest": "d" * 64, "parent": "b" * 64, "owner": "ann"}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 32.0, "target_modules": ["q_proj"]}
    return save_delta(path, tensors, {"name": name, "base": IDENTITY, **knobs, **fields}, config).path


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


@pytest.fixture(scope="module")
def registry(store: str) -> Registry:
    return Registry(Tracking(uri=store, system_metrics=False, owner="ann"))


@pytest.fixture(scope="module")
def client(store: str, registry: Registry) -> MlflowClient:
    return MlflowClient(store, store)


def history(client: MlflowClient, run: str, key: str) -> list[tuple[int, float]]:
    return sorted((m.step, m.value) for m in client.get_metric_history(run, key))


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


# Runs


def test_run_holds_parameters_metrics_over_time_and_status(registry: Registry, client: MlflowClient) -> None:
    params = {"train": {"lr": 1e-3, "steps": None}, "name": "x", "api_key": "s3cret", "long": "x" * 9000}
    run = registry.start_run("first", params, {"team": "nlp"})
    for step in range(5):
        run.log({"loss": 1.0 / (step + 1), "odd key!": 1.0, "nan": float("nan")}, step)
    run.finish()
    seen = client.get_run(run.id)
    assert seen.info.status == "FINISHED"
    assert seen.data.params["train.lr"] == "0.001"
    assert seen.data.params["api_key"] == "***"
    assert len(seen.data.params["long"]) == 6000
    assert seen.data.tags["team"] == "nlp"
    assert seen.data.tags["mlflow.user"] == "ann"
    assert history(client, run.id, "loss") == [(step, 1.0 / (step + 1)) for step in range(5)]
    assert "odd key_" in seen.data.metrics
    assert run.id in run.url


def test_resumed_run_goes_on_and_children_know_their_parent(registry: Registry, client: MlflowClient) -> None:
    run = registry.start_run("one", {"lr": 1, "workers": 2})
    run.log({"loss": 1.0}, 0)
    run.finish("FAILED")
    again = registry.start_run("one", {"lr": 1, "workers": 3, "new": 4}, run_id=run.id)
    assert client.get_run(run.id).info.status == "RUNNING"
    again.log({"loss": 0.5}, 1)
    again.finish()
    seen = client.get_run(run.id)
    assert (seen.data.params["workers"], seen.data.tags["resumed.workers"], seen.data.params["new"]) == ("2", "3", "4")
    assert history(client, run.id, "loss") == [(0, 1.0), (1, 0.5)]
    child = registry.start_run("child", parent=run.id)
    child.finish("KILLED")
    assert client.get_run(child.id).data.tags["mlflow.parentRunId"] == run.id
    with pytest.raises(RegistryError, match="could not start run"):
        registry.start_run("x", run_id="0" * 32)


def test_system_metrics(store: str, client: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    registry = Registry(Tracking(uri=store))
    run = registry.start_run("sys")
    time.sleep(0.3)
    run.finish()
    first = client.get_metric_history(run.id, "system/cpu_utilization_percentage")
    assert len(first) > 2
    run = registry.start_run("sys", run_id=run.id)
    run.finish()
    steps = [m.step for m in client.get_metric_history(run.id, "system/cpu_utilization_percentage")]
    assert sorted(steps) == list(range(len(steps)))
    assert len(steps) > len(first)
    assert "system/system_memory_usage_megabytes" in client.get_run(run.id).data.metrics


class Outage:
    """Makes the server look away or angry to one run."""

    def __init__(self, run: TrackedRun, error: Exception, monkeypatch: pytest.MonkeyPatch):
        self.on = True
        self.tries = 0
        client = run._door.client
        real_batch, real_end = client.log_batch, client.set_terminated

        def log_batch(*args: Any, **kwargs: Any) -> Any:
            self.tries += 1
            if self.on:
                raise error
            return real_batch(*args, **kwargs)

        def set_terminated(*args: Any, **kwargs: Any) -> Any:
            if self.on:
                raise error
            return real_end(*args, **kwargs)

        monkeypatch.setattr(client, "log_batch", log_batch)
        monkeypatch.setattr(client, "set_terminated", set_terminated)


AWAY = MlflowException("API request to http://u:p@h failed with exception connection refused")


def test_metrics_wait_for_the_server(
    registry: Registry, client: MlflowClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = registry.start_run("away")
    outage = Outage(run, AWAY, monkeypatch)
    with caplog.at_level(logging.WARNING, logger="orchestrator"):
        for step in range(50):
            run.log({"loss": float(step)}, step)
            run.flush()
    assert outage.tries >= 50
    assert [r.message.startswith("metrics are kept in memory") for r in caplog.records] == [True]
    assert "u:p" not in caplog.text
    outage.on = False
    run.finish()
    assert history(client, run.id, "loss") == [(step, float(step)) for step in range(50)]


def test_finish_says_what_is_lost(registry: Registry, client: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.registry.tracked._MOST_BUFFERED", 30)
    run = registry.start_run("gone")
    outage = Outage(run, AWAY, monkeypatch)
    for step in range(50):
        run.log({"loss": float(step)}, step)
    with pytest.raises(RegistryError, match="50 metric values and the final status FAILED could not be written"):
        run.finish("FAILED", patience_s=0.2)
    outage.on = False
    with pytest.raises(RegistryError, match="20 metric values could not be written") as caught:
        run.finish("FAILED")
    assert "u:p" not in str(caught.value)
    assert history(client, run.id, "loss")[0] == (20, 20.0)
    assert client.get_run(run.id).info.status == "FAILED"


def test_refused_values_do_not_block_later_ones(
    registry: Registry, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = registry.start_run("refused")
    outage = Outage(run, MlflowException("bad", error_code=1000), monkeypatch)  # INVALID_PARAMETER_VALUE
    run.log({"loss": 1.0, "text": "no number"}, 0)  # type: ignore[dict-item]
    assert run.flush()
    outage.on = False
    run.log({"loss": 2.0}, 1)
    with pytest.raises(RegistryError, match="2 metric values"):
        run.finish()
    assert history(client, run.id, "loss") == [(1, 2.0)]


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


@pytest.mark.slow
def test_four_processes_create_one_store(tmp_path: Path) -> None:
    code = (
        "from orchestrator.registry import Registry; from orchestrator.config import Tracking;"
        f"r = Registry(Tracking(uri='sqlite:///{tmp_path}/m.db', system_metrics=False)).start_run('x'); r.finish()"
    )
    running = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) for _ in range(4)]
    for process in running:
        _, errors = process.communicate(timeout=180)
        assert process.returncode == 0, errors
        assert errors == ""
    client = MlflowClient(f"sqlite:///{tmp_path}/m.db", f"sqlite:///{tmp_path}/m.db")
    assert len(client.search_experiments()) == 2
    assert len(client.search_runs([e.experiment_id for e in client.search_experiments()])) == 4


class Server:
    """A real MLflow server on a port of its own."""

    def __init__(self, folder: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder = folder
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--port", str(self.port), "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{self.folder}/m.db", "--artifacts-destination"]
        with (self.folder / "log").open("a") as log:
            self.process = subprocess.Popen(
                [*command, str(self.folder / "a")],
                cwd=self.folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        for _ in range(240):
            try:
                if httpx.get(f"{self.uri}/health", timeout=2).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.5)
        raise AssertionError((self.folder / "log").read_text()[-3000:])

    def stop(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    server.start()
    yield server
    server.stop()


@pytest.mark.slow
def test_real_server_that_goes_away_and_comes_back(server: Server, tmp_path: Path) -> None:
    registry = Registry(Tracking(uri=server.uri, system_metrics=False))
    run = registry.start_run("http", {"a": 1})
    assert run.url.startswith(server.uri)
    run.log({"loss": 1.0}, 0)
    version = registry.publish(make(tmp_path / "d", 1), name="support", run=run, alias="champion", metrics={"m": 1.0})
    path = registry.fetch("support")
    assert load_delta(path).sha256 == version.sha256
    shutil.rmtree(path)
    server.stop()
    start = time.monotonic()
    run.log({"loss": 2.0}, 1)
    assert time.monotonic() - start < 0.1
    with pytest.raises(RegistryError, match="cannot reach MLflow"):
        registry.fetch("support")
    server.start()
    run.finish()
    client = MlflowClient(server.uri, server.uri)
    assert history(client, run.id, "loss") == [(0, 1.0), (1, 2.0)]
    assert client.get_run(run.id).info.status == "FINISHED"
    registry.publish(make(tmp_path / "e", 2), name="support")
    assert registry.promote("support:2", "champion").version == 2
    assert [v.version for v in registry.collect_garbage(keep=1, dry_run=False)] == [1]
    assert load_delta(registry.fetch("support")).manifest is not None
    assert json.loads(client.get_model_version("support", "2").tags["manta.alias.champion"])["from"] == 1
    assert client.get_model_version("support", "2").source.startswith("models:/")
