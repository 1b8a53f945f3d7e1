"""FLOPs, bytes and time bounds of a residual network at three levels of fusion, counted without computing anything.

::

    from resnet_fused import roofline
    counts = roofline.count(model, (1, 3, 224, 224))           # {"op": …, "conv": …, "block": …}
    counts["conv"].without("avgpool", "fc").bound(roofline.H200, torch.bfloat16, weights=False)

**Levels.** "op": every operation its own pass over memory, as eager PyTorch runs. "conv": a convolution with the batch
norm, the residual add and the ReLU behind it is one pass. "block": a residual block is one pass, which moves only the
block's input, its output and its weights; so is the stem with its max-pool.

**What is counted.** A pass moves each tensor that it reads once and each that it writes once; what stays inside a pass
is free, and so is recomputation (the halo of a tile). FLOPs are two per multiply-add of the convolutions and matrix
products, nothing else. Views are free. Constants of the module (weights, batch norm's vectors) are kept apart from the
activations: they are read once per pass whatever the batch, so they vanish from a large batch's figure per image.

**ResNet-50's figures** (224², bf16, per image at a large batch, :data:`H200`) leave out the weights, the average pool
and the fully connected layer; the stem and its max-pool are in:

=======  =============  =======================================================================
level    Melem moved    img/s
=======  =============  =======================================================================
op       80.8           26.6 k: bytes moved over bandwidth (:attr:`Bound.memory_s`)
conv     28.3           59.4 k: per pass the greater of memory and arithmetic (:attr:`Bound.seconds`)
block    11.5           93.1 k: likewise
any                     96.6 k: FLOPs over the arithmetic rate (:attr:`Bound.arithmetic_s`)
=======  =============  =======================================================================

Eager's row is memory alone; with each pass bound by the greater of the two it would be 24.1 k. The gain ceiling of a
whole-block kernel over per-convolution fusion is :func:`gains`.
"""

from resnet_fused.roofline.bound import H200, Bound, Device
from resnet_fused.roofline.levels import LEVELS, Counts, Piece, count, gains

__all__ = ["H200", "LEVELS", "Bound", "Counts", "Device", "Piece", "count", "gains"]
