"""The desk: where trials queue for a slot, packs take them, and what becomes of each is told. Pure; an actor holds it.

A trial's side offers a lease and withdraws it, a pack's side takes orders between steps and tells events, the driver
drains all events. What a lost pack held goes back to the front of the queue: another pack, or the same one started
anew, goes on from the trials' own checkpoints.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

ENDINGS = ("finished", "stopped early", "withdrawn", "failed")
"""Why a trial ended: by itself, by its own early stopping, because its search stopped it, or with a reason."""


@dataclass(frozen=True)
class Lease:
    """A trial that wants a slot."""

    trial: str
    """Its id; names its checkpoints."""
    lane: str
    """Packs take the trials of their own lane: those that can share one base."""
    run: dict[str, Any]
    """Its config, a ``Run`` as JSON."""


@dataclass(frozen=True)
class Orders:
    """What a pack is to do before its next step."""

    join: tuple[Lease, ...] = ()
    """Trials to take in, each from its own checkpoint if it has one."""
    leave: tuple[str, ...] = ()
    """Trials to let go, after a checkpoint."""
    close: bool = False
    """Nothing will come any more: end, once the last trial has."""


Event = tuple[str, str, dict[str, Any]]
"""Trial, kind and values. The kinds:

- ``joined``: ``step`` it goes on from, ``total`` steps, ``parameters`` trained (a head of its own not counted),
  ``memory`` in bytes that its tensors, gradients and moments take, ``latency`` in seconds that it adds to a forward
  pass of one short row;
- ``step``: ``step``, ``total``, ``loss``, ``grad_norm``, ``lr``, ``tokens`` so far, ``skipped_steps``,
  ``seconds_per_step`` (of all trials together);
- ``eval``: ``step``, the metrics, ``best_step``;
- ``saved``: ``step`` of the checkpoint;
- ``ended``: ``why`` (of ``ENDINGS``), ``reason`` of a failure, ``step``, ``metrics``, ``tokens``;
- ``left``: put back into the queue, not ended; ``step``, ``reason``;
- ``warning``: ``text``.

Of a pack itself the trial is empty: ``plan``, ``loaded``, ``warning``."""


@dataclass
class _Pack:
    lane: str
    held: dict[str, Lease] = field(default_factory=dict)
    capacity: int | None = None
    """Most slots, where memory has shown it."""
    tokens: int | None = None
    """Most tokens of a pass, where memory has shown it."""


class Desk:
    """See the module. No method waits."""

    def __init__(self) -> None:
        self._queues: dict[str, deque[Lease]] = {}
        self._samples: dict[str, dict[str, Any]] = {}
        self._packs: dict[str, _Pack] = {}
        self._leaving: set[str] = set()
        self._ended: set[str] = set()
        self._broken: dict[str, str] = {}
        self._events: list[Event] = []
        self._parking = False
        self._closed = False

    # -- a trial's side

    def offer(self, lease: Lease) -> None:
        """Queue for a slot; a trial that queues already, or is in a slot, stays where it is."""
        self._leaving.discard(lease.trial)
        if self._waits(lease.trial) or self._pack_of(lease.trial):
            return
        self._ended.discard(lease.trial)
        if reason := self._broken.get(lease.lane):
            self._end(lease.trial, {"why": "failed", "reason": reason})
            return
        self._samples.setdefault(lease.lane, lease.run)
        self._queues.setdefault(lease.lane, deque()).append(lease)

    def withdraw(self, trial: str) -> None:
        """The search has stopped the trial: its slot is wanted back."""
        if lease := self._waits(trial):
            self._queues[lease.lane].remove(lease)
            self._end(trial, {"why": "withdrawn"})
        elif self._pack_of(trial):
            self._leaving.add(trial)

    # -- a pack's side

    def hello(self, pack: str, lane: str) -> int | None:
        """A pack's workers have started: what its last ones held queues again, first. Returns its known capacity."""
        self._put_back(pack)
        before = self._packs.get(pack)
        self._packs[pack] = _Pack(lane)
        if before:
            self._packs[pack].capacity, self._packs[pack].tokens = before.capacity, before.tokens
        return self._packs[pack].capacity

    def limits(self, pack: str) -> tuple[int | None, int | None]:
        """Most slots, and most tokens of a pass, where its memory has shown them."""
        here = self._packs.get(pack)
        return (here.capacity, here.tokens) if here else (None, None)

    def gone(self, pack: str) -> None:
        """A pack will not come back."""
        self._put_back(pack)
        self._packs.pop(pack, None)

    def orders(self, pack: str, free: int) -> Orders:
        """What to do before the next step; at most as many trials to take in as slots are ``free`` or left.

        A pack without work is told to close where another lane waits and has no pack: it may lack the room for one.
        """
        here = self._packs[pack]
        queue = self._queues.setdefault(here.lane, deque())
        leave = tuple(t for t in here.held if t in self._leaving or self._parking)
        room = 0 if self._parking else free + len(leave)
        join = tuple(queue.popleft() for _ in range(min(room, len(queue))))
        here.held.update({lease.trial: lease for lease in join})
        return Orders(join, leave, self._closed or self._parking or (not here.held and self._starving()))

    def tell(self, pack: str, events: Sequence[tuple[str, str, Mapping[str, Any]]]) -> None:
        """What happened, in order."""
        here = self._packs[pack]
        for trial, kind, values in events:
            if kind == "ended" and self._parking and values["why"] in ("withdrawn", "failed"):
                kind, values = "left", {}  # to be gone on with, where what stopped the search may also have failed it
            if kind == "ended":
                here.held.pop(trial, None)
                self._end(trial, dict(values))
                continue
            if kind == "left" and (lease := here.held.pop(trial, None)):
                if trial in self._leaving and not self._parking:  # nobody wants it back
                    self._end(trial, {"why": "withdrawn"})
                    continue
                self._queues.setdefault(lease.lane, deque()).appendleft(lease)
            self._events.append((trial, kind, dict(values)))

    def shrink(self, pack: str, capacity: int, tokens: int | None = None) -> None:
        """A pack ran out of memory: no more than ``capacity`` slots, and ``tokens`` tokens of a pass, from now on.

        Also after a restart.
        """
        self._packs[pack].capacity, self._packs[pack].tokens = max(1, capacity), tokens

    # -- the driver's side

    def drain(self) -> list[Event]:
        """All events since the last call."""
        events, self._events = self._events, []
        return events

    def close(self) -> None:
        """Packs end, once their last trial has."""
        self._closed = True

    def park(self) -> None:
        """Packs let all trials go, after a checkpoint each, and end. The trials have not ended: they queue again."""
        self._parking = True

    def give_up(self, lane: str, reason: str) -> None:
        """No pack can take the trials of a lane: those that queue, and all that will, have failed."""
        self._broken[lane] = reason
        queue = self._queues.setdefault(lane, deque())
        while queue:
            self._end(queue.popleft().trial, {"why": "failed", "reason": reason})

    def waiting(self) -> dict[str, int]:
        """How many trials queue, by lane."""
        return {lane: len(queue) for lane, queue in self._queues.items() if queue}

    def leaving(self, trial: str) -> bool:
        """Whether a trial is withdrawn, and its pack has yet to let it go."""
        return trial in self._leaving

    def load(self) -> dict[str, int]:
        """Of lanes in which trials queue: how many queue there or are in a slot."""
        held = {lane: sum(len(p.held) for p in self._packs.values() if p.lane == lane) for lane in self._queues}
        return {lane: count + held[lane] for lane, count in self.waiting().items()}

    def sample(self, lane: str) -> dict[str, Any]:
        """The config of a trial of a lane, for what all of the lane have in common; it need not queue any more."""
        return self._samples[lane]

    def broken(self, lane: str) -> str | None:
        """Why no pack can take the trials of a lane, if none can."""
        return self._broken.get(lane)

    def _starving(self) -> bool:
        return bool(self.waiting().keys() - {pack.lane for pack in self._packs.values()})

    def _waits(self, trial: str) -> Lease | None:
        return next((lease for queue in self._queues.values() for lease in queue if lease.trial == trial), None)

    def _pack_of(self, trial: str) -> _Pack | None:
        return next((pack for pack in self._packs.values() if trial in pack.held), None)

    def _put_back(self, pack: str) -> None:
        if here := self._packs.get(pack):
            lost, here.held = here.held, {}
            for lease in reversed(lost.values()):
                if reason := self._broken.get(lease.lane):
                    self._end(lease.trial, {"why": "failed", "reason": reason})
                elif lease.trial in self._leaving:
                    self._end(lease.trial, {"why": "withdrawn"})
                else:
                    self._queues.setdefault(here.lane, deque()).appendleft(lease)
                    self._events.append((lease.trial, "left", {}))

    def _end(self, trial: str, values: dict[str, Any]) -> None:
        if trial not in self._ended:
            self._ended.add(trial)
            self._leaving.discard(trial)
            self._events.append((trial, "ended", values))
