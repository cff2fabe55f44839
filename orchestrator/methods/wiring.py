"""From a forward pass of the frozen base to the hooks of the methods: who is called where, with which tokens.

Shapes: B rows, T tokens, G slots with tokens, M tokens of each, O features, P prefix length, D size of a head.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.base.attention import Prefix, forget_prefix, set_prefix
from orchestrator.base.linear import NF4Linear
from orchestrator.base.low_rank import LowRank
from orchestrator.config import Knobs
from orchestrator.errors import MethodError
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

    def __init__(self, model: nn.Module, scope: Scope, device: torch.device, fuse: bool) -> None:
        self.model, self.scope, self.device, self.fuse = model, scope, device, fuse
        self.sites: dict[str, dict[str, Site]] = {}
        """Module name -> method and hook -> what is there."""
        self.route: Route | None = None
        self.version = 0
        """Another number whenever tensors that a pass reads may have moved."""
        self._handles: dict[tuple[str, Hook], list[Any]] = {}
        self._block_input: dict[str, Tensor] = {}
        self._added: set[str] = set()
        """Linears whose change is in their weight, in the call that is under way."""
        self._cache: dict[tuple[Any, ...], Tensor] = {}

    def attach(self, site: str, hook: Hook) -> None:
        """Put the hook on the module, if it is not there."""
        if (site, hook) not in self._handles:
            self._handles[site, hook] = self._register(site, hook)

    def changed(self, site: str) -> None:
        """Slots have come or gone: take off hooks that nobody needs, forget what depended on who was there."""
        self._cache.clear()
        self.version += 1
        needed = {here.hook for here in self.sites.get(site, {}).values()}
        for name, hook in [key for key in self._handles if key[0] == site and key[1] not in needed]:
            for handle in self._handles.pop((name, hook)):
                handle.remove()
        if not self.sites.get(site, True):
            del self.sites[site]

    def held(self) -> list[Tensor]:
        """See ``Bank.held``."""
        kinds = (here for kinds in self.sites.values() for here in kinds.values() if not here.borrowed)
        stacks = (stack for here in kinds for stack in (*here.stacks.values(), *here.constants.values()))
        return [stack.leaf for stack in stacks if stack.leaf is not None]

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

    def present(self, site: str, hook: Hook, x: Tensor | None = None) -> Iterator[tuple[Site, Group, Route]]:
        """The methods at a site that have tokens in this pass, with those tokens.

        Raises:
            MethodError: ``x`` is not the pass's tokens but what all rows share, and these are of several slots.
        """
        route = self.route
        if route is None:
            return
        if x is not None and site in self.scope.shared_inputs and not route.holds(x):
            route = route.for_shared(x.shape[:-1])
        for here in self.sites[site].values():
            group = route.group(list(here.knobs)) if here.hook == hook else None
            if group is not None:
                yield here, group, route

    def active(self, site: str, hook: Hook, x: Tensor | None = None) -> Iterator[tuple[Site, Group, Params]]:
        """The same, with their tensors."""
        for here, group, route in self.present(site, hook, x):
            yield here, group, self.params(here, group, route)

    def classify(self, h_PH: Tensor, slot_P: Tensor, sample_P: Tensor | None) -> Tensor:
        """See ``Bank.classify``."""
        logits_PC, around = None, self.route
        route = Route(slot_P.view(1, -1), device=self.device)
        if around is not None and sample_P is not None:
            route.position_BT, route.sample_BT = torch.zeros_like(slot_P.view(1, -1)), sample_P.view(1, -1)
            route.steps, route.training = around.steps, around.training
        for here in (site for kinds in self.sites.values() for site in kinds.values() if site.hook == "head"):
            group = route.group(list(here.knobs))
            if group is None:
                continue
            made_GMC = here.method.head(group.pick(h_PH.unsqueeze(0)), self.params(here, group, route))
            like = h_PH.new_empty(1, len(h_PH), made_GMC.shape[-1])
            put_PC = group.put(made_GMC, like).squeeze(0)
            logits_PC = put_PC if logits_PC is None else logits_PC + put_PC
        if logits_PC is None:
            raise MethodError("none of these slots has a head of its own")
        return logits_PC

    def key_value(self, site: str, method: str, slot: int) -> tuple[Tensor, Tensor]:
        """Keys and values [heads, P, D] of a slot at an attention module, without gradient."""
        here, route = self.sites[site][method], Route(torch.tensor([[slot]]), device=self.device)
        group = route.group(list(here.knobs))
        assert group is not None
        key_GHPD, value_GHPD, _ = here.method.key_value(self.params(here, group, route))
        return key_GHPD[0].detach(), value_GHPD[0].detach()

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
                module.register_forward_hook(lambda attention, *_: self._see_prefix_used(site, attention)),
            ]
        if hook == "output" and self.fuse and isinstance(module, NF4Linear):
            return [
                module.register_forward_pre_hook(lambda linear, args: self._add_into(site, linear, args[0])),
                module.register_forward_hook(
                    lambda _, args, out: None if site in self._added else self._after(site, hook, args, out)
                ),
            ]
        handles = [module.register_forward_hook(lambda _, args, out: self._after(site, hook, args, out))]
        if hook == "sublayer":
            first = self.model.get_submodule(self.scope.sublayers[site].first)
            handles.append(first.register_forward_pre_hook(lambda _, args: self._keep(site, args)))
        return handles

    def _before(self, site: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        for here, group, p in self.active(site, "input", x):
            x = group.add(here.method.input(group.pick(args[0]), p), x, own=x is not args[0])
        return (x, *args[1:])

    def _keep(self, site: str, args: tuple[Any, ...]) -> None:
        if self.route is None:
            return
        if self.scope.sublayers[site].first in self.scope.shared_inputs:
            self._block_input.setdefault(site, args[0])  # the tokens come before the positions
        else:
            self._block_input[site] = args[0]

    def _after(self, site: str, hook: Hook, args: tuple[Any, ...], out: Any) -> Any:
        base_y = out[0] if isinstance(out, tuple) else out
        y = base_y
        block_input = self._block_input.pop(site, None) if hook == "sublayer" else None
        for here, group, p in self.active(site, hook, args[0]):
            if hook == "output":
                seen = group.pick(base_y) if here.method.uses_base_output else None
                added = here.method.output(group.pick(args[0]), seen, p)
            elif hook == "sublayer":
                assert block_input is not None
                added = here.method.sublayer(group.pick(block_input), group.pick(base_y), p)
            else:
                position_GM = self._positions(group, self.route)
                count_G = self._counts(here, group.slots)
                virtual_BT1 = group.put((position_GM < count_G.unsqueeze(1)).unsqueeze(-1), y[..., :1]).bool()
                y = torch.where(virtual_BT1, 0, y)  # what the pad token stands for must leave no rounding behind
                added = here.method.embed(group.pick(y), position_GM, p)
            y = group.add(added, y, own=y is not base_y)
        return (y, *out[1:]) if isinstance(out, tuple) else y

    def _add_into(self, site: str, linear: NF4Linear, x: Tensor) -> None:
        linear.added = self._addable(site, linear, x)
        (self._added.discard if linear.added is None else self._added.add)(site)

    def _addable(self, site: str, linear: NF4Linear, x: Tensor) -> LowRank | None:
        """What the one slot of this pass adds to the weight, where that is all that happens at the site."""
        for here, group, route in self.present(site, "output", x):
            if not group.alone:
                return None
            slot = group.slots[0]  # it has all tokens, so no other method is at work here
            knobs, row = here.knobs[slot], list(here.knobs).index(slot)
            if route.training and here.method.dropout(knobs):
                return None
            tensors = {n: _row(stack.leaf, row) for n, stack in here.stacks.items() if stack.leaf is not None}
            added = here.method.low_rank(knobs, site, tensors)
            return added if added is not None and linear.takes(added) else None
        return None

    def _put_prefix(self, site: str, attention: nn.Module) -> None:
        forget_prefix(attention)  # of a pass that failed
        if self.route is None or not self.route.prefixed:
            return
        parts = []
        for here, group, p in self.active(site, "key_value"):
            key_GHPD, value_GHPD, length_G = here.method.key_value(p)
            index_B, has_B = self.route.rows(group.slots)
            seen_GP = torch.arange(key_GHPD.shape[2], device=self.device) < length_G.unsqueeze(1)
            has_B111 = has_B.view(-1, 1, 1, 1)
            # Zeros for the other rows, not only a mask: 0 * NaN is NaN.
            key_BHPD = torch.where(has_B111, key_GHPD[index_B], 0)
            parts.append((key_BHPD, torch.where(has_B111, value_GHPD[index_B], 0), seen_GP[index_B] & has_B[:, None]))
        if parts:
            keys, values, seen = zip(*parts, strict=True)
            set_prefix(attention, Prefix(torch.cat(keys, dim=2), torch.cat(values, dim=2), torch.cat(seen, dim=1)))

    def _see_prefix_used(self, site: str, attention: nn.Module) -> None:
        if forget_prefix(attention):
            raise MethodError(f"{site} computes attention by a function of its own, which knows no prefix")

    def _counts(self, here: Site, slots: tuple[int, ...]) -> Tensor:
        """Virtual tokens [G] of each slot."""
        counts = tuple(here.method.virtual_tokens(here.knobs[s]) for s in slots)
        return self._cached(("virtual", counts), lambda: torch.tensor(counts, device=self.device))

    def _positions(self, group: Group, route: Route | None) -> Tensor:
        assert route is not None
        assert route.position_BT is not None, "virtual tokens and dropout need positions"
        return group.pick(route.position_BT.to(self.device)).squeeze(-1)

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
                self.version += 1  # what was recorded stands on these tensors
            self._cache[key] = make()
        return self._cache[key]

    def _drop(self, here: Site, group: Group, route: Route) -> Drop | None:
        rates = [here.method.dropout(here.knobs[s]) for s in group.slots]
        if not route.training or not any(rates):
            return None
        assert route.sample_BT is not None
        seeds = [hash_ints(here.seeds[s], route.steps.get(s, 0), here.key) for s in group.slots]
        sample_GM = group.pick(route.sample_BT.to(self.device)).squeeze(-1)
        seed_G1 = torch.tensor(seeds, device=self.device).unsqueeze(1)
        key_GM = mix((sample_GM * (1 << 20) + self._positions(group, route)) ^ seed_G1)
        return Drop(torch.tensor(rates, device=self.device), key_GM)


def _row(leaf: Tensor, row: int) -> Tensor:
    """A slot's tensor; the gradient of a view needs no kernel, that of a selection does."""
    return leaf.squeeze(0) if len(leaf) == 1 else leaf[row]


def hash_ints(*values: int) -> int:
    """A 63-bit key from integers."""
    return int.from_bytes(sha256(repr(values).encode()).digest()[:8], "little") >> 1


def hash_text(text: str) -> int:
    """A 63-bit key from a text."""
    return int.from_bytes(sha256(text.encode()).digest()[:8], "little") >> 1
