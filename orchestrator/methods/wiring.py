"""From a forward pass of the frozen base to the hooks of the methods: who is called where, with which tokens.

Shapes: B rows, T tokens, G slots with tokens, M tokens of each, O features, P prefix length, D size of a head.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.base.attention import Prefix, set_prefix
from orchestrator.config import Knobs
from orchestrator.methods.drop import Drop, mix
from orchestrator.methods.method import Hook, Method, Params
from orchestrator.methods.route import Group, Route
from orchestrator.methods.scope import Scope
from orchestrator.methods.stack import Stack

_MOST_CACHED = 4096


@dataclass
class Site:
    """One method at one module: the stacks of all slots that use it there."""

    name: str
    """The module's name."""
    method: Method
    hook: Hook
    stacks: dict[str, Stack] = field(default_factory=dict)
    constants: dict[str, Stack] = field(default_factory=dict)
    borrowed: bool = False
    """Whether the stacks are another site's (a tied head)."""
    knobs: dict[int, Knobs] = field(default_factory=dict)
    """Of each slot here, in the order of the stacks' rows."""
    seeds: dict[int, int] = field(default_factory=dict)

    @property
    def key(self) -> int:
        """A number that tells sites apart."""
        return hash_text(self.name)


class Wiring:
    """Hooks on the base, and what they do in a routed pass."""

    def __init__(self, model: nn.Module, scope: Scope, device: torch.device) -> None:
        self.model, self.scope, self.device = model, scope, device
        self.sites: dict[str, dict[str, Site]] = {}
        """Module name -> method and hook -> what is there."""
        self.route: Route | None = None
        self._handles: dict[tuple[str, Hook], list[Any]] = {}
        self._block_input: dict[str, Tensor] = {}
        self._cache: dict[tuple[Any, ...], Tensor] = {}

    def attach(self, site: str, hook: Hook) -> None:
        """Put the hook on the module, if it is not there."""
        if (site, hook) not in self._handles:
            self._handles[site, hook] = self._register(site, hook)

    def changed(self, site: str) -> None:
        """Slots have come or gone: take off hooks that nobody needs, forget what depended on who was there."""
        self._cache.clear()
        needed = {here.hook for here in self.sites.get(site, {}).values()}
        for name, hook in [key for key in self._handles if key[0] == site and key[1] not in needed]:
            for handle in self._handles.pop((name, hook)):
                handle.remove()
        if not self.sites.get(site, True):
            del self.sites[site]

    def params(self, here: Site, group: Group, route: Route) -> Params:
        """A site's tensors of the slots in a group."""
        slots = list(here.knobs)
        rows = tuple(slots.index(s) for s in group.slots)
        whole = rows == tuple(range(len(slots)))
        tensors = {}
        for name, stack in (*here.stacks.items(), *here.constants.items()):
            assert stack.leaf is not None
            tensors[name] = stack.leaf if whole else stack.leaf.index_select(0, self._rows(rows))
        first = here.knobs[group.slots[0]]
        numbers = {name: self._number(here, name, group.slots) for name in here.method.numbers(first, here.name)}
        return Params(tensors, numbers, self.module(here.name), self._drop(here, group, route))

    def module(self, site: str) -> nn.Module:
        """The frozen module at a site; a head of a slot's own stands on none."""
        return self.model.get_submodule(site) if site in self.scope.modules else self.model

    def active(self, site: str, hook: Hook) -> Iterator[tuple[Site, Group, Params]]:
        """The methods at a site that have tokens in this pass, with those tokens and their tensors."""
        if self.route is None:
            return
        for here in self.sites[site].values():
            group = self.route.group(list(here.knobs)) if here.hook == hook else None
            if group is not None:
                yield here, group, self.params(here, group, self.route)

    # -- hooks --------------------------------------------------------------------------------------------------------

    def _register(self, site: str, hook: Hook) -> list[Any]:
        if hook == "head":
            return []  # nothing of the base is there; ``Bank.classify`` asks for it
        module = self.model.get_submodule(site)
        if hook == "input":
            return [module.register_forward_pre_hook(lambda _, args: self._before(site, args))]
        if hook == "key_value":
            return [
                module.register_forward_pre_hook(lambda attention, _: self._put_prefix(site, attention)),
                module.register_forward_hook(lambda attention, *_: set_prefix(attention, None), always_call=True),
            ]
        handles = [module.register_forward_hook(lambda _, args, out: self._after(site, hook, args, out))]
        if hook == "sublayer":
            first = self.model.get_submodule(self.scope.sublayers[site].first)
            handles.append(first.register_forward_pre_hook(lambda _, args: self._keep(site, args)))
        return handles

    def _before(self, site: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        for here, group, p in self.active(site, "input"):
            x = x + group.put(here.method.input(group.pick(args[0]), p), x)
        return (x, *args[1:])

    def _keep(self, site: str, args: tuple[Any, ...]) -> None:
        if self.route is not None:
            self._block_input[site] = args[0]

    def _after(self, site: str, hook: Hook, args: tuple[Any, ...], out: Any) -> Any:
        base_y = out[0] if isinstance(out, tuple) else out
        y = base_y
        block_input = self._block_input.pop(site, base_y)
        for here, group, p in self.active(site, hook):
            if hook == "output":
                seen = group.pick(base_y) if here.method.uses_base_output else None
                added = here.method.output(group.pick(args[0]), seen, p)
            elif hook == "sublayer":
                added = here.method.sublayer(group.pick(block_input), group.pick(base_y), p)
            else:
                added = here.method.embed(group.pick(base_y), self._positions(group), p)
            y = y + group.put(added, y)
        return (y, *out[1:]) if isinstance(out, tuple) else y

    def _put_prefix(self, site: str, attention: nn.Module) -> None:
        set_prefix(attention, None)
        for here, group, p in self.active(site, "key_value"):
            assert self.route is not None
            key_GHPD, value_GHPD, length_G = here.method.key_value(p)
            index_B, has_B = self._row_groups(group.slots, self.route)
            seen_GP = torch.arange(key_GHPD.shape[2], device=self.device) < length_G.unsqueeze(1)
            seen_BP = seen_GP[index_B] & has_B.unsqueeze(1)
            set_prefix(attention, Prefix(key_GHPD[index_B], value_GHPD[index_B], seen_BP))

    def _row_groups(self, slots: tuple[int, ...], route: Route) -> tuple[Tensor, Tensor]:
        """For each row [B] the place of its slot among ``slots``, and whether it is there. A row is of one slot."""
        place = {slot: i for i, slot in enumerate(slots)}
        of_row = route.slot_BT[:, 0].tolist()
        index = torch.tensor([place.get(s, 0) for s in of_row], device=self.device)
        return index, torch.tensor([s in place for s in of_row], device=self.device)

    def _positions(self, group: Group) -> Tensor:
        assert self.route is not None
        assert self.route.position_BT is not None, "virtual tokens and dropout need positions"
        return group.pick(self.route.position_BT.to(self.device)).squeeze(-1)

    # -- numbers and dropout ------------------------------------------------------------------------------------------

    def _rows(self, rows: tuple[int, ...]) -> Tensor:
        return self._cached(("rows", rows), lambda: torch.tensor(rows, device=self.device))

    def _number(self, here: Site, name: str, slots: tuple[int, ...]) -> Tensor:
        def make() -> Tensor:
            values = [here.method.numbers(here.knobs[s], here.name)[name] for s in slots]
            return torch.tensor(values, dtype=torch.float32, device=self.device)

        return self._cached((here.name, here.method.name, name, slots), make)

    def _cached(self, key: tuple[Any, ...], make: Callable[[], Tensor]) -> Tensor:
        if key not in self._cache:
            if len(self._cache) >= _MOST_CACHED:
                self._cache.clear()  # a server meets ever new combinations of slots
            self._cache[key] = make()
        return self._cache[key]

    def _drop(self, here: Site, group: Group, route: Route) -> Drop | None:
        rates = [here.method.dropout(here.knobs[s]) for s in group.slots]
        if not route.training or not any(rates):
            return None
        assert route.sample_BT is not None
        seeds = [hash_ints(here.seeds[s], route.steps.get(s, 0), here.key) for s in group.slots]
        sample_GM = group.pick(route.sample_BT.to(self.device)).squeeze(-1)
        key_GM = mix(
            (sample_GM * (1 << 20) + self._positions(group)) ^ torch.tensor(seeds, device=self.device).unsqueeze(1)
        )
        return Drop(torch.tensor(rates, device=self.device), key_GM)


def hash_ints(*values: int) -> int:
    """A 63-bit key from integers."""
    return int.from_bytes(sha256(repr(values).encode()).digest()[:8], "little") >> 1


def hash_text(text: str) -> int:
    """A 63-bit key from a text."""
    return int.from_bytes(sha256(text.encode()).digest()[:8], "little") >> 1
