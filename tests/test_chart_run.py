"""What the chart starts, started without Kubernetes: the endpoint's application and MLflow's server."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest
import yaml

from orchestrator.errors import ConfigError
from orchestrator.launch.serve import app
from tests.chart_kit import RELEASE, documents, pods

BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


@contextmanager
def running(command: list[str], folder: Path, env: dict[str, str]) -> Iterator[None]:
    """A program in a process group of its own, asked to end, then ended."""
    log = folder / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            command, cwd=folder, env={**os.environ, **env}, stdout=out, stderr=out, start_new_session=True
        )
        try:
            yield
        except BaseException as error:
            error.add_note(log.read_text()[-3000:])
            raise
        finally:
            for number in (signal.SIGINT, signal.SIGKILL):
                if process.poll() is None:
                    os.killpg(process.pid, number)
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(60)


def answered(url: str, seconds: float, **options: object) -> httpx.Response:
    """The first answer with 200."""
    end = time.monotonic() + seconds
    while True:
        try:
            response = httpx.get(url, timeout=5, **options)  # type: ignore[arg-type]
            if response.status_code == 200:
                return response
        except httpx.HTTPError:
            response = None
        if time.monotonic() > end:
            raise TimeoutError(f"{url}: {response}")
        time.sleep(0.5)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"port": 80}, "args: port cannot be set here"),
        ({"row": 1, "base": "demo"}, "row"),
        ({"rows": 0}, "rows"),
        ({"base": {"id": "demo", "quantize": "nf5"}}, "quantize"),
    ],
)
def test_wrong_arguments_of_the_application(args, said):
    with pytest.raises(ConfigError, match=said):
        app(args)


def test_a_gpu_that_is_still_to_come_may_be_asked_for(monkeypatch):
    import ray

    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 1.0})
    assert app({"gpus": 1})._bound_deployment.ray_actor_options["num_gpus"] == 1
    assert app({"gpus": "auto"})._bound_deployment.ray_actor_options["num_gpus"] == 0


@pytest.mark.slow
def test_the_endpoint_of_the_chart_answers(tmp_path):
    (service,) = [d for d in documents("defaults") if d["kind"] == "RayService"]
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    port = free_port()
    config["http_options"] = {"host": "127.0.0.1", "port": port}
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(config))
    root = Path(__file__).parents[1]
    env = {"RAY_ADDRESS": "local", "MANTA_HOME": str(tmp_path), "PYTHONPATH": str(root), "RAY_USAGE_STATS_ENABLED": "0"}
    env |= {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db", "OMP_NUM_THREADS": "1"}
    with running([str(BIN / "serve"), "run", "serve.yaml"], tmp_path, env):
        answered(f"http://127.0.0.1:{port}/healthz", 180)
        models = answered(f"http://127.0.0.1:{port}/v1/models", 10).json()
        assert [m["id"] for m in models["data"]] == ["demo"]
        assert models["data"][0]["max_model_len"] == config["applications"][0]["args"]["length"]
        body = {"model": "demo", "prompt": "hello", "max_tokens": 3}
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] <= 3


@pytest.mark.slow
def test_the_tracking_server_of_the_chart_answers_to_its_names(tmp_path):
    (pod,) = [p for d in documents("defaults") if d["kind"] == "Deployment" for _, p in pods(d)]
    (container,) = pod["spec"]["containers"]
    port = free_port()
    here = [w.replace("/mnt/mlflow", str(tmp_path)).replace("0.0.0.0", "127.0.0.1") for w in container["args"]]
    here = [w.replace("5000", str(port)) for w in here]
    env = {e["name"]: e["value"].replace("/mnt/mlflow", str(tmp_path)) for e in container["env"]}
    env["MLFLOW_BACKEND_STORE_URI"] = f"sqlite:///{tmp_path}/mlflow.db"
    assert container["command"] == ["mlflow", "server"]
    with running([str(BIN / "mlflow"), "server", *here], tmp_path, {**env, "HOME": str(tmp_path)}):
        probe = container["readinessProbe"]["httpGet"]["path"]
        answered(f"http://127.0.0.1:{port}{probe}", 120, headers={"Host": "10.1.2.3:5000"})
        url = f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/search?max_results=1"
        for name in (f"{RELEASE}-mlflow", f"{RELEASE}-mlflow.ml.svc.cluster.local", "localhost"):
            assert httpx.get(url, headers={"Host": f"{name}:{port}"}).status_code == 200, name
        assert httpx.get(url, headers={"Host": "evil.example.com"}).status_code == 403
