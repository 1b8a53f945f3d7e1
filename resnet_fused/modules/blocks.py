"""The fused residual blocks, with torchvision's signatures, attribute names and state_dict keys."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from resnet_fused import functional
from resnet_fused.modules import parts
from resnet_fused.modules.block import FusedBlock
from resnet_fused.modules.spec import BASIC_BLOCK, BOTTLENECK, FusedState

Norm = Callable[[int], nn.Module]


def conv3x3(inplanes: int, planes: int, stride: int = 1, groups: int = 1, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inplanes, planes, 3, stride, dilation, dilation, groups, bias=False)


def conv1x1(inplanes: int, planes: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inplanes, planes, 1, stride, bias=False)


class FusedBasicBlock(FusedBlock):
    """The residual block of ResNet-18 and -34: two 3×3 convolutions.

    Equivalent to::

        out = relu(bn1(conv1(x)))
        out = bn2(conv2(out))
        return relu(out + (x if downsample is None else downsample(x)))

    Args:
        inplanes, planes: channels in and out.
        stride: of conv1; where it is not 1, or inplanes is not planes, a downsample is needed.
        downsample: projection of x, usually Sequential(1×1 convolution, batch norm).
        groups, base_width, dilation: 1, 64 and 1; there for torchvision's signature.
        norm_layer: makes a norm from a number of channels; nn.BatchNorm2d when None. Others work but do not fuse.
        recompute: what training computes again in the backward pass instead of keeping it for the gradient: None;
            "activations", all that follows from the convolutions' outputs; "last_conv", the last convolution's output
            too. The same numbers in less memory; no second derivative.

    Shapes: ``[N, inplanes, H, W]`` to ``[N, planes, H/stride, W/stride]``, any floating dtype.

    Raises:
        ValueError, NotImplementedError: groups, base_width or dilation other than the above, as in torchvision.
        ValueError: there is no such recompute.
    """

    expansion: int = 1
    _rf_spec = BASIC_BLOCK
    _rf_op = staticmethod(functional.basic_block)

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Norm | None = None,
        *,
        recompute: str | None = None,
    ) -> None:
        super().__init__()
        if groups != 1 or base_width != 64:
            raise ValueError(f"groups, base_width: got {groups} and {base_width}, a basic block takes 1 and 64 only")
        if dilation > 1:
            raise NotImplementedError(f"dilation: got {dilation}, a basic block takes 1 only")
        norm_layer = norm_layer or nn.BatchNorm2d
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn1 = norm_layer(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = norm_layer(planes)
        self.downsample = downsample
        self.stride = stride
        self._rf_state = FusedState(self._rf_spec, recompute=parts.check_recompute(recompute))


class ResidualBlock(FusedBasicBlock):
    """The two-convolution block of the tutorials: a :class:`FusedBasicBlock` under their name and signature.

    Args:
        in_channels, out_channels, stride, downsample: as ``inplanes``, ``planes``, … there.
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: int = 1, downsample: nn.Module | None = None
    ) -> None:
        super().__init__(in_channels, out_channels, stride, downsample)


class FusedBottleneck(FusedBlock):
    """The residual block of ResNet-50 and deeper: 1×1, 3×3 and 1×1 convolutions, the stride on the 3×3 (v1.5).

    Equivalent to::

        out = relu(bn1(conv1(x)))
        out = relu(bn2(conv2(out)))
        out = bn3(conv3(out))
        return relu(out + (x if downsample is None else downsample(x)))

    Args:
        inplanes: channels in.
        planes: channels out, divided by ``expansion`` (4).
        stride: of conv2; where it is not 1, or inplanes is not 4·planes, a downsample is needed.
        downsample: projection of x, usually Sequential(1×1 convolution, batch norm).
        groups, base_width: of conv2, which has ``int(planes · base_width / 64) · groups`` channels.
        dilation: of conv2.
        norm_layer: makes a norm from a number of channels; nn.BatchNorm2d when None. Others work but do not fuse.
        recompute: what training computes again in the backward pass instead of keeping it for the gradient: None;
            "activations", all that follows from the convolutions' outputs; "last_conv", the last convolution's output
            too. The same numbers in less memory; no second derivative.

    Shapes: ``[N, inplanes, H, W]`` to ``[N, 4·planes, H/stride, W/stride]``, any floating dtype.

    Raises:
        ValueError: there is no such recompute.
    """

    expansion: int = 4
    _rf_spec = BOTTLENECK
    _rf_op = staticmethod(functional.bottleneck)

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Norm | None = None,
        *,
        recompute: str | None = None,
    ) -> None:
        super().__init__()
        norm_layer = norm_layer or nn.BatchNorm2d
        width = int(planes * (base_width / 64.0)) * groups
        self.conv1 = conv1x1(inplanes, width)
        self.bn1 = norm_layer(width)
        self.conv2 = conv3x3(width, width, stride, groups, dilation)
        self.bn2 = norm_layer(width)
        self.conv3 = conv1x1(width, planes * self.expansion)
        self.bn3 = norm_layer(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride
        self._rf_state = FusedState(self._rf_spec, recompute=parts.check_recompute(recompute))
