"""Fine-tune a fused ResNet, its batch norms training or frozen.

python examples/fine_tune.py                              # random images, a few steps
python examples/fine_tune.py FOLDER --frozen --steps 500  # class folders; norms as in the weights
"""

import argparse
import itertools

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision import datasets, models, transforms

import resnet_fused as rf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", help="a folder of class folders; random images when there is none")
    parser.add_argument("--frozen", action="store_true", help="keep the batch norms' statistics: blocks run as one op")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--weights", help="a file with the state_dict of torchvision's resnet18")
    args = parser.parse_args()

    if args.folder is None:
        data, classes = TensorDataset(torch.randn(16, 3, 32, 32), torch.randint(4, (16,))), 4
    else:
        change = [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
        data = datasets.ImageFolder(args.folder, transforms.Compose(change))
        classes = len(data.classes)

    model = models.resnet18()
    if args.weights is not None:
        model.load_state_dict(torch.load(args.weights, weights_only=True))
    model.fc = nn.Linear(model.fc.in_features, classes)
    rf.fuse_(model)  # before or after the optimizer is made: the parameters stay the same objects
    model.train()
    if args.frozen:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()

    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    batches = itertools.chain.from_iterable(itertools.repeat(DataLoader(data, batch_size=8, shuffle=True)))
    for step, (images, labels) in enumerate(itertools.islice(batches, args.steps)):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}: loss {loss.item():.4f}")
    torch.save(rf.unfuse(model).state_dict(), "fine_tuned.pt")  # torchvision's own keys


if __name__ == "__main__":
    main()
