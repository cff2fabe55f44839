"""What Ray Train calls on each rank of a pack."""

from typing import Any

import ray
import ray.train

from orchestrator.config import Run
from orchestrator.errors import MantaError, OutOfMemoryError
from orchestrator.launch.pack_reporter import RayPackReporter
from orchestrator.launch.trial_store import TrialStore


def pack_worker(config: dict[str, Any]) -> None:
    """One rank. An error that no restart mends goes to the desk: the trials of this lane have failed by it."""
    desk, lane = config["desk"], config["lane"]
    if ray.get(desk.over.remote(lane)):
        return
    try:
        _work(config)
    except OutOfMemoryError:
        raise  # the desk knows of less room by now, or the restart says the same again
    except MantaError as e:
        ray.get(desk.give_up.remote(lane, str(e)))
        raise


def _work(config: dict[str, Any]) -> None:
    from orchestrator.launch.place import place_of  # torch, late
    from orchestrator.train.pack import Limits, pack

    place = place_of(config["threads"])
    desk, name = config["desk"], config["pack"]
    if place.rank == 0:
        ray.get(desk.hello.remote(name, config["lane"]))
    slots, tokens = ray.get(desk.limits.remote(name))  # where memory has shown them
    tokens = tokens or config["tokens"]
    limits = Limits(slots=slots or config["slots"], **({"tokens": tokens} if tokens else {}))
    reporter = RayPackReporter(desk, name, TrialStore(config["store"]))
    pack(Run.model_validate(config["run"]), place, reporter, limits)
    reporter.flush()
