"""How the Triton kernel of a whole bottleneck is launched: plain data, without Triton."""

from __future__ import annotations

from typing import NamedTuple


class Config(NamedTuple):
    """tile: output pixels of a program, rows and columns. block_n: output channels of the last convolution at a time.
    block_k: channels of a step."""

    tile: tuple[int, int]
    block_n: int
    block_k: int = 64
    warps: int = 8
    stages: int = 3


def config(mid: int, stride: int, capability: int) -> Config:
    """The config for a compute capability like 90.

    The largest tile that does not spill, as compiled for 8.0, 9.0 and 10.0: with stride 1 that is 8x16 on 9.0, whose
    products read their operands from shared memory. Elsewhere 8x16 spills with 64 output channels at a time where mid
    is 64, and with any where it is 128; on 10.0 a projection spills with 32 as well.
    """
    if stride == 2 or (mid == 128 and capability // 10 != 9) or capability >= 100:
        return Config((8, 8), 64)
    return Config((8, 16), 64 if capability // 10 == 9 else 32)


def constants(cin: int, mid: int, stride: int, project: bool, config: Config) -> dict[str, int | bool]:
    """The kernel's constexpr arguments."""
    halo = [(side - 1) * stride + 3 for side in config.tile]
    return {
        "CIN": cin, "MID": mid, "STRIDE": stride, "PROJECT": project, "BK": config.block_k, "BN": config.block_n,
        "TILE_H": config.tile[0], "TILE_W": config.tile[1], "HALO_H": halo[0], "HALO_W": halo[1],
    }  # fmt: skip
