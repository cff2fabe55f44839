"""The desk as an actor on the driver's node: trials wait here for evaluations, packs for orders."""

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ray

from orchestrator.config.search import Search
from orchestrator.errors import MantaError
from orchestrator.search.space import trial_run
from orchestrator.search.study import Row, Study
from orchestrator.train.desk import Desk, Event, Lease, Orders
from orchestrator.train.lane import lane_of

_IDLE_S = 2.0
"""A pack without work is answered after as long at the latest."""


class DeskActor:
    """``Desk`` with a memory of what was said, and with waiting. One event loop, so no two calls run at once."""

    def __init__(self, search: dict[str, Any]) -> None:
        self._search = Search.model_validate(search)
        self._study = Study(self._search)
        self._desk = Desk()
        self._stopped: str | None = None
        self._fatal: tuple[str, str] | None = None
        self._said: list[Event] = []
        self._news = asyncio.Event()

    def recall(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """An earlier driver's ledger: what has ended stays ended, the rest goes on once it is offered again."""
        for line in lines:
            self._study.hear(line["trial"], line["kind"], line["values"], line["at"])

    # -- a trial's side

    def offer(self, trial: str, number: int, params: dict[str, Any]) -> None:
        """A trial wants a slot. One that is known goes on where it is: in a slot, in the queue, or at its end."""
        row = self._study.rows.get(trial)
        if row and row.why:
            return
        if row is None or not row.run:
            run, where, reason = self._run(params, trial)
            queued = {"number": number, "params": params, "lane": where, "run": run}
            self._hear([(trial, "queued", queued)])
            if reason:
                self._hear([(trial, "ended", {"why": "failed", "reason": reason})])
                return
            row = self._study.rows[trial]
        self._desk.offer(Lease(trial, row.lane, row.run))
        self._take()

    def _run(self, params: dict[str, Any], trial: str) -> tuple[dict[str, Any], str, str]:
        """Config and lane of a point; with a reason, if it is an impossible one."""
        try:
            run = trial_run(self._search, params, trial)
            return run.model_dump(mode="json"), lane_of(run), ""
        except MantaError as e:
            return {}, "", str(e)

    async def result(self, trial: str, seen: int) -> dict[str, Any]:
        """What a trial was worth at the evaluation after the ``seen``-th, once it is there; or its end: ``done``."""
        while True:
            row = self._study.rows[trial]
            if found := self._study.after(row, seen + 1):
                return {**found, "evaluation": seen + 1, "done": False}
            if row.why or self._stopped:
                return {**self._study.worth(row), "evaluation": seen, "done": True}
            await self._something()

    def withdraw(self, trial: str) -> None:
        """The search has stopped the trial; nothing, where it has ended by itself, or all are being stopped."""
        if self._stopped:
            return
        self._desk.withdraw(trial)
        self._take()

    # -- a pack's side

    def hello(self, pack: str, where: str) -> None:
        """A pack's workers have started."""
        self._desk.hello(pack, where)
        self._take()
        self._hear([("", "pack", {"pack": pack, "lane": where, "what": "started"})])

    def gone(self, pack: str) -> None:
        """A pack has ended, or is lost for good."""
        self._desk.gone(pack)
        self._take()

    async def orders(self, pack: str, free: int, *, busy: bool) -> Orders:
        """What to do before the next step; a pack that is not busy waits a moment for something to do."""
        until = asyncio.get_running_loop().time() + _IDLE_S
        while True:
            orders = self._desk.orders(pack, free)
            left = until - asyncio.get_running_loop().time()
            if busy or orders != Orders() or left <= 0:
                return orders
            await self._something(left)

    def tell(self, pack: str, events: Sequence[Event]) -> None:
        """What happened in a pack, in order."""
        self._desk.tell(pack, [(t, k, {**v, "pack": pack} if k == "joined" else v) for t, k, v in events])
        self._take()

    def limits(self, pack: str) -> tuple[int | None, int | None]:
        """Most slots, and most tokens of a pass, of a pack whose memory has shown them."""
        return self._desk.limits(pack)

    def shrink(self, pack: str, capacity: int, tokens: int) -> None:
        """A pack ran out of memory."""
        self._desk.shrink(pack, capacity, tokens)
        self._hear([("", "pack", {"pack": pack, "what": "shrunk", "capacity": capacity, "tokens": tokens})])

    def fail(self, kind: str, message: str) -> None:
        """An error that no restart mends and that no trial alone is to blame for; the first one counts."""
        self._fatal = self._fatal or (kind, message)
        self.park(message)

    def fatal(self) -> tuple[str, str] | None:
        """That error: class name and message."""
        return self._fatal

    def give_up(self, where: str, reason: str) -> None:
        """No pack can take the trials of a lane."""
        self._desk.give_up(where, reason)
        self._hear([("", "pack", {"lane": where, "what": "given up", "reason": reason})])

    # -- the driver's side

    def drain(self) -> list[Event]:
        """All events since the last call, in order."""
        said, self._said = self._said, []
        return said

    def load(self) -> dict[str, int]:
        """Of lanes in which trials queue: how many queue there or are in a slot."""
        return self._desk.load()

    def sample(self, where: str) -> dict[str, Any]:
        """The config of a trial that queues in a lane."""
        return self._desk.sample(where)

    def over(self, where: str) -> str | None:
        """Why a lane needs no pack any more, if it does not."""
        return self._desk.broken(where) or (self._fatal[1] if self._fatal else None)

    def rows(self) -> list[Row]:
        """All trials."""
        return list(self._study.rows.values())

    def open(self) -> list[str]:
        """Trials that are neither at their end nor on their way out."""
        return [row.trial for row in self._study.rows.values() if not row.why and not self._desk.leaving(row.trial)]

    def park(self, reason: str) -> None:
        """Stop: packs write checkpoints and end, trials do not wait any more. A later driver goes on."""
        self._stopped = self._stopped or reason
        self._desk.park()
        self._take()

    def finish(self, reason: str) -> None:
        """The budget is spent: what still trains or queues is withdrawn."""
        self._stopped = self._stopped or reason
        for row in self._study.rows.values():
            if not row.why:
                self._desk.withdraw(row.trial)
        self._take()

    def stopped(self) -> str | None:
        """Why the search is over before its last trial, if it is."""
        return self._stopped

    def close(self) -> None:
        """Packs end, once their last trial has."""
        self._desk.close()
        self._wake()

    # -- waiting

    def _take(self) -> None:
        self._hear(self._desk.drain())

    def _hear(self, events: Sequence[Event]) -> None:
        for trial, kind, values in events:
            self._study.hear(trial, kind, values, time.time())
        self._said.extend(events)
        self._wake()

    def _wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    async def _something(self, timeout_s: float | None = None) -> None:
        try:
            await asyncio.wait_for(self._news.wait(), timeout_s)
        except TimeoutError:
            return


def open_desk(search: Search) -> Any:
    """A new desk on the driver's own node. Many trials wait in it at once, so it takes many calls."""
    here = ray.get_runtime_context().get_node_id()
    pinned = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(here, soft=True)
    options = ray.remote(DeskActor).options(num_cpus=0, scheduling_strategy=pinned, max_concurrency=10_000)
    return options.remote(search.model_dump(mode="json", exclude={"tracking": {"uri"}}))
