"""Tests of nes.py against independent computations.

    pytest test_nes.py         # all tests, without a network
    python test_nes.py         # benchmark: a search step of nes.py against the textbook version below
"""
import copy
import csv
import gzip
import hashlib
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

if __name__ != "__main__":  # the benchmark uses all cores; the tests leave the second one to the tutorial
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import nbformat
import numpy
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from nbclient import NotebookClient

import nes


# ---- the textbook supernet: each operation of each edge by itself, NCHW, gradients of everything

def textbook_conv(C, taps, stride, dilation=1):
    return [nn.ReLU(), nn.Conv2d(C, C, taps, stride, dilation * (taps // 2), dilation, groups=C, bias=False),
            nn.Conv2d(C, C, 1, bias=False), nn.BatchNorm2d(C, affine=False)]


def textbook_op(name, C, stride):
    if "pool" in name:
        layer = nn.MaxPool2d(3, stride, 1) if "max" in name else nn.AvgPool2d(3, stride, 1, count_include_pad=False)
        return nn.Sequential(layer, nn.BatchNorm2d(C, affine=False))
    if name == "skip_connect":
        return nn.Identity() if stride == 1 else nn.Sequential(nn.ReLU(), TextbookReduce(C, C))
    taps = int(name[-1])
    if name.startswith("dil"):
        return nn.Sequential(*textbook_conv(C, taps, stride, 2))
    return nn.Sequential(*textbook_conv(C, taps, stride), *textbook_conv(C, taps, 1))


class TextbookReduce(nn.Module):
    def __init__(self, C_in, C):
        super().__init__()
        self.even, self.odd = (nn.Conv2d(C_in, C // 2, 1, stride=2, bias=False) for _ in range(2))
        self.norm = nn.BatchNorm2d(C, affine=False)

    def forward(self, x):
        moved = torch.zeros_like(x)
        moved[:, :, :-1, :-1] = x[:, :, 1:, 1:]
        return self.norm(torch.cat([self.even(x), self.odd(moved)], dim=1))


class TextbookCell(nn.Module):
    def __init__(self, cell, C_before, C_last, C):
        super().__init__()
        align = lambda C_in: nn.Sequential(nn.Conv2d(C_in, C, 1, bias=False), nn.BatchNorm2d(C, affine=False))
        reduced = isinstance(cell.align0, nes.FactorizedReduce)
        self.align0 = TextbookReduce(C_before, C) if reduced else align(C_before)
        self.align1 = align(C_last)
        self.edges = nn.ModuleList(
            nn.ModuleList(textbook_op(name, C, 2 if cell.reduction and source < 2 else 1) for name in nes.NAMES)
            for node in range(4) for source in range(node + 2))

    def forward(self, s0, s1, weights):
        states, e = [self.align0(F.relu(s0)), self.align1(F.relu(s1))], 0
        for node in range(4):
            terms = []
            for source in range(node + 2):
                terms += [weights[e, o] * op(states[source]) for o, op in enumerate(self.edges[e])]
                e += 1
            states.append(sum(terms))
        return torch.cat(states[2:], dim=1)


class TextbookNetwork(nn.Module):
    """The same function as a nes.Network without a genotype, and the same weights."""

    def __init__(self, C_in, classes, C, cells):
        super().__init__()
        model = nes.Network(C_in, classes, C, cells)
        self.stem, self.classifier = copy.deepcopy(model.stem), copy.deepcopy(model.classifier)
        self.cells, self.kinds = nn.ModuleList(), []
        C_before = C_last = 4 * C
        for cell in model.cells:
            C = 2 * C if cell.reduction else C
            self.cells.append(TextbookCell(cell, C_before, C_last, C))
            self.kinds.append(int(cell.reduction))
            C_before, C_last = C_last, 4 * C
        # The cells' parameters come in the same order; only skip_connect's names differ.
        for mine, theirs in zip(self.cells.parameters(), model.cells.parameters(), strict=True):
            mine.data.copy_(theirs.data)
        self.model = [model]  # in a list, so that its parameters are not this network's as well

    def forward(self, x, weights):
        s0 = s1 = self.stem(x)
        for kind, cell in zip(self.kinds, self.cells):
            s0, s1 = s1, cell(s0, s1, weights[kind])
        return self.classifier(s1.mean((2, 3)))


def benchmark(C=16, cells=5, batch=64, size=28, rounds=5):
    """Seconds of a weight step and an architecture step, nes.py and the textbook in turn; prints their ratio."""
    torch.manual_seed(0)
    textbook = TextbookNetwork(1, 10, C, cells)
    network = textbook.model[0].to(memory_format=torch.channels_last)
    x, y, alpha = torch.randn(batch, 1, size, size), torch.randint(10, (batch,)), torch.zeros(2, 14, 7, requires_grad=True)
    x_last = x.contiguous(memory_format=torch.channels_last)

    def textbook_steps():
        for _ in range(2):
            loss = F.cross_entropy(textbook(x, alpha.softmax(-1)), y)
            torch.autograd.grad(loss, [alpha, *textbook.parameters()])

    def nes_steps():
        weights = alpha.softmax(-1)
        F.cross_entropy(network(x_last, weights.detach()), y).backward()
        network.requires_grad_(False)
        torch.autograd.grad(F.cross_entropy(network(x_last, weights), y), alpha)
        network.requires_grad_(True)

    ratios = []
    for i in range(rounds + 1):
        seconds = []
        for steps in (textbook_steps, nes_steps):
            start = time.time()
            steps()
            seconds.append(time.time() - start)
        if i:  # the first round warms up
            ratios.append(seconds[0] / seconds[1])
            print(f"textbook {seconds[0]:.2f} s, nes.py {seconds[1]:.2f} s, ratio {ratios[-1]:.2f}", flush=True)
    print(f"median ratio {sorted(ratios)[len(ratios) // 2]:.2f}, {torch.get_num_threads()} threads, torch {torch.__version__}")


# ---- 1 data

TINY = ("--dataset toy --samples 2 --base-steps 4 --hyper-steps 6 --epochs 1 --channels 4 --cells 2 --search-channels 4 "
        "--log-every 2 --batch 256 --search-batch 16 --device cpu").split()


def run_tiny(out, *flags):
    return nes.main([*TINY, "--out", str(out), *flags])


def without_times(results):
    """What must be the same in two runs: everything but the clock and the folder's name."""
    results = json.loads(json.dumps(results))
    results.pop("seconds")
    for name in ("out", "data_dir", "device", "log_every"):
        results["settings"].pop(name)
    for method in results["methods"].values():
        method.pop("search_seconds"), method.pop("training_seconds")
    return results


def test_splits_are_disjoint_and_complete():
    data = nes.load_data("toy", "", 16, seed=3)
    rows = {name: {bytes(x.flatten().tolist()) for x in data.splits[name][0]} for name in ("weights", "architecture", "selection", "test")}
    assert [len(rows[name]) for name in rows] == [1080, 1080, 240, 600]
    assert len(set.union(*rows.values())) == 3000
    other = nes.load_data("toy", "", 16, seed=4)
    assert not torch.equal(data.splits["weights"][0], other.splits["weights"][0])


def test_batches_go_through_the_split_once_an_epoch_and_shift_and_mirror():
    images = torch.arange(6 * 5 * 5, dtype=torch.uint8).view(6, 1, 5, 5)
    data = nes.Data({"train": (images, torch.arange(6))}, ["a"], torch.zeros(1, 1, 1), torch.ones(1, 1, 1))
    batches = [nes.draw_batch(data, "train", 2, step, ("k",)) for step in range(3)]
    assert sorted(torch.cat([y for _, y in batches]).tolist()) == list(range(6))
    for x, y in batches:
        assert torch.allclose(x * 255, images[y].float())
    seen = set()
    for step in range(60):
        x, y = nes.draw_batch(data, "train", 1, step, ("k",), crop=1, mirror=True)
        padded = F.pad(images[y].float(), (1, 1, 1, 1), mode="replicate")
        windows = {(r, c, m): (padded[..., r:r + 5, c:c + 5].flip(3) if m else padded[..., r:r + 5, c:c + 5])
                   for r in range(3) for c in range(3) for m in range(2)}
        match = [key for key, window in windows.items() if torch.allclose(window, (x * 255).round())]
        assert match
        seen.update(match)
    assert len(seen) == 18


def test_two_shares_of_a_batch_are_the_batch():
    data = nes.load_data("toy", "", 16, seed=0)
    x, y = nes.draw_batch(data, "weights", 8, 5, ("k",), 1, True)
    for r in range(2):
        part_x, part_y = nes.draw_batch(data, "weights", 8, 5, ("k",), 1, True, slice(r, None, 2))
        assert torch.equal(part_x, x[r::2]) and torch.equal(part_y, y[r::2])


def write_images(root, classes=("a", "b"), colour=True, count=12):
    generator = torch.Generator().manual_seed(0)
    for part in ("train", "test"):
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(256, (3 if colour else 1, 9, 12), dtype=torch.uint8, generator=generator)
                torchvision.transforms.functional.to_pil_image(pixels).save(root / part / name / f"{i}.png")


@pytest.mark.parametrize("colour", [True, False])
def test_a_folder_of_images(tmp_path, colour):
    write_images(tmp_path, colour=colour)
    data = nes.load_data(str(tmp_path), "", 10, seed=0)
    assert data.classes == ["a", "b"] and data.splits["test"][0].shape == (24, 3 if colour else 1, 10, 10)
    assert data.splits["test"][1].tolist() == [0] * 12 + [1] * 12


def test_cifar10_is_read_from_its_files(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = torch.randint(256, (4, 3072), dtype=torch.uint8).numpy()
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch", "batches.meta"]
    for i, name in enumerate(names):
        (folder / name).write_bytes(pickle.dumps({"data": pixels + i, "labels": [0, 1, 2, 3], "label_names": list("abcdefghij")}))
    sums = {name: hashlib.md5((folder / name).read_bytes()).hexdigest() for name in names}
    cifar = torchvision.datasets.CIFAR10
    monkeypatch.setattr(cifar, "train_list", [[name, sums[name]] for name in names[:5]])
    monkeypatch.setattr(cifar, "test_list", [[names[5], sums[names[5]]]])
    monkeypatch.setattr(cifar, "meta", {**cifar.meta, "md5": sums["batches.meta"]})
    data = nes.load_data("cifar10", str(tmp_path), 32, seed=0)
    assert sum(len(data.splits[name][1]) for name in nes.SHARES) == 20
    assert torch.equal(data.splits["test"][0], torch.from_numpy(pixels + 5).view(4, 3, 32, 32))


# ---- 2 cell and supernet

@pytest.mark.parametrize("taps, stride, dilation", [(3, 1, 1), (3, 2, 1), (5, 1, 1), (5, 2, 1), (3, 1, 2), (3, 2, 2), (5, 1, 2), (5, 2, 2)])
@pytest.mark.parametrize("size", [8, 7])
def test_depthwise_gradients_are_those_of_pytorch(taps, stride, dilation, size):
    x = torch.randn(3, 4, size, size, dtype=torch.double, requires_grad=True)
    conv = nes.DepthwiseConv(4, taps, stride, dilation).double()
    mine = conv(x)
    theirs = F.conv2d(x, conv.weight, None, stride, dilation * (taps // 2), dilation, 4)
    g = torch.randn_like(mine)
    assert torch.allclose(mine, theirs)
    for a, b in zip(torch.autograd.grad(mine, [x, conv.weight], g), torch.autograd.grad(theirs, [x, conv.weight], g)):
        assert torch.allclose(a, b)
    assert torch.autograd.gradgradcheck(lambda x, w: nes.DepthwiseGradients.apply(x, w, stride, dilation), (x[:1, :, :5, :5], conv.weight[:4]))


@pytest.mark.parametrize("stride", [1, 2])
def test_mixed_op_is_the_weighted_sum_of_the_textbook_operations(stride):
    mixed = nes.MixedOp(4, stride).double()
    textbook = nn.ModuleList(textbook_op(name, 4, stride) for name in nes.NAMES).double()
    for mine, theirs in zip(textbook.parameters(), mixed.parameters(), strict=True):
        mine.data.copy_(theirs.data)
    x, weights = torch.randn(2, 4, 7, 7, dtype=torch.double), torch.rand(7, dtype=torch.double)
    expected = [op(x) for op in textbook]
    assert torch.allclose(mixed(x, weights), sum(w * y for w, y in zip(weights, expected)))
    assert torch.allclose(mixed(x), sum(expected))
    assert torch.allclose(mixed(x, None, ["avg_pool_3x3", "dil_conv_5x5"]), expected[1] + expected[6])


@pytest.mark.parametrize("size", [16, 13])
def test_supernet_and_its_gradients_are_the_textbooks(size):
    torch.manual_seed(0)
    textbook = TextbookNetwork(2, 3, 4, 3).double()
    network = textbook.model[0].double().to(memory_format=torch.channels_last)
    x, weights = torch.randn(3, 2, size, size, dtype=torch.double), torch.rand(2, 14, 7, dtype=torch.double, requires_grad=True)
    mine, theirs = network(x, weights), textbook(x, weights)
    assert torch.allclose(mine, theirs)
    mine = torch.autograd.grad(mine.square().sum(), [weights, *network.cells.parameters()])
    theirs = torch.autograd.grad(theirs.square().sum(), [weights, *textbook.cells.parameters()])
    assert all(torch.allclose(a, b) for a, b in zip(mine, theirs, strict=True))


def one_hot(genotype):
    weights = torch.zeros(2, 14, 7)
    for k, kind in enumerate(nes.KINDS):
        for i, (name, source) in enumerate(genotype[kind]):
            weights[k, nes.EDGES.index((source, i // 2)), nes.NAMES.index(name)] = 1
    return weights


def test_a_discrete_network_is_the_supernet_with_one_hot_alpha():
    genotype = nes.random_genotype(5)
    supernet, discrete = nes.Network(1, 4, 4, 3), nes.Network(1, 4, 4, 3, genotype)
    missing = discrete.load_state_dict(supernet.state_dict(), strict=False).missing_keys
    assert all(".weight" in key or ".bias" in key for key in missing) and missing  # batch norm's scale 1 and shift 0
    x = torch.randn(5, 1, 16, 16)
    expected = supernet(x, one_hot(genotype))
    assert torch.allclose(discrete(x), expected, atol=1e-5)
    assert torch.allclose(supernet(x, None, genotype), expected, atol=1e-5)
    assert not torch.allclose(supernet(x, one_hot(nes.random_genotype(6))), expected, atol=1e-2)


# ---- 3 alpha, genotype, base search

def test_genotype_rule_on_a_worked_example():
    p = torch.full((2, 14, 7), 0.01)
    p[:, :, 2] = 0.1                                   # everywhere a weak skip_connect
    p[0, 1, 3], p[0, 0, 0] = 0.5, 0.4                  # node 0: both its edges
    p[0, 2, 4], p[0, 3, 1], p[0, 4, 6] = 0.3, 0.6, 0.5  # node 1: sources 1 and 2
    genotype = nes.genotype_of(p)
    assert genotype["normal"] == [["max_pool_3x3", 0], ["sep_conv_3x3", 1], ["avg_pool_3x3", 1], ["dil_conv_5x5", 2],
                                  ["skip_connect", 0], ["skip_connect", 1], ["skip_connect", 0], ["skip_connect", 1]]
    assert genotype["reduction"] == [["skip_connect", 0], ["skip_connect", 1]] * 4
    assert nes.genotype_of(one_hot(genotype)) == genotype and json.loads(json.dumps(genotype)) == genotype


def test_second_order_gradient_against_finite_differences():
    torch.manual_seed(0)
    net = nes.Network(1, 3, 2, 1).double()
    batches = [(torch.randn(4, 1, 8, 8, dtype=torch.double), torch.tensor([0, 1, 2, 0])) for _ in range(2)]
    alpha = torch.randn(2, 14, 7, dtype=torch.double, requires_grad=True)
    mine = nes.second_order_loss(net, *batches, alpha.softmax(-1), 0.5)
    gradient, = torch.autograd.grad(mine, alpha)

    def loss(a):  # the definition, step by step: copy the network, take the inner step, look at the validation loss
        stepped, ((x, y), (x_val, y_val)) = copy.deepcopy(net), batches
        F.cross_entropy(stepped(x, a.detach().softmax(-1)), y).backward()
        with torch.no_grad():
            for p in stepped.parameters():
                p -= 0.5 * p.grad
            return F.cross_entropy(stepped(x_val, a.softmax(-1)), y_val)

    assert mine.item() == pytest.approx(loss(alpha).item())
    first_order, = torch.autograd.grad(F.cross_entropy(net(batches[1][0], alpha.softmax(-1)), batches[1][1]), alpha)
    for index in [(0, 0, 3), (0, 5, 0), (0, 9, 6), (0, 13, 2)]:
        step = torch.zeros_like(alpha)
        step[index] = 1e-5
        difference = ((loss(alpha + step) - loss(alpha - step)) / 2e-5).item()
        assert gradient[index].item() == pytest.approx(difference, rel=1e-3, abs=1e-7)
    assert not torch.allclose(gradient, first_order, rtol=1e-2)


@pytest.mark.parametrize("frozen", ["search_lr", "alpha_lr"])
def test_a_weight_step_leaves_alpha_alone_and_the_reverse(tmp_path, frozen):
    args = nes.parse([*TINY, "--out", str(tmp_path)])
    setattr(args, frozen, 0.0)
    data = nes.load_data("toy", "", 16, seed=0)
    net = nes.build((0, "base"), data, 4, 2)
    before = [p.clone() for p in net.parameters()]
    p, _ = nes.base_search("base", net, data, args)
    start = 1e-3 * torch.randn(2, 14, 7, generator=nes.rng(0, "base"))
    moved = any(not torch.equal(a, b) for a, b in zip(before, net.parameters()))
    assert moved == (frozen == "alpha_lr")
    assert torch.equal(p, start.softmax(-1)) == (frozen == "alpha_lr")


def test_one_round_of_the_search_is_one_sgd_step_on_w_then_one_adam_step_on_alpha(tmp_path):
    args, data = nes.parse([*TINY, "--out", str(tmp_path), "--base-steps", "1"]), nes.load_data("toy", "", 16, seed=0)
    net = nes.build((0, "base"), data, 4, 2)
    mine = copy.deepcopy(net)
    alpha = nn.Parameter(1e-3 * torch.randn(2, 14, 7, generator=nes.rng(0, "base")))
    p, _ = nes.base_search("base", net, data, args)
    (x, y), (x_val, y_val) = (nes.draw_batch(data, split, 16, 0, (0, "base", split)) for split in ("weights", "architecture"))
    F.cross_entropy(mine(x, alpha.detach().softmax(-1)), y).backward()
    nn.utils.clip_grad_norm_(mine.parameters(), 5.0)
    torch.optim.SGD(mine.parameters(), args.search_lr, momentum=0.9, weight_decay=3e-4).step()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(net.parameters(), mine.parameters()))
    alpha.grad, = torch.autograd.grad(F.cross_entropy(mine(x_val, alpha.softmax(-1)), y_val), alpha)
    torch.optim.Adam([alpha], args.alpha_lr, betas=(0.5, 0.999)).step()
    assert torch.allclose(p, alpha.softmax(-1), atol=1e-5)


# ---- 4 JSd and hypernetwork

def test_jensen_shannon():
    p, q = torch.rand(2, 50, 7, dtype=torch.double).softmax(-1)
    entropy = lambda v: torch.special.entr(v).sum(-1)
    jsd = nes.jensen_shannon(p, q)
    assert torch.allclose(jsd, entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2)
    assert torch.allclose(jsd, nes.jensen_shannon(q, p))
    assert (jsd > 0).all() and (jsd < math.log(2)).all()
    assert nes.jensen_shannon(p, p).abs().max() < 1e-12
    one, other = torch.eye(7)[0], torch.eye(7)[1]
    assert nes.jensen_shannon(one, other).item() == pytest.approx(math.log(2))
    m = (p + q) / 2
    wrong = sum((m * (m / v).log()).sum(-1) for v in (p, q)) / 2  # KL(m || p): the wrong direction
    assert not torch.allclose(jsd, wrong, rtol=1e-3)
    logits = torch.tensor([500.0, 0, 0, 0, 0, 0, 0], requires_grad=True)
    nes.jensen_shannon(logits.softmax(-1), one).backward()
    assert logits.grad.isfinite().all()


def test_hypernetwork_is_numpys_interpolation_and_trains_every_pivot():
    hyper = nes.HyperNetwork(torch.zeros(2, 14, 7), pivots=5, lambda_max=4.0)
    nn.init.normal_(hyper.table)
    lam = torch.linspace(0, 4, 33)
    mine = hyper(lam).detach().numpy()
    for edge in [(0, 0, 0), (1, 7, 3), (1, 13, 6)]:
        table = hyper.table.detach().numpy()[(slice(None), *edge)]
        assert numpy.allclose(mine[(slice(None), *edge)], numpy.interp(lam.numpy(), [0, 1, 2, 3, 4], table), atol=1e-5)
    for k in range(5):  # at a pivot, its own table; beside it, nearly the same: no jump
        assert torch.allclose(hyper(float(k)), hyper.table[k], atol=1e-5)
        for near in (k - 1e-4, k + 1e-4):
            assert (hyper(min(max(near, 0.0), 4.0)) - hyper.table[k]).abs().max() < 1e-2
    hyper(lam).square().sum().backward()
    assert all(hyper.table.grad[k].abs().max() > 0 for k in range(5))
    hyper.temperature.fill_(0.5)
    assert torch.allclose(hyper(3.0), 2 * hyper.table[3])


def test_smoothing_keeps_the_base_and_its_genotype():
    p = torch.randn(2, 14, 7, generator=nes.rng("p")).softmax(-1)
    target = nes.smooth(p, 0.1)
    assert torch.allclose(target.sum(-1), torch.ones(2, 14)) and nes.genotype_of(target) == nes.genotype_of(p)
    assert target.max().item() == pytest.approx(0.9 + 0.1 / 7)
    swapped = target.roll(1, dims=-1)
    share = nes.jensen_shannon(target, nes.smooth(swapped, 1e-6)).mean() / nes.largest_divergence(target)
    assert nes.diversity_loss(target, target, 0.25, strength=3.0).item() == pytest.approx(3 * 0.25 ** 2)
    assert 0.5 < share < 1.0
    assert nes.diversity_loss(swapped, target, 2.0, "paper").item() == pytest.approx(-2 * nes.jensen_shannon(target, swapped).mean().item())


# ---- 5 sampling

def test_lambdas_are_spread_and_do_not_depend_on_how_many():
    few, many = nes.sample_lambdas(5, 2.0), nes.sample_lambdas(100, 2.0)
    assert many[:5] == few and few[0] == 0
    gaps = torch.tensor(sorted(many) + [2.0]).diff()
    assert gaps.max() < 3 * 2.0 / 100 and gaps.min() > 0


def test_a_thousand_architectures_in_one_shot():
    base = nes.smooth(torch.randn(2, 14, 7, generator=nes.rng("p")).softmax(-1), 0.1)
    hyper = nes.HyperNetwork(base.log())
    hyper.table.data[1:] += 3 * torch.randn(5, 2, 14, 7, generator=nes.rng("q"))
    start = time.time()
    members = nes.sample(hyper, base, nes.sample_lambdas(1000, 1.0))
    assert time.time() - start < 5
    first, far = members[0], max(members, key=lambda m: m["lambda"])
    assert (first["matched_edges"], first["matched_entries"]) == (28, 16) and first["jsd"] < 1e-6
    p = hyper(far["lambda"]).softmax(-1)
    assert far["genotype"] == nes.genotype_of(p)
    assert far["jsd"] == pytest.approx(nes.jensen_shannon(p, base).mean().item() / math.log(2), rel=1e-4)
    assert far["matched_edges"] == (p.argmax(-1) == base.argmax(-1)).sum().item()


# ---- 6 members

def test_one_shot_scores_do_not_depend_on_what_was_scored_before(tmp_path):
    args, data = nes.parse([*TINY, "--out", str(tmp_path)]), nes.load_data("toy", "", 16, seed=0)
    net = nes.build((0, "base"), data, 4, 2)
    first = nes.one_shot(net, nes.random_genotype(1), data, args)
    other = nes.one_shot(net, nes.random_genotype(2), data, args)
    assert torch.equal(nes.one_shot(net, nes.random_genotype(1), data, args), first) and not torch.allclose(other, first, atol=1e-2)
    assert torch.allclose(first.sum(-1), torch.ones(600), atol=1e-5)
    means = [net.stem[0](nes.draw_batch(data, "weights", 256, step, (0, "recalibration"))[0]).mean((0, 2, 3)) for step in range(20)]
    assert torch.allclose(net.stem[1].running_mean, torch.stack(means).mean(0), atol=1e-5)  # taken anew, a plain average


def test_the_validation_loss_reaches_the_hypernetwork(tmp_path):
    data, net = nes.load_data("toy", "", 16, seed=0), nes.build((0, "base"), nes.load_data("toy", "", 16, seed=0), 4, 2)
    args = nes.parse([*TINY, "--strength", "0", "--hyper-steps", "1", "--out", str(tmp_path)])  # L_val alone
    base = torch.rand(2, 14, 7, generator=nes.rng("b")).softmax(-1)
    hyper, _, _ = nes.train_hypernetwork(net, base, data, args)
    start = nes.smooth(base, args.tau_start).log()
    moved = (hyper.table - start).abs().amax(-1) > 1e-4                                # (K, 2, E)
    kept = torch.tensor([[bool(names) for names in nes.edge_operations(nes.genotype_of(base)[kind])] for kind in nes.KINDS])
    assert 1 <= moved.any(-1).any(-1).sum() <= 2 and moved.any(0).sum() > 0  # the pivots beside one lambda, no other
    assert moved.any(0).sum() <= kept.sum()  # and the edges that the discrete network has, no other


# ---- 7 metrics, 8 response, 9 baselines

def test_metrics_by_hand():
    probs = torch.tensor([[[0.8, 0.2], [0.6, 0.4], [0.3, 0.7]], [[0.4, 0.6], [0.2, 0.8], [0.1, 0.9]]])
    m = nes.ensemble_metrics(probs, torch.tensor([0, 0, 1]))  # p: (0.6, 0.4), (0.4, 0.6), (0.2, 0.8)
    assert m["accuracy"] == pytest.approx(2 / 3)
    assert m["nll"] == pytest.approx(-(math.log(0.6) + math.log(0.4) + math.log(0.8)) / 3)
    assert m["brier"] == pytest.approx((2 * 0.16 + 2 * 0.36 + 2 * 0.04) / 3)
    # 15 bins: confidences 0.6 and 0.6 share a bin with accuracy 1/2; 0.8 has its own with accuracy 1.
    assert m["ece"] == pytest.approx(2 / 3 * 0.1 + 1 / 3 * 0.2, abs=1e-6)
    assert m["oracle_accuracy"] == pytest.approx(1.0) and m["disagreement"] == pytest.approx(2 / 3)
    h = lambda a: -a * math.log(a) - (1 - a) * math.log(1 - a)
    assert m["predictive_jsd"] == pytest.approx((h(.6) + h(.4) + h(.2) - (h(.8) + h(.4) + h(.6) + h(.2) + h(.3) + h(.1)) / 2) / 3)


def test_metric_identities():
    probs, labels = torch.randn(4, 200, 5, dtype=torch.double).softmax(-1), torch.randint(5, (200,))
    ensemble, members = nes.ensemble_metrics(probs, labels), [nes.ensemble_metrics(p[None], labels) for p in probs]
    spread = (probs - probs.mean(0)).square().sum(-1).mean()
    assert sum(m["brier"] for m in members) / 4 - ensemble["brier"] == pytest.approx(spread.item())
    assert sum(m["nll"] for m in members) / 4 >= ensemble["nll"]
    assert 0 <= ensemble["predictive_jsd"] <= math.log(4)
    copies = nes.ensemble_metrics(probs[:1].repeat(3, 1, 1), labels)
    assert copies == pytest.approx(members[0], abs=1e-12) and copies["disagreement"] == 0


def test_lambda_response_of_a_perfect_and_of_a_flat_dial():
    base = nes.smooth(torch.rand(2, 14, 7, generator=nes.rng("b")), 0.1)
    flat = nes.lambda_response(nes.HyperNetwork(base.log()), base, 1.0, count=5)
    assert flat["calibration_error"] == pytest.approx(0.5)  # mean of lambda: every edge is always matched
    assert flat["spearman"] == 0
    for lambda_max, edges in ((1.0, 28), (0.5, 14), (4.0, 28)):  # a share, half of the range, and beyond a share
        hyper = nes.HyperNetwork(base.log(), edges + 1, lambda_max)
        for k in range(edges + 1):  # at pivot k the first k edges have moved
            hyper.table.data[k].view(28, 7)[:k] = base.log().roll(1, dims=-1).view(28, 7)[:k]
        dial = nes.lambda_response(hyper, base, lambda_max, count=edges + 1)
        assert dial["spearman"] == pytest.approx(-1) and dial["calibration_error"] == pytest.approx(0, abs=1e-6)


def test_baselines_are_what_they_say():
    base = nes.random_genotype(1)
    for changes in (0, 3, 16):
        assert nes.matched_entries(nes.perturb(base, changes, 7), base) == 16 - changes
    assert nes.perturb(base, 0, 7) == base and nes.perturb(base, 5, 7) != nes.perturb(base, 5, 8)
    matches = [nes.matched_entries(nes.random_genotype("chance", i), base) for i in range(3000)]
    assert sum(matches) / 3000 == pytest.approx(nes.CHANCE_ENTRIES, abs=0.1)
    labels = torch.tensor([0, 1, 0, 1])
    right, wrong = F.one_hot(labels, 2) * 0.8 + 0.1, F.one_hot(1 - labels, 2) * 0.8 + 0.1
    assert nes.forward_selection(torch.stack([wrong, right, wrong, right * 0.9 + 0.05]), labels, 2) == [1, 3]


def test_report_pairs_the_seeds(tmp_path, capsys):
    for seed, (deep, ours) in enumerate([(0.90, 0.92), (0.80, 0.83), (0.85, 0.86)]):
        methods = {name: {"accuracy": value, "nll": 1 - value} for name, value in (("deep", deep), ("ours", ours))}
        settings = {"seed": seed, "epochs": 1, "out": f"run {seed}"}
        nes.save(tmp_path / str(seed) / "results.json", json.dumps({"methods": methods, "settings": settings}))
    nes.main(["--report", *(str(tmp_path / str(seed)) for seed in range(3))])
    text = capsys.readouterr().out
    assert nes.main(["--report", str(tmp_path / "0")]) == {"report": capsys.readouterr().out.rstrip("\n")}
    assert "| ours | 87.00 +- 4.58 | 0.1300 +- 0.0458 |" in text
    assert "| ours | +2.00 [-0.48, +4.48] | -0.0200 [-0.0448, +0.0048] |" in text  # 4.303 * 1 / sqrt(3) = 2.484
    bad(capsys, ["--report", str(tmp_path / "0"), str(tmp_path / "1"), str(tmp_path / "0")], "different seeds", "run 1")
    nes.save(tmp_path / "3" / "results.json", json.dumps({"methods": methods, "settings": {"seed": 3, "epochs": 2, "out": "run 3"}}))
    bad(capsys, ["--report", str(tmp_path / "0"), str(tmp_path / "3")], "same settings", "run 3")


# ---- 11 the run

@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    return out, run_tiny(out, "--baselines", "all")


def test_a_run_leaves_what_it_promises(finished):
    out, results = finished
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    assert {"cells.png", "lambda_response.png", "ensemble_size.png", "reliability.png", "ledger.csv", "base.pt", "hyper.pt"} <= {p.name for p in out.iterdir()}
    keys = {"": "settings versions seconds base lambda_response distinct members methods one_shot ensemble",
            "versions": "python torch torchvision", "seconds": "base hypernetwork one_shot members",
            "base": "genotype operations", "lambda_response": "points spearman calibration_error",
            "lambda_response points 0": "lambda genotype jsd matched_edges matched_entries",
            "members 0": "lambda genotype jsd matched_edges matched_entries file one_shot test",
            "members 0 test": "accuracy nll brier ece", "members 0 one_shot": "accuracy nll brier ece"}
    keys |= dict.fromkeys(("ensemble", "one_shot"), "accuracy nll brier ece oracle_accuracy disagreement predictive_jsd")
    for path, wanted in keys.items():
        value = results
        for key in path.split():
            value = value[int(key) if key.isdigit() else key]
        assert value.keys() == set(wanted.split()), path
    assert results["settings"]["samples"] == 2
    labels = nes.load_data("toy", "", 16, seed=0).splits["test"][1]
    records = [nes.load(out / member["file"]) for member in results["members"]]
    assert results["ensemble"] == nes.ensemble_metrics(torch.stack([r["test"] for r in records]), labels)
    rows = list(csv.DictReader((out / "ledger.csv").open(newline="")))
    assert [row["method"] for row in rows] == ["ours"] * 2 + ["deep"] * 2 + ["random"] * 2 + ["perturbed"] * 2 + ["nes-rs"] * 4 + ["darts"] * 2
    base, of = results["base"]["genotype"], lambda method: [row for row in rows if row["method"] == method]
    assert all(json.loads(row["genotype"]) == base for row in [*of("deep"), of("darts")[0]]) and of("darts")[1]["genotype"] != json.dumps(base)
    assert ([nes.matched_entries(json.loads(row["genotype"]), base) for row in of("perturbed")]
            == [member["matched_entries"] for member in results["members"]])
    assert [row["genotype"] for row in of("random")] == [row["genotype"] for row in of("nes-rs")][:2]
    for row in rows:
        record = nes.load(out / row["file"])
        assert json.loads(row["genotype"]) == record["genotype"]
        assert float(row["accuracy"]) == (record["test"].argmax(-1) == labels).double().mean().item()
    assert len(list((out / "members").iterdir())) == len({row["file"] for row in rows}) < len(rows)  # shared networks


def test_nes_rs_chooses_on_the_selection_split_and_is_scored_on_test(finished, tmp_path):
    shutil.copytree(finished[0], out := tmp_path / "run")
    labels = {split: y for split, (_, y) in nes.load_data("toy", "", 16, seed=0).splits.items()}
    files = [out / row["file"] for row in csv.DictReader((out / "ledger.csv").open(newline="")) if row["method"] == "nes-rs"]
    pool = torch.stack([nes.load(file)["test"] for file in files])
    best_on_test = nes.forward_selection(pool, labels["test"], 2)
    worst = [i for i in range(4) if i not in best_on_test]
    for i in worst:  # make them look perfect on the selection split
        nes.save(files[i], nes.load(files[i]) | {"selection": F.one_hot(labels["selection"], 6).float()})
    results = run_tiny(out, "--baselines", "nes-rs")
    assert results["methods"]["nes-rs"]["nll"] == pytest.approx(nes.ensemble_metrics(pool[worst], labels["test"])["nll"])
    rows = csv.DictReader((out / "ledger.csv").open(newline=""))
    assert [i for i, row in enumerate(r for r in rows if r["method"] == "nes-rs") if row["chosen"] == "1"] == worst


def test_the_flags_that_no_other_test_gives(tmp_path):
    flags = "--second-order --objective paper --lambda-max 4 --mirror --crop 2 --search-cells 1 --cells 3"
    results = run_tiny(tmp_path, *flags.split())
    assert max(point["lambda"] for point in results["lambda_response"]["points"]) == 4
    assert nes.load(tmp_path / results["members"][1]["file"])["network"][3] == 3
    assert all(row[3] <= 0 for row in nes.load(tmp_path / "hyper.pt")["history"])  # - lambda JSd


def test_a_reloaded_member_predicts_the_same(finished):
    out, results = finished
    images = nes.load_data("toy", "", 16, seed=0).splits["test"][0]
    for member in results["members"]:
        net, data = nes.load_member(out / member["file"])  # and nothing else: neither the data set nor the settings
        probs = net(nes.normalise(data, images)).softmax(dim=-1)
        assert torch.allclose(probs, nes.load(out / member["file"])["test"], atol=1e-5) and data.classes == nes.TOY_CLASSES


def test_a_member_that_cannot_be_loaded(capsys, tmp_path):
    nes.save(tmp_path / "begun.pt", {"step": 7, "net": {}})  # what a kill leaves
    for name, words in (("begun.pt", "not trained to the end"), ("none.pt", "there is no")):
        with pytest.raises(SystemExit):
            nes.load_member(tmp_path / name)
        error = capsys.readouterr().err
        assert name in error and words in error


def test_more_samples_of_a_finished_run_train_only_the_new_ones(finished, monkeypatch, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    trained = []
    monkeypatch.setattr(nes, "log_row", lambda name, *rest: trained.append(name))
    more = run_tiny(tmp_path / "run", "--samples", "4")
    assert set(trained) - {"one shot"} == {Path(m["file"]).stem for m in more["members"][2:]}
    for new, old in zip(more["members"], finished[1]["members"]):
        assert new == old


def test_the_same_seed_gives_the_same_and_another_does_not(finished, tmp_path):
    again, other = run_tiny(tmp_path / "a", "--baselines", "all"), run_tiny(tmp_path / "b", "--seed", "1")
    assert without_times(again) == without_times(finished[1])
    assert other["ensemble"] != again["ensemble"]


def test_killed_at_any_moment_it_goes_on_to_the_same_result(finished, tmp_path):
    command = [sys.executable, nes.__file__, *TINY, "--baselines", "all", "--out", str(tmp_path / "run")]
    found = ""
    for wanted in ("base +4/", "hyper +6/", "base-1 +4/", "network 6 of"):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        for line in process.stdout:
            found += line if "found at" in line else ""
            if re.match(wanted, line):
                break
        else:
            pytest.fail(f"no {wanted} was printed")
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert re.search("^base: found at step [24] of 4", found) and re.search("hyper: found at step [246] of 6", found)
    assert without_times(run_tiny(tmp_path / "run", "--baselines", "all")) == without_times(finished[1])


def test_a_member_stopped_half_way_goes_on_to_the_same_weights(finished, tmp_path, monkeypatch, capsys):
    data, args = nes.load_data("toy", "", 16, seed=0), nes.parse([*TINY, "--out", str(tmp_path)])
    whole = nes.load(finished[0] / finished[1]["members"][0]["file"])

    def save_and_stop(path, state, save=nes.save):
        save(path, state)
        if state["step"] == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(nes, "save", save_and_stop)
        nes.train_member(whole["genotype"], 0, data, args, tmp_path / "m.pt")
    capsys.readouterr()
    again = nes.train_member(whole["genotype"], 0, data, args, tmp_path / "m.pt")
    assert "m: found at step 4\n" in capsys.readouterr().out  # it went on, it did not begin again
    assert again["step"] == whole["step"] > 4 and torch.equal(again["test"], whole["test"])
    assert all(torch.equal(again["net"][name], value) for name, value in whole["net"].items())


def test_killed_between_the_last_step_and_the_scores(finished, tmp_path):
    data, args = nes.load_data("toy", "", 16, seed=0), nes.parse([*TINY, "--out", str(tmp_path)])
    record = nes.load(finished[0] / finished[1]["members"][0]["file"])
    optimizer = torch.optim.AdamW(nes.Network(*record["network"]).parameters())
    scores = {name: record.pop(name) for name in ("selection", "test", "network")}
    nes.save(tmp_path / "m.pt", {**record, "optimizer": optimizer.state_dict()})
    again = nes.train_member(record["genotype"], 0, data, args, tmp_path / "m.pt")
    assert torch.equal(again["test"], scores["test"]) and again["network"] == scores["network"]


def distributed_gradients(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)
    model, x = nn.Linear(5, 3), torch.randn(8, 5)
    model(x[rank::2]).square().mean().backward()
    nes.average_gradients(model.parameters())
    torch.save((model.weight.grad, nes.gather(rank), nes.share(rank)), f"{folder}/{rank}.pt")
    data, args = nes.load_data("toy", "", 16, seed=0), nes.parse([*TINY, "--out", folder])
    net = nes.build((0, "base"), data, 4, 2)
    base, _ = nes.base_search("base", net, data, args)
    hyper, _, _ = nes.train_hypernetwork(net, base, data, args)
    worked = nes.deal_out(5, lambda i: (i, rank))
    torch.save((list(net.parameters()), base, list(hyper.parameters()), worked), f"{folder}/search-{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_gradients_of_one(tmp_path):
    torch.multiprocessing.spawn(distributed_gradients, (str(tmp_path),), nprocs=2)
    torch.manual_seed(0)
    model, x = nn.Linear(5, 3), torch.randn(8, 5)
    model(x).square().mean().backward()
    for rank in range(2):
        gradient, gathered, shared = torch.load(tmp_path / f"{rank}.pt")
        assert torch.allclose(gradient, model.weight.grad) and gathered == [0, 1] and shared == 0
    # Each saw its own half of the batches, and yet both hold the same weights and architectures after the searches.
    (net, base, hyper, worked), other = (torch.load(tmp_path / f"search-{rank}.pt") for rank in range(2))
    assert all(torch.equal(a, b) for a, b in zip([*net, base, *hyper], [*other[0], other[1], *other[2]], strict=True))
    assert worked == other[3] == [(i, i % 2) for i in range(5)]


def test_torchrun_deals_out_the_work(finished, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", nes.__file__, *TINY, "--out", str(tmp_path)]
    log = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
    results = json.loads((tmp_path / "results.json").read_text())
    assert [m["lambda"] for m in results["members"]] == [m["lambda"] for m in finished[1]["members"]]
    for member in results["members"]:  # each was trained once, by one of the two
        last = "{0}/{0} ".format(nes.load(tmp_path / member["file"])["step"])
        assert len(re.findall(f"{Path(member['file']).stem} +{last}", log)) == 1


def bad(capsys, argv, *words):
    with pytest.raises(SystemExit) as stop:
        nes.main(argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("nes.py: error: ") and error.count("\n") == 1  # one sentence
    for word in words:
        assert word in error, error
    return error


@pytest.mark.parametrize("flags, words", [
    (["--nonsense", "1"], ["--nonsense"]), (["--samples", "0"], ["--samples", "0"]), (["--samples", "many"], ["many"]),
    (["--lambda-max", "-1"], ["-1"]), (["--lambda-max", "0"], ["--lambda-max"]), (["--lambda-max", "2"], ["--lambda-max"]),
    (["--tau-start", "0.1"], ["--tau-start", "--tau"]), (["--objective", "other"], ["other"]), (["--baselines", "other"], ["other"]), (["--device", "abacus"], ["abacus"]), (["--device", "cpu:x"], ["cpu:x"]), (["--device", "meta"], ["meta"]),
    (["--dataset", "/no/such/folder"], ["/no/such/folder"]), (["--report", "/no/such/run"], ["/no/such/run", "results.json"])])
def test_bad_flags(flags, words, capsys, tmp_path):
    bad(capsys, ["--out", str(tmp_path), *flags], *words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_where_there_is_none(capsys, tmp_path):
    bad(capsys, [*TINY, "--out", str(tmp_path), "--device", "cuda"], "cuda", "cpu")


def test_bad_folders(capsys, tmp_path):
    write_images(tmp_path / "one", classes=("only",))
    bad(capsys, ["--dataset", str(tmp_path / "one"), "--out", str(tmp_path / "o")], "two or more")
    write_images(tmp_path / "few", count=1)
    bad(capsys, ["--dataset", str(tmp_path / "few"), "--out", str(tmp_path / "o")], "too few")
    write_images(tmp_path / "two")
    out, small = tmp_path / "fine", [*TINY, "--image-size", "16", "--out", str(tmp_path / "fine")]
    nes.main([*small, "--dataset", str(tmp_path / "two")])
    shutil.copy(tmp_path / "two" / "train" / "a" / "0.png", tmp_path / "two" / "train" / "a" / "1.png")
    bad(capsys, [*small, "--dataset", str(tmp_path / "two") + "/"], str(out), "other images")
    (tmp_path / "two" / "train" / "a" / "5.png").write_bytes(b"not a picture")
    bad(capsys, ["--dataset", str(tmp_path / "two"), "--out", str(tmp_path / "o")], "5.png", "remove or replace")


def test_damaged_and_missing_data_files(capsys, tmp_path, monkeypatch):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
        (raw / name).write_bytes(b"\0\0\x08\x03short")
    bad(capsys, ["--data-dir", str(tmp_path), "--out", str(tmp_path / "o")], "FashionMNIST", "delete the damaged files")
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "mirrors", ["http://127.0.0.1:9/"])  # no network
    monkeypatch.setattr(nes, "DEBIAN_FASHION_MNIST", tmp_path / "package")
    bad(capsys, ["--data-dir", str(tmp_path / "new"), "--out", str(tmp_path / "o")], "FashionMNIST", "check the network", "dataset-fashion-mnist")
    (tmp_path / "package").mkdir()  # and now it is installed: found although the download left its folder behind
    for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
        sizes = (60, 28, 28) if "images" in name else (60,)
        content = bytes([0, 0, 8, len(sizes)]) + b"".join(n.to_bytes(4, "big") for n in sizes) + bytes(i % 10 for i in range(math.prod(sizes)))
        (tmp_path / "package" / f"{name}.gz").write_bytes(gzip.compress(content))
    assert (tmp_path / "new" / "FashionMNIST" / "raw").exists()
    assert nes.load_data("fmnist", str(tmp_path / "new"), 32, seed=0).splits["test"][1].tolist() == [i % 10 for i in range(60)]
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", "http://127.0.0.1:9/nothing")
    bad(capsys, ["--dataset", "cifar10", "--data-dir", str(tmp_path), "--out", str(tmp_path / "o2")], "CIFAR10", "check the network")


def test_unwritable_out(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    bad(capsys, [*TINY, "--out", str(tmp_path / "file" / "run")], "--out")


def test_other_settings_damaged_checkpoint_and_nan_lose_nothing(capsys, finished, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    before = {path: path.read_bytes() for path in out.rglob("*.pt")}
    bad(capsys, [*TINY, "--out", str(out), "--hyper-lr", "0.5", "--pivots", "9"], "--hyper-lr 0.06 (now 0.5)", "--pivots 6 (now 9)")
    victim = out / finished[1]["members"][0]["file"]
    victim.write_bytes(before[victim][:1000])
    bad(capsys, [*TINY, "--out", str(out)], victim.name, "delete it")
    assert all(path.read_bytes() == content for path, content in before.items() if path != victim)
    victim.unlink()
    for name in ("base.pt", "hyper.pt", "settings.json"):
        whole = (out / name).read_bytes()
        (out / name).write_bytes(whole[:len(whole) // 2])
        bad(capsys, [*TINY, "--out", str(out)], name, "delete it")
        (out / name).write_bytes(whole)
    assert without_times(run_tiny(out, "--baselines", "all")) == without_times(finished[1])
    error = bad(capsys, [*TINY, "--out", str(tmp_path / "nan"), "--lr", "1e30"], "not a number", "--lr")
    assert "step" in error and (tmp_path / "nan" / "hyper.pt").exists()
    bad(capsys, [*TINY, "--out", str(tmp_path / "nan2"), "--search-lr", "1e30"], "base search", "--alpha-lr", "another --out")


def test_a_run_folder_belongs_to_its_settings_also_for_one_who_calls_the_functions(tmp_path):
    data, args = nes.load_data("toy", "", 16, 0), nes.parse([*TINY, "--out", str(tmp_path)])
    args.device = "cpu"
    net = nes.build((0,), data, 4, 2)
    nes.base_search("base", net, data, args)
    run_tiny(tmp_path)  # the whole program takes this folder as its own: same settings, same images
    args.search_lr = 0.01
    for train in (lambda: nes.base_search("base", net, data, args),
                  lambda: nes.train_members([(nes.random_genotype(0), 0)], data, args)):
        with pytest.raises(SystemExit):
            train()


@pytest.mark.skipif(not (nes.DEBIAN_FASHION_MNIST.exists() or Path("data/FashionMNIST/raw").exists()), reason="no Fashion-MNIST here")
def test_real_fashion_mnist_is_learned(tmp_path):
    here = "data" if Path("data/FashionMNIST/raw").exists() else str(tmp_path)
    data = nes.load_data("fmnist", here, 32, seed=0)
    assert [len(data.splits[name][1]) for name in nes.SHARES] == [27000, 27000, 6000] and data.splits["test"][0].shape == (10000, 1, 28, 28)
    assert data.classes[9] == "Ankle boot" and data.splits["test"][1][:5].tolist() == [9, 2, 1, 1, 6]
    small = data._replace(splits={**data.splits, "train": tuple(t[:6400] for t in data.splits["train"])})
    args = nes.parse(["--channels", "8", "--cells", "2", "--epochs", "1", "--out", str(tmp_path)])
    args.device = "cpu"
    record = nes.train_member(nes.random_genotype(0), 0, small, args, tmp_path / "m.pt")
    accuracy = (record["test"].argmax(-1) == data.splits["test"][1]).double().mean().item()
    assert 0.6 < accuracy < 0.95


TUTORIAL = Path(__file__).with_name("tutorial.ipynb")


def test_the_tutorial_was_saved_as_it_ran():
    notebook = nbformat.read(TUTORIAL, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))   # once, from top to bottom
    outputs = [output for cell in code for output in cell.outputs]
    assert all(output.output_type in ("stream", "display_data") for output in outputs)
    assert sum("image/png" in output.get("data", ()) for output in outputs) >= 20
    assert all(len(cell.source.splitlines()) <= 15 for cell in code) and TUTORIAL.stat().st_size < 3e6


@pytest.fixture(scope="module", autouse=True)
def tutorial(request):
    """The notebook's short version, begun before the other tests: on a second core it is done when they are."""
    if all(item.name != "test_the_tutorial_runs" for item in request.session.items):
        yield None
        return
    os.environ["NES_TUTORIAL_QUICK"] = "1"
    client = NotebookClient(nbformat.read(TUTORIAL, as_version=4), timeout=240, resources={"metadata": {"path": str(TUTORIAL.parent)}})
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(client.execute)


def test_the_tutorial_runs(tutorial):
    notebook = tutorial.result()  # raises what a cell raised
    text = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
    assert "largest difference of the logits" in text and "keys of the results" in text


if __name__ == "__main__":
    nes.set_up(nes.parse(["--device", "cpu"]))
    benchmark()
