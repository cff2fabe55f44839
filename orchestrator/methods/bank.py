"""The bank: S slots, each one delta with its own method and size, around one frozen base.

S = 1 is ordinary fine-tuning, S > 1 in training a pack of trials, S > 1 in inference multi-tenant serving. The bank's
tensors are not part of the module tree: what shards the base never sees them.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.config import Classification, Task
from orchestrator.config import Method as MethodKnobs
from orchestrator.errors import DeltaError, MethodError
from orchestrator.methods.method import Hook, Method
from orchestrator.methods.route import Route
from orchestrator.methods.scope import Scope
from orchestrator.methods.stack import Stack
from orchestrator.methods.table import HEAD, method_of
from orchestrator.methods.wiring import Site, Wiring, hash_ints, hash_text


@dataclass
class _Part:
    """A method in a slot: the slot's own, or the head that its task needs."""

    method: Method
    knobs: Any
    sites: dict[str, Hook]
    shared: dict[str, str]

    @property
    def own(self) -> list[str]:
        """Sites with tensors of their own."""
        return [s for s in self.sites if s not in self.shared]

    def key(self, site: str) -> str:
        """What it is known by at a site; slots may differ in where they hook in."""
        return f"{self.method.name}.{self.sites[site]}"


@dataclass
class _Slot:
    """What the bank knows of one slot."""

    seed: int
    task: Task | None
    parts: list[_Part]


class Bank:
    """See the module.

    Args:
        model: the loaded base; an empty one will do to look at sizes.
        device: where the activations are.
        base_id: name of the base, for the deltas' own configs.
        source: a linear's weight before quantization, for starts that need it.
        encode: token ids of a text, for starts that need them.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        device: torch.device | str = "cpu",
        base_id: str = "",
        source: Callable[[str], Tensor] | None = None,
        encode: Callable[[str], list[int]] | None = None,
    ) -> None:
        self.scope = Scope.of(model, base_id, source=source, encode=encode)
        self.device = torch.device(device)
        self._empty = next(model.parameters()).is_meta
        self._slots: dict[int, _Slot] = {}
        self._wiring = Wiring(model, self.scope, self.device)

    @property
    def slots(self) -> tuple[int, ...]:
        """The slots in use."""
        return tuple(self._slots)

    def add(
        self,
        slot: int,
        knobs: MethodKnobs,
        *,
        seed: int = 0,
        tensors: Mapping[str, Tensor] | None = None,
        task: Task | None = None,
        importance: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Fill a slot, at the method's start values or with a saved delta's tensors. Every rank must call it.

        Args:
            slot: any integer from 0.
            knobs: method and size.
            seed: of start values and dropout.
            tensors: ``<site>.<name>`` -> tensor, as ``tensors`` returns them.
            task: gives the slot a head of its own where the task needs one.
            importance: of each site's weights, where the method asks for it (``Method.importance_samples``).

        Raises:
            MethodError: a target matches nothing, the base has not what the method needs, or the slot is taken.
            DeltaError: ``tensors`` are not those of this method on this base.
        """
        if slot in self._slots or slot < 0:
            raise MethodError(f"slot {slot} is {'taken' if slot >= 0 else 'negative'}")
        parts = [self._part(method_of(knobs), knobs)]
        if isinstance(task, Classification):
            parts.append(self._part(HEAD, task))
        values = self._start(parts, seed, importance) if tensors is None else dict(tensors)
        self._check(parts, values)
        self._slots[slot] = _Slot(seed, task, parts)
        try:
            for part in parts:
                self._fill(slot, part, seed, values)
        except BaseException:
            self.remove(slot)  # out of memory half-way: nothing of it stays
            raise

    def remove(self, slot: int) -> None:
        """Empty a slot."""
        for part in self._slots.pop(slot).parts:
            for site in [*part.own, *part.shared]:
                here = self._wiring.sites.get(site, {}).get(part.key(site))
                if here is None:
                    continue
                for stack in () if here.borrowed else (*here.stacks.values(), *here.constants.values()):
                    stack.drop(slot)
                here.knobs.pop(slot, None)
                here.seeds.pop(slot, None)
                if not here.knobs:
                    del self._wiring.sites[site][part.key(site)]
                self._wiring.changed(site)

    def resize(self, slot: int, knobs: MethodKnobs) -> None:
        """Change a slot's size; its function stays, where the new size can hold it."""
        part = self._slots[slot].parts[0]
        new = self._part(method_of(knobs), knobs)
        if new.method is not part.method or new.sites != part.sites:
            raise MethodError("a slot keeps its method and targets when it is resized; remove it and add another")
        seed = self._slots[slot].seed
        for site in part.own:
            here = self._wiring.sites[site][part.key(site)]
            values = {name: stack.value(slot) for name, stack in here.stacks.items()}
            made = part.method.resized(part.knobs, knobs, values, site, self.scope, _generator(seed, site))
            self._put(here, slot, new, made)
        self._slots[slot].parts[0] = new

    def rechoose(self, slot: int, step: int) -> dict[str, Tensor]:
        """Let a method that chooses its weights choose anew after a step.

        Returns:
            What of each trained tensor stayed: ``<site>.<name>`` -> bool, for the optimizer; empty where nothing moved.
        """
        seed, kept = self._slots[slot].seed, {}
        for part in self._slots[slot].parts:
            for site in part.own:
                here = self._wiring.sites[site][part.key(site)]
                values = {name: stack.value(slot) for name, stack in here.stacks.items()}
                draw = _generator(hash_ints(seed, step), site)
                made = part.method.rechosen(part.knobs, step, values, site, self.scope, draw)
                if made is None:
                    continue
                still = made.pop("kept")
                for name, value in made.items():
                    here.stacks[name].value(slot).copy_(value)
                    if slot in here.stacks[name].views:
                        kept[f"{site}.{name}"] = still
        return kept

    def detach(self) -> None:
        """Remove every slot; the model is as it was."""
        for slot in self.slots:
            self.remove(slot)

    def knobs(self, slot: int) -> Any:
        """A slot's method and size."""
        return self._slots[slot].parts[0].knobs

    def task(self, slot: int) -> Task | None:
        """A slot's task, where it has a head of its own."""
        return self._slots[slot].task

    def sites(self, slot: int) -> list[str]:
        """Module names that a slot's method acts on."""
        return list(self._slots[slot].parts[0].sites)

    def lead(self, slot: int) -> tuple[int, int]:
        """Virtual tokens before each sequence of a slot, and the position at which its own tokens or those begin."""
        part = self._slots[slot].parts[0]
        return part.method.virtual_tokens(part.knobs), part.method.prefix_length(part.knobs)

    def changes_head(self, slot: int) -> bool:
        """Whether a slot adds to the logits of the base's own head."""
        return self.scope.head in self._slots[slot].parts[0].sites

    def parameters(self, slot: int) -> dict[str, nn.Parameter]:
        """What of a slot is trained, ``<site>.<name>``; the same objects for the slot's life, for an optimizer."""
        return {name: stack.views[slot] for name, stack in self._own_stacks(slot) if slot in stack.views}

    def lr_ratios(self, slot: int) -> dict[str, float]:
        """Learning rate of each trained tensor over that of the run."""
        return {
            f"{site}.{name}": part.method.lr_ratio(part.knobs, name)
            for part in self._slots[slot].parts
            for site in part.own
            for name, stack in self._wiring.sites[site][part.key(site)].stacks.items()
            if slot in stack.views
        }

    def windows(self, slot: int) -> dict[str, Tensor]:
        """A slot's whole tensors, trained or not, in place."""
        return {name: stack.value(slot) for name, stack in self._own_stacks(slot)}

    def tensors(self, slot: int) -> dict[str, Tensor]:
        """Copies of a slot's tensors on the CPU."""
        return {name: t.detach().cpu().clone() for name, t in self.windows(slot).items()}

    def leaves(self) -> dict[str, Tensor]:
        """The stacked tensors that gradients arrive in, in the same order on every rank."""
        return {
            f"{site}.{kind}.{name}": stack.leaf
            for site, kinds in self._wiring.sites.items()
            for kind, here in kinds.items()
            for name, stack in here.stacks.items()
            if not here.borrowed and stack.leaf is not None and stack.leaf.requires_grad
        }

    def leaves_of(self, slot: int) -> dict[str, Tensor]:
        """The leaf that holds each of a slot's trained tensors, named as in ``parameters``."""
        return {n: s.leaf for n, s in self._own_stacks(slot) if slot in s.views and s.leaf is not None}

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
            slot_BT: slot of each token, -1 for the bare base; a row is of one slot. On the CPU, or it is copied there.
            position_BT: positions, for dropout and virtual tokens.
            sample_BT: sample numbers, for dropout.
            steps: each slot's step count; given, dropout is on.
        """
        self._wiring.route = Route(slot_BT, position_BT, sample_BT, steps or {}, steps is not None, self.device)
        try:
            yield
        finally:
            self._wiring.route = None

    def classify(self, h_PH: Tensor, slot_P: Tensor) -> Tensor:
        """Logits [P, C] of each slot's own head for what it pooled of P texts; -inf beyond a slot's own labels."""
        wiring, logits_PC = self._wiring, None
        route = Route(slot_P.view(1, -1), device=self.device)
        for here in (site for kinds in wiring.sites.values() for site in kinds.values() if site.hook == "head"):
            group = route.group(list(here.knobs))
            if group is None:
                continue
            made_GMC = here.method.head(group.pick(h_PH.unsqueeze(0)), wiring.params(here, group, route))
            like = h_PH.new_empty(1, len(h_PH), made_GMC.shape[-1])
            put_PC = group.put(made_GMC, like).squeeze(0)
            logits_PC = put_PC if logits_PC is None else logits_PC + put_PC
        if logits_PC is None:
            raise MethodError("none of these slots has a head of its own")
        return logits_PC

    # -- inside -------------------------------------------------------------------------------------------------------

    def _part(self, method: Method, knobs: Any) -> _Part:
        shared = method.shared(knobs, self.scope)
        return _Part(method, knobs, method.sites(knobs, self.scope), shared)

    def _start(
        self, parts: list[_Part], seed: int, importance: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        scope = self.scope if importance is None else replace(self.scope, importance=importance.__getitem__)
        return {
            f"{site}.{name}": value
            for part in parts
            for site in part.own
            for name, value in part.method.start(part.knobs, site, scope, _generator(seed, site)).items()
        }

    def _check(self, parts: list[_Part], values: Mapping[str, Tensor]) -> None:
        wanted = {
            f"{site}.{name}": shape
            for part in parts
            for site in part.own
            for name, shape in part.method.shapes(part.knobs, site, self.scope).items()
        }
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

    def _fill(self, slot: int, part: _Part, seed: int, values: Mapping[str, Tensor]) -> None:
        sites = self._wiring.sites
        for site in [*part.own, *part.shared]:
            here = sites.setdefault(site, {}).setdefault(part.key(site), Site(site, part.method, part.sites[site]))
            self._wiring.attach(site, here.hook)
            self._wiring.changed(site)
            if site in part.shared:
                here.stacks, here.borrowed = sites[part.shared[site]][part.key(part.shared[site])].stacks, True
            else:
                names = part.method.shapes(part.knobs, site, self.scope)
                self._put(here, slot, part, {name: values[f"{site}.{name}"] for name in names})
            here.knobs[slot], here.seeds[slot] = part.knobs, seed

    def _put(self, here: Site, slot: int, part: _Part, values: Mapping[str, Tensor]) -> None:
        here.knobs[slot] = part.knobs
        for name, value in values.items():
            trained = part.method.trained(part.knobs, name, tuple(value.shape))
            here.stacks.setdefault(name, Stack()).put(slot, self._own(value), trained)
        constants = {} if self._empty else part.method.constants(part.knobs, here.name, self.scope)
        for name, value in constants.items():
            here.constants.setdefault(name, Stack()).put(slot, self._own(value), None)
        self._wiring.changed(here.name)

    def _own(self, value: Tensor) -> Tensor:
        """On the device; numbers in fp32, indices as they are."""
        return value.detach().to(self.device, torch.float32 if value.is_floating_point() else value.dtype)

    def _own_stacks(self, slot: int) -> Iterator[tuple[str, Stack]]:
        for part in self._slots[slot].parts:
            for site in part.own:
                for name, stack in self._wiring.sites[site][part.key(site)].stacks.items():
                    yield f"{site}.{name}", stack

    def _stacks(self) -> Iterator[Stack]:
        for kinds in self._wiring.sites.values():
            for here in kinds.values():
                yield from () if here.borrowed else here.stacks.values()


def _generator(seed: int, site: str) -> torch.Generator:
    return torch.Generator().manual_seed(hash_ints(seed, hash_text(site)))
