"""The bank: S slots, each one delta with its own method and size, around one frozen base.

S = 1 is ordinary fine-tuning, S > 1 in training a pack of trials, S > 1 in inference multi-tenant serving. The bank's
tensors are not part of the module tree: what shards the base never sees them.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.config import Classification, Task
from orchestrator.config import Method as MethodKnobs
from orchestrator.data.batch import NO_SLOT
from orchestrator.errors import MethodError
from orchestrator.methods.fit import check_fit
from orchestrator.methods.method import Method
from orchestrator.methods.route import Route
from orchestrator.methods.scope import Scope
from orchestrator.methods.slot import Part, Slot, generator
from orchestrator.methods.stack import Stack, zero_in_place
from orchestrator.methods.table import HEAD, method_of
from orchestrator.methods.wiring import Site, Wiring, hash_ints


class Bank:
    """See the module.

    Args:
        model: the loaded base; an empty one will do to look at sizes.
        device: where the activations are; ``meta`` on an empty base to rehearse a pass.
        base_id: name of the base, for the deltas' own configs.
        source: a linear's weight before quantization, for starts that need it.
        encode: token ids of a text, for starts that need them.
        fuse: a slot that has all tokens of a pass is added into the weights of 4-bit linears, where its method can be:
            one product instead of several, faster from some tens of tokens on; rounding differs.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        device: torch.device | str = "cpu",
        base_id: str = "",
        source: Callable[[str], Tensor] | None = None,
        encode: Callable[[str], list[int]] | None = None,
        fuse: bool = False,
    ) -> None:
        self.scope = Scope.of(model, base_id, source=source, encode=encode)
        self.device = torch.device(device)
        self._empty = next(model.parameters()).is_meta
        self._slots: dict[int, Slot] = {}
        self._wiring = Wiring(model, self.scope, self.device, fuse)

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
        method = method_of(knobs)
        if self._slots and (self.unstacked() or not method.mixes):
            raise MethodError("a slot of the peft library's own modules stands alone: no other slot beside it")
        if not method.mixes:
            self._add_foreign(slot, method, knobs, seed, tensors, task)
            return
        parts = [Part.of(method, knobs, self.scope)]
        if isinstance(task, Classification):
            parts.append(Part.of(HEAD, task, self.scope))
        if tensors is None:
            scope = self.scope if importance is None else replace(self.scope, importance=importance.__getitem__)
            tensors = {name: value for part in parts for name, value in part.start(scope, seed).items()}
        values = dict(tensors)
        check_fit({name: shape for part in parts for name, shape in part.shapes(self.scope).items()}, values)
        self._slots[slot] = Slot(seed, task, parts)
        try:
            for part in parts:
                self._fill(slot, part, seed, values)
        except BaseException:
            self.remove(slot)  # out of memory half-way: nothing of it stays
            raise

    def remove(self, slot: int) -> None:
        """Empty a slot."""
        gone = self._slots.pop(slot)
        if gone.foreign:
            gone.foreign.remove()
            self._wiring.version += 1
        for part in gone.parts:
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
        new = Part.of(method_of(knobs), knobs, self.scope)
        if new.method is not part.method or new.sites != part.sites or self.unstacked():
            raise MethodError("a slot keeps its method and targets when it is resized; remove it and add another")
        seed = self._slots[slot].seed
        for site in part.own:
            here = self._wiring.sites[site][part.key(site)]
            values = {name: stack.value(slot) for name, stack in here.stacks.items()}
            made = part.method.resized(part.knobs, knobs, values, site, self.scope, generator(seed, site))
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
                draw = generator(hash_ints(seed, step), site)
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
        foreign = self._slots[slot].foreign
        return list(foreign.sites if foreign else self._slots[slot].parts[0].sites)

    def lead(self, slot: int) -> tuple[int, int]:
        """Virtual tokens before each sequence of a slot, and the position at which its own tokens or those begin.

        None, and 0, for the bare base.
        """
        if slot == NO_SLOT:
            return 0, 0
        part = self._slots[slot].parts[0]
        return part.method.virtual_tokens(part.knobs), part.method.prefix_length(part.knobs)

    def alone(self, slot: int) -> bool:
        """Whether a pass with tokens of this slot is to hold no other slot's."""
        return any(site in self.scope.shared_inputs for part in self._slots[slot].parts for site in part.sites)

    def prefix(self, slot: int) -> dict[int, tuple[Tensor, Tensor]]:
        """Keys and values, [heads, P, D] each, that a slot puts before its sequences: of each layer that has any."""
        part = self._slots[slot].parts[0]
        found = {}
        for site in (site for site, hook in part.sites.items() if hook == "key_value"):
            layer = self.scope.layer_of(site)
            assert layer is not None
            length = part.method.prefix_length(part.knobs)
            key_HPD, value_HPD = self._wiring.key_value(site, part.key(site), slot)
            found[layer] = key_HPD[:, :length], value_HPD[:, :length]
        return found

    def changes_head(self, slot: int) -> bool:
        """Whether a slot adds to the logits of the base's own head."""
        return slot != NO_SLOT and self.scope.head in self.sites(slot)

    def parameters(self, slot: int) -> dict[str, nn.Parameter]:
        """What of a slot is trained, ``<site>.<name>``; the same objects for the slot's life, for an optimizer."""
        own = {name: stack.views[slot] for name, stack in self._own_stacks(slot) if slot in stack.views}
        return {**own, **self.unstacked(slot)}

    def lr_ratios(self, slot: int) -> dict[str, float]:
        """Learning rate of each trained tensor over that of the run."""
        own = {
            f"{site}.{name}": part.method.lr_ratio(part.knobs, name)
            for part in self._slots[slot].parts
            for site in part.own
            for name, stack in self._wiring.sites[site][part.key(site)].stacks.items()
            if slot in stack.views
        }
        return {**own, **dict.fromkeys(self.unstacked(slot), 1.0)}

    def windows(self, slot: int) -> dict[str, Tensor]:
        """A slot's whole tensors, trained or not, in place."""
        foreign = self._slots[slot].foreign
        own = {name: stack.value(slot) for name, stack in self._own_stacks(slot)}
        return {**own, **foreign.windows()} if foreign else own

    def tensors(self, slot: int) -> dict[str, Tensor]:
        """Copies of a slot's tensors on the CPU."""
        return {name: t.detach().cpu().clone() for name, t in self.windows(slot).items()}

    def leaves(self) -> dict[str, Tensor]:
        """The stacked tensors that gradients arrive in, in the same order on every rank."""
        own = {
            f"{site}.{kind}.{name}": stack.leaf
            for site, kinds in self._wiring.sites.items()
            for kind, here in kinds.items()
            for name, stack in here.stacks.items()
            if not here.borrowed and stack.leaf is not None and stack.leaf.requires_grad
        }
        return {**own, **self.unstacked()}

    def leaves_of(self, slot: int) -> dict[str, Tensor]:
        """The leaf that holds each of a slot's trained tensors, named as in ``parameters``."""
        own = {n: s.leaf for n, s in self._own_stacks(slot) if slot in s.views and s.leaf is not None}
        return {**own, **self.unstacked(slot)}

    def stacks(self) -> Iterator[tuple[Stack, dict[int, float]]]:
        """The stacks with something trained in them, and each slot's learning rate there over that of its run."""
        for kinds in self._wiring.sites.values():
            for here in kinds.values():
                for name, stack in () if here.borrowed else here.stacks.items():
                    if stack.views:
                        yield stack, {slot: here.method.lr_ratio(knobs, name) for slot, knobs in here.knobs.items()}

    def unstacked(self, slot: int | None = None) -> dict[str, nn.Parameter]:
        """The trained tensors that are in no stack, of one slot or of all."""
        slots = self._slots.values() if slot is None else [self._slots[slot]]
        return {n: p for here in slots if here.foreign for n, p in here.foreign.parameters.items()}

    def held(self) -> list[Tensor]:
        """The stacks' tensors, trained or not, and what hooks need beside them."""
        return self._wiring.held()

    def hand_out_gradients(self) -> None:
        """After backward (and the sum over ranks): each parameter gets its part of its leaf's gradient."""
        for stack in self._stacks():
            stack.hand_out()

    def zero_grad(self, *, keep: bool = False) -> None:
        """Forget all gradients; with ``keep`` they become zeros where they are, and stay there."""
        if keep:
            zero_in_place(self.leaves().values())
            return
        for stack in self._stacks():
            stack.zero_grad()
        for parameter in self.unstacked().values():
            parameter.grad = None

    @property
    def version(self) -> int:
        """Another number whenever slots have come, gone or changed size: tensors that a pass reads have moved."""
        return self._wiring.version

    def steady(self, slot: int) -> bool:
        """Whether a training pass of this slot does the same work each time: no dropout, none of peft's modules."""
        here = self._slots[slot]
        return here.foreign is None and not any(part.method.dropout(part.knobs) for part in here.parts)

    def rechooses(self, slot: int) -> bool:
        """Whether ``rechoose`` may do something."""
        return any(part.rechooses for part in self._slots[slot].parts)

    @contextmanager
    def routed(
        self,
        slot_BT: Tensor,
        *,
        position_BT: Tensor | None = None,
        sample_BT: Tensor | None = None,
        steps: Mapping[int, int] | None = None,
        prefixed: bool = True,
    ) -> Iterator[None]:
        """Inside, each token passes its slot's delta. Recomputed activations need the backward pass inside, too.

        Args:
            slot_BT: slot of each token, -1 for the bare base; a row is of one slot. On the CPU, or it is copied there.
            position_BT: positions, for dropout and virtual tokens.
            sample_BT: sample numbers, for dropout.
            steps: each slot's step count; given, dropout is on.
            prefixed: whether prefixes of keys and values are added; not where a cache holds what ``prefix`` returns.
        """
        training = steps is not None
        self._wiring.route = Route(slot_BT, position_BT, sample_BT, steps or {}, training, prefixed, self.device)
        try:
            with ExitStack() as stack:
                for slot, here in self._slots.items():
                    if here.foreign:
                        step = None if steps is None else steps[slot]
                        stack.enter_context(here.foreign.running(slot, slot_BT, step, sample_BT))
                yield
        finally:
            self._wiring.route = None

    def classify(self, h_PH: Tensor, slot_P: Tensor, sample_P: Tensor | None = None) -> Tensor:
        """Logits [P, C] of each slot's own head for what it pooled of P texts; -inf beyond a slot's own labels.

        Dropout is on where it is in the pass around it (``routed``); it needs the sample numbers.
        """
        return self._wiring.classify(h_PH, slot_P, sample_P)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _add_foreign(
        self,
        slot: int,
        method: Method,
        knobs: Any,
        seed: int,
        tensors: Mapping[str, Tensor] | None,
        task: Task | None,
    ) -> None:
        if isinstance(task, Classification):
            raise MethodError(f"the method {method.name} has no classification head; take one of this project's own")
        foreign = method.inject(knobs, self._wiring.model, self.scope, seed)
        try:
            if tensors is not None:
                foreign.load(tensors)
        except BaseException:
            foreign.remove()
            raise
        self._slots[slot] = Slot(seed, task, [Part(method, foreign.knobs, {}, {})], foreign)
        self._wiring.version += 1

    def _fill(self, slot: int, part: Part, seed: int, values: Mapping[str, Tensor]) -> None:
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

    def _put(self, here: Site, slot: int, part: Part, values: Mapping[str, Tensor]) -> None:
        here.knobs[slot] = part.knobs
        for name, value in values.items():
            trained = part.method.trained(part.knobs, name, tuple(value.shape))
            here.stacks.setdefault(name, Stack()).put(slot, self._own(value), trained)
        sizes_only = self._empty and self.device.type != "meta"
        constants = {} if sizes_only else part.method.constants(part.knobs, here.name, self.scope)
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
