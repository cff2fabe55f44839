"""What goes wrong in a run, and what is left of it: killed workers, signals, full disks, a tracking server away."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from mlflow.tracking import MlflowClient

from orchestrator.config import Run, home
from orchestrator.errors import (
    BaseModelError,
    CheckpointError,
    ConfigError,
    DataError,
    MantaError,
    MethodError,
    RegistryError,
    WrongBaseError,
)
from orchestrator.launch.train import Outcome, train
from orchestrator.train.checkpoint import read_checkpoint
from tests import tiny
from tests.launch_kit import (
    SMALL,
    Heard,
    assert_same_bits,
    command,
    local_ray,
    small,
    train_here,
    train_workers,
    wait_for,
    weights,
)
from tests.test_registry_runs import Server

STEPS = 60


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    with local_ray() as address:
        yield address


def settings(base: Path, folder: Path, *more: str) -> list[str]:
    return [
        *SMALL,
        f"base={base}",
        "shard=3",
        "cluster.workers=2",
        f"cluster.storage={folder}/storage",
        f"train.steps={STEPS}",
        "train.batch_size=8",
        "train.checkpoint_every=10",
        "method.dropout=0.1",
        f"tracking.uri=sqlite:///{folder}/mlflow.db",
        *more,
    ]


def long(base: Path, folder: Path, *more: str) -> Run:
    """A run that is still going when it is interfered with."""
    return small(*settings(base, folder, *more))


@dataclass(frozen=True)
class Done:
    outcome: Outcome
    heard: Heard


@pytest.fixture(scope="module")
def undisturbed(cluster: str, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    heard = Heard()
    return Done(train(long(base, tmp_path_factory.mktemp("undisturbed")), listen=heard), heard)


# ---- workers and signals


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_worker_costs_nothing_but_time(rank: int, undisturbed: Done, base: Path, tmp_path: Path) -> None:
    heard = Heard(at=15, act=lambda: kill(rank))
    outcome = train(long(base, tmp_path), listen=heard)
    assert heard.acted.is_set()
    assert len(heard.of("started", "ranks")) == 2, "the workers were started anew"
    assert outcome.why == "finished"
    assert heard.losses == undisturbed.heard.losses
    assert_same_bits(weights(outcome.delta), weights(undisturbed.outcome.delta))


def kill(rank: int) -> None:
    workers = sorted(train_workers(), key=lambda p: p.pid)
    assert len(workers) == 2, workers
    workers[rank].send_signal(signal.SIGKILL)


@pytest.mark.slow
def test_a_stopped_run_goes_on_at_another_world_size(undisturbed: Done, base: Path, tmp_path: Path) -> None:
    first, second = Heard(at=15, act=lambda: os.kill(os.getpid(), signal.SIGTERM)), Heard()
    stopped = train(long(base, tmp_path), listen=first)
    assert stopped.why == "stopped by SIGTERM"
    assert not stopped.complete
    assert not MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").search_model_versions()
    done = train(long(base, tmp_path), resume=stopped.run_id, overrides=["cluster.workers=1", "shard=0"], listen=second)
    assert second.of("started", "ranks") == [1]
    assert done.complete
    assert max(first.losses) + 1 == min(second.losses), "no step is done twice"
    expected = undisturbed.heard.losses
    assert {**first.losses, **second.losses} == pytest.approx(expected, rel=1e-5)
    for name, value in weights(undisturbed.outcome.delta).items():
        torch.testing.assert_close(weights(done.delta)[name], value, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_command_writes_a_checkpoint_and_resume_goes_on(
    number: signal.Signals, cluster: str, undisturbed: Done, base: Path, tmp_path: Path
) -> None:
    process = command("train", *settings(base, tmp_path), "--address", cluster)
    wait_for(process, "step 1/")
    process.send_signal(number)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 128 + number, told
    assert "Traceback" not in told
    run_id = told.split("--resume ")[1].split()[0]
    again = command("train", "--resume", run_id, "--address", cluster)
    _, told = again.communicate(timeout=200)
    assert again.returncode == 0, told
    assert_same_bits(weights(home() / "runs" / run_id), weights(undisturbed.outcome.delta))


def test_resume_changes_the_cluster_and_nothing_else(base: Path, tmp_path: Path) -> None:
    from orchestrator.launch import ledger

    entry = ledger.Entry("told-1", str(tmp_path), small(f"base={base}").model_dump(mode="json", exclude_unset=True))
    ledger.write(entry)
    with pytest.raises(ConfigError, match=r"train\.lr=1"):
        train(small(), resume="told-1", overrides=["cluster.workers=1", "train.lr=1"])
    with pytest.raises(CheckpointError, match="told-1"):
        train(small(), resume="never-started")


# ---- full disk


@contextmanager
def tmpfs(folder: Path, size: str) -> Iterator[Callable[[str], None]]:
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder]).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        yield lambda more: subprocess.run(["mount", "-o", f"remount,size={more}", folder], check=True)
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.slow
def test_a_full_disk_leaves_the_earlier_checkpoint_whole(
    cluster: str, undisturbed: Done, base: Path, tmp_path: Path
) -> None:
    with tmpfs(tmp_path / "storage", "2m") as grow:
        ballast = tmp_path / "storage" / "ballast"
        heard = Heard(at=12, act=lambda: fill(ballast))
        with pytest.raises(CheckpointError) as told:
            train(long(base, tmp_path), listen=heard)
        message = str(told.value)
        assert "no space left" in message.lower()
        run_id = message.split("--resume ")[1].split()[0]
        kept = sorted((tmp_path / "storage" / run_id).glob("step-*"))
        assert kept, "the earlier one is there"
        for folder in kept:
            assert read_checkpoint(folder, "delta").values["trial"]["step"] == int(folder.name[-8:]), "half-written"
        assert len(heard.of("started", "ranks")) == 1, "no restart for what a restart does not mend"
        ballast.unlink()
        grow("16m")
        done = train(small(), resume=run_id)
    assert done.complete
    assert_same_bits(weights(done.delta), weights(undisturbed.outcome.delta))


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass


# ---- MLflow


def test_a_tracking_server_that_is_away_at_the_start_stops_everything(base: Path, tmp_path: Path) -> None:
    begin = time.monotonic()
    with pytest.raises(RegistryError, match=r"cannot reach MLflow at http://127\.0\.0\.1:9"):
        train(long(base, tmp_path, "tracking.uri=http://127.0.0.1:9"))
    assert time.monotonic() - begin < 15
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_tracking_server_that_goes_and_comes_back_misses_nothing(cluster: str, base: Path, tmp_path: Path) -> None:
    server = Server(tmp_path)
    server.start()
    back: list[int] = []

    def away() -> None:
        server.stop()
        back.append(1)

    try:
        heard = Heard(at=10, act=away)

        def listen(kind: str, values: dict[str, float]) -> None:
            heard(kind, values)
            if kind == "step" and values["step"] >= 40 and back:
                back.clear()
                server.start()

        outcome = train(long(base, tmp_path, f"tracking.uri={server.uri}"), listen=listen)
        assert outcome.version is not None
        client = MlflowClient(server.uri)
        history = client.get_metric_history(str(outcome.version.run_id), "loss")
        assert sorted({m.step for m in history} - {0}) == list(range(1, STEPS + 1))
        assert client.get_run(str(outcome.version.run_id)).info.status == "FINISHED"
    finally:
        server.stop()


@pytest.mark.slow
def test_a_tracking_server_that_stays_away_costs_no_training(cluster: str, base: Path, tmp_path: Path) -> None:
    server = Server(tmp_path)
    server.start()
    heard = Heard(at=10, act=server.stop)
    with pytest.raises(RegistryError, match="trained and whole") as told:
        train(long(base, tmp_path, f"tracking.uri={server.uri}"), listen=heard)
    assert max(heard.losses) == STEPS
    run_id = str(told.value).split("--resume ")[1].split()[0]
    assert weights(home() / "runs" / run_id)
    server.start()
    try:
        done = train(small(), resume=run_id)
        assert done.version is not None
        assert done.version.version == 1
    finally:
        server.stop()


# ---- what no restart mends


@pytest.fixture(scope="module")
def wrong(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": 3}\n')
    other = tiny.save(folder / "other", seed=1)
    heard = train_here(small(f"base={other}", "train.steps=1"), folder / "run")
    return {
        "record": f"data={folder}/bad.jsonl",
        "target": "method.targets=[no_proj]",
        "base": "base=nobody/nothing-of-that-name",
        "parent": f"train.init_from={heard.latest}/delta/delta",
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "error", "says"),
    [
        ("record", DataError, r"bad\.jsonl:2"),
        ("target", MethodError, "no_proj"),
        ("base", BaseModelError, "nobody/nothing-of-that-name"),
        ("parent", WrongBaseError, "[0-9a-f]{64}.*[0-9a-f]{64}"),
    ],
)
def test_a_mistake_that_only_a_worker_sees_ends_the_run_at_once(
    what: str, error: type[MantaError], says: str, cluster: str, base: Path, wrong: dict[str, str], tmp_path: Path
) -> None:
    heard = Heard()
    with pytest.raises(error, match=says):
        train(long(base, tmp_path, wrong[what]), listen=heard)
    assert len(heard.of("started", "ranks")) == 1, "no restart"
    assert not list((tmp_path / "storage").glob("*/step-*"))
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    assert not client.search_model_versions()
    (run,) = client.search_runs([client.get_experiment_by_name("manta").experiment_id])
    assert run.info.status == "FAILED"


@pytest.mark.slow
def test_a_cluster_that_asks_for_a_token_is_told_apart(cluster: str, base: Path, tmp_path: Path) -> None:
    process = command("train", *settings(base, tmp_path), "--address", cluster, env={"RAY_AUTH_MODE": "disabled"})
    _, told = process.communicate(timeout=120)
    assert process.returncode == 13, told
    assert f"cannot join the Ray cluster at {cluster}" in told
    assert "RAY_AUTH_MODE=token" in told


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["base=./no-such-base"], 2, "no-such-base"),
        (["no-such-file.yaml"], 2, "no-such-file.yaml"),
        (["method.type=nonsense"], 2, "method.type"),
        (["--resume", "never-started"], 12, "never-started"),
        (["train.init_from=BROKEN"], 6, "adapter_model.safetensors"),
        (["tracking.uri=http://127.0.0.1:9"], 8, "cannot reach MLflow"),
    ],
)
def test_the_command_says_one_thing_and_its_exit_code_which(
    words: list[str], code: int, says: str, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    (broken / "adapter_model.safetensors").write_bytes(b"\x40\0\0\0\0\0\0\0{}")
    process = command(
        "train", *(w.replace("BROKEN", str(broken)) for w in words), env={"MANTA_HOME": str(tmp_path / "home")}
    )
    out, told = process.communicate(timeout=60)
    assert process.returncode == code, told
    assert told.startswith("error: ")
    assert says in told
    assert "Traceback" not in told + out
    assert not (tmp_path / "home" / "runs").exists(), "nothing was started"
