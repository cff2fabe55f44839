"""Runs on a real sqlite store, and on a real server where it says slow; MLflow's own client is the truth."""

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
import pytest
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from orchestrator.config import Tracking
from orchestrator.delta import load_delta
from orchestrator.errors import RegistryError
from orchestrator.registry import Registry, TrackedRun
from tests.registry_kit import history, make


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


@pytest.fixture(scope="module")
def registry(store: str) -> Registry:
    return Registry(Tracking(uri=store, system_metrics=False, owner="ann"))


@pytest.fixture(scope="module")
def client(store: str, registry: Registry) -> MlflowClient:
    return MlflowClient(store, store)


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


def test_a_store_that_is_gone_in_mid_run_is_one_message(tmp_path: Path) -> None:
    """What a user sees: the database's own words, and no traceback of MLflow's at each try."""
    code = (
        "import os; from orchestrator.config import Tracking; from orchestrator.registry import Registry\n"
        "from orchestrator.errors import RegistryError\n"
        f"path = {str(tmp_path / 'mlflow.db')!r}\n"
        "run = Registry(Tracking(uri=f'sqlite:///{path}', system_metrics=False)).start_run('gone')\n"
        "run.log({'loss': 1.0}, 0); assert run.flush()\n"
        "os.unlink(path)\n"
        "run.log({'loss': 2.0}, 1); run.flush(); run.flush()\n"
        "try: run.finish(patience_s=0.2)\n"
        "except RegistryError as e: print(e)\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=100)
    assert "1 metric values and the final status FINISHED could not be written" in done.stdout, done
    assert "(sqlite3.OperationalError)" in done.stdout
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr


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
