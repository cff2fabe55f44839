"""A Triton kernel that makes the dense weight of an NF4 linear with a low-rank change added, in one pass.

Reading 4 bits and writing 16 per weight is all the memory traffic; the product ``B A`` of a tile costs next to nothing.
The order of roundings is that of bitsandbytes' dequantization, so without a change the bits are the same.
Shapes: O outputs, I inputs, R rank.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from orchestrator.base.low_rank import LowRank

_BLOCK = 64
"""Weights that share one scale; a tile is one such block wide."""


@triton.jit  # type: ignore[untyped-decorator]
def _dense_weight_kernel(  # type: ignore[no-untyped-def]
    out_ptr,
    packed_ptr,
    code_ptr,
    absmax_ptr,
    inner_ptr,
    outer_ptr,
    offset_ptr,
    a_ptr,
    b_ptr,
    scale,
    outs,
    ins,
    rank,
    ROWS: tl.constexpr,
    RANK: tl.constexpr,
    TILES: tl.constexpr,
    OPERAND: tl.constexpr,
):
    row_O = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside_O = row_O < outs
    row_O = row_O.to(tl.int64)
    rank_R = tl.arange(0, RANK)
    b_OR = tl.load(
        b_ptr + row_O[:, None] * rank + rank_R[None, :],
        mask=inside_O[:, None] & (rank_R[None, :] < rank),
        other=0.0,
    ).to(OPERAND)
    offset = tl.load(offset_ptr)
    blocks = ins // 64
    for tile in range(TILES):
        at = tl.program_id(1) * TILES + tile
        mask_O = inside_O & (at < blocks)
        block_O = row_O * blocks + at
        index_O = tl.load(absmax_ptr + block_O, mask=mask_O, other=0).to(tl.int32)
        step_O = tl.load(inner_ptr + index_O) * tl.load(outer_ptr + block_O // 256, mask=mask_O, other=0.0) + offset
        byte_OH = tl.load(
            packed_ptr + block_O[:, None] * 32 + tl.arange(0, 32)[None, :], mask=mask_O[:, None], other=0
        ).to(tl.int32)
        high_OH = tl.load(code_ptr + (byte_OH >> 4)) * step_O[:, None]
        low_OH = tl.load(code_ptr + (byte_OH & 15)) * step_O[:, None]
        weight_OI = tl.interleave(high_OH, low_OH)
        column_I = at * 64 + tl.arange(0, 64)
        a_RI = tl.load(
            a_ptr + rank_R[:, None] * ins + column_I[None, :],
            mask=(rank_R[:, None] < rank) & (column_I[None, :] < ins),
            other=0.0,
        ).to(OPERAND)
        weight_OI += tl.dot(b_OR, a_RI, input_precision="ieee") * scale
        tl.store(
            out_ptr + row_O[:, None] * ins + column_I[None, :],
            weight_OI.to(out_ptr.dtype.element_ty),
            mask=mask_O[:, None],
        )


def dense_with(
    packed: Tensor, state: Any, added: LowRank, dtype: torch.dtype, *, rows: int = 64, tiles: int = 8, warps: int = 4
) -> Tensor:
    """``W + s B A`` [O, I] in ``dtype``, rounded once; A and B enter the product as bf16, where that is not fp32.

    Args:
        packed: NF4 weight, two to a byte, in blocks of 64 that do not cross rows.
        state: bitsandbytes' double-quantized ``QuantState`` of it.
        added: A, B and s.
        dtype: of the result.
        rows: outputs of a tile.
        tiles: blocks that a program walks through.
        warps: of a program.
    """
    a_RI, b_OR = added.a_RI.contiguous(), added.b_OR.contiguous()
    (outs, rank), ins = b_OR.shape, a_RI.shape[1]
    out_OI = torch.empty(outs, ins, dtype=dtype, device=packed.device)
    _dense_weight_kernel[triton.cdiv(outs, rows), triton.cdiv(ins // _BLOCK, tiles)](
        out_OI,
        packed,
        state.code,
        state.absmax,
        state.state2.code,
        state.state2.absmax,
        state.offset,
        a_RI,
        b_OR,
        added.scale,
        outs,
        ins,
        rank,
        ROWS=rows,
        RANK=max(16, triton.next_power_of_2(rank)),
        TILES=tiles,
        OPERAND=tl.float32 if dtype == torch.float32 else tl.bfloat16,
        num_warps=warps,
        enable_fp_fusion=False,  # bitsandbytes multiplies, then adds; one step would round otherwise
    )
    return out_OI
