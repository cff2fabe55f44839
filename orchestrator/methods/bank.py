"""The bank: S slots, each one delta with its own method and size, around one frozen base.

S = 1 is ordinary fine-tuning, S > 1 in training a pack of trials, S > 1 in inference multi-tenant serving. The bank's
tensors are not part of the module tree: what shards the base never sees them.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.config import Method as Knobs
from orchestrator.errors import DeltaError, MethodError
from orchestrator.methods.method import Drop, Hook, Method, Params, Scope, mix
from orchestrator.methods.route import Group, Route
from orchestrator.methods.stack import Stack
from orchestrator.methods.table import METHODS


@dataclass
class _Slot:
    """What the bank knows of one slot."""

    knobs: Knobs
    method: Method
    seed: int
    sites: dict[str, Hook]


@dataclass
class _Site:
    """One method at one module: its stacks."""

    method: Method
    hook: Hook
    key: int
    stacks: dict[str, Stack] = field(default_factory=dict)

    @property
    def slots(self) -> list[int]:
        return next(iter(self.stacks.values())).order


_MOST_CACHED = 4096


class Bank:
    """See the module."""

    def __init__(self, model: nn.Module, *, device: torch.device | str = "cpu", base_id: str = "") -> None:
        self.scope = Scope.of(model, base_id)
        self.device = torch.device(device)
        self._model = model
        self._slots: dict[int, _Slot] = {}
        self._sites: dict[str, dict[str, _Site]] = {}
        self._handles: dict[tuple[str, Hook], Any] = {}
        self._numbers: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        self._route: Route | None = None

    @property
    def slots(self) -> tuple[int, ...]:
        """The slots in use."""
        return tuple(self._slots)

    def add(self, slot: int, knobs: Knobs, *, seed: int = 0, tensors: Mapping[str, Tensor] | None = None) -> None:
        """Fill a slot, at the method's start values or with a saved delta's tensors.

        Args:
            slot: any integer from 0.
            knobs: method and size.
            seed: of start values and dropout.
            tensors: ``<site>.<name>`` -> tensor, as ``tensors`` returns them.

        Raises:
            MethodError: a target matches nothing, or the slot is taken.
            DeltaError: ``tensors`` are not those of this method on this base.
        """
        if slot in self._slots or slot < 0:
            raise MethodError(f"slot {slot} is {'taken' if slot >= 0 else 'negative'}")
        method = METHODS[knobs.type]
        sites = method.sites(knobs, self.scope)
        values = self._start(method, knobs, sites, seed) if tensors is None else dict(tensors)
        self._check(method, knobs, sites, values)
        self._slots[slot] = _Slot(knobs, method, seed, sites)
        self._numbers.clear()
        try:
            for site, hook in sites.items():
                for name in method.shapes(knobs, site, self.scope):
                    self._stack(site, hook, knobs.type, name).put(slot, self._own(values[f"{site}.{name}"]))
        except BaseException:
            self.remove(slot)  # out of memory half-way: nothing of it stays
            raise

    def remove(self, slot: int) -> None:
        """Empty a slot."""
        gone = self._slots.pop(slot)
        for site in gone.sites:
            here = self._sites.get(site, {}).get(gone.knobs.type)
            if here is None:
                continue
            for stack in here.stacks.values():
                stack.drop(slot)
            if not here.slots:
                del self._sites[site][gone.knobs.type]
            if all(kept.hook != here.hook for kept in self._sites[site].values()):
                self._handles.pop((site, here.hook)).remove()
            if not self._sites[site]:
                del self._sites[site]
        self._numbers.clear()

    def resize(self, slot: int, knobs: Knobs) -> None:
        """Change a slot's size; its function stays, where the new size can hold it."""
        old = self._slots[slot]
        if knobs.type != old.knobs.type or old.method.sites(knobs, self.scope) != old.sites:
            raise MethodError("a slot keeps its method and targets when it is resized; remove it and add another")
        for site in old.sites:
            stacks = self._sites[site][knobs.type].stacks
            values = {name: stack.views[slot].detach() for name, stack in stacks.items()}
            made = old.method.resized(old.knobs, knobs, values, site, self.scope, _generator(old.seed, site))
            for name, stack in stacks.items():
                stack.put(slot, self._own(made[name]))
        self._slots[slot] = _Slot(knobs, old.method, old.seed, old.sites)
        self._numbers.clear()

    def detach(self) -> None:
        """Remove every slot; the model is as it was."""
        for slot in self.slots:
            self.remove(slot)

    def knobs(self, slot: int) -> Knobs:
        """A slot's method and size."""
        return self._slots[slot].knobs

    def sites(self, slot: int) -> list[str]:
        """Module names that a slot acts on."""
        return list(self._slots[slot].sites)

    def parameters(self, slot: int) -> dict[str, nn.Parameter]:
        """A slot's tensors, ``<site>.<name>``; the same objects for the slot's life, to hand to an optimizer."""
        kind = self._slots[slot].knobs.type
        return {
            f"{site}.{name}": stack.views[slot]
            for site in self._slots[slot].sites
            for name, stack in self._sites[site][kind].stacks.items()
        }

    def tensors(self, slot: int) -> dict[str, Tensor]:
        """Copies of a slot's tensors on the CPU."""
        return {name: p.detach().cpu().clone() for name, p in self.parameters(slot).items()}

    def leaves(self) -> dict[str, Tensor]:
        """The stacked tensors that gradients arrive in, in the same order on every rank."""
        return {
            f"{site}.{kind}.{name}": stack.leaf
            for site, kinds in self._sites.items()
            for kind, here in kinds.items()
            for name, stack in here.stacks.items()
            if stack.leaf is not None
        }

    def leaves_of(self, slot: int) -> dict[str, Tensor]:
        """The leaf that holds each of a slot's tensors, named as in ``parameters``."""
        kind = self._slots[slot].knobs.type
        return {
            f"{site}.{name}": stack.leaf
            for site in self._slots[slot].sites
            for name, stack in self._sites[site][kind].stacks.items()
            if stack.leaf is not None
        }

    def hand_out_gradients(self) -> None:
        """After backward (and the sum over ranks): each parameter gets its part of its leaf's gradient."""
        for stack in self._stacks():
            stack.hand_out()

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for stack in self._stacks():
            stack.zero_grad()

    @contextmanager
    def routed(
        self,
        slot_BT: Tensor,
        *,
        position_BT: Tensor | None = None,
        sample_BT: Tensor | None = None,
        steps: Mapping[int, int] | None = None,
    ) -> Iterator[None]:
        """Inside, each token passes its slot's delta. Recomputed activations need the backward pass inside, too.

        Args:
            slot_BT: slot of each token, -1 for the bare base. On the CPU, or it is copied there.
            position_BT: positions, for dropout and soft prompts.
            sample_BT: sample numbers, for dropout.
            steps: each slot's step count; given, dropout is on.
        """
        self._route = Route(slot_BT, position_BT, sample_BT, steps or {}, steps is not None, self.device)
        try:
            yield
        finally:
            self._route = None

    def _stacks(self) -> Iterator[Stack]:
        for kinds in self._sites.values():
            for here in kinds.values():
                yield from here.stacks.values()

    def _own(self, value: Tensor) -> Tensor:
        return value.detach().to(self.device, torch.float32)

    def _start(self, method: Method, knobs: Knobs, sites: Mapping[str, Hook], seed: int) -> dict[str, Tensor]:
        return {
            f"{site}.{name}": value
            for site in sites
            for name, value in method.start(knobs, site, self.scope, _generator(seed, site)).items()
        }

    def _check(self, method: Method, knobs: Knobs, sites: Mapping[str, Hook], values: Mapping[str, Tensor]) -> None:
        wanted = {f"{s}.{n}": shape for s in sites for n, shape in method.shapes(knobs, s, self.scope).items()}
        wrong = [f"{n} is missing" for n in wanted if n not in values]
        wrong += [f"{n} is not one of this method's on this base" for n in values if n not in wanted]
        wrong += [
            f"{n} has shape {list(values[n].shape)}, not {list(shape)}"
            for n, shape in wanted.items()
            if n in values and tuple(values[n].shape) != shape
        ]
        if wrong:
            more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
            raise DeltaError(f"the delta's tensors do not fit: {'; '.join(wrong[:3])}{more}")

    def _stack(self, site: str, hook: Hook, kind: str, name: str) -> Stack:
        if (site, hook) not in self._handles:
            self._handles[site, hook] = self._attach(site, hook)
        here = self._sites.setdefault(site, {}).setdefault(kind, _Site(METHODS[kind], hook, _hash(site)))
        return here.stacks.setdefault(name, Stack())

    def _attach(self, site: str, hook: Hook) -> Any:
        module = self._model.get_submodule(site)
        if hook == "input":
            return module.register_forward_pre_hook(lambda _, args: self._before(site, args))
        if hook in ("output", "sublayer", "embed"):
            return module.register_forward_hook(lambda _, args, out: self._after(site, hook, args, out))
        raise MethodError(f"the bank does not wire the hook {hook!r} yet")

    def _before(self, site: str, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        x = args[0]
        for here, group, p in self._active(site, "input"):
            x = x + group.put(here.method.input(group.pick(x), p), x)
        return (x, *args[1:])

    def _after(self, site: str, hook: Hook, args: tuple[Any, ...], out: Any) -> Any:
        y = out[0] if isinstance(out, tuple) else out
        base_y = y
        for here, group, p in self._active(site, hook):
            if hook == "output":
                seen = group.pick(base_y) if here.method.uses_base_output else None
                added = here.method.output(group.pick(args[0]), seen, p)
            elif hook == "sublayer":
                added = here.method.sublayer(group.pick(base_y), p)
            else:
                added = here.method.embed(group.pick(base_y), self._positions(group), p)
            y = y + group.put(added, y)
        return (y, *out[1:]) if isinstance(out, tuple) else y

    def _positions(self, group: Group) -> Tensor:
        assert self._route is not None
        assert self._route.position_BT is not None, "soft prompts need positions"
        return group.pick(self._route.position_BT.to(self.device).unsqueeze(-1)).squeeze(-1)

    def _active(self, site: str, hook: Hook) -> Iterator[tuple[_Site, Group, Params]]:
        """The methods at a site that have tokens in this pass, with those tokens and their tensors."""
        if self._route is None:
            return
        for kind, here in self._sites[site].items():
            group = self._route.group(here.slots) if here.hook == hook else None
            if group is not None:
                yield here, group, self._params(kind, here, group)

    def _params(self, kind: str, here: _Site, group: Group) -> Params:
        tensors = {}
        for name, stack in here.stacks.items():
            assert stack.leaf is not None
            rows = [stack.order.index(s) for s in group.slots]
            whole = rows == list(range(len(stack.order)))
            tensors[name] = stack.leaf if whole else stack.leaf.index_select(0, self._rows(rows))
        first = self._slots[group.slots[0]]
        numbers = {name: self._number(name, group.slots) for name in first.method.numbers(first.knobs)}
        return Params(tensors, numbers, self._drop(here, group))

    def _rows(self, rows: list[int]) -> Tensor:
        return self._cached("rows", tuple(rows), lambda: torch.tensor(rows, device=self.device))

    def _number(self, name: str, slots: tuple[int, ...]) -> Tensor:
        def make() -> Tensor:
            values = [self._slots[s].method.numbers(self._slots[s].knobs)[name] for s in slots]
            return torch.tensor(values, device=self.device)

        return self._cached(name, slots, make)

    def _cached(self, name: str, key: tuple[int, ...], make: Any) -> Tensor:
        if (name, key) not in self._numbers:
            if len(self._numbers) >= _MOST_CACHED:
                self._numbers.clear()  # a server meets ever new combinations of slots
            self._numbers[name, key] = make()
        return self._numbers[name, key]

    def _drop(self, here: _Site, group: Group) -> Drop | None:
        route = self._route
        assert route is not None
        rates = [self._slots[s].method.dropout(self._slots[s].knobs) for s in group.slots]
        if not route.training or not any(rates):
            return None
        assert route.sample_BT is not None
        seeds = [hash_ints(self._slots[s].seed, route.steps.get(s, 0), here.key) for s in group.slots]
        sample_GM = group.pick(route.sample_BT.to(self.device).unsqueeze(-1)).squeeze(-1)
        key_GM = mix(
            (sample_GM * (1 << 20) + self._positions(group)) ^ torch.tensor(seeds, device=self.device).unsqueeze(1)
        )
        return Drop(torch.tensor(rates, device=self.device), key_GM)


def hash_ints(*values: int) -> int:
    """A signed 63-bit key from integers."""
    return int.from_bytes(sha256(repr(values).encode()).digest()[:8], "little") >> 1


def _hash(text: str) -> int:
    return int.from_bytes(sha256(text.encode()).digest()[:8], "little") >> 1


def _generator(seed: int, site: str) -> torch.Generator:
    return torch.Generator().manual_seed(hash_ints(seed, _hash(site)))
