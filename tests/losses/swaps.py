"""What the tests of swaps share: objects, predictions, comparisons, and processes that know nothing of this package."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import contextmanager
from threading import Barrier, Thread
from types import ModuleType

import torch

MODES = ("plain", "tiny", "crowd", "twins", "empty", "holes")


def objects(mode, seed, batch, classes):
    """Rows [M, 6], sorted by image, whose boxes lie in their image; float32 numbers, so that nothing is lost."""
    gen = torch.Generator().manual_seed(seed)
    most = {"crowd": 300, "empty": 0, "twins": 6}.get(mode, 9)
    found = []
    for image in range(batch):
        count = most if mode in ("crowd", "empty") else int(torch.randint(1, most + 1, (), generator=gen))
        if mode == "crowd" and image:
            count //= 10
        if mode == "holes" and image % 2:
            count = 0
        low, high = {"tiny": (0.03, 0.2), "crowd": (0.01, 0.15)}.get(mode, (0.04, 0.7))
        side = low + (high - low) * torch.rand(count, 2, generator=gen, dtype=torch.float64) ** 2
        centre = side / 2 + torch.rand(count, 2, generator=gen, dtype=torch.float64) * (1 - side)
        label = torch.randint(classes, (count, 1), generator=gen).double()
        rows = torch.cat((torch.full((count, 1), float(image), dtype=torch.float64), label, centre, side), 1)
        found.append(torch.cat((rows, rows)) if mode == "twins" else rows)
    return torch.cat(found).float()


def labels_of(rows, batch, height, width):
    """As YOLOX has them, [B, G, 5] in pixels, of zeros where there is none."""
    most = max([int((rows[:, 0] == image).sum()) for image in range(batch)]) + 2
    found = torch.zeros(batch, most, 5)
    for image in range(batch):
        own = rows[rows[:, 0] == image, 1:] * torch.tensor((1, width, height, width, height))
        found[image, : len(own)] = own
    return found


def decoupled_case(kind, seed):
    """A YOLOX head of a class, its features and labels; ``exp`` of a side is such that boxes are of the size of
    objects.
    """
    gen, mode = torch.Generator().manual_seed(seed), MODES[seed % len(MODES)]
    classes = (3, 1, 7)[seed // 6 % 3]
    height, width = ((64, 64), (96, 64), (64, 128))[seed // 2 % 3]
    torch.manual_seed(seed)
    head = kind(classes, 1 / 32, in_channels=[256] * 3)
    head.use_l1 = seed % 4 == 1
    with torch.no_grad():
        for level in range(3):
            head.reg_preds[level].weight.mul_(4)
            head.cls_preds[level].weight.mul_(4)
            head.obj_preds[level].weight.mul_(4)
    shapes = [(3, 8, height // s, width // s) for s in head.strides]
    dtype = torch.get_default_dtype()
    features = [torch.randn(shape, generator=gen, dtype=torch.float32).to(dtype).requires_grad_() for shape in shapes]
    rows = objects(mode, seed, 3, classes)
    return head.to(dtype), features, labels_of(rows, 3, height, width).to(dtype)


def middles(maps, strides):
    """Of the cells of all levels, [N, 2] in pixels, and their strides [N]."""
    points, each = [], []
    for (height, width), stride in zip(maps, strides, strict=True):
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        points.append((torch.stack((x, y), -1).flatten(0, 1) + 0.5) * stride)
        each.append(torch.full((height * width,), float(stride)))
    return torch.cat(points), torch.cat(each)


def slopes(loss, preds):
    """The gradient by each of ``preds``, zeros where there is none."""
    return torch.autograd.grad(loss, preds, retain_graph=True, allow_unused=True, materialize_grads=True)


def assert_near(found, expected, rtol, name=""):
    """Each entry counts by the largest of its tensor."""
    assert found.shape == expected.shape
    atol = rtol * max(expected.abs().max().item(), 1e-6) if expected.numel() else 0
    torch.testing.assert_close(found, expected, rtol=0, atol=atol, msg=lambda text: f"{name}: {text}")


def snapshot(*modules: ModuleType):
    """All attributes of modules and of the classes in them, by identity."""
    found = {}
    for module in modules:
        for name, value in vars(module).items():
            found[module.__name__, name] = id(value)
            if isinstance(value, type):
                found.update({(module.__name__, name, key): id(each) for key, each in vars(value).items()})
    return found


@contextmanager
def over_a_wrapper(swap, cls, name):
    """Patched where a wrapper of ours stands, as timers leave it; afterwards a class has its own back."""
    own = getattr(cls, name)
    swap.patch()
    ours = getattr(cls, name)
    setattr(cls, name, lambda *args, **options: ours(*args, **options))
    swap.unpatch()  # leaves the wrapper alone
    try:
        swap.patch()
        yield
        swap.unpatch()
        assert getattr(cls, name) is own
    finally:
        setattr(cls, name, own)


def check_two_threads(swap, cls, name):
    """Which patch at once: what a class gets back is its own."""
    own, barrier = getattr(cls, name), Barrier(2)

    def patch():
        barrier.wait()
        swap.patch()

    threads = [Thread(target=patch) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    try:
        assert getattr(cls, name) is not own
        swap.unpatch()
        assert getattr(cls, name) is own
    finally:
        setattr(cls, name, own)


TORCHVISION = """
import sys, torch
try:
    import torchvision
except RuntimeError:  # as bench.peers.torchvision, which knows of this package
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision
    torchvision.ops.nms = lambda boxes, scores, iou: scores.argsort(descending=True)  # its own is compiled
"""

MISSING = """
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "fusedyolo":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
"""


def run_without_us(code, **environment):
    """What a process prints in which this package cannot be imported."""
    return run(MISSING + code, **environment)


def run(code, **environment):
    """What a process prints that finds what this one finds."""
    paths = f"import sys\nsys.path[:0] = {[path for path in sys.path if path]!r}\n"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", paths + TORCHVISION + code],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
