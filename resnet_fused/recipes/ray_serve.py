"""Serve a fused classifier with Ray Serve. Images are posted as the bytes of their files; the answer is JSON::

    serve run resnet_fused.recipes.ray_serve:app model=torchvision:resnet50 weights=DEFAULT
    curl --data-binary @cat.jpg http://localhost:8000/     # {"label": …, "probability": …}

Requests that come together are answered in one batch. Replicas, GPUs and scaling are Ray Serve's own settings, in its
config file or by ``Server.options``: ``Server.options(num_replicas=2, ray_actor_options={"num_gpus": 1})``.
"""

from __future__ import annotations

import asyncio
from typing import Any

from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse
from torch import Tensor

from resnet_fused.recipes.classifier import Predictor, load


@serve.deployment(max_ongoing_requests=64)  # more than a batch, so that one can fill while another is computed
class Server:
    """A replica: one fused model, warmed up before it gets a request."""

    def __init__(self, model: str, weights: str | None = None, batch: int = 8) -> None:
        classifier = load(model, weights)
        self.decode, self.predict = classifier.decode, Predictor(classifier, batch)
        self.answer.set_max_batch_size(batch)

    @serve.batch(batch_wait_timeout_s=0.005)  # type: ignore[misc]
    async def answer(self, images: list[Tensor]) -> list[tuple[str, float]]:
        """The best class and its probability, for each request of a batch."""
        return await asyncio.to_thread(self.predict, images)

    async def __call__(self, request: Request) -> JSONResponse:
        """The answer to one request; status 400 and the reason where its body is no image."""
        try:
            image = await asyncio.to_thread(self.decode, await request.body())
        except ValueError as error:
            return JSONResponse({"error": str(error)}, status_code=400)
        label, probability = await self.answer(image)
        return JSONResponse({"label": label, "probability": probability})


def app(args: dict[str, Any]) -> serve.Application:
    """What ``serve run`` builds: ``model``, ``weights`` and ``batch`` as for :class:`Server`."""
    return Server.bind(args["model"], args.get("weights"), int(args.get("batch", 8)))  # type: ignore[attr-defined]
