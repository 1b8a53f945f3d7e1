"""Launch choices of the Triton conv_bn_act: problem, then architecture, then config, each a small printable record.

Every choice comes from a static table, so a call never measures anything and may run inside a CUDA graph capture.
The tables and the cost below are reasoned, not measured: a tuner runs ``triton.configs(call)`` and keeps the best.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch


class Problem(NamedTuple):
    """What decides a launch choice. c and k count the channels of one group, p and q the output's rows, columns."""

    dtype: torch.dtype
    precision: str  # of float32 products: "ieee" or "tf32"
    n: int
    c: int
    k: int
    p: int
    q: int
    filter: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    rows: bool  # x is a matrix of pixels: 1x1, stride 1, no padding, one pixel stride throughout
    describable: bool  # the operands' addresses and strides suit tensor descriptors
    unit: int = 0  # elements that the window kernel reads at a time; 0: it does not serve this problem

    @property
    def m(self) -> int:
        return self.n * self.p * self.q

    @property
    def output(self) -> tuple[int, int, int, int]:
        """[N, P, Q, K] of all groups."""
        return self.n, self.p, self.q, self.k * self.groups

    @property
    def taps(self) -> int:
        return self.filter[0] * self.filter[1]


class Architecture(NamedTuple):
    """The device's facts for a launch choice."""

    capability: int  # 80, 90, 100
    processors: int
    shared_limit: int  # bytes that one block may use

    @property
    def descriptors(self) -> bool:
        return self.capability >= 90


_SHARED_LIMIT = {80: 166912, 87: 166912, 90: 232448, 100: 232448, 103: 232448}
_SHARED_LIMIT_ELSE = 101376


def shared_limit(capability: int) -> int:
    """Bytes of shared memory that one block may use, from the CUDA programming guide's table."""
    return _SHARED_LIMIT.get(capability, _SHARED_LIMIT_ELSE)


# Three processors: the persistent kernel's programs then walk over several tiles even on small tests.
INTERPRETER = Architecture(90, 3, shared_limit(90))


@functools.cache
def architecture(index: int) -> Architecture:
    """The architecture of CUDA device ``index``."""
    properties = torch.cuda.get_device_properties(index)
    capability = properties.major * 10 + properties.minor
    return Architecture(capability, properties.multi_processor_count, shared_limit(capability))


class ConvConfig(NamedTuple):
    """The constants of one launch. A tile is block_m output pixels by block_n channels, reduced block_k at a time.

    split_k > 1 cuts the reduction among that many programs and adds their float32 sums in a second kernel, in order.
    blocks_per_sm sizes the grid of the descriptor kernel, whose programs stay resident.
    """

    kernel: str  # "pointer", "descriptor" or "window"
    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    split_k: int = 1
    blocks_per_sm: int = 1
    group_m: int = 8
    below: int = 1000  # the first compute capability on which ptxas spills

    def __str__(self) -> str:
        split = f"-split{self.split_k}" if self.split_k > 1 else ""
        return f"{self.kernel}-{self.block_m}x{self.block_n}x{self.block_k}-w{self.warps}s{self.stages}{split}"

    @property
    def parts(self) -> int:
        """How many parts the descriptor kernel's epilogue takes a tile in: 32 accumulators per thread at a time.

        With more, ptxas spills on compute capability 10.0, where a thread holds a whole row of the tile.
        """
        return max(1, self.block_m * self.block_n // (32 * self.warps * 32))

    def shared_bytes(self, itemsize: int) -> int:
        """Shared memory of the pipelined operands, a lower bound on what the kernel takes."""
        return self.stages * (self.block_m + self.block_n) * self.block_k * itemsize


# Tiles are at least 64 pixels by 4 warps, the least that wgmma computes; fewer pixels are padded. A block_k of 64
# half-precision (32 single) terms is 128 bytes, one swizzled row of shared memory.
POINTER_HALF = (
    ConvConfig("pointer", 128, 128, 64, 8, 3),  # the general tile
    ConvConfig("pointer", 128, 64, 64, 4, 3),  # 64 output channels
    ConvConfig("pointer", 256, 64, 32, 8, 3),  # 64 output channels, many pixels
    ConvConfig("pointer", 64, 128, 64, 4, 3),  # few pixels, many channels
    ConvConfig("pointer", 64, 64, 64, 4, 4),  # twice the tiles, when the large ones leave processors idle
    ConvConfig("pointer", 64, 32, 64, 4, 4),  # fewer still
    ConvConfig("pointer", 128, 32, 32, 4, 4),  # groups of 32
    ConvConfig("pointer", 128, 16, 32, 4, 4),  # groups of up to 16, depthwise
    ConvConfig("pointer", 64, 64, 64, 4, 4, split_k=2),  # batch 1: the reduction is all there is to share out
    ConvConfig("pointer", 64, 64, 64, 4, 4, split_k=4),
    ConvConfig("pointer", 64, 64, 64, 4, 4, split_k=8),
    ConvConfig("pointer", 64, 32, 64, 4, 4, split_k=8),
    ConvConfig("pointer", 64, 64, 64, 4, 4, split_k=16),
)
POINTER_TF32 = (
    ConvConfig("pointer", 128, 64, 32, 8, 3),
    ConvConfig("pointer", 64, 64, 32, 4, 3),
    ConvConfig("pointer", 64, 32, 32, 4, 3),
    ConvConfig("pointer", 64, 16, 32, 4, 3),
    ConvConfig("pointer", 64, 64, 32, 4, 3, split_k=4),
    ConvConfig("pointer", 64, 32, 32, 4, 3, split_k=8),
    ConvConfig("pointer", 64, 64, 32, 4, 3, split_k=16),
)
# Without TF32 the plain cores multiply, from registers: with a block_k of 32 ptxas spills on compute capability 9.0.
POINTER_IEEE = (
    ConvConfig("pointer", 128, 64, 16, 8, 3),
    ConvConfig("pointer", 64, 64, 16, 4, 3),
    ConvConfig("pointer", 64, 32, 16, 4, 3, below=100),
    ConvConfig("pointer", 64, 16, 16, 4, 3),
    ConvConfig("pointer", 64, 64, 16, 4, 3, split_k=4, below=90),
    ConvConfig("pointer", 64, 32, 16, 4, 3, split_k=8, below=100),
    ConvConfig("pointer", 64, 64, 16, 4, 3, split_k=16, below=100),
)
DESCRIPTOR_HALF = (
    ConvConfig("descriptor", 128, 256, 64, 8, 3, below=100),  # the most arithmetic per byte of shared memory
    ConvConfig("descriptor", 128, 128, 64, 8, 4),  # the general tile
    ConvConfig("descriptor", 256, 64, 64, 8, 4),  # 64 output channels, many pixels
    ConvConfig("descriptor", 128, 64, 64, 4, 4, blocks_per_sm=2),  # 64 output channels: one epilogue hides another
    ConvConfig("descriptor", 64, 128, 64, 4, 4, blocks_per_sm=2),  # few pixels
    ConvConfig("descriptor", 64, 64, 64, 4, 4, blocks_per_sm=2),
    ConvConfig("descriptor", 128, 32, 64, 4, 4, blocks_per_sm=2),
)
DESCRIPTOR_TF32 = (
    ConvConfig("descriptor", 128, 128, 32, 8, 4, below=100),
    ConvConfig("descriptor", 128, 64, 32, 4, 4, blocks_per_sm=2),
    ConvConfig("descriptor", 64, 64, 32, 4, 4, blocks_per_sm=2),
)
# Few input channels, as in a network's stem: a reduction of 168 terms for a 7x7 filter. Registers bound the tile: on
# compute capability 9.0 the first config takes 128 of them, two blocks to a multiprocessor.
WINDOW_HALF = (
    ConvConfig("window", 128, 64, 32, 8, 4),  # the stem of a ResNet
    ConvConfig("window", 128, 64, 64, 8, 3),  # fewer steps, one block
    ConvConfig("window", 64, 64, 64, 4, 3),  # few pixels
    ConvConfig("window", 64, 32, 64, 4, 3),  # few output channels
)
WINDOW_TF32 = (
    ConvConfig("window", 128, 64, 32, 8, 3),
    ConvConfig("window", 64, 32, 32, 4, 3),
)
WINDOW_IEEE = (
    ConvConfig("window", 64, 64, 16, 4, 3),
    ConvConfig("window", 64, 32, 16, 4, 3),
)
WINDOW_CHANNELS = 16  # from here on a step of one tap is filled by its channels


def windowed(filter_size: tuple[int, int], channels: int, dilation: tuple[int, int], groups: int) -> bool:
    """Whether the window kernel is made for such filters: rows of several taps side by side, few channels."""
    return filter_size[1] > 1 and dilation[1] == 1 and groups == 1 and 0 < channels < WINDOW_CHANNELS


def shipped(dtype: torch.dtype, precision: str = "tf32") -> tuple[ConvConfig, ...]:
    """Every config that serves ``dtype``; ``precision`` matters for float32 alone."""
    if dtype != torch.float32:
        return POINTER_HALF + DESCRIPTOR_HALF + WINDOW_HALF
    return POINTER_TF32 + DESCRIPTOR_TF32 + WINDOW_TF32 if precision == "tf32" else POINTER_IEEE + WINDOW_IEEE


def fits(config: ConvConfig, dtype: torch.dtype, arch: Architecture) -> bool:
    """Whether the architecture can run this config at all."""
    if config.kernel == "descriptor" and not arch.descriptors:
        return False
    return arch.capability < config.below and config.shared_bytes(dtype.itemsize) <= arch.shared_limit


def mode(problem: Problem, config: ConvConfig) -> str:
    """How the pointer kernel walks the reduction; see conv_pointer."""
    if problem.rows:
        return "rows"
    return "flat" if problem.taps > 1 and problem.c < config.block_k else "taps"


def steps(problem: Problem, config: ConvConfig) -> int:
    """How many blocks of the reduction a tile goes through."""
    if config.kernel == "pointer" and mode(problem, config) == "flat":
        return math.ceil(problem.c * problem.taps / config.block_k)
    if config.kernel == "window":  # filter rows are padded to a multiple of 8 terms
        return math.ceil(problem.filter[0] * math.ceil(problem.filter[1] * problem.c / 8) * 8 / config.block_k)
    return math.ceil(problem.c / config.block_k) * problem.taps


@functools.lru_cache(maxsize=4096)
def pixel_tile(n: int, p: int, q: int, block_m: int) -> tuple[int, int, int]:
    """Images, rows and columns of a tile of ``block_m`` pixels: the fewest tiles, then the squarest.

    28x28 pixels, say, are cut into 4x4 over eight images with nothing left over.
    """
    powers = [1 << i for i in range(block_m.bit_length())]
    tiles = [(block_m // (h * w), h, w) for h in powers for w in powers if h * w <= block_m]

    def rank(tile: tuple[int, int, int]) -> tuple[int, int, int]:
        count = math.ceil(n / tile[0]) * math.ceil(p / tile[1]) * math.ceil(q / tile[2])
        return count, -min(tile[1:]), -tile[2]

    return min(tiles, key=rank)


def tile_of(problem: Problem, config: ConvConfig) -> tuple[int, int, int]:
    """Images, rows and columns of the descriptor kernel's tile; a matrix of pixels is one image of one row."""
    if problem.rows:
        return 1, 1, config.block_m
    return pixel_tile(problem.n, problem.p, problem.q, config.block_m)


def tiles(problem: Problem, config: ConvConfig) -> int:
    """How many output tiles there are, over all groups."""
    if config.kernel != "descriptor" or problem.rows:
        pixels = math.ceil(problem.m / config.block_m)
    else:
        tn, th, tw = tile_of(problem, config)
        pixels = math.ceil(problem.n / tn) * math.ceil(problem.p / th) * math.ceil(problem.q / tw)
    return pixels * math.ceil(problem.k / config.block_n) * problem.groups


def valid(problem: Problem, arch: Architecture) -> tuple[ConvConfig, ...]:
    """Every shipped config that computes this problem on this architecture."""
    return tuple(c for c in shipped(problem.dtype, problem.precision) if _serves(c, problem, arch))


def _serves(config: ConvConfig, problem: Problem, arch: Architecture) -> bool:
    if not fits(config, problem.dtype, arch):
        return False
    if config.kernel == "descriptor":
        return problem.describable
    if config.kernel == "window":
        return problem.unit > 0
    return config.split_k <= steps(problem, config)


def cost(problem: Problem, config: ConvConfig, arch: Architecture) -> float:
    """Multiply-adds, and bytes counted as such, that fall to the busiest processor. A guess, for ranking only."""
    # A step multiplies bm·bn·bk and brings in (bm + bn)·bk terms: tensor cores multiply some 64 pairs meanwhile.
    step: float = config.block_k * (config.block_m * config.block_n + 64 * (config.block_m + config.block_n))
    if config.kernel == "pointer" and arch.descriptors:
        step *= 1.5  # address arithmetic, which descriptors spare
    if config.kernel == "pointer" and mode(problem, config) == "flat":
        step *= 2  # and a load for every element
    epilogue = 256 * config.block_m * config.block_n
    waves = math.ceil(tiles(problem, config) * config.split_k / arch.processors)
    work: float = waves * (math.ceil(steps(problem, config) / config.split_k) * step + epilogue)
    if config.split_k > 1:  # the sums go through memory, and a second launch is some 4 million multiply-adds long
        work += 4e6 + 128 * (2 * config.split_k + 1) * problem.m * problem.k * problem.groups / arch.processors
    return work


@functools.lru_cache(maxsize=4096)
def choose(problem: Problem, arch: Architecture) -> ConvConfig:
    """The default config of a call: the cheapest valid one."""
    return min(valid(problem, arch), key=lambda config: cost(problem, config, arch))
