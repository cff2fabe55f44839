"""Prompt tuning: trained embeddings before each sequence (Lester et al. 2021, arXiv:2104.08691).

``e(t) = prompt[t]`` for the P virtual tokens at positions t < P. ``prompt`` [P, H] starts as embeddings of drawn tokens
(the paper's best start without labels), of a text, or as normal noise as wide as the embeddings are. Where the
embedding layer scales what it looks up (Gemma 3), the start is scaled and the prompt itself is not, as in peft.
Virtual tokens move the sequence, so even a prompt of nothing is not the base.

Long, since there are three starts, and peft's directories come and go unchanged.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.config.method import Prompt as PromptKnobs
from orchestrator.errors import MethodError
from orchestrator.methods.method import Hook, Method, Params, Scope, Shape

_FILE = "prompt_embeddings"
"""peft's name for it."""


class Prompt(Method):
    """See the module."""

    name = "prompt"
    knobs = PromptKnobs
    peft_type = "PROMPT_TUNING"

    def starts_as_base(self, knobs: PromptKnobs) -> bool:
        """No: there are more tokens to look at."""
        return False

    def virtual_tokens(self, knobs: PromptKnobs) -> int:
        """P."""
        return knobs.tokens

    def sites(self, knobs: PromptKnobs, scope: Scope) -> dict[str, Hook]:
        """The embedding of the input tokens."""
        return {scope.words: "embed"}

    def shapes(self, knobs: PromptKnobs, site: str, scope: Scope) -> dict[str, Shape]:
        """prompt [P, H]."""
        return {"prompt": (knobs.tokens, scope.embeddings[site][1])}

    def start(self, knobs: PromptKnobs, site: str, scope: Scope, generator: torch.Generator) -> dict[str, Tensor]:
        """Embeddings of drawn tokens or of a text, or noise."""
        words_VH = scope.weights(site)["weight"] * scope.embed_scale
        if knobs.start == "random":
            made_PH = torch.randn(knobs.tokens, words_VH.shape[1], generator=generator) * words_VH.std()
            return {"prompt": made_PH}
        if knobs.start == "text":
            tokens = scope.encode(knobs.text or "")
            if not tokens:
                raise MethodError(f"method.text {knobs.text!r} has no token to start a prompt with")
            index_P = torch.tensor(tokens).repeat(-(-knobs.tokens // len(tokens)))[: knobs.tokens]
        else:
            index_P = torch.randint(len(words_VH), (knobs.tokens,), generator=generator)
        return {"prompt": words_VH[index_P]}

    def embed(self, e_GMO: Tensor, position_GM: Tensor, p: Params) -> Tensor:
        """``prompt[t]`` at the virtual tokens, zero at all others."""
        # A row of zeros for the others; a shorter prompt has zeros behind it already.
        prompt_GPO = nn.functional.pad(p.cast("prompt", e_GMO), (0, 0, 0, 1))
        slots, size, _ = prompt_GPO.shape
        start_G1 = size * torch.arange(slots, device=position_GM.device).unsqueeze(1)
        row_GM = position_GM.clamp(max=size - 1) + start_G1
        return nn.functional.embedding(row_GM, prompt_GPO.flatten(0, 1))  # its backward sums in a fixed order

    def weight_change(
        self, knobs: Any, site: str, tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]
    ) -> dict[str, Tensor] | None:
        """None: it is no change of the base."""
        return None

    def to_peft(self, knobs: PromptKnobs, sites: Sequence[str], scope: Scope) -> dict[str, Any]:
        """peft's ``PromptTuningConfig``."""
        return {
            "peft_type": self.peft_type,
            "base_model_name_or_path": scope.base_id,
            "inference_mode": True,
            "num_virtual_tokens": knobs.tokens,
            "token_dim": scope.embeddings[scope.words][1],
            "num_layers": scope.count,
            "num_transformer_submodules": 1,
        }

    def from_peft(self, config: Mapping[str, Any]) -> PromptKnobs:
        """Knobs of peft's prompt tuning; however it started, what it holds is the prompt."""
        if not config.get("num_virtual_tokens"):
            raise MethodError("adapter_config.json has no num_virtual_tokens")
        return PromptKnobs(tokens=int(config["num_virtual_tokens"]))

    def to_file(self, knobs: Any, tensors: Mapping[str, Tensor], scope: Scope) -> dict[str, Tensor]:
        """Under peft's name."""
        return {_FILE: tensors[f"{scope.words}.prompt"]}

    def from_file(self, knobs: Any, tensors: Mapping[str, Tensor], scope: Scope) -> dict[str, Tensor]:
        """Back from ``to_file``."""
        return {f"{scope.words}.prompt" if name == _FILE else name: tensor for name, tensor in tensors.items()}
