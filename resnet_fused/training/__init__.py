"""Training of image classifiers: data, the loop, checkpoints, transfer of weights; behind ``resnet-fused train``.

Importing this package needs torch alone; scikit-learn, torchvision, Pillow and safetensors are imported where used.
"""

from resnet_fused.training.data import Data, digits, image_folder
from resnet_fused.training.errors import CheckpointError, DataError, TrainingError
from resnet_fused.training.loop import Recipe, Trainer
from resnet_fused.training.world import World

__all__ = [
    "CheckpointError", "Data", "DataError", "Recipe", "Trainer", "TrainingError", "World", "digits", "image_folder",
]  # fmt: skip
