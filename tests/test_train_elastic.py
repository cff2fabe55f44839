"""Elastic workers: a run starts with what the cluster has.

Ray counts the cores of the cluster's nodes, whoever else uses them; so the nodes have to be fewer, not the free cores.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.errors import ClusterError
from orchestrator.launch.train import train
from tests import tiny
from tests.launch_kit import Heard, local_ray, small


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[str]:
    with local_ray(cpus=1) as address:
        yield address


@pytest.mark.slow
def test_an_elastic_run_starts_with_the_workers_that_are_there(tmp_path: Path) -> None:
    heard = Heard()
    run = small(
        f"base={tiny.save(tmp_path / 'base')}",
        "cluster.workers={min: 1, max: 2}",
        f"cluster.storage={tmp_path}",
        "train.steps=3",
        f"tracking.uri=sqlite:///{tmp_path}/mlflow.db",
    )
    outcome = train(run, listen=heard)
    assert outcome.why == "finished"
    assert heard.of("started", "ranks") == [1]


@pytest.mark.slow
def test_fewer_than_the_least_are_refused_at_once(tmp_path: Path) -> None:
    run = small("cluster.workers={min: 2, max: 3}", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db")
    with pytest.raises(ClusterError, match="2 workers of 1 CPU need 2, the cluster has 1"):
        train(run)
