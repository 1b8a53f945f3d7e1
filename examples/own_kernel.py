"""A kernel of your own as a backend: compared with the reference, then used in a whole network.

python examples/own_kernel.py
python examples/own_kernel.py resnet50       # another ResNet of torchvision
resnet-fused bench --suite kernels --load examples/own_kernel.py --contender eager fused 'fused[mine]'
"""

import sys

import torch
from torch.nn import functional as F
from torchvision.models import get_model

import resnet_fused as rf


def refuse(call: object) -> str | None:
    """Why a call cannot be served, or None; ``auto`` and the tuner then take another backend."""
    return None if call.conv.groups == 1 else "one group only"


@rf.register_backend("mine", "conv_bn_act", supports=refuse)
def conv_bn_act(call: object) -> torch.Tensor:
    """Batch norm folded into the weight at each call, then one convolution: a kernel of yours goes here.

    The arguments are checked already. ``call.conv`` has the convolution and its batch norm.
    """
    conv = call.conv
    scale = (conv.running_var.float() + conv.eps).rsqrt()
    scale = scale if conv.bn_weight is None else scale * conv.bn_weight
    shift = -conv.running_mean * scale if conv.bias is None else (conv.bias - conv.running_mean) * scale
    shift = shift if conv.bn_bias is None else shift + conv.bn_bias
    weight = (conv.weight * scale[:, None, None, None]).to(call.x.dtype)
    y = F.conv2d(call.x, weight, shift.to(call.x.dtype), conv.stride, conv.padding, conv.dilation)
    y = y if call.residual is None else y + call.residual
    return F.relu(y) if call.act == "relu" else y


def main() -> None:
    x, weight = torch.randn(2, 8, 16, 16), torch.randn(16, 8, 3, 3)
    norm = torch.rand(16), torch.rand(16), torch.randn(16), torch.rand(16) + 0.5
    reference = rf.conv_bn_act(x, weight, *norm, padding=1, backend="reference")
    mine = rf.conv_bn_act(x, weight, *norm, padding=1, backend="mine")
    print(f"one call: {float((mine - reference).abs().max()):.1e} from the reference")

    model = get_model(sys.argv[1] if sys.argv[1:] else "resnet18", num_classes=10).eval()
    images = torch.randn(2, 3, 64, 64)
    error = rf.verify(model, images, backend="mine")
    print(f"a network by it alone: {error.ratio:.2f} of the error budget")
    print(rf.report(rf.fuse(model, backend="mine")))


if __name__ == "__main__":
    main()
