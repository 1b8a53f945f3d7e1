"""The families of models that users have: each fused, compared with eager, and left alone where the table says so.

Where a family's package is not among the tests' (detectron2, OpenMMLab, torchreid, the CIFAR repositories) stand-ins
written after its sources take its place: they prove the tables against that structure, not against the package.
"""

import copy
import functools
import importlib
import json

import numpy as np
import optional
import pytest
import torch
from torch import nn

import resnet_fused as rf
from resnet_fused.cli import main
from resnet_fused.fusion import adapters
from resnet_fused.testing.budget import assert_within_budget
from resnet_fused.testing.compare import flatten
from resnet_fused.testing.families import Row, add, markdown
from resnet_fused.testing.family_models import FAMILIES, Candidate
from resnet_fused.testing.models import load
from resnet_fused.testing.stand_ins import STAND_INS
from resnet_fused.testing.statistics import calibrate

torchvision = optional.torchvision()
tv = torchvision.models.resnet


def candidate(family, name):
    optional.needs(*FAMILIES[family].packages)
    return next(c for c in FAMILIES[family].models() if c.name == name)


def surveyed(found):
    row = Row("sample")
    add(row, found)
    assert not row.problems
    assert row.worst < 1
    return row


NORMS = "need nn.BatchNorm2d, nn.SyncBatchNorm or FrozenBatchNorm2d"

# model: (blocks fused, stems fused, what stays eager in some of them, why others are left alone)
TIMM = {
    "resnet18d": (8, 1, "the AvgPool2d in downsample stays eager", None),
    "resnetrs50": (16, 1, "se stays eager", None),
    "ecaresnet26t": (8, 1, "se stays eager", None),
    "resnetblur50": (16, 1, "aa stays eager", None),
    "seresnext26d_32x4d": (8, 1, "se stays eager", None),
    "resnet50_gn": (0, 0, None, f"bn1 is timm.layers.norm.GroupNorm, {NORMS}"),
    "res2net50_14w_8s": (0, 1, None, "a Res2Net block, which splits the channels of its second convolution"),
}


@pytest.mark.parametrize("name", TIMM)
def test_timm(name):
    blocks, stems, partly, alone = TIMM[name]
    row = surveyed(Candidate(name, functools.partial(load, f"timm:{name}")))
    assert (row.fused, row.stems) == (blocks, stems)
    assert partly in row.partly if partly else not row.partly
    assert set(row.alone) == ({alone} if alone else set())


OTHERS = {
    ("torchvision detection (backbones with FPN)", "torchvision:retinanet_resnet50_fpn, frozen norms"): (
        16, 1, set(), set(),
    ),
    ("torchvision RegNet", "torchvision:regnet_y_400mf"): (16, 0, {"f.se stays eager"}, set()),
    ("transformers ResNet", "ResNet-18"): (8, 1, set(), set()),
    ("transformers ResNet", "ResNet-50 v1"): (16, 1, set(), set()),
    ("transformers ResNet", "ResNet-18 silu"): (
        0, 0, set(),
        {f"{at}activation is transformers.activations.SiLUActivation, need nn.ReLU" for at in ("", "embedder.")},
    ),
    ("transformers DETR, RT-DETR", "RT-DETR r18"): (8, 1, {"the AvgPool2d in shortcut stays eager"}, set()),
    ("segmentation_models_pytorch", "Unet(resnet18)"): (8, 1, set(), set()),
    ("segmentation_models_pytorch", "DeepLabV3(resnet50)"): (16, 1, set(), set()),
    ("MONAI", "resnet10 2-D"): (4, 0, set(), set()),
    ("MONAI", "resnet10 3-D"): (0, 0, set(), {"conv1 is torch.nn.modules.conv.Conv3d, need nn.Conv2d"}),
    ("MONAI", "resnet10 2-D, shortcut A"): (1, 0, set(), {"downsample is no module but a partial"}),
}  # fmt: skip


@pytest.mark.parametrize(("family", "name"), OTHERS)
def test_other_families(family, name):
    blocks, stems, partly, alone = OTHERS[family, name]
    row = surveyed(candidate(family, name))
    assert (row.fused, row.stems, set(row.partly), set(row.alone)) == (blocks, stems, partly, alone)


def test_open_clip():
    row = surveyed(candidate("open_clip ModifiedResNet", "RN50"))
    assert (row.fused, row.stems) == (16, 1) and not row.alone
    assert sum(n for reason, n in row.partly.items() if "the AvgPool2d in downsample stays eager" in reason) == 4


ALONE = {
    "detectron2 DeformBottleneckBlock": "a block with a deformable convolution",
    "mmdet Bottleneck, with_cp": "it recomputes its activations (with_cp=True)",
    "mmdet Bottleneck, plugins": "it has plugins",
    "mmdet BasicBlock, GN": "norm1 is a GroupNorm, need nn.BatchNorm2d under the name bn1",
    "torchreid IBN": f"bn1 is torchreid.reid.models.resnet_ibn_a.IBN, {NORMS}",
    "kuangliu PreActBlock": None,  # its forward is no residual block's that we fuse, so nothing is said of it
}


@pytest.mark.parametrize("name", STAND_INS)
def test_stand_ins(name):
    row = surveyed(Candidate(name, STAND_INS[name], (2, 3, 24, 24)))
    if name in ALONE:
        assert row.fused == 0 and set(row.alone) == {ALONE[name]} - {None}
    else:
        assert row.fused == 3 and not row.alone


def test_option_a_stays_eager_in_a_fused_block():
    entries = rf.explain(STAND_INS["akamaster BasicBlock, option A"]())
    assert [e.reason for e in entries if e.reason] == [
        "shortcut stays eager: not a Sequential that ends in convolution and batch norm"
    ]


REFUSED = {  # a model with such a block, as the table words its reason
    "timm:seresnet18": None,  # timm's resnet, fused around its squeeze-excitation
    "timm:legacy_seresnet18": "it applies ReLU before its squeeze-excitation",
    "timm:resnest14d": "a ResNeSt block, with split attention",
    "timm:skresnet18": "a selective-kernel block, whose first convolution attends to two",
    "timm:skresnet50": "a selective-kernel block, whose second convolution attends to two",
    "timm:resnetv2_50": "a pre-activation block: norm and activation stand before a convolution",
    "timm:resnetv2_50x1_bit": "a pre-activation block: norm and activation stand before a convolution",
    "timm:resnetv2_50d_evos": "a pre-activation block: norm and activation stand before a convolution",
}


@pytest.mark.parametrize("spec", REFUSED)
def test_relatives_are_left_alone(spec):
    optional.needs(*[source for source in [spec.partition(":")[0]] if source in ("timm", "torchvision")])
    with torch.device("meta"):
        model = load(spec)
    report = rf.explain(model)
    blocks = [e for e in report if e.kind != "stem"]
    assert blocks
    assert {e.reason for e in report.skipped if e.kind != "stem"} == ({REFUSED[spec]} - {None})


PACKAGES = ("torchvision", "timm", "segmentation_models_pytorch", "open_clip", "monai", "transformers")
INSTALLED = tuple(f"{name}." for name in PACKAGES if not optional.missing(name))


def test_the_tables_name_classes_that_exist():
    """A class that its package has renamed would be left alone without a word."""
    names = [*adapters._BLOCKS, *adapters._REFUSED, *adapters._STEMS]
    present = [name for name in names if name.startswith(INSTALLED)]
    assert len(present) > 20 or optional.missing(*PACKAGES)
    for name in present:
        module, _, cls = name.rpartition(".")
        assert issubclass(getattr(importlib.import_module(module), cls), nn.Module), name


def test_the_known_parts_exist():
    from resnet_fused.modules.known import FROZEN_NORMS, PROJECTIONS

    for module, name in [*FROZEN_NORMS, *PROJECTIONS]:
        if module.startswith(INSTALLED):
            assert issubclass(getattr(importlib.import_module(module), name), nn.Module)


def test_the_command_prints_the_table(capsys, monkeypatch):
    assert main(["families", "own", "--limit", "1"]) == 0
    out = capsys.readouterr().out
    assert "| resnet_fused's own | 1 | 8 | 1 |" in out and "1 models in" in out
    assert main(["families", "own", "--limit", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"]
    assert main(["families", "no such"]) != 0
    assert "there are: " in capsys.readouterr().err


def test_calibrated_models_are_tame_on_other_images():
    """A norm after a global pooling sees hardly any difference between two images: its inverse is a great gain."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(16)).eval()
    calibrate(model, 10 * torch.randn(2, 3, 48, 48), perturb=True)
    with torch.no_grad():
        assert model(10 * torch.randn(8, 3, 48, 48)).abs().max() < 10


def test_the_survey_sees_a_wrong_answer(monkeypatch):
    wrong = torch.add
    monkeypatch.setattr(rf.FusedBasicBlock, "_rf_op", staticmethod(lambda x, *a, **k: wrong(x, 1)))
    row = Row("sample")
    make = lambda: nn.Sequential(torchvision.models.resnet.BasicBlock(3, 3))  # noqa: E731
    add(row, Candidate("wrong", make))
    assert row.problems and "outside" in markdown([row])


def photographs(size):
    """Scikit-learn's two photographs, ``[3, size, size·3/2]`` each."""
    optional.needs("sklearn")
    from sklearn.datasets import load_sample_images

    images = [torch.from_numpy(np.array(i)).permute(2, 0, 1).float()[None] / 255
              for i in load_sample_images().images]  # fmt: skip
    return [torch.nn.functional.interpolate(i, (size, size * 3 // 2), mode="area")[0] for i in images]


def greedy_nms(boxes, scores, threshold):
    """What torchvision's own does, whose library does not load beside a CPU-only torch."""
    order = scores.argsort(descending=True, stable=True)
    overlap = torchvision.ops.box_iou(boxes, boxes) > threshold
    kept, gone = [], torch.zeros(len(boxes), dtype=torch.bool)
    for i in order.tolist():
        if not gone[i]:
            kept.append(i)
            gone |= overlap[i]
    return torch.tensor(kept, dtype=torch.int64)


@pytest.fixture
def mask_rcnn(monkeypatch):
    """Mask R-CNN with random weights, for images of 64 × 96 pixels, its first stage frozen."""
    monkeypatch.setattr(torchvision.ops.boxes, "nms", greedy_nms)
    torch.manual_seed(0)
    stance = torch.compiler.set_stance("force_eager")  # else torchvision compiles its substitute for roi_align
    # The builder has frozen norms only with downloaded weights.
    body = tv.resnet50(norm_layer=torchvision.ops.FrozenBatchNorm2d)
    backbone = torchvision.models.detection.backbone_utils._resnet_fpn_extractor(body, 3)
    model = torchvision.models.detection.MaskRCNN(
        backbone, num_classes=4, min_size=64, max_size=96, box_score_thresh=0.0,
        rpn_post_nms_top_n_test=40, rpn_post_nms_top_n_train=40, rpn_pre_nms_top_n_train=100,
        rpn_pre_nms_top_n_test=100, box_detections_per_img=10, box_batch_size_per_image=8,
    ).eval()  # fmt: skip
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    calibrate(model.backbone.body, torch.stack(photographs(64)), perturb=True)
    with torch.no_grad():
        for weight in model.backbone.fpn.inner_blocks.parameters():
            weight.mul_(1e-3)  # else every proposal is the whole image
    with stance:
        yield model


def test_mask_rcnn_detects_what_eager_detects(mask_rcnn):
    images = photographs(64)
    fused = rf.fuse(mask_rcnn)
    assert len(rf.report(fused).fused) == 17 and not rf.report(fused).skipped
    with torch.no_grad():
        got, expected = flatten(fused(images)), flatten(mask_rcnn(images))
        turned = flatten(copy.deepcopy(mask_rcnn).to(memory_format=torch.channels_last)(images))
        exact = flatten(copy.deepcopy(mask_rcnn).double()([i.double() for i in images]))
    assert len(expected["0.labels"]) and len(expected["1.labels"])
    assert got.keys() == expected.keys()
    for key, want in expected.items():
        if want.is_floating_point():
            assert_within_budget(got[key], want, exact[key], turned[key])
        else:
            assert torch.equal(got[key], want)


def test_a_fine_tuning_step_of_mask_rcnn_gives_eagers_gradients(mask_rcnn):
    images = photographs(64)[:1]
    boxes = torch.tensor([[5.0, 10.0, 40.0, 50.0], [30.0, 10.0, 90.0, 60.0]])
    masks = torch.zeros(2, 64, 96, dtype=torch.uint8)
    masks[0, 10:50, 5:40] = masks[1, 10:60, 30:90] = 1

    def step(model, dtype):
        torch.manual_seed(1)  # of the boxes that are drawn for the losses
        model.train()
        targets = [{"boxes": boxes.to(dtype), "labels": torch.tensor([1, 2]), "masks": masks} for _ in images]
        losses = model([i.to(dtype) for i in images], targets)
        sum(losses.values()).backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    # In float64: the float32 gradients of a few numbers after a whole network are a matter of luck, eager's too.
    eager = mask_rcnn.double()
    fused, expected = step(rf.fuse(eager), torch.float64), step(eager, torch.float64)
    assert fused.keys() == expected.keys()
    assert any("layer2.0.conv1" in name for name in fused) and not any("layer1" in name for name in fused)
    for name, grad in expected.items():
        torch.testing.assert_close(fused[name], grad, rtol=1e-7, atol=1e-9 * float(grad.abs().max()))


def test_deeplabv3_maps():
    model = load("torchvision:deeplabv3_resnet50")
    x = torch.stack(photographs(64))
    calibrate(model, x, perturb=True)
    fused = rf.fuse(model, strict=True)
    with torch.no_grad():
        got, expected = fused(x)["out"], model(x)["out"]
        turned = copy.deepcopy(model).to(memory_format=torch.channels_last)(x)["out"]
        exact = model.double()(x.double())["out"]
    assert_within_budget(got, expected, exact, turned)
    best, second = exact.topk(2, 1).values.unbind(1)
    error = max((out.double() - exact).abs().max() for out in (got, expected))
    clear = best - second > 2 * error  # nowhere else may rounding decide
    assert clear.double().mean() > 0.95
    assert torch.equal(got.argmax(1)[clear], expected.argmax(1)[clear])
