"""torchvision's own RetinaNet, SSD and FCOS, trained with our losses and with theirs: the same numbers."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections import OrderedDict
from importlib import import_module
from types import SimpleNamespace

import peers
import pytest
import torch
from conftest import DEVICE
from torch import nn

import fusedyolo

torchvision = peers.torchvision()
integration = import_module("fusedyolo.integrations.torchvision")  # after torchvision: it may need help to load
patch, unpatch = integration.patch, integration.unpatch

detection = torchvision.models.detection
utils = detection._utils
AnchorGenerator = detection.anchor_utils.AnchorGenerator
DefaultBoxGenerator = detection.anchor_utils.DefaultBoxGenerator
SSD = detection.ssd.SSD
boxes_module = torchvision.ops.boxes

KINDS = ("retinanet", "ssd", "fcos")
NAMES = {
    "retinanet": {"classification", "bbox_regression"},
    "ssd": {"classification", "bbox_regression"},
    "fcos": {"classification", "bbox_regression", "bbox_ctrness"},
}
CLASSES = 4
SIDE = 64


@pytest.fixture(params=["reference", "triton"])
def backend(request, monkeypatch):
    if request.param == "reference":
        monkeypatch.setenv("FUSEDYOLO_DISABLE", "1")
    return request.param


@pytest.fixture
def reference(monkeypatch):
    monkeypatch.setenv("FUSEDYOLO_DISABLE", "1")


@pytest.fixture(autouse=True)
def _same_convolutions():
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield


class Backbone(nn.Module):
    """Maps of 8 and 16 pixels a cell."""

    def __init__(self, channels, out_channels):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 5, 8, 2)
        self.down = nn.Conv2d(channels, channels, 3, 2, 1)
        self.out_channels = out_channels

    def forward(self, x):
        first = self.stem(x).relu()
        return OrderedDict(first=first, second=self.down(first).relu())


def retinanet(cls=detection.RetinaNet, loss_type="l1", **settings):
    generator = AnchorGenerator(((12, 16), (24, 33)), ((0.5, 1.0, 2.0),) * 2)
    model = cls(Backbone(8, 8), CLASSES, SIDE, SIDE, anchor_generator=generator, **settings)
    model.head.regression_head._loss_type = loss_type
    return model


def ssd(cls=SSD, **settings):
    generator = DefaultBoxGenerator([[2], [2, 3]], scales=[0.2, 0.4, 0.8])
    return cls(Backbone(8, [8, 8]), generator, (SIDE, SIDE), CLASSES, **settings)


def fcos(cls=detection.FCOS, **settings):
    generator = AnchorGenerator(((4,), (8,)), ((1.0,),) * 2)
    return cls(Backbone(32, 32), CLASSES, SIDE, SIDE, anchor_generator=generator, **settings)


MAKERS = {"retinanet": retinanet, "ssd": ssd, "fcos": fcos}


def vary(model):
    """Weights that make predictions differ from place to place, which torchvision's own initial ones do not."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.kaiming_uniform_(parameter, nonlinearity="relu")
    return model


def make(kind, seed=0, **settings):
    torch.manual_seed(seed)
    return vary(MAKERS[kind](**settings)).to(DEVICE).train()


def objects(kind, seed, counts=(3, 0, 5)):
    """Images of several sizes and as many objects in each as ``counts`` says."""
    gen = torch.Generator().manual_seed(seed)
    images, targets = [], []
    for i, n in enumerate(counts):
        height, width = (SIDE, SIDE - 8 * i)
        images.append(torch.rand(3, height, width, generator=gen).to(DEVICE))
        size = torch.tensor([width, height])
        corner = torch.rand(n, 2, generator=gen) * 0.7 * size
        side = 3 + torch.rand(n, 2, generator=gen) * (size - 3 - corner)
        labels = torch.randint(int(kind == "ssd"), CLASSES, (n,), generator=gen)  # to SSD, 0 is the background
        targets.append({"boxes": torch.cat((corner, corner + side), 1).to(DEVICE), "labels": labels.to(DEVICE)})
    return images, targets


def gradients(model, images, targets, weights=None):
    """The losses and the gradient of their (weighted) sum."""
    model.zero_grad()
    losses = model(images, targets)
    sum(value * (weights or {}).get(name, 1.0) for name, value in losses.items()).backward()
    return losses, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected, rtol):
    """Losses and gradients. One counts by the largest of its parameter, or by 1/100 of the largest of all: that of a
    bias before a normalisation is nothing but rounding.
    """
    assert list(found[0]) == list(expected[0])  # code that takes values() goes by the order
    for name, value in expected[0].items():
        assert found[0][name].shape == ()
        torch.testing.assert_close(found[0][name], value, rtol=rtol, atol=0, msg=lambda m, n=name: f"{n}: {m}")
    assert found[1].keys() == expected[1].keys()
    largest = max(value.abs().max().item() for value in expected[1].values())
    for name, value in expected[1].items():
        atol = rtol * max(value.abs().max().item(), 1e-2 * largest)
        torch.testing.assert_close(found[1][name], value, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


# The same losses and gradients.


@pytest.mark.parametrize("counts", [(3, 0, 5), (0, 0, 0), (1, 12, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_torchvision(kind, counts, backend):
    model, batch = make(kind), objects(kind, 1, counts)
    expected = gradients(model, *batch)
    assert patch(model) is model
    found = gradients(model, *batch)
    assert found[0].keys() == NAMES[kind]
    assert_same(found, expected, 1e-5)
    assert all(value.dtype == torch.float32 for value in found[0].values())


@pytest.mark.parametrize("kind", KINDS)
def test_counts_of_the_last_call(kind, reference):
    model, (images, targets) = make(kind), objects(kind, 0)
    targets[0]["labels"][0] = CLASSES + 5  # no such class
    patch(model)
    assert fusedyolo.last_counts(model) == []
    model(images, targets)
    (found,) = fusedyolo.last_counts(nn.DataParallel(model))
    assert int(found.num_invalid) == 1
    assert int(found.num_pos) > 0
    assert fusedyolo.last_counts(copy.deepcopy(model)) == []
    assert fusedyolo.last_counts(unpatch(model)) == []


@pytest.mark.parametrize("kind", KINDS)
def test_float64(kind, reference):
    """Of images of the size that the model asks for: a loss takes boxes for float32, which scaled ones would not be."""
    model, (images, targets) = make(kind).double(), objects(kind, 2)
    images = [torch.rand(3, SIDE, SIDE, dtype=torch.float64, device=DEVICE) for _ in images]
    targets = [{"boxes": t["boxes"].double(), "labels": t["labels"]} for t in targets]
    expected = gradients(model, images, targets)
    assert_same(gradients(patch(model), images, targets), expected, 1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind, backend):
    """Features and anchors are bfloat16, as torchvision has them; it sums in bfloat16 in places."""
    model, batch = make(kind), objects(kind, 3)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        expected = model(*batch)
        found = patch(model)(*batch)
    sum(found.values()).backward()
    for name, value in expected.items():
        torch.testing.assert_close(found[name].float(), value.float(), rtol=2e-2, atol=0)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_boxes_in_half_precision(kind, dtype, backend):
    """But for FCOS in float16, where 1e8 less an area is infinite, so that each cell gets an object."""
    model, (images, targets) = make(kind), objects(kind, 3)
    targets = [{"boxes": item["boxes"].to(dtype), "labels": item["labels"]} for item in targets]
    wide = [{"boxes": item["boxes"].float(), "labels": item["labels"]} for item in targets]
    expected = model(images, wide if kind == "fcos" and dtype == torch.float16 else targets)
    found = patch(model)(images, targets)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value.float(), rtol=2e-2, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_each_loss_has_its_own_gradient(kind, backend):
    model, batch = make(kind), objects(kind, 4)
    weights = {"classification": 0.25, "bbox_regression": 3.0, "bbox_ctrness": 0.0}
    expected = gradients(model, *batch, weights)
    assert_same(gradients(patch(model), *batch, weights), expected, 1e-5)
    losses = model(*batch)
    last = {"classification": "classification", "bbox_regression": "regression", "bbox_ctrness": "regression"}
    for name, loss in losses.items():
        parameters = dict(model.head.named_parameters())
        found = torch.autograd.grad(loss, parameters.values(), retain_graph=True, allow_unused=True)
        moved = {key for key, grad in zip(parameters, found, strict=True) if grad is not None and grad.any()}
        assert moved
        assert all(last[name] in key for key in moved)


SETTINGS = [
    ("retinanet", {"loss_type": "smooth_l1"}),
    ("retinanet", {"loss_type": "giou"}),
    ("retinanet", {"loss_type": "diou"}),
    ("retinanet", {"loss_type": "ciou"}),
    ("retinanet", {"fg_iou_thresh": 0.7, "bg_iou_thresh": 0.3}),
    ("retinanet", {"proposal_matcher": utils.Matcher(0.6, 0.6, False)}),
    ("ssd", {"iou_thresh": 0.3}),
    ("ssd", {"positive_fraction": 0.4}),
    ("fcos", {"center_sampling_radius": 2.5}),
]


@pytest.mark.parametrize(("kind", "settings"), SETTINGS)
def test_settings_of_the_model_are_those_of_the_loss(kind, settings, backend):
    batch = objects(kind, 5)
    plain = make(kind)(*batch)
    model = make(kind, **settings)
    expected = gradients(model, *batch)
    assert any(not torch.equal(value, plain[name]) for name, value in expected[0].items())
    assert_same(gradients(patch(model), *batch), expected, 1e-5)


@pytest.mark.parametrize(("kind", "where"), [("retinanet", "head.regression_head"), ("ssd", "")])
def test_weights_of_the_box_coder_are_those_of_the_loss(kind, where, reference):
    model, batch = make(kind), objects(kind, 6)
    plain = model(*batch)
    model.get_submodule(where).box_coder = utils.BoxCoder((3.0, 2.0, 1.5, 7))
    expected = gradients(model, *batch)
    assert not torch.equal(expected[0]["bbox_regression"], plain["bbox_regression"])
    assert_same(gradients(patch(model), *batch), expected, 1e-5)


def test_ssdlite(reference):
    torch.manual_seed(0)
    model = detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=CLASSES)
    vary(model).to(DEVICE).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()  # of two images and a map of one place, what it divides by is next to nothing
    batch = objects("ssd", 7, (2, 0))
    expected = gradients(model, *batch)
    assert_same(gradients(patch(model), *batch), expected, 1e-5)


class DerivedRetinaNet(detection.RetinaNet):
    """Of another class, with the loss of the first."""


class DerivedFCOS(detection.FCOS):
    """Likewise."""


class DerivedSSD(SSD):
    """Whose forward looks at the anchors itself, in training too."""

    def forward(self, images, targets=None):
        found = self.transform(images, targets)[0]
        maps = list(self.backbone(found.tensors).values())
        assert len(list(self.anchor_generator(found, maps))) == len(images)
        return super().forward(images, targets)


@pytest.mark.parametrize(("kind", "cls"), [("retinanet", DerivedRetinaNet), ("ssd", DerivedSSD), ("fcos", DerivedFCOS)])
def test_derived_classes(kind, cls, reference):
    model, batch = make(kind, cls=cls), objects(kind, 8)
    expected = gradients(model, *batch)
    assert_same(gradients(patch(model), *batch), expected, 1e-5)


def test_another_number_of_classes_after_patching(reference):
    model, batch = patch(make("retinanet")), objects("retinanet", 9)
    model(*batch)
    in_channels, anchors = model.backbone.out_channels, model.anchor_generator.num_anchors_per_location()[0]
    model.head.classification_head = detection.retinanet.RetinaNetClassificationHead(in_channels, anchors, 7).to(DEVICE)
    found = gradients(model, *batch)
    assert_same(found, gradients(unpatch(model), *batch), 1e-5)


# The rest of the model.


@pytest.mark.parametrize("kind", KINDS)
def test_anchors_are_made_once(kind, reference, monkeypatch):
    made = []
    for cls, name in ((AnchorGenerator, "grid_anchors"), (DefaultBoxGenerator, "_grid_default_boxes")):
        original = getattr(cls, name)
        monkeypatch.setattr(cls, name, lambda *args, f=original, **kw: made.append(1) or f(*args, **kw))
    model = patch(make(kind))
    for seed, counts in enumerate([(1, 2), (2, 2), (4, 0, 3)]):
        model(*objects(kind, seed, counts))
    assert len(made) == 1
    model.double()([torch.rand(3, SIDE, SIDE, dtype=torch.float64, device=DEVICE)], objects(kind, 0, (1,))[1])
    assert len(made) == 2
    generator, features = model.anchor_generator, torch.zeros(1, 8, 5, 5, device=DEVICE)
    for side in range(integration.KEPT + 5):
        images = detection.image_list.ImageList(torch.zeros(2, 3, 40, 40 + side), [(40, 40)] * 2)
        generator(images, [features] * 2)
    assert len(generator.kept) == integration.KEPT


def test_ssd_is_spared_its_own_matching(reference, monkeypatch):
    model, batch = make("ssd"), objects("ssd", 1)
    matched = []
    original = utils.SSDMatcher.__call__
    monkeypatch.setattr(utils.SSDMatcher, "__call__", lambda *args: matched.append(1) or original(*args))
    model(*batch)
    assert len(matched) == 2
    patch(model)  # which tries it out
    del matched[2:]
    model(*batch)
    assert len(matched) == 2


def test_anchors_first_made_in_inference_mode_can_be_trained_with(reference):
    for kind in KINDS:
        model, batch = patch(make(kind)), objects(kind, 1)
        with torch.inference_mode():
            model(*batch)
        assert not any(found.is_inference() for found in model.anchor_generator.kept.values())
        sum(model(*batch).values()).backward()


@pytest.fixture
def by_score(monkeypatch):
    """Suppression of nothing, for torchvision's own is compiled and may not load."""
    monkeypatch.setattr(boxes_module, "batched_nms", lambda boxes, scores, *_: scores.argsort(descending=True))


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_stay_as_they_are(kind, by_score):
    model = make(kind, score_thresh=0.0).eval()
    images, targets = objects(kind, 2)
    expected = model(images)
    assert all(len(item["boxes"]) for item in expected)
    patch(model)
    model.train()(images, targets)
    model.eval()
    for found in (model(images), model(images)):
        assert_equal_detections(found, expected)
    model.anchor_generator.train()
    model.training = False  # only the model's own mode counts
    assert_equal_detections(model(images), expected)
    model.eval()
    model.training = True
    assert model(images, targets).keys() == NAMES[kind]


def assert_equal_detections(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("kind", KINDS)
def test_unpatch_restores_everything(kind, reference):
    model, batch = make(kind), objects(kind, 3)
    generator, keys, attributes = model.anchor_generator, list(model.state_dict()), set(vars(model))
    modules = [name for name, _ in model.named_modules()]
    expected = gradients(model, *batch)
    assert unpatch(model) is model  # nothing to do
    assert patch(model) is patch(model) is model
    assert model.anchor_generator is not generator
    assert model.anchor_generator.original is generator
    assert list(model.state_dict()) == keys
    assert unpatch(model) is unpatch(model) is model
    assert model.anchor_generator is generator
    assert set(vars(model)) == attributes
    assert [name for name, _ in model.named_modules()] == modules
    found = gradients(model, *batch)
    assert all(torch.equal(found[0][name], value) for name, value in expected[0].items())
    patch(model)
    model.anchor_generator = other = copy.deepcopy(generator)
    assert unpatch(model).anchor_generator is other


def saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved])
@pytest.mark.parametrize("kind", KINDS)
def test_copies_of_a_patched_model(kind, clone, reference):
    model, batch = patch(make(kind)), objects(kind, 4)
    expected = gradients(model, *batch)
    twin = clone(model)
    assert not twin.anchor_generator.kept
    assert twin.anchor_generator.original is not model.anchor_generator.original
    for parameter in model.parameters():
        parameter.data.zero_()
    assert_same(gradients(twin, *batch), expected, 0)
    assert patch(twin).compute_loss is not model.compute_loss
    twin.eval()
    model.train()
    assert isinstance(twin.anchor_generator(*prepared(twin, batch)), list)
    assert len(list(twin.anchor_generator(*prepared(twin, batch)))) == len(batch[0])
    assert "compute_loss" not in vars(unpatch(twin))


def prepared(model, batch):
    """What the generator of anchors is called with."""
    images, _ = model.transform(batch[0], None)
    return images, list(model.backbone(images.tensors).values())


@pytest.mark.parametrize("kind", KINDS)
def test_states_go_both_ways(kind, reference):
    batch = objects(kind, 5)
    source, model = make(kind, 1), patch(make(kind, 2))
    expected = gradients(source, *batch)
    model(*batch)
    model.load_state_dict(source.state_dict())
    assert_same(gradients(model, *batch), expected, 1e-5)
    other = make(kind, 3)
    other.load_state_dict(model.state_dict())
    assert_same(gradients(other, *batch), expected, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_generator_answers_for_the_original(kind):
    model = make(kind)
    original = model.anchor_generator
    found = patch(model).anchor_generator
    assert found.num_anchors_per_location() == original.num_anchors_per_location()
    assert found.aspect_ratios is original.aspect_ratios
    with pytest.raises(AttributeError, match="colour"):
        found.colour  # noqa: B018


def enlarge(generator):
    generator.cell_anchors = [2 * each for each in generator.cell_anchors]


def enlarge_in_place(generator):
    for each in generator.cell_anchors:
        each.mul_(2)


def replace_method(generator):
    original = generator.grid_anchors
    generator.grid_anchors = lambda *args: [each + 2 for each in original(*args)]


@pytest.mark.parametrize("directly", [False, True])
@pytest.mark.parametrize("change", [enlarge, enlarge_in_place, replace_method], ids=lambda change: change.__name__)
def test_what_is_set_on_the_generator_arrives_at_the_original(change, directly, reference):
    """Nothing that was made before is used, also where the original itself was changed."""
    model, other, batch = patch(make("retinanet")), make("retinanet"), objects("retinanet", 2)
    before = model(*batch)
    other(*batch)
    change(model.anchor_generator.original if directly else model.anchor_generator)
    change(other.anchor_generator)
    expected = gradients(other, *batch)
    assert not torch.equal(expected[0]["classification"], before["classification"])
    for _ in range(2):
        assert_same(gradients(model, *batch), expected, 1e-5)
    assert_same(gradients(unpatch(model), *batch), expected, 1e-5)


def test_new_attributes_of_the_generator_are_the_originals():
    model = patch(make("ssd"))
    model.anchor_generator.colour = "red"
    model.anchor_generator.clip = False
    model.eval()
    assert not model.anchor_generator.training
    assert unpatch(model).anchor_generator.colour == "red"
    assert model.anchor_generator.clip is False


# What cannot be patched.


class OwnMatcher(utils.Matcher):
    """A matcher of another class."""


class OwnCoder(utils.BoxCoder):
    """A coder of another class."""


class OwnLoss(detection.RetinaNet):
    def compute_loss(self, targets, head_outputs, anchors):
        return super().compute_loss(targets, head_outputs, anchors)


class OwnGenerator(AnchorGenerator):
    def forward(self, image_list, feature_maps):
        return super().forward(image_list, feature_maps)


class OwnHead(detection.retinanet.RetinaNetClassificationHead):
    def compute_loss(self, targets, head_outputs, matched_idxs):
        return 2 * super().compute_loss(targets, head_outputs, matched_idxs)


def put(path, value):
    """A change of one attribute of a model."""

    def change(model):
        owner, _, name = path.rpartition(".")
        target = model
        for part in owner.split(".") if owner else ():
            target = getattr(target, part)
        setattr(target, name, value)

    return change


def nothing(*args):
    return {}


def with_a_buffer(model):
    model.anchor_generator.register_buffer("seen", torch.zeros(1))


REFUSED = [
    ("retinanet", put("proposal_matcher", OwnMatcher(0.5, 0.4)), r"model\.proposal_matcher: a OwnMatcher"),
    ("retinanet", put("proposal_matcher", utils.SSDMatcher(0.5)), r"model\.proposal_matcher: a SSDMatcher"),
    ("ssd", put("proposal_matcher", utils.Matcher(0.5, 0.4)), r"model\.proposal_matcher: a Matcher"),
    (
        "retinanet",
        put("head.regression_head.box_coder", OwnCoder((1, 1, 1, 1))),
        r"model\.head\.regression_head\.box_coder: a OwnCoder",
    ),
    ("ssd", put("box_coder", OwnCoder((1, 1, 1, 1))), r"model\.box_coder: a OwnCoder"),
    ("ssd", put("box_coder.bbox_xform_clip", 2.0), r"model\.box_coder\.bbox_xform_clip: 2\.0"),
    ("fcos", put("head.box_coder", utils.BoxCoder((1, 1, 1, 1))), r"model\.head\.box_coder: a BoxCoder"),
    ("fcos", put("head.box_coder", utils.BoxLinearCoder(False)), r"model\.head\.box_coder\.normalize_by_size: False"),
    ("retinanet", put("head.regression_head._loss_type", "l2"), r"model\.head\.regression_head\._loss_type: 'l2'"),
    ("retinanet", put("compute_loss", nothing), r"model\.compute_loss: one of its own in a RetinaNet"),
    ("ssd", put("compute_loss", nothing), r"model\.compute_loss: one of its own in a SSD"),
    ("fcos", put("compute_loss", nothing), r"model\.compute_loss: one of its own in a FCOS"),
    ("fcos", put("head.compute_loss", nothing), r"model\.head\.compute_loss: one of its own in a FCOSHead"),
    ("retinanet", put("head", nn.Identity()), r"model\.head\.compute_loss: one of its own in a Identity"),
    (
        "retinanet",
        put("head.classification_head", OwnHead(8, 6, 4)),
        r"model\.head\.classification_head\.compute_loss: one of its own in a OwnHead",
    ),
    (
        "retinanet",
        put("head.regression_head.compute_loss", nothing),
        r"model\.head\.regression_head\.compute_loss: one of its own",
    ),
    ("fcos", put("anchor_generator", OwnGenerator()), r"model\.anchor_generator: a OwnGenerator with its own forward"),
    ("ssd", put("anchor_generator", nn.Identity()), r"model\.anchor_generator: a Identity with its own forward"),
    ("ssd", put("neg_to_pos_ratio", -1.0), r"neg_to_pos_ratio: -1\.0"),
    ("retinanet", with_a_buffer, r"model\.anchor_generator: a AnchorGenerator with a state"),
]


@pytest.mark.parametrize(("kind", "change", "message"), REFUSED)
def test_a_part_of_its_own_is_refused_and_nothing_changed(kind, change, message):
    model = MAKERS[kind]()
    change(model)
    before = dict(vars(model)), dict(model.named_modules())
    with pytest.raises(ValueError, match=f"^{message}.*, want "):
        patch(model)
    assert (vars(model), dict(model.named_modules())) == before


def times(factor, original):
    def changed(*args, **options):
        found = original(*args, **options)
        return {name: factor * loss for name, loss in found.items()} if isinstance(found, dict) else factor * found

    return changed


def two_values(original):
    return lambda *args, **options: original(*args, **options) | {"other": 0}


def no_values(original):
    return lambda *args: None


RETINANET, FCOS_MODULE, SSD_MODULE = detection.retinanet, detection.fcos, detection.ssd
REPLACED = [
    ("retinanet", detection.RetinaNet, "compute_loss", 3.0),
    ("retinanet", RETINANET.RetinaNetHead, "compute_loss", 3.0),
    ("retinanet", RETINANET.RetinaNetClassificationHead, "compute_loss", 1.01),
    ("retinanet", RETINANET.RetinaNetRegressionHead, "compute_loss", 1.01),
    ("retinanet", RETINANET, "sigmoid_focal_loss", 0.99),
    ("retinanet", RETINANET, "_box_loss", 0.99),
    ("retinanet", utils.BoxCoder, "encode_single", 1.01),
    ("retinanet", boxes_module, "box_iou", 0.8),
    ("fcos", detection.FCOS, "compute_loss", 3.0),
    ("fcos", FCOS_MODULE.FCOSHead, "compute_loss", 3.0),
    ("fcos", FCOS_MODULE, "sigmoid_focal_loss", 0.99),
    ("fcos", FCOS_MODULE, "generalized_box_iou_loss", 0.99),
    ("fcos", utils.BoxLinearCoder, "decode", 1.01),
    ("ssd", SSD, "compute_loss", 3.0),
    ("ssd", SSD_MODULE.F, "cross_entropy", 0.99),
    ("ssd", utils.BoxCoder, "encode_single", 1.01),
]


@pytest.mark.parametrize(("kind", "owner", "name", "factor"), REPLACED)
def test_what_was_replaced_in_the_package_is_refused(kind, owner, name, factor, monkeypatch):
    """In a class or in a module, which no look at the model shows."""
    model = make(kind)
    before = dict(vars(model))
    monkeypatch.setattr(owner, name, times(factor, getattr(owner, name)))
    with pytest.raises(ValueError, match=r"^torchvision .*'s loss computes something else: number .*, want the losses"):
        patch(model)
    assert vars(model) == before


@pytest.mark.parametrize(
    ("other", "message"), [(two_values, "returns .*other"), (no_values, "'s loss stops: TypeError")]
)
def test_what_returns_something_else_is_refused(other, message, monkeypatch):
    model = make("retinanet")
    monkeypatch.setattr(RETINANET.RetinaNetHead, "compute_loss", other(RETINANET.RetinaNetHead.compute_loss))
    with pytest.raises(ValueError, match=rf"^torchvision .*: RetinaNet.*{message}.*, want the losses"):
        patch(model)


def test_a_derived_class_with_its_own_loss_is_refused():
    with pytest.raises(ValueError, match=r"^model\.compute_loss: one of its own in a OwnLoss, want that of RetinaNet"):
        patch(retinanet(cls=OwnLoss))


@pytest.mark.parametrize("change", [patch, unpatch])
@pytest.mark.parametrize("model", [None, nn.Identity(), nn.Sequential(), "RetinaNet"])
def test_other_models_are_refused(change, model):
    with pytest.raises(ValueError, match=r"^model: a .*, want a RetinaNet, SSD or FCOS"):
        change(model)


# Training.


@pytest.mark.parametrize("wrapped", [nn.DataParallel, torch.compile])
def test_a_model_in_another_names_the_one_to_patch(wrapped):
    model = wrapped(make("retinanet"))
    for call in (patch, unpatch):
        with pytest.raises(
            ValueError, match=r"want the model (in it, model.module|before torch.compile, or model._orig_mod)"
        ):
            call(model)
    inside = getattr(model, "module", None) or model._orig_mod
    assert unpatch(patch(inside)) is inside


@pytest.mark.skipif(DEVICE != "cpu", reason="says what a CPU knows at once")
@pytest.mark.parametrize("way", ["cpu", "gpu"])
def test_ssd_refuses_the_label_of_the_background(way, reference, monkeypatch):
    """torchvision trains such an object's box, and its anchors as negatives."""
    images, targets = objects("ssd", 0)
    wrong = [dict(item) for item in targets]
    wrong[2]["labels"] = wrong[2]["labels"].clone()
    wrong[2]["labels"][1] = 0
    model = patch(make("ssd")).train()
    model(images, targets)
    if way == "gpu":  # as where labels are elsewhere, and nothing is said but by what comes back
        monkeypatch.setattr(model.compute_loss.__class__, "__call__", lambda self, t, h, a, m: self.terms(t, h, a))
    message = r"targets\[2\]\['labels'\]: 0, the background, want 1 to" if way == "cpu" else "labels: 0, the background"
    with pytest.raises(ValueError, match=message):
        model(images, wrong)


def curve(model, kind, steps, lr):
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    losses = []
    for step in range(steps):
        found = model(*objects(kind, step % 4, (3, 0, 2)))
        total = sum(found.values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(total.item())
    return losses


@pytest.mark.parametrize("kind", KINDS)
def test_twenty_steps_of_training(kind, reference):
    """They are 2e-7 apart, the rounding of a loss, which training may amplify; a wrong term is far beyond 1e-4."""
    check_curves(kind, 20)


@pytest.mark.parametrize("kind", KINDS)
def test_three_steps_on_triton(kind):
    check_curves(kind, 3)


def check_curves(kind, steps):
    expected = curve(make(kind), kind, steps, 2e-3)
    found = curve(patch(make(kind)), kind, steps, 2e-3)
    assert found == pytest.approx(expected, rel=1e-4)
    assert steps < 20 or sum(expected[-4:]) < 0.9 * sum(expected[:4])


# The losses themselves, on what no generator of anchors makes.

MODES = ("scattered", "empty", "lattice", "tiny", "crowded", "twins", "outside")
LOSS_TYPES = ("l1", "smooth_l1", "giou", "diou", "ciou")


def case(kind, seed):
    """Predictions, targets and anchors in float32 values, a kind of difficulty for each seed."""
    gen = torch.Generator().manual_seed(1000 + seed)

    def rand(*shape):
        return torch.rand(*shape, generator=gen)

    mode, images = MODES[seed % len(MODES)], 1 + seed % 3
    n = 24 if mode == "crowded" else 72
    if mode == "lattice":  # every coordinate a multiple of 4: equal overlaps, distances and areas everywhere
        y, x = torch.meshgrid(torch.arange(6) * 8.0, torch.arange(6) * 8.0, indexing="ij")
        centres = torch.stack((x, y), -1).reshape(-1, 2).repeat(2, 1)
        sides = torch.tensor([8.0, 16.0]).repeat_interleave(36)[:, None].expand(-1, 2)
    else:
        centres = rand(n, 2) * 48
        sides = 4 + 12 * rand(n, 2)
        sides[n // 2 :] *= 2
    if kind == "fcos":
        sides = sides[:, :1].expand(-1, 2) / 2
    anchors = torch.cat((centres - sides / 2, centres + sides / 2), 1)
    targets = []
    for image in range(images):
        count = {"empty": 0, "crowded": 60}.get(mode, 6 - 3 * image)
        if mode == "lattice":
            corner = torch.randint(0, 8, (count, 2), generator=gen) * 4.0
            far = corner + torch.randint(1, 6, (count, 2), generator=gen) * 4.0
        else:
            corner = rand(count, 2) * 40
            far = corner + (0.05 + 0.9 * rand(count, 2) if mode == "tiny" else 2 + 22 * rand(count, 2))
        boxes = torch.cat((corner, far), 1)
        if mode == "twins" and count:
            boxes = boxes[torch.arange(count) // 2]
        if mode == "outside" and count:
            boxes[0] += torch.tensor([500.0, 300.0, 500.0, 300.0])  # meets no anchor
            boxes[1:, :2] -= 30 * rand(count - 1, 2)
        labels = torch.randint(int(kind == "ssd"), CLASSES, (count,), generator=gen)
        targets.append({"boxes": boxes, "labels": labels})
    logits = 3 * torch.randn(images, len(anchors), CLASSES, generator=gen)
    offsets = torch.randn(images, len(anchors), 4, generator=gen)
    preds = [logits, offsets.relu() if kind == "fcos" else offsets / 2]
    if kind == "fcos":
        preds.append(torch.randn(images, len(anchors), 1, generator=gen))
    return mode, preds, targets, anchors


def peer_loss(kind, seed, preds, targets, anchors):
    """torchvision's losses, how many anchors are positive, and the settings of ours that make it the same loss."""
    outputs = dict(zip(("cls_logits", "bbox_regression", "bbox_ctrness"), preds, strict=False))
    matched = []
    if kind == "retinanet":
        settings = {
            "fg_iou_thresh": (0.5, 0.6)[seed % 2],
            "bg_iou_thresh": (0.4, 0.6)[seed % 2],
            "allow_low_quality_matches": seed % 5 != 0,
        }
        head = detection.retinanet.RetinaNetHead(1, 1, CLASSES)
        head.regression_head._loss_type = LOSS_TYPES[seed % 5]
        matcher = utils.Matcher(*settings.values())
        own = SimpleNamespace(proposal_matcher=matcher, head=Watched(head, matched))
        found = detection.RetinaNet.compute_loss(own, targets, outputs, anchors)
        settings["loss_type"] = LOSS_TYPES[seed % 5]
    elif kind == "fcos":
        settings = {"center_sampling_radius": (1.5, 2.0)[seed % 2]}
        head = detection.fcos.FCOSHead(1, 1, CLASSES, 0)
        own = SimpleNamespace(**settings, head=Watched(head, matched))
        found = detection.FCOS.compute_loss(own, targets, outputs, anchors, per_level(anchors[0]))
    else:
        settings = {"iou_thresh": (0.5, 0.35)[seed % 2], "neg_to_pos_ratio": (3.0, 1.0, 0.5)[seed % 3]}
        matcher = utils.SSDMatcher(settings["iou_thresh"])
        for boxes in (target["boxes"] for target in targets):
            unmatched = torch.full((len(anchors[0]),), -1, device=boxes.device)
            matched.append(matcher(boxes_module.box_iou(boxes, anchors[0])) if len(boxes) else unmatched)
        for row in matched:
            negative, positive = (row < 0).sum().item(), (row >= 0).sum().item()
            if negative < settings["neg_to_pos_ratio"] * positive < len(row):
                settings["neg_to_pos_ratio"] = float(len(row))  # between, it is chance which positives count twice
        own = SimpleNamespace(box_coder=utils.BoxCoder((10.0, 10.0, 5.0, 5.0)), **settings)
        own.neg_to_pos_ratio = settings["neg_to_pos_ratio"]
        found = SSD.compute_loss(own, targets, outputs, anchors, matched)
    return found, sum((row >= 0).sum().item() for row in matched), settings


class Watched:
    """A head that leaves the matches it is given in a list."""

    def __init__(self, head, seen):
        self.head, self.seen = head, seen

    def compute_loss(self, targets, head_outputs, anchors, matched_idxs):
        self.seen += matched_idxs
        return self.head.compute_loss(targets, head_outputs, anchors, matched_idxs)


def per_level(anchors):
    return [len(anchors) // 2, len(anchors) - len(anchors) // 2]


LOSSES = {"retinanet": fusedyolo.RetinaNetLoss, "ssd": fusedyolo.SSDLoss, "fcos": fusedyolo.FCOSLoss}


def check_case(kind, seed, dtype, rtol, backend):
    """torchvision on a CPU, for on a GPU it is left open whose an anchor is that is the best of several objects."""
    mode, given, boxes, places = case(kind, seed)
    theirs_of = [pred.to(dtype).requires_grad_() for pred in given]
    preds = [pred.to(DEVICE, dtype).requires_grad_() for pred in given]
    anchors = places.to(DEVICE, dtype)
    targets = [{"boxes": t["boxes"].to(dtype), "labels": t["labels"]} for t in boxes]
    expected, positive, settings = peer_loss(kind, seed, theirs_of, targets, [places.to(dtype)] * len(targets))
    targets = [{name: value.to(DEVICE) for name, value in t.items()} for t in targets]
    more = {"num_anchors_per_level": per_level(anchors)} if kind == "fcos" else {}
    criterion = LOSSES[kind](CLASSES, backend=backend, **settings)
    found = criterion.terms(tuple(preds), targets, anchors=anchors, **more)
    out = criterion(tuple(preds), targets, anchors=anchors, **more)
    assert out.num_pos.item() == positive
    assert out.num_invalid.item() == 0
    assert found.keys() == out.parts.keys() == expected.keys()
    weights = dict(zip(expected, (1.0, 0.75, 1.25), strict=False))  # else errors of two terms may cancel
    total = sum(expected.values())
    weighed = sum(weights[name] * loss for name, loss in expected.items())
    theirs = [slopes(weighed, theirs_of), slopes(total, theirs_of)]
    ours = [slopes(sum(weights[name] * loss for name, loss in found.items()), preds), slopes(out.total, preds)]
    for name, value in expected.items():
        close = {"rtol": rtol, "atol": rtol, "msg": lambda m, n=name: f"{mode} {n}: {m}"}
        torch.testing.assert_close(found[name].cpu(), value, **close)
        torch.testing.assert_close(out.parts[name].cpu(), value, **close)
    torch.testing.assert_close(out.total.cpu(), total, rtol=rtol, atol=rtol)
    for i, (a, b) in enumerate(zip(sum(ours, ()), sum(theirs, ()), strict=True)):
        atol = rtol * max(b.abs().max().item(), 1e-3)
        torch.testing.assert_close(a.cpu(), b, rtol=0, atol=atol, msg=lambda m, i=i: f"{mode} {i} of {len(preds)}: {m}")


def slopes(loss, preds):
    """The gradient by each of ``preds``, zeros where there is none."""
    return torch.autograd.grad(loss, preds, retain_graph=True, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("seed", range(50))
@pytest.mark.parametrize("kind", KINDS)
def test_random_cases_in_float64(kind, seed):
    check_case(kind, seed, torch.float64, 1e-10, "torch")


@pytest.mark.parametrize("seed", range(len(MODES)))
@pytest.mark.parametrize("kind", KINDS)
def test_random_cases_on_triton(kind, seed):
    check_case(kind, seed, torch.float32, 1e-5, "triton")


def test_the_cases_are_what_they_are_called():
    """Ties, objects smaller than a pixel, more objects than anchors and objects that meet none do occur."""
    for seed in range(2 * len(MODES)):
        mode, _, targets, anchors = case("retinanet", seed)
        boxes = targets[0]["boxes"]
        if mode == "empty":
            assert not len(boxes)
            continue
        overlap = boxes_module.box_iou(boxes, anchors)
        if mode == "lattice":
            best = overlap.max(1, keepdim=True).values
            assert ((overlap == best).sum(1) > 1).any()
        assert (mode == "tiny") == bool(((boxes[:, 2:] - boxes[:, :2]).max() < 1).item())
        assert (mode == "crowded") == (len(boxes) > len(anchors))
        assert (mode == "twins") == (len(boxes.unique(dim=0)) < len(boxes))
        assert (mode == "outside") == bool((overlap.max(1).values == 0).any().item()) or mode == "tiny"
    assert math.isclose(integration.LARGEST, utils.BoxCoder((1, 1, 1, 1)).bbox_xform_clip)
