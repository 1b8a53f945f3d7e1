"""Serve a fused classifier with Ray Serve. Images are posted as the bytes of their files; the answer is JSON::

    serve run resnet_fused.recipes.ray_serve:app model=torchvision:resnet50 weights=DEFAULT
    curl --data-binary @cat.jpg http://localhost:8000/     # {"label": …, "probability": …}

Requests that come together are answered in one batch. Replicas, GPUs and scaling are Ray Serve's own settings, in its
config file or by ``Server.options``: ``Server.options(num_replicas=2, ray_actor_options={"num_gpus": 1})``.

A request that cannot be answered gets ``{"error": reason}``: status 400 where its body is no image, 413 where the body
or its image is too large (:data:`BODY`, :mod:`resnet_fused.training.images`), 503 where the bodies of others already
fill a replica's share (:data:`BODIES`).
"""

from __future__ import annotations

import asyncio
import math
from typing import Any

from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse
from torch import Tensor

from resnet_fused.recipes.classifier import Predictor, load
from resnet_fused.training.images import ImageError, ImageTooLarge

BODY = 32 << 20  # bytes of one request
BODIES = 128 << 20  # bytes of all requests that a replica holds at a moment
DECODERS = 2  # images decoded at once: each may take images.MEMORY


class Refused(Exception):
    """A request that is not answered: its HTTP status and the reason."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Bodies:
    """Reads the bodies of requests within bounds. ``held`` counts the bytes of those that are in memory."""

    def __init__(self) -> None:
        self.held = 0

    async def read(self, request: Request) -> bytes:
        """The whole body; its bytes stay counted until :meth:`release`.

        Raises:
            Refused: it is, or says it is, larger than ``BODY``, or there is no room for it now.
        """
        said = request.headers.get("content-length", "0")
        if not (said.isascii() and said.isdecimal() and len(said) < 20):
            raise Refused(400, "Content-Length: need a number of bytes")
        if int(said) > BODY:
            raise Refused(413, f"the body holds {int(said) / 1e6:.1f} MB; need at most {BODY / 1e6:.1f} MB")
        parts: list[bytes] = []
        size = 0
        try:
            async for part in request.stream():
                size += len(part)
                self.held += len(part)
                if size > BODY:
                    raise Refused(413, f"the body holds more than {BODY / 1e6:.1f} MB")
                if self.held > BODIES:
                    raise Refused(503, "too many requests at once; try again")
                parts.append(part)
        except BaseException:  # a client that hangs up, too
            self.held -= size
            raise
        return b"".join(parts)

    def release(self, body: bytes) -> None:
        """``body`` is no longer needed."""
        self.held -= len(body)


@serve.deployment(max_ongoing_requests=64)  # more than a batch, so that one can fill while another is computed
class Server:
    """A replica: one fused model, warmed up before it gets a request."""

    def __init__(self, model: str, weights: str | None = None, batch: int = 8) -> None:
        classifier = load(model, weights)
        self.decode, self.predict = classifier.decode, Predictor(classifier, batch)
        self.bodies, self.decoders = Bodies(), asyncio.Semaphore(DECODERS)
        self.answer.set_max_batch_size(batch)

    @serve.batch(batch_wait_timeout_s=0.005)  # type: ignore[misc]
    async def answer(self, images: list[Tensor]) -> list[tuple[str, float]]:
        """The best class and its probability, for each request of a batch."""
        return await asyncio.to_thread(self.predict, images)

    async def image(self, request: Request) -> Tensor:
        """The model's input from the body of a request.

        Raises:
            Refused: there is none in it.
        """
        body = await self.bodies.read(request)
        try:
            async with self.decoders:
                return await asyncio.to_thread(self.decode, body)
        except ImageError as error:
            raise Refused(413 if isinstance(error, ImageTooLarge) else 400, str(error)) from error
        finally:
            self.bodies.release(body)

    async def __call__(self, request: Request) -> JSONResponse:
        """The answer to one request, or its refusal with the reason."""
        try:
            image = await self.image(request)
        except Refused as refusal:
            return JSONResponse({"error": str(refusal)}, status_code=refusal.status)
        label, probability = await self.answer(image)
        # JSON has no NaN, which broken weights give.
        return JSONResponse({"label": label, "probability": probability if math.isfinite(probability) else None})


def app(args: dict[str, Any]) -> serve.Application:
    """What ``serve run`` builds: ``model``, ``weights`` and ``batch`` as for :class:`Server`."""
    return Server.bind(args["model"], args.get("weights"), int(args.get("batch", 8)))  # type: ignore[attr-defined]
