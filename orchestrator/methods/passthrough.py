"""Any type of the peft library, handed through: peft's own modules compute it, in a solo run on a dense base.

``method: {peft: {type: VERA, r: 64}}`` takes peft's type and the options of its config class, under peft's names. The
modules are peft's, so its tensors cannot lie in the bank's stacks, nor can slots be mixed in a pass: ``Foreign`` is the
slot that holds them. Saved is peft's own folder. The start is peft's own under the run's seed. (The file is not named
after the method, since that is the library's name.)

Each type of peft 0.21 was run through training, saving, loading here and in plain peft, or is refused:

| types | what was seen |
|---|---|
| BEFT BOFT C3A DELORA FOURIERFT FROD GLORA GRALORA HIRA HRA IA3 LN_TUNING LOHA LOKR | losses of a plain loop, to 1e-4 |
| LORA MISS OFT OSF PEANUT PSOFT RANDLORA ROAD SHIRA SUPERTUNING TINYLORA | the same |
| TRAINABLE_TOKENS UNILORA VBLORA VERA WAVEFT | the same |
| DEFT, LILY | losses to 1e-3; LILY takes means over all tokens of a pass, so it depends on how samples are packed |
| PVERA | draws numbers in training, so losses agree in the mean alone |
| FROD, SHIRA | no preview: their start reads the base's weights |
| CARTRIDGE CPT MULTITASK_PROMPT_TUNING PREFIX_TUNING PROMPT_TUNING P_TUNING | refused: take ``prompt`` or ``prefix`` |
| ADALORA ADAMSS | refused: a call of peft's own after each step |
| POLY SHADOW XLORA ADAPTION_PROMPT | refused: peft's wrapper computes, or whole modules are swapped |
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PromptLearningConfig
from torch import Tensor, nn

from orchestrator.config import Peft
from orchestrator.errors import MethodError
from orchestrator.methods.foreign import Foreign
from orchestrator.methods.method import Hook, Method, Scope, Shape

_NOT_OPTIONS = ("peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode")
_WRAPPED = ("alora_invocation_tokens", "monteclora_config", "kasa_config")
"""Options of peft's LoRA that its wrapper, or a loss of its own, makes work."""


class Passthrough(Method):
    """See the module."""

    name = "peft"
    knobs = Peft
    packs = False
    mixes = False

    def variant(self, knobs: Peft) -> Method:
        """Itself, once peft knows type and options."""
        _checked(knobs)
        return self

    def inject(self, knobs: Peft, model: nn.Module, scope: Scope, seed: int) -> Foreign:
        """peft's modules, put into the model."""
        options = {k: v for k, v in knobs.peft.items() if k != "type"}
        _check_targets(options, scope)
        return Foreign(model, config_of(knobs), options, seed)

    def sites(self, knobs: Peft, scope: Scope) -> dict[str, Hook]:
        """None of the bank's own."""
        return {}

    def shapes(self, knobs: Peft, site: str, scope: Scope) -> dict[str, Shape]:
        """None."""
        return {}

    def start(self, knobs: Peft, site: str, scope: Scope, generator: torch.Generator) -> dict[str, Tensor]:
        """None."""
        return {}

    def starts_as_base(self, knobs: Peft) -> bool:
        """Not known; most do."""
        return False

    def weight_change(
        self, knobs: Peft, site: str, tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]
    ) -> dict[str, Tensor] | None:
        """Not known here; peft's ``merge_and_unload`` may."""
        return None

    def to_peft(self, knobs: Peft, sites: Sequence[str], scope: Scope) -> dict[str, Any]:
        """peft's config, as peft writes it."""
        config = config_of(knobs).to_dict()
        config |= {"base_model_name_or_path": scope.base_id, "inference_mode": True}
        return {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}

    def from_peft(self, config: Mapping[str, Any]) -> Peft:
        """All of it."""
        options = {k: v for k, v in config.items() if k not in _NOT_OPTIONS and k != "task_type"}
        knobs = Peft(peft={"type": str(config.get("peft_type")), **options})
        _checked(knobs)
        return knobs

    def to_file(self, knobs: Peft, tensors: Mapping[str, Tensor], scope: Scope) -> dict[str, Tensor]:
        """As they are: the names are peft's."""
        return dict(tensors)

    def from_file(self, knobs: Peft, tensors: Mapping[str, Tensor], scope: Scope) -> dict[str, Tensor]:
        """As they are."""
        return dict(tensors)


def config_of(knobs: Peft) -> Any:
    """peft's config object."""
    kind, options = _checked(knobs), {k: v for k, v in knobs.peft.items() if k != "type"}
    try:
        return PEFT_TYPE_TO_CONFIG_MAPPING[kind](**options)
    except (TypeError, ValueError) as error:
        raise MethodError(f"method.peft: peft refuses these options of {kind.value}: {error}") from error


def _checked(knobs: Peft) -> Any:
    """peft's type, if it can be handed through and has the options.

    Raises:
        MethodError: says what is wrong, and what is nearest.
    """
    kinds = {str(kind.value): kind for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
    said = str(knobs.peft.get("type"))
    kind = kinds.get(said.upper())
    if kind is None:
        raise MethodError(
            f"method.peft.type: peft has no type {said!r}; nearest is {_nearest(said.upper(), kinds)}, "
            f"all are {', '.join(sorted(kinds))}"
        )
    if reason := _refused(kind):
        raise MethodError(f"method.peft.type: {kind.value} {reason}")
    known = [f.name for f in fields(PEFT_TYPE_TO_CONFIG_MAPPING[kind]) if f.init and f.name not in _NOT_OPTIONS]
    wrong = [
        f"{kind.value} has no option {key!r}, nearest is {_nearest(key, known)!r}"
        for key in knobs.peft
        if key not in known and key != "type"
    ]
    wrong += [f"{key} needs peft's own loop or wrapper" for key in _WRAPPED if knobs.peft.get(key)]
    if wrong:
        raise MethodError(f"method.peft: {'; '.join(wrong)}; its options are {', '.join(sorted(known))}")
    return kind


def _refused(kind: Any) -> str | None:
    """Why a type cannot be handed through."""
    tuner, config = PEFT_TYPE_TO_TUNER_MAPPING[kind], PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    if issubclass(config, PromptLearningConfig):
        return "puts virtual tokens into peft's own forward pass, which is not used here; take method: prompt or prefix"
    if not hasattr(tuner, "inject_adapter"):
        return "swaps whole attention modules, which a run here does not follow; train it with peft"
    if hasattr(tuner, "update_and_allocate"):
        return "needs a call of peft's own after each step (update_and_allocate); train it with peft"
    if "forward" in vars(tuner):
        return "computes in peft's own wrapper, which is not used here; train it with peft"
    return None


def _check_targets(options: Mapping[str, Any], scope: Scope) -> None:
    """peft passes over a target that matches nothing as long as another does."""
    targets = options.get("target_modules")
    for target in targets if isinstance(targets, list | tuple) else ():
        if not any(name == target or name.endswith(f".{target}") for name in scope.modules):
            short = {name.rsplit(".", 1)[-1] for name in scope.modules}
            near = _nearest(str(target).rsplit(".", 1)[-1], sorted(short))
            raise MethodError(f"method.peft.target_modules: {target!r} is no module of this base; nearest is {near!r}")


def _nearest(word: str, good: Sequence[str] | Mapping[str, Any]) -> str:
    return difflib.get_close_matches(word, list(good), n=1, cutoff=0.0)[0]
