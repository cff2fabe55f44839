"""Many trials of one set at once on one frozen base: the package's pack step, without orders and checkpoints."""

from typing import Any

import torch

from orchestrator.config import Zero
from orchestrator.methods import Bank
from orchestrator.train.engine import Engine
from orchestrator.train.pack_step import PackStepper, Rows
from orchestrator.train.step import Loss


def stepper_of(bank: Bank, model: Any, loss: Loss, *, length: int, pad_id: int, tokens: int) -> PackStepper:
    """Trains and evaluates every slot of the bank; passes hold ``tokens`` tokens at most."""
    engine = Engine(Zero(), stage=0, device=bank.device, dtype=torch.float32)
    made = PackStepper(model, bank, engine, loss, tokens=tokens, pad_id=pad_id)
    made.rows = dict.fromkeys(bank.slots, Rows(length, packing=True))
    return made
