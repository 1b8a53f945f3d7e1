"""Requests of any content: the answer, or a status below 500 and the reason; bodies within bounds on memory."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import json
import os
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optional
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from resnet_fused.training.data import evaluation_transform

optional.needs("starlette", "PIL", "torchvision")
hostile_images = importlib.import_module("hostile_images")
recipe = importlib.import_module("resnet_fused.recipes.classifier")
Request = importlib.import_module("starlette.requests").Request
PNG = hostile_images.blank(8, 8, "PNG")


@pytest.fixture(scope="module")
def serving() -> Any:
    """The recipe, in a module of its own."""
    optional.needs("ray")
    spec = importlib.util.find_spec("resnet_fused.recipes.ray_serve")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Ask:
    """A server whose model answers at once, asked as an ASGI server would."""

    def __init__(self, serving: Any) -> None:
        self.serving, self.decode, self.most = serving, recipe.Decoder(evaluation_transform(8)), 0
        self.answered: list[Any] = []
        self.probability = 0.5

    async def answer(self, image: Any) -> tuple[str, float]:
        self.answered.append(image.shape)
        return "cat", self.probability

    async def one(self, server: Any, parts: Iterable[bytes], headers: dict[str, str]) -> tuple[int, Any]:
        queue = iter(parts)

        async def receive() -> dict[str, Any]:
            await asyncio.sleep(0)
            part = next(queue, None)
            self.most = max(self.most, server.take.held)
            return {"type": "http.request", "body": part or b"", "more_body": part is not None}

        raw = [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in headers.items()]
        request = Request({"type": "http", "headers": raw}, receive)
        response = await self.serving.Server.func_or_class.__call__(server, request)
        return response.status_code, json.loads(response.body)

    def __call__(self, *requests: Iterable[bytes], **headers: str) -> list[tuple[int, Any]]:
        async def all_of_them() -> list[tuple[int, Any]]:
            server = SimpleNamespace(take=self.serving.Intake(self.decode), answer=self.answer)
            answers = await asyncio.gather(*(self.one(server, parts, headers) for parts in requests))
            assert server.take.held == 0
            return list(answers)

        return asyncio.run(all_of_them())


@pytest.fixture
def ask(serving: Any) -> Ask:
    return Ask(serving)


def test_an_image_in_parts_is_answered(ask):
    assert ask([PNG[:20], PNG[20:]], content_length=str(len(PNG))) == [(200, {"label": "cat", "probability": 0.5})]
    assert ask.answered == [(3, 8, 8)]


def endless(size: int = 1 << 20) -> Iterable[bytes]:
    while True:
        yield bytes(size)


def test_what_json_cannot_say_is_none(ask):
    """A model of broken weights gives NaN."""
    ask.probability = float("nan")
    assert ask([PNG]) == [(200, {"label": "cat", "probability": None})]


def test_all_bodies_together_are_bounded(serving, ask):
    def large() -> Iterable[bytes]:
        for _ in range(20):
            yield bytes(1 << 20)

    answers = ask(*(large() for _ in range(64)))
    assert {status for status, _ in answers} == {400, 503}
    assert ask.most <= serving.MAX_HELD + 64 * (1 << 20)
    assert ask([PNG])[0][0] == 200


@pytest.mark.parametrize(
    ("name", "status", "told"),
    [("a line", 400, "1x12000"), ("169 million pixels", 413, "13000x13000"), ("scans without end", 413, "scans")],
)
def test_images_that_claim_too_much_are_refused(name, status, told, ask):
    ((got, answer),) = ask([hostile_images.IMAGES[name]()])
    assert got == status and told in answer["error"]


@given(parts=st.lists(st.one_of(st.binary(max_size=100), st.sampled_from([PNG, PNG[:30], PNG[30:]])), max_size=4))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_body_of_any_kind_is_answered_or_refused(ask, parts):
    ((status, answer),) = ask(parts)
    assert (status == 200 and answer["label"] == "cat") or (status in (400, 413) and answer["error"])


def test_folders_hold_anything(tmp_path):
    """Ray Data's part: each file gives an image or the reason; the model's input is never of another shape."""
    optional.needs("ray")
    data = importlib.import_module("resnet_fused.recipes.ray_data")
    classifier = recipe.Classifier(None, recipe.Decoder(evaluation_transform(8)), ["cat"])
    (tmp_path / "good.png").write_bytes(PNG)
    (tmp_path / "line.png").write_bytes(hostile_images.IMAGES["a line"]())
    (tmp_path / "empty.png").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "gone.png").symlink_to("nowhere")
    name = os.fsdecode(b"odd\xff.png")
    Path(tmp_path / name).write_bytes(PNG)
    decode = data.Decode(classifier, str(tmp_path))
    rows = {row["file"]: row for row in (decode({"path": os.fsencode(path)}) for path in tmp_path.iterdir())}
    reasons = {file: row["error"] for file, row in rows.items()}
    assert reasons["good.png"] == reasons["odd\\xff.png"] == ""
    assert "1x12000" in reasons["line.png"] and "no regular file" in reasons["pipe.png"] and reasons["zero.png"]
    assert "No such file" in reasons["gone.png"] and "cannot be read as an image" in reasons["empty.png"]
    assert {row["image"].shape for row in rows.values()} == {(3, 8, 8)}
