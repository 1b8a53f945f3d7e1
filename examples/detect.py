"""The features of a detector's backbone: a ResNet with frozen batch norm and a feature pyramid, fused.

python examples/detect.py                  # one random image
python examples/detect.py street.jpg       # and the boxes, with torchvision's weights (downloads them)
"""

import argparse

import torch
from torchvision.models import detection
from torchvision.transforms import functional as transforms

import resnet_fused as rf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", nargs="?", help="an image file; a random image when there is none")
    args = parser.parse_args()

    if args.image is None:
        model = detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None).eval()
        image = torch.rand(3, 64, 96)
    else:
        from PIL import Image

        model = detection.fasterrcnn_resnet50_fpn(weights="DEFAULT").eval()
        image = transforms.to_tensor(Image.open(args.image).convert("RGB"))

    fast = rf.fuse(model, generic=True)  # generic: convolution, batch norm and ReLU outside of blocks too
    report = rf.report(fast)
    print(f"{len(report.fused)} parts fused, {len(report.skipped)} left alone")

    with torch.inference_mode():
        features = fast.backbone(image[None])
        expected = model.backbone(image[None])
        for level, feature in features.items():
            worst = float((feature - expected[level]).abs().max() / expected[level].abs().max())
            print(f"level {level}: {tuple(feature.shape)}, {worst:.1e} from eager, relative to the largest feature")
        if args.image is not None:
            for box, score in zip(*(fast([image])[0][key].tolist() for key in ("boxes", "scores")), strict=True):
                print(f"{score:.0%} at {[round(side) for side in box]}")


if __name__ == "__main__":
    main()
