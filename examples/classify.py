"""Classify images with a fused ResNet.

python examples/classify.py                                    # random images, random weights
python examples/classify.py cat.jpg dog.jpg --weights DEFAULT  # downloads torchvision's weights
"""

import argparse

import torch
from torchvision import models
from torchvision.transforms import functional as transforms

import resnet_fused as rf


def load(path: str) -> torch.Tensor:
    """An image file as an input ``[3, 224, 224]``, normalised as torchvision's weights expect."""
    from PIL import Image

    image = transforms.center_crop(transforms.resize(Image.open(path).convert("RGB"), 232), 224)
    return transforms.normalize(transforms.to_tensor(image), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="*", help="image files; random ones when there are none")
    parser.add_argument("--model", default="resnet18", help="a ResNet of torchvision (default %(default)s)")
    parser.add_argument("--weights", help="name of torchvision's weights: DEFAULT, IMAGENET1K_V1, …")
    args = parser.parse_args()

    weights = models.get_model_weights(args.model)[args.weights] if args.weights else None
    model = rf.fuse(models.get_model(args.model, weights=weights).eval())
    print(rf.report(model))

    batch = torch.stack([load(path) for path in args.images]) if args.images else torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        best = model(batch).softmax(1).max(1)
    for i, (probability, index) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
        label = weights.meta["categories"][index] if weights else f"class {index}"
        print(f"{args.images[i] if args.images else f'random image {i}'}: {label} ({probability:.1%})")


if __name__ == "__main__":
    main()
