"""A run submitted as a job to a cluster of two nodes, which are local processes."""

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from mlflow.tracking import MlflowClient

from orchestrator.config import home
from tests import tiny
from tests.launch_kit import ROOT, SMALL

BIN = str(Path(sys.executable).parent)


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@dataclass(frozen=True)
class Cluster:
    env: dict[str, str]
    folder: Path

    def call(self, *words: str, timeout_s: float = 400) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            words, env=self.env, capture_output=True, text=True, timeout=timeout_s, check=False, cwd=self.folder
        )

    @property
    def jobs(self) -> str:
        return f"http://127.0.0.1:{self.env['DASHBOARD']}"

    def drain(self, deadline_s: int) -> None:
        """Give the second node notice, as a cloud does before it takes a machine away."""
        address = f"127.0.0.1:{self.env['PORT']}"
        code = f"import ray; ray.init('{address}', logging_level='ERROR'); print(*(n['NodeID'] for n in ray.nodes() if "
        code += "'node:__internal_head__' not in n['Resources']))"
        listed = self.call(sys.executable, "-W", "ignore", "-c", code)
        (node,) = listed.stdout.split()
        notice = ("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "taken away", "--node-id", node)
        done = self.call(
            "ray", "drain-node", "--address", address, *notice, f"--deadline-remaining-seconds={deadline_s}"
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def raylets(self) -> set[int]:
        """Which raylets have a training worker."""
        found = set()
        for process in psutil.process_iter():
            try:
                if "RayTrainWorker" in "".join(process.cmdline()[:1]):
                    raylet = process.parent()
                    if raylet and str(self.folder) in " ".join(raylet.cmdline()):
                        found.add(raylet.pid)
            except psutil.Error:
                continue
        return found


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    # Ray's sockets have long names, and a path of a socket ends at 107 characters.
    folder = Path("/tmp", f"mc{os.getpid()}")
    folder.mkdir()
    env = {
        **os.environ,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "FOLDER": str(folder),
        "PORT": free_port(),
        "DASHBOARD": free_port(),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
    }
    del env["DS_ACCELERATOR"]  # what a worker needs has to come from the run itself
    env.pop("RAY_ADDRESS", None)  # another cluster's
    del env["PYTEST_CURRENT_TEST"]  # MLflow looks for it, and then for files of its own repository
    (folder / "token").write_text(secrets.token_hex(32))
    here = Cluster(env, folder)
    try:
        started = here.call(str(ROOT / "clusters" / "local.sh"), "start", "2")
        assert started.returncode == 0, started.stderr + "".join(p.read_text() for p in folder.glob("*.log"))
        yield here
    finally:
        here.call(str(ROOT / "clusters" / "local.sh"), "stop")
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def upload(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory as it would be uploaded, marked so that its code can be told from what is installed."""
    folder = tmp_path_factory.mktemp("upload")
    for part in ("orchestrator", "jobs"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    about = folder / "orchestrator" / "__init__.py"
    about.write_text(re.sub(r'__version__ = "[^"]*"', '__version__ = "9.9.9"', about.read_text()))
    assert "9.9.9" in about.read_text()
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    assert size < 20 * 2**20, "an upload is refused over 100 MiB"
    return folder


@pytest.mark.slow
def test_a_job_trains_on_two_nodes(cluster: Cluster, upload: Path, tmp_path: Path) -> None:
    base = tiny.save(tmp_path / "base")
    seen: set[frozenset[int]] = set()
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.2):
            seen.add(frozenset(cluster.raylets()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    overrides = [
        *(o for o in SMALL if "gpus" not in o),
        "name=job",
        f"base={base}",
        "data.eval_fraction=0.005",
        "cluster.workers=2",
        f"cluster.storage={tmp_path}/storage",
        "train.steps=20",
        "train.eval_every=20",
        "train.checkpoint_every=20",
        f"tracking.uri=sqlite:///{tmp_path}/mlflow.db",
    ]
    try:
        job = cluster.call(
            *("ray", "job", "submit", "--address", cluster.jobs, "--working-dir", str(upload), "--"),
            *("python", "jobs/train.py", "jobs/runs/quickstart.yaml", *overrides),
        )
    finally:
        ended.set()
        watcher.join()
    told = job.stdout + job.stderr
    assert job.returncode == 0, told
    assert "Traceback" not in told
    assert "on 2 worker(s), sharded over them (ZeRO-3)" in told
    assert "step 20/20" in told, "plain lines in a log"
    assert any(len(raylets) == 2 for raylets in seen), "a worker on each node"
    version = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").get_model_version_by_alias("job", "candidate")
    run_id = next(line.split("/")[-1] for line in told.splitlines() if line.strip().startswith("delta "))
    manifest = json.loads((home() / "runs" / run_id / "manta.json").read_text())
    assert manifest["sha256"] == version.tags["manta.sha256"]
    assert "9.9.9" in json.dumps(manifest["versions"]), "the uploaded code trained, not what is installed"


@pytest.mark.slow
def test_a_job_with_a_mistake_fails_with_one_message(cluster: Cluster, upload: Path) -> None:
    job = cluster.call(
        *("ray", "job", "submit", "--address", cluster.jobs, "--working-dir", str(upload), "--"),
        *("python", "jobs/train.py", "jobs/runs/quickstart.yaml", "method.rnk=3", "cluster.workers=3"),
    )
    told = job.stdout + job.stderr
    assert job.returncode != 0
    assert "method.rnk" in told
    assert "rank" in told


@pytest.mark.slow
def test_more_workers_than_the_cluster_has_are_refused_at_once(cluster: Cluster, upload: Path) -> None:
    job = cluster.call(
        *("ray", "job", "submit", "--address", cluster.jobs, "--working-dir", str(upload), "--"),
        *("python", "jobs/train.py", "jobs/runs/quickstart.yaml", "cluster.workers=3"),
    )
    told = job.stdout + job.stderr
    assert job.returncode != 0
    assert "3 workers of 1 CPU need 3, the cluster has 2" in told.replace("\n", " ")


@pytest.mark.slow
def test_a_node_that_is_taken_away_costs_no_work(cluster: Cluster, upload: Path, tmp_path: Path) -> None:
    """The last test here: its node does not come back. No checkpoint is due before the notice, so it makes one."""
    storage = tmp_path / "storage"
    overrides = [
        *(o for o in SMALL if "gpus" not in o),
        "name=taken",
        f"base={tiny.save(tmp_path / 'base')}",
        "data.eval_fraction=0",
        "cluster.workers={min: 1, max: 2}",
        f"cluster.storage={storage}",
        "train.steps=1500",
        "train.eval_every=1500",
        "train.checkpoint_every=1500",
        f"tracking.uri=sqlite:///{tmp_path}/mlflow.db",
    ]
    job = subprocess.Popen(
        [
            *("ray", "job", "submit", "--address", cluster.jobs, "--working-dir", str(upload), "--"),
            *("python", "jobs/train.py", "jobs/runs/quickstart.yaml", *overrides),
        ],
        env=cluster.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=cluster.folder,
    )
    assert job.stdout is not None
    told = list(read_until(job.stdout, "step "))
    assert "on 2 worker(s)" in "".join(told)
    cluster.drain(deadline_s=20)
    told += job.stdout
    assert job.wait(60) == 0, "".join(told)
    assert [n for line in told for n in re.findall(r"on (\d) worker\(s\)", line)] == ["2", "1"], "it went on with one"
    steps = sorted(int(f.name[-4:]) for f in storage.glob("taken-*/step-*"))
    assert len(steps) == 2, steps
    assert 0 < steps[0] < steps[1] == 1500


def read_until(lines: Iterable[str], start: str) -> Iterator[str]:
    for line in lines:
        yield line
        if line.startswith(start):
            return
