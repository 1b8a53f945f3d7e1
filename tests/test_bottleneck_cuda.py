"""The whole-block CUDA kernels: which takes which block, the account of bytes and FLOPs, numbers where there is a GPU.

Without a GPU the kernels themselves are run by tests/simt.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from resnet_fused import backends, extension, functional, fuse, report, roofline
from resnet_fused.fusion import choice
from resnet_fused.modules.blocks import FusedBottleneck
from resnet_fused.ops import block
from resnet_fused.ops.block import BlockCall
from resnet_fused.ops.bottleneck import cuda
from resnet_fused.ops.conv_bn_act import reference
from resnet_fused.ops.convbn import ConvBN
from resnet_fused.roofline import whole_block
from resnet_fused.testing.budget import assert_within_budget
from resnet_fused.testing.cases import ConvCase

BF16 = torch.bfloat16
SM80, SM90, SM120 = 163 << 10, 227 << 10, 99 << 10  # bytes of shared memory that a block may have


@pytest.fixture(scope="module", autouse=True)
def _library() -> None:
    if extension.missing():
        pytest.skip(str(extension.missing()))


def make(cin: int, mid: int, project: bool, stride: int = 1, *, n: int = 1, h: int = 5, w: int = 6, groups: int = 1,
         dtype: torch.dtype = BF16, device: str = "cpu") -> BlockCall:  # fmt: skip
    def conv(c: int, k: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> ConvBN:
        case = ConvCase(1, c, 1, 1, k, kernel=kernel, stride=stride, padding=kernel // 2, groups=groups)
        return case.make(dtype, device, seed=c + k + kernel).conv

    convs = (conv(cin, mid), conv(mid, mid, 3, stride, groups), conv(mid, 4 * mid))
    x = torch.randn(n, cin, h, w).to(device, dtype).contiguous(memory_format=torch.channels_last)
    return BlockCall(x, convs, conv(cin, 4 * mid, stride=stride) if project else None, None)


@pytest.mark.parametrize(("name", "cin", "mid", "stride", "project", "side"), whole_block.BLOCKS)
def test_the_plan_takes_the_quickest_by_the_account(
    name: str, cin: int, mid: int, stride: int, project: bool, side: int
) -> None:
    """The plan counts every halo in full, so that of two kernels that are nearly equal it may take the other one. It
    leaves out instructions, which seldom rank two kernels differently."""

    def slowest(kernel: dict[str, Any], n: int) -> float:
        times = whole_block.account(kernel, n, side, side).times()
        return max(seconds for unit, seconds in times.items() if unit != "issue")

    def predicted(kernel: dict[str, Any], n: int) -> float:
        return whole_block.account(kernel, n, side, side).predicted()[0]

    taken, slower = set(), []
    for n in (1, 2, 3, 8, 24, 32, 128, 256):
        kernel = whole_block.chosen(cin, mid, stride, project, n, side)
        others = whole_block.kernels(cin, mid, stride, project)
        assert slowest(kernel, n) <= 1.06 * min(slowest(other, n) for other in others)
        slower.append(predicted(kernel, n) / min(predicted(other, n) for other in others))
        taken.add(kernel["name"])
    assert len(taken) > 1, "few tiles and many take the same kernel"
    assert max(slower) < 1.2 and sorted(slower)[-2] < 1.06


def test_other_blocks_are_refused() -> None:
    channels = "no whole-block kernel has these channels, stride and shortcut"
    convs = "its whole-block kernels are for 1x1, 3x3 and 1x1 convolutions without groups or dilation"
    for call, reason in (
        (make(1024, 256, False), channels),
        (make(256, 64, False, groups=32), convs),
        (make(64, 64, True, 2), channels),
    ):
        assert cuda.kernel_for(call, SM90, 132) == ("", reason)
    wide = make(256, 64, False)
    wide = wide._replace(convs=(make(256, 128, False).convs[0], *wide.convs[1:]))
    assert cuda.kernel_for(wide, SM90, 132) == ("", channels)
    projected = make(256, 128, True, 2)
    projected = projected._replace(shortcut=make(256, 128, True).shortcut)
    assert cuda.kernel_for(projected, SM90, 132)[1] == "the shortcut is not a 1x1 convolution with the block's stride"


@pytest.mark.minimum
def test_on_the_cpu_it_says_why_not() -> None:
    assert cuda.supports(make(256, 64, False)) == "its kernels run on CUDA devices, x is on cpu"
    assert not block.one_kernel("bottleneck", make(256, 64, False), "cuda")


def test_a_report_names_whole_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refusal(op: str, backend: str, call: BlockCall) -> str | None:
        if op == "bottleneck" and backend == "cuda":
            return cuda.kernel_for(call, SM90, 132)[1]
        return None if op == "conv_bn_act" else "no"

    for module in (block.backends, choice.backends):
        monkeypatch.setattr(module, "refusal", refusal)
    downsample = nn.Sequential(nn.Conv2d(64, 256, 1, bias=False), nn.BatchNorm2d(256))
    model = nn.Sequential(
        FusedBottleneck(64, 64, downsample=downsample), FusedBottleneck(256, 64), FusedBottleneck(1024, 256)
    )
    found = {e.name: e.backend for e in report(fuse(model.eval().to(BF16), backend="cuda"))}
    assert found == {"0": "cuda (whole block)", "1": "cuda (whole block)", "2": "cuda"}


ROOT = Path(__file__).parents[1]
README = (ROOT / "csrc" / "bottleneck" / "README.md").read_text()


def table(corner: str) -> dict[str, dict[str, str]]:
    """A table of the page, by the corner of its head: for each column the row's name and the cell."""
    lines = README[README.index(f"| {corner} |") :].split("\n\n")[0].splitlines()
    head, _, *body = [[cell.strip(" `*") for cell in line.strip("|").split("|")] for line in lines]
    return {name: {row[0]: row[i] for row in body} for i, name in enumerate(head) if i}


def test_the_page_shows_the_map_of_shared_memory() -> None:
    for name, cells in table("region").items():
        row = rows()[f"bf16_{name}"]
        *regions, end = cells.values()
        assert int(end) == row["shared"]
        assert [cell.split(",")[0] for cell in regions] == [
            str(at) if row["project"] or i not in (3, 7) else "" for i, at in enumerate(row["regions"])
        ]
        weights, x = (cell.partition(", ")[2].split() for cell in regions[4:6])
        slots, pixels = int(x[0]), int(x[2])
        assert weights == (["all", str(row["steps"])] if row["resident"] else ["ring", "of", str(row["template"][7])])
        assert slots == row["template"][8] and slots * pixels * 128 == row["regions"][6] - row["regions"][5]


def test_the_page_shows_each_kernel() -> None:
    shared = table("kernel (bf16)")["shared, KiB"]
    expected = {name: f"{row['shared'] / 1024:.1f}" for name, row in rows().items() if row["element"] == "bf16"}
    assert {f"bf16_{name}": cell for name, cell in shared.items()} == expected


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(("limit", "column"), [(SM90, "sm_90, sm_100"), (SM80, "sm_80"), (SM120, "99 KiB")])
def test_each_architecture_takes_what_the_page_shows(limit: int, column: str, dtype: torch.dtype) -> None:
    half = "bf16" if dtype == BF16 else "fp16"
    for problem, name in table("block")[column].items():
        mid, cin = (int(part.split()[1]) for part in problem.split(", ")[:2])
        side, stride = 28 if cin == 512 else 56, 2 if "stride 2" in problem else 1
        call = make(cin, mid, "projection" in problem, stride, n=8, h=side, w=side, dtype=dtype)
        if name == "refused":
            assert cuda.kernel_for(call, limit, 1) == ("", "this device's shared memory does not hold the block")
        else:
            assert cuda.kernel_for(call, limit, 1) == (f"{half}_{name}", None)


def rows() -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in extension.module().bottleneck_kernels()}


@pytest.mark.parametrize(("name", "cin", "mid", "stride", "project", "side"), whole_block.BLOCKS)
def test_the_account_agrees_with_the_roofline(
    name: str, cin: int, mid: int, stride: int, project: bool, side: int
) -> None:
    """What must cross main memory and what must be computed is the block's roofline, counted another way."""
    for row in whole_block.kernels(cin, mid, stride, project):
        counts = roofline.count(whole_block._module(row), (3, cin, side, side))
        (piece,) = counts["block"].pieces
        account = whole_block.account(row, 3, side, side)
        assert (account.x_bytes, account.out_bytes) == (2 * piece.reads, 2 * piece.writes)
        assert account.parameter_bytes == 2 * piece.weights
        assert account.useful_flops == piece.flops
        assert max(account.times().values()) > counts["block"].bound(roofline.H200, BF16).seconds


def test_the_account_of_a_tile_by_hand() -> None:
    """A full tile and a ragged one, stride 2: x under 7x7 output pixels is 15x15, here of a 13x16 image."""
    row = rows()["bf16_mid128_c256_stride2_small"]
    account = whole_block.account(row, 1, 13, 16)
    assert (account.tiles, account.blocks) == (2, 2)
    assert account.halo_bytes == 2 * 256 * 13 * (14 + 3)  # columns 0 to 13 and 13 to 15
    assert account.again_bytes == 2 * 256 * 7 * 8
    assert account.weight_bytes == 2 * 50 * 128 * 64 * 2
    assert account.flops == 2 * 2 * (2 * 128 * 256 * 128 + 64 * (9 * 128 * 128 + 128 * 512 + 256 * 512))
    assert account.out_bytes == 2 * 512 * 7 * 8
    step = 8 * (32 * 128 + 64 * 128)  # each of the eight warps: 32 of 128 halo pixels, 64 of 128 channels of weights
    rest = 8 * (16 * 128 + 64 * 128)
    landed = account.halo_bytes + account.weight_bytes + account.again_bytes + 2 * 2 * (225 + 64) * 128
    assert account.shared_bytes == 2 * (2 * 4 * step + (9 * 2 + 4 * 2 + 4 * 4) * rest) + landed


def test_the_notes_show_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert whole_block.main([]) == 0
    notes = (ROOT / "bench" / "NOTES.md").read_text()
    assert [line for line in capsys.readouterr().out.splitlines() if line not in notes] == []


def test_the_triton_contender_by_hand() -> None:
    moved = whole_block.contender_l2_bytes(256, 64, 1, False, 1, 56, 56)
    tile = (90 + 64 + 136 + 9 * 16 + 64) * 1024 + 180 * 128  # x, residual, weights, slot, out; the slot is written
    assert moved == 28 * tile
    near = whole_block.contender_l2_bytes(256, 64, 1, False, 1, 56, 56, slot_in_l1=True)
    assert moved - near == 28 * 9 * 16 * 1024


def test_resident_weights_are_read_once_by_each_block() -> None:
    row = rows()["bf16_mid64_c256_resident"]
    account = whole_block.account(row, 256, 56, 56)
    assert account.blocks == 132 and account.weight_bytes == 132 * 136 * 1024
    streamed = whole_block.account(rows()["bf16_mid64_c256"], 256, 56, 56)
    assert streamed.weight_bytes == 7168 * 136 * 1024 and streamed.flops == account.flops


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(
    "shape",
    [(256, 64, False), (64, 64, True), (256, 64, True), (512, 128, False), (256, 128, True), (256, 128, True, 2)],
)
@pytest.mark.parametrize("size", [(1, 1, 1), (2, 15, 17), (3, 56, 56)], ids=str)
@pytest.mark.gpu
def test_numbers_on_a_gpu(size: tuple[int, int, int], shape: tuple[Any, ...], dtype: torch.dtype) -> None:
    n, h, w = size
    call = make(*shape, n=n, h=h, w=w, dtype=dtype, device="cuda")
    if cuda.supports(call) is not None:
        limit = torch.cuda.get_device_properties(call.x.device).shared_memory_per_block_optin
        assert "shared memory" in str(cuda.supports(call)) and limit < SM80, "this device has room for every block"
        return

    def change(conv: ConvBN) -> ConvBN:
        return ConvBN(*[None if t is None else t.double() for t in conv[:6]], *conv[6:])  # type: ignore[arg-type]

    wide = BlockCall(call.x.double(), tuple(map(change, call.convs)), call.shortcut and change(call.shortcut), None)
    exact, want = block.run_chain(wide, reference.run), block.run_chain(call, reference.run)
    for config in cuda.configs(call):
        assert_within_budget(cuda.run(call, config), want, exact)
    for x in (call.x, call.x.contiguous()):  # dense, and copied first
        out: Tensor = functional.bottleneck(x, *call.convs, call.shortcut, backend="cuda")
        assert_within_budget(out, want, exact)
    assert backends.refusal("bottleneck", "cuda", call) is None


def test_the_compiled_op_takes_what_the_public_one_does() -> None:
    if extension.missing(cuda=True):
        pytest.skip(str(extension.missing(cuda=True)))
    public = torch.ops.resnet_fused.bottleneck.default._schema.arguments
    compiled = torch.ops.resnet_fused_cuda.bottleneck.default._schema.arguments
    assert [(a.name, str(a.type)) for a in compiled[:-1]] == [(a.name, str(a.type)) for a in public[:-1]]
    assert (compiled[-1].name, compiled[-1].default_value) == ("kernel", "")
    with pytest.raises(NotImplementedError):  # it is registered for CUDA alone
        cuda.run(make(256, 64, False))
