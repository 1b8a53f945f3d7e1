"""Who looks on while a fused model runs: modes, tracers, hooks and transforms see what eager shows them."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import optional
import pytest
import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import resnet_fused as rf
from resnet_fused.modules import depth_first, guards, network_plan
from resnet_fused.testing.networks import randomise_norms

torchvision = optional.torchvision()
tv = torchvision.models.resnet


def small(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = tv.ResNet(tv.BasicBlock, [1, 1, 1, 1], num_classes=4, **options)
    return randomise_norms(model).eval()


def image(n: int = 2, size: int = 40) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def close(ours: Tensor, eagers: Tensor) -> None:
    torch.testing.assert_close(ours, eagers, rtol=1e-3, atol=1e-3)


class Dispatched(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(str(getattr(func, "__name__", func)))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("mode", [Dispatched, Functions])
def test_a_mode_sees_what_eager_shows_it(mode: Any, training: bool) -> None:
    eager = small().train(training)
    fused = rf.fuse(eager, memory_format=torch.preserve_format)
    seen = []
    for model in (eager, fused):
        with torch.no_grad(), mode() as looking:
            out = model(image())
        seen.append((looking.names, out))
    kept = [[name for name in names if "__get__" not in name] for names, _ in seen]
    assert kept[0] == kept[1] and kept[0]
    assert torch.equal(seen[0][1], seen[1][1])


def test_flops_are_counted_as_in_eager() -> None:
    counts = []
    for model in (small(), rf.fuse(small())):
        with FlopCounterMode(display=False) as counter:
            model(image())
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_a_subclass_of_tensor_sees_what_eager_shows_it() -> None:
    class Noted(Tensor):
        names: list[str] = []  # noqa: RUF012

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            cls.names.append(getattr(func, "__name__", ""))
            return super().__torch_function__(func, types, args, kwargs or {})

    with torch.no_grad():
        out = rf.fuse(small())(image().as_subclass(Noted))
    assert type(out) is Noted and Noted.names.count("conv2d") == 12 and "batch_norm" in Noted.names


def test_the_reason_is_said() -> None:
    assert guards.watched() is None
    with Dispatched():
        assert "Dispatched" in str(guards.watched())
    with torch.device("cpu"):
        assert guards.watched() is None
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert "hooks are registered for all modules" in str(guards.watched())
    handle.remove()


def test_transforms_give_what_eager_gives() -> None:
    eager, fused = randomise_norms(tv.BasicBlock(8, 8)).eval(), None
    fused = rf.fuse(eager)
    x, v = torch.randn(2, 8, 5, 5), torch.randn(2, 8, 5, 5)
    ours, eagers = (torch.func.jvp(model, (x,), (v,)) for model in (fused, eager))
    close(ours[1], eagers[1])
    assert eagers[1].abs().max() > 0

    def loss(model: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (x[None],)).square().sum()

    for name in ("conv1.weight", "bn2.bias"):
        found = []
        for model in (fused, eager):
            parameters = {n: p.detach() for n, p in model.named_parameters()}
            per_sample = torch.func.vmap(torch.func.grad(loss, argnums=1), in_dims=(None, None, 0))
            found.append(per_sample(model, parameters, x)[name])
        close(*found)


# --- torch.fx -------------------------------------------------------------------------------------------------------


def test_a_graph_is_eagers_and_follows_its_mode() -> None:
    eager, fused = small(), rf.fuse(small())
    graphs = [fx.symbolic_trace(model) for model in (eager, fused)]
    assert [(n.op, str(n.target)) for n in graphs[0].graph.nodes] == [
        (n.op, str(n.target)) for n in graphs[1].graph.nodes
    ]
    for mode in (False, True):
        ours, eagers = (graph.train(mode)(image(4)) for graph in graphs[::-1])
        close(ours, eagers)
    close(graphs[1].get_buffer("layer1.0.bn1.running_mean"), graphs[0].get_buffer("layer1.0.bn1.running_mean"))


@pytest.mark.parametrize("make", [lambda: tv.BasicBlock(8, 8), lambda: rf.FusedBottleneck(8, 2)], ids=["fused", "ours"])
def test_one_block_is_traced(make: Any) -> None:
    block = randomise_norms(make()).eval()
    graph = fx.symbolic_trace(rf.fuse(block))
    assert [n.name for n in graph.graph.nodes if n.op == "placeholder"] == ["x"]
    x = torch.randn(2, 8, 5, 5)
    close(graph(x), block(x))


def test_features_are_extracted() -> None:
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    eager, fused = small(), rf.fuse(small())
    assert get_graph_node_names(fused) == get_graph_node_names(eager)
    nodes = {"layer1.0.relu": "inner", "layer3": "outer"}
    ours, eagers = (create_feature_extractor(model, nodes).eval()(image()) for model in (fused, eager))
    for name in ("inner", "outer"):
        close(ours[name], eagers[name])
    assert not fused.training


def test_quantisation_finds_its_modules() -> None:
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_fx

    mapping = get_default_qconfig_mapping("x86")
    prepared = [prepare_fx(copy.deepcopy(m), mapping, (image(),)) for m in (small(), rf.fuse(small()))]
    kinds = [sorted(type(m).__name__ for m in graph.modules()) for graph in prepared]
    assert kinds[0] == kinds[1] and "ConvReLU2d" in kinds[0]


# --- TorchScript ----------------------------------------------------------------------------------------------------

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


def test_a_trace_needs_nothing_of_ours(tmp_path: Path) -> None:
    fused = rf.fuse(small())
    with torch.no_grad():
        traced = torch.jit.trace(fused, image())
        close(traced(image(5, 56)), fused(image(5, 56)))
        want = fused(image())
    assert "resnet_fused::" not in str(traced.inlined_graph)
    torch.jit.save(traced, str(tmp_path / "model.pt"))
    torch.save((image(), want), tmp_path / "data.pt")
    code = f"""
import sys, torch
model = torch.jit.load({str(tmp_path / "model.pt")!r})
x, want = torch.load({str(tmp_path / "data.pt")!r})
with torch.no_grad():
    torch.testing.assert_close(model(x), want, rtol=1e-3, atol=1e-3)
assert "resnet_fused" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_trace_has_no_sub_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(depth_first, "BYTES", 1)
    fused = rf.fuse(small())
    with torch.no_grad():
        traced = torch.jit.trace(fused, image(6))
        close(traced(image(5)), fused(image(5)))


def test_script_compiles_the_modules_own_forward() -> None:
    fused, eager = rf.fuse(small()), small()
    scripted = torch.jit.script(fused)
    for mode in (False, True):
        ours, eagers = (model.train(mode)(image(4)) for model in (scripted, eager))
        close(ours, eagers)
    fused.eval()
    assert all(type(m).__module__.startswith("resnet_fused") for m in (fused, fused.layer1[0]))  # type: ignore[index]
    assert scripted.conv1.weight.data_ptr() == fused.conv1.weight.data_ptr()  # type: ignore[union-attr]


def test_script_of_a_model_around_fused_parts() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), rf.fuse(randomise_norms(tv.BasicBlock(8, 8)))).eval()
    want = model(image())
    close(torch.jit.script(model)(image()), want)
    close(model(image()), want)


def test_script_of_our_own_classes_says_what_to_do() -> None:
    with pytest.raises(RuntimeError, match=r"torch.jit.trace"):
        torch.jit.script(rf.FusedBasicBlock(8, 8))


# --- sub-batches ----------------------------------------------------------------------------------------------------


class Nested(tv.ResNet):  # type: ignore[misc]
    """A Sequential in a Sequential, with room for more."""

    def __init__(self, between: nn.Module | None = None) -> None:
        super().__init__(tv.BasicBlock, [1, 1, 1, 1], num_classes=4)
        inner = [self.layer2[0]] if between is None else [between, self.layer2[0]]
        self.layer2 = nn.Sequential(nn.Sequential(*inner))


WATCHERS: dict[str, Any] = {
    "hook on a nested Sequential": lambda m, note: m.layer2[0].register_forward_hook(note),
    "hook on a nested block": lambda m, note: m.layer2[0][0].register_forward_hook(note),
    "hook on a part of a nested block": lambda m, note: m.layer2[0][0].bn2.register_forward_pre_hook(note),
    "hook on the shortcut": lambda m, note: m.layer2[0][0].downsample[0].register_forward_hook(note),
    "hook on the pool": lambda m, note: m.maxpool.register_forward_hook(note),
}


@pytest.mark.parametrize("watcher", WATCHERS)
def test_a_hook_at_any_depth_sees_the_whole_batch(watcher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(depth_first, "BYTES", 1)
    model = rf.fuse(randomise_norms(Nested()).eval())
    sizes: list[int] = []
    WATCHERS[watcher](model, lambda _, args, out=None: sizes.append(args[0].shape[0]))
    with torch.no_grad():
        model(image(6))
    assert sizes == [6]


@pytest.mark.parametrize("make", [lambda: nn.Dropout(0.5), lambda: nn.Dropout2d(0.5)], ids=["dropout", "dropout2d"])
def test_random_modules_between_blocks_draw_what_eager_draws(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(depth_first, "BYTES", 1)
    eager = randomise_norms(Nested(make())).eval()
    eager.layer2[0][0].train()
    fused = rf.fuse(eager)  # a mask is drawn in the order of its memory
    found = []
    for model in (eager, fused):
        torch.manual_seed(5)
        with torch.no_grad():
            found.append(model(image(6)))
    close(*found)


def test_nested_blocks_are_split_where_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sizes = rf.fuse(randomise_norms(Nested()).eval()), []
    plain = type(model)._rf_run_stem

    def run_stem(self: Any, x: Tensor) -> Tensor:
        sizes.append(x.shape[0])
        return plain(self, x)

    with torch.no_grad():
        want = model(image(6))
        monkeypatch.setattr(network_plan, "run", lambda *_: None)  # which would do it all in one call
        monkeypatch.setattr(depth_first, "BYTES", 1)
        monkeypatch.setattr(type(model), "_rf_run_stem", run_stem)
        close(model(image(6)), want)
    assert sizes == [1] * 6
