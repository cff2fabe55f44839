"""A search on Ray, from its file to the winner in the registry; each trial against its run alone."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from mlflow.entities import Run as MlflowRun
from mlflow.tracking import MlflowClient

from orchestrator.errors import ClusterError, ConfigError, TrainError
from orchestrator.launch.tune import SearchOutcome, tune
from orchestrator.search.study import Study, read_record
from tests.launch_kit import ROOT, assert_same_bits, command, local_ray, small, weights
from tests.tune_kit import alone, board, descendants, searched


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    with local_ray() as address:
        yield address


@dataclass
class Done:
    outcome: SearchOutcome
    folder: Path
    torch_in: dict[str, set[bool]] = field(default_factory=dict)

    def runs(self) -> tuple[MlflowRun, dict[str, MlflowRun]]:
        """The parent run, and its children by trial."""
        client = MlflowClient(f"sqlite:///{self.folder}/mlflow.db")
        experiment = client.get_experiment_by_name("manta")
        found = client.search_runs([experiment.experiment_id])
        (parent,) = [r for r in found if "mlflow.parentRunId" not in r.data.tags]
        children = [r for r in found if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
        return parent, {r.data.tags["manta.trial"]: r for r in children}


def maps_torch(process: psutil.Process) -> bool:
    return any("libtorch" in m.path for m in process.memory_maps())


@pytest.fixture(scope="module")
def done(cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder = tmp_path_factory.mktemp("search")
    looked: dict[str, set[bool]] = {}

    def look(study: Study) -> None:
        if any(row.state == "running" for row in study.rows.values()):
            for name in ("ResourceTrainable", "RayTrainWorker"):
                looked.setdefault(name, set()).update(maps_torch(p) for p in descendants(name))

    return Done(tune(searched(folder), listen=look), folder, looked)


def test_every_trial_has_a_row(done: Done) -> None:
    rows = done.outcome.study.rows
    assert sorted(rows) == [f"trial-{n:05d}" for n in range(4)]
    assert [row.state for row in rows.values()] == ["finished"] * 4
    assert {row.method for row in rows.values()} == {"lora", "bottleneck", "bitfit"}
    assert all(row.tokens > 0 and row.parameters and row.memory for row in rows.values())
    assert len({span.pack for row in rows.values() for span in row.spans}) == 1, "they shared a base"
    assert board(Study.load(done.outcome.search_id)) == board(done.outcome.study), "as the ledger tells it"
    assert read_record(done.outcome.search_id).storage == f"{done.folder}/storage"


def test_each_trial_trains_as_it_would_alone(done: Done, tmp_path: Path) -> None:
    for row in done.outcome.study.rows.values():
        heard = alone(row, tmp_path / row.trial)
        losses = dict(zip(heard.of("step", "step"), heard.of("step", "loss"), strict=True))
        assert row.curves["loss"] == pytest.approx(losses, rel=1e-5), row.params
        evaluated = dict(zip(heard.of("eval", "step"), heard.of("eval", "eval_loss"), strict=True))
        assert row.curves["eval_loss"] == pytest.approx(evaluated, rel=1e-5), row.params


def test_the_best_trial_is_registered(done: Done) -> None:
    values = {row.trial: min(row.curves["eval_loss"].values()) for row in done.outcome.study.rows.values()}
    best = min(values, key=values.__getitem__)
    assert done.outcome.winner is not None
    assert done.outcome.winner.trial == best
    version = MlflowClient(f"sqlite:///{done.folder}/mlflow.db").get_model_version_by_alias("tried", "candidate")
    assert version.tags["manta.search"] == done.outcome.search_id
    assert version.tags["manta.trial"] == best
    assert version.tags["manta.trials"] == "4"
    assert version.run_id == done.runs()[1][best].info.run_id
    assert done.outcome.delta is not None
    kept = next((done.folder / "storage" / done.outcome.search_id / "trials" / best).glob("step-*"))
    part = "best" if (kept / best / "best").is_dir() else "delta"
    assert_same_bits(weights(done.outcome.delta), weights(kept / best / part))


def test_mlflow_holds_a_parent_and_a_child_per_trial(done: Done) -> None:
    parent, children = done.runs()
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["manta.search"] == done.outcome.search_id
    assert set(children) == set(done.outcome.study.rows)
    client = MlflowClient(f"sqlite:///{done.folder}/mlflow.db")
    for trial, run in children.items():
        row = done.outcome.study.rows[trial]
        assert run.info.status == "FINISHED"
        assert run.data.params["method.type"] == row.method
        history = {m.step: m.value for m in client.get_metric_history(run.info.run_id, "loss") if m.step}
        assert history == pytest.approx(row.curves["loss"])


def test_trial_actors_hold_no_torch(done: Done) -> None:
    assert done.torch_in == {"ResourceTrainable": {False}, "RayTrainWorker": {True}}


# ---- what is refused


def test_resume_changes_where_it_runs_and_nothing_else(done: Done) -> None:
    with pytest.raises(ConfigError, match=r"train\.lr=1"):
        tune(done.outcome.study.search, resume=done.outcome.search_id, overrides=["train.lr=1"])


def test_a_search_whose_trials_all_fail_says_why(cluster: str, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="no_proj"):
        tune(searched(tmp_path, "methods=[{type: lora, targets: [no_proj]}]", "budget=2"))


@pytest.mark.parametrize(
    ("job", "words", "says"),
    [
        ("train", ["method.rnk=3"], "method.rnk"),
        ("tune", ["methods=[lorra]"], "lorra"),
        ("tune", ["jobs/runs/search.yaml", "budget.trials=0"], "budget.trials"),
        ("tune", ["objective=accuracy"], "accuracy"),
        ("tune", ["--resume", "never-begun"], "never-begun"),
    ],
)
def test_a_job_with_a_mistake_says_so_at_once(job: str, words: list[str], says: str) -> None:
    line = [sys.executable, "-W", "ignore", f"jobs/{job}.py", *words]
    told = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert told.returncode in (2, 12), told.stderr
    assert told.stderr.startswith("error: ")
    assert says in told.stderr
    assert "Traceback" not in told.stderr


def test_a_dry_run_shows_the_space_and_starts_nothing(tmp_path: Path) -> None:
    process = command("tune", "jobs/runs/search.yaml", "--dry-run", env={"MANTA_HOME": str(tmp_path)})
    shown, told = process.communicate(timeout=60)
    assert process.returncode == 0, told
    assert "bottleneck.size" in shown
    assert "24 trials" in shown
    assert list(tmp_path.iterdir()) == []


def test_a_run_inside_a_trial_without_a_dashboard_is_refused(cluster: str, tmp_path: Path) -> None:
    """It would train, and once its trial is stopped keep its workers for good."""
    from ray import tune as ray_tune

    from orchestrator.launch.train import train

    run = small(f"cluster.storage={tmp_path}", "train.steps=1", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db")

    def trial(_: dict[str, float]) -> None:
        try:
            train(run)
        except ClusterError as e:
            ray_tune.report({"said": str(e)})

    tuner = ray_tune.Tuner(trial, run_config=ray_tune.RunConfig(storage_path=str(tmp_path / "tune"), verbose=0))
    (result,) = tuner.fit()
    assert "needs Ray's dashboard" in result.metrics["said"]
    assert "manta tune" in result.metrics["said"]
