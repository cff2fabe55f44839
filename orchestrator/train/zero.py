"""From config to DeepSpeed's JSON. Pure: imports neither torch nor deepspeed."""

from typing import Any

from orchestrator.config import Base, Zero

BYTES = {"nf4": 0.516, "int8": 1.0, "none": 2.0}
"""Bytes per weight, quantization state included; ``none`` counts bf16 (fp32 is twice that)."""


def choose_stage(zero: Zero, base: Base, *, parameters: int, memory: int, ranks: int, fp32: bool) -> int:
    """The ZeRO stage of a run.

    ``auto`` replicates the base where one copy fills at most half of a device, else shards it: gathering costs time,
    and the other half is for activations.

    Args:
        zero: what the config asks for.
        base: how the base is held.
        parameters: of the base.
        memory: bytes of one rank's device.
        ranks: number of ranks.
        fp32: whether unquantized weights are held in fp32.
    """
    if zero.stage != "auto":
        return zero.stage
    copy = parameters * BYTES[base.quantize] * (2 if fp32 and base.quantize == "none" else 1)
    return 3 if ranks > 1 and (copy > memory / 2 or zero.offload == "cpu") else 0


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
