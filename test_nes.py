"""Tests of nes.py against independent computations.

    pytest test_nes.py         # all tests, without a network
    python test_nes.py         # benchmark: a search step of nes.py against the textbook version below
"""
import copy
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

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


if __name__ == "__main__":
    nes.set_up(nes.parse(["--device", "cpu"]))
    benchmark()
