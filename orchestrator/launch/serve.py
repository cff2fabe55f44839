"""``serve``: one replica with one base and its deltas behind Ray Serve's HTTP proxy."""

import asyncio
import json
import logging
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve as ray_serve
from ray.serve.config import BackpressureConfig, HTTPOptions, ProxyLocation

from orchestrator.config import Serving
from orchestrator.config.load import load_serving
from orchestrator.errors import ClusterError, ConfigError, MantaError, ServeError
from orchestrator.launch.cluster import join, restore_error, worker_env
from orchestrator.serve.deltas import is_folder

log = logging.getLogger("manta.serve")
_MARK = "manta-error "
_DRAIN_S = 120.0


@dataclass(frozen=True)
class Endpoint:
    """A running endpoint."""

    url: str
    """Base URL for OpenAI clients, ending in ``/v1``."""
    name: str
    """Name of the Ray Serve application."""

    def stop(self) -> None:
        """Let running requests end, then take the application down; the last one takes Ray Serve with it."""
        ray_serve.delete(self.name)
        if not ray_serve.status().applications:
            ray_serve.shutdown()

    def configure(self, config: Serving) -> None:
        """Serve other deltas, without a new replica and without touching running requests.

        Raises:
            MantaError: one of them cannot be served; nothing has changed.
        """
        _run(_absolute(config))
        if (fault := _fault(ray_serve.get_app_handle(self.name).fault.remote().result())) is not None:
            raise fault


@ray_serve.ingress()
class Replica:
    """One base, one bank, one engine."""

    def __init__(self, config: Mapping[str, Any], threads: int | None) -> None:
        with _marked():
            self._start(Serving.model_validate(config), threads)

    def _start(self, config: Serving, threads: int | None) -> None:
        import torch  # here and below, so that the driver stays light

        from orchestrator.base import load_base
        from orchestrator.methods import Bank
        from orchestrator.registry import Registry
        from orchestrator.serve.deltas import Deltas
        from orchestrator.serve.engine import Engine
        from orchestrator.serve.http import build

        logging.getLogger("manta").setLevel(logging.INFO)
        device = "cuda" if torch.cuda.is_available() and ray.get_gpu_ids() else "cpu"
        if device == "cpu":
            torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
        base = load_base(config.base, device=device)
        bank = Bank(base.model, device=device)
        self._engine = Engine(
            base.model,
            base.tokenizer,
            bank,
            rows=config.rows,
            length=config.length,
            max_queued=config.max_queued,
            prefill_chunk=config.prefill_chunk,
        )
        self._deltas = Deltas(
            self._engine,
            bank,
            base.identity,
            config.served_name or config.base.id,
            lambda: Registry(config.tracking),
            config.refresh_s,
        )
        self._deltas.start()
        self._app = build(self._engine, self._deltas, base.tokenizer)
        self._fault: str | None = None  # until the first catalogue is there

    def __serve_build_asgi_app__(self) -> Any:
        """What Ray Serve routes requests to."""
        return self._app

    async def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Serve these deltas; called at the start, where an error is final, and whenever the catalogue changes.

        A later error leaves the catalogue as it was: raised here, it would cost the running replica.
        """
        try:
            with _marked():
                await asyncio.to_thread(self._deltas.configure, user_config["deltas"])
            self._fault = ""
        except RuntimeError as error:
            if self._fault is None:
                raise
            log.error("the new catalogue is refused, the old one stays: %s", error)
            self._fault = str(error)

    def fault(self) -> str:
        """Why the last change of the catalogue was refused; empty where it was not."""
        return self._fault or ""

    def check_health(self) -> None:
        """Raises where the engine hangs or died; Ray Serve then starts another replica."""
        if not self._engine.healthy():
            raise ServeError("the engine is stuck")


def serve(config: Serving, *, block: bool = True, address: str | None = None) -> Endpoint:
    """Start an endpoint; with ``block``, keep it up until SIGINT or SIGTERM.

    Raises:
        ServeError: the port is taken, or the replica cannot start.
        ClusterError: the cluster cannot be joined or lacks a GPU.
        BaseModelError, WrongBaseError, DeltaError, RegistryError: base or delta cannot be served.
    """
    _free(config.host, config.port)
    join(address)
    endpoint = _run(_absolute(config))
    shown = ", ".join([config.served_name or config.base.id, *config.deltas])
    print(f"serving {shown} at {endpoint.url}", flush=True)
    if block:
        _wait()
        endpoint.stop()
    return endpoint


def app(args: Mapping[str, Any]) -> Any:
    """The endpoint as a Ray Serve application, for ``serve deploy`` and KubeRay: ``orchestrator.launch.serve:app``.

    ``args`` are the keys of ``Serving`` without those that say how it is reached, which is in Ray Serve's config.

    Raises:
        ConfigError: with every mistake in ``args``.
    """
    if theirs := [key for key in ("name", "host", "port") if key in args]:
        raise ConfigError(f"args: {', '.join(theirs)} cannot be set here; Ray Serve's config says how it is reached")
    config = load_serving(None, [f"{key}={json.dumps(value)}" for key, value in args.items()])
    # A number is taken as it is: the node with the GPU may come only because the application asks for it.
    return _application(_absolute(config), _gpus(config) if config.gpus == "auto" else config.gpus)


def _run(config: Serving) -> Endpoint:
    host = "127.0.0.1" if config.host in ("0.0.0.0", "::") else config.host  # noqa: S104  # asked, not bound
    url = f"http://{f'[{host}]' if ':' in host else host}:{config.port}/v1"
    endpoint = Endpoint(url, config.name)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    known = _applications()
    try:
        ray_serve.start(
            proxy_location=ProxyLocation.HeadOnly, http_options=HTTPOptions(host=config.host, port=config.port)
        )
        ray_serve.run(_application(config, _gpus(config)), name=config.name, route_prefix="/")
    except MantaError:
        raise
    except Exception as error:
        message = "\n".join([_deployed(config.name), str(error)])
        if config.name not in known:
            endpoint.stop()
        if (fault := _fault(message)) is None:
            raise ServeError(f"the endpoint could not be started: {_last_line(message)}") from error
        raise fault from None
    try:
        socket.create_connection((host, config.port), timeout=10).close()
    except OSError as error:  # Ray Serve has one proxy for all applications, and its port is set by the first
        if config.name not in known:
            endpoint.stop()
        raise ServeError(
            f"nothing listens on {host} port {config.port}: Ray Serve already runs in this cluster on another port; "
            "give that port, or run `serve shutdown` first"
        ) from error
    return endpoint


def _applications() -> set[str]:
    try:
        return set(ray_serve.status().applications)
    except Exception as error:  # asked before Ray Serve runs
        log.debug("no Ray Serve yet: %s", error)
        return set()


def _deployed(name: str) -> str:
    """What Ray Serve says of an application's deployments; the replica's own words are in it."""
    overview = ray_serve.status().applications.get(name)
    return "\n".join(d.message for d in overview.deployments.values()) if overview else ""


def _application(config: Serving, gpus: int) -> Any:
    """The deployment. Where Ray Serve's default would hurt, the reason stands beside what is set."""
    room = config.rows + config.max_queued
    threads = os.environ.get("OMP_NUM_THREADS", "")
    deployment = ray_serve.deployment(
        name="Replica",
        num_replicas=1,
        ray_actor_options={
            "num_cpus": 1,
            "num_gpus": gpus,
            "runtime_env": {"env_vars": {**worker_env(gpu=bool(gpus)), **_tracking_env()}},
        },
        user_config={"deltas": list(config.deltas)},  # a change of it reaches the running replica
        max_ongoing_requests=room + 64,  # 5 would cap the batch; the engine's own bound answers 503 first
        max_queued_requests=max(1, config.max_queued),  # without end by default
        backpressure_config=BackpressureConfig(retry_after_s=1),
        # At 0, a redeployment is downtime. A second replica needs a second GPU.
        max_surge_percent=100 if not gpus or ray.cluster_resources().get("GPU", 0) > 1 else 0,
        graceful_shutdown_timeout_s=_DRAIN_S,  # 20 s would cut off long answers
        graceful_shutdown_wait_loop_s=0.5,
        max_constructor_retry_count=1,  # a wrong delta is wrong the twentieth time, too
        health_check_timeout_s=60,
    )(Replica)
    values = config.model_dump(mode="json", exclude={"deltas"})
    return deployment.bind(values, int(threads) if threads.isdecimal() else None)


def _tracking_env() -> dict[str, str]:
    names = ("MLFLOW_TRACKING_URI",)  # no secret: Ray shows it; a node has its own credentials
    return {name: os.environ[name] for name in names if name in os.environ}


def _absolute(config: Serving) -> Serving:
    """Local paths made absolute: the replica starts in another directory."""
    from pathlib import Path

    def absolute(path: str) -> str:
        return str(Path(path).expanduser().absolute())

    base = config.base
    name = config.served_name or base.id
    if base.id != "demo" and Path(base.id).expanduser().is_dir():
        base = base.model_copy(update={"id": absolute(base.id)})
    deltas = tuple(absolute(entry) if is_folder(entry) else entry for entry in config.deltas)
    return config.model_copy(update={"base": base, "deltas": deltas, "served_name": name})


def _gpus(config: Serving) -> int:
    have = ray.cluster_resources().get("GPU", 0)
    if config.gpus == "auto":
        return int(have >= 1)
    if config.gpus > have:
        raise ClusterError("gpus=1, but the cluster has no GPU; set gpus=0 or gpus=auto")
    return config.gpus


def _free(host: str, port: int) -> None:
    """Raises before anything is loaded where the port cannot be had."""
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            pass
    except OSError as error:
        raise ServeError(f"cannot listen on {host} port {port} ({error.strerror}); choose another: port=...") from error


@contextmanager
def _marked() -> Iterator[None]:
    """Our own errors in a form that survives Ray Serve, which passes on text only."""
    try:
        yield
    except MantaError as error:
        fault = json.dumps({"kind": type(error).__name__, "message": str(error)})
        raise RuntimeError(f"{_MARK}{fault}") from None


def _fault(message: str) -> Exception | None:
    """The error that ``_marked`` put into a message."""
    if (found := re.search(re.escape(_MARK) + r"(\{.*\})", message)) is None:
        return None
    fault = json.loads(found[1])
    return restore_error(fault["kind"], fault["message"])


def _last_line(message: str) -> str:
    return [line.strip() for line in message.splitlines() if line.strip()][-1][:500]


def _wait() -> None:
    done = threading.Event()
    before = {number: signal.signal(number, lambda *_: done.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while not done.wait(1.0):
            pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
