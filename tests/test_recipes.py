"""Folders of images through Ray Data and requests through Ray Serve: what a fused model answers there is eager's.

Ray runs in processes on this machine, with no dashboard and no statistics sent.
"""

import asyncio
import concurrent.futures
import importlib
import importlib.util
import io
import json
import os
import pathlib
import socket
import types
import urllib.error
import urllib.request

import optional
import pytest
import torch

import resnet_fused as rf
from resnet_fused.cli import main as command
from resnet_fused.testing.budget import assert_within_budget
from resnet_fused.testing.models import ModelError, load
from resnet_fused.testing.statistics import calibrate
from resnet_fused.training import CheckpointError, DataError, image_folder

torchvision = optional.torchvision()
optional.needs("PIL", "safetensors")
recipe = importlib.import_module("resnet_fused.recipes.classifier")
Image, load_file = importlib.import_module("PIL.Image"), importlib.import_module("safetensors.torch").load_file
MODEL = "torchvision:resnet18"


def photo(i):
    """The bytes of an image: colours that differ between images, sizes too."""
    generator = torch.Generator().manual_seed(i)
    coarse = torch.rand(1, 3, 4 + i % 3, 5, generator=generator)
    pixels = torch.nn.functional.interpolate(coarse, size=(40 + 5 * i, 60), mode="bilinear")[0]
    data = io.BytesIO()
    Image.fromarray((255 * pixels).byte().permute(1, 2, 0).numpy()).save(data, "PNG")
    return data.getvalue()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of weights that tell images apart: random ones, with a head that is sure of itself."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18().eval()
    transform = torchvision.models.ResNet18_Weights.DEFAULT.transforms()
    images = torch.stack([transform(Image.open(io.BytesIO(photo(i)))) for i in range(8)])
    with torch.no_grad():
        calibrate(model, images, perturb=True)
        model.fc.weight.mul_(10)
        model.fc.bias -= model(images).mean(0)
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(model.state_dict(), path)
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Nine images, in a folder within it too, one that is broken, and a file that is none."""
    root = tmp_path_factory.mktemp("images")
    (root / "more").mkdir()
    for i in range(9):
        (root / ("more" if i % 3 == 0 else "") / f"{i}.png").write_bytes(photo(i))
    (root / "broken.jpg").write_bytes(photo(0)[:300])
    (root / "notes.txt").write_text("no image")
    return root


@pytest.fixture(scope="module")
def engine():
    """Ray with two slots for processes, each of one thread."""
    ray = pytest.importorskip("ray", reason="ray is not installed")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RAY_USAGE_STATS_ENABLED", "RAY_DATA_DISABLE_PROGRESS_BARS"):
            patch.setenv(name, "01"[name.endswith("BARS")])
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        ray.init(num_cpus=2, include_dashboard=False, object_store_memory=200 * 2**20, log_to_driver=False)
        yield ray
        ray.shutdown()


def eager_answers(weights, images):
    """Labels, and probabilities with all that their budget needs, of eager torchvision by its own transform."""
    model = torchvision.models.resnet18().eval()
    model.load_state_dict(torch.load(weights, weights_only=True))
    of = torchvision.models.ResNet18_Weights.DEFAULT
    x = torch.stack([of.transforms()(Image.open(io.BytesIO(data)).convert("RGB")) for data in images])
    with torch.no_grad():
        best = model(x).softmax(1).max(1)
        turned = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last)).softmax(1)
        exact = model.double()(x.double()).softmax(1)
    of_best = best.indices[:, None]
    labels = [of.meta["categories"][i] for i in best.indices.tolist()]
    assert len(set(labels)) > 3
    return labels, (best.values, exact.gather(1, of_best)[:, 0], turned.gather(1, of_best)[:, 0])


def test_a_folder_is_classified_as_eager_does(engine, weights, folder, tmp_path, capsys):
    from resnet_fused.recipes import ray_data

    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    out = str(tmp_path / "found.parquet")
    assert ray_data.main([str(folder), "--model", MODEL, "--weights", weights, "--out", out, "--batch", "4"]) == 0
    table = pandas.read_parquet(out)
    names = [os.path.join("more" if i % 3 == 0 else "", f"{i}.png") for i in range(9)]
    assert list(table["file"]) == sorted(["broken.jpg", *names])
    broken = table[table["file"] == "broken.jpg"].iloc[0]
    assert "cannot be read as an image" in broken["error"] and pandas.isna(broken["label"])
    told = capsys.readouterr()
    assert "broken.jpg: cannot be read" in told.err and "9 images classified, 1 broken" in told.out
    found = table.set_index("file").loc[names]
    assert not any(found["error"])
    labels, budget = eager_answers(weights, [photo(i) for i in range(9)])
    assert list(found["label"]) == labels
    assert_within_budget(torch.tensor(found["probability"].to_numpy(), dtype=torch.float32), *budget)


def test_an_actor_fuses_one_model_and_warms_it_up_once(weights, folder, monkeypatch):
    optional.needs("ray")
    from resnet_fused.recipes import ray_data

    calls = []
    monkeypatch.setattr(rf, "warmup", lambda model, x: calls.append((model, tuple(x.shape))))
    found = recipe.load(MODEL, weights)
    decode, classify = ray_data.Decode(found, str(folder)), ray_data.Classify(found, 3)
    assert [shape for _, shape in calls] == [(3, 3, 224, 224)]
    assert len(rf.report(calls[0][0]).fused) == 9 and not rf.is_fused(found.model)
    row = decode({"path": os.path.join(folder, "more", "0.png")})
    assert row["file"] == os.path.join("more", "0.png") and not row["error"]
    assert len(classify({k: [v] for k, v in row.items()})["label"]) == 1 and len(calls) == 1


def test_requests_that_come_together_are_one_batch(weights, monkeypatch):
    optional.needs("ray")
    from ray import serve

    # A module of its own: once its queue has run here the deployment could not be sent to Ray any more.
    spec = importlib.util.find_spec("resnet_fused.recipes.ray_serve")
    ray_serve = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ray_serve)
    config = types.SimpleNamespace(_deployment_config=types.SimpleNamespace(max_ongoing_requests=64))
    monkeypatch.setattr(serve, "get_replica_context", lambda: config)

    async def ask_all():
        server = ray_serve.Server.func_or_class(MODEL, weights, 4)
        sizes, predict = [], server.predict
        server.predict = lambda images: (sizes.append(len(images)), predict(images))[1]
        images = [server.take.decode(photo(i)) for i in range(6)]
        answers = await asyncio.gather(*map(server.answer, images))
        return sizes, answers, predict(images)

    sizes, answers, at_once = asyncio.run(ask_all())
    assert sizes == [4, 2]
    assert [label for label, _ in answers] == [label for label, _ in at_once]


def test_what_train_wrote_needs_nothing_else(tmp_path, capsys):
    for name, colour in (("blue", 2), ("red", 0)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(4):
            pixels = torch.randint(0, 60, (40, 40, 3), dtype=torch.uint8)
            pixels[..., colour] += 150
            Image.fromarray(pixels.numpy()).save(tmp_path / "images" / name / f"{i}.png")
    options = ("--epochs", "1", "--batch", "3", "--size", "24", "--device", "cpu", "--workers", "0")
    out = tmp_path / "run"
    assert command(["train", "resnet20", str(tmp_path / "images"), *options, "--out", str(out)]) == 0
    found = recipe.load(str(out / "model.safetensors"))
    tested = image_folder(tmp_path / "images", 24, 0).val
    images = [found.decode(pathlib.Path(path).read_bytes()) for path, _ in tested.samples]
    assert len(images) == 2 and all(torch.equal(x, tested[i][0]) for i, x in enumerate(images))
    eager = rf.resnet20(num_classes=2).eval()
    eager.load_state_dict(load_file(out / "model.safetensors"))
    with torch.no_grad():
        best = rf.unfuse(eager)(torch.stack(images)).softmax(1).max(1)
    answers = recipe.Predictor(found, 2)(images)
    assert [label for label, _ in answers] == [("blue", "red")[i] for i in best.indices]
    torch.testing.assert_close(torch.tensor([p for _, p in answers]), best.values)


def test_what_cannot_be_loaded_says_why(weights, tmp_path):
    optional.needs("timm")
    from resnet_fused.training import checkpoint

    with pytest.raises(ModelError, match="need weights"):
        recipe.load(MODEL)
    with pytest.raises(ModelError, match="IMAGENET1K_V1"):
        recipe.load(MODEL, "IMAGENET9")
    with pytest.raises(ModelError, match="there are: DEFAULT"):
        recipe.load("timm:resnet18", "IMAGENET9")
    with pytest.raises(CheckpointError, match="does not fit"):
        recipe.load("torchvision:resnet34", weights)
    state = torch.load(weights, weights_only=True)
    state["fc.weight"], state["fc.bias"] = state["fc.weight"][:5], state["fc.bias"][:5]
    torch.save(state, tmp_path / "five.pth")
    with pytest.raises(CheckpointError, match="fc has another shape"):
        recipe.load(MODEL, str(tmp_path / "five.pth"))
    plain = tmp_path / "plain.safetensors"
    checkpoint.write(plain, {"a": torch.zeros(1)}, {})
    with pytest.raises(CheckpointError, match="not written by resnet-fused train"):
        recipe.load(str(plain))
    facts = {"model": "resnet20", "size": 16, "classes": ["0"], "data": "digits"}
    checkpoint.write(plain, {"a": torch.zeros(1)}, {"resnet_fused": json.dumps(facts)})
    with pytest.raises(CheckpointError, match="digits, not on image files"):
        recipe.load(str(plain))


def test_an_empty_folder_is_named(engine, weights, tmp_path):
    from resnet_fused.recipes import ray_data

    with pytest.raises(DataError, match="no image"):
        ray_data.classify(str(tmp_path), recipe.load(MODEL, weights))


def timms_transform(model):
    timm = importlib.import_module("timm")
    return timm.data.create_transform(**timm.data.resolve_model_data_config(model))


@pytest.mark.parametrize(
    ("name", "transform"),
    [
        ("timm:resnet18", timms_transform),
        ("timm:resnet50d", timms_transform),
        ("torchvision:resnet50", lambda model: torchvision.models.ResNet50_Weights.IMAGENET1K_V2.transforms()),
    ],
)
def test_the_transform_is_that_of_the_models_weights(name, transform, tmp_path):
    optional.needs(name.partition(":")[0])
    model = load(name)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    found = recipe.load(name, str(tmp_path / "weights.pth"))
    image = Image.open(io.BytesIO(photo(3)))
    assert torch.equal(found.decode.transform(image), transform(model)(image))


def test_concurrent_requests_are_answered_as_eager_does(engine, weights):
    from ray import serve

    from resnet_fused.recipes import ray_serve

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(ray_serve.app({"model": MODEL, "weights": weights, "batch": "4"}))

    def ask(data):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", data, timeout=60) as answer:
            return json.load(answer)

    images = [photo(i) for i in range(9)]
    with concurrent.futures.ThreadPoolExecutor(9) as pool:
        answers = list(pool.map(ask, images))
    with pytest.raises(urllib.error.HTTPError) as refused:
        ask(images[0][:300])
    assert refused.value.code == 400 and "cannot be read" in json.load(refused.value)["error"]
    labels, budget = eager_answers(weights, images)
    assert [a["label"] for a in answers] == labels
    assert_within_budget(torch.tensor([a["probability"] for a in answers]), *budget)
