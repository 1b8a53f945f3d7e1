"""A fused model in what reads and rearranges parameters: files, pruning, flat vectors, parametrizations, sharding."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_networks import blocks_of, convs_of, images, network
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, parametrizations, parametrize, prune, vector_to_parameters
from twins import Look, Twins

import resnet_fused as rf

pytestmark = [
    pytest.mark.waits,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

LOOKS = [Look(), Look("grad"), Look("inference"), Look("no_grad", True)]
X, Y = images(2, 8), torch.tensor([1, 2])


def facts(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    """What a tool may rely on, of each parameter and buffer."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {n: (id(t), t.stride(), t.data_ptr(), t._version, t.dtype, t.requires_grad) for n, t in tensors}


@pytest.mark.parametrize("generic", [False, True])
@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_fuse_leaves_every_tensor_alone(kind: str, generic: bool) -> None:
    """Object, strides, memory and version; so does predicting, and unfuse."""
    model = network(kind)
    before = facts(model)
    rf.fuse_(model, generic=generic)
    assert facts(model) == before
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for _ in range(3):
                model(X)
    assert facts(model) == before
    rf.unfuse(model, inplace=True)
    assert facts(model) == before


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_copy_has_the_strides_of_its_source(layout: torch.memory_format) -> None:
    model = network("bottleneck").to(memory_format=layout)
    fused = rf.fuse(model)
    strides = [p.stride() for p in model.parameters()]
    assert [p.stride() for p in fused.parameters()] == strides
    assert [p.stride() for p in rf.unfuse(fused).parameters()] == strides
    assert [p.stride() for p in copy.deepcopy(fused).parameters()] == strides


Tool = Callable[[nn.Module], object]


def whole_weights(model: nn.Module) -> nn.Module:
    return model.layer1[0].conv1


def pruned(model: nn.Module) -> None:
    prune.l1_unstructured(whole_weights(model), "weight", 0.5)


def pruned_by_channels(model: nn.Module) -> None:
    prune.ln_structured(whole_weights(model), "weight", 0.25, n=2, dim=0)


def pruned_everywhere(model: nn.Module) -> None:
    prune.global_unstructured([(c, "weight") for c in convs_of(model)], prune.L1Unstructured, amount=0.3)


def pruned_for_good(model: nn.Module) -> None:
    pruned(model)
    prune.remove(whole_weights(model), "weight")


def written_by_vector(model: nn.Module) -> None:
    vector_to_parameters(parameters_to_vector(model.parameters()) * 0.8, model.parameters())


def trained_by_lbfgs(model: nn.Module) -> None:
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.05, max_iter=2)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), Y)
        loss.backward()
        return loss

    optimizer.step(closure)
    model.zero_grad()


def orthogonal(model: nn.Module) -> None:
    torch.manual_seed(3)
    for conv in convs_of(model):
        nn.init.orthogonal_(conv.weight)


def initialised(model: nn.Module) -> None:
    torch.manual_seed(3)
    for conv in convs_of(model):
        nn.init.kaiming_normal_(conv.weight, mode="fan_out")


def weight_norm(model: nn.Module) -> None:
    parametrizations.weight_norm(whole_weights(model))


def old_weight_norm(model: nn.Module) -> None:
    nn.utils.weight_norm(whole_weights(model))


def spectral_norm(model: nn.Module) -> None:
    torch.manual_seed(3)
    parametrizations.spectral_norm(whole_weights(model))


def old_spectral_norm(model: nn.Module) -> None:
    torch.manual_seed(3)
    nn.utils.spectral_norm(whole_weights(model))


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 0.5


def parametrized_norm(model: nn.Module) -> None:
    parametrize.register_parametrization(model.layer1[0].bn1, "weight", Halved())


def parametrized_and_back(model: nn.Module) -> None:
    parametrize.register_parametrization(whole_weights(model), "weight", Halved())
    parametrize.remove_parametrizations(whole_weights(model), "weight")


def orthogonal_parametrization(model: nn.Module) -> None:
    torch.manual_seed(3)
    parametrizations.orthogonal(whole_weights(model))


def normalised_rows(model: nn.Module) -> None:
    """As max-norm constraints are written: by a view of each filter as a row."""
    with torch.no_grad():
        for conv in convs_of(model):
            rows = conv.weight.view(conv.out_channels, -1)
            rows.div_(rows.norm(dim=1, keepdim=True).clamp_min(0.5))


def viewed_flat(model: nn.Module) -> None:
    for p in model.parameters():
        p.data.view(-1).mul_(0.9)


def clipped(model: nn.Module) -> None:
    nn.utils.clip_grads_with_norm_(model.parameters(), 1.0, torch.tensor(2.0))


def random_masks(model: nn.Module) -> None:
    torch.manual_seed(3)
    prune.random_unstructured(model.layer1[0].bn1, "weight", 0.5)


TOOLS = [
    pruned, pruned_by_channels, pruned_everywhere, pruned_for_good, written_by_vector, trained_by_lbfgs, orthogonal,
    initialised, weight_norm, old_weight_norm, spectral_norm, old_spectral_norm, parametrized_norm,
    parametrized_and_back, orthogonal_parametrization, normalised_rows, viewed_flat, clipped, random_masks,
]  # fmt: skip


@pytest.mark.parametrize("tool", TOOLS, ids=lambda f: f.__name__)
def test_a_tool_does_what_it_does_to_eager(tool: Tool) -> None:
    for look in LOOKS:
        twins = Twins("basic")
        twins.check(look)
        twins.do(lambda side: tool(side.model))
        twins.check(look)


@pytest.mark.parametrize("tool", [pruned, weight_norm, spectral_norm], ids=lambda f: f.__name__)
def test_a_parametrization_made_before(tool: Tool) -> None:
    eager, fused = network("basic"), network("basic")
    for model in (eager, fused):
        tool(model)
    rf.fuse_(fused)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(fused(X), eager(X))


def test_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import load_file, load_model, save_file, save_model

    eager = network("bottleneck")
    fused = rf.fuse(eager)
    save_file(fused.state_dict(), tmp_path / "state.safetensors")
    save_model(fused, str(tmp_path / "model.safetensors"))
    for name in ("state", "model"):
        found = load_file(tmp_path / f"{name}.safetensors")
        assert all(torch.equal(found[k], v) for k, v in eager.state_dict().items())
    other = rf.fuse(network("bottleneck", seed=5))
    with torch.no_grad():
        for _ in range(3):
            other(X)
        load_model(other, str(tmp_path / "model.safetensors"))
        torch.testing.assert_close(other(X), eager(X))


def test_numpy_and_files_of_memory(tmp_path: Path) -> None:
    """The bytes of a parameter are those of eager's."""
    eager = network("basic")
    fused = rf.fuse(eager)
    for ours, theirs in zip(fused.parameters(), eager.parameters(), strict=True):
        assert ours.detach().numpy().tobytes("A") == theirs.detach().numpy().tobytes("A")
        assert bytes(ours.untyped_storage()) == bytes(theirs.untyped_storage())


def flattened(model: nn.Module) -> Tensor:
    """Every parameter a view of one tensor, which is returned."""
    flat = parameters_to_vector(model.parameters()).detach().clone()
    at = 0
    for p in model.parameters():
        p.data = flat[at : at + p.numel()].view(p.shape)
        at += p.numel()
    return flat


def test_a_flat_buffer_stays_tied() -> None:
    """One write to the flat tensor reaches every parameter: after fuse, predictions, unfuse."""
    model = network("basic")
    flat = flattened(model)
    eager = copy.deepcopy(model)
    rf.fuse_(model)
    for stage in (lambda: None, lambda: rf.unfuse(model, inplace=True), lambda: rf.fuse_(model)):
        stage()
        with torch.no_grad():
            for _ in range(3):
                torch.testing.assert_close(model(X), eager(X))
            flat.mul_(0.9)
            for p in eager.parameters():
                p.mul_(0.9)
            torch.testing.assert_close(model(X), eager(X))
        assert all(p.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr() for p in model.parameters())


def test_data_that_two_share_stays_shared() -> None:
    """Two convolutions whose weights are one memory, and two networks that share all of theirs."""
    one, other = network("basic"), network("basic")
    for ours, theirs in zip(other.parameters(), one.parameters(), strict=True):
        ours.data = theirs.data
    block = blocks_of(one)[0]
    block.conv2.weight.data = block.conv1.weight.data
    blocks_of(other)[0].conv2.weight.data = block.conv1.weight.data
    rf.fuse_(one)
    assert block.conv1.weight.data_ptr() == block.conv2.weight.data_ptr()
    rf.fuse_(other)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(one(X), other(X))
        first = one(X)
        for p in one.parameters():
            p.data.mul_(0.9)
        assert not torch.allclose(other(X), first)
        torch.testing.assert_close(one(X), rf.unfuse(other)(X))


def test_one_parameter_in_two_modules() -> None:
    model = network("basic")
    block = blocks_of(model)[0]
    block.conv2.weight = block.conv1.weight
    fused = rf.fuse(model)
    assert blocks_of(fused)[0].conv2.weight is blocks_of(fused)[0].conv1.weight
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(fused(X), model(X))
        blocks_of(fused)[0].conv2.weight.data.mul_(0.5)
        block.conv2.weight.data.mul_(0.5)
        torch.testing.assert_close(fused(X), model(X))


def test_sharing_with_another_process_stays() -> None:
    model = network("basic").share_memory()
    before = {n: t.data_ptr() for n, t in model.state_dict().items()}
    rf.fuse_(model)
    assert {n: t.data_ptr() for n, t in model.state_dict().items()} == before
    assert all(t.is_shared() for t in model.state_dict().values())


def test_fully_shard_of_one_process(tmp_path: Path) -> None:
    """FSDP2 takes contiguous parameters alone; steps and predictions alternate, whose unsharded tensors come and go."""
    script = Path(__file__).with_name("fully_sharded.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "meeting")], capture_output=True, text=True, timeout=200,
        env=dict(os.environ, PYTHONPATH=str(script.parents[1])),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
