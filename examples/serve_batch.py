"""Answer single requests in batches: one fused model, one thread that computes, requests from many.

python examples/serve_batch.py
python examples/serve_batch.py --model resnet50 --batch 16 *.jpg
"""

import argparse
import queue
import threading
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from PIL import Image
from torchvision import models
from torchvision.transforms import functional as transforms

import resnet_fused as rf


class Server:
    """Requests that wait are answered together, at most ``batch`` at a time."""

    def __init__(self, model: torch.nn.Module, batch: int, image: torch.Tensor) -> None:
        self.model, self.batch, self.waiting = rf.fuse(model.eval()), batch, queue.SimpleQueue()
        rf.warmup(self.model, image.expand(batch, *image.shape))  # before the first request
        threading.Thread(target=self._serve, daemon=True).start()

    def __call__(self, image: torch.Tensor) -> Future:
        self.waiting.put((image, answer := Future()))
        return answer

    def _serve(self) -> None:
        while True:
            requests = [self.waiting.get()]
            requests += [self.waiting.get() for _ in range(min(self.batch - 1, self.waiting.qsize()))]
            try:
                with torch.inference_mode():
                    classes = self.model(torch.stack([image for image, _ in requests])).argmax(1).tolist()
                for (_, answer), number in zip(requests, classes, strict=True):
                    answer.set_result(number)
            except Exception as error:  # a request that fails must not end the server
                for _, answer in requests:
                    answer.set_exception(error)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("files", nargs="*", help="image files; random images when there are none")
    parser.add_argument("--model", default="resnet18", help="a ResNet of torchvision (default %(default)s)")
    parser.add_argument("--batch", type=int, default=4)
    args = parser.parse_args()
    images = [transforms.to_tensor(Image.open(file).convert("RGB").resize((224, 224))) for file in args.files]
    images = images or list(torch.randn(8, 3, 64, 64))
    server = Server(models.get_model(args.model, num_classes=10), args.batch, images[0])
    with ThreadPoolExecutor(8) as clients:
        print("classes:", *clients.map(lambda image: server(image).result(timeout=60), images))


if __name__ == "__main__":
    main()
