"""Tests of nes.py against independent computations.

    pytest test_nes.py         # all tests, without a network
    python test_nes.py         # benchmark: a search step of nes.py against the textbook's, below
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

if __name__ != "__main__":  # the benchmark uses all cores; the tests leave one to the tutorial
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
    return [nn.ReLU(), nn.Conv2d(C, C, taps, stride, dilation * (taps // 2), dilation, groups=C,
                                 bias=False),
            nn.Conv2d(C, C, 1, bias=False), nn.BatchNorm2d(C, affine=False)]

def textbook_op(name, C, stride):
    if "pool" in name:
        layer = (nn.MaxPool2d(3, stride, 1) if "max" in name else
                 nn.AvgPool2d(3, stride, 1, count_include_pad=False))
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
        align = lambda C_in: nn.Sequential(nn.Conv2d(C_in, C, 1, bias=False),
                                           nn.BatchNorm2d(C, affine=False))
        reduced = isinstance(cell.align0, nes.FactorizedReduce)
        self.align0 = TextbookReduce(C_before, C) if reduced else align(C_before)
        self.align1 = align(C_last)
        self.edges = nn.ModuleList(
            nn.ModuleList(textbook_op(name, C, 2 if cell.reduction and source < 2 else 1)
                          for name in nes.NAMES)
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
    """The same function as a nes.Network without an architecture, and the same weights."""

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
    """Seconds of a weight and an architecture step, nes.py and the textbook in turn; the ratio."""
    torch.manual_seed(0)
    textbook = TextbookNetwork(1, 10, C, cells)
    network = textbook.model[0].to(memory_format=torch.channels_last)
    x, y = torch.randn(batch, 1, size, size), torch.randint(10, (batch,))
    alpha = torch.zeros(2, 14, 7, requires_grad=True)
    x_last = x.contiguous(memory_format=torch.channels_last)

    def textbook_steps():
        for _ in range(2):
            loss = F.cross_entropy(textbook(x, alpha.softmax(-1)), y)
            torch.autograd.grad(loss, [alpha, *textbook.parameters()])

    def nes_steps():
        arch = alpha.softmax(-1)
        F.cross_entropy(network(x_last, arch.detach()), y).backward()
        network.requires_grad_(False)
        torch.autograd.grad(F.cross_entropy(network(x_last, arch), y), alpha)
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
            print("textbook {:.2f} s, nes.py {:.2f} s, ratio {:.2f}".format(*seconds, ratios[-1]))
    print(f"median ratio {sorted(ratios)[len(ratios) // 2]:.2f}, {torch.get_num_threads()} threads,"
          f" torch {torch.__version__}")

# ---- a small run, and helpers

TINY = ("--dataset toy --samples 2 --one-shots 3 --base-steps 4 --hyper-steps 12 --hyper-lr 0.5 "
        "--epochs 1 --shared-epochs 1 --channels 4 --search-channels 4 --log-every 2 --batch 256 "
        "--search-batch 16 --device cpu --workers 1").split()

nes.POOL = 6  # samples of which "chosen" chooses: enough here

def run_tiny(out, *flags):
    return nes.main([*TINY, "--out", str(out), *flags])

def tiny_settings(out, *flags):
    args = nes.parse([*TINY, "--out", str(out), *flags])
    return nes.load_data("toy", "", 16, args.seed, "cpu", args.crop, args.mirror), args

def without_times(results):
    """What must be the same in two runs: everything but the clock and the folder's name."""
    results = json.loads(json.dumps(results))
    results.pop("seconds")
    for name in ("out", "data_dir", "device", "log_every", "workers"):
        results["settings"].pop(name)
    for method in results["methods"].values():
        method.pop("search_seconds"), method.pop("training_seconds")
    return results

def soft(*key):
    """A soft architecture (2, 14, 7) that depends on key alone."""
    return torch.randn(2, 14, 7, generator=nes.rng(*key)).softmax(-1)

def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))

# ---- 3 data

def test_splits_are_disjoint_and_complete():
    data = nes.load_data("toy", seed=3)
    rows = {name: {bytes(x.flatten().tolist()) for x in images}
            for name, (images, _) in data.splits.items()}
    assert [len(rows[name]) for name in ("train", "validation", "selection", "test")] == [
        1080, 1080, 240, 600]
    assert len(set.union(*rows.values())) == 3000
    assert rows["both"] == rows["train"] | rows["validation"]
    other = nes.load_data("toy", seed=4)
    assert not torch.equal(data.splits["train"][0], other.splits["train"][0])

def numbered_data(count, **settings):
    """Images whose label is their number."""
    images = torch.arange(count * 5 * 5).remainder(256).byte().view(count, 1, 5, 5)
    return nes.Data({"both": (images, torch.arange(count))}, ["a"], torch.zeros(1, 1, 1),
                    torch.ones(1, 1, 1), (1, 5, 5), **settings)

def test_batches_go_through_the_split_once_an_epoch_in_an_order_of_its_own():
    data = numbered_data(8)
    epochs = []
    for epoch in range(3):
        batches = [data.batch("both", 2, 4 * epoch + i, ("k",)) for i in range(4)]
        epochs.append(torch.cat([y for _, y in batches]).tolist())
        assert sorted(epochs[-1]) == list(range(8))
        for x, y in batches:
            assert torch.allclose(x * 255, data.splits["both"][0][y].float())
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]

def test_training_images_are_shifted_and_mirrored_and_others_are_not():
    data, seen = numbered_data(6, crop=1, mirror=True), set()
    images = data.splits["both"][0]
    for step in range(90):
        x, y = data.batch("both", 1, step, ("k",))
        padded = F.pad(images[y].float(), (1, 1, 1, 1), mode="replicate")
        windows = {(r, c, m): padded[..., r:r + 5, c:c + 5].flip([3] * m)
                   for r in range(3) for c in range(3) for m in range(2)}
        match = {key for key, window in windows.items() if torch.equal(window, (x * 255).round())}
        assert match
        seen |= match
        x, y = data.batch("both", 1, step, ("k",), augment=False)
        assert torch.allclose(x * 255, images[y].float())
    assert len(seen) == 18

def test_two_shares_of_a_batch_are_the_batch():
    data = nes.load_data("toy", crop=1, mirror=True)
    x, y = data.batch("train", 8, 5, ("k",))
    for r in range(2):
        part_x, part_y = data.batch("train", 8, 5, ("k",), slice(r, None, 2))
        assert torch.equal(part_x, x[r::2]) and torch.equal(part_y, y[r::2])

def write_images(root, classes=("a", "b"), colour=True, count=12):
    generator = torch.Generator().manual_seed(0)
    for part in ("train", "test"):
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(256, (3 if colour else 1, 9, 12), dtype=torch.uint8,
                                       generator=generator)
                picture = torchvision.transforms.functional.to_pil_image(pixels)
                picture.save(root / part / name / f"{i}.png")

@pytest.mark.parametrize("colour", [True, False])
def test_a_folder_of_images(tmp_path, colour):
    write_images(tmp_path, colour=colour)
    data = nes.load_data(str(tmp_path), "", 10)
    assert data.classes == ["a", "b"] and data.shape == (3 if colour else 1, 10, 10)
    assert data.splits["test"][1].tolist() == [0] * 12 + [1] * 12
    path = tmp_path / "test" / "b" / "0.png"  # and one by itself is what the folder's reader gave
    assert torch.equal(nes.read_image(path, data.shape), data.splits["test"][0][12])

def test_cifar10_is_read_from_its_files(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = torch.randint(256, (4, 3072), dtype=torch.uint8).numpy()
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch", "batches.meta"]
    for i, name in enumerate(names):
        (folder / name).write_bytes(pickle.dumps({
            "data": pixels + i, "labels": [0, 1, 2, 3], "label_names": list("abcdefghij")}))
    sums = {name: hashlib.md5((folder / name).read_bytes()).hexdigest() for name in names}
    cifar = torchvision.datasets.CIFAR10
    monkeypatch.setattr(cifar, "train_list", [[name, sums[name]] for name in names[:5]])
    monkeypatch.setattr(cifar, "test_list", [[names[5], sums[names[5]]]])
    monkeypatch.setattr(cifar, "meta", {**cifar.meta, "md5": sums["batches.meta"]})
    data = nes.load_data("cifar10", str(tmp_path))
    assert sum(len(data.splits[name][1]) for name in nes.SHARES) == 20
    assert torch.equal(data.splits["test"][0], torch.from_numpy(pixels + 5).view(4, 3, 32, 32))

# ---- 4 architectures, 5 cell and network, 15 kernels

def test_discretise_on_a_worked_example():
    p = torch.full((2, 14, 7), 0.01)
    p[:, :, 2] = 0.1                                   # everywhere a weak skip_connect
    p[0, 1, 3], p[0, 0, 0] = 0.5, 0.4                  # node 0: both its edges
    p[0, 2, 4], p[0, 3, 1], p[0, 4, 6] = 0.3, 0.6, 0.5  # node 1: sources 1 and 2
    arch = nes.discretise(p)
    assert arch.sum() == 16 and set(arch.unique().tolist()) == {0, 1}
    cells = nes.genotype(arch)
    assert cells["normal"] == [
        ["max_pool_3x3", 0], ["sep_conv_3x3", 1], ["avg_pool_3x3", 1], ["dil_conv_5x5", 2],
        ["skip_connect", 0], ["skip_connect", 1], ["skip_connect", 0], ["skip_connect", 1]]
    assert cells["reduction"] == [["skip_connect", 0], ["skip_connect", 1]] * 4
    assert nes.count_operations(arch)["skip_connect"] == 12
    assert json.loads(json.dumps(cells)) == cells
    assert torch.equal(nes.discretise(arch), arch)
    many = torch.stack([soft(i) for i in range(6)]).view(2, 3, 2, 14, 7)
    assert torch.equal(nes.discretise(many)[1, 2], nes.discretise(soft(5)))

@pytest.mark.parametrize("taps, stride, dilation", [
    (3, 1, 1), (3, 2, 1), (5, 1, 1), (5, 2, 1), (3, 1, 2), (3, 2, 2), (5, 1, 2), (5, 2, 2)])
@pytest.mark.parametrize("size", [8, 7])
def test_depthwise_gradients_are_those_of_pytorch(taps, stride, dilation, size):
    x = torch.randn(3, 4, size, size, dtype=torch.double, requires_grad=True)
    conv = nes.DepthwiseConv(4, taps, stride, dilation).double()
    mine = conv(x)
    theirs = F.conv2d(x, conv.weight, None, stride, dilation * (taps // 2), dilation, 4)
    g = torch.randn_like(mine)
    assert torch.allclose(mine, theirs)
    for a, b in zip(torch.autograd.grad(mine, [x, conv.weight], g),
                    torch.autograd.grad(theirs, [x, conv.weight], g)):
        assert torch.allclose(a, b)
    function = lambda x, w: nes.DepthwiseGradients.apply(x, w, stride, dilation)
    assert torch.autograd.gradgradcheck(function, (x[:1, :, :5, :5], conv.weight[:4]))

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
    few = torch.tensor([0, 1, 0, 0, 0, 0, 2], dtype=torch.double)
    mixed.ops["max_pool_3x3"].forward = lambda x: pytest.fail("an operation of weight 0 was run")
    assert torch.allclose(mixed(x, few), expected[1] + 2 * expected[6])

@pytest.mark.parametrize("size", [16, 13])
def test_supernet_and_its_gradients_are_the_textbooks(size):
    torch.manual_seed(0)
    textbook = TextbookNetwork(2, 3, 4, 3).double()
    network = textbook.model[0].double().to(memory_format=torch.channels_last)
    x = torch.randn(3, 2, size, size, dtype=torch.double)
    arch = torch.rand(2, 14, 7, dtype=torch.double, requires_grad=True)
    mine, theirs = network(x, arch), textbook(x, arch)
    assert torch.allclose(mine, theirs)
    mine = torch.autograd.grad(mine.square().sum(), [arch, *network.cells.parameters()])
    theirs = torch.autograd.grad(theirs.square().sum(), [arch, *textbook.cells.parameters()])
    assert all(torch.allclose(a, b) for a, b in zip(mine, theirs, strict=True))

def test_a_finished_network_is_the_supernet_with_its_architecture_also_in_eval_mode():
    arch = nes.random_architecture(5)
    supernet, finished = nes.Network(1, 4, 4, 3), nes.Network(1, 4, 4, 3, arch)
    missing = finished.load_state_dict(supernet.state_dict(), strict=False).missing_keys
    assert missing and all(key.endswith(("weight", "bias")) for key in missing)  # scale 1, shift 0
    x = torch.randn(5, 1, 16, 16)
    for _ in range(2):
        expected = supernet(x, arch)
        assert torch.allclose(finished(x), expected, atol=1e-5)
        assert not torch.allclose(supernet(x, nes.random_architecture(6)), expected, atol=1e-2)
        supernet.load_state_dict(finished.state_dict(), strict=False)  # running statistics
        supernet.eval(), finished.eval()

# ---- 6 the base search

def test_second_order_gradient_against_finite_differences():
    torch.manual_seed(0)
    net = nes.Network(1, 3, 2, 1).double()
    batches = [(torch.randn(4, 1, 8, 8, dtype=torch.double), torch.tensor([0, 1, 2, 0]))
               for _ in range(2)]
    alpha = torch.randn(2, 14, 7, dtype=torch.double, requires_grad=True)
    mine = nes.second_order_loss(net, *batches, alpha.softmax(-1), 0.5)
    gradient, = torch.autograd.grad(mine, alpha)

    def loss(a):  # the definition: copy the network, take the inner step, see the validation loss
        stepped, ((x, y), (x_val, y_val)) = copy.deepcopy(net), batches
        F.cross_entropy(stepped(x, a.detach().softmax(-1)), y).backward()
        with torch.no_grad():
            for p in stepped.parameters():
                p -= 0.5 * p.grad
            return F.cross_entropy(stepped(x_val, a.softmax(-1)), y_val)

    assert mine.item() == pytest.approx(loss(alpha).item())
    x, y = batches[1]
    first_order, = torch.autograd.grad(F.cross_entropy(net(x, alpha.softmax(-1)), y), alpha)
    for index in [(0, 0, 3), (0, 5, 0), (0, 9, 6), (0, 13, 2)]:
        step = torch.zeros_like(alpha)
        step[index] = 1e-5
        difference = ((loss(alpha + step) - loss(alpha - step)) / 2e-5).item()
        assert gradient[index].item() == pytest.approx(difference, rel=1e-3, abs=1e-7)
    assert not torch.allclose(gradient, first_order, rtol=1e-2)

def test_one_round_is_one_sgd_step_on_w_then_one_adam_step_on_alpha(tmp_path):
    data, args = tiny_settings(tmp_path, "--base-steps", "1")
    net = nes.build((0, "base"), data, 4, 2)
    mine = copy.deepcopy(net)
    alpha = nn.Parameter(1e-3 * torch.randn(2, 14, 7, generator=nes.rng(0, "base")))
    p = nes.base_search("base", net, data, args)
    (x, y), (x_val, y_val) = (data.batch(split, 16, 0, (0, "base", split))
                              for split in ("train", "validation"))
    F.cross_entropy(mine(x, alpha.detach().softmax(-1)), y).backward()
    nn.utils.clip_grad_norm_(mine.parameters(), 5.0)
    torch.optim.SGD(mine.parameters(), args.search_lr, momentum=0.9, weight_decay=3e-4).step()
    for a, b in zip(net.parameters(), mine.parameters()):
        assert torch.allclose(a, b, atol=1e-6)
    loss = F.cross_entropy(mine(x_val, alpha.softmax(-1)), y_val)
    alpha.grad, = torch.autograd.grad(loss, alpha)
    torch.optim.Adam([alpha], args.alpha_lr, betas=(0.5, 0.999)).step()
    assert torch.allclose(p, alpha.softmax(-1), atol=1e-5)

@pytest.mark.parametrize("second_order", [False, True])
def test_a_weight_step_leaves_alpha_alone_and_the_reverse(second_order):
    data, moved = nes.load_data("toy"), {}
    batches = [data.batch(split, 16, 0, ("k",)) for split in ("train", "validation")]
    for frozen in ("w", "alpha"):
        net, alpha = nes.build((0,), data, 4, 2), nn.Parameter(torch.zeros(2, 14, 7))
        before = copy.deepcopy(net)
        optimizers = [torch.optim.SGD(net.parameters(), 0.1 * (frozen != "w")),
                      torch.optim.SGD([alpha], 0.1 * (frozen != "alpha"))]
        nes.search_step(net, alpha.softmax(-1), 0.0, *batches, *optimizers, second_order)
        moved[frozen] = [not all(torch.equal(a, b) for a, b in zip(
            net.parameters(), before.parameters())), bool(alpha.any())]
    assert moved == {"w": [False, True], "alpha": [True, False]}

# ---- 7 JSd and hypernetwork

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

def test_the_diversity_term_is_the_jsd_of_the_finished_architecture():
    base, seen = nes.discretise(soft("base")), set()
    base_cells = nes.genotype(base)
    for i in range(40):  # from the base itself to one that shares next to nothing
        p = (soft("other", i).log() + (5 - i / 6) * base).softmax(-1)
        arch, cells = nes.discretise(p), nes.genotype(nes.discretise(p))
        kept = sum(cells[kind][2 * node:2 * node + 2].count(entry) for kind in nes.KINDS
                   for node in range(4) for entry in base_cells[kind][2 * node:2 * node + 2])
        share = nes.differing_share(arch, p, base).item()
        assert share == pytest.approx(1 - kept / 16, abs=1e-6)
        assert nes.divergence(arch, base).item() == pytest.approx(math.log(2) * share, abs=1e-6)
        assert nes.matched_entries(arch, base) == kept
        loss = nes.diversity_loss(arch, p, base, 0.25, 3.0)
        assert loss.item() == pytest.approx(3 * (share - 0.25) ** 2, abs=1e-5)
        seen.add(kept)
    assert {0, 16} < seen | {0} and len(seen) > 8
    many = torch.stack([nes.discretise(soft(i)) for i in range(5)])
    assert torch.allclose(nes.divergence(many, base),
                          torch.stack([nes.divergence(arch, base) for arch in many]))

def test_the_diversity_term_pushes_every_entry_of_the_base():
    p, base = soft("p").requires_grad_(), nes.discretise(soft("base"))
    gradient, = torch.autograd.grad(nes.differing_share(nes.discretise(p), p, base), p)
    assert torch.allclose(gradient, -base / 16)  # chosen or not: what the product form would miss
    assert (base * nes.discretise(p)).sum() < 16

def test_hypernetwork_is_numpys_interpolation_and_trains_every_pivot():
    hyper = nes.HyperNetwork(torch.zeros(2, 14, 7), pivots=5, lambda_max=4.0)
    nn.init.normal_(hyper.table)
    lam = torch.linspace(0, 4, 33)
    mine = hyper(lam).detach().numpy()
    for edge in [(0, 0, 0), (1, 7, 3), (1, 13, 6)]:
        table = hyper.table.detach().numpy()[(slice(None), *edge)]
        expected = numpy.interp(lam.numpy(), [0, 1, 2, 3, 4], table)
        assert numpy.allclose(mine[(slice(None), *edge)], expected, atol=1e-5)
    for k in range(5):  # at a pivot, its own table; beside it, nearly the same: no jump
        assert torch.allclose(hyper(float(k)), hyper.table[k], atol=1e-5)
        for near in (k - 1e-4, k + 1e-4):
            assert (hyper(min(max(near, 0.0), 4.0)) - hyper.table[k]).abs().max() < 1e-2
    hyper(lam).square().sum().backward()
    assert all(hyper.table.grad[k].abs().max() > 0 for k in range(5))

def test_smoothing_keeps_the_base_and_the_papers_term_is_minus_lambda_jsd():
    p = soft("p")
    smoothed = nes.smooth(p, 0.1)
    assert torch.allclose(smoothed.sum(-1), torch.ones(2, 14))
    assert torch.equal(nes.discretise(smoothed), nes.discretise(p))
    assert smoothed.max().item() == pytest.approx(0.9 + 0.1 / 7)
    swapped = smoothed.roll(1, dims=-1)
    jsd = nes.jensen_shannon(smoothed, swapped).mean().item()
    assert nes.paper_diversity_loss(swapped, smoothed, 2.0).item() == pytest.approx(-2 * jsd)

def test_training_lambdas_and_noise():
    generator = nes.rng("lambda")
    lams = torch.tensor([nes.draw_lambda(2.0, generator) for _ in range(4000)])
    assert lams.min() == 0 and lams.max() == 2 and lams.mean().item() == pytest.approx(1, abs=0.05)
    assert (lams == 0).double().mean().item() == pytest.approx(1 / 12, abs=0.02)  # the overshoot
    logits = torch.tensor([2.0, 1.0, 0.0]).repeat(20000, 1)
    drawn = nes.draw_probabilities(logits, 1.0, nes.rng("noise")).argmax(-1).bincount() / 20000
    assert torch.allclose(drawn, logits[0].softmax(-1), atol=0.02)  # the Gumbel trick
    assert torch.allclose(nes.draw_probabilities(logits, 0.0, generator), logits.softmax(-1))

def test_the_validation_loss_reaches_the_hypernetwork(tmp_path):
    data, args = tiny_settings(tmp_path, "--strength", "0", "--hyper-steps", "1")  # L_val alone
    net, base_p = nes.build((0, "base"), data, 4, 2), soft("b")
    hyper = nes.train_hypernetwork(net, base_p, data, args)
    moved = (hyper.table - nes.smooth(base_p, args.tau).log()).abs().amax(-1) > 1e-4     # (K, 2, E)
    assert 1 <= moved.any(-1).any(-1).sum() <= 2  # the pivots beside one lambda, no other
    assert 0 < moved.any(0).sum() <= 16  # and the edges that the finished architecture has

# ---- 8 sampling and the dial

def test_lambdas_are_spread_and_do_not_depend_on_how_many():
    few, many = nes.sample_lambdas(5, 2.0), nes.sample_lambdas(100, 2.0)
    assert many[:5] == few and few[0] == 0
    gaps = torch.tensor(sorted(many) + [2.0]).diff()
    assert gaps.max() < 3 * 2.0 / 100 and gaps.min() > 0

def test_a_thousand_architectures_in_one_shot():
    base_p = nes.smooth(soft("p"), 0.1)
    hyper = nes.HyperNetwork(base_p.log())
    hyper.table.data[1:] += 3 * torch.randn(5, 2, 14, 7, generator=nes.rng("q"))
    start, lambdas = time.time(), nes.sample_lambdas(1000)
    archs, members = nes.sample(hyper, lambdas), nes.describe(hyper, base_p, lambdas)
    assert time.time() - start < 5
    first, far = members[0], max(range(1000), key=lambda i: lambdas[i])
    assert (first["matched_edges"], first["matched_entries"], first["jsd"]) == (28, 16, 0)
    p = hyper(lambdas[far]).softmax(-1)
    assert torch.equal(archs[far], nes.discretise(p))
    assert members[far]["genotype"] == nes.genotype(archs[far])
    assert members[far]["matched_edges"] == (p.argmax(-1) == base_p.argmax(-1)).sum().item()
    assert members[far]["jsd"] == pytest.approx(1 - members[far]["matched_entries"] / 16, abs=1e-6)

def test_lambda_response_of_a_perfect_and_of_a_flat_dial():
    base_p = nes.smooth(soft("b"), 0.1)
    kept = nes.discretise(base_p).sum(-1).flatten().nonzero().flatten()
    flat = nes.lambda_response(nes.HyperNetwork(base_p.log()), base_p, 1.0, count=5)
    assert flat["calibration_error"] == pytest.approx(0.5) and flat["spearman"] == 0
    for lambda_max, entries in ((1.0, 16), (0.5, 8), (4.0, 16)):  # a share, half of it, and beyond
        hyper = nes.HyperNetwork(base_p.log(), entries + 1, lambda_max)
        for k in range(entries + 1):  # at pivot k the first k entries have another operation
            flipped = hyper.table.data[k].view(28, 7)
            flipped[kept[:k]] = flipped[kept[:k]].roll(1, dims=-1)
        dial = nes.lambda_response(hyper, base_p, lambda_max, count=entries + 1)
        assert dial["spearman"] == pytest.approx(-1)
        assert dial["calibration_error"] == pytest.approx(0, abs=1e-6)

# ---- 9 members, 10 one shot

def test_members_learn_from_all_training_images_in_every_epoch(tmp_path, monkeypatch):
    data, args = tiny_settings(tmp_path, "--epochs", "2", "--batch", "240")
    seen, batch = [], nes.Data.batch

    def spy(self, *arguments, **rest):
        x, y = batch(self, *arguments, **rest)
        seen.append((x * self.std + self.mean).mul(255).round().byte())
        return x, y

    monkeypatch.setattr(nes.Data, "batch", spy)
    arch = nes.random_architecture(1)
    nes.train_member(arch, 0, data, args)
    epochs = torch.cat(seen).view(2, 2160, 256)
    wanted = sorted(map(bytes, data.splits["both"][0].view(2160, 256).numpy()))
    for epoch in epochs:
        assert sorted(map(bytes, epoch.numpy())) == wanted
    assert not torch.equal(*epochs)

def test_one_shot_scores_do_not_depend_on_what_was_scored_before():
    data = nes.load_data("toy")
    shared = nes.build((0,), data, 4, 2)
    batches = [data.batch("train", 256, step, ("recalibration",))[0] for step in range(8)]
    archs = [nes.random_architecture(i) for i in range(2)]
    first, other, again = (nes.one_shot(shared, archs[i], batches) for i in (0, 1, 0))
    probs = [nes.predict(net, data.splits["test"][0], data) for net in (first, other, again)]
    assert torch.equal(probs[0], probs[2]) and not torch.allclose(probs[0], probs[1], atol=1e-2)
    shared.train()
    with torch.no_grad():  # taken anew, a plain average
        means = torch.stack([shared.stem[0](x).mean((0, 2, 3)) for x in batches]).mean(0)
        assert torch.allclose(first.stem[1].running_mean, means, atol=1e-5)
        assert torch.allclose(first.train()(batches[0]), shared(batches[0], archs[0]), atol=1e-4)

def test_shared_weights_learn_one_sampled_architecture_a_step(tmp_path):
    data, args = tiny_settings(tmp_path)
    net, base_p = nes.build((0, "base"), data, 4, 2), soft("b")
    hyper = nes.train_hypernetwork(net, base_p, data, args)
    run, forward = [], nes.Network.forward

    def spy(self, x, arch=None):
        run.append(arch)
        return forward(self, x, arch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nes.Network, "forward", spy)
        nes.train_shared(data, args)
    grid = torch.linspace(0, 1, 2001).tolist()
    on_dial = {nes.fingerprint(arch) for arch in nes.sample(hyper, grid)}
    assert len(run) == 8 and {nes.fingerprint(arch) for arch in run} <= on_dial
    shared = nes.shared_network(data, args)
    assert shared.config[2] == args.channels and nes.is_finished(tmp_path / "shared.pt")
    args.shared_epochs = 0
    assert same_weights(nes.shared_network(data, args), net)

# ---- 11 metrics, 12 other searches

def test_metrics_by_hand():
    probs = torch.tensor([[[0.8, 0.2], [0.6, 0.4], [0.3, 0.7]],
                          [[0.4, 0.6], [0.2, 0.8], [0.1, 0.9]]])  # (.6, .4), (.4, .6), (.2, .8)
    m = nes.ensemble_metrics(probs, torch.tensor([0, 0, 1]))
    assert m["accuracy"] == pytest.approx(2 / 3)
    assert m["nll"] == pytest.approx(-(math.log(0.6) + math.log(0.4) + math.log(0.8)) / 3)
    assert m["brier"] == pytest.approx((2 * 0.16 + 2 * 0.36 + 2 * 0.04) / 3)
    # 15 bins: confidences 0.6 and 0.6 share a bin with accuracy 1/2; 0.8 has its own, accuracy 1.
    assert m["ece"] == pytest.approx(2 / 3 * 0.1 + 1 / 3 * 0.2, abs=1e-6)
    assert m["oracle_accuracy"] == pytest.approx(1.0)
    assert m["disagreement"] == pytest.approx(2 / 3)
    h = lambda a: -a * math.log(a) - (1 - a) * math.log(1 - a)
    alone = (h(.8) + h(.4) + h(.6) + h(.2) + h(.3) + h(.1)) / 2
    assert m["predictive_jsd"] == pytest.approx((h(.6) + h(.4) + h(.2) - alone) / 3)

def test_metric_identities():
    probs = torch.randn(4, 200, 5, dtype=torch.double).softmax(-1)
    labels = torch.randint(5, (200,))
    ensemble = nes.ensemble_metrics(probs, labels)
    members = [nes.ensemble_metrics(p[None], labels) for p in probs]
    spread = (probs - probs.mean(0)).square().sum(-1).mean()
    brier = sum(m["brier"] for m in members) / 4
    assert brier - ensemble["brier"] == pytest.approx(spread.item())
    assert sum(m["nll"] for m in members) / 4 >= ensemble["nll"]
    assert 0 <= ensemble["predictive_jsd"] <= math.log(4)
    copies = nes.ensemble_metrics(probs[:1].repeat(3, 1, 1), labels)
    assert copies == pytest.approx(members[0], abs=1e-12) and copies["disagreement"] == 0
    assert nes.member_metrics(probs[0], labels) == {
        key: members[0][key] for key in ("accuracy", "nll", "brier", "ece")}

def inputs(arch):
    return arch.sum(-1)

def test_perturbed_changes_as_many_inputs_and_operations_as_the_member_has():
    base, moved = nes.random_architecture("base"), []
    for i in range(40):
        member = nes.discretise((soft("member", i).log() + (4 - i / 10) * base).softmax(-1))
        arch = nes.perturb(base, member, "key", i)
        assert torch.equal(nes.discretise(arch), arch)  # a finished architecture: two inputs a node
        assert nes.matched_entries(arch, base) == nes.matched_entries(member, base)
        assert (inputs(arch) * inputs(base)).sum() == (inputs(member) * inputs(base)).sum()
        moved.append(16 - int((inputs(arch) * inputs(base)).sum()))
    assert min(moved) < 2 and max(moved) > 5
    assert torch.equal(nes.perturb(base, base, 7), base)
    assert not torch.equal(nes.perturb(base, member, 7), nes.perturb(base, member, 8))

def test_chance_and_forward_selection():
    base = nes.random_architecture(1)
    archs = torch.stack([nes.random_architecture("chance", i) for i in range(3000)])
    matches = nes.matched_entries(archs, base).double()
    assert matches.mean().item() == pytest.approx(nes.CHANCE_ENTRIES, abs=0.1)
    labels = torch.tensor([0, 1, 0, 1])
    right, wrong = F.one_hot(labels, 2) * 0.8 + 0.1, F.one_hot(1 - labels, 2) * 0.8 + 0.1
    pool = torch.stack([wrong, right, wrong, right * 0.9 + 0.05])
    assert nes.forward_selection(pool, labels, 2) == [1, 3]

def test_report_pairs_the_seeds(tmp_path, capsys):
    scores = [(0.90, 0.92), (0.80, 0.83), (0.85, 0.86)]
    for seed, pair in enumerate(scores):
        methods = {name: dict.fromkeys(nes.COLUMNS, 0) | {"accuracy": value, "nll": 1 - value}
                   for name, value in zip(("deep", "ours"), pair)}
        settings = {"seed": seed, "epochs": 1, "out": f"run {seed}"}
        nes.save(tmp_path / f"{seed}" / "results.json", json.dumps(
            {"methods": methods, "settings": settings}))
    runs = [str(tmp_path / f"{seed}") for seed in range(3)]
    text = nes.main(["--report", *runs])["report"]
    assert capsys.readouterr().out == text + "\n"
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert ["ours", "87.00 +- 4.58", "0.1300 +- 0.0458"] in [row[:3] for row in cells]
    # 4.303 * 1 / sqrt(3) = 2.484
    assert ["ours", "+2.00 [-0.48, +4.48]", "-0.0200 [-0.0448, +0.0048]"] in cells
    bad(capsys, ["--report", runs[0], runs[1], runs[0]], "different seeds", "run 1")
    nes.save(tmp_path / "3" / "results.json", json.dumps(
        {"methods": methods, "settings": {"seed": 3, "epochs": 2, "out": "run 3"}}))
    bad(capsys, ["--report", runs[0], str(tmp_path / "3")], "same settings", "run 3")

# ---- 14 the run

@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    return out, run_tiny(out, "--baselines", "all")

def test_a_run_leaves_what_it_promises(finished):
    out, results = finished
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    assert {"cells.png", "lambda_response.png", "ensemble_size.png", "reliability.png",
            "ledger.csv", "base.pt", "hyper.pt", "shared.pt"} <= {p.name for p in out.iterdir()}
    metrics = "accuracy nll brier ece oracle_accuracy disagreement predictive_jsd"
    keys = {"": "settings versions seconds base lambda_response distinct members methods one_shot "
                "one_shots ensemble",
            "versions": "python torch torchvision", "seconds": "base hypernetwork one_shot members",
            "base": "genotype operations", "lambda_response": "points spearman calibration_error",
            "lambda_response points 0": "lambda genotype jsd matched_edges matched_entries",
            "members 0": "lambda genotype jsd matched_edges matched_entries file one_shot test",
            "members 0 test": "accuracy nll brier ece",
            "members 0 one_shot": "accuracy nll brier ece",
            "ensemble": metrics, "one_shot": metrics, "one_shots": f"{metrics} files"}
    for path, wanted in keys.items():
        value = results
        for key in path.split():
            value = value[int(key) if key.isdigit() else key]
        assert value.keys() == set(wanted.split()), path
    labels = nes.load_data("toy").splits["test"][1]
    records = [nes.load(out / member["file"]) for member in results["members"]]
    probs = torch.stack([record["test"] for record in records])
    assert results["ensemble"] == nes.ensemble_metrics(probs, labels)
    shots = torch.stack([nes.load(out / file)["test"] for file in results["one_shots"]["files"]])
    assert results["one_shots"]["nll"] == nes.ensemble_metrics(shots, labels)["nll"]
    assert len(shots) == 3

def test_the_ledger_has_a_row_for_each_network_and_each_ensemble(finished):
    out, results = finished
    rows = list(csv.DictReader((out / "ledger.csv").open(newline="")))
    of = lambda method: [r for r in rows if r["method"] == method and r["index"] != "ensemble"]
    counts = {"ours": 2, "chosen": 2, "deep": 2, "random": 2, "perturbed": 2, "nes-rs": 4,
              "darts": 2, "single": 1, "ours, one-shot": 2, "one-shot of 3": 3}
    assert {method: len(of(method)) for method in results["methods"]} == counts
    base = results["base"]["genotype"]
    assert all(json.loads(row["genotype"]) == base for row in [*of("deep"), of("darts")[0]])
    assert json.loads(of("darts")[1]["genotype"]) != base
    column = lambda method, key: [row[key] for row in of(method)]
    assert column("perturbed", "entries") == column("ours", "entries") == [
        str(member["matched_entries"]) for member in results["members"]]
    assert column("random", "genotype") == column("nes-rs", "genotype")[:2]
    labels = nes.load_data("toy").splits["test"][1]
    for row in rows:
        if row["index"] == "ensemble":
            assert float(row["nll"]) == results["methods"][row["method"]]["nll"]
        else:
            state = nes.load(out / row["file"])
            assert json.loads(row["genotype"]) == nes.genotype(state["network"][4])
            right = (state["test"].argmax(-1) == labels).double().mean().item()
            assert float(row["accuracy"]) == right
    trained = {row["file"] for row in rows if row["file"].startswith("members")}
    assert len(list((out / "members").iterdir())) == len(trained) < 17  # methods share networks

def test_nes_rs_and_chosen_choose_on_the_selection_split(finished, tmp_path):
    shutil.copytree(finished[0], out := tmp_path / "run")
    labels = {split: y for split, (_, y) in nes.load_data("toy").splits.items()}
    rows = list(csv.DictReader((out / "ledger.csv").open(newline="")))
    files = [out / r["file"] for r in rows if r["method"] == "nes-rs" and r["file"]]
    pool = torch.stack([nes.load(file)["test"] for file in files])
    best_on_test = nes.forward_selection(pool, labels["test"], 2)
    worst = [i for i in range(4) if i not in best_on_test]
    perfect = F.one_hot(labels["selection"], 6).float()
    for i in worst:  # make them look perfect on the selection split
        nes.save(files[i], nes.load(files[i]) | {"selection": perfect})
    shots = sorted((out / "one_shot").iterdir())[-2:]
    for file in shots:
        nes.save(file, nes.load(file) | {"selection": perfect})
    results = run_tiny(out, "--baselines", "nes-rs", "chosen")
    expected = nes.ensemble_metrics(pool[worst], labels["test"])["nll"]
    assert results["methods"]["nes-rs"]["nll"] == pytest.approx(expected)
    rows = list(csv.DictReader((out / "ledger.csv").open(newline="")))
    of = lambda method: [r for r in rows if r["method"] == method and r["file"]]
    assert [i for i, row in enumerate(of("nes-rs")) if row["chosen"] == "1"] == worst
    assert {Path(row["file"]).stem[:8] for row in of("chosen")} == {file.stem for file in shots}

def test_the_flags_that_no_other_test_gives(tmp_path):
    flags = ("--second-order --objective paper --lambda-max 4 --mirror --crop 2 --search-cells 1 "
             "--cells 3 --shared-epochs 0")
    results = run_tiny(tmp_path, *flags.split())
    assert max(point["lambda"] for point in results["lambda_response"]["points"]) == 4
    assert nes.load(tmp_path / results["members"][1]["file"])["network"][3] == 3
    history = nes.load(tmp_path / "hyper.pt")["history"]
    assert all(row["penalty"] <= 0 for row in history) and history[-1]["step"] == 12  # - lambda JSd
    assert not (tmp_path / "shared.pt").exists()

def test_a_reloaded_member_and_ensemble_predict_the_same(finished):
    out, results = finished
    images = nes.load_data("toy").splits["test"][0]
    probs = []
    for member in results["members"]:
        net, data = nes.load_member(out / member["file"])  # no data set, no settings
        probs.append(net(data.normalise(images)).softmax(dim=-1))
        assert torch.allclose(probs[-1], nes.load(out / member["file"])["test"], atol=1e-5)
        assert data.classes == nes.TOY_CLASSES
    assert torch.allclose(nes.load_ensemble(out)(images), torch.stack(probs).mean(0), atol=1e-6)
    shots = [nes.load(out / file)["test"] for file in results["one_shots"]["files"]]
    assert torch.allclose(nes.load_ensemble(out, 3)(images), torch.stack(shots).mean(0), atol=1e-5)
    with pytest.raises(nes.NesError, match="--one-shots 4"):
        nes.load_ensemble(out, 4)

def test_a_member_that_cannot_be_loaded(tmp_path):
    nes.save(tmp_path / "begun.pt", {"step": 7, "net": {}})  # what a kill leaves
    torch.save({"step": 7, "net": {}}, tmp_path / "old.pt")   # what an older version left
    for name, words in (("begun.pt", "not trained to the end"), ("none.pt", "there is no"),
                        ("old.pt", "another version")):
        with pytest.raises(nes.NesError, match=words) as error:
            nes.load_member(tmp_path / name)
        assert name in str(error.value)
    with pytest.raises(nes.NesError, match="finish that run first"):
        nes.load_ensemble(tmp_path)

def test_more_samples_of_a_finished_run_train_only_the_new_ones(finished, monkeypatch, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    trained, train_member = [], nes.train_member
    monkeypatch.setattr(nes, "train_member", lambda arch, i, *rest: (
        trained.append(i), train_member(arch, i, *rest)))
    more = run_tiny(tmp_path / "run", "--samples", "4")
    assert trained == [2, 3] and more["members"][:2] == finished[1]["members"]

def test_the_same_seed_gives_the_same_and_another_does_not(finished, tmp_path):
    again = run_tiny(tmp_path / "a", "--baselines", "all")
    other = run_tiny(tmp_path / "b", "--seed", "1")
    assert without_times(again) == without_times(finished[1])
    assert other["ensemble"] != again["ensemble"]

def command(out, *flags):
    return [sys.executable, nes.__file__, *TINY, "--out", str(out), *flags]

def test_two_workers_give_what_one_gives_and_killed_at_any_moment_go_on(finished, tmp_path):
    argv, found = command(tmp_path / "run", "--baselines", "all", "--workers", "2"), ""
    for wanted in ("base +4/", "hyper +12/", "base-1 +4/", "members/.* 4/", "members/.* 8/"):
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
        for line in process.stdout:
            found += line if "found at" in line else ""
            if re.match(wanted, line):
                break
        else:
            pytest.fail(f"no {wanted} was printed")
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)  # ends when the last process that holds its output has
    assert re.search("^base: found at step [34] of 4", found)  # a row is printed, then saved
    assert re.search("hyper: found at step 1[012] of 12", found)
    assert re.search("members/.*: found at step [1-8] of 8", found)
    results = run_tiny(tmp_path / "run", "--baselines", "all")
    assert without_times(results) == without_times(finished[1])
    for file in finished[0].glob("members/*.pt"):
        a, b = nes.load(file), nes.load(tmp_path / "run" / "members" / file.name)
        assert all(torch.equal(a["net"][key], b["net"][key]) for key in a["net"])

def test_a_member_stopped_at_any_step_goes_on_to_the_same_weights(finished, tmp_path, monkeypatch):
    whole = nes.load(finished[0] / finished[1]["members"][0]["file"])
    arch, last = whole["network"][4], whole["step"]
    for step in (4, last):  # half way; and between the last step and the scores
        data, args = tiny_settings(tmp_path / str(step))

        def save_and_stop(path, state, save=nes.save):
            save(path, state)
            if Path(path).suffix == ".pt" and state["step"] == step:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(nes, "save", save_and_stop)
            nes.train_member(arch, 0, data, args)
        path = tmp_path / str(step) / f"{nes.member_name(arch, 0)}.pt"
        assert nes.load(path)["step"] == step and not nes.is_finished(path)
        nes.train_member(arch, 0, data, args)
        again = nes.load(path)
        assert again["step"] == last > 4 and torch.equal(again["test"], whole["test"])
        assert all(torch.equal(again["net"][name], value) for name, value in whole["net"].items())

def test_errors_and_interrupts_of_workers(tmp_path):
    nan = subprocess.run(command(tmp_path / "a", "--workers", "2", "--lr", "1e30"), text=True,
                         stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert nan.returncode == 2 and nan.stderr.count("\n") == 1, nan.stderr
    assert "not a number" in nan.stderr and "--lr" in nan.stderr
    slow = ["--workers", "2", "--epochs", "1000", "--shared-epochs", "1000"]
    process = subprocess.Popen(command(tmp_path / "b", *slow), stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, start_new_session=True,
                               # a test run in the background has Ctrl-C ignored, and bequeaths it
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    for line in process.stdout:
        if line.startswith("members"):
            break
    second = subprocess.run(command(tmp_path / "b", *slow), text=True, capture_output=True)
    assert second.returncode == 2 and "another process works in" in second.stderr
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and error.count("\n") == 2 and "goes on" in error, error

def test_the_cores_that_may_be_used(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8), raising=False)
    for quota, count in (("max 100000", 8), ("250000 100000", 2), ("50000 100000", 1)):
        monkeypatch.setattr(Path, "read_text", lambda self: quota)
        assert nes.cores() == count

def distributed_gradients(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank,
                                         world_size=2)
    torch.manual_seed(0)
    model, x = nn.Linear(5, 3), torch.randn(8, 5)
    model(x[rank::2]).square().mean().backward()
    nes.average_gradients(model.parameters())
    torch.save(model.weight.grad, f"{folder}/{rank}.pt")
    data, args = tiny_settings(folder)
    net = nes.build((0, "base"), data, 4, 2)
    base_p = nes.base_search("base", net, data, args)
    hyper = nes.train_hypernetwork(net, base_p, data, args)
    torch.save([*net.parameters(), base_p, *hyper.parameters()], f"{folder}/search-{rank}.pt")
    torch.distributed.destroy_process_group()

def test_two_processes_give_the_gradients_of_one(tmp_path):
    torch.multiprocessing.spawn(distributed_gradients, (str(tmp_path),), nprocs=2)
    torch.manual_seed(0)
    model, x = nn.Linear(5, 3), torch.randn(8, 5)
    model(x).square().mean().backward()
    for rank in range(2):
        assert torch.allclose(torch.load(tmp_path / f"{rank}.pt"), model.weight.grad)
    # Each saw its own half of the batches, and yet both hold the same weights and architectures.
    found = [torch.load(tmp_path / f"search-{rank}.pt") for rank in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))

def test_torchrun_deals_out_the_work(finished, tmp_path):
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            *command(tmp_path)[1:]]
    log = subprocess.run(argv, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                         text=True).stdout
    results = json.loads((tmp_path / "results.json").read_text())
    for member, other in zip(results["members"], finished[1]["members"], strict=True):
        assert member["lambda"] == other["lambda"]  # each was trained once, by one of the two:
        name = member["file"][:-3]
        last = "{0}/{0} ".format(nes.load(tmp_path / member["file"])["step"])
        assert len(re.findall(f"{name} +{last}", log)) == 1

# ---- 1 settings, and errors for people

def bad(capsys, argv, *words):
    with pytest.raises(SystemExit) as stop:
        nes.main(argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("nes.py: error: ")
    assert error.count("\n") == 1 and all(word in error for word in words), error  # one sentence
    return error

@pytest.mark.parametrize("flags, words", [
    (["--nonsense", "1"], ["--nonsense"]), (["--samples", "0"], ["--samples", "0"]),
    (["--samples", "many"], ["many"]), (["--lambda-max", "-1"], ["-1"]),
    (["--lambda-max", "0"], ["--lambda-max"]), (["--lambda-max", "2"], ["--lambda-max"]),
    (["--lr", "nan"], ["--lr", "nan"]), (["--tau", "0.4"], ["--tau"]),
    (["--objective", "other"], ["other"]), (["--baselines", "other"], ["other"]),
    (["--device", "abacus"], ["abacus"]), (["--device", "cpu:x"], ["cpu:x"]),
    (["--device", "meta"], ["meta"]), (["--dataset", "/no/such/folder"], ["/no/such/folder"]),
    (["--report", "/no/such/run"], ["/no/such/run", "results.json"])])
def test_bad_flags(flags, words, capsys, tmp_path):
    bad(capsys, ["--out", str(tmp_path), *flags], *words)

def test_help_opens_with_two_examples(capsys):
    with pytest.raises(SystemExit) as stop:
        nes.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and text.count("python nes.py") == 2
    assert text.index("python nes.py") < text.index("--dataset DATASET") < text.index("fmnist)")

@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_where_there_is_none(capsys, tmp_path):
    bad(capsys, [*TINY, "--out", str(tmp_path), "--device", "cuda"], "cuda", "cpu")

def test_bad_folders(capsys, tmp_path):
    write_images(tmp_path / "one", classes=("only",))
    bad(capsys, ["--dataset", f"{tmp_path}/one", "--out", f"{tmp_path}/o"], "two or more")
    write_images(tmp_path / "few", count=1)
    bad(capsys, ["--dataset", f"{tmp_path}/few", "--out", f"{tmp_path}/o"], "too few")
    write_images(tmp_path / "two")
    out, small = tmp_path / "fine", [*TINY, "--image-size", "16", "--out", f"{tmp_path}/fine"]
    nes.main([*small, "--dataset", f"{tmp_path}/two"])
    shutil.copy(tmp_path / "two/train/a/0.png", tmp_path / "two/train/a/1.png")
    bad(capsys, [*small, "--dataset", f"{tmp_path}/two/"], str(out), "other images")
    (tmp_path / "two/train/a/5.png").write_bytes(b"not a picture")
    bad(capsys, ["--dataset", f"{tmp_path}/two", "--out", f"{tmp_path}/o"], "5.png",
        "remove or replace")

def test_damaged_and_missing_data_files(capsys, tmp_path, monkeypatch):
    names = [f"{part}-{kind}-ubyte" for part in ("train", "t10k")
             for kind in ("images-idx3", "labels-idx1")]
    raw, package = tmp_path / "FashionMNIST/raw", tmp_path / "package"
    raw.mkdir(parents=True)
    for name in names:
        (raw / name).write_bytes(b"\0\0\x08\x03short")
    bad(capsys, ["--data-dir", str(tmp_path), "--out", f"{tmp_path}/o"], "FashionMNIST",
        "delete the damaged files")
    fashion = torchvision.datasets.FashionMNIST
    monkeypatch.setattr(fashion, "mirrors", ["http://127.0.0.1:9/"])  # no network
    monkeypatch.setattr(nes, "DEBIAN_FASHION_MNIST", package)
    bad(capsys, ["--data-dir", f"{tmp_path}/new", "--out", f"{tmp_path}/o"], "FashionMNIST",
        "check the network", "dataset-fashion-mnist")
    package.mkdir()  # now it is installed: found although the download left its folder behind
    for name in names:
        sizes = (60, 28, 28) if "images" in name else (60,)
        header = bytes([0, 0, 8, len(sizes)]) + b"".join(n.to_bytes(4, "big") for n in sizes)
        content = header + bytes(i % 10 for i in range(math.prod(sizes)))
        (package / f"{name}.gz").write_bytes(gzip.compress(content))
    assert (tmp_path / "new/FashionMNIST/raw").exists()
    data = nes.load_data("fmnist", f"{tmp_path}/new")
    assert data.splits["test"][1].tolist() == [i % 10 for i in range(60)]
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", "http://127.0.0.1:9/nothing")
    bad(capsys, ["--dataset", "cifar10", "--data-dir", str(tmp_path), "--out", f"{tmp_path}/o2"],
        "CIFAR10", "check the network")

def test_unwritable_out(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    bad(capsys, [*TINY, "--out", f"{tmp_path}/file/run"], "--out")

def test_other_settings_damaged_files_versions_and_nan_lose_nothing(capsys, finished, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    before = {path: path.read_bytes() for path in out.rglob("*.pt")}
    bad(capsys, [*TINY, "--out", str(out), "--hyper-lr", "0.1", "--pivots", "9"],
        "--hyper-lr 0.5 (now 0.1)", "--pivots 6 (now 9)")
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
    settings = json.loads((out / "settings.json").read_text())
    nes.save(out / "settings.json", json.dumps(settings | {"version": 1}))
    bad(capsys, [*TINY, "--out", str(out)], "another version")
    nes.save(out / "settings.json", json.dumps(settings))
    assert without_times(run_tiny(out, "--baselines", "all")) == without_times(finished[1])
    error = bad(capsys, [*TINY, "--out", f"{tmp_path}/nan", "--lr", "1e30"], "not a number", "--lr")
    assert "step" in error and (tmp_path / "nan/hyper.pt").exists()
    bad(capsys, [*TINY, "--out", f"{tmp_path}/nan2", "--search-lr", "1e30"], "loss of base",
        "--alpha-lr", "another --out")

def test_a_run_folder_belongs_to_its_settings_also_for_one_who_calls_the_functions(tmp_path):
    data, args = tiny_settings(tmp_path)
    net = nes.build((0,), data, 4, 2)
    nes.base_search("base", net, data, args)
    run_tiny(tmp_path)  # the whole program takes this folder as its own: same settings, same images
    args.search_lr = 0.01
    for train in (lambda: nes.base_search("base", net, data, args),
                  lambda: nes.train_member(nes.random_architecture(0), 0, data, args)):
        with pytest.raises(nes.NesError, match="--search-lr"):
            train()

@pytest.mark.skipif(not (nes.DEBIAN_FASHION_MNIST.exists() or Path("data/FashionMNIST").exists()),
                    reason="no Fashion-MNIST here")
def test_real_fashion_mnist_is_learned(tmp_path):
    here = "data" if Path("data/FashionMNIST/raw").exists() else str(tmp_path)
    data = nes.load_data("fmnist", here)
    assert [len(data.splits[name][1]) for name in nes.SHARES] == [27000, 27000, 6000]
    assert data.splits["test"][0].shape == (10000, 1, 28, 28) and data.classes[9] == "Ankle boot"
    assert data.splits["test"][1][:5].tolist() == [9, 2, 1, 1, 6]
    data.splits["both"] = tuple(part[:6400] for part in data.splits["both"])
    args = nes.parse(f"--channels 8 --epochs 1 --device cpu --out {tmp_path}".split())
    arch = nes.random_architecture(0)
    nes.train_member(arch, 0, data, args)
    probs = nes.load(tmp_path / f"{nes.member_name(arch, 0)}.pt")["test"]
    assert 0.6 < nes.member_metrics(probs, data.splits["test"][1])["accuracy"] < 0.95

# ---- the tutorial

TUTORIAL = Path(__file__).with_name("tutorial.ipynb")

def test_the_tutorial_was_saved_as_it_ran():
    notebook = nbformat.read(TUTORIAL, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))  # in order
    outputs = [output for cell in code for output in cell.outputs]
    assert all(output.output_type in ("stream", "display_data") for output in outputs)
    assert sum("image/png" in output.get("data", ()) for output in outputs) >= 20
    assert all(len(cell.source.splitlines()) <= 15 for cell in code)
    assert TUTORIAL.stat().st_size < 3e6

@pytest.fixture(scope="module", autouse=True)
def tutorial(request):
    """The notebook's short version, begun before the other tests: done when they are."""
    if all(item.name != "test_the_tutorial_runs" for item in request.session.items):
        yield None
        return
    os.environ["NES_TUTORIAL_QUICK"] = "1"
    client = NotebookClient(nbformat.read(TUTORIAL, as_version=4), timeout=240,
                            resources={"metadata": {"path": str(TUTORIAL.parent)}})
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(client.execute)

def test_the_tutorial_runs(tutorial):
    notebook = tutorial.result()  # raises what a cell raised
    text = "".join(output.get("text", "") for cell in notebook.cells
                   for output in cell.get("outputs", ()))
    assert "largest difference of the logits" in text and "keys of the results" in text

if __name__ == "__main__":
    nes.keep_freed_memory()
    benchmark()
