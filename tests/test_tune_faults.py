"""What goes wrong in a search, and what is left of it: killed drivers, packs, trial actors and nodes, a full disk."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from orchestrator.errors import CheckpointError
from orchestrator.launch.tune import tune
from orchestrator.search.study import Study, folder_of, read_lines
from tests.launch_kit import command, local_ray
from tests.test_train_faults import fill, tmpfs
from tests.tune_kit import alone, board, descendants, ended, search_id, searched, settings, until

pytestmark = pytest.mark.slow
LONG = ("budget=6", "packs.slots=3", "train.steps=24", "train.eval_every=6", "train.checkpoint_every=6")


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    with local_ray() as address:
        yield address


@pytest.fixture(scope="module")
def undisturbed(cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Study:
    return tune(searched(tmp_path_factory.mktemp("undisturbed"), *LONG)).study


class Once:
    """A listener that acts once, when something is true of the study."""

    def __init__(self, when: Callable[[Study], bool], act: Callable[[], None]) -> None:
        self._when, self._act = when, act
        self.acted = threading.Event()

    def __call__(self, study: Study) -> None:
        if not self.acted.is_set() and self._when(study):
            self.acted.set()
            self._act()


def half_way(study: Study) -> bool:
    """Something has ended, and something is between two checkpoints."""
    rows = study.rows.values()
    return any(r.state == "finished" for r in rows) and any(r.state == "running" and 7 <= r.step < 23 for r in rows)


def kill_one(word: str) -> None:
    victim = min(descendants(word), key=lambda p: p.pid)
    victim.send_signal(signal.SIGKILL)


def assert_same(study: Study, other: Study) -> None:
    """The same leaderboard; losses to the last bits that another company in a batch may change."""
    assert [b[:3] for b in board(study)] == [b[:3] for b in board(other)]
    for mine, theirs in zip(board(study), board(other), strict=True):
        assert mine[3] == pytest.approx(theirs[3], rel=1e-5)
        assert mine[4] == pytest.approx(theirs[4], rel=1e-5)


# ---- killed


def test_a_killed_pack_worker_costs_nothing_but_time(cluster: str, undisturbed: Study, tmp_path: Path) -> None:
    kill = Once(half_way, lambda: kill_one("RayTrainWorker"))
    outcome = tune(searched(tmp_path, *LONG), listen=kill)
    assert kill.acted.is_set()
    lines = list(read_lines(folder_of(outcome.search_id)))
    assert sum(line["kind"] == "pack" and line["values"]["what"] == "started" for line in lines) == 2
    went_on = [line["values"]["step"] for line in lines if line["kind"] == "joined" and line["values"]["step"]]
    assert went_on, "trials went on from their checkpoints"
    assert_same(outcome.study, undisturbed)


def test_a_killed_trial_actor_costs_nothing(cluster: str, undisturbed: Study, tmp_path: Path) -> None:
    kill = Once(half_way, lambda: kill_one("ResourceTrainable"))
    outcome = tune(searched(tmp_path, *LONG), listen=kill)
    assert kill.acted.is_set()
    joined = [line for line in read_lines(folder_of(outcome.search_id)) if line["kind"] == "joined"]
    assert len(joined) == 6, "no trial left its slot"
    assert_same(outcome.study, undisturbed)


def run_until(words: list[str], home: Path, number: signal.Signals) -> "subprocess.Popen[str]":
    """Start the command, and signal it half-way."""
    process = command("tune", *words, env={"MANTA_HOME": str(home)})
    try:
        until(lambda: list((home / "searches").glob("*/study.jsonl")))
        until(lambda: half_way(studied(home)))
    except BaseException:
        process.kill()
        raise
    process.send_signal(number)
    return process


def studied(home: Path) -> Study:
    os.environ["MANTA_HOME"], before = str(home), os.environ["MANTA_HOME"]
    try:
        return Study.load(search_id(home))
    finally:
        os.environ["MANTA_HOME"] = before


def test_a_killed_driver_is_gone_on_with(undisturbed: Study, tmp_path: Path) -> None:
    home = tmp_path / "home"
    process = run_until(settings(tmp_path, *LONG), home, signal.SIGKILL)
    ended(process)
    before = studied(home)
    assert before.over is None
    finished = {row.trial for row in before.rows.values() if row.state == "finished"}
    again = command("tune", "--resume", search_id(home), env={"MANTA_HOME": str(home)})
    told = ended(again)
    assert again.returncode == 0, told
    after = studied(home)
    assert_same(after, undisturbed)
    for row in after.rows.values():
        assert len(row.spans) == 1 or row.trial not in finished, "what had finished stayed so"
    assert f"best      {undisturbed.ranked()[0].trial}" in told


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_keeps_every_step(number: signal.Signals, undisturbed: Study, tmp_path: Path) -> None:
    home = tmp_path / "home"
    process = run_until(settings(tmp_path, *LONG), home, number)
    told = ended(process)
    assert process.returncode == 128 + number, told
    assert f"manta tune --resume {search_id(home)}" in told
    assert "Traceback" not in told
    reached = {row.trial: row.step for row in studied(home).rows.values()}
    again = command("tune", "--resume", search_id(home), env={"MANTA_HOME": str(home)})
    told = ended(again)
    assert again.returncode == 0, told
    assert_same(studied(home), undisturbed)
    os.environ["MANTA_HOME"], before = str(home), os.environ["MANTA_HOME"]
    lines = list(read_lines(folder_of(search_id(home))))
    os.environ["MANTA_HOME"] = before
    resumed = next(i for i, line in enumerate(lines) if line["kind"] == "resumed")
    later = [line for line in lines[resumed:] if line["kind"] == "step"]
    assert all(line["values"]["step"] > reached[line["trial"]] for line in later), "no step is done twice"


# ---- trials that fail, and a lane of their own


def test_a_trial_that_fails_ends_alone(cluster: str, tmp_path: Path) -> None:
    """One diverges, one has a target that this base lacks; the others do not notice."""
    methods = "methods=[{type: lora, train.lr: 0.001}, {type: lora, targets: [no_proj]}, bitfit]"
    wild = "{type: bottleneck, train.lr: 1.0e+38}"
    outcome = tune(searched(tmp_path, methods[:-1] + f", {wild}]", "budget=4", "train.steps=12", "train.clip=0"))
    rows = {row.params["method"]: row for row in outcome.study.rows.values()}
    assert rows["lora#2"].state == "failed"
    assert "no_proj" in rows["lora#2"].reason
    assert rows["bottleneck"].state == "failed"
    assert "not finite" in rows["bottleneck"].reason
    for name in ("lora", "bitfit"):
        heard = alone(rows[name], tmp_path / name)
        losses = dict(zip(heard.of("step", "step"), heard.of("step", "loss"), strict=True))
        assert rows[name].curves["loss"] == pytest.approx(losses, rel=1e-5)


def test_what_cannot_be_packed_trains_beside(cluster: str, tmp_path: Path) -> None:
    methods = "methods=[lora, {peft: {type: LOHA, r: 4, target_modules: [q_proj]}, train.lr: 0.001}]"
    outcome = tune(searched(tmp_path, methods, "budget=3", "base.quantize=none"))
    rows = list(outcome.study.rows.values())
    assert {row.state for row in rows} == {"finished"}
    assert len({row.lane for row in rows}) == 2
    for row in rows:
        heard = alone(row, tmp_path / row.trial)
        losses = dict(zip(heard.of("step", "step"), heard.of("step", "loss"), strict=True))
        assert row.curves["loss"] == pytest.approx(losses, rel=1e-5), row.method


def test_a_budget_of_tokens_ends_a_search_of_two_objectives(cluster: str, tmp_path: Path) -> None:
    budget = ("budget={trials: null, tokens: 6000}", "packs.slots=2", "sampler=tpe", "scheduler=asha")
    outcome = tune(searched(tmp_path, "objective=[eval_loss, parameters]", *budget))
    assert outcome.complete
    assert outcome.why == "budget.tokens: 6,000 are spent"
    assert outcome.study.tokens >= 6000
    assert {row.state for row in outcome.study.rows.values()} <= {"finished", "stopped"}
    front = outcome.study.front()
    assert len({row.parameters for row in front}) == len(front)
    assert outcome.winner is not None
    assert outcome.winner in front
    assert outcome.version is not None
    assert outcome.report.stat().st_size > 10_000


# ---- a full disk, a lost node


def test_a_full_disk_stops_the_search_and_loses_nothing(cluster: str, undisturbed: Study, tmp_path: Path) -> None:
    with tmpfs(tmp_path / "storage", "48m") as grow:
        full = Once(half_way, lambda: fill(tmp_path / "storage" / "ballast"))
        with pytest.raises(CheckpointError, match=r"(?i)no space left") as told:
            tune(searched(tmp_path, *LONG), listen=full)
        found = str(told.value).split("--resume ")[1].split()[0]
        assert not any(row.state == "failed" for row in Study.load(found).rows.values())
        (tmp_path / "storage" / "ballast").unlink()
        grow("160m")
        outcome = tune(searched(tmp_path), resume=found)
    assert_same(outcome.study, undisturbed)


CODE = """
import sys
from orchestrator.launch.tune import tune
from tests.tune_kit import searched
from pathlib import Path
outcome = tune(searched(Path(sys.argv[1]), *sys.argv[3:]), address=sys.argv[2])
print(outcome.search_id)
"""


def test_a_lost_node_costs_its_packs_place_and_no_trial(undisturbed: Study, tmp_path: Path) -> None:
    """A head without cores and two workers; the one that holds the pack is killed."""
    ray.shutdown()
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        workers = [nodes.add_node(num_cpus=1) for _ in range(2)]
        line = [sys.executable, "-W", "ignore", "-c", CODE, str(tmp_path), nodes.address, *LONG]
        home = tmp_path / "home"
        env = {**os.environ, "MANTA_HOME": str(home)}
        driver = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
        until(lambda: list((home / "searches").glob("*/study.jsonl")))
        until(lambda: half_way(studied(home)))
        (worker,) = descendants("RayTrainWorker")
        above = {p.pid for p in worker.parents()}
        (lost,) = [n for n in workers if any(p.pid in above for p in _processes(n))]
        nodes.remove_node(lost, allow_graceful=False)
        out, told = driver.communicate(timeout=400)
        assert driver.returncode == 0, told
        assert search_id(home) in out
        assert_same(studied(home), undisturbed)
    finally:
        nodes.shutdown()


def _processes(node: object) -> list[psutil.Process]:
    found = [info.process.pid for infos in node.all_processes.values() for info in infos]  # type: ignore[attr-defined]
    return [psutil.Process(pid) for pid in found if psutil.pid_exists(pid)]
