"""The schemas of the public ops, in this one place: Python registers them, or the compiled library built from here.

The file imports nothing, since the build reads it where there may be no torch to import.
"""

from __future__ import annotations

CONV_BN_ACT = (
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? bn_weight, Tensor? bn_bias, Tensor running_mean, "
    "Tensor running_var, float eps, int[2] stride, int[2] padding, int[2] dilation, int groups, "
    "Tensor? residual, str act, str backend) -> Tensor"
)

_TENSORS = ("weight", "bias", "bn_weight", "bn_bias", "running_mean", "running_var")


def block(depth: int) -> str:
    """The schema of a residual block of ``depth`` convolutions."""
    parts = ["Tensor x"]
    for name in [f"conv{i}" for i in range(1, depth + 1)] + ["shortcut"]:
        for field in _TENSORS:
            optional = name == "shortcut" or field in ("bias", "bn_weight", "bn_bias")
            parts.append(f"Tensor{'?' if optional else ''} {name}_{field}")
        parts.append(f"float {name}_eps")
        parts += [f"int[2] {name}_{pair}" for pair in ("stride", "padding", "dilation")]
        parts.append(f"int {name}_groups")
    return f"({', '.join(parts)}, Tensor? identity, str backend) -> Tensor"


SCHEMAS = {
    "add_relu": "(Tensor a, Tensor b, str backend) -> Tensor",
    "conv_bn_act": CONV_BN_ACT,
    "basic_block": block(2),
    "bottleneck": block(3),
}
