"""A whole bottleneck in one Triton launch: the first hidden tensor of a tile lies in a scratch slot of its program.

A program takes a tile of output pixels: the first 1x1 on the tile and its halo of one pixel goes to the slot, which is
written and read by this program alone and stays in L2; the 3x3 reads it shifted by each tap; its result stays in
registers for the last 1x1. Compute is in NHWC, sums are float32, both hidden tensors are rounded once.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc"

import triton
import triton.language as tl

from resnet_fused.ops.conv_bn_act.triton_kernels import _affine, _dot, _relu


@triton.jit
def bottleneck(
    x, w1, w2, w3, wp, out, scratch,
    scale1, shift1, scale2, shift2, scale3, shift3, scalep, shiftp,
    tiles, tiles_h, tiles_w, h, w, p, q, x_n, x_h, x_w,
    CIN: tl.constexpr, MID: tl.constexpr, STRIDE: tl.constexpr, PROJECT: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, HALO_H: tl.constexpr, HALO_W: tl.constexpr,
    BK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    BM: tl.constexpr = TILE_H * TILE_W
    HALO: tl.constexpr = HALO_H * HALO_W
    COUT: tl.constexpr = 4 * MID
    slot = scratch + tl.program_id(0).to(tl.int64) * HALO * MID
    rows, mid, k, part = tl.arange(0, BM), tl.arange(0, MID), tl.arange(0, BK), tl.arange(0, BN)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        q0 = tile % tiles_w * TILE_W
        p0 = tile // tiles_w % tiles_h * TILE_H
        n = tile // tiles_w // tiles_h
        image = x + n.to(tl.int64) * x_n
        for start in range(0, HALO, BM):
            pixel = start + rows
            row, column = p0 * STRIDE - 1 + pixel // HALO_W, q0 * STRIDE - 1 + pixel % HALO_W
            inside = (pixel < HALO) & (row >= 0) & (row < h) & (column >= 0) & (column < w)
            at = row.to(tl.int64) * x_h + column.to(tl.int64) * x_w
            acc = tl.zeros((BM, MID), tl.float32)
            for c in range(0, CIN, BK):
                a = tl.load(image + at[:, None] + (c + k)[None, :], mask=inside[:, None], other=0.0)
                acc = _dot(a, tl.load(w1 + mid[None, :] * CIN + (c + k)[:, None]), acc, "tf32")
            hidden = _relu(_affine(acc, mid, mid < MID, scale1, shift1))
            hidden = tl.where(inside[:, None], hidden, 0.0).to(out.dtype.element_ty)  # the 3x3 pads with zeros
            tl.store(slot + pixel[:, None] * MID + mid[None, :], hidden, mask=pixel[:, None] < HALO)
        tl.debug_barrier()

        corner = (rows // TILE_W * HALO_W + rows % TILE_W) * STRIDE
        acc = tl.zeros((BM, MID), tl.float32)
        for tap in range(9):
            shifted = corner + tap // 3 * HALO_W + tap % 3
            for c in range(0, MID, BK):
                a = tl.load(slot + shifted[:, None] * MID + (c + k)[None, :])
                acc = _dot(a, tl.load(w2 + mid[None, :] * (9 * MID) + (tap * MID + c + k)[:, None]), acc, "tf32")
        hidden = _relu(_affine(acc, mid, mid < MID, scale2, shift2))
        hidden = hidden.to(out.dtype.element_ty)

        row, column = p0 + rows // TILE_W, q0 + rows % TILE_W
        inside = (row < p) & (column < q)
        at = (row * STRIDE).to(tl.int64) * x_h + (column * STRIDE).to(tl.int64) * x_w
        to = out + ((n.to(tl.int64) * p + row) * q + column)[:, None] * COUT
        for first in range(0, COUT, BN):
            o = first + part
            y = _dot(hidden, tl.load(w3 + o[None, :] * MID + mid[:, None]), tl.zeros((BM, BN), tl.float32), "tf32")
            y = _affine(y, o, o < COUT, scale3, shift3)
            if PROJECT:
                projected = tl.zeros((BM, BN), tl.float32)
                for c in range(0, CIN, BK):
                    a = tl.load(image + at[:, None] + (c + k)[None, :], mask=inside[:, None], other=0.0)
                    projected = _dot(a, tl.load(wp + o[None, :] * CIN + (c + k)[:, None]), projected, "tf32")
                y += _affine(projected, o, o < COUT, scalep, shiftp)
            else:
                y += tl.load(image + at[:, None] + o[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
            tl.store(to + o[None, :], _relu(y).to(out.dtype.element_ty), mask=inside[:, None])
        tl.debug_barrier()  # everybody has read the slot that the next tile fills
