"""Serve a fused classifier with Ray Serve. Images are posted as the bytes of their files; the answer is JSON::

    serve run resnet_fused.recipes.ray_serve:app model=torchvision:resnet50 weights=DEFAULT
    curl --data-binary @cat.jpg http://localhost:8000/     # {"label": …, "probability": …}

Requests that come together are answered in one batch. Replicas, GPUs and scaling are Ray Serve's own settings, in its
config file or by ``Server.options``: ``Server.options(num_replicas=2, ray_actor_options={"num_gpus": 1})``.

What a request may cost is bounded: ``images`` bounds a body's bytes and an image's pixels, and a replica holds at most
``MAX_HELD`` bytes of bodies and decodes at most ``DECODERS`` images at once.
"""

from __future__ import annotations

import asyncio
import math
from typing import Any

from ray import serve
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from torch import Tensor

from resnet_fused.recipes.classifier import Decoder, Predictor, load
from resnet_fused.training import images

MAX_HELD = 256 * 2**20
DECODERS = 2


class Refused(Exception):
    """A request that is not answered: the status and the reason."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Intake:
    """From requests to a model's inputs, for all requests of one event loop."""

    def __init__(self, decode: Decoder) -> None:
        self.decode, self.held, self.decoding = decode, 0, asyncio.Semaphore(DECODERS)

    async def __call__(self, request: Request) -> Tensor:
        """The input that a request's body holds.

        Raises:
            Refused: 413 where the body or the image is too large, 400 where it is no image that can be used, 503 where
                the bodies of other requests take the memory.
        """
        chunks: list[bytes] = []
        length = 0
        try:
            declared = request.headers.get("content-length", "")
            if declared.isascii() and declared.isdecimal() and (len(declared) > 18 or int(declared) > images.MAX_BYTES):
                raise Refused(413, f"the body has {declared[:20]} bytes; at most {images.MAX_BYTES} are read")
            async for chunk in request.stream():
                length += len(chunk)
                self.held += len(chunk)
                if length > images.MAX_BYTES:
                    raise Refused(413, f"the body has more than {images.MAX_BYTES} bytes")
                if self.held > MAX_HELD:
                    raise Refused(503, "other requests take the memory for bodies; try again later")
                chunks.append(chunk)
            async with self.decoding:
                body = b"".join(chunks)
                chunks.clear()
                return await asyncio.to_thread(self.decode, body)
        except ClientDisconnect as error:
            raise Refused(400, "the request ended before its body did") from error
        except images.ImageTooLargeError as error:
            raise Refused(413, str(error)) from error
        except ValueError as error:
            raise Refused(400, str(error)) from error
        finally:
            self.held -= length


@serve.deployment(max_ongoing_requests=64)  # more than a batch, so that one can fill while another is computed
class Server:
    """A replica: one fused model, warmed up before it gets a request."""

    def __init__(self, model: str, weights: str | None = None, batch: int = 8) -> None:
        classifier = load(model, weights)
        self.take, self.predict = Intake(classifier.decode), Predictor(classifier, batch)
        self.answer.set_max_batch_size(batch)

    @serve.batch(batch_wait_timeout_s=0.005)  # type: ignore[misc]
    async def answer(self, images: list[Tensor]) -> list[tuple[str, float]]:
        """The best class and its probability, for each request of a batch."""
        return await asyncio.to_thread(self.predict, images)

    async def __call__(self, request: Request) -> JSONResponse:
        """The answer to one request, or the reason why there is none, with the status of :class:`Refused`."""
        try:
            image = await self.take(request)
        except Refused as error:
            return JSONResponse({"error": str(error)}, status_code=error.status)
        label, probability = await self.answer(image)
        # JSON has no NaN, which broken weights give.
        return JSONResponse({"label": label, "probability": probability if math.isfinite(probability) else None})


def app(args: dict[str, Any]) -> serve.Application:
    """What ``serve run`` builds: ``model``, ``weights`` and ``batch`` as for :class:`Server`."""
    return Server.bind(args["model"], args.get("weights"), int(args.get("batch", 8)))  # type: ignore[attr-defined]
