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

def norm(C):
    return nn.BatchNorm2d(C, affine=False)

def textbook_conv(C, taps, stride, dilation=1):
    depthwise = nn.Conv2d(C, C, taps, stride, dilation * (taps // 2), dilation, C, bias=False)
    return [nn.ReLU(), depthwise, nn.Conv2d(C, C, 1, bias=False), norm(C)]

def textbook_op(name, C, stride):
    if name == "max_pool_3x3":
        return nn.Sequential(nn.MaxPool2d(3, stride, 1), norm(C))
    if name == "avg_pool_3x3":
        return nn.Sequential(nn.AvgPool2d(3, stride, 1, count_include_pad=False), norm(C))
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
        self.norm = norm(C)

    def forward(self, x):
        moved = torch.zeros_like(x)
        moved[:, :, :-1, :-1] = x[:, :, 1:, 1:]
        return self.norm(torch.cat([self.even(x), self.odd(moved)], dim=1))

class TextbookCell(nn.Module):
    def __init__(self, C_before, C_last, C, reduction, after_reduction):
        super().__init__()
        align = lambda C_in: nn.Sequential(nn.Conv2d(C_in, C, 1, bias=False), norm(C))
        self.align0 = TextbookReduce(C_before, C) if after_reduction else align(C_before)
        self.align1 = align(C_last)
        self.edges = nn.ModuleList(
            nn.ModuleList(textbook_op(name, C, 2 if reduction and source < 2 else 1)
                          for name in nes.NAMES)
            for node in range(4) for source in range(node + 2))

    def forward(self, s0, s1, weights):
        states, edges = [self.align0(F.relu(s0)), self.align1(F.relu(s1))], zip(weights, self.edges)
        for _ in range(4):
            terms = []
            for state in states:
                row, ops = next(edges)
                terms += [w * op(state) for w, op in zip(row, ops)]
            states.append(sum(terms))
        return torch.cat(states[2:], dim=1)

class TextbookNetwork(nn.Module):
    """The same function as `model`, a supernet of C channels, and the same weights."""

    def __init__(self, model, C, kinds):
        super().__init__()
        self.stem, self.classifier = copy.deepcopy(model.stem), copy.deepcopy(model.classifier)
        self.cells, self.kinds, C_before, C_last, after = nn.ModuleList(), kinds, 4 * C, 4 * C, 0
        for kind in kinds:
            C = 2 * C if kind else C
            self.cells.append(TextbookCell(C_before, C_last, C, kind, after))
            C_before, C_last, after = C_last, 4 * C, kind
        # The cells' parameters come in the same order; only skip_connect's names differ.
        for mine, theirs in zip(self.cells.parameters(), model.cells.parameters(), strict=True):
            mine.data.copy_(theirs.data)

    def forward(self, x, weights):
        s0 = s1 = self.stem(x)
        for kind, cell in zip(self.kinds, self.cells):
            s0, s1 = s1, cell(s0, s1, weights[kind])
        return self.classifier(s1.mean((2, 3)))

def benchmark(C=16, kinds=(0, 1, 0, 1, 0), batch=64, size=28, rounds=5):
    """Seconds of a weight and an architecture step, nes.py and the textbook in turn; the ratio."""
    torch.manual_seed(0)
    network = nes.Network(1, 10, C, len(kinds))
    textbook = TextbookNetwork(network.to(memory_format=torch.channels_last), C, kinds)
    x, y = torch.randn(batch, 1, size, size), torch.randint(10, (batch,))
    x_last = x.contiguous(memory_format=torch.channels_last)
    alpha, ratios = torch.zeros(2, 14, 7, requires_grad=True), []

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
TOY = nes.load_data("toy")
LABELS = {split: labels for split, (_, labels) in TOY.splits.items()}
nes.POOL = 6  # samples of which "chosen" chooses: enough here

def settings(out, *flags):
    return nes.parse([*TINY, "--out", str(out), *flags])

def run_tiny(out, *flags):
    return nes.main([*TINY, "--out", str(out), *flags])

def command(out, *flags):
    return [sys.executable, nes.__file__, *TINY, "--out", str(out), *flags]

@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    return out, run_tiny(out, "--baselines", "all")

@pytest.fixture
def bad(capsys, tmp_path):
    """Runs nes.py with flags that must end it with status 2 and one sentence with these words."""
    def check(flags, *words):
        with pytest.raises(SystemExit) as stop:
            run_tiny(tmp_path / "bad", *flags)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.startswith("nes.py: error: ")
        assert error.count("\n") == 1 and all(word in error for word in words), error
    return check

def without_times(results):
    """What must be the same in two runs: everything but the clock and the folder's name."""
    results = json.loads(json.dumps(results))
    results.pop("seconds")
    for name in ("out", "data_dir", "device", "log_every", "workers"):
        results["settings"].pop(name)
    for method in results["methods"].values():
        method.pop("search_seconds"), method.pop("training_seconds")
    return results

def ledger(out, method=None):
    """The rows of a run's ledger: all of them, or those of a method's networks."""
    rows = list(csv.DictReader((out / "ledger.csv").open(newline="")))
    return [row for row in rows if row["method"] == method and row["file"]] if method else rows

def soft(*key):
    """A soft architecture (2, 14, 7) that depends on key alone."""
    return torch.randn(2, 14, 7, generator=nes.rng(*key)).softmax(-1)

def wild_hypernetwork(base_p, scale=3.0):
    """One that is at the base at 0, and after that anywhere."""
    hyper = nes.HyperNetwork(base_p.log())
    hyper.table.data[1:] += scale * torch.randn(5, 2, 14, 7, generator=nes.rng("wild"))
    return hyper

def tiny_net(*key):
    return nes.build(key, TOY, 4, 2)

def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)

# ---- 3 data

def test_splits_are_disjoint_and_complete_and_the_seed_draws_them():
    rows = {name: set(map(bytes, x.flatten(1).numpy())) for name, (x, _) in TOY.splits.items()}
    sizes = {"train": 1080, "validation": 1080, "selection": 240, "test": 600, "both": 2160}
    assert {name: len(found) for name, found in rows.items()} == sizes
    assert len(set.union(*rows.values())) == 3000
    assert rows["both"] == rows["train"] | rows["validation"]
    assert not torch.equal(TOY.splits["train"][0], nes.load_data("toy", seed=4).splits["train"][0])

def test_batches_are_all_images_once_an_epoch_in_a_new_order_shifted_and_mirrored_in_training():
    images = torch.arange(8 * 25).byte().view(8, 1, 5, 5)  # whose label is their number
    data = nes.Data({"both": (images, torch.arange(8))}, ["a"], torch.zeros(1, 1, 1),
                    torch.ones(1, 1, 1), (1, 5, 5), crop=1, mirror=True)
    order, seen = [], set()
    for step in range(120):
        x, y = data.batch("both", 2, step, ("k",))
        plain, labels = data.batch("both", 2, step, ("k",), augment=False)
        assert torch.equal(y, labels) and torch.allclose(plain * 255, images[y].float())
        order += y.tolist()
        for image, padded in zip(x, F.pad(images[y].float(), (1, 1, 1, 1), mode="replicate")):
            windows = {(r, c, m): padded[:, r:r + 5, c:c + 5].flip([2] * m)
                       for r in range(3) for c in range(3) for m in range(2)}
            pixels = (image * 255).round()
            match = {key for key, window in windows.items() if torch.equal(window, pixels)}
            assert match
            seen |= match
    epochs = {tuple(order[i:i + 8]) for i in range(0, 240, 8)}
    assert len(epochs) == 30 and all(sorted(epoch) == [*range(8)] for epoch in epochs)
    assert len(seen) == 18

def write_images(root, classes=("a", "b"), colour=True, count=12):
    generator = torch.Generator().manual_seed(0)
    for folder in (root / part / name for part in ("train", "test") for name in classes):
        folder.mkdir(parents=True)
        for i in range(count):
            pixels = torch.randint(256, (3 if colour else 1, 9, 12), generator=generator)
            image = torchvision.transforms.functional.to_pil_image(pixels.byte())
            image.save(folder / f"{i}.png")

@pytest.mark.parametrize("colour", [True, False])
def test_a_folder_of_images(tmp_path, colour):
    write_images(tmp_path, colour=colour)
    data = nes.load_data(str(tmp_path), "", 10)
    assert data.classes == ["a", "b"] and data.shape == (3 if colour else 1, 10, 10)
    assert data.splits["test"][1].tolist() == [0] * 12 + [1] * 12
    path = tmp_path / "test" / "b" / "0.png"  # and one by itself is what the folder's reader gave
    assert torch.equal(nes.read_image(path, data.shape), data.splits["test"][0][12])

def test_cifar10_is_read_from_its_files(tmp_path, monkeypatch):
    (tmp_path / "cifar-10-batches-py").mkdir()
    pixels, sums = torch.randint(256, (4, 3072), dtype=torch.uint8).numpy(), []
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch", "batches.meta"]
    for i, name in enumerate(names):
        content = pickle.dumps({
            "data": pixels + i, "labels": [0, 1, 2, 3], "label_names": list("abcdefghij")})
        (tmp_path / "cifar-10-batches-py" / name).write_bytes(content)
        sums.append([name, hashlib.md5(content).hexdigest()])
    cifar = torchvision.datasets.CIFAR10
    monkeypatch.setattr(cifar, "train_list", sums[:5])
    monkeypatch.setattr(cifar, "test_list", sums[5:6])
    monkeypatch.setattr(cifar, "meta", {**cifar.meta, "md5": sums[6][1]})
    data = nes.load_data("cifar10", str(tmp_path))
    assert sum(len(data.splits[name][1]) for name in nes.SHARES) == 20
    assert torch.equal(data.splits["test"][0], torch.from_numpy(pixels + 5).view(4, 3, 32, 32))

# ---- 4 architectures, 5 cell and network, 15 kernels

def test_discretise_on_a_worked_example():
    p = torch.full((2, 14, 7), 0.01)
    p[:, :, 2] = 0.1                                    # everywhere a weak skip_connect
    p[0, 1, 3], p[0, 0, 0] = 0.5, 0.4                   # node 0: both its edges
    p[0, 2, 4], p[0, 3, 1], p[0, 4, 6] = 0.3, 0.6, 0.5  # node 1: sources 1 and 2
    arch = nes.discretise(p)
    assert arch.sum() == 16 and set(arch.unique().tolist()) == {0, 1}
    cells = nes.genotype(arch)
    assert cells["normal"] == [
        ["max_pool_3x3", 0], ["sep_conv_3x3", 1], ["avg_pool_3x3", 1], ["dil_conv_5x5", 2],
        ["skip_connect", 0], ["skip_connect", 1], ["skip_connect", 0], ["skip_connect", 1]]
    assert cells["reduction"] == [["skip_connect", 0], ["skip_connect", 1]] * 4
    assert nes.count_operations(arch)["skip_connect"] == 12
    assert torch.equal(nes.discretise(arch), arch)
    many = torch.stack([soft(i) for i in range(6)]).view(2, 3, 2, 14, 7)
    assert torch.equal(nes.discretise(many)[1, 2], nes.discretise(soft(5)))

@pytest.mark.parametrize("size", [8, 7])
@pytest.mark.parametrize("taps, stride, dilation", [
    (taps, stride, dilation) for taps in (3, 5) for stride in (1, 2) for dilation in (1, 2)])
def test_depthwise_gradients_are_those_of_pytorch(taps, stride, dilation, size):
    x = torch.randn(3, 4, size, size, dtype=torch.double, requires_grad=True)
    conv = nes.DepthwiseConv(4, taps, stride, dilation).double()
    mine = conv(x)
    theirs = F.conv2d(x, conv.weight, None, stride, dilation * (taps // 2), dilation, 4)
    g = torch.randn_like(mine)
    gradients = (torch.autograd.grad(y, [x, conv.weight], g) for y in (mine, theirs))
    assert torch.allclose(mine, theirs)
    assert all(torch.allclose(a, b) for a, b in zip(*gradients, strict=True))
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
    network = nes.Network(2, 3, 4, 3).double().to(memory_format=torch.channels_last)
    textbook = TextbookNetwork(network, 4, (0, 1, 1)).double()
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
    net, y = nes.Network(1, 3, 2, 1).double(), torch.tensor([0, 1, 2, 0])
    x, x_val = torch.randn(2, 4, 1, 8, 8, dtype=torch.double)
    alpha = torch.randn(2, 14, 7, dtype=torch.double, requires_grad=True)
    mine = nes.second_order_loss(net, (x, y), (x_val, y), alpha.softmax(-1), 0.5)
    gradient, = torch.autograd.grad(mine, alpha)

    def loss(a):  # the definition: copy the network, take the inner step, see the validation loss
        stepped = copy.deepcopy(net)
        F.cross_entropy(stepped(x, a.detach().softmax(-1)), y).backward()
        with torch.no_grad():
            for p in stepped.parameters():
                p -= 0.5 * p.grad
            return F.cross_entropy(stepped(x_val, a.softmax(-1)), y)

    assert mine.item() == pytest.approx(loss(alpha).item())
    first_order, = torch.autograd.grad(F.cross_entropy(net(x_val, alpha.softmax(-1)), y), alpha)
    for index in [(0, 0, 3), (0, 5, 0), (0, 9, 6), (0, 13, 2)]:
        step = torch.zeros_like(alpha)
        step[index] = 1e-5
        difference = ((loss(alpha + step) - loss(alpha - step)) / 2e-5).item()
        assert gradient[index].item() == pytest.approx(difference, rel=1e-3, abs=1e-7)
    assert not torch.allclose(gradient, first_order, rtol=1e-2)

def test_one_round_is_one_sgd_step_on_w_then_one_adam_step_on_alpha(tmp_path):
    args, mine = settings(tmp_path, "--base-steps", "1"), tiny_net(0, "base")
    alpha = nn.Parameter(1e-3 * torch.randn(2, 14, 7, generator=nes.rng(0, "base")))
    net, p = nes.base_search("base", TOY, args)
    (x, y), (x_val, y_val) = (TOY.batch(split, 16, 0, (0, "base", split))
                              for split in ("train", "validation"))
    F.cross_entropy(mine(x, alpha.detach().softmax(-1)), y).backward()
    nn.utils.clip_grad_norm_(mine.parameters(), 5.0)
    torch.optim.SGD(mine.parameters(), args.search_lr, momentum=0.9, weight_decay=3e-4).step()
    for a, b in zip(net.parameters(), mine.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    loss = F.cross_entropy(mine(x_val, alpha.softmax(-1)), y_val)
    alpha.grad, = torch.autograd.grad(loss, alpha)
    torch.optim.Adam([alpha], args.alpha_lr, betas=(0.5, 0.999)).step()
    assert torch.allclose(p, alpha.softmax(-1), atol=1e-5)

@pytest.mark.parametrize("second_order", [False, True])
@pytest.mark.parametrize("rates", [(0.1, 0.0), (0.0, 0.1)])
def test_a_weight_step_leaves_alpha_alone_and_the_reverse(rates, second_order):
    batches = [TOY.batch(split, 16, 0, ("k",)) for split in ("train", "validation")]
    net, alpha = tiny_net(0), nn.Parameter(torch.zeros(2, 14, 7))
    optimizers = [torch.optim.SGD(net.parameters(), rates[0]), torch.optim.SGD([alpha], rates[1])]
    nes.search_step(net, alpha.softmax(-1), 0.0, *batches, *optimizers, second_order)
    stayed = all(torch.equal(a, b) for a, b in zip(net.parameters(), tiny_net(0).parameters()))
    assert (not stayed, bool(alpha.any())) == (rates[0] > 0, rates[1] > 0)

# ---- 7 JSd and hypernetwork

def test_jensen_shannon():
    p, q = torch.rand(2, 50, 7, dtype=torch.double).softmax(-1)
    entropy, jsd, m = lambda v: torch.special.entr(v).sum(-1), nes.jensen_shannon(p, q), (p + q) / 2
    assert torch.allclose(jsd, entropy(m) - (entropy(p) + entropy(q)) / 2)
    assert torch.allclose(jsd, nes.jensen_shannon(q, p))
    assert (jsd > 0).all() and (jsd < math.log(2)).all()
    assert nes.jensen_shannon(p, p).abs().max() < 1e-12
    one, other = torch.eye(7)[:2]
    assert nes.jensen_shannon(one, other).item() == pytest.approx(math.log(2))
    wrong = sum((m * (m / v).log()).sum(-1) for v in (p, q)) / 2  # KL(m || p): the wrong direction
    assert not torch.allclose(jsd, wrong, rtol=1e-3)
    logits = torch.tensor([500.0, 0, 0, 0, 0, 0, 0], requires_grad=True)
    nes.jensen_shannon(logits.softmax(-1), one).backward()
    assert logits.grad.isfinite().all()

def test_the_diversity_term_is_the_jsd_of_the_finished_architecture():
    base, seen = nes.discretise(soft("base")), set()
    nodes = lambda cells: [cells[kind][i:i + 2] for kind in nes.KINDS for i in range(0, 8, 2)]
    for i in range(40):  # from the base itself to one that shares next to nothing
        p = (soft("other", i).log() + (5 - i / 6) * base).softmax(-1)
        arch = nes.discretise(p)
        kept = sum(entry in theirs for mine, theirs in zip(*map(nodes, map(nes.genotype, (
            arch, base)))) for entry in mine)
        share = nes.differing_share(arch, p, base).item()
        assert share == pytest.approx(1 - kept / 16, abs=1e-6)
        assert nes.divergence(arch, base).item() == pytest.approx(math.log(2) * share, abs=1e-6)
        assert nes.matched_entries(arch, base) == kept
        loss = nes.diversity_loss(arch, p, base, 0.25, 3.0)
        assert loss.item() == pytest.approx(3 * (share - 0.25) ** 2, abs=1e-5)
        seen.add(kept)
    assert 16 in seen and len(seen) > 8
    many = torch.stack([nes.discretise(soft(i)) for i in range(5)])
    assert torch.allclose(nes.divergence(many, base),
                          torch.stack([nes.divergence(arch, base) for arch in many]))

def test_the_diversity_term_pushes_every_entry_of_the_base():
    p, base = soft("p").requires_grad_(), nes.discretise(soft("base"))
    gradient, = torch.autograd.grad(nes.differing_share(nes.discretise(p), p, base), p)
    assert torch.allclose(gradient, -base / 16)  # chosen or not: what the product form would miss
    assert (base * nes.discretise(p)).sum() < 16

def test_hypernetwork_is_numpys_interpolation_and_trains_every_pivot():
    hyper, lam = nes.HyperNetwork(torch.zeros(2, 14, 7), 5, 4.0), torch.linspace(0, 4, 33)
    nn.init.normal_(hyper.table)
    mine, table = hyper(lam).detach().flatten(1), hyper.table.detach().flatten(1)
    for column, pivots in zip(mine.T, table.T):
        assert numpy.allclose(column, numpy.interp(lam, [0, 1, 2, 3, 4], pivots), atol=1e-5)
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
    lams = nes.draw_lambdas(4000, 2.0, generator)
    assert lams.min() == 0 and lams.max() == 2 and lams.mean().item() == pytest.approx(1, abs=0.05)
    assert (lams == 0).double().mean().item() == pytest.approx(1 / 12, abs=0.02)  # the overshoot
    logits = torch.tensor([2.0, 1.0, 0.0]).repeat(20000, 1)
    drawn = nes.draw_probabilities(logits, 1.0, nes.rng("noise")).argmax(-1).bincount() / 20000
    assert torch.allclose(drawn, logits[0].softmax(-1), atol=0.02)  # the Gumbel trick
    assert torch.allclose(nes.draw_probabilities(logits, 0.0, generator), logits.softmax(-1))

def test_the_validation_loss_reaches_the_hypernetwork(tmp_path):
    args = settings(tmp_path, "--strength", "0", "--hyper-steps", "1")  # L_val alone
    hyper = nes.train_hypernetwork(tiny_net(0), soft("b"), TOY, args)
    moved = (hyper.table - nes.smooth(soft("b"), nes.TAU).log()).abs().amax(-1) > 1e-4  # (K, 2, E)
    assert 1 <= moved.any(-1).any(-1).sum() <= 2  # the pivots beside one lambda, no other
    assert 0 < moved.any(0).sum() <= 16  # and the edges that the finished architecture has

# ---- 8 sampling and the dial

def test_lambdas_are_spread_and_do_not_depend_on_how_many():
    few, many = nes.sample_lambdas(5, 2.0), nes.sample_lambdas(100, 2.0)
    assert many[:5] == few and few[0] == 0
    gaps = torch.tensor(sorted(many) + [2.0]).diff()
    assert gaps.max() < 3 * 2.0 / 100 and gaps.min() > 0

def test_a_thousand_architectures_in_one_shot():
    base_p, lambdas, start = nes.smooth(soft("p"), 0.1), nes.sample_lambdas(1000), time.time()
    hyper = wild_hypernetwork(base_p)
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

def test_members_and_shared_weights_learn_from_all_training_images_in_every_epoch_reordered(
        tmp_path, monkeypatch):
    args = settings(tmp_path, "--epochs", "2", "--shared-epochs", "2", "--batch", "240")
    hyper, forward, seen, run = wild_hypernetwork(soft("b"), 1.0), nes.Network.forward, [], []

    def spy(self, x, arch=None):
        if self.training:
            seen.append((x * TOY.std + TOY.mean).mul(255).round().byte().flatten(1))
            run.append(arch)
        return forward(self, x, arch)

    monkeypatch.setattr(nes.Network, "forward", spy)
    nes.train_member("a member", nes.random_architecture(1), 0, TOY, args)
    nes.train_shared("shared", hyper, TOY, args)
    epochs = [tuple(map(bytes, epoch.numpy())) for epoch in torch.cat(seen).split(2160)]
    wanted = sorted(map(bytes, TOY.splits["both"][0].flatten(1).numpy()))
    assert len(set(epochs)) == 4 and all(sorted(epoch) == wanted for epoch in epochs)
    on_dial = set(map(nes.fingerprint, nes.sample(hyper, torch.linspace(0, 1, 4001).tolist())))
    sampled = {nes.fingerprint(arch) for arch in run[18:]}  # one a step
    assert run[:18] == [None] * 18 and sampled <= on_dial and len(sampled) > 9

def test_one_shot_scores_are_of_the_shared_weights_recalibrated_for_each_architecture():
    shared, archs = tiny_net(0), [nes.random_architecture(i) for i in range(2)]
    batches = [TOY.batch("train", 256, step, ("recalibration",))[0] for step in range(8)]
    first, other, again = (nes.one_shot(shared, archs[i], batches) for i in (0, 1, 0))
    probs = [nes.predict(net, TOY.splits["test"][0], TOY) for net in (first, other, again)]
    assert torch.equal(probs[0], probs[2]) and not torch.allclose(probs[0], probs[1], atol=1e-2)
    with torch.no_grad():  # taken anew, a plain average
        means = torch.stack([shared.stem[0](x).mean((0, 2, 3)) for x in batches]).mean(0)
        assert torch.allclose(first.stem[1].running_mean, means, atol=1e-5)
        assert torch.allclose(first.train()(batches[0]), shared(batches[0], archs[0]), atol=1e-4)

def test_the_one_shot_weights_are_the_shared_ones_or_the_searchs_own(finished):
    for name, flags in (("shared", ()), ("hyper", ("--shared-epochs", "0"))):
        args = settings(finished[0], *flags)
        net = nes.shared_network(TOY, args)
        assert same(net.state_dict(), nes.load_network(name, args)["net"])

# ---- 11 metrics, 12 other searches

def test_metrics_by_hand():
    probs = torch.tensor([[[0.8, 0.2], [0.6, 0.4], [0.3, 0.7]],
                          [[0.4, 0.6], [0.2, 0.8], [0.1, 0.9]]])  # (.6, .4), (.4, .6), (.2, .8)
    h = lambda a: -a * math.log(a) - (1 - a) * math.log(1 - a)
    alone = (h(.8) + h(.4) + h(.6) + h(.2) + h(.3) + h(.1)) / 2
    assert nes.ensemble_metrics(probs, torch.tensor([0, 0, 1])) == pytest.approx({
        "accuracy": 2 / 3, "nll": -(math.log(0.6) + math.log(0.4) + math.log(0.8)) / 3,
        "brier": (2 * 0.16 + 2 * 0.36 + 2 * 0.04) / 3,
        # 15 bins: both confidences of 0.6 share a bin, accuracy 1/2; 0.8 has its own, accuracy 1
        "ece": 2 / 3 * 0.1 + 1 / 3 * 0.2, "oracle_accuracy": 1.0, "disagreement": 2 / 3,
        "predictive_jsd": (h(.6) + h(.4) + h(.2) - alone) / 3}, abs=1e-6)

def test_metric_identities():
    probs, labels = torch.randn(4, 200, 5).double().softmax(-1), torch.randint(5, (200,))
    ensemble = nes.ensemble_metrics(probs, labels)
    members = [nes.ensemble_metrics(p[None], labels) for p in probs]
    mean = lambda key: sum(member[key] for member in members) / 4
    spread = (probs - probs.mean(0)).square().sum(-1).mean().item()
    assert mean("brier") - ensemble["brier"] == pytest.approx(spread)
    assert mean("nll") >= ensemble["nll"] and 0 <= ensemble["predictive_jsd"] <= math.log(4)
    copies = nes.ensemble_metrics(probs[:1].repeat(3, 1, 1), labels)
    assert copies == pytest.approx(members[0], abs=1e-12) and copies["disagreement"] == 0
    assert nes.member_metrics(probs[0], labels) == {
        key: members[0][key] for key in ("accuracy", "nll", "brier", "ece")}

def test_perturbed_changes_as_many_inputs_and_operations_as_the_member_has():
    base, moved = nes.random_architecture("base"), []
    inputs = lambda arch: (arch.sum(-1) * base.sum(-1)).sum()  # those that are the base's
    for i in range(40):
        member = nes.discretise((soft("member", i).log() + (4 - i / 10) * base).softmax(-1))
        arch = nes.perturb(base, member, "key", i)
        assert torch.equal(nes.discretise(arch), arch)  # a finished architecture: two inputs a node
        assert nes.matched_entries(arch, base) == nes.matched_entries(member, base)
        assert inputs(arch) == inputs(member)
        moved.append(16 - inputs(arch))
    assert min(moved) < 2 and max(moved) > 5
    assert torch.equal(nes.perturb(base, base, 7), base)
    assert not torch.equal(nes.perturb(base, member, 7), nes.perturb(base, member, 8))

def test_chance_and_forward_selection():
    archs = torch.stack([nes.random_architecture("chance", i) for i in range(3000)])
    matches = nes.matched_entries(archs, nes.random_architecture(1)).double()
    assert matches.mean().item() == pytest.approx(nes.CHANCE_ENTRIES, abs=0.1)
    labels = torch.tensor([0, 1, 0, 1])
    right, wrong = F.one_hot(labels, 2) * 0.8 + 0.1, F.one_hot(1 - labels, 2) * 0.8 + 0.1
    pool = torch.stack([wrong, right, wrong, right * 0.9 + 0.05])
    assert nes.forward_selection(pool, labels, 2) == [1, 3]

# ---- 14 the run

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
    files = {"ensemble": [member["file"] for member in results["members"]],
             "one_shots": results["one_shots"]["files"]}
    for name, count in (("ensemble", 2), ("one_shots", 3)):
        probs = torch.stack([nes.load(out / file)["test"] for file in files[name]])
        assert len(probs) == count
        assert nes.ensemble_metrics(probs, LABELS["test"]).items() <= results[name].items()

def test_the_ledger_has_a_row_for_each_network_and_each_ensemble(finished):
    out, results = finished
    column = lambda method, key: [row[key] for row in ledger(out, method)]
    counts = {"ours": 2, "chosen": 2, "single": 1, "deep": 2, "random": 2, "perturbed": 2,
              "nes-rs": 4, "darts": 2, "ours, one-shot": 2, "one-shot of 3": 3}
    assert {method: len(ledger(out, method)) for method in results["methods"]} == counts
    bases = [*column("single", "genotype"), *column("deep", "genotype")]
    base, other = map(json.loads, column("darts", "genotype"))
    assert [*map(json.loads, bases), base] == [results["base"]["genotype"]] * 4 and other != base
    assert column("single", "file") == column("deep", "file")[:1]
    assert column("perturbed", "entries") == column("ours", "entries") == [
        str(member["matched_entries"]) for member in results["members"]]
    assert column("random", "genotype") == column("nes-rs", "genotype")[:2]
    for row in ledger(out):
        if row["index"] == "ensemble":
            assert float(row["nll"]) == results["methods"][row["method"]]["nll"]
        else:
            state = nes.load(out / row["file"])
            assert json.loads(row["genotype"]) == nes.genotype(state["network"][4])
            right = (state["test"].argmax(-1) == LABELS["test"]).double().mean().item()
            assert float(row["accuracy"]) == right
    trained = {row["file"] for row in ledger(out) if row["file"].startswith("members")}
    assert len(list((out / "members").iterdir())) == len(trained) < 17  # methods share networks

def test_nes_rs_and_chosen_choose_on_the_selection_split(finished, tmp_path):
    shutil.copytree(finished[0], out := tmp_path / "run")
    files = [out / row["file"] for row in ledger(out, "nes-rs")]
    pool = torch.stack([nes.load(file)["test"] for file in files])
    best_on_test = nes.forward_selection(pool, LABELS["test"], 2)
    worst = [i for i in range(4) if i not in best_on_test]
    shots = sorted((out / "one_shot").iterdir())[-2:]
    for file in [*shots, *(files[i] for i in worst)]:  # look perfect on the selection split
        nes.save(file, nes.load(file) | {"selection": F.one_hot(LABELS["selection"], 6).float()})
    results = run_tiny(out, "--baselines", "nes-rs", "chosen")
    expected = nes.ensemble_metrics(pool[worst], LABELS["test"])["nll"]
    assert results["methods"]["nes-rs"]["nll"] == pytest.approx(expected)
    assert [i for i, row in enumerate(ledger(out, "nes-rs")) if row["chosen"] == "1"] == worst
    chosen = {Path(row["file"]).stem[:8] for row in ledger(out, "chosen")}
    assert chosen == {file.stem for file in shots}

def test_the_flags_that_no_other_test_gives(tmp_path):
    flags = ("--second-order --objective paper --lambda-max 4 --mirror --crop 2 --search-cells 1 "
             "--cells 3 --shared-epochs 0")
    results = run_tiny(tmp_path, *flags.split())
    assert max(point["lambda"] for point in results["lambda_response"]["points"]) == 4
    assert nes.load(tmp_path / results["members"][1]["file"])["network"][3] == 3
    history = nes.load(tmp_path / "hyper.pt")["history"]
    assert all(row["penalty"] <= 0 for row in history) and history[-1]["step"] == 12  # - lambda JSd
    assert not (tmp_path / "shared.pt").exists()

def test_reloaded_members_and_ensembles_predict_the_same_and_half_trained_ones_are_refused(
        finished, tmp_path):
    (out, results), probs, images = finished, [], TOY.splits["test"][0]
    for member in results["members"]:
        net, data = nes.load_member(out / member["file"])  # no data set, no settings
        probs.append(net(data.normalise(images)).softmax(dim=-1))
        assert torch.allclose(probs[-1], nes.load(out / member["file"])["test"], atol=1e-5)
        assert data.classes == nes.TOY_CLASSES
    assert torch.allclose(nes.load_ensemble(out)(images), torch.stack(probs).mean(0), atol=1e-6)
    shots = [nes.load(out / file)["test"] for file in results["one_shots"]["files"]]
    assert torch.allclose(nes.load_ensemble(out, 3)(images), torch.stack(shots).mean(0), atol=1e-5)
    nes.save(tmp_path / "begun.pt", {"step": 7, "net": {}})  # what a kill leaves
    torch.save({"step": 7, "net": {}}, tmp_path / "old.pt")  # what an older version left
    for words, function, *arguments in (
            ("begun.pt is not trained to the end", nes.load_member, tmp_path / "begun.pt"),
            ("there is no .*none.pt", nes.load_member, tmp_path / "none.pt"),
            ("old.pt was written by another version", nes.load_member, tmp_path / "old.pt"),
            ("finish that run first", nes.load_ensemble, tmp_path),
            ("--one-shots 4", nes.load_ensemble, out, 4)):
        with pytest.raises(nes.NesError, match=words):
            function(*arguments)

def test_more_samples_of_a_finished_run_train_only_the_new_ones(finished, monkeypatch, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    trained, train_member = [], nes.train_member
    monkeypatch.setattr(nes, "train_member", lambda name, arch, i, *rest: (
        trained.append(i), train_member(name, arch, i, *rest)))
    more = run_tiny(tmp_path / "run", "--samples", "4")
    assert trained == [2, 3] and more["members"][:2] == finished[1]["members"]

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
    results = run_tiny(tmp_path / "run", "--baselines", "all")
    assert without_times(results) == without_times(finished[1])
    for file in finished[0].glob("members/*.pt"):
        assert same(nes.load(file)["net"], nes.load(tmp_path / "run/members" / file.name)["net"])

@pytest.mark.parametrize("step", [4, 8])  # half way; and between the last step and the scores
def test_a_member_stopped_at_any_step_goes_on_to_the_same_weights(
        step, finished, tmp_path, monkeypatch):
    name, args = finished[1]["members"][0]["file"][:-3], settings(tmp_path)
    whole = nes.load_network(name, settings(finished[0]))
    train = lambda: nes.train_member(name, whole["network"][4], 0, TOY, args)

    def save_and_stop(path, state, save=nes.save):
        save(path, state)
        if Path(path).suffix == ".pt" and state["step"] == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(nes, "save", save_and_stop)
        train()
    stopped = nes.load_network(name, args)
    assert stopped["step"] == step and "finished" not in stopped
    train()
    again = nes.load_network(name, args)
    assert again["step"] == whole["step"] == 8 and torch.equal(again["test"], whole["test"])
    assert same(again["net"], whole["net"])

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
    next(line for line in process.stdout if line.startswith("members"))
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

def test_two_processes_of_torchrun_give_exactly_what_one_gives_and_another_seed_does_not(
        finished, tmp_path):
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            "--no-python", sys.executable, "-c", f"import nes; nes.POOL = {nes.POOL}; nes.main()",
            *command(tmp_path / "run", "--baselines", "all")[2:]]
    log = subprocess.run(argv, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                         cwd=Path(nes.__file__).parent, text=True).stdout
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert without_times(results) == without_times(finished[1])
    for file in (tmp_path / "run/members").iterdir():  # each was trained once, by one of the two
        assert len(re.findall(f"members/{file.stem} +8/8 ", log)) == 1
    assert run_tiny(tmp_path / "other", "--seed", "1")["ensemble"] != finished[1]["ensemble"]

# ---- 1 settings, and errors for people

@pytest.mark.parametrize("flags, words", [
    (["--nonsense", "1"], ["--nonsense"]), (["--samples", "0"], ["--samples", "0"]),
    (["--samples", "many"], ["many"]), (["--lambda-max", "-1"], ["-1"]),
    (["--lambda-max", "0"], ["--lambda-max"]), (["--lambda-max", "2"], ["--lambda-max"]),
    (["--lr", "nan"], ["--lr", "nan"]), (["--report", "run"], ["--report"]),
    (["--objective", "other"], ["other"]), (["--baselines", "other"], ["other"]),
    (["--device", "abacus"], ["abacus", "cpu"]), (["--device", "cpu:x"], ["cpu:x"]),
    (["--device", "meta"], ["meta"]), (["--dataset", "/no/such/folder"], ["/no/such/folder"]),
    (["--out", "/dev/null/run"], ["/dev/null/run", "--out"]),
    pytest.param(["--device", "cuda"], ["cuda", "cpu"], marks=pytest.mark.skipif(
        torch.cuda.is_available(), reason="there is a GPU"))])
def test_bad_flags(flags, words, bad):
    bad(flags, *words)

def test_help_opens_with_two_examples(capsys):
    with pytest.raises(SystemExit) as stop:
        nes.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and text.count("python nes.py") == 2
    assert text.index("python nes.py") < text.index("--dataset DATASET") < text.index("fmnist)")

def test_bad_folders(bad, tmp_path):
    write_images(tmp_path / "one", classes=("only",))
    bad(["--dataset", f"{tmp_path}/one"], "two or more")
    write_images(tmp_path / "few", count=1)
    bad(["--dataset", f"{tmp_path}/few"], "too few")
    write_images(tmp_path / "two")
    fine = ["--image-size", "16", "--out", f"{tmp_path}/fine", "--dataset"]
    run_tiny("", *fine, f"{tmp_path}/two")
    shutil.copy(tmp_path / "two/train/a/0.png", tmp_path / "two/train/a/1.png")
    bad([*fine, f"{tmp_path}/two/"], f"{tmp_path}/fine", "other images")
    (tmp_path / "two/train/a/5.png").write_bytes(b"not a picture")
    bad(["--dataset", f"{tmp_path}/two"], "5.png", "remove or replace")

def test_damaged_and_missing_data_files(bad, tmp_path, monkeypatch):
    names = [f"{part}-{kind}-ubyte" for part in ("train", "t10k")
             for kind in ("images-idx3", "labels-idx1")]
    raw, package = tmp_path / "FashionMNIST/raw", tmp_path / "package"
    raw.mkdir(parents=True)
    for name in names:
        (raw / name).write_bytes(b"\0\0\x08\x03short")
    fashion = ["--dataset", "fmnist", "--data-dir"]
    bad([*fashion, str(tmp_path)], "FashionMNIST", "delete the damaged files")
    no_network = "http://127.0.0.1:9/"
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "mirrors", [no_network])
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", f"{no_network}nothing")
    monkeypatch.setattr(nes, "DEBIAN_FASHION_MNIST", package)
    bad([*fashion, f"{tmp_path}/new"], "FashionMNIST", "check the network", "dataset-fashion-mnist")
    bad(["--dataset", "cifar10", "--data-dir", str(tmp_path)], "CIFAR10", "check the network")
    package.mkdir()  # now it is installed: found although the download left its folder behind
    for name in names:
        sizes = (60, 28, 28) if "images" in name else (60,)
        header = bytes([0, 0, 8, len(sizes)]) + b"".join(n.to_bytes(4, "big") for n in sizes)
        content = header + bytes(i % 10 for i in range(math.prod(sizes)))
        (package / f"{name}.gz").write_bytes(gzip.compress(content))
    assert (tmp_path / "new/FashionMNIST/raw").exists()
    data = nes.load_data("fmnist", f"{tmp_path}/new")
    assert data.splits["test"][1].tolist() == [i % 10 for i in range(60)]

def test_other_settings_damaged_files_versions_and_nan_lose_nothing(bad, finished, tmp_path):
    shutil.copytree(finished[0], out := tmp_path / "run")
    before, here = {path: path.read_bytes() for path in out.rglob("*.pt")}, ["--out", str(out)]
    bad([*here, "--hyper-lr", "0.1", "--pivots", "9"], "--hyper-lr 0.5 (now 0.1)",
        "--pivots 6 (now 9)")
    args = settings(out)
    nes.base_search("base", TOY, args)  # one who calls the functions may use this folder, too,
    args.search_lr = 0.01
    for call in (lambda: nes.base_search("base", TOY, args),  # but must have its settings
                 lambda: nes.train_member("new", nes.random_architecture(0), 0, TOY, args)):
        with pytest.raises(nes.NesError, match="--search-lr"):
            call()
    victim = out / finished[1]["members"][0]["file"]
    victim.write_bytes(before[victim][:1000])
    bad(here, victim.name, "delete it")
    assert all(path.read_bytes() == content for path, content in before.items() if path != victim)
    victim.unlink()
    settings_file = (out / "settings.json").read_bytes()
    for name in ("base.pt", "hyper.pt", "settings.json"):
        whole = (out / name).read_bytes()
        (out / name).write_bytes(whole[:len(whole) // 2])
        bad(here, name, "delete it")
        (out / name).write_bytes(whole)
    nes.save(out / "settings.json", json.dumps(json.loads(settings_file) | {"version": 1}))
    bad(here, "another version")
    nes.save(out / "settings.json", settings_file)
    assert without_times(run_tiny(out, "--baselines", "all")) == without_times(finished[1])
    bad(["--lr", "1e30"], "not a number", "at step", "--lr")
    assert (tmp_path / "bad/hyper.pt").exists()
    bad(["--search-lr", "1e30", "--out", f"{tmp_path}/nan"], "loss of base", "another --out")

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
    nes.train_member("member", nes.random_architecture(0), 0, data, args)
    probs = nes.load_network("member", args)["test"]
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
