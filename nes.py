"""Neural ensemble search with diversity control, in one file.

"Differentiable algorithm for searching ensembles of deep learning models with diversity control"
(Yakovlev, Bakhteev, Petrushina, Babkin). Sections 2 to 8 are the method, in its order; the rest is what it takes
to run it on real data and to believe the result.

    step 1  the base, DARTS:    min_alpha L_val(w*, alpha), w* = argmin_w L_train(w, alpha); smoothed, it is alpha*
    step 2  the hypernetwork:   min_a E_lambda [L_val(w*, alpha(lambda)) - lambda JSd(alpha*, alpha(lambda))],
                                w* = argmin_w E_lambda L_train(w, alpha(lambda)), a the table behind alpha(lambda);
                                - lambda JSd is the paper's term, section 4 has our default
    step 3  the ensemble:       p(y | x) = mean_m p_m(y | x), of the networks read off at lambda_1, ..., lambda_M

L_train and L_val are losses on two halves of the training images. The sections:

    0 habits   1 data   2 the DARTS cell, the supernet   3 alpha, genotype, base search   4 JSd, the hypernetwork
    5 sampling   6 members: one shot, and trained   7 the ensemble   8 the lambda response
    9 other ensemble searches   10 pictures   11 the run: processes, settings, main

    python nes.py --dataset fmnist --samples 5    # Fashion-MNIST: 93.0 % (one shot 88.0 %) in 13 min on 2 cores
    python nes.py --dataset toy --samples 3       # the same on drawn shapes, in about a minute

Letters for shapes: B batch, C channels, H and W height and width, O = 7 operations, E = 14 edges of a cell,
K pivots, M members, N points, Y classes. alpha is always (2, E, O): first the normal cell, then the reduction cell.
"""
import argparse
import csv
import ctypes
import hashlib
import io
import json
import math
import os
import platform
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision


# ----------------------------------------------------------------------------------------------------------
# 0. Habits: errors are sentences, randomness is named, what was computed outlives the process
# ----------------------------------------------------------------------------------------------------------

def fail(sentence):
    """End the program with one sentence that says what to do, and exit status 2."""
    sentence = " ".join(sentence.splitlines())  # one line, whatever a library's words in it held
    print(f"nes.py: error: {sentence}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def rng(*key):
    """A random generator that depends on `key` alone, for example (seed, "batch", epoch).

    Nothing random is carried from step to step: a resumed run has no random state to restore, and one more
    draw in one place changes nothing elsewhere.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def save(path, state):
    """Write a checkpoint (.pt), text or bytes; a kill at any moment leaves the old file or the new, never half."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".pt":
            torch.save(state, part)
        else:
            part.write_bytes(state.encode() if isinstance(state, str) else state)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        fail(f"cannot write {path} ({error}): make room, or choose another place with --out")


def load(path):
    """Read what `save` wrote; None where there is no such file."""
    if not path.exists():
        return None
    try:
        if path.suffix == ".pt":
            return torch.load(path, map_location="cpu", weights_only=True)
        return json.loads(path.read_text())
    except Exception as error:  # a damaged zip, pickle or JSON file raises almost anything
        fail(f"{path} is damaged ({type(error).__name__}): delete it and repeat the command; only what this "
             "file held is computed again")


def log_row(name, done, total, seconds, text):
    left = seconds / done * (total - done)
    print(f"{name:<14}{done:>7}/{total:<7}{text}   {seconds:6.0f} s, {left:6.0f} s left", flush=True)


# ----------------------------------------------------------------------------------------------------------
# 1. Data: one uint8 tensor, four named splits
# ----------------------------------------------------------------------------------------------------------
# weights       trains the shared weights w            } together "train": a member, whose architecture
# architecture  trains alpha and the hypernetwork      } is fixed, learns from both
# selection     chooses between finished networks (NES-RS does, and we did between recipes)
# test          is looked at once, at the end
# One set for two of these purposes would flatter the result.

SHARES = {"weights": 0.45, "architecture": 0.45, "selection": 0.10}
TORCHVISION = {"fmnist": torchvision.datasets.FashionMNIST, "cifar10": torchvision.datasets.CIFAR10}
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


class Data(NamedTuple):
    splits: dict         # name -> (images (N, C, H, W) uint8, labels (N,) int64)
    classes: list        # names
    mean: torch.Tensor   # (C, 1, 1), of the weights split, pixels scaled to [0, 1]
    std: torch.Tensor
    digest: str = ""     # of all pixels and labels: a run folder notices that they were changed


def load_data(dataset, data_dir, image_size, seed, device="cpu"):
    """Read a data set and split its training part at random by `seed` into the shares above.

    dataset: "fmnist", "cifar10", "toy", or a folder that holds train/<class>/* and test/<class>/*.
    """
    if dataset == "toy":
        train, test, classes = toy(2400, rng("toy", "train")), toy(600, rng("toy", "test")), TOY_CLASSES
    elif dataset in TORCHVISION:
        (train, classes), (test, _) = read_torchvision(TORCHVISION[dataset], data_dir)
    else:
        train, test, classes = read_folder(Path(dataset), image_size)
    digest = hashlib.sha256(b"".join(part.numpy().tobytes() for part in (*train, *test))).hexdigest()[:8]
    images, labels = train
    order = torch.randperm(len(labels), generator=rng(seed, "splits"))
    splits, start = {"test": test}, 0
    for name, share in SHARES.items():
        chosen = order[start:start + int(share * len(order))]
        splits[name], start = (images[chosen], labels[chosen]), start + len(chosen)
    if not all(len(y) for _, y in splits.values()):
        fail(f"{dataset} has {len(order)} training images, too few for three splits: give it 20 or more")
    splits["train"] = tuple(torch.cat(both) for both in zip(splits["weights"], splits["architecture"]))
    pixels = splits["weights"][0].float() / 255
    std, mean = torch.std_mean(pixels, dim=(0, 2, 3))
    splits = {name: (x.to(device), y.to(device)) for name, (x, y) in splits.items()}
    mean, std = mean.view(-1, 1, 1), std.clamp_min(1e-3).view(-1, 1, 1)
    return Data(splits, classes, mean.to(device), std.to(device), digest)


def read_torchvision(dataset_class, root):
    """Both parts of a torchvision data set, as ((images (N, C, H, W), labels), class names) each.

    From `root`; else, for Fashion-MNIST, from Debian's package dataset-fashion-mnist; else downloaded to `root`.
    """
    raw, archives, parts = Path(root) / "FashionMNIST" / "raw", list(DEBIAN_FASHION_MNIST.glob("*.gz")), []
    try:
        if dataset_class is TORCHVISION["fmnist"] and not all((raw / archive.stem).exists() for archive in archives):
            raw.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=raw) as folder:  # so that a kill leaves no half-unpacked file
                for archive in archives:
                    torchvision.datasets.utils.extract_archive(str(archive), folder)
                    os.replace(Path(folder, archive.stem), raw / archive.stem)
        for train in (True, False):
            try:
                part = dataset_class(root, train=train)
            except RuntimeError:  # torchvision's word for "not there"
                part = dataset_class(root, train=train, download=True)
            images = torch.as_tensor(part.data)
            images = images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2).contiguous()
            parts.append(((images, torch.as_tensor(part.targets)), part.classes))
    except Exception as error:  # no network, no room, or whatever a damaged file raises
        fail(f"cannot read or download {dataset_class.__name__} in {root} ({type(error).__name__}: {error}): check the "
             "network, or delete the damaged files there, or name the right folder with --data-dir (or install "
             "Debian's package dataset-fashion-mnist for Fashion-MNIST)")
    return parts


def read_folder(root, size):
    """Images under root/train/<class> and root/test/<class>, resized to (size, size); grey if all of them are."""
    shape = torchvision.transforms.Compose([torchvision.transforms.Resize((size, size)),
                                            torchvision.transforms.PILToTensor()])
    parts = []
    for part in ("train", "test"):
        try:
            folder = torchvision.datasets.ImageFolder(root / part)
        except OSError as error:
            fail(f"--dataset {root} is neither fmnist, cifar10 or toy nor a folder of train/<class>/ and "
                 f"test/<class>/ with an image in each class ({error})")
        images = []
        for path, _ in folder.samples:
            try:
                images.append(shape(folder.loader(path)))
            except Exception as error:  # a damaged image raises OSError, SyntaxError or ValueError
                fail(f"cannot read the image {path} ({error}): remove or replace it")
        parts.append((torch.stack(images), torch.tensor(folder.targets), folder.classes))
    (train, y_train, classes), (test, y_test, test_classes) = parts
    if classes != test_classes or len(classes) < 2:
        fail(f"{root}/train and {root}/test must hold the same two or more classes: found {classes} and {test_classes}")
    if all((x == x[:, :1]).all() for x in (train, test)):
        train, test = train[:, :1], test[:, :1]
    return (train, y_train), (test, y_test), classes


TOY_CLASSES = ["disc", "ring", "square", "diamond", "plus", "cross"]


def toy(count, generator):
    """Noisy drawings of six shapes; place, size, contrast and sign vary, so no pixel tells the class.

    Returns images (count, 1, 16, 16) uint8 and labels (count,).
    """
    draw = lambda low, high: low + (high - low) * torch.rand(count, 1, 1, generator=generator)
    axis = torch.arange(16.0)
    size = draw(3, 6)
    u = ((axis.view(1, 16, 1) - draw(5, 10)) / size).abs()   # (count, 16, 1), 1 at the shape's edge
    v = ((axis.view(1, 1, 16) - draw(5, 10)) / size).abs()
    radius, box = (u * u + v * v).sqrt(), torch.maximum(u, v)
    shapes = torch.stack([radius < 1, (radius < 1) & (radius > 0.6), box < 0.9, u + v < 1.2,
                          (torch.minimum(u, v) < 0.3) & (box < 1), ((u - v).abs() < 0.35) & (box < 1)])
    labels = torch.randint(len(TOY_CLASSES), (count,), generator=generator)
    ink = shapes[labels, torch.arange(count)] * draw(40, 90) * (draw(-1, 1).sign())
    noise = 25 * torch.randn(count, 16, 16, generator=generator)
    return (128 + ink + noise).clamp(0, 255).byte().unsqueeze(1), labels


def normalise(data, images):
    """(B, C, H, W) uint8 -> float, mean 0 and std 1 in each channel, channels_last."""
    return ((images.float() / 255 - data.mean) / data.std).contiguous(memory_format=torch.channels_last)


def draw_batch(data, split, size, step, key, crop=0, mirror=False, part=slice(None)):
    """Batch number `step` of endless epochs over a split, shifted by up to `crop` pixels, each image mirrored with
    probability 1/2 if `mirror`. An epoch's last, incomplete batch is dropped.

    key names the stream of batches; part takes a share of the batch (this process's, under torchrun).
    Returns images (B, C, H, W), float, and labels (B,).
    """
    images, labels = data.splits[split]
    size = min(size, len(labels))
    epoch, position = divmod(step, len(labels) // size)
    chosen = torch.randperm(len(labels), generator=rng(*key, "epoch", epoch))[position * size:][:size]
    shift = torch.randint(-crop, crop + 1, (2, size, 1), generator=rng(*key, "shift", step))
    flipped = torch.rand(size, 1, generator=rng(*key, "mirror", step)) < (0.5 if mirror else 0)
    height, width = images.shape[2:]
    rows = (torch.arange(height) + shift[0]).clamp(0, height - 1)     # (B, H): the border is repeated
    columns = (torch.arange(width) + shift[1]).clamp(0, width - 1)    # (B, W)
    columns = torch.where(flipped, columns.flip(1), columns)
    chosen, rows, columns = (index[part].to(images.device) for index in (chosen, rows, columns))
    # One indexing operation crops and mirrors the whole batch, and gives (B, H, W, C): channels last.
    batch = images[chosen[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    return normalise(data, batch), labels[chosen]


# ----------------------------------------------------------------------------------------------------------
# 2. The DARTS cell and the supernet
# ----------------------------------------------------------------------------------------------------------

class DepthwiseGradients(torch.autograd.Function):
    """A depthwise convolution (bias-free, padding "same") whose gradients are forward convolutions.

    With k taps, stride s, dilation d, padding p = d (k - 1) / 2 and output gradient g:
        dL/dx = conv(g with s - 1 zeros between its pixels, flipped w, dilation d, padding p)
        dL/dw = sum_B conv(x, kernel g, stride d, dilation s, padding p), its first k x k values
    Exact. Most of a DARTS step on a CPU is this gradient, and PyTorch's CPU kernels run a depthwise convolution
    with 5 taps or a dilation much faster forward than backward.
    """

    @staticmethod
    def forward(ctx, x, w, stride, dilation):
        ctx.save_for_backward(x, w)
        ctx.stride, ctx.dilation = stride, dilation
        return F.conv2d(x, w, None, stride, dilation * (w.shape[-1] // 2), dilation, groups=w.shape[0])

    @staticmethod
    def backward(ctx, g):
        (x, w), s, d = ctx.saved_tensors, ctx.stride, ctx.dilation
        (B, C, H, W), k = x.shape, w.shape[-1]
        p = d * (k // 2)
        gradient_x = gradient_w = None
        if ctx.needs_input_grad[0]:
            spread = g
            if s > 1:
                spread = torch.zeros_like(x)
                spread[:, :, ::s, ::s] = g
            gradient_x = F.conv2d(spread, w.flip(2, 3), None, 1, p, d, groups=C)
        if ctx.needs_input_grad[1] and k == 3 and d == 1:  # the one case with a fast kernel of its own
            gradient_w = torch.nn.grad.conv2d_weight(x, w.shape, g, s, p, d, groups=C)
        elif ctx.needs_input_grad[1]:
            image = x.permute(2, 3, 0, 1).reshape(1, H, W, B * C).permute(0, 3, 1, 2)     # (1, BC, H, W)
            kernel = g.reshape(B * C, 1, *g.shape[2:])
            taps = F.conv2d(image, kernel, None, d, p, s, groups=B * C)[:, :, :k, :k]      # (1, BC, k, k)
            gradient_w = taps.reshape(B, C, 1, k, k).sum(0)
        return gradient_x, gradient_w, None, None


class DepthwiseConv(nn.Conv2d):
    def __init__(self, C, taps, stride, dilation=1):
        super().__init__(C, C, taps, stride, dilation * (taps // 2), dilation, groups=C, bias=False)

    def forward(self, x):
        if x.device.type == "cpu":
            return DepthwiseGradients.apply(x, self.weight, self.stride[0], self.dilation[0])
        return super().forward(x)


class FactorizedReduce(nn.Module):
    """Halve H and W without losing pixels: two 1x1 convolutions of stride 2, one of them a pixel down and right."""

    def __init__(self, C_in, C, affine):
        super().__init__()
        self.even = nn.Conv2d(C_in, C // 2, 1, stride=2, bias=False)
        self.odd = nn.Conv2d(C_in, C - C // 2, 1, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(C, affine=affine)

    def forward(self, x):
        # As one dense 2x2 convolution whose kernel holds the first in its upper left corner and the second in its
        # lower right: several times faster than two sparse ones on a CPU.
        kernel = torch.cat([F.pad(self.even.weight, (0, 1, 0, 1)), F.pad(self.odd.weight, (1, 0, 1, 0))])
        x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
        return self.norm(F.conv2d(x, kernel, stride=2))


def separable(C, taps, stride, affine, dilation=1):
    depthwise = DepthwiseConv(C, taps, stride, dilation)
    return [depthwise, nn.Conv2d(C, C, 1, bias=False), nn.BatchNorm2d(C, affine=affine)]


def pool(layer, C):
    return nn.Sequential(layer, nn.BatchNorm2d(C, affine=False))


# The seven operations O, DARTS's eight without "zero", which no genotype can hold: (C, stride, affine) -> module.
# Those with parameters begin with a ReLU, which is not in the module: the edges that leave a node share it (see
# Source). Pooling keeps its batch norm in a discrete network, so that this computes what the supernet does.
OPERATIONS = {
    "max_pool_3x3": lambda C, stride, affine: pool(nn.MaxPool2d(3, stride, 1), C),
    "avg_pool_3x3": lambda C, stride, affine: pool(nn.AvgPool2d(3, stride, 1, count_include_pad=False), C),
    "skip_connect": lambda C, stride, affine: nn.Identity() if stride == 1 else FactorizedReduce(C, C, affine),
    "sep_conv_3x3": lambda C, stride, affine: nn.Sequential(
        *separable(C, 3, stride, affine), nn.ReLU(), *separable(C, 3, 1, affine)),
    "sep_conv_5x5": lambda C, stride, affine: nn.Sequential(
        *separable(C, 5, stride, affine), nn.ReLU(), *separable(C, 5, 1, affine)),
    "dil_conv_3x3": lambda C, stride, affine: nn.Sequential(*separable(C, 3, stride, affine, dilation=2)),
    "dil_conv_5x5": lambda C, stride, affine: nn.Sequential(*separable(C, 5, stride, affine, dilation=2)),
}
NAMES = list(OPERATIONS)
NODES = 4                                                                        # intermediate nodes of a cell
EDGES = [(source, node) for node in range(NODES) for source in range(node + 2)]  # sources 0, 1 are the inputs
KINDS = ("normal", "reduction")


class Source:
    """A node's output x (B, C, H, W), with what the edges that leave it would each compute again."""

    def __init__(self, x):
        self.x, self.shared = x, {}

    def apply(self, name, function):
        if name not in self.shared:
            self.shared[name] = function(self.x)
        return self.shared[name]


class MixedOp(nn.Module):
    """The mixed operation of an edge (DARTS, eq. 2): sum over o of weights[o] * o(x), weights = softmax(alpha).

    operations: the names that the edge holds: all seven in a supernet, one or none in a discrete network.
    forward: x (B, C, H, W) or a Source; weights (O,), or None for ones; operations: those to run, by default all.
    """

    def __init__(self, C, stride, affine=False, operations=NAMES):
        super().__init__()
        self.stride = stride
        self.ops = nn.ModuleDict({name: OPERATIONS[name](C, stride, affine) for name in operations})

    def forward(self, x, weights=None, operations=None):
        source = x if isinstance(x, Source) else Source(x)
        total = 0
        for name in self.ops if operations is None else operations:
            op = self.ops[name]
            if next(op.parameters(), None) is not None:
                y = op(source.apply("relu", F.relu))
            else:  # pooling and identity: with nothing of its own, one edge computes it for all edges of this source
                y = source.apply((name, self.stride), op)
            total = total + (y if weights is None else weights[NAMES.index(name)] * y)
        return total


def channels_last(gradient):
    return gradient.contiguous(memory_format=torch.channels_last)


class Cell(nn.Module):
    """A DARTS cell (DARTS, section 2.1): two inputs, four nodes, each the sum of its edges; their concatenation.

    operations: for each edge the names that it holds (a genotype's, see `edge_operations`), None for all.
    forward: s0 and s1, the outputs of the last two cells; weights (E, O) or None; operations as above: what to run.
    Returns (B, 4C, H, W), or (B, 4C, H/2, W/2) from a reduction cell.
    """

    def __init__(self, C_before, C_last, C, reduction, after_reduction, affine=False, operations=None):
        super().__init__()
        self.reduction = reduction
        align = lambda C_in: nn.Sequential(nn.Conv2d(C_in, C, 1, bias=False), nn.BatchNorm2d(C, affine=affine))
        self.align0 = FactorizedReduce(C_before, C, affine) if after_reduction else align(C_before)
        self.align1 = align(C_last)
        self.edges = nn.ModuleList(
            MixedOp(C, 2 if reduction and source < 2 else 1, affine, operations[e] if operations else NAMES)
            for e, (source, _) in enumerate(EDGES))

    def forward(self, s0, s1, weights=None, operations=None):
        sources = [Source(self.align0(F.relu(s0))), Source(self.align1(F.relu(s1)))]
        for node in range(NODES):
            total = 0
            for e, (source, target) in enumerate(EDGES):
                if target == node:
                    total = total + self.edges[e](sources[source], None if weights is None else weights[e],
                                                  operations and operations[e])
            if total.requires_grad:  # torch.cat hands back slices, on which every operation upstream would be slow
                total.register_hook(channels_last)
            sources.append(Source(total))
        return torch.cat([source.x for source in sources[2:]], dim=1)


class Network(nn.Module):
    """Stem, cells, global mean, linear classifier; cells number cells // 3 and 2 cells // 3 are reduction cells.

    The first cell never is: two cells are a normal and a reduction cell, a single one is normal.
    Without a genotype it is the supernet: every edge holds all operations, and the cells' batch norm has no scale of
    its own, which would undo alpha's. With one it is the discrete network, with that genotype's 16 operations only.
    forward: x (B, C_in, H, W); weights (2, E, O), softmax(alpha), or None for ones; genotype: run only its
    operations (the supernet as that discrete network), weighted by 1 + p - stop_gradient(p), ones with a gradient
    for p, where the hypernetwork is trained. Returns logits (B, Y).
    alpha is an argument, never hidden state: one set of weights serves any architecture.
    """

    def __init__(self, C_in, classes, C, cells, genotype=None):
        super().__init__()
        # Departure from DARTS: the stem halves H and W. Dense convolutions are what a CPU does best, and every
        # cell behind them costs a quarter.
        self.stem = nn.Sequential(
            nn.Conv2d(C_in, 2 * C, 3, padding=1, bias=False), nn.BatchNorm2d(2 * C), nn.ReLU(),
            nn.Conv2d(2 * C, 4 * C, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(4 * C))
        self.cells = nn.ModuleList()
        C_before, C_last, after_reduction = 4 * C, 4 * C, False
        for i in range(cells):
            reduction = i > 0 and i in (cells // 3, 2 * cells // 3)
            C = 2 * C if reduction else C
            operations = genotype and edge_operations(genotype[KINDS[reduction]])
            self.cells.append(Cell(C_before, C_last, C, reduction, after_reduction, bool(genotype), operations))
            C_before, C_last, after_reduction = C_last, 4 * C, reduction
        self.classifier = nn.Linear(C_last, classes)

    def forward(self, x, weights=None, genotype=None):
        operations = [genotype and edge_operations(genotype[kind]) for kind in KINDS]
        s0 = s1 = self.stem(x)                                                             # (B, 4C, H/2, W/2)
        for cell in self.cells:
            kind = int(cell.reduction)
            s0, s1 = s1, cell(s0, s1, None if weights is None else weights[kind], operations[kind])
        if s1.requires_grad:  # the mean's gradient is a broadcast scalar, see Cell
            s1.register_hook(channels_last)
        return self.classifier(s1.mean(dim=(2, 3)))                                        # (B, Y)


# ----------------------------------------------------------------------------------------------------------
# 3. alpha and the genotype; the base search (DARTS)
# ----------------------------------------------------------------------------------------------------------

def genotype_of(p):
    """The discrete architecture of alpha (DARTS, section 2.4): each node keeps its two strongest inputs.

    p: (2, E, O), softmax(alpha). An edge's operation is its most probable one and its strength that probability;
    equal strengths are ranked by source, the lower first. Returns {"normal": [[operation, source], ...],
    "reduction": ...}, two entries for each node in turn, in order of source: 16 entries, ready for JSON.
    Example: node 0 has edges from sources 0 and 1, node 1 from 0, 1 and 2. With strengths 0.5, 0.4 and
    0.3, 0.6, 0.5, node 0 keeps both edges and node 1 those from sources 1 and 2.
    """
    strengths, best = p.detach().max(dim=-1)
    genotype = {}
    for kind, strength, operation in zip(KINDS, strengths.tolist(), best.tolist()):
        genotype[kind] = []
        for node in range(NODES):
            edges = [e for e, (_, target) in enumerate(EDGES) if target == node]
            kept = sorted(edges, key=lambda e: -strength[e])[:2]
            genotype[kind] += [[NAMES[operation[e]], EDGES[e][0]] for e in sorted(kept)]
    return genotype


def edge_operations(entries):
    """One kind's genotype entries -> for each of the 14 edges the names of its operations: one or none."""
    return [[name for name, s in entries[2 * node:2 * node + 2] if s == source] for source, node in EDGES]


def count_operations(genotype):
    names = [name for kind in KINDS for name, _ in genotype[kind]]
    return {name: names.count(name) for name in NAMES if name in names}


def second_order_loss(net, weight_batch, alpha_batch, weights, xi):
    """L_val(w', alpha) with w' = w - xi grad_w L_train(w, alpha), as a function of alpha (DARTS, eq. 6).

    The inner step stays in autograd's graph, so that the gradient is exact: no copy of the network and no finite
    differences. weights: (2, E, O), softmax(alpha); xi: the inner learning rate.
    """
    (x, y), (x_val, y_val) = weight_batch, alpha_batch
    names, w = zip(*net.named_parameters())
    gradients = torch.autograd.grad(F.cross_entropy(net(x, weights), y), w, create_graph=True)
    stepped = {name: value - xi * gradient for name, value, gradient in zip(names, w, gradients)}
    return F.cross_entropy(torch.func.functional_call(net, stepped, (x_val, weights)), y_val)


def search(phase, net, architecture, draw, steps, data, args, second_order=False):
    """Alternate one step on the weights w and one on the architecture (DARTS, algorithm 1), resumably.

    draw(step) -> (weights (2, E, O), differentiable in `architecture`; the genotype to run, None for the soft
    mixture; the regulariser). Updates the modules net and architecture; returns {"history": rows of (step, training
    loss, validation loss, regulariser), "seconds"}. The base search and the hypernetwork differ in their draw and in
    the architecture's learning rate. Unlike in DARTS w steps first, so that the inner step of the second order
    repeats the batch of the last step on w; and both learning rates fall, alpha's too, without weight decay for it.
    """
    check_settings(args, data)
    path = Path(args.out) / f"{phase}.pt"
    a_lr = args.hyper_lr if phase == "hyper" else args.alpha_lr
    w_optimizer = torch.optim.SGD(net.parameters(), args.search_lr, momentum=0.9, weight_decay=3e-4)
    a_optimizer = torch.optim.Adam(architecture.parameters(), a_lr, betas=(0.5, 0.999))
    modules = {"net": net, "architecture": architecture, "w_optimizer": w_optimizer, "a_optimizer": a_optimizer}
    state = share(load(path) if rank() == 0 else None) or {"step": 0, "history": [], "seconds": 0.0}
    if state["step"]:
        say(f"{phase}: found at step {state['step']} of {steps} in {args.out}")
        for name, module in modules.items():
            module.load_state_dict(state[name])
    net.train()
    part = slice(rank(), None, world())  # this process's share of a batch
    start, sums = time.time() - state["seconds"], torch.zeros(3)
    for step in range(state["step"], steps):
        decay = (1 + math.cos(math.pi * step / steps)) / 2
        w_optimizer.param_groups[0]["lr"], a_optimizer.param_groups[0]["lr"] = args.search_lr * decay, a_lr * decay
        w_batch, a_batch = (draw_batch(data, split, args.search_batch, step, (args.seed, phase, split), args.crop,
                                       args.mirror, part) for split in ("weights", "architecture"))
        weights, genotype, regulariser = draw(step)

        train_loss = F.cross_entropy(net(w_batch[0], weights.detach(), genotype), w_batch[1])
        w_optimizer.zero_grad()
        train_loss.backward()
        average_gradients(net.parameters())
        nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        w_optimizer.step()

        if second_order:
            val_loss = second_order_loss(net, w_batch, a_batch, weights, w_optimizer.param_groups[0]["lr"])
        else:
            net.requires_grad_(False)  # the gradient for alpha alone: half the work of the backward pass
            val_loss = F.cross_entropy(net(a_batch[0], weights, genotype), a_batch[1])
        gradients = torch.autograd.grad(val_loss + regulariser, list(architecture.parameters()))
        net.requires_grad_(True)
        for parameter, gradient in zip(architecture.parameters(), gradients):
            parameter.grad = gradient
        average_gradients(architecture.parameters())
        a_optimizer.step()

        sums += torch.stack([torch.as_tensor(v).detach().cpu() for v in (train_loss, val_loss, regulariser)])
        if (step + 1) % args.log_every == 0 or step + 1 == steps:
            means = (sums / (step + 1 - state["step"])).tolist()
            sums.zero_()
            state.update(step=step + 1, seconds=time.time() - start, history=state["history"] + [[step + 1, *means]])
            if not math.isfinite(sum(means)):
                fail(f"the loss of the {phase} search is not a number after step {step + 1}: lower --search-lr or "
                     f"--{'hyper' if phase == 'hyper' else 'alpha'}-lr, in another --out")
            if rank() == 0:
                log_row(phase, step + 1, steps, state["seconds"],
                        "train {:.3f}  validation {:.3f}  regulariser {:+.4f}".format(*means))
                save(path, {**state, **{name: module.state_dict() for name, module in modules.items()}})
    return {"history": state["history"], "seconds": state["seconds"]}


def base_search(name, net, data, args):
    """Step 1 of the method: DARTS. Returns softmax(alpha) (2, E, O) and the search's history and seconds."""
    table = nn.ParameterDict({"alpha": 1e-3 * torch.randn(2, len(EDGES), len(NAMES), generator=rng(args.seed, name))})
    table = table.to(args.device)
    log = search(name, net, table, lambda step: (table["alpha"].softmax(dim=-1), None, torch.zeros(())),
                 args.base_steps, data, args, args.second_order)
    return table["alpha"].detach().softmax(dim=-1), log


# ----------------------------------------------------------------------------------------------------------
# 4. The Jensen-Shannon divergence and the hypernetwork
# ----------------------------------------------------------------------------------------------------------

def jensen_shannon(p, q):
    """JSd(p, q) = 1/2 KL(p || m) + 1/2 KL(q || m), m = (p + q) / 2, over the last dimension, in nats.

    p, q: distributions (..., O), broadcast. Returns (...), 0 <= JSd <= ln 2, symmetric. The paper, section 1.
    Zeros are allowed, and the gradient there is finite. KL(m || p), a common slip, is not bounded.
    """
    tiny = torch.finfo(p.dtype).tiny
    m = (p + q) / 2
    kl = lambda a: (a * (a.clamp_min(tiny).log() - m.clamp_min(tiny).log())).sum(dim=-1)
    return (kl(p) + kl(q)) / 2


def smooth(p, tau):
    """The base architecture as distributions: alpha* = (1 - tau) onehot(argmax p) + tau / O on each edge.

    p: (2, E, O), softmax(alpha). Departure from the paper: an edge that the genotype drops gets tau + 0.25. With one
    tau all edges would be equally strong, and which of them to keep, half of the genotype, would be forgotten.
    """
    genotype = genotype_of(p)
    kept = torch.tensor([[bool(names) for names in edge_operations(genotype[kind])] for kind in KINDS])
    # 0.25 leaves a dropped edge weaker than a kept one, and its own operation still the strongest of its seven.
    tau = torch.where(kept, tau, tau + 0.25).unsqueeze(-1).to(p.device)                      # (2, E, 1)
    return (1 - tau) * F.one_hot(p.argmax(dim=-1), p.shape[-1]) + tau / p.shape[-1]


class HyperNetwork(nn.Module):
    """alpha(lambda): one table of logits for each pivot, and straight lines between them.

    With pivots r_0 = 0 < ... < r_{K-1} = lambda_max, tables a_k and r_k <= lambda <= r_{k+1}:
        alpha(lambda) = ((1 - t) a_k + t a_{k+1}) / temperature,    t = (lambda - r_k) / (r_{k+1} - r_k)
    so that alpha(r_k) = a_k / temperature. Departure from the paper: its formula has t and 1 - t exchanged, which
    makes alpha jump at every pivot. The temperature is 1 until the training lowers it.

    start: (2, E, O) or any shape, the logits that every pivot begins with.
    forward: lambda, a number or a tensor (...) -> logits (..., 2, E, O). Within [0, lambda_max]; beyond, which is not
    checked, the outermost lines go on.
    """

    def __init__(self, start, pivots=6, lambda_max=1.0):
        super().__init__()
        self.register_buffer("pivots", torch.linspace(0, lambda_max, pivots))              # (K,)
        self.register_buffer("temperature", torch.ones(()))
        self.table = nn.Parameter(start.detach().clone().repeat(pivots, *[1] * start.dim()))   # (K, 2, E, O)

    def forward(self, lam):
        lam = torch.as_tensor(lam, dtype=self.table.dtype, device=self.table.device)
        k = torch.searchsorted(self.pivots, lam, right=True).clamp(1, len(self.pivots) - 1) - 1
        t = (lam - self.pivots[k]) / (self.pivots[k + 1] - self.pivots[k])
        t = t.view(*t.shape, *[1] * (self.table.dim() - 1))
        return torch.lerp(self.table[k], self.table[k + 1], t) / self.temperature


def diversity_loss(p, target, lam, objective="target", strength=10.0):
    """The term that pushes alpha(lambda) away from the base, to be added to L_val.

    p, target: (2, E, O), softmax(alpha(lambda)) and alpha*. JSd is the mean over the edges, c the strength.
        "paper":   - lambda JSd
        "target":  c (JSd / JSd_max - lambda)^2, JSd_max = the JSd of alpha* and another operation on every edge
    Returns a scalar.
    Departure, the default: with the paper's term each edge has a threshold, and how many have crossed it depends on
    how long one trains. The target form has a resting point, and lambda reads as the share of the largest divergence.
    """
    jsd = jensen_shannon(target, p).mean()
    if objective == "paper":
        return -lam * jsd
    return strength * (jsd / largest_divergence(target) - lam) ** 2


def largest_divergence(target):
    """JSd_max of alpha* (2, E, O): to a different operation, with certainty, on every edge."""
    other = F.one_hot((target.argmax(dim=-1) + 1) % target.shape[-1], target.shape[-1])
    return jensen_shannon(target, other.to(target)).mean()


def train_hypernetwork(net, base, data, args):
    """Step 2 of the method: min over the tables of E_lambda [L_val(w, alpha(lambda)) + the term above].

    net: the supernet, warm from the base search; base: (2, E, O), softmax(alpha) of that search. Departures:
    every pivot starts at the base, and *softer* than alpha* (tau_start > tau): from alpha* itself an edge can also
    raise its JSd by becoming surer of the base's operation, and stays there for ever. A temperature falls from 1, as
    a nearly uniform alpha has most of the JSd of a different operation. And each step runs one discrete network,
    drawn at its lambda with Gumbel noise, so that the shared weights learn to serve what will be sampled;
    the gradient for alpha passes through the chosen operations' weights 1 + p - stop_gradient(p), as in GDAS (where
    the temperature divides the noise as well).
    """
    target = smooth(base, args.tau)
    hyper = HyperNetwork(smooth(base, args.tau_start).log(), args.pivots, args.lambda_max).to(args.device)

    def draw(step):
        """A step's lambda, its discrete architecture with a gradient, and its diversity term, as `search` asks for."""
        progress, generator = step / args.hyper_steps, rng(args.seed, "hyper", step)
        hyper.temperature.fill_(1 + (args.temperature - 1) * progress)
        # A tenth beyond either end, then clamped: the end pivots are trained as much as the others.
        lam = (1.2 * torch.rand((), generator=generator) - 0.1).clamp(0, 1).item() * args.lambda_max
        logits = hyper(lam)
        # Minus the logarithm of an exponential variable is a Gumbel variable; its scale falls to 0.
        gumbel = -torch.empty(logits.shape).exponential_(generator=generator).log().to(logits.device)
        p = (logits + args.noise * (1 - progress) * gumbel).softmax(dim=-1)
        diversity = diversity_loss(logits.softmax(dim=-1), target, lam, args.objective, args.strength)
        return 1 + p - p.detach(), genotype_of(p), diversity

    log = search("hyper", net, hyper, draw, args.hyper_steps, data, args)
    hyper.temperature.fill_(args.temperature)
    return hyper, target, log


# ----------------------------------------------------------------------------------------------------------
# 5. Sampling in one shot
# ----------------------------------------------------------------------------------------------------------

def sample_lambdas(count, lambda_max):
    """lambda_i = lambda_max * frac(i * golden ratio): spread over [0, lambda_max) for any count.

    The first n do not depend on how many follow, so that asking for more keeps what is there. The paper draws at
    random, which leaves gaps. The first is 0: the base, or close to it, for alpha(0) is trained like every pivot.
    """
    return [lambda_max * (i * (math.sqrt(5) - 1) / 2 % 1) for i in range(count)]


@torch.no_grad()
def sample(hyper, target, lambdas):
    """Read the architectures at `lambdas` from the hypernetwork: a table look-up each, no search.

    Returns for each a dict: lambda, genotype, jsd (mean over edges, as a share of its bound ln 2), matched_edges
    (of 28, whose most probable operation is the base's), matched_entries (of the 16 of the base's genotype).
    """
    p = hyper(torch.tensor(lambdas)).softmax(dim=-1)                                       # (M, 2, E, O)
    jsd = jensen_shannon(p, target).mean(dim=(1, 2)) / math.log(2)
    matched = (p.argmax(dim=-1) == target.argmax(dim=-1)).sum(dim=(1, 2))
    base, genotypes = genotype_of(target), [genotype_of(q) for q in p]
    return [{"lambda": lam, "genotype": genotype, "jsd": j, "matched_edges": m,
             "matched_entries": matched_entries(genotype, base)}
            for lam, genotype, j, m in zip(lambdas, genotypes, jsd.tolist(), matched.tolist())]


def matched_entries(genotype, base):
    """How many of the 16 entries (kind, node, operation, source) two genotypes share."""
    entries = lambda g: {(kind, i // 2, *entry) for kind in KINDS for i, entry in enumerate(g[kind])}
    return len(entries(genotype) & entries(base))


# ----------------------------------------------------------------------------------------------------------
# 6. Members: scored in one shot with the shared weights, and trained from scratch
# ----------------------------------------------------------------------------------------------------------

@torch.no_grad()
def predict(net, data, split, genotype=None):
    """Probabilities (N, Y) on a split, on the CPU; nothing is augmented. Leaves net in eval mode."""
    net.eval()
    return torch.cat([net(normalise(data, images), None, genotype).softmax(dim=-1).cpu()
                      for images in data.splits[split][0].split(500)])


@torch.no_grad()
def one_shot(net, genotype, data, args, split="test"):
    """The supernet's probabilities (N, Y) on a split as one discrete network: no training at all.

    One set of weights serves many architectures, so batch norm's statistics are taken anew for each, from training
    batches, as plain averages (momentum None, which stays set: the search itself never reads these statistics).
    """
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    net.train()
    for step in range(20):  # some thousand images in all: the average of few batches would be noisy
        net(draw_batch(data, "weights", 256, step, (args.seed, "recalibration"))[0], None, genotype)
    return predict(net, data, split, genotype)


def build(key, data, channels, cells, genotype=None):
    """A Network for a data set, on its device, whose initial weights depend on `key` alone."""
    torch.manual_seed(rng(*key).initial_seed())
    images = data.splits["test"][0]
    net = Network(images.shape[1], len(data.classes), channels, cells, genotype)
    return net.to(images.device, memory_format=torch.channels_last)


def train_member(genotype, index, data, args, path):
    """Train one discrete network from scratch on the "train" split, resumably; one recipe for every method.

    index: the network's place in its method's list. Networks of one index see the same batches, in every method, and
    those of one genotype and different index differ in initial weights and batches. AdamW, its learning rate
    rising over the first fifth of the steps and falling to zero over the rest; the last weights are kept, there is no
    maximum over epochs. Returns the finished record: genotype, index, seconds, net (the weights), what `load_member`
    needs (network, classes, mean, std), and the probabilities (N, Y) on "selection" and "test".
    """
    record = load(path) or {"genotype": genotype, "index": index, "step": 0, "seconds": 0.0}
    if "test" in record:
        return record
    key = (args.seed, "member", index)
    net = build(key, data, args.channels, args.cells, genotype)
    optimizer = torch.optim.AdamW(net.parameters(), args.lr, (0.9, 0.99), weight_decay=args.weight_decay)
    if record["step"]:
        say(f"{path.stem}: found at step {record['step']}")
        net.load_state_dict(record["net"])
        optimizer.load_state_dict(record["optimizer"])
    steps = max(1, args.epochs * len(data.splits["train"][1]) // args.batch)
    start, total = time.time() - record["seconds"], 0.0
    net.train()
    for step in range(record["step"], steps):
        progress = step / steps
        # + 0.01, so that the first step is not lost
        optimizer.param_groups[0]["lr"] = args.lr * min(progress / 0.2 + 0.01, (1 - progress) / 0.8)
        x, y = draw_batch(data, "train", args.batch, step, key, args.crop, args.mirror)
        loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
        if (step + 1) % args.log_every == 0 or step + 1 == steps:
            mean, total = total / (step + 1 - record["step"]), 0.0
            if not math.isfinite(mean):
                fail(f"the loss of {path.stem} is not a number at step {step + 1}: lower --lr, in another --out")
            record.update(step=step + 1, seconds=time.time() - start, net=net.state_dict(),
                          optimizer=optimizer.state_dict())
            log_row(path.stem, step + 1, steps, record["seconds"], f"train {mean:.3f}")
            save(path, record)
    del record["optimizer"]
    record.update(network=[data.splits["test"][0].shape[1], len(data.classes), args.channels, args.cells, genotype],
                  classes=data.classes, mean=data.mean.cpu(), std=data.std.cpu(),
                  **{split: predict(net, data, split) for split in ("selection", "test")})
    save(path, record)
    return record


def load_member(path):
    """A trained member from its checkpoint: a Network, and a Data without images, which tells how to use it.

    net, data = load_member(path); probs = net(normalise(data, images)).softmax(-1), with images (B, C, H, W) uint8,
    of the size that it was trained on; probs[:, k] is the probability of data.classes[k]. On the CPU; ends the
    program with a sentence where the file is missing, damaged or of a member whose training was cut off.
    """
    record = load(Path(path)) or fail(f"there is no {path}: results.json names the file of each member")
    if "network" not in record:
        fail(f"the member in {path} is not trained to the end: repeat the command that trains it")
    net = Network(*record["network"])
    net.load_state_dict(record["net"])
    return net.eval(), Data({}, record["classes"], record["mean"], record["std"])


def train_members(jobs, data, args):
    """Train the networks `jobs`, pairs (genotype, index), each distinct one once, dealt out among the processes.

    Returns their records in the order of jobs, without weights. A network's file is named by its genotype and
    index: methods that ask for the same network share it, and so does a later run with more samples.
    """
    check_settings(args, data)
    names = [f"{hashlib.sha256(json.dumps(genotype).encode()).hexdigest()[:8]}-{index}" for genotype, index in jobs]
    distinct = dict(zip(names, jobs))
    order = list(distinct)

    def train(i):
        name, job = order[i], distinct[order[i]]
        say(f"network {i + 1} of {len(distinct)}")
        record = train_member(*job, data, args, Path(args.out) / "members" / f"{name}.pt")
        return {"file": f"members/{name}.pt", **{k: v for k, v in record.items() if k != "net"}}

    records = dict(zip(order, deal_out(len(order), train)))
    return [records[name] for name in names]


# ----------------------------------------------------------------------------------------------------------
# 7. The ensemble and its metrics
# ----------------------------------------------------------------------------------------------------------

def ensemble_metrics(probs, labels):
    """Metrics of the ensemble p = mean_m p_m, step 3 of the method: the average of the members' probabilities.

    probs: (M, N, Y); labels: (N,). Returns a dict of floats:
        accuracy            share of points with argmax p = y
        nll                 - mean log p(y), nats: first the average, then the logarithm
        brier               mean over points of sum_k (p_k - 1[y = k])^2, in [0, 2]
        ece                 sum over 15 equal bins of max p of (share of points in the bin) |confidence - accuracy|
        oracle_accuracy     share of points that at least one member gets right
        disagreement        mean over pairs of members of the share of points with different argmax
        predictive_jsd      H(p) - mean_m H(p_m), nats, in [0, ln M]
    """
    probs = probs.double()
    p, votes = probs.mean(dim=0), probs.argmax(dim=-1)                                     # (N, Y), (M, N)
    confidence, choice = p.max(dim=-1)
    right = (choice == labels).double()
    bins = (confidence * 15).ceil().long().clamp(1, 15) - 1
    gaps = torch.zeros(15, dtype=torch.double).index_add(0, bins, confidence - right)      # sums over each bin
    pairs = torch.combinations(torch.arange(len(votes)))                                   # (M (M - 1) / 2, 2)
    entropy = lambda q: torch.special.entr(q).sum(dim=-1).mean(dim=-1)
    return {
        "accuracy": right.mean().item(),
        "nll": F.nll_loss(p.clamp_min(1e-12).log(), labels).item(),
        "brier": (p - F.one_hot(labels, p.shape[-1])).square().sum(dim=-1).mean().item(),
        "ece": (gaps.abs().sum() / len(labels)).item(),
        "oracle_accuracy": (votes == labels).any(dim=0).double().mean().item(),
        "disagreement": (votes[pairs[:, 0]] != votes[pairs[:, 1]]).double().mean().item() if len(pairs) else 0.0,
        "predictive_jsd": (entropy(p) - entropy(probs).mean()).item(),
    }


def member_metrics(probs, labels):
    """The first four metrics, for one network's probs (N, Y)."""
    return dict(list(ensemble_metrics(probs.unsqueeze(0), labels).items())[:4])


# ----------------------------------------------------------------------------------------------------------
# 8. The lambda response: is lambda a dial?
# ----------------------------------------------------------------------------------------------------------

def lambda_response(hyper, target, lambda_max, count=11):
    """`sample` on a grid of lambda, and two numbers that say how well lambda is obeyed.

    spearman: rank correlation of lambda and matched edges, ideally -1; 0 where these never change.
    calibration_error: mean |matched / 28 - (1 - lambda)|, ideally 0: at a low temperature an edge has either the
    base's operation (JSd near 0) or another (JSd near JSd_max), so that JSd / JSd_max is nearly the share of edges
    that have left. lambda / lambda_max takes the place of lambda where lambda_max exceeds 1, as with the paper's
    objective.
    """
    points = sample(hyper, target, torch.linspace(0, lambda_max, count).tolist())
    lam = torch.tensor([point["lambda"] for point in points], dtype=torch.double)
    matched = torch.tensor([point["matched_edges"] for point in points], dtype=torch.double)
    # Ranks, equal values sharing theirs: how many are smaller, and half of those that are equal.
    ranks = lambda v: ((v[:, None] > v).double() + (v[:, None] == v).double() / 2).sum(dim=1)
    return {"points": points,
            "spearman": torch.corrcoef(torch.stack([ranks(lam), ranks(matched)]))[0, 1].nan_to_num().item(),
            "calibration_error": (matched / (2 * len(EDGES)) - 1 + lam / max(1, lambda_max)).abs().mean().item()}


# Chance, for the seven operations that this file defines
CHANCE_EDGES = 2 * len(EDGES) / len(NAMES)  # a random operation on each edge matches the base's on 4 of 28
CHANCE_ENTRIES = sum(2 * 2 * 2 / (node + 2) / len(NAMES) for node in range(NODES))  # and a random genotype 1.5 of 16


# ----------------------------------------------------------------------------------------------------------
# 9. Other ensemble searches: each is a list of genotypes, trained by the same function
# ----------------------------------------------------------------------------------------------------------

BASELINES = {
    "deep": "the base genotype, trained from several initial weights (a deep ensemble)",
    "random": "random architectures",
    "perturbed": "the base with as many entries changed at random as the sampled member has",
    "nes-rs": "the best of a random pool of twice the size, by forward selection on the selection split",
    "darts": "independent DARTS searches",
}


def random_genotype(*key):
    """Two random inputs of each node with a random operation each: the genotype of random strengths."""
    return genotype_of(torch.rand(2, len(EDGES), len(NAMES), generator=rng(*key)))


def perturb(base, changes, *key):
    """The base with `changes` of its 16 entries, chosen at random, given another operation, chosen at random."""
    genotype = json.loads(json.dumps(base))  # a copy
    entries = [entry for kind in KINDS for entry in genotype[kind]]
    for i in torch.randperm(len(entries), generator=rng(*key))[:changes].tolist():
        others = [name for name in NAMES if name != entries[i][0]]
        entries[i][0] = others[torch.randint(len(others), (), generator=rng(*key, i))]
    return genotype


def forward_selection(probs, labels, count):
    """Indices of `count` members of a pool, probs (P, N, Y), labels (N,): each in turn lowers the ensemble's NLL most.

    The selection of NES-RS (Zaidi et al., 2021).
    """
    chosen = []
    for _ in range(count):
        rest = [i for i in range(len(probs)) if i not in chosen]
        chosen.append(min(rest, key=lambda i: ensemble_metrics(probs[chosen + [i]], labels)["nll"]))
    return chosen


def baseline_jobs(name, base, base_seconds, members, data, args):
    """The networks (genotype, index) that a baseline trains, and the seconds of its searches."""
    M, seed = len(members), args.seed
    if name == "deep":
        return [(base, i) for i in range(M)], base_seconds
    if name == "perturbed":
        return [(perturb(base, 16 - member["matched_entries"], seed, "perturbed", i), i)
                for i, member in enumerate(members)], base_seconds
    if name in ("random", "nes-rs"):
        return [(random_genotype(seed, "random", i), i) for i in range(M if name == "random" else 2 * M)], 0.0
    jobs, seconds = [(base, 0)], base_seconds  # "darts"; the first search is the base's
    for i in range(1, M):
        net = build((seed, f"base-{i}"), data, args.search_channels, args.search_cells)
        p, log = base_search(f"base-{i}", net, data, args)
        jobs.append((genotype_of(p), i))
        seconds += log["seconds"]
    return jobs, seconds


def method_scores(records, chosen, search_seconds, labels):
    """A method's row of the comparison: the metrics of the ensemble of the chosen, its members', and its cost.

    records: of all networks that the method trained; chosen: indices of the members; labels: (N,), of "test".
    """
    probs = torch.stack([records[i]["test"] for i in chosen])
    accuracies = [member_metrics(p, labels)["accuracy"] for p in probs]
    return {**ensemble_metrics(probs, labels), "member_mean": sum(accuracies) / len(accuracies),
            "member_best": max(accuracies), "networks": len(records), "search_seconds": search_seconds,
            "training_seconds": sum(record["seconds"] for record in records)}


def ledger(args, members, records, chosen, labels):
    """CSV text: a row for each method and network that it trained. labels: split -> (N,)."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow("dataset seed method index chosen lambda seconds accuracy nll brier ece "
                    "selection_accuracy selection_nll file genotype".split())
    for method, networks in records.items():
        for i, record in enumerate(networks):
            lam = members[i]["lambda"] if method == "ours" else ""
            scores, selection = (member_metrics(record[split], labels[split]) for split in ("test", "selection"))
            writer.writerow([args.dataset, args.seed, method, i, int(i in chosen[method]), lam, record["seconds"],
                             *scores.values(), selection["accuracy"], selection["nll"], record["file"],
                             json.dumps(record["genotype"])])
    return text.getvalue()


# name in results.json -> title, factor, digits
COLUMNS = {"accuracy": ("accuracy, %", 100, 2), "nll": ("NLL", 1, 4), "brier": ("Brier", 1, 4), "ece": ("ECE", 1, 4),
           "oracle_accuracy": ("oracle, %", 100, 2), "disagreement": ("disagree, %", 100, 2),
           "predictive_jsd": ("pred. JSd", 1, 4), "member_mean": ("mean member, %", 100, 2),
           "member_best": ("best member, %", 100, 2), "networks": ("networks", 1, 0),
           "search_seconds": ("search, s", 1, 0), "training_seconds": ("training, s", 1, 0)}
# The 97.5 % quantile of Student's t for 1 to 9 degrees of freedom
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def report(runs):
    """Markdown: the methods of finished runs (their results, one run a seed) side by side, mean +- standard deviation.

    Then, for two to ten runs, each method's differences to "deep" and to "perturbed", paired by seed, with the 95 %
    interval of Student's t. Runs that differ in more than the seed are refused.
    """
    settings = [{k: v for k, v in run["settings"].items() if k not in (FREE_TO_CHANGE - {"samples"}) | {"seed"}}
                for run in runs]
    if any(other != settings[0] for other in settings) or len({run["settings"]["seed"] for run in runs}) < len(runs):
        fail("--report compares runs of different seeds and otherwise the same settings: "
             + ", ".join(run["settings"]["out"] for run in runs) + " are not")

    def values(name, key):
        return COLUMNS[key][1] * torch.tensor([run["methods"][name][key] for run in runs], dtype=torch.double)

    def mean_std(name, key):
        if key not in runs[0]["methods"][name]:
            return ""
        v, digits = values(name, key), COLUMNS[key][2]
        return f"{v.mean():.{digits}f}" + (f" +- {v.std():.{digits}f}" if len(runs) > 1 else "")

    def difference(name, other, key):
        d, digits = values(name, key) - values(other, key), COLUMNS[key][2]
        half = T_975[len(runs) - 2] * d.std() / math.sqrt(len(runs))
        return f"{d.mean():+.{digits}f} [{d.mean() - half:+.{digits}f}, {d.mean() + half:+.{digits}f}]"

    methods = [name for name in runs[0]["methods"] if all(name in run["methods"] for run in runs)]
    rows = [["method", *(title for title, _, _ in COLUMNS.values())], ["---"] * (1 + len(COLUMNS))]
    rows += [[name, *(mean_std(name, key) for key in COLUMNS)] for name in methods]
    legend = f"\n\nMean +- standard deviation over {len(runs)} seeds." if len(runs) > 1 else ""
    others = [name for name in ("deep", "perturbed") if name in methods and 1 < len(runs) <= 1 + len(T_975)]
    for other in others:
        rows += [[], [f"minus {other}", "accuracy, points", "NLL"], ["---"] * 3]
        rows += [[name, difference(name, other, "accuracy"), difference(name, other, "nll")]
                 for name in methods if name != other]
    if others:
        legend += (" Differences are paired by seed, with the 95 % interval of Student's t: where it covers zero, "
                   "nothing was shown.")
    return "\n".join(f"| {' | '.join(row)} |" if row else "" for row in rows) + legend


# ----------------------------------------------------------------------------------------------------------
# 10. Pictures
# ----------------------------------------------------------------------------------------------------------

def draw_cell(axis, entries, base=(), title=""):
    """A cell as a staircase: inputs and nodes on the diagonal; an entry runs right from its source, down to its node.

    Entries that are not in `base` are orange.
    """
    for i, (name, source) in enumerate(entries):
        node, first = i // 2 + 2, i // 2 * 2
        color = "tab:orange" if base and [name, source] not in base[first:first + 2] else "tab:blue"
        axis.annotate("", (node, -node), (source, -source), zorder=1, arrowprops={
            "arrowstyle": "-|>", "color": color, "shrinkA": 0, "shrinkB": 9,
            "connectionstyle": "angle,angleA=0,angleB=90"})
        axis.text(node, -source, "\n".join(name.replace("_", " ").rsplit(" ", 1)), ha="center", va="center",
                  color=color, fontsize=7, bbox={"boxstyle": "square,pad=0.15", "fc": "white", "ec": color})
    for node, label in enumerate(["c[k-2]", "c[k-1]", "0", "1", "2", "3"]):
        axis.text(node, -node, label, ha="center", va="center", bbox={"boxstyle": "round", "fc": "lightgrey"})
    axis.set(xlim=(-0.5, 5.6), ylim=(-5.4, 0.5), title=title)
    axis.axis("off")


def draw_response(axis, points, lambda_max):
    """The share of matched edges and JSd / ln 2 against lambda, with the ideal line and chance."""
    lam = [point["lambda"] for point in points]
    axis.plot(lam, [point["matched_edges"] / (2 * len(EDGES)) for point in points], "o-", label="matched edges / 28")
    axis.plot(lam, [point["jsd"] for point in points], "s-", label="JSd / ln 2")
    axis.plot([0, lambda_max], [1, 1 - min(1, lambda_max)], ":", color="grey", label="the ideal for matched edges")
    axis.axhline(1 / len(NAMES), ls="--", color="grey", label="matched by chance")
    axis.set(xlabel="lambda", ylabel="share", title="The lambda response")
    axis.legend(fontsize=8)


def draw_sizes(axis, probs, labels):
    """Accuracy of the first 1, 2, ..., M members together, and of each alone."""
    sizes = range(1, len(probs) + 1)
    together = [100 * ensemble_metrics(probs[:m], labels)["accuracy"] for m in sizes]
    alone = [100 * member_metrics(p, labels)["accuracy"] for p in probs]
    axis.plot(sizes, together, "o-", label="the first members together")
    axis.plot(sizes, alone, "x", color="grey", label="this member alone")
    axis.set(xlabel="members", ylabel="test accuracy, %", title="Accuracy against ensemble size", xticks=list(sizes))
    axis.legend(fontsize=8)


def draw_reliability(axis, probs, labels):
    """Accuracy against confidence in 15 bins: on the diagonal, the ensemble is right as often as it is sure."""
    confidence, choice = probs.mean(dim=0).max(dim=-1)
    bins = (confidence * 15).ceil().long().clamp(1, 15)
    means = lambda v: [v[bins == b].double().mean() for b in bins.unique()]
    axis.plot([0, 1], [0, 1], ":", color="grey", label="calibrated")
    axis.plot(means(confidence), means(choice == labels), "o-", label="ensemble")
    axis.set(xlabel="confidence", ylabel="accuracy", title="Reliability of the ensemble")
    axis.legend(fontsize=8)


def save_pictures(folder, base, members, response, lambda_max, probs, labels):
    """Write cells.png (of the first 20 members), lambda_response.png, ensemble_size.png and reliability.png."""
    import matplotlib.pyplot as plt  # here, so that a notebook keeps its own way of showing pictures
    cells = [("base (below, orange is what it has not)", base)]
    cells += [("lambda {lambda:.2f}, {matched_entries} of 16 entries".format(**m), m["genotype"]) for m in members[:20]]
    figures = {}
    figures["cells"], axes = plt.subplots(len(cells), 2, figsize=(11, 3.4 * len(cells)), squeeze=False)
    for row, (title, genotype) in zip(axes, cells):
        for axis, kind in zip(row, KINDS):
            draw_cell(axis, genotype[kind], base[kind], f"{title}: {kind} cell")
    for name, draw, what in (("lambda_response", draw_response, (response["points"], lambda_max)),
                             ("ensemble_size", draw_sizes, (probs, labels)),
                             ("reliability", draw_reliability, (probs, labels))):
        figures[name], axis = plt.subplots(figsize=(5, 4))
        draw(axis, *what)
    for name, figure in figures.items():
        png = io.BytesIO()
        figure.savefig(png, dpi=110, bbox_inches="tight")
        save(Path(folder) / f"{name}.png", png.getvalue())
        plt.close(figure)


# ----------------------------------------------------------------------------------------------------------
# 11. The run: several processes, settings, what is printed, main
# ----------------------------------------------------------------------------------------------------------

def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def say(text=""):
    if rank() == 0:
        print(text, flush=True)


def share(value):
    """Process 0's value, in every process."""
    box = [value]
    if world() > 1:
        dist.broadcast_object_list(box)
    return box[0]


def gather(value):
    """The values of all processes, in every process."""
    values = [value] * world()
    if world() > 1:
        dist.all_gather_object(values, value)
    return values


def deal_out(count, work):
    """[work(0), ..., work(count - 1)] in every process, each computed by one of them."""
    done = {}
    for part in gather({i: work(i) for i in range(rank(), count, world())}):
        done.update(part)
    return [done[i] for i in range(count)]


def average_gradients(parameters):
    """Data parallelism, all of it: the mean of the gradients that the processes got from their shares of a batch.

    It is the whole batch's gradient where the shares are equal, but for batch norm (and the second order's inner
    step), which see only their own share.
    """
    if world() > 1:
        gradients = [p.grad for p in parameters if p.grad is not None]  # the same everywhere: all run one genotype
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        for g, mean in zip(gradients, (flat / world()).split([g.numel() for g in gradients])):
            g.copy_(mean.view_as(g))


TOY_DEFAULTS = {"base_steps": 60, "hyper_steps": 400, "epochs": 8, "channels": 8, "log_every": 50}
FREE_TO_CHANGE = {"samples", "out", "data_dir", "device", "baselines", "log_every", "report"}  # within one run folder


def number(kind, low, high=math.inf):
    """An argparse type: an int or a float within bounds."""
    def check(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not {low} or more" if high == math.inf else
                                             f"{text} is not between {low} and {high}")
        return kind(text)
    check.__name__ = kind.__name__
    return check


def parse(argv=None):
    """The settings; toy, which is small, has smaller defaults. `set_up` turns the device "auto" into a real one."""
    parser = argparse.ArgumentParser("nes.py", description="Neural ensemble search with diversity control.",
                                     allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = lambda message: fail(f"{message}; see --help")
    add = parser.add_argument_group("what to run").add_argument
    add("--dataset", default="fmnist", help="fmnist, cifar10, toy (smaller defaults), or a folder with "
        "train/<class>/ and test/<class>/")
    add("--samples", type=number(int, 1), default=5, help="members of the ensemble")
    add("--baselines", nargs="*", choices=["all", *BASELINES], default=[], help="other ensemble searches to run "
        "beside it. " + "; ".join(f"{name}: {text}" for name, text in BASELINES.items()))
    add("--report", nargs="+", metavar="RUN", help="only compare these finished run folders, one a seed, as Markdown")
    add("--seed", type=int, default=0, help="of everything random")
    add("--device", default="auto", help="cpu, cuda, mps, or auto: the first of cuda, mps, cpu that is there")
    add("--out", help="run folder; None: runs/<dataset>-<objective>-<seed>")
    add("--log-every", type=number(int, 1), default=100, help="steps between log rows, and between checkpoints")
    add = parser.add_argument_group("data").add_argument
    add("--data-dir", default="data", help="where torchvision's data sets are, or are downloaded to")
    add("--image-size", type=number(int, 8), default=32, help="side to which a folder's images are resized, pixels")
    add("--crop", type=number(int, 0), default=0, help="largest random shift in training, pixels; for long runs")
    add("--mirror", action="store_true",
        help="mirror half of the training images; for long runs, but not for digits or text")
    add = parser.add_argument_group("search").add_argument
    add("--search-channels", type=number(int, 2), default=8, help="channels of the supernet's first cell")
    add("--search-cells", type=number(int, 1), default=2, help="cells of the supernet")
    add("--search-batch", type=number(int, 2), default=64, help="images of a step")
    add("--base-steps", type=number(int, 1), default=150, help="steps of the base search (DARTS)")
    add("--hyper-steps", type=number(int, 1), default=3000, help="steps of the hypernetwork's training")
    add("--search-lr", type=number(float, 0), default=0.05,
        help="learning rate of w; this and the next two fall to 0 as a cosine")
    add("--alpha-lr", type=number(float, 0), default=0.01, help="learning rate of alpha in the base search")
    add("--hyper-lr", type=number(float, 0), default=0.06, help="learning rate of the hypernetwork")
    add("--second-order", action="store_true", help="base search by the exact second-order gradient")
    add = parser.add_argument_group("diversity").add_argument
    add("--objective", choices=["target", "paper"], default="target", help="target: c (JSd / JSd_max - lambda)^2; "
        "paper: - lambda JSd (with, say, --lambda-max 4)")
    add("--lambda-max", type=number(float, 0), default=1.0, help="Lambda, the largest diversity")
    add("--strength", type=number(float, 0), default=10.0, help="c, of the target objective")
    add("--pivots", type=number(int, 2), default=6, help="K, pivots of the hypernetwork")
    add("--tau", type=number(float, 0, 0.45), default=0.1, help="smoothing of the base in the JSd")
    add("--tau-start", type=number(float, 0, 0.45), default=0.3, help="smoothing of the base where the pivots start")
    add("--temperature", type=number(float, 0.01), default=0.25, help="temperature of alpha(lambda) at the end")
    add("--noise", type=number(float, 0), default=0.3, help="scale of the Gumbel noise at the start, falls to 0")
    add = parser.add_argument_group("members").add_argument
    add("--channels", type=number(int, 2), default=16, help="channels of a member's first cell")
    add("--cells", type=number(int, 1), default=2, help="cells of a member")
    add("--epochs", type=number(int, 1), default=4, help="epochs of a member's training")
    add("--batch", type=number(int, 2), default=64, help="images of a step")
    add("--lr", type=number(float, 0), default=0.006, help="largest learning rate")
    add("--weight-decay", type=number(float, 0), default=0.05, help="weight decay")
    if parser.parse_args(argv).dataset == "toy":
        parser.set_defaults(**TOY_DEFAULTS)
    args = parser.parse_args(argv)
    if args.lambda_max == 0 or args.objective == "target" and args.lambda_max > 1:
        parser.error("--lambda-max must be above 0 and, with --objective target, whose lambda is a share, at most 1")
    if args.tau_start <= args.tau:
        parser.error("--tau-start must be above --tau: the pivots start softer than the base that they are to leave")
    if "all" in args.baselines:
        args.baselines = list(BASELINES)
    args.dataset = str(Path(args.dataset))  # the same folder with a slash at its end is the same
    args.out = args.out or f"runs/{Path(args.dataset).name}-{args.objective}-{args.seed}"
    return args


def set_up(args):
    """Choose the device, join the other processes of a torchrun, and keep freed memory."""
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    there = [name for name in found if found[name]]
    args.device = there[0] if args.device == "auto" else args.device
    try:
        usable = torch.empty(0, device=args.device).device.type in there
    except (RuntimeError, AssertionError):  # torch's words for a name or a number that it does not know
        usable = False
    if not usable:
        fail(f"there is no --device {args.device} on this machine: choose from {', '.join(there)}")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        if args.device == "cuda":
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(args.device)
        backend = "nccl" if "cuda" in args.device else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=7))  # one may wait long for another's members
    if platform.libc_ver()[0] == "glibc":  # else each large tensor is fresh memory, faulted in page by page
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)           # M_MMAP_MAX: no separate mapping for a large block
        libc.mallopt(-1, 2**31 - 1)   # M_TRIM_THRESHOLD: keep what was freed


def check_settings(args, data):
    """Refuse a run folder that other settings or images made, before it is used; else note the settings there."""
    if rank() > 0:
        return
    path = Path(args.out) / "settings.json"
    now = {name: value for name, value in vars(args).items() if name not in FREE_TO_CHANGE} | {"digest": data.digest}
    before = load(path) or now
    if before != now:
        changed = ["other images" if name == "digest" else
                   f"--{name.replace('_', '-')} {before.get(name)} (now {now.get(name)})"
                   for name in sorted(before | now) if before.get(name) != now.get(name)]
        fail(f"{args.out} holds a run with {', '.join(changed)}: choose another --out, or those settings")
    save(path, json.dumps(now, indent=1))


def run(args):
    """All steps of the method in turn; returns what `main` returns and results.json holds."""
    say("settings: " + "  ".join(f"{name}={value}" for name, value in vars(args).items()))
    for turn in range(2):  # process 0 first: it downloads, if it must, and the others find the files
        if turn == min(rank(), 1):
            data = load_data(args.dataset, args.data_dir, args.image_size, args.seed, args.device)
        share(None)
    labels = {split: data.splits[split][1].cpu() for split in ("selection", "test")}
    say("data: " + "  ".join(f"{name} {len(y)}" for name, (_, y) in data.splits.items()))

    net = build((args.seed, "base"), data, args.search_channels, args.search_cells)
    base_p, base_log = base_search("base", net, data, args)
    base = genotype_of(base_p)
    print_cells("base", base)
    hyper, target, hyper_log = train_hypernetwork(net, base_p, data, args)
    response = lambda_response(hyper, target, args.lambda_max)
    print_response(response)

    members = sample(hyper, target, sample_lambdas(args.samples, args.lambda_max))
    distinct = len({json.dumps(member["genotype"]) for member in members})
    say(f"\n{len(members)} architectures sampled, {distinct} of them distinct")
    for member in members:
        print_cells("lambda {lambda:.3f}".format(**member), member["genotype"])
    say()
    start = time.time()

    def score(i):
        probs = one_shot(net, members[i]["genotype"], data, args)
        log_row("one shot", i + 1, len(members), time.time() - start, "")
        return probs

    shots = torch.stack(deal_out(len(members), score))
    seconds = {"base": base_log["seconds"], "hypernetwork": hyper_log["seconds"], "one_shot": time.time() - start}

    jobs = {"ours": [(member["genotype"], i) for i, member in enumerate(members)]}
    search_seconds = {"ours": seconds["base"] + seconds["hypernetwork"]}
    for name in args.baselines:
        jobs[name], search_seconds[name] = baseline_jobs(name, base, seconds["base"], members, data, args)
    trained = iter(train_members([job for method in jobs.values() for job in method], data, args))
    records = {name: [next(trained) for _ in method] for name, method in jobs.items()}
    seconds["members"] = sum(record["seconds"] for record in records["ours"])

    for member, record, shot in zip(members, records["ours"], shots):
        member.update(file=record["file"], one_shot=member_metrics(shot, labels["test"]),
                      test=member_metrics(record["test"], labels["test"]))
    chosen = {name: range(len(networks)) for name, networks in records.items()}
    if "nes-rs" in records:
        pool = torch.stack([record["selection"] for record in records["nes-rs"]])
        chosen["nes-rs"] = forward_selection(pool, labels["selection"], args.samples)
    methods = {name: method_scores(records[name], chosen[name], search_seconds[name], labels["test"])
               for name in records}
    shot_scores = ensemble_metrics(shots, labels["test"])
    methods["ours, one-shot"] = {**shot_scores, "networks": 0, "training_seconds": 0.0,
                                 "search_seconds": search_seconds["ours"]}
    if "deep" in records:
        methods["single"] = method_scores(records["deep"][:1], [0], seconds["base"], labels["test"])
    probs = torch.stack([record["test"] for record in records["ours"]])
    results = {
        "settings": vars(args) | {"digest": data.digest}, "seconds": seconds,
        "base": {"genotype": base, "operations": count_operations(base)},
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "torchvision": torchvision.__version__},
        "lambda_response": response, "distinct": distinct, "members": members, "methods": methods,
        "one_shot": shot_scores, "ensemble": {key: methods["ours"][key] for key in shot_scores}}
    if rank() == 0:
        save(Path(args.out) / "results.json", json.dumps(results, indent=1))
        save(Path(args.out) / "ledger.csv", ledger(args, members, records, chosen, labels))
        save_pictures(args.out, base, members, response, args.lambda_max, probs, labels["test"])
    print_results(results)
    return results


def print_cells(name, genotype):
    """A genotype in words: its operations' counts, then each node as the sum of its two inputs."""
    say(f"\n{name}: " + ", ".join(f"{count} {op}" for op, count in count_operations(genotype).items()))
    sources = ("c[k-2]", "c[k-1]", "node 0", "node 1", "node 2")
    for kind in KINDS:
        for node in range(NODES):
            terms = [f"{op}({sources[source]})" for op, source in genotype[kind][2 * node:2 * node + 2]]
            say(f"  {kind:<9} node {node} = {' + '.join(terms)}")


def print_response(response):
    say(f"\nlambda  JSd/ln 2  edges of 28 (chance {CHANCE_EDGES:.0f})  "
        f"entries of 16 (chance {CHANCE_ENTRIES:.1f})  operations")
    for point in response["points"]:
        counts = ", ".join(f"{n} {op}" for op, n in count_operations(point["genotype"]).items())
        say("{lambda:6.2f}{jsd:10.3f}{matched_edges:12d}{matched_entries:25d}".format(**point) + " " * 17 + counts)
    say("Spearman's correlation of lambda and matched edges {spearman:.3f}, calibration error {calibration_error:.3f}"
        .format(**response))


def print_results(results):
    say("\n  member  lambda  edges  entries  JSd/ln 2  one-shot, %  trained, %     NLL   Brier     ECE")
    scores = lambda shot, test: (f"{100 * shot['accuracy']:13.2f}{100 * test['accuracy']:12.2f}{test['nll']:8.4f}"
                                 f"{test['brier']:8.4f}{test['ece']:8.4f}")
    for i, member in enumerate(results["members"]):
        say(f"{i:8d}" + "{lambda:8.3f}{matched_edges:7d}{matched_entries:9d}{jsd:10.3f}".format(**member)
            + scores(member["one_shot"], member["test"]))
    say("ensemble" + " " * 34 + scores(results["one_shot"], results["ensemble"]))
    say(f"\n{report([results])}\n\neverything is in {results['settings']['out']}")


def main(argv=None):
    """The program: parse the flags, run the method, return the results (the content of results.json).

    With --report it returns {"report": the Markdown that it prints}.
    """
    args = parse(argv)
    if args.report:
        text = report([load(Path(folder) / "results.json")
                       or fail(f"{folder} holds no results.json: finish that run first") for folder in args.report])
        print(text)
        return {"report": text}
    set_up(args)
    try:
        return run(args)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\nnes.py: stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        raise SystemExit(130)
