"""The Triton kernels of conv_bn_act. All compute in NHWC, accumulate in float32 and round once.

An output is a matrix [M, K] of M = N·P·Q pixels; the weight is one of [K, R·S·C], its reduction running over taps
first and channels second. Launching them, and choosing their constants, is :mod:`.triton`'s work.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc"

import triton
import triton.language as tl

from resnet_fused import backends

INTERPRETING = tl.constexpr(backends.interpreting())


@triton.jit
def _affine(acc, k, k_ok, scale, shift):
    """Batch norm of a tile [BM, BN] whose columns are the output channels k, from float32 vectors made beforehand."""
    scale_k = tl.load(scale + k, mask=k_ok, other=0.0)
    shift_k = tl.load(shift + k, mask=k_ok, other=0.0)
    return acc * scale_k[None, :] + shift_k[None, :]


@triton.jit
def _relu(y):
    return tl.where(y < 0, 0.0, y)  # a comparison with NaN is false: NaN stays


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    if INTERPRETING:  # Triton's interpreter multiplies bfloat16 as if its bits were integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _swizzle(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Tiles in columns of GROUP_M rows, so that those running together share weights and pixels in L2."""
    per_group = GROUP_M * tiles_n
    first = tile // per_group * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    return first + tile % per_group % height, tile % per_group // height


@triton.jit
def conv_pointer(
    x, weight, residual, out, workspace, scale, shift,
    M, C, K, H, W, P, Q, groups, x_n, x_h, x_w, weight_k,
    stride_h, stride_w, pad_h, pad_w, dil_h, dil_w, steps_per_split,
    S: tl.constexpr, TAPS: tl.constexpr, MODE: tl.constexpr, RELU: tl.constexpr, SPLIT: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Implicit GEMM by pointer arithmetic. C and K count the channels of one group; x_* are x's strides, its channels
    lie next to each other. MODE: "rows", x is a matrix of pixels (1x1, stride 1, no padding); "taps", each step reads
    BK channels of one tap; "flat", each step reads BK of the TAPS·C terms, for groups of few channels.

    Grid: (tiles, splits). SPLIT writes float32 partial sums to workspace [splits, M, groups·K] for conv_reduce.
    """
    tiles_k = tl.cdiv(K, BN)
    pid_m, pid_n = _swizzle(tl.program_id(0), tl.cdiv(M, BM), tiles_k * groups, GROUP_M)
    group = pid_n // tiles_k
    if WIDE:
        pid_m = pid_m.to(tl.int64)
        group = group.to(tl.int64)
        x_n, x_h, x_w = tl.cast(x_n, tl.int64), tl.cast(x_h, tl.int64), tl.cast(x_w, tl.int64)
        weight_k = tl.cast(weight_k, tl.int64)
    m = pid_m * BM + tl.arange(0, BM)
    m_ok = m < M
    k = pid_n % tiles_k * BN + tl.arange(0, BN)  # within the group
    k_ok = k < K
    kk = group * K + k  # [BN], the output channel
    if MODE == "rows":
        x_row = m * x_w  # [BM]
        steps = tl.cdiv(C, BK)
    else:
        h0 = m // Q % P * stride_h - pad_h
        w0 = m % Q * stride_w - pad_w
        x_row = m // Q // P * x_n + h0 * x_h + w0 * x_w
        blocks_c = tl.cdiv(C, BK)
        steps = blocks_c * TAPS if MODE == "taps" else tl.cdiv(C * TAPS, BK)
    x_row += group * C
    w_row = kk * weight_k

    begin = tl.program_id(1) * steps_per_split
    acc = tl.zeros((BM, BN), tl.float32)
    for step in range(begin, tl.minimum(begin + steps_per_split, steps)):
        if MODE == "rows":
            red = step * BK + tl.arange(0, BK)  # [BK], the term of the reduction
            red_ok = red < C
            x_ptr = x + x_row[:, None] + red[None, :]
            x_ok = m_ok[:, None] & red_ok[None, :]
        elif MODE == "taps":
            tap = step // blocks_c
            c = step % blocks_c * BK + tl.arange(0, BK)
            red = tap * C + c
            red_ok = c < C
            down = tap // S * dil_h
            right = tap % S * dil_w
            h, w = h0 + down, w0 + right
            inside = m_ok & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            x_ptr = x + (x_row + down * x_h + right * x_w)[:, None] + c[None, :]
            x_ok = inside[:, None] & red_ok[None, :]
        else:
            red = step * BK + tl.arange(0, BK)
            red_ok = red < C * TAPS
            tap = red // C
            down = tap // S * dil_h
            right = tap % S * dil_w
            h, w = h0[:, None] + down[None, :], w0[:, None] + right[None, :]
            x_ptr = x + x_row[:, None] + (down * x_h + right * x_w + red % C)[None, :]
            x_ok = m_ok[:, None] & red_ok[None, :] & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        a = tl.load(x_ptr, mask=x_ok, other=0.0)  # [BM, BK]
        b = tl.load(weight + w_row[None, :] + red[:, None], mask=k_ok[None, :] & red_ok[:, None], other=0.0)
        acc = _dot(a, b, acc, PRECISION)

    channels = groups * K
    if SPLIT:
        row = tl.program_id(1).to(m.dtype) * M + m
        tl.store(workspace + row[:, None] * channels + kk[None, :], acc, mask=m_ok[:, None] & k_ok[None, :])
    else:
        y = _affine(acc, kk, k_ok, scale, shift)
        at = m[:, None] * channels + kk[None, :]
        ok = m_ok[:, None] & k_ok[None, :]
        if residual is not None:
            y += tl.load(residual + at, mask=ok, other=0.0).to(tl.float32)
        if RELU:
            y = _relu(y)
        tl.store(out + at, y.to(out.dtype.element_ty), mask=ok)


@triton.jit
def conv_reduce(
    workspace, residual, out, scale, shift, M, K,
    SPLITS: tl.constexpr, RELU: tl.constexpr, WIDE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Add the partial sums [SPLITS, M, K] in order, then the epilogue. Grid: (tiles of M, tiles of K)."""
    pid_m = tl.program_id(0)
    if WIDE:
        pid_m = pid_m.to(tl.int64)
    m = pid_m * BM + tl.arange(0, BM)
    k = tl.program_id(1) * BN + tl.arange(0, BN)
    k_ok = k < K
    ok = (m < M)[:, None] & k_ok[None, :]
    at = m[:, None] * K + k[None, :]
    y = tl.zeros((BM, BN), tl.float32)
    for split in tl.static_range(SPLITS):
        row = m + split * M
        y += tl.load(workspace + row[:, None] * K + k[None, :], mask=ok, other=0.0)
    y = _affine(y, k, k_ok, scale, shift)
    if residual is not None:
        y += tl.load(residual + at, mask=ok, other=0.0).to(tl.float32)
    if RELU:
        y = _relu(y)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=ok)


@triton.constexpr_function
def _first_tap(parity, stride, pad, dil):
    """The first tap that falls on rows (or columns) of this parity: 0 or 1, or a tap beyond the filter."""
    if (parity + pad) % stride == 0:
        return 0
    return 1 if (dil - pad - parity) % stride == 0 else 1 << 20


@triton.jit
def _convolve(
    acc, x, weight, n0, p0, q0, k0, C,
    PH: tl.constexpr, PW: tl.constexpr, R: tl.constexpr, S: tl.constexpr, STRIDE: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Add to acc the taps that read the rows of parity PH and the columns of parity PW: those x describes."""
    R0: tl.constexpr = _first_tap(PH, STRIDE, PAD_H, DIL_H)
    S0: tl.constexpr = _first_tap(PW, STRIDE, PAD_W, DIL_W)
    R_STEP: tl.constexpr = STRIDE if DIL_H % STRIDE else 1
    S_STEP: tl.constexpr = STRIDE if DIL_W % STRIDE else 1
    if R0 < R and S0 < S:
        ROWS: tl.constexpr = (R - R0 + R_STEP - 1) // R_STEP
        COLS: tl.constexpr = (S - S0 + S_STEP - 1) // S_STEP
        blocks_c = tl.cdiv(C, BK)
        for step in tl.range(0, blocks_c * (ROWS * COLS)):
            tap = step // blocks_c
            c0 = step % blocks_c * BK
            r = R0 + tap // COLS * R_STEP
            s = S0 + tap % COLS * S_STEP
            # Exact: every r here has r·dilation − pad ≡ PH. Out of bounds reads zero: that is the padding.
            down = (r * DIL_H + (STRIDE * PAD_H - PAD_H - PH)) // STRIDE - PAD_H
            right = (s * DIL_W + (STRIDE * PAD_W - PAD_W - PW)) // STRIDE - PAD_W
            a = x.load([n0, p0 + down, q0 + right, c0]).reshape(BM, BK)
            b = weight.load([k0, r * S + s, c0]).reshape(BN, BK)
            acc = _dot(a, b.T, acc, PRECISION)
    return acc


@triton.jit
def _halves(acc, BM: tl.constexpr, BN: tl.constexpr):
    """The left and the right half of a tile's columns."""
    return acc.reshape(BM, 2, BN // 2).permute(0, 2, 1).split()


@triton.jit
def _finish(
    acc, n0, p0, q0, k0, residual, out, scale, shift, K,
    RELU: tl.constexpr, TN: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The epilogue of TN x TH x TW pixels by the BN channels from k0."""
    k = k0 + tl.arange(0, BN)
    if residual is not None:  # in this order: the other way round ptxas spills on compute capability 10.0
        addend = residual.load([n0, p0, q0, k0]).reshape(TN * TH * TW, BN).to(tl.float32)
    y = _affine(acc, k, k < K, scale, shift)
    if residual is not None:
        y += addend
    if RELU:
        y = _relu(y)
    out.store([n0, p0, q0, k0], y.to(out.dtype).reshape(TN, TH, TW, BN))


@triton.jit
def conv_descriptor(
    x00, x01, x10, x11, weight, residual, out, scale, shift,
    N, P, Q, C, K,
    R: tl.constexpr, S: tl.constexpr, STRIDE: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    RELU: tl.constexpr, PRECISION: tl.constexpr,
    TN: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Implicit GEMM by tensor descriptors. A tile is TN x TH x TW output pixels by BN channels; x_ij describes the
    rows of parity i and the columns of parity j (stride 1: x00 describes all). One image row of M pixels makes this
    a plain GEMM. residual and out are described in blocks of BN / PARTS channels: the epilogue takes the tile in that
    many parts, so that it fits in registers. Grid: as many programs as stay resident, each walking over tiles.
    """
    BM: tl.constexpr = TN * TH * TW
    tiles_q = tl.cdiv(Q, TW)
    tiles_p = tl.cdiv(P, TH)
    tiles_m = tl.cdiv(N, TN) * tiles_p * tiles_q
    tiles_k = tl.cdiv(K, BN)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_k, tl.num_programs(0)):
        tile_m, tile_k = _swizzle(tile, tiles_m, tiles_k, GROUP_M)
        q0 = tile_m % tiles_q * TW
        p0 = tile_m // tiles_q % tiles_p * TH
        n0 = tile_m // tiles_q // tiles_p * TN
        k0 = tile_k * BN
        acc = tl.zeros((BM, BN), tl.float32)
        acc = _convolve(acc, x00, weight, n0, p0, q0, k0, C, 0, 0,
                        R, S, STRIDE, PAD_H, PAD_W, DIL_H, DIL_W, PRECISION, BM, BN, BK)  # fmt: skip
        if STRIDE == 2:
            acc = _convolve(acc, x01, weight, n0, p0, q0, k0, C, 0, 1,
                            R, S, STRIDE, PAD_H, PAD_W, DIL_H, DIL_W, PRECISION, BM, BN, BK)  # fmt: skip
            acc = _convolve(acc, x10, weight, n0, p0, q0, k0, C, 1, 0,
                            R, S, STRIDE, PAD_H, PAD_W, DIL_H, DIL_W, PRECISION, BM, BN, BK)  # fmt: skip
            acc = _convolve(acc, x11, weight, n0, p0, q0, k0, C, 1, 1,
                            R, S, STRIDE, PAD_H, PAD_W, DIL_H, DIL_W, PRECISION, BM, BN, BK)  # fmt: skip
        if PARTS == 1:
            _finish(acc, n0, p0, q0, k0, residual, out, scale, shift, K, RELU, TN, TH, TW, BN)
        else:
            left, right = _halves(acc, BM, BN)
            if PARTS == 2:
                _finish(left, n0, p0, q0, k0, residual, out, scale, shift, K,
                        RELU, TN, TH, TW, BN // 2)  # fmt: skip
                _finish(right, n0, p0, q0, k0 + BN // 2, residual, out, scale, shift, K,
                        RELU, TN, TH, TW, BN // 2)  # fmt: skip
            else:
                one, two = _halves(left, BM, BN // 2)
                three, four = _halves(right, BM, BN // 2)
                _finish(one, n0, p0, q0, k0, residual, out, scale, shift, K,
                        RELU, TN, TH, TW, BN // 4)  # fmt: skip
                _finish(two, n0, p0, q0, k0 + BN // 4, residual, out, scale, shift, K,
                        RELU, TN, TH, TW, BN // 4)  # fmt: skip
                _finish(three, n0, p0, q0, k0 + BN // 2, residual, out, scale, shift, K,
                        RELU, TN, TH, TW, BN // 4)  # fmt: skip
                _finish(four, n0, p0, q0, k0 + BN // 4 * 3, residual, out, scale, shift, K,
                        RELU, TN, TH, TW, BN // 4)  # fmt: skip
