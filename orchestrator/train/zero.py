"""From config to DeepSpeed's JSON. Pure: imports neither torch nor deepspeed."""

from typing import Any

from orchestrator.config import Base, Zero

_BYTES = {"nf4": 0.516, "int8": 1.0}
"""Bytes per quantized weight, quantization state included."""


def held_bytes(base: Base, *, parameters: int, linears: int, itemsize: int) -> int:
    """Bytes of one whole copy of the base as it is held, about.

    Args:
        base: how it is held.
        parameters: all of the base's.
        linears: of these, weights of the layers' linears, which ``base.quantize`` is about.
        itemsize: bytes of the compute precision, which all others keep.
    """
    return round(linears * _BYTES.get(base.quantize, itemsize) + (parameters - linears) * itemsize)


def choose_stage(zero: Zero, *, held: int, memory: int, ranks: int) -> int:
    """The ZeRO stage of a run.

    ``auto`` replicates the base where one copy fills at most half of a device, else shards it: gathering costs time,
    and the other half is for activations.

    Args:
        zero: what the config asks for.
        held: bytes of one copy of the base.
        memory: bytes of one rank's device.
        ranks: number of ranks.
    """
    if zero.stage != "auto":
        return zero.stage
    return 3 if zero.offload == "cpu" or (ranks > 1 and held > memory / 2) else 0


def deepspeed_config(zero: Zero, *, rows_per_pass: int, cpu: bool) -> dict[str, Any]:
    """DeepSpeed's config for a frozen base sharded at stage 3, without an optimizer.

    ``max_live_parameters`` and ``max_reuse_distance`` of 0 free each layer right after its use.
    """
    section: dict[str, Any] = {
        "stage": 3,
        "stage3_param_persistence_threshold": zero.persistence_threshold,
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
    }
    if cpu:
        section["stage3_prefetch_bucket_size"] = 0
    if zero.offload == "cpu":
        section["offload_param"] = {"device": "cpu", "pin_memory": not cpu}
    section.update(zero.overrides)
    return {
        "train_micro_batch_size_per_gpu": rows_per_pass,
        "zero_optimization": section,
        "steps_per_print": 10**9,
    }
