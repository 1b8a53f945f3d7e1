"""What has hurt people elsewhere, the tests that hold it off here, and how each was seen to fail.

``python tests/traps.py [PART OF A NAME …]`` takes the rule of each trap out of a copy of the checkout, runs the trap's
tests there and expects them red. It prints a line for each and exits with 1 when one stays green. The whole takes
minutes and is no part of the suite; that the tests and the places of the rules exist is (``test_traps.py``).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
OPS = "resnet_fused/ops"

Edit = tuple[str, str, str]  # file, what stands there, what takes its place


@dataclass(frozen=True)
class Trap:
    """A case, its tests, and ways to take its rule out: each is a list of edits, after which a test must fail."""

    case: str
    tests: str  # blank-separated, "file::name" without tests/ and .py
    removals: tuple[tuple[Edit, ...], ...]


def trap(case: str, tests: str, *removals: Edit | tuple[Edit, ...]) -> Trap:
    return Trap(case, tests, tuple((r,) if isinstance(r[0], str) else r for r in removals))  # type: ignore[misc]


GUARD = "with torch.cuda.device({0}.device) if {0}.is_cuda else contextlib.nullcontext():"

TRAPS = (
    trap(
        "NaN lost in a fused ReLU",
        "test_conv_bn_act::test_nan_and_infinities_pass_as_in_eager "
        "test_triton_interpret::test_add_relu_keeps_nan_and_infinity_and_takes_any_rank",
        (f"{OPS}/onednn.py", "return y.relu_() if out is None", "return torch.where(y > 0, y, 0) if out is None"),
        (f"{OPS}/add_relu/triton.py", "y = tl.where(y < 0, 0.0, y)", "y = tl.where(y > 0, y, 0.0)"),
    ),
    trap(
        "oneDNN gaps",
        "test_conv_bn_act::test_float64_goes_to_the_reference",
        (f"{OPS}/onednn.py", 'return f"oneDNN has no convolution in {dtype}"', "return None"),
    ),
    trap(
        "stale folded weights",
        "test_fusion_traps::test_weights_written_in_eval_mode_are_seen "
        "test_conv_bn_act::test_writes_to_inference_tensors_are_seen",
        (f"{OPS}/tensor_cache.py", "entry.facts == facts and ", ""),
        (f"{OPS}/tensor_cache.py", " and entry.look.unchanged()", ""),
    ),
    trap(
        "optimizers whose kernels bump no version",
        "test_tensor_cache::test_every_write_to_a_tensor_is_seen_at_once "
        "test_tensor_cache::test_an_optimizer_drops_what_comes_from_its_parameters_alone",
        (f"{OPS}/tensor_cache.py", "CACHE.drop(p for group", "tuple(p for group"),
    ),
    trap(
        "running statistics without a version",
        "test_tensor_cache::test_every_write_to_a_tensor_is_seen_at_once "
        "test_tensor_cache::test_a_written_element_is_found_after_some_calls",
        (f"{OPS}/tensor_cache.py", " and entry.look.unchanged()", ""),
    ),
    trap(
        "a cast made in inference mode saved for backward",
        "test_conv_bn_act::test_packing_in_inference_mode_serves_later_modes "
        "test_tensor_cache::test_a_cast_made_in_inference_mode_serves_gradients",
        (f"{OPS}/packed.py", "with torch.inference_mode(False), torch.no_grad():", "with torch.no_grad():"),
    ),
    trap(
        "channels_last parameters refused",
        "test_fusion::test_identity_and_layout",
        (
            "resnet_fused/fusion/api.py",
            "            adopt(module, found.fused,",
            "            module.to(memory_format=torch.channels_last)\n            adopt(module, found.fused,",
        ),
    ),
    trap(
        "caches that hold weak references",
        "test_tensor_cache::test_tensors_can_be_swapped",
        (f"{OPS}/tensor_cache.py", "weakref.ref(storage,", "weakref.ref(tensor,"),
    ),
    trap(
        "a fused checkpoint has other keys",
        "test_fusion::test_torchvision_models test_fuzz::test_random_networks",
        (
            "resnet_fused/fusion/api.py",
            "            adopt(module, found.fused,",
            "            module.register_buffer('folded', torch.zeros(1))\n            adopt(module, found.fused,",
        ),
    ),
    trap(
        "folding in low precision",
        "test_conv_bn_act::test_low_precision_folds_in_float32",
        (f"{OPS}/packed.py", "affine(conv, torch.float32)", "affine(conv, conv.weight.dtype)"),
    ),
    trap(
        "batch norm without running statistics",
        "test_fusion_traps::test_parts_left_alone test_modules::test_no_running_statistics_means_the_batchs",
        (
            "resnet_fused/modules/guards.py",
            'if _tensor(norm, norm._buffers, "running_mean") is None or',
            "if False and",
        ),
    ),
    trap(
        "int32 overflow",
        "test_triton_interpret::test_large_outputs_take_wide_offsets",
        (
            f"{OPS}/conv_bn_act/triton.py",
            "return max(span, operands.weight.numel()",
            "return 0 * max(span, operands.weight.numel()",
        ),
    ),
    trap(
        "empty batch",
        "test_conv_bn_act::test_empty_batch test_triton_interpret::test_empty_batch "
        "test_batch_norm_act::test_an_empty_batch test_block_ops::test_empty_batch",
        (f"{OPS}/conv_bn_act/api.py", "    if call.x.numel() == 0 or call.conv.weight.numel() == 0:", "    if False:"),
        (
            f"{OPS}/batch_norm_act/api.py",
            "    if call.x.numel() == 0:",
            "    if False:",
        ),
    ),
    trap(
        "misaligned view, channels that are no multiple of 8",
        "test_triton_interpret::test_views simt/test_add_relu_simt::test_misaligned",
        (f"{OPS}/conv_bn_act/triton.py", "return tensor.data_ptr() % _ALIGNMENT == 0", "return True"),
        ("csrc/add_relu/plan.h", "plan.vectors = address[0]", "plan.vectors = true || address[0]"),
    ),
    trap(
        "ambiguous layout (C = 1, H = W = 1, N = 1)",
        "test_conv_bn_act::test_strides_follow_eagers",
        (f"{OPS}/layout.py", "if out.stride() == strides:", "if True:"),
    ),
    trap(
        "wrong fake strides",
        "test_conv_bn_act::test_opcheck",
        (
            f"{OPS}/conv_bn_act/api.py",
            "args[-1])\n    return reference.run(call)",
            "args[-1])\n    return reference.run(call).contiguous()",
        ),
    ),
    trap(
        "wrong device",
        "test_launch::test_triton_launches_on_the_device_of_its_tensors "
        "test_launch::test_compiled_kernels_are_launched_on_the_device_and_stream_of_their_tensors",
        (f"{OPS}/conv_bn_act/triton.py", GUARD.format("call.x"), "with contextlib.nullcontext():"),
        (f"{OPS}/add_relu/triton.py", GUARD.format("a"), "with contextlib.nullcontext():"),
        (f"{OPS}/bottleneck/triton.py", GUARD.format("x"), "with contextlib.nullcontext():"),
        (
            f"{OPS}/batch_norm_act/triton.py",
            "return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()",
            "return contextlib.nullcontext()",
        ),
        ("csrc/conv_bn_act/cuda.cpp", "  const torch::stable::accelerator::DeviceGuard guard(device);\n", ""),
    ),
    trap(
        "wrong stream",
        "test_launch::test_compiled_kernels_are_launched_on_the_device_and_stream_of_their_tensors",
        ("csrc/add_relu/cuda.cpp", "current_stream(device));", "nullptr);"),
        ("csrc/bottleneck/cuda.cpp", "void* stream = current_stream(device);", "void* stream = nullptr;"),
    ),
    trap(
        "autotuning inside a graph capture",
        "test_launch::test_nothing_is_measured_at_a_call test_cudnn::test_nothing_is_tried_while_a_graph_is_captured",
        (
            f"{OPS}/add_relu/triton.py",
            "@triton.jit\ndef add_relu_kernel",
            "@triton.autotune([triton.Config({})], key=[])\n@triton.jit\ndef add_relu_kernel",
        ),
        (f"{OPS}/conv_bn_act/cudnn.py", "if torch.cuda.is_current_stream_capturing():", "if False:"),
    ),
    trap(
        "autotuning a kernel that mutates",
        "test_launch::test_nothing_is_measured_at_a_call",
        (
            f"{OPS}/batch_norm_act/triton.py",
            "@triton.jit\ndef merge_kernel",
            "@triton.autotune([triton.Config({})], key=[])\n@triton.jit\ndef merge_kernel",
        ),
    ),
    trap(
        "races in lazy set-up",
        "test_tensor_cache::test_threads_fill_and_empty_it_together test_ways::test_threads_share_one_model",
        (f"{OPS}/tensor_cache.py", "else list(found[1]):", "else found[1]:"),
    ),
    trap(
        "autocast ignored",
        "test_conv_bn_act::test_autocast_casts_as_eager_does",
        (f"{OPS}/library.py", "for device_type, key in _AUTOCAST_KEYS.items():", "for device_type, key in ():"),
    ),
    trap(
        "TF32 surprises",
        "test_triton_interpret::test_float32_follows_either_of_pytorchs_flags",
        (
            f"{OPS}/conv_bn_act/triton.py",
            'if dtype != torch.float32 or torch.backends.cudnn.conv.fp32_precision == "tf32":',
            "if True:",
        ),
    ),
    trap(
        "cudnn_convolution_add_relu refuses or aliases",
        "test_cudnn::test_shapes_that_it_refuses_go_to_the_next "
        "test_cudnn::test_a_result_in_the_residuals_memory_is_not_taken",
        (
            f"{OPS}/conv_bn_act/cudnn.py",
            'return f"cuDNN refuses these shapes: {str(error).splitlines()[0]}"',
            "return None",
        ),
        (
            f"{OPS}/conv_bn_act/cudnn.py",
            "written = residual is not None and not bool((residual == 1).all())",
            "written = False",
        ),
    ),
    trap(
        "Triton convolutions silently wrong above 1x1",
        "test_triton_interpret::test_every_shipped_config "
        "test_triton_interpret::test_every_case_by_every_kind_of_kernel",
        (
            f"{OPS}/conv_bn_act/triton.py",
            "per_split = math.ceil(cfg.steps(problem, config) / splits)",
            "per_split = cfg.steps(problem, config) // splits",
        ),
    ),
    trap(
        "hooks bypassed",
        "test_fusion_traps::test_inner_hooks_before_fusion test_fusion_traps::test_inner_hooks_after_fusion_fire",
        ("resnet_fused/modules/guards.py", "module._forward_hooks\n        or ", ""),
    ),
    trap(
        "replicas share a cache",
        "test_ways::test_replicas_share_nothing_that_was_packed",
        (
            (f"{OPS}/tensor_cache.py", "return (kind, extra, *facts.addresses,", "return (kind, extra,"),
            (f"{OPS}/tensor_cache.py", "entry.facts == facts and ", ""),
            (f"{OPS}/tensor_cache.py", " and entry.look.unchanged()", ""),
        ),
    ),
    trap(
        "compiled library of another ABI",
        "test_library::test_a_library_that_does_not_load_says_so",
        ("resnet_fused/extension.py", "except ImportError as error:", "except KeyError as error:"),
    ),
    trap(
        "CUDA sources skipped because no GPU was visible",
        "test_library::test_no_gpu_is_asked_for_when_building",
        (
            "build_ext.py",
            'os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES',
            '"{}.{}".format(*__import__("torch").cuda.get_device_capability())',
        ),
    ),
    trap(
        "import fails without a GPU",
        "test_import::test_importing_and_fusing_needs_torch_alone "
        "test_import::test_import_loads_neither_triton_nor_torchvision",
        ("resnet_fused/__init__.py", "from resnet_fused", "import triton\nfrom resnet_fused"),
    ),
    trap(
        "unpickling a checkpoint",
        "test_train::test_weights_that_do_not_serve_are_named",
        ("resnet_fused/training/weights.py", "weights_only=True", "weights_only=False"),
    ),
    trap(
        "determinism asked for",
        "test_launch::test_no_kernel_adds_atomically test_cudnn::test_it_is_not_taken_where_determinism_is_asked_for "
        "test_triton_interpret::test_results_repeat_bit_for_bit",
        (f"{OPS}/add_relu/triton.py", "tl.store(out + at,", "tl.atomic_add(out + at,"),
        (f"{OPS}/conv_bn_act/cudnn.py", "if torch.are_deterministic_algorithms_enabled():", "if False:"),
    ),
)


# Promises about whole models, beside the traps.
MODELS = (
    trap(
        "Mask R-CNN: detections, and gradients of a fine-tuning step with frozen norms",
        "test_families::test_mask_rcnn_detects_what_eager_detects "
        "test_families::test_a_fine_tuning_step_of_mask_rcnn_gives_eagers_gradients",
        (
            f"{OPS}/packed.py",
            "torch.rsqrt(conv.running_var.to(dtype) + conv.eps)",
            "torch.rsqrt(conv.running_var.to(dtype) + 0.01)",
        ),
        (f"{OPS}/conv_bn_act/api.py", "return (weight.to(scale.dtype) * scale.view(-1, 1, 1, 1))", "return (weight"),
    ),
    trap(
        "DeepLabV3 maps",
        "test_families::test_deeplabv3_maps",
        (f"{OPS}/packed.py", "bias = bias + conv.bn_bias.to(dtype)", "bias = bias * 1.01 + conv.bn_bias.to(dtype)"),
    ),
    trap(
        "transformers ResNet logits, segmentation_models_pytorch encoders",
        "test_families::test_other_families",
        (
            f"{OPS}/packed.py",
            "scale = scale * conv.bn_weight.to(dtype)",
            "scale = scale * conv.bn_weight.to(dtype) * 1.001",
        ),
    ),
)


def red(found: Trap, edits: tuple[Edit, ...], checkout: Path) -> bool:
    """Whether a test fails, rather than does not run, in ``checkout`` after these edits, which are then undone."""
    kept = {file: (checkout / file).read_text() for file, _, _ in edits}
    for file, old, new in edits:
        path = checkout / file
        path.write_text(path.read_text().replace(old, new, 1))
    places = [name.split("::") for name in found.tests.split()]
    files = sorted({f"tests/{file}.py" for file, _ in places})
    names = " or ".join(name for _, name in places)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", names, *files],
        cwd=checkout,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(checkout)},
    )
    for file, text in kept.items():
        (checkout / file).write_text(text)
    return done.returncode == 1 and "FAILED" in done.stdout


def main(wanted: list[str]) -> int:
    green = 0
    with tempfile.TemporaryDirectory() as folder:
        checkout = Path(folder) / "checkout"
        shutil.copytree(
            ROOT, checkout, ignore=shutil.ignore_patterns(".git", ".venv", "out", "build", "__pycache__", ".*_cache")
        )
        for found in (*TRAPS, *MODELS):
            if wanted and not any(part.lower() in found.case.lower() for part in wanted):
                continue
            for edits in found.removals:
                failed = red(found, edits, checkout)
                green += not failed
                print(f"{'red  ' if failed else 'GREEN'}  {found.case}: {edits[0][0]}", flush=True)
    return 1 if green else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
