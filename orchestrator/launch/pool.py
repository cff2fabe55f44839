"""The packs of a search: Ray Train runs in threads of the driver, started when a lane has trials and no pack."""

import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
from ray.train import FailureConfig, ScalingConfig
from ray.train.torch import TorchConfig

from orchestrator.config import Run, Search
from orchestrator.launch.cluster import worker_env
from orchestrator.launch.pack_worker import pack_worker
from orchestrator.launch.sizing import Size, size_of
from orchestrator.launch.train import PATIENCE_S, Trainer, without_uri
from orchestrator.train.lane import pack_run

_log = logging.getLogger(__name__)

_LOOK_S = 0.5


@dataclass(frozen=True)
class Shape:
    """How many packs of which size a search has."""

    lanes: Mapping[str, bool]
    """Those of the space, and whether their trials train one by one."""
    slots: int
    count: int
    """Packs of each lane."""
    gpu: float
    """Of one worker: a whole one, a share where there are fewer than packs, 0 on CPUs."""
    tokens: int | None = None
    """Of a pass of one rank; None for the pack's own default."""

    @classmethod
    def of(cls, search: Search, lanes: Mapping[str, bool], *, gpu: bool) -> "Shape":
        """As the config says, or as the cluster offers."""
        workers = search.cluster.workers.min
        gpus = int(ray.cluster_resources().get("GPU", 0)) if gpu else 0
        count = max(1, gpus // workers) if search.packs.count == "auto" else search.packs.count
        # Ranks of one pack that shared a GPU could not talk to each other (NCCL): of several, each has a whole one.
        on_one = -(-count * len(lanes) // gpus) if gpus and workers == 1 else 1
        share = 1 / on_one if gpu else 0.0
        packed = not all(lanes.values())  # else every trial is alone on its base
        size = size_of(search, gpu=gpu, share=share) if packed else Size(1)
        slots = size.slots
        if search.budget.trials:  # few trials are spread over the packs
            slots = min(slots, -(-search.budget.trials // count))
        return cls(lanes, slots, count, share, size.tokens)

    def slots_of(self, lane: str) -> int:
        """Trials that a pack of the lane trains at once."""
        return 1 if self.lanes.get(lane) else self.slots

    @property
    def at_once(self) -> int:
        """Trials that Tune keeps at the desk: as many as there are slots, and a few for those that come free."""
        slots = sum(self.slots_of(lane) for lane in self.lanes) * self.count
        return slots + max(2, slots // 4)


class Pool:
    """Starts packs, and starts them again when a lane has trials anew.

    Attributes:
        error: why packs cannot go on at all; the search is parked then.
    """

    def __init__(self, search: Search, desk: Any, shape: Shape, storage: str, search_id: str) -> None:
        self._search, self._desk, self._shape = search, desk, shape
        self._storage, self._id = storage, search_id
        self._threads: dict[str, list[threading.Thread]] = {}
        self._made = 0
        self.error: Exception | None = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Keep packs up until the block ends; then let them end."""
        ended = threading.Event()
        keeper = threading.Thread(target=self._keep, args=(ended,), name="manta-pool", daemon=True)
        keeper.start()
        try:
            yield
        except BaseException as e:  # nobody decides any more, and trials are not to be trained to their ends first
            self._desk.park.remote(f"the search broke off: {type(e).__name__}")
            raise
        finally:
            ended.set()
            keeper.join()
            ray.get(self._desk.close.remote())
            for thread in [t for threads in self._threads.values() for t in threads]:
                thread.join()

    def _keep(self, ended: threading.Event) -> None:
        while not ended.wait(_LOOK_S):
            for lane, trials in ray.get(self._desk.load.remote()).items():
                alive = [t for t in self._threads.get(lane, []) if t.is_alive()]
                while self.error is None and len(alive) < min(self._shape.count, trials):
                    alive.append(self._start(lane))
                self._threads[lane] = alive

    def _start(self, lane: str) -> threading.Thread:
        pack = f"pack-{self._made:03d}"
        self._made += 1
        thread = threading.Thread(target=self._run, args=(pack, lane), name=pack, daemon=True)
        thread.start()
        return thread

    def _run(self, pack: str, lane: str) -> None:
        try:
            self._trainer(pack, lane).fit()
        except Exception as e:
            _log.warning("%s was lost", pack, exc_info=True)
            if not ray.get(self._desk.over.remote(lane)):
                self.error = e
                ray.get(self._desk.park.remote(f"{pack} was lost"))
        finally:
            ray.get(self._desk.gone.remote(pack))

    def _trainer(self, pack: str, lane: str) -> Trainer:
        cluster, gpu = self._search.cluster, self._shape.gpu > 0
        workers = cluster.workers
        run = Run.model_validate(ray.get(self._desk.sample.remote(lane)))
        share = {"GPU": self._shape.gpu} if gpu else {}
        return Trainer(
            pack_worker,
            train_loop_config={
                "pack": pack,
                "lane": lane,
                "slots": self._shape.slots_of(lane),
                "tokens": self._shape.tokens,
                "desk": self._desk,
                "store": f"{self._storage}/{self._id}/trials",
                "run": without_uri(pack_run(run).model_dump(mode="json")),
                "threads": 0 if gpu else max(1, int(cluster.cpus_per_worker)),
            },
            torch_config=TorchConfig(backend="nccl" if gpu else "gloo", timeout_s=PATIENCE_S),
            scaling_config=ScalingConfig(
                num_workers=workers.min if workers.min == workers.max else (workers.min, workers.max),
                use_gpu=gpu,
                resources_per_worker={"CPU": cluster.cpus_per_worker, **share},
            ),
            run_config=ray.train.RunConfig(
                name=pack,
                storage_path=f"{self._storage}/{self._id}/packs",
                failure_config=FailureConfig(max_failures=cluster.max_failures),
                worker_runtime_env={"env_vars": worker_env(gpu=gpu)},
            ),
        )
