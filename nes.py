"""Neural ensemble search with diversity control, in one file.

  python nes.py --dataset toy --samples 3       a quick test: drawn shapes, a minute or two
  python nes.py --dataset fmnist --samples 5    the method on Fashion-MNIST, with five members

Results go to the run folder, --out. Repeat a command that was stopped, and it resumes.

"Differentiable algorithm for searching ensembles of deep learning models with diversity control"
(Yakovlev, Bakhteev, Petrushina, Babkin), with its objective corrected:

  1  base: by a short DARTS search     min_alpha L_val(w*, alpha), w* = argmin_w L_train(w, alpha)
  2  hypernetwork: it learns a dial, lambda -> alpha(lambda), from the base at 0 to an architecture
     with hardly any of it at 1        min_a E_lambda [L_val(w*, arch) + c (share(arch) - lambda)^2]
     arch: the finished architecture read off alpha(lambda), which the table a makes; share(arch):
     the share of the base's 16 entries that it lacks, its Jensen-Shannon divergence / ln 2
  3  sampling: alpha(lambda_1), ..., alpha(lambda_M) give M architectures, a look-up each
  4  ensemble: the networks' mean      p(y | x) = mean_m p_m(y | x)

Step 1 is sections 1 to 3, step 2 section 4, step 3 section 5, step 4 sections 6 and 7; section 8
has rivals. The rest can wait: data, settings, keeping work, pictures, the run, CPU kernels. Of the
rest the method uses
  rng(*key)            a random generator that depends on `key` alone
  Progress(name, ..)   log rows and checkpoints of a training loop, which resumes after a kill
  save, load           files; file_of, load_finished: those of a finished search or network
  RANK, WORLD, barrier()   which process this is, of how many; wait for all of them
  fail(sentence)       an error, for the user to read
  DepthwiseConv        an nn.Conv2d with a filter for each channel
  gradient_channels_last(x)    x itself, which is faster backward

Letters for shapes: B batch, C channels, H and W height and width, K pivots, M members, N points,
Y classes, O = 7 operations, E = 14 edges of a cell. Whatever says which operations run
(alpha, p, arch) has the shape (2, E, O), first the normal cell, then the reduction cell.
"""
import argparse
import contextlib
import csv
import ctypes
import gzip
import hashlib
import io
import json
import logging
import math
import os
import signal
import sys
import time
import unicodedata
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torchvision
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch import distributed as dist, multiprocessing as mp, nn
from torch.nn import functional as F
from torchvision.transforms import v2

# ---- 1. Architectures as tensors -----------------------------------------------------------------
# An architecture is a tensor arch (2, E, O): arch[kind, edge, operation] is that operation's weight
# there. While DARTS searches it is soft, softmax(alpha), and every operation runs. A finished one
# is 0/1 with 16 ones, its entries: in each cell two inputs for each of 4 nodes, an operation each.
# Architectures stay on the CPU: a network asks which of their numbers are 0, and would wait for a
# GPU to answer.
KINDS = ("normal", "reduction")
NODES = 4                                                                        # of a cell
EDGES = [(source, node) for node in range(NODES) for source in range(node + 2)]  # 0, 1: its inputs
EDGES_OF = [[e for e, (_, end) in enumerate(EDGES) if end == node] for node in range(NODES)]
ENTRIES = 2 * 2 * NODES

def discretise(p):
    """The finished architecture of p (DARTS, section 2.4): a node keeps its two strongest inputs.
    p: (..., 2, E, O), softmax(alpha). Returns 0/1 of that shape. An edge's operation is its most
    probable one, its strength that probability; of equal strengths the lower source comes first."""
    strength, operation = p.detach().max(dim=-1)                                   # (..., 2, E)
    kept = torch.zeros_like(strength)
    for edges in EDGES_OF:
        order = strength[..., edges].sort(dim=-1, descending=True, stable=True).indices
        kept[..., edges] = kept[..., edges].scatter(-1, order[..., :2], 1.0)
    return F.one_hot(operation, p.shape[-1]) * kept.unsqueeze(-1)

def genotype(arch):
    """The entries of a finished architecture, {"normal": [[operation, source], ...], "reduction":
    ...}: two for each node in turn. Sources 0 and 1 are the cell's inputs, n + 2 is node n."""
    return {kind: [[NAMES[o], EDGES[e][0]] for e, o in cell.nonzero().tolist()]
            for kind, cell in zip(KINDS, arch)}

def matched_entries(arch, base):
    """How many entries of finished architectures (..., 2, E, O) are the base's (2, E, O)."""
    return (arch * base).flatten(-base.dim()).sum(dim=-1).long()

# ---- 2. The DARTS cell and the network -----------------------------------------------------------
class FactorizedReduce(nn.Module):
    """Halve H and W without losing pixels: two 1x1 convolutions, stride 2, a pixel apart."""

    def __init__(self, C_in, C, affine):
        super().__init__()
        self.even = nn.Conv2d(C_in, C // 2, 1, stride=2, bias=False)
        self.odd = nn.Conv2d(C_in, C - C // 2, 1, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(C, affine=affine)

    def forward(self, x):
        # Both in the kernel of one dense 2x2 convolution: several times faster on a CPU
        kernel = torch.cat([F.pad(self.even.weight, (0, 1, 0, 1)),
                            F.pad(self.odd.weight, (1, 0, 1, 0))])
        x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
        return self.norm(F.conv2d(x, kernel, stride=2))

def separable(C, taps, stride, affine, dilation=1):
    """A filter for each channel, then a 1x1 convolution across the channels."""
    return nn.Sequential(DepthwiseConv(C, taps, stride, dilation), nn.Conv2d(C, C, 1, bias=False),
                         nn.BatchNorm2d(C, affine=affine))

def sep_conv(C, taps, stride, affine):
    return nn.Sequential(
        separable(C, taps, stride, affine), nn.ReLU(), separable(C, taps, 1, affine))

# DARTS's operations. Its eighth, "zero", only lowers an edge's weight during the search; a finished
# architecture never has it, so it is left out. Operations with parameters are given relu(x), the
# others x. Departure from DARTS: pools keep their batch norm in finished networks, too. To add an
# operation, add a line here and choose a new --out: the files of a run hold alpha's shape.
OPERATIONS = {
    "max_pool_3x3": lambda C, stride, affine: nn.Sequential(
        nn.MaxPool2d(3, stride, 1), nn.BatchNorm2d(C, affine=False)),
    "avg_pool_3x3": lambda C, stride, affine: nn.Sequential(
        nn.AvgPool2d(3, stride, 1, count_include_pad=False), nn.BatchNorm2d(C, affine=False)),
    "skip_connect": lambda C, stride, affine: (
        nn.Identity() if stride == 1 else FactorizedReduce(C, C, affine)),
    "sep_conv_3x3": lambda C, stride, affine: sep_conv(C, 3, stride, affine),
    "sep_conv_5x5": lambda C, stride, affine: sep_conv(C, 5, stride, affine),
    "dil_conv_3x3": lambda C, stride, affine: separable(C, 3, stride, affine, dilation=2),
    "dil_conv_5x5": lambda C, stride, affine: separable(C, 5, stride, affine, dilation=2)}
NAMES = list(OPERATIONS)

class MixedOp(nn.Module):
    """The mixed operation of an edge (DARTS, eq. 2): sum over o of weights[o] * o(x).
    names: the operations that it holds, in a finished network one or none. forward: x (B, C, H, W);
    weights (O,), of which zeros are not run, None for ones everywhere."""

    def __init__(self, C, stride, affine=False, names=NAMES):
        super().__init__()
        self.ops = nn.ModuleDict({name: OPERATIONS[name](C, stride, affine) for name in names})
        self.rectified = {name for name, op in self.ops.items() if list(op.parameters())}

    def forward(self, x, weights=None):
        names = self.ops if weights is None else [NAMES[o] for o in weights.nonzero()]
        rectified, total = F.relu(x) if self.rectified.intersection(names) else x, 0
        for name in names:
            y = self.ops[name](rectified if name in self.rectified else x)
            total = total + (y if weights is None else weights[NAMES.index(name)] * y)
        return total

class Cell(nn.Module):
    """A cell (DARTS, section 2.1): two inputs and four nodes, each the sum of its edges.
    names: as in MixedOp, for each edge. forward: s0, s1, the last two cells' outputs, rectified;
    arch (E, O) or None. Returns the nodes, concatenated: (B, 4C, H, W), or H/2 and W/2 where it
    reduces."""

    def __init__(self, C_before, C_last, C, reduction, after_reduction, affine, names):
        super().__init__()
        self.reduction = reduction
        align = lambda C_in: nn.Sequential(nn.Conv2d(C_in, C, 1, bias=False),
                                           nn.BatchNorm2d(C, affine=affine))
        self.align0 = FactorizedReduce(C_before, C, affine) if after_reduction else align(C_before)
        self.align1 = align(C_last)
        self.edges = nn.ModuleList(
            MixedOp(C, 2 if reduction and source < 2 else 1, affine, held)
            for (source, _), held in zip(EDGES, names))

    def forward(self, s0, s1, arch=None):
        states = [self.align0(s0), self.align1(s1)]
        for edges in EDGES_OF:
            states.append(gradient_channels_last(sum(self.edges[e](
                states[EDGES[e][0]], None if arch is None else arch[e]) for e in edges)))
        return torch.cat(states[2:], dim=1)

class Network(nn.Module):
    """Stem, cells, global mean, linear classifier.

    Of n cells, counted from 0, n // 3 and 2 n // 3 are reduction cells, but never the first. arch:
    None for the supernet, which holds all operations, or a finished architecture, for its 16 alone.
    affine: whether the cells' batch norm has scale and shift, by default in a finished network
    only: in the search's supernet a scale would undo alpha's weighing. forward: x (B, C_in, H, W);
    arch (2, E, O), what to run and with which weights, None for all. Returns logits (B, Y).
    """

    def __init__(self, C_in, classes, C, cells, arch=None, affine=None):
        super().__init__()
        affine = arch is not None if affine is None else affine
        self.config = dict(C_in=C_in, classes=classes, C=C, cells=cells, arch=arch, affine=affine)
        # Departure from DARTS: the stem halves H and W, so that a cell costs a quarter.
        self.stem = nn.Sequential(
            nn.Conv2d(C_in, C, 3, padding=1, bias=False), nn.BatchNorm2d(C), nn.ReLU(inplace=True),
            nn.Conv2d(C, 4 * C, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(4 * C))
        holds = torch.ones(2, len(EDGES), len(NAMES)) if arch is None else arch
        names = [[[NAMES[o] for o in edge.nonzero()] for edge in cell] for cell in holds]
        self.cells = nn.ModuleList()
        C_before, C_last, after_reduction = 4 * C, 4 * C, False
        for i in range(cells):
            reduction = i > 0 and i in (cells // 3, 2 * cells // 3)
            C = 2 * C if reduction else C
            self.cells.append(Cell(C_before, C_last, C, reduction, after_reduction, affine,
                                   names[reduction]))
            C_before, C_last, after_reduction = C_last, 4 * C, reduction
        self.classifier = nn.Linear(C_last, classes)

    def forward(self, x, arch=None):
        out = self.stem(x)                                                    # (B, 4C, H/2, W/2)
        s0 = s1 = F.relu(out)  # rectified here, since the next two cells both read it
        for cell in self.cells:
            out = cell(s0, s1, None if arch is None else arch[int(cell.reduction)])
            s0, s1 = s1, F.relu(out)
        return self.classifier(gradient_channels_last(out).mean(dim=(2, 3)))  # (B, Y)

def build(key, data, C, cells, arch=None, affine=None):
    """A Network for a data set, on its device, whose initial weights depend on `key` alone."""
    torch.manual_seed(rng(*key).initial_seed())
    net = Network(data.shape[0], len(data.classes), C, cells, arch, affine)
    return net.to(data.mean.device, memory_format=torch.channels_last)

# ---- 3. The base search (DARTS) ------------------------------------------------------------------
def second_order_loss(net, w_batch, a_batch, arch, xi):
    """L_val(w', alpha), w' = w - xi grad_w L_train(w, alpha) (DARTS, eq. 6).
    Exact, no finite differences: the inner step stays in autograd's graph. arch: (2, E, O),
    softmax(alpha); xi: the inner learning rate."""
    (x, y), (x_val, y_val) = w_batch, a_batch
    names, w = zip(*net.named_parameters())
    gradients = torch.autograd.grad(F.cross_entropy(net(x, arch), y), w, create_graph=True)
    stepped = {name: value - xi * g for name, value, g in zip(names, w, gradients)}
    return F.cross_entropy(torch.func.functional_call(net, stepped, (x_val, arch)), y_val)

def search_step(net, arch, penalty, w_batch, a_batch, w_optimizer, a_optimizer, second_order=False):
    """A step on the weights w, then one on the parameters that made `arch` (DARTS, algorithm 1).
    arch: (2, E, O), differentiable in the parameters of a_optimizer; penalty: added to L_val;
    batches: (x, y). Returns the losses. Departures from DARTS: w steps first, so the w' of the
    second order is one further step, on the same w_batch."""
    (x, y), (x_val, y_val) = w_batch, a_batch
    train_loss = F.cross_entropy(net(x, arch.detach()), y)
    w_optimizer.zero_grad()
    train_loss.backward()
    nn.utils.clip_grad_norm_(net.parameters(), 5.0)
    w_optimizer.step()

    net.requires_grad_(second_order)  # the first order needs arch's gradient alone: half the work
    xi = w_optimizer.param_groups[0]["lr"]
    loss = (second_order_loss(net, w_batch, a_batch, arch, xi) if second_order
            else F.cross_entropy(net(x_val, arch), y_val))
    a_optimizer.zero_grad()
    (loss + penalty).backward(inputs=a_optimizer.param_groups[0]["params"])
    net.requires_grad_(True)
    a_optimizer.step()
    return {"train": train_loss, "validation": loss, "penalty": penalty}

def search(name, net, architecture, rate, steps, propose, data, args, second_order=False):
    """The loop of both searches: `search_step` on a batch of train and one of validation.
    architecture: the module whose parameters give alpha; propose(step): (arch, penalty),
    differentiable in them. Departures from DARTS: Adam's rate falls, too; it has no weight decay.
    """
    w_optimizer = torch.optim.SGD(net.parameters(), args.search_lr, 0.9, weight_decay=3e-4)
    a_optimizer = torch.optim.Adam(architecture.parameters(), rate, (0.5, 0.999))
    progress = Progress(name, steps, {"net": net, "architecture": architecture,
                        "w_optimizer": w_optimizer, "a_optimizer": a_optimizer}, data, args)
    net.train()
    for step in range(progress.done, steps):
        batches = [data.batch(split, args.batch, step, (args.seed, name, split))
                   for split in ("train", "validation")]
        for optimizer, lr in ((w_optimizer, args.search_lr), (a_optimizer, rate)):
            optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
        losses = search_step(net, *propose(step), *batches, w_optimizer, a_optimizer, second_order)
        progress.log(step, **losses)
    progress.finish()

def base_search(name, data, args):
    """Step 1 of the method: DARTS trains a supernet and alpha; returns it and softmax(alpha).
    The default, 150 steps, is .36 of an epoch on Fashion-MNIST: a base, hardly an optimum. In a
    trial 600 steps, too, gave nothing measurably better than random architectures."""
    net = build((args.seed, name), data, args.search_channels, cells=2)  # a cell of either kind
    alpha = 1e-3 * torch.randn(2, len(EDGES), len(NAMES), generator=rng(args.seed, name))
    architecture = nn.ParameterDict({"alpha": alpha})
    propose = lambda step: (architecture["alpha"].softmax(dim=-1), torch.zeros(()))
    search(name, net, architecture, args.alpha_lr, args.base_steps, propose, data, args,
           args.second_order)
    return net, architecture["alpha"].detach().softmax(dim=-1)

# ---- 4. The Jensen-Shannon divergence and the hypernetwork ---------------------------------------
# What is trained: at a lambda the hypernetwork gives logits; with some noise they become p, and a
# finished architecture is read off p. That one runs, and two terms judge it:
#     L_val(w, arch)                is it a good one?
#     c (share(arch) - lambda)^2    share: how many of the base's 16 entries it lacks, divided by 16
# Counting is enough: the JSd of two finished architectures is ln 2 times the share. So only
# --objective paper evaluates a JSd in training. That term, - lambda JSd, has no minimum below share
# 1, at any lambda above 0: it pushes for as long as L_val does not resist, and lambda does not set
# a distance. The square has its minimum where the share is lambda.

def jensen_shannon(p, q):
    """JSd(p, q) = 1/2 KL(p || m) + 1/2 KL(q || m), m = (p + q) / 2, over the last dimension, nats.

    p, q: distributions (..., O), broadcast; zeros are allowed. Returns (...), 0 <= JSd <= ln 2.
    From the paper, section 1. With KL(m || p), a common slip, it would have no upper bound.
    """
    tiny = torch.finfo(p.dtype).tiny
    m = (p + q) / 2
    kl = lambda a: (a * (a.clamp_min(tiny).log() - m.clamp_min(tiny).log())).sum(dim=-1)
    return ((kl(p) + kl(q)) / 2).clamp_min(0)  # rounding may leave -1e-7 where p is nearly q

def divergence(arch, base):
    """JSd of finished architectures to the base, mean over the base's 16 entries: 0 to ln 2 nats.

    arch: (..., 2, E, O), base: (2, E, O), 0/1. An edge is a one-hot distribution over operations
    and "none". Where two agree JSd = 0; else m gives 1/2 to either, and JSd = ln 2. So the mean is
    ln 2 times the share of entries that differ.
    """
    none = lambda a: torch.cat([a, 1 - a.sum(dim=-1, keepdim=True)], dim=-1)  # (..., 2, E, O + 1)
    per_edge = jensen_shannon(none(arch), none(base)) * base.sum(dim=-1)
    return per_edge.flatten(1 - base.dim()).sum(dim=-1) / base.sum()

def straight_through(value, p):
    """value + p - stop_gradient(p): `value` forward, the gradient of p backward (as in GDAS).

    Reading a finished arch off p has no gradient. Two forms give it that of p:
        straight_through(arch, p)      at every entry: for the share, since else a base entry that
                                       has left would get no gradient, and could not return
        arch * straight_through(1, p)  at the entries of arch alone: for L_val, so that operations
                                       which are not in arch need not run
    """
    return value + p - p.detach()

def diversity_loss(arch, p, base, lam, strength=30.0):
    """c (share - lambda)^2: the term, added to L_val, that puts the hypernetwork at its lambda.

    share = 1 - sum(base * arch) / sum(base) = divergence(arch, base) / ln 2, straight through: its
    gradient in p is a constant at every entry of the base (JSd's own is infinite there).
    arch = discretise(p); p (..., 2, E, O); base (2, E, O), 0/1; lam (...). Returns (...). Lifted
    out, this and `divergence` work for a base of any dimensions.
    Departure from the paper, whose term is below. Its authors' later code (intsystems/
    2023-Project-120) has a square, too: of lambda less the number of common edges, relaxed.
    After a change to either term choose a new --out: a folder's hyper.pt is not trained again.
    """
    kept = (base * straight_through(arch, p)).flatten(-base.dim()).sum(dim=-1)
    return strength * (1 - kept / base.sum() - lam) ** 2

def paper_diversity_loss(p, smoothed_base, lam):
    """- lambda JSd(alpha*, alpha(lambda)), mean over all edges: the paper's term.
    p: (..., 2, E, O), softmax(alpha(lambda)), without noise; smoothed_base: (2, E, O), alpha*, from
    `smooth`; lam: (...). Returns (...)."""
    return -lam * jensen_shannon(smoothed_base, p).mean(dim=(-2, -1))

TAU = 0.1  # smoothing of the base where it becomes logits, and in the paper's term

def smooth(p, tau):
    """The base as soft distributions: alpha* = (1 - tau) onehot(argmax p) + tau / O on each edge.

    p: (2, E, O), softmax(alpha). Departures from the paper: tau is small (near one, as its text
    says, would erase the architecture), and larger on edges that the base drops (one tau for all
    would forget which edges the base keeps).
    """
    tau = tau + 0.25 * (1 - discretise(p).sum(dim=-1, keepdim=True))            # (2, E, 1)
    return (1 - tau) * F.one_hot(p.argmax(dim=-1), p.shape[-1]) + tau / p.shape[-1]

class HyperNetwork(nn.Module):
    """alpha(lambda): a table of logits for each pivot, and straight lines between them.

    With pivots r_0 = 0 < ... < r_{K-1} = lambda_max, tables a_j and r_j <= lambda <= r_{j+1}:
        alpha(lambda) = (1 - t) a_j + t a_{j+1},    t = (lambda - r_j) / (r_{j+1} - r_j)
    Departure from the paper: its formula has t and 1 - t exchanged, which makes alpha jump at every
    pivot. start: (2, E, O) or any shape, every pivot's first logits. forward: lambda (...), numbers
    or a tensor -> logits (..., 2, E, O). Raises ValueError where one is not in [0, lambda_max].
    """

    def __init__(self, start, pivots=6, lambda_max=1.0):
        super().__init__()
        self.register_buffer("pivots", torch.linspace(0, lambda_max, pivots))              # (K,)
        self.table = nn.Parameter(start.detach().clone().repeat(pivots, *[1] * start.dim()))

    def forward(self, lam):
        lam = torch.as_tensor(lam, dtype=self.table.dtype, device=self.table.device)
        if not ((0 <= lam) & (lam <= self.pivots[-1])).all():
            raise ValueError(f"lambda is not between 0 and {self.pivots[-1]:g}: {lam}")
        j = torch.searchsorted(self.pivots, lam, right=True).clamp(1, len(self.pivots) - 1) - 1
        t = (lam - self.pivots[j]) / (self.pivots[j + 1] - self.pivots[j])
        t = t.view(*t.shape, *[1] * (self.table.dim() - 1))
        return torch.lerp(self.table[j], self.table[j + 1], t)

DRAWS = 16       # lambdas of a step: the network runs at the first, diversity is the mean of all
OVERSHOOT = 0.1  # lambda is drawn from a range this much longer at both ends, and then clamped

def draw_lambdas(count, lambda_max, generator):
    """Lambdas to train at. The overshoot has the end pivots trained as often as the others; leaving
    it out changed nothing measurably."""
    u = torch.rand(count, generator=generator)
    return lambda_max * ((1 + 2 * OVERSHOOT) * u - OVERSHOOT).clamp(0, 1)

def noisy_softmax(logits, noise, generator):
    """softmax(logits + noise * Gumbel): with noise 1 its argmax is a draw from softmax(logits)."""
    gumbel = -torch.empty(logits.shape).exponential_(generator=generator).log()
    return (logits + noise * gumbel).softmax(dim=-1)

def train_hypernetwork(net, base_p, data, args):
    """Step 2 of the method: min over the tables a of E_lambda [L_val(w, arch) + diversity_loss].

    net: the supernet, warm from the base search; base_p: (2, E, O), softmax(alpha) of that search.
    Returns the HyperNetwork. Departures: all pivots start at the base; a step runs one finished
    architecture, like those that will be sampled; the square is averaged over 15 more lambdas.
    """
    base, paper = discretise(base_p), args.objective == "paper"
    # The paper's JSd grows as the base's operation becomes less probable than in alpha*, but also
    # as it becomes more probable. From a start softer than alpha* it becomes less probable.
    hyper = HyperNetwork(smooth(base_p, 0.3 if paper else TAU).log(), args.pivots, args.lambda_max)

    def propose(step):
        """A finished architecture at a fresh lambda, and the diversity term of it and 15 more."""
        generator = rng(args.seed, "hyper", step)
        lams = draw_lambdas(DRAWS, args.lambda_max, generator)
        logits = hyper(lams)                                                     # (DRAWS, 2, E, O)
        p = noisy_softmax(logits, args.noise * (1 - step / args.hyper_steps), generator)
        archs = discretise(p)
        penalty = (paper_diversity_loss(logits.softmax(dim=-1), smooth(base_p, TAU), lams) if paper
                   else diversity_loss(archs, p, base, lams, args.strength))
        return archs[0] * straight_through(1, p[0]), penalty.mean()

    search("hyper", net, hyper, args.hyper_lr, args.hyper_steps, propose, data, args)
    return hyper

# ---- 5. Sampling, and the lambda response: is lambda a dial? -------------------------------------
def sample_lambdas(count, lambda_max=1.0):
    """lambda_i = lambda_max * frac(i * .618...), the golden ratio less 1: spread evenly. A larger
    count keeps the first ones, so their networks stay. The paper draws them at random."""
    return [lambda_max * (i * (math.sqrt(5) - 1) / 2 % 1) for i in range(count)]

def sample(hyper, lambdas):
    """Step 3 of the method: the finished architectures (M, 2, E, O) at M lambdas, a look-up."""
    return discretise(hyper(lambdas).softmax(dim=-1))

def lambda_response(hyper, base_p, lambdas=None):
    """What `sample` gives at each lambda, by default at eleven from 0 to lambda_max, for JSON.

    Of each point: the genotype; entries, how many are the base's; share, 1 - entries / 16, which is
    `divergence` / ln 2. dial_error: the mean of |share - lambda|, at best .014 at eleven lambdas,
    since entries are whole. It divides lambda by a lambda_max above 1, as the paper's may be.
    """
    base, lambda_max = discretise(base_p), hyper.pivots[-1].item()
    lambdas = torch.linspace(0, lambda_max, 11).tolist() if lambdas is None else lambdas
    points = [{"lambda": lam, "entries": matched_entries(arch, base).item(),
               "share": divergence(arch, base).item() / math.log(2), "genotype": genotype(arch)}
              for lam, arch in zip(lambdas, sample(hyper, lambdas))]
    errors = [abs(point["share"] - point["lambda"] / max(1, lambda_max)) for point in points]
    return {"points": points, "dial_error": sum(errors) / len(errors)}

# How many of the base's 16 entries a random architecture has: 1.5. It has each of the base's two
# inputs of node n, in two cells, with probability 2 / (n + 2), and then the operation with 1 / O.
CHANCE_ENTRIES = sum(2 * 2 * 2 / (node + 2) / len(NAMES) for node in range(NODES))

# ---- 6. Members, trained from scratch; and one shot, with weights that all share -----------------
def train(name, net, epochs, key, data, args, arch_at=lambda step: None):
    """Train a network on the split "both": one recipe for every method. AdamW's learning rate
    rises for a fifth of the steps, then falls to 0. key: names the batches' order; arch_at(step):
    what `net` is to run then. Returns the `Progress`, which the caller finishes."""
    adam = torch.optim.AdamW(net.parameters(), args.lr, (0.9, 0.99), weight_decay=0.05, fused=True)
    steps = max(epochs, epochs * len(data.splits["both"][1]) // args.batch)
    progress = Progress(name, steps, {"net": net, "optimizer": adam}, data, args)
    net.train()
    for step in range(progress.done, steps):
        # Without the 0.01 the first step's rate would be 0
        rise, fall = step / steps / 0.2 + 0.01, (1 - step / steps) / (1 - 0.2)
        adam.param_groups[0]["lr"] = args.lr * min(rise, fall)
        x, y = data.batch("both", args.batch, step, key)
        loss = F.cross_entropy(net(x, arch_at(step)), y)
        adam.zero_grad()
        loss.backward()
        adam.step()
        progress.log(step, train=loss)
    return progress

@torch.no_grad()
def predict(net, images, data):
    """Probabilities (N, Y) of images (N, C, H, W) uint8, on the CPU. Leaves net in eval mode."""
    net.eval()
    return torch.cat([net(data.normalise(x)).softmax(dim=-1).cpu() for x in images.split(500)])

def network_state(net, data):
    """What the file of a finished network holds: all for `load_member`, and its probabilities."""
    probs = {split: predict(net, data.splits[split][0], data) for split in ("selection", "test")}
    return probs | {"network": net.config, "net": net.state_dict(), "classes": data.classes,
                    "mean": data.mean.cpu(), "std": data.std.cpu(), "shape": data.shape}

def fingerprint(arch):
    """Eight hexadecimal digits that name an architecture."""
    return hashlib.sha256(json.dumps(genotype(arch)).encode()).hexdigest()[:8]

def train_member(name, arch, index, data, args):
    """Train a finished architecture from scratch; <out>/<name>.pt holds it then. index: its place
    in its method's list, which alone decides its initial weights and the order of its batches."""
    key = (args.seed, "member", index)
    net = build(key, data, args.channels, args.cells, arch)
    progress = train(name, net, args.epochs, key, data, args)
    progress.finish(**network_state(net, data))

def train_shared(name, hyper, data, args):
    """Train one supernet of the members' size, by their recipe, at a fresh lambda each step: the
    search's own is smaller, and was trained while the dial still changed. Only part of the dial is
    used: its members are better than those of the whole."""
    key, top = (args.seed, name), args.shared_part * args.lambda_max
    net = build(key, data, args.channels, args.cells, affine=True)
    progress = train(name, net, args.shared_epochs, key, data, args, lambda step: sample(
        hyper, draw_lambdas(1, top, rng(*key, step)))[0])
    progress.finish()
    return net

def one_shot(shared, arch, batches):
    """A finished network with the shared weights of its operations: no training at all.
    shared: a supernet; arch: (2, E, O), 0/1; batches: normalised images, from which batch norm's
    statistics are recomputed, since they differ between architectures."""
    net, weights = Network(**shared.config | {"arch": arch}), shared.state_dict()
    net.load_state_dict({name: weights[name] for name in net.state_dict()})
    net.to(next(shared.parameters()).device)
    torch.optim.swa_utils.update_bn(batches, net)  # the plain average over them
    return net.eval()

def make_one_shot(name, shared, arch, data, args):
    """The one-shot network of an architecture; <out>/<name>.pt holds it then."""
    start, key = time.monotonic(), (args.seed, "recalibration")
    batches = (data.batch("train", 256, step, key, augment=False)[0] for step in range(20))
    state = network_state(one_shot(shared, arch, batches), data)
    save(file_of(name, args), state | {"seconds": time.monotonic() - start})

# ---- 7. The ensemble and its metrics -------------------------------------------------------------
class Ensemble(nn.Module):
    """Step 4 of the method: p(y | x) = mean_m p_m(y | x).
    members, data: as from `load_member`. forward: images (B, *data.shape) uint8, on the members'
    device -> probabilities (B, Y) of data.classes. Raises NesError for other shapes or types."""

    def __init__(self, members, data):
        super().__init__()
        self.members, self.data = nn.ModuleList(members), data

    def forward(self, images):
        if images.dtype != torch.uint8 or images.shape[1:] != self.data.shape:
            fail(f"images must be uint8 and (B, *{self.data.shape}): see read_image")
        probs = {net: predict(net, images, self.data) for net in set(self.members)}
        return torch.stack([probs[net] for net in self.members]).mean(dim=0)

BINS = 15  # of confidence, for ECE and the reliability picture

def confidence_bins(confidence):
    """(N,) in [0, 1] -> the bin of each, 0 to BINS - 1; a bin holds its upper end."""
    return (confidence * BINS).ceil().long().clamp(1, BINS) - 1

def ensemble_metrics(probs, labels):
    """Metrics of the ensemble p = mean_m p_m; for one network give it probs (1, N, Y).

    probs: (M, N, Y); labels: (N,). Raises ValueError for other than probabilities. Returns floats:
        accuracy            share of points with argmax p = y
        nll                 - mean log p(y), nats: first the average, then the logarithm
        brier               mean over points of sum_k (p_k - 1[y = k])^2, in [0, 2]
        ece                 sum over 15 equal bins of max p of (share of points in the bin)
                            |confidence - accuracy|
        oracle_accuracy     share of points that at least one member gets right
        disagreement        mean over pairs of members of the share of points with different argmax
        predictive_jsd      H(p) - mean_m H(p_m), nats, in [0, ln M]
    To add a metric, add a line here: tables, ledger.csv and results.json follow.
    """
    probs = probs.double()
    if not (probs.min() >= 0 and ((probs.sum(dim=-1) - 1).abs() < 0.01).all()):
        raise ValueError("probs must be probabilities, of logits the softmax, and without NaN")
    p, votes = probs.mean(dim=0), probs.argmax(dim=-1)                             # (N, Y), (M, N)
    (M, N), (confidence, choice) = votes.shape, p.max(dim=-1)
    gaps = confidence_bins(confidence).bincount(confidence - (choice == labels).double(), BINS)
    # Of all N M^2 (point, member, member), those that agree; in N M of them a member meets itself
    agree = F.one_hot(votes, p.shape[-1]).sum(dim=0).square().sum().item()
    entropy = lambda q: torch.special.entr(q).sum(dim=-1).mean(dim=-1)
    return {"accuracy": (choice == labels).double().mean().item(),
            "nll": F.nll_loss(p.clamp_min(1e-12).log(), labels).item(),
            "brier": (p - F.one_hot(labels, p.shape[-1])).square().sum(dim=-1).mean().item(),
            "ece": (gaps.abs().sum() / N).item(),
            "oracle_accuracy": (votes == labels).any(dim=0).double().mean().item(),
            "disagreement": (N * M * M - agree) / max(1, N * M * (M - 1)),
            "predictive_jsd": (entropy(p) - entropy(probs).mean()).item()}

def forward_selection(probs, labels, count):
    """Choose `count` networks of a pool, one by one: each time the one that lowers the ensemble's
    NLL most, as in NES-RS (Zaidi et al., 2021). probs: (P, N, Y); labels: (N,). Returns indices."""
    chosen = []
    for _ in range(count):
        rest = [i for i in range(len(probs)) if i not in chosen]
        chosen.append(min(rest, key=lambda i: ensemble_metrics(probs[chosen + [i]], labels)["nll"]))
    return chosen

# ---- 8. Other ensemble searches ------------------------------------------------------------------
def random_architecture(*key):
    """Two random inputs of each node, a random operation each: what random strengths give."""
    return discretise(torch.rand(2, len(EDGES), len(NAMES), generator=rng(*key)))

def perturb(base, member, *key):
    """The base with as many entries changed at random as `member` has: the control for the dial.
    It keeps as many of the base's inputs as member does, and as many of its operations there. So
    random architectures, which the base biases, are drawn until one has these two numbers."""
    inputs = lambda arch: (arch.sum(dim=-1) * base.sum(dim=-1)).sum(dim=(-2, -1))
    entries = lambda arch: matched_entries(arch, base)
    generator = rng(*key)
    draw = lambda O: torch.rand(1000, 2, len(EDGES), O, generator=generator)
    in_base = base.sum(dim=-1, keepdim=True) > 0                                  # (2, E, 1)
    while True:  # a thousand at a time
        kept = in_base & (draw(1) < inputs(member) / ENTRIES)                     # (1000, 2, E, 1)
        dropped = in_base & ~kept
        same_operation = kept & (draw(1) < entries(member) / inputs(member))
        # Random strengths are in [0, 1]: a bias of 1 makes a kept edge win its place, -1 makes a
        # dropped one lose it, and 1 more makes the base's operation win on its edge.
        bias = kept.float() - dropped.float() + same_operation * base             # (1000, 2, E, O)
        archs = discretise(draw(len(NAMES)) + bias)
        alike = (inputs(archs) == inputs(member)) & (entries(archs) == entries(member))
        if alike.any():
            return archs[alike.nonzero()[0, 0]]

def random_architectures(count, args):
    return [random_architecture(args.seed, "random", i) for i in range(count)]

def darts_searches(base, ours, data, args):
    """As many DARTS searches as members, independent of each other; the base is the first."""
    names = ["base", *(f"base-{i}" for i in range(1, args.samples))]
    for name in names[RANK::WORLD]:
        base_search(name, data, args)
    barrier()  # then all of them are there, to be loaded
    return names, [discretise(base_search(name, data, args)[1]) for name in names]

# The rivals: name -> a function that returns the names of the searches it needs, and architectures.
# From more than --samples of them `forward_selection` chooses. To add a baseline, add a line here.
BASELINES = {
    "single": lambda base, ours, data, args: (["base"], [base]),
    "deep": lambda base, ours, data, args: (["base"], [base] * args.samples),
    "random": lambda base, ours, data, args: ([], random_architectures(args.samples, args)),
    "perturbed": lambda base, ours, data, args: (["base"], [
        perturb(base, arch, args.seed, "perturbed", i) for i, arch in enumerate(ours)]),
    "nes-rs": lambda base, ours, data, args: ([], random_architectures(2 * args.samples, args)),
    "darts": darts_searches}

# ---- 9. Data: one uint8 tensor, four named splits ------------------------------------------------
# train       L_train: for the weights of a search        } together "both": a member learns from
# validation  L_val: for alpha and the hypernetwork       } both, as its architecture is fixed
# selection   for choices between finished networks: NES-RS's, and ours between recipes
# test        for the scores; nothing is chosen by it, since that would flatter the result
SHARES = {"train": 0.45, "validation": 0.45, "selection": 0.10}
# To add a data set of torchvision that has .data, .targets and .classes, add a line here.
TORCHVISION = {"fmnist": torchvision.datasets.FashionMNIST, "cifar10": torchvision.datasets.CIFAR10}
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
KNOWN = f"{', '.join(TORCHVISION)}, toy, or a folder of train/<class>/* and test/<class>/*"

class Data(NamedTuple):
    """Images with their splits, and how a network expects them."""
    splits: dict         # name -> (images (N, C, H, W) uint8, labels (N,) int64)
    classes: list        # names
    mean: torch.Tensor   # (C, 1, 1), of the train split, pixels scaled to [0, 1]
    std: torch.Tensor
    shape: tuple         # (C, H, W)
    crop: int = 0        # largest shift of a training image, pixels
    mirror: bool = False
    digest: str = ""     # of pixels, labels and classes: a run folder notices other data

    def normalise(self, images):
        """(B, C, H, W) uint8 -> float, mean 0 and std 1 in each channel, channels_last."""
        x = (images.float() / 255 - self.mean.to(images.device)) / self.std.to(images.device)
        return x.contiguous(memory_format=torch.channels_last)

    def batch(self, split, size, step, key, augment=True):
        """Batch `step` of endless epochs over a split: images (B, C, H, W), labels (B,). `key`
        decides each epoch's order; its last, incomplete batch is dropped."""
        images, labels = self.splits[split]
        size = min(size, len(labels))
        epoch, position = divmod(step, len(labels) // size)
        order = torch.randperm(len(labels), generator=rng(*key, "epoch", epoch))
        chosen = order[position * size:][:size].to(labels.device)
        x = images[chosen]
        if augment and (self.crop or self.mirror):
            torch.manual_seed(rng(*key, "augment", step).initial_seed())
            change = v2.Compose([v2.RandomCrop(self.shape[1:], self.crop, padding_mode="edge"),
                                 v2.RandomHorizontalFlip(0.5 * self.mirror)])
            x = torch.stack([change(image) for image in x])
        return self.normalise(x), labels[chosen]

def load_data(dataset, data_dir="data", image_size=32, seed=0, device="cpu", crop=0, mirror=False):
    """A data set, its training part split at random by `seed` into the shares above.
    dataset: one of KNOWN; "./toy" is a folder. Raises NesError where it cannot be read."""
    if dataset == "toy":
        train, test, classes = toy(2400, "train"), toy(600, "test"), TOY_CLASSES
    elif dataset in TORCHVISION:
        train, test, classes = read_torchvision(TORCHVISION[dataset], Path(data_dir))
    else:
        train, test, classes = read_folder(Path(dataset), image_size)
    digest = hashlib.sha256()
    for part in (*train, *test):
        digest.update(part.flatten().numpy())
    digest.update(repr(classes).encode())
    order = torch.randperm(len(train[1]), generator=rng(seed, "splits"))
    sizes = [int(share * len(order)) for share in SHARES.values()]
    if not all(sizes):
        fail(f"{dataset} has {len(order)} training images, too few for three splits: it needs 20")
    # The images are put in order once, and the splits are views of them: none is stored twice
    train = [part[order[:sum(sizes)]].to(device) for part in train]
    splits = dict(zip(SHARES, zip(*(part.split(sizes) for part in train))))
    splits["both"] = tuple(part[:sum(sizes[:2])] for part in train)
    splits["test"] = tuple(part.to(device) for part in test)
    pixels = splits["train"][0].float().div_(255)
    std, mean = torch.std_mean(pixels, dim=(0, 2, 3), keepdim=True)
    return Data(splits, classes, mean[0], std[0].clamp_min(1e-3), tuple(pixels.shape[1:]), crop,
                mirror, digest.hexdigest()[:8])

def read_torchvision(dataset_class, root):
    """Train and test part, (images (N, C, H, W), labels) each, and the classes of a data set, from
    `root`; else Fashion-MNIST from Debian's package; else downloaded to `root`."""
    parts, raw = [], root / "FashionMNIST" / "raw"
    try:
        for archive in DEBIAN_FASHION_MNIST.glob("*.gz"):
            if dataset_class == TORCHVISION["fmnist"] and not (raw / archive.stem).exists():
                save(raw / archive.stem, gzip.decompress(archive.read_bytes()))
        for train in (True, False):
            part = dataset_class(root, train=train, download=True)  # only what is not there
            images = torch.as_tensor(part.data).view(*part.data.shape[:3], -1).permute(0, 3, 1, 2)
            parts.append((images.contiguous(), torch.as_tensor(part.targets)))
    except Exception as error:  # no network, no room, or whatever a damaged file raises
        fail(f"cannot read or download {dataset_class.__name__} in {root} ({error}): check the "
             "network, delete the damaged files, or install Debian's dataset-fashion-mnist")
    return *parts, part.classes

def read_image(path, shape):
    """An image file as uint8, resized to `shape`, (C, H, W) with one channel for grey; rotated as
    its EXIF tag says, and white where it is transparent. Raises NesError."""
    try:
        image = Image.open(path)
        image.load()
        with contextlib.suppress(Exception):  # damaged metadata of an intact picture
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode[0] in "IF":  # Pillow would turn these white
            raise ValueError(f"its pixels are {image.mode}, not 8 bits")
        if getattr(image, "has_transparency_data", True):  # an old Pillow lacks it
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        image = v2.functional.resize(image.convert("RGB"), shape[1:])
        return v2.functional.pil_to_tensor(image.convert("L") if shape[0] == 1 else image)
    except Exception as error:  # a damaged image raises OSError, SyntaxError or ValueError
        fail(f"cannot read the image {path} ({error}): remove or replace it")

def read_folder(root, size):
    """Images of root/{train,test}/<class>, resized to (size, size); grey if all of them are.
    Hidden files and those that Pillow cannot read are skipped."""
    readable = {end for end, name in Image.registered_extensions().items() if name in Image.OPEN}
    hidden = lambda path: any(part.startswith((".", "@eaDir", "__MACOSX")) for part in path.parts)
    files = [path.relative_to(root) for part in ("train", "test")
             for path in root.glob(f"{part}/*/**/*") if path.is_file()]
    paths = [path for path in files if path.suffix.lower() in readable and not hidden(path)]
    paths.sort(key=lambda path: path.parts)  # Windows would order paths without regard to case
    say(f"{root}: {len(paths)} images; {len(files) - len(paths)} other files are skipped")
    # File systems store an accented letter as one character or as two; NFC makes it one
    class_of = lambda path: unicodedata.normalize("NFC", path.parts[1])
    parts = [[path for path in paths if path.parts[0] == part] for part in ("train", "test")]
    train, test = ({class_of(path) for path in part} for part in parts)
    if train != test or len(train) < 2:
        fail(f"--dataset {root} must be {KNOWN}, with the same two or more classes in both: "
             f"{len(train & test)} are in both, {sorted(train - test)} only in train, "
             f"{sorted(test - train)} only in test")
    images, damaged, classes = [], [], sorted(train)
    for part in parts:
        images.append(torch.empty(len(part), 3, size, size, dtype=torch.uint8))
        for i, path in enumerate(part):
            try:
                images[-1][i] = read_image(root / path, (3, size, size))
            except NesError as error:
                damaged.append(str(error))
            if (i + 1) % 1000 == 0:
                say(f"{i + 1} of {len(part)} images of {path.parts[0]} are read")
    if damaged:
        fail("; ".join(damaged[:5]) + f"; ... {len(damaged)} in all" * (len(damaged) > 5))
    if all((x == x[:, :1]).all() for x in images):
        images = [x[:, :1].contiguous() for x in images]
    labels = [torch.tensor([classes.index(class_of(path)) for path in part]) for part in parts]
    return *zip(images, labels), classes

TOY_CLASSES = ["disc", "ring", "square", "diamond", "plus", "cross"]

def toy(count, *key):
    """Noisy drawings of six shapes: images (count, 1, 16, 16) uint8 and labels (count,)."""
    generator = rng("toy", *key)
    draw = lambda low, high: low + (high - low) * torch.rand(count, 1, 1, generator=generator)
    axis, size = torch.arange(16.0), draw(3, 6)
    u = ((axis.view(1, 16, 1) - draw(5, 10)) / size).abs()   # (count, 16, 1), 1 at the shape's edge
    v = ((axis.view(1, 1, 16) - draw(5, 10)) / size).abs()
    radius, box = (u * u + v * v).sqrt(), torch.maximum(u, v)
    shapes = torch.stack([radius < 1, (radius < 1) & (radius > 0.6), box < 0.9, u + v < 1.2,
                          (torch.minimum(u, v) < 0.3) & (box < 1),
                          ((u - v).abs() < 0.35) & (box < 1)])
    labels = torch.randint(len(TOY_CLASSES), (count,), generator=generator)
    ink = shapes[labels, torch.arange(count)] * draw(40, 90) * draw(-1, 1).sign()
    noise = 25 * torch.randn(count, 16, 16, generator=generator)
    return (128 + ink + noise).clamp(0, 255).byte()[:, None], labels

# ---- 10. Settings --------------------------------------------------------------------------------
ACCELERATOR = torch.accelerator.current_accelerator(check_available=True)
DEVICES = ["cpu", ACCELERATOR.type] if ACCELERATOR else ["cpu"]
SETTINGS = [  # name, default, lowest value or the choices, what it is
    # what to run
    ("dataset", "fmnist", None, KNOWN),
    ("samples", 5, 1, "members of the ensemble"),
    ("one-shots", 20, 1, "members of the ensemble in one shot"),
    ("baselines", [], ("all", *BASELINES), "other ensembles to train, too; see section 8"),
    ("seed", 0, 0, "of all random numbers"),
    ("device", "auto", ("auto", *DEVICES), "auto: an accelerator if there is one, else cpu"),
    ("workers", 0, 0, "processes that train networks on a CPU; 0: one per core"),
    ("out", "", None, "run folder; if empty, runs/<dataset>-<objective>-<seed>"),
    # the data
    ("data-dir", "data", None, "where torchvision's data sets are, or are downloaded to"),
    ("image-size", 32, 8, "side to which a folder's images are resized, pixels"),
    ("crop", 0, 0, "largest random shift of a training image, pixels"),
    ("mirror", False, None, "mirror half of the training images; not for digits or text"),
    # the searches
    ("search-channels", 8, 2, "channels of the supernet's first cell"),
    ("base-steps", 150, 1, "steps of the base search (DARTS)"),
    ("hyper-steps", 1000, 1, "steps of the hypernetwork's training"),
    ("search-lr", 0.05, 0, "learning rate of the weights; this and the next two fall to 0"),
    ("alpha-lr", 0.01, 0, "learning rate of alpha in the base search"),
    ("hyper-lr", 0.06, 0, "learning rate of the hypernetwork"),
    ("second-order", False, None, "base search by the exact second-order gradient"),
    # diversity
    ("objective", "target", ("target", "paper"), "c (share - lambda)^2 or - lambda JSd"),
    ("lambda-max", 1.0, 1e-6, "the largest lambda"),
    ("strength", 30.0, 0, "c, of the target objective"),
    ("pivots", 6, 2, "K, pivots of the hypernetwork"),
    ("noise", 0.3, 0, "scale of the Gumbel noise at the start; it falls to 0"),
    # the members, and the shared weights
    ("channels", 16, 2, "channels of a member's first cell"),
    ("cells", 2, 2, "cells of a member"),
    ("epochs", 5, 1, "epochs of a member's training"),
    ("shared-epochs", 12, 0, "epochs of the one-shot weights; 0: the search's own"),
    ("shared-part", 0.5, 0, "part of the dial, from lambda 0, that one shot uses"),
    ("batch", 64, 2, "images of a step, in searches, too"),
    ("lr", 0.006, 0, "a member's largest learning rate")]
# Two commands may share a run folder and differ in these; other images change the data's digest
FREE = {"dataset", "samples", "one_shots", "baselines", "device", "workers", "out", "data_dir"}

def parse(argv=None):
    """The settings, from a command line. Raises NesError for an invalid flag."""
    parser = argparse.ArgumentParser("nes.py", "nes.py [flags]", __doc__.partition('"Diff')[0],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: fail(f"{message}; see --help")
    argv = argv if argv is None else [str(word) for word in argv]
    for name, default, allowed, text in SETTINGS:
        kind = {bool: {"action": "store_true"}, list: {"choices": allowed, "nargs": "*"},
                str: {"choices": allowed}}.get(type(default), {"type": type(default)})
        parser.add_argument(f"--{name}", default=default, help=f"{text} (%(default)s)", **kind)
    if parser.parse_args(argv).dataset == "toy":
        parser.set_defaults(base_steps=60, hyper_steps=400, epochs=8, shared_epochs=8, channels=8)
    args = parser.parse_args(argv)
    for name, default, lowest, _ in SETTINGS:
        value = vars(args)[name.replace("-", "_")]
        if type(default) in (int, float) and not lowest <= value < math.inf:
            parser.error(f"--{name} is {value}, but must be finite and at least {lowest}")
    if args.lambda_max > 1 and args.objective == "target":
        parser.error("--lambda-max is at most 1 with --objective target, whose lambda is a share")
    if args.shared_part > 1:
        parser.error("--shared-part is at most 1, the whole dial")
    args.baselines = list(BASELINES) if "all" in args.baselines else args.baselines
    args.out = args.out or f"runs/{Path(args.dataset).resolve().name}-{args.objective}-{args.seed}"
    args.device = DEVICES[-1] if args.device == "auto" else args.device
    return args

def set_up(args):
    """Join the other processes of a torchrun, or of the process group that the caller made."""
    global RANK, WORLD, barrier
    RANK, WORLD, barrier = 0, 1, lambda: None
    available = dist.is_available()  # some builds of torch lack it
    if available and dist.is_torchelastic_launched() and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(days=7))  # they wait for one another
    if available and dist.is_initialized():
        RANK, WORLD, barrier = dist.get_rank(), dist.get_world_size(), dist.barrier
        if args.device == "cuda":
            local = int(os.environ.get("LOCAL_RANK", RANK))
            torch.cuda.set_device(local % torch.cuda.device_count())  # some may share one
    elif os.environ.get("WORLD_SIZE", "") not in ("", "1"):
        fail("WORLD_SIZE is set, but not by torchrun: start nes.py by torchrun, or unset it")

# ---- 11. Keeping work: errors are sentences, randomness has keys, results outlive the process ----
VERSION = 4  # of the files in a run folder

class NesError(Exception):
    """What went wrong and what to do, in one sentence. `main` prints it and ends with status 2."""

def fail(sentence):
    raise NesError(" ".join(sentence.split()))  # one line, even if a library's message has more

def rng(*key):
    """A random generator that depends on `key` alone, for example (seed, "batch", epoch).
    No random state is carried from step to step, so that a resumed run has none to restore. numpy's
    numbers and torch's name the same generator as Python's."""
    plain = tuple(part.item() if hasattr(part, "item") else part for part in key)
    digest = hashlib.sha256(repr(plain).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

def save(path, state):
    """Write a checkpoint (.pt) or bytes to a Path; a kill leaves the old file or the new one."""
    part = path.with_name(f"{path.name}.nes-{os.urandom(8).hex()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".pt":
            torch.save({"version": VERSION, **state}, part)
        else:
            part.write_bytes(state)
        part.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        fail(f"cannot write {path} ({error}): make room, or choose another --out or --data-dir")

def remove_parts(folder):
    """Remove what a kill or a full disk left of `save`: a part that is an hour old."""
    for part in Path(folder).rglob("*.nes-*.part"):
        with contextlib.suppress(OSError):  # another process was here first, or it is not ours
            if time.time() - part.stat().st_mtime > 3600:
                part.unlink()

def load(path, missing=""):
    """What `save` wrote to a .pt or .json file. Where there is none: None, or an error that says
    `missing`. Raises NesError."""
    try:
        content = io.BytesIO(Path(path).read_bytes())
        if str(path).endswith(".json"):
            return dict(json.load(content))
        state = torch.load(content, map_location="cpu", weights_only=True)
        if dict(state)["version"] != VERSION:  # a bare tensor has none, either
            raise ValueError
        return state
    except (FileNotFoundError, NotADirectoryError):
        return fail(missing) if missing else None
    except OSError as error:
        fail(f"cannot read {path} ({error.strerror}): check the path and its permissions")
    except Exception as error:  # a damaged zip, pickle or JSON file raises almost anything
        fail(f"{path} is damaged, or of another version of nes.py ({type(error).__name__}): if a "
             "run wrote it, delete it and repeat the command")

def file_of(name, args):
    """Where a finished search or network is; what is still in training is unfinished/<name>."""
    return Path(args.out) / f"{name}.pt"

def load_finished(name, args):
    return load(file_of(name, args), f"{file_of(name, args)} is missing: all processes and "
                "machines of a run must share --out; repeat the command to make it again")

def check_settings(data, args):
    """Refuse a run folder of other settings, images or operations; else note these there."""
    path = Path(args.out) / "settings.json"
    now = {"version": VERSION, "images": data.digest, "operations": NAMES}
    now |= {f"--{k.replace('_', '-')}": v for k, v in vars(args).items() if k not in FREE}
    before = load(path)
    if before is None:
        return save(path, json.dumps(now, indent=1).encode())
    if changed := [f"{k} {before.get(k)} (now {now[k]})" for k in now if before.get(k) != now[k]]:
        fail(f"{args.out} holds a run with {', '.join(changed)}: choose another --out")

class Progress:
    """Log rows and checkpoints of a training loop, which resumes where a kill stopped it:

        progress = Progress(name, steps, {"net": net, "optimizer": optimizer}, data, args)
        for step in range(progress.done, steps):
            ...
            progress.log(step, train=loss)
        progress.finish()  # writes <out>/<name>.pt; before that there is unfinished/<name>.pt

    Modules and optimizers are loaded from the file that is there. It holds them, "step", "seconds"
    and "history", a list of {"step": ..., loss: mean}; the finished one is without optimizers.
    """

    def __init__(self, name, steps, parts, data, args):
        check_settings(data, args)
        self.name, self.steps, self.parts, self.sums = name, steps, parts, {}
        self.final, self.unfinished = file_of(name, args), file_of(f"unfinished/{name}", args)
        begin = {"step": 0, "seconds": 0.0, "history": []}
        self.state = load(self.final) or load(self.unfinished) or begin
        for part in parts.keys() & self.state.keys():
            parts[part].load_state_dict(self.state[part])
        self.done, self.start = self.state["step"], time.monotonic() - self.state["seconds"]
        if 0 < self.done < steps:
            print(f"{name}: resumes after step {self.done} of {steps}")

    def log(self, step, **losses):
        """Call it at the end of each step, counted from 0. Every 100 steps, or some fifteen times
        in fewer than 1,500, it prints the losses' means as a row and writes a checkpoint."""
        done = step + 1
        self.sums = {key: self.sums.get(key, 0) + loss.detach() for key, loss in losses.items()}
        if done % max(1, min(100, self.steps // 15)) and done < self.steps:
            return
        count = done - self.state["step"]
        means = {key: float(total) / count for key, total in self.sums.items()}
        words = "  ".join(f"{key} {value:.3f}" for key, value in means.items())
        if not all(map(math.isfinite, means.values())):
            fail(f"the loss of {self.name} is not a number at step {done}: lower --lr (in a search "
                 "--search-lr, --alpha-lr or --hyper-lr), in another --out")
        seconds = time.monotonic() - self.start
        print(f"{self.name:<19}{done:>6}/{self.steps:<6}{words}   "
              f"{seconds * (self.steps / done - 1):5.0f} s left")
        history = [*self.state["history"], {"step": done, **means}]
        self.state = {part: module.state_dict() for part, module in self.parts.items()}
        self.state |= {"step": done, "seconds": seconds, "history": history}
        self.sums = {}
        save(self.unfinished, self.state)

    def finish(self, **result):
        """Write the finished file, with `result` in it."""
        if not self.final.exists():
            kept = {part: value for part, value in self.state.items() if "optimizer" not in part}
            save(self.final, kept | result)
        self.unfinished.unlink(missing_ok=True)  # another process may have been here first

def load_hypernetwork(folder):
    """The HyperNetwork of a run folder: `sample` reads an architecture off it at any lambda."""
    state = load(Path(folder) / "hyper.pt", f"{folder} holds no hyper.pt: run nes.py first")
    kept = state["architecture"]
    hyper = HyperNetwork(kept["table"][0], len(kept["pivots"]), kept["pivots"][-1].item())
    hyper.load_state_dict(kept)
    return hyper

def load_member(path):
    """A finished network from its file alone: (net, data), on the CPU, net in eval mode.
    data has no images, but tells how the network expects them: probs = net(data.normalise(
    images)).softmax(-1), images (B, *data.shape) uint8; probs[:, k] belongs to data.classes[k]."""
    state = load(path, f"there is no {path}: results.json names the file of each member")
    if "network" not in state:
        fail(f"{path} holds no finished network: choose a file of members/ or one_shot/")
    net = Network(**state["network"])
    net.load_state_dict(state["net"])
    return net.eval(), Data({}, state["classes"], state["mean"], state["std"], state["shape"])

def load_ensemble(folder, one_shots=0):
    """The Ensemble of a run folder: its trained members, or its first `one_shots` in one shot."""
    results = load(Path(folder) / "results.json", f"{folder} has no results: finish its run")
    shots = results["one_shots"]["files"]
    if not 0 <= one_shots <= len(shots):
        fail(f"{folder} has {len(shots)} one-shot networks, not {one_shots}: see --one-shots")
    files = shots[:one_shots] or [member["file"] for member in results["members"]]
    loaded = {file: load_member(Path(folder) / file) for file in set(files)}  # one shots repeat
    return Ensemble([loaded[file][0] for file in files], loaded[files[0]][1])

# ---- 12. Pictures --------------------------------------------------------------------------------
def plot_cell(axis, entries, base=(), title=""):
    """A cell, to be read from top to bottom: a column for each input and node.
    entries: of one kind, as `genotype` lists them. Each is an arrow from its source's column to its
    node's, with its operation on it, orange where it is not in `base`. Below its two arrows a node
    holds their sum; at the bottom all nodes are concatenated."""
    style, height = {"ha": "center", "va": "center", "fontsize": 7.5}, 3
    box, bottom = {"boxstyle": "round", "fc": "lightgrey", "ec": "grey"}, -height * NODES - 0.3
    for column, label in enumerate(["c[k-2]", "c[k-1]", *(f"node {n}" for n in range(NODES))]):
        top = min(1.5, height * (2 - column))  # an input's column; or where a node's arrows end
        axis.plot([column, column], [top, bottom], color="lightgrey", lw=1, zorder=0)
        axis.text(column, 1.5 if column < 2 else top - 1.8, label, bbox=box, **style)
    for i, (name, source) in enumerate(entries):
        node, y = i // 2 + 2, -height * (i // 2) - i % 2
        color = "tab:orange" if base and [name, source] not in base[i // 2 * 2:][:2] else "tab:blue"
        axis.plot([source, node - 0.05], [y, y], color=color, lw=2, marker=">", markevery=[1])
        axis.text((source + node) / 2, y + 0.42, name, color=color, **style)
    axis.text(3.5, bottom, "c[k]: the four nodes, concatenated", bbox=box, **style)
    axis.set(xlim=(-0.5, 5.5), ylim=(bottom - 0.6, 2.1), title=title)
    axis.axis("off")

def plot_response(axis, points, members):
    """Entries that are the base's against lambda: of `lambda_response`'s points, and members."""
    for rows, style, label in ((points, "o-", "hypernetwork"), (members, "D", "members")):
        read = lambda key: [row[key] for row in rows]
        axis.plot(read("lambda"), read("entries"), style, label=label)
    end = points[-1]["lambda"]
    axis.plot([0, end], [ENTRIES, ENTRIES * (1 - min(1, end))], ":", color="grey", label="ideal")
    axis.axhline(CHANCE_ENTRIES, ls="--", color="grey", label="chance")
    axis.set(xlabel="lambda", ylabel=f"entries of {ENTRIES} that are the base's", title="The dial")
    axis.legend(fontsize=8)

def plot_reliability(axis, probs, labels):
    """Accuracy against confidence in bins: on the diagonal they are equal."""
    confidence, choice = probs.mean(dim=0).max(dim=-1)
    bins = confidence_bins(confidence)
    means = lambda v: [v[bins == b].double().mean() for b in bins.unique()]
    axis.plot([0, 1], [0, 1], ":", color="grey", label="calibrated")
    axis.plot(means(confidence), means(choice == labels), "o-", label="ensemble")
    axis.set(xlabel="confidence", ylabel="accuracy", title="Reliability of the ensemble")
    axis.legend(fontsize=8)

def plot_disagreement(axis, networks):
    """Does lambda move predictions, too? The share of test images on which a network and the one at
    lambda = 0 disagree. networks: label -> (rows of the ledger, that of lambda = 0 first; probs)"""
    for label, (rows, probs) in networks.items():
        votes = probs.argmax(dim=-1)                                                   # (M, N)
        shares = (votes != votes[0]).double().mean(dim=-1)
        axis.plot([row["lambda"] for row in rows], shares, "o", label=label)
    axis.set(xlabel="lambda", ylabel="share of test images", ylim=(0, None),
             title="Disagreement with lambda = 0")
    axis.legend(fontsize=8)

def save_pictures(results, one_shots, labels, args):
    """results.png: the dial, predictions along it, ensemble size, reliability; cells.png: the first
    20 members. one_shots: the ledger's rows of the networks in one shot."""
    members, base = results["members"], results["base"]["genotype"]
    figures = {"results": Figure((18, 4), layout="constrained"),
               "cells": Figure((11, 4.2 * len(members[:20])), layout="constrained")}
    dial, predictions, size, reliability = figures["results"].subplots(1, 4)
    plot_response(dial, results["lambda_response"]["points"], members)
    predictions.sharex(dial)
    probs, shots = (torch.stack([load(Path(args.out) / row["file"])["test"] for row in rows])
                    for rows in (members, one_shots))
    plot_disagreement(predictions, {"trained": (members, probs), "in one shot": (one_shots, shots)})
    plot_reliability(reliability, probs, labels)
    counts = range(1, len(members) + 1)
    together = [ensemble_metrics(probs[:count], labels)["accuracy"] for count in counts]
    size.plot(counts, together, "o-", label="the first members together")
    size.plot(counts, [member["accuracy"] for member in members], "x", label="each alone")
    size.set(xlabel="members", ylabel="test accuracy", title="Ensemble size")
    size.xaxis.get_major_locator().set_params(integer=True)
    size.legend(fontsize=8)
    cells = figures["cells"].subplots(len(members[:20]), 2, squeeze=False)
    for row, member in zip(cells, members):
        for axis, kind in zip(row, KINDS):
            title = f"lambda {member['lambda']:.2f}, {kind} cell; orange is not in the base's"
            plot_cell(axis, member["genotype"][kind], base[kind], title)
    for name, figure in figures.items():
        figure.savefig(png := io.BytesIO(), dpi=110)
        save(Path(args.out) / f"{name}.png", png.getvalue())

# ---- 13. The run ---------------------------------------------------------------------------------
# A run is one process or several, ranks of this program. They share nothing but files and a
# barrier: the first searches, then each trains its part of the networks. Results do not depend on
# how many there are, if the search has the same threads (torchrun sets OMP_NUM_THREADS=1).
RANK, WORLD = 0, 1      # the number of this process, from 0, and how many there are
barrier = lambda: None  # waits until all of them have called it

def say(text):
    if RANK == 0:
        print(text)

def run(args, is_worker=False):
    """All steps of the method, in order, as one rank. Results go to the folder args.out."""
    if hasattr(sys.stdout, "reconfigure"):  # do not fail on what the terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    say("settings: " + "  ".join(f"{name}={value}" for name, value in vars(args).items()))
    remove_parts(args.out)
    if RANK > 0:
        barrier()  # the first rank searches, then the others find its files
    data = load_data(args.dataset, args.data_dir, args.image_size, args.seed, args.device,
                     args.crop, args.mirror)
    if is_worker:
        keep_freed_memory()
    net, base_p = base_search("base", data, args)
    base = discretise(base_p)
    hyper = train_hypernetwork(net, base_p, data, args)
    if RANK == 0:
        barrier()  # lets the others begin
    response = lambda_response(hyper, base_p)
    print_table(response["points"], ["lambda", "entries"])
    say(f"\ndial error, the mean of |share that differs - lambda|: {response['dial_error']:.4f}")
    if args.device == "cpu":  # small kernels gain little from a second thread, and results should
        torch.set_num_threads(1)  # not depend on the number of cores
    rows = plan(base, hyper, data, args)
    make_networks(rows, net, hyper, data, args)
    if RANK == 0:
        report(score(rows, data, args), response, base, data, args)
    barrier()

def plan(base, hyper, data, args):
    """The networks to make, a row each: ours first, one shot last. `score` adds files and metrics,
    which makes them ledger.csv. searches: the searches and shared weights that the method needs."""
    lambdas = {"ours": sample_lambdas(args.samples, args.lambda_max),
               "one-shot": sample_lambdas(args.one_shots, args.shared_part * args.lambda_max)}
    ours, shots = (sample(hyper, some) for some in lambdas.values())
    shared = ["shared"] if args.shared_epochs else []
    methods = {"ours": (["base", "hyper"], ours)}
    methods |= {method: BASELINES[method](base, ours, data, args) for method in args.baselines}
    methods |= {"one-shot": (["base", "hyper", *shared], shots)}
    return [{"dataset": args.dataset, "seed": args.seed, "method": method, "index": i,
             "lambda": lambdas[method][i] if method in lambdas else "",
             "entries": matched_entries(arch, base).item(), "genotype": genotype(arch),
             "arch": arch, "searches": searches,
             "name": f"one_shot/{fingerprint(arch)}" if method == "one-shot"
             else f"members/{fingerprint(arch)}-{i}"}
            for method, (searches, archs) in methods.items() for i, arch in enumerate(archs)]

def make_networks(rows, net, hyper, data, args):
    """Make the rows' networks, each rank its part. The first rank makes all that are in one shot; a
    member goes to the rank with the fewest epochs so far; one that methods share is trained once.
    net: the search's supernet, whose weights serve in one shot where --shared-epochs is 0."""
    missing = lambda row: not file_of(row["name"], args).exists()
    if RANK == 0:
        shared = train_shared("shared", hyper, data, args) if args.shared_epochs else net
        shots = [row for row in rows if row["method"] == "one-shot"]
        for row in filter(missing, shots):
            make_one_shot(row["name"], shared, row["arch"], data, args)
        print_table(score(shots, data, args)[-1:], ["method", "accuracy", "nll", "ece"])
    members = {row["name"]: row for row in rows if row["method"] != "one-shot"}
    epochs = [args.shared_epochs] + [0] * (WORLD - 1)  # of each rank
    for name, row in members.items():
        rank = epochs.index(min(epochs))
        epochs[rank] += args.epochs
        if rank == RANK and missing(row):
            train_member(name, row["arch"], row["index"], data, args)
    barrier()

def score(rows, data, args):
    """The ledger: the rows of `plan` with their networks' metrics, and after each method's rows one
    for its ensemble. seconds: of a network its training, of an ensemble all that the method needs,
    added up over processes."""
    labels, ledger = data.splits["test"][1].cpu(), []
    for method in dict.fromkeys(row["method"] for row in rows):
        found = [row for row in rows if row["method"] == method]
        files = [load_finished(row["name"], args) for row in found]
        probs, chosen = torch.stack([file["test"] for file in files]), list(range(len(files)))
        if method in BASELINES and len(files) > args.samples:
            chosen = forward_selection(torch.stack([file["selection"] for file in files]),
                                       data.splits["selection"][1].cpu(), args.samples)
        networks = [{key: row[key] for key in row if key not in ("arch", "searches", "name")} | {
            "file": f"{row['name']}.pt", "chosen": int(i in chosen), "seconds": file["seconds"],
            **ensemble_metrics(file["test"][None], labels)}
            for i, (row, file) in enumerate(zip(found, files))]
        needed = {*found[0]["searches"], *(row["name"] for row in found)}
        ledger += [*networks, {
            "dataset": args.dataset, "seed": args.seed, "method": method, "index": "ensemble",
            "seconds": round(sum(load_finished(name, args)["seconds"] for name in needed)),
            **ensemble_metrics(probs[chosen], labels),
            "member_mean": sum(networks[i]["accuracy"] for i in chosen) / len(chosen)}]
    return ledger

def report(ledger, response, base, data, args):
    """Write results.json, ledger.csv and the pictures; print tables. ledger: of `score`."""
    of = lambda method: [row for row in ledger if row["method"] == method and "file" in row]
    ensembles = {row["method"]: row for row in ledger if "file" not in row}
    results = {
        "settings": vars(args) | {"images": data.digest},
        "versions": {"python": sys.version, "torch": torch.__version__},
        "base": {"genotype": genotype(base)},
        "lambda_response": response, "members": of("ours"), "methods": ensembles,
        "ensemble": ensembles["ours"],
        "one_shots": ensembles["one-shot"] | {"files": [row["file"] for row in of("one-shot")]}}
    save(Path(args.out) / "results.json", json.dumps(results, indent=1).encode())
    table = csv.DictWriter(text := io.StringIO(), [*ledger[0], "member_mean"], lineterminator="\n")
    table.writeheader()
    table.writerows({key: json.dumps(value) if key == "genotype" else value
                     for key, value in row.items()} for row in ledger)
    save(Path(args.out) / "ledger.csv", text.getvalue().encode(errors="backslashreplace"))
    save_pictures(results, of("one-shot"), data.splits["test"][1].cpu(), args)
    print_table(of("ours"), ["index", "lambda", "entries", "accuracy", "nll", "ece"])
    print_table(ensembles.values(), list(ensembles["ours"])[2:])
    say(f"\nresults are in {args.out}")

def print_table(rows, columns):
    """Some columns of rows, dicts, as Markdown."""
    lines = [columns, *([f"{row[key]:.4f}" if isinstance(row[key], float) else str(row[key])
                         for key in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    say("\n" + "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines))

def start_ranks(count, args):
    """Run this program as `count` processes on this machine, until all end or one fails."""
    logging.getLogger(mp.spawn.__module__).setLevel("ERROR")  # its warning that it ends the others
    context, others = mp.get_context("spawn"), mp.active_children()
    try:
        wait_for_all, errors = context.Barrier(count), context.SimpleQueue()
        mp.spawn(run_rank, (wait_for_all, errors, count, args), count, daemon=True)
    except (OSError, ImportError) as error:  # no semaphores: /dev/shm is full, or not there
        fail(f"this system cannot start several processes ({error}): add --workers 1")
    except RuntimeError:  # this process is a rank, and the script that it imported has no guard
        sys.exit(1)
    except mp.ProcessExitedException as error:
        if error.exit_code == 2:
            raise errors.get()
        if error.exit_code < 0:
            fail(f"{error}: repeat the command, with fewer --workers if memory ran out")
        fail('call nes.main under `if __name__ == "__main__":` in your file, or add --workers 1')
    finally:  # an interrupt that only this process hears ends the others, too
        for process in set(mp.active_children()) - set(others):
            process.kill()
            process.join()

def run_rank(rank, wait_for_all, errors, count, args):
    """Run one rank, which ends when its parent does."""
    global RANK, WORLD, barrier
    RANK, WORLD, barrier = rank, count, wait_for_all.wait
    # When the parent dies Linux sends SIGINT, which a run in the background would ignore
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        if mp.parent_process().is_alive():  # else it died before Linux was asked for that
            run(args, is_worker=True)
    except (NesError, BrokenPipeError) as error:
        errors.put(error)  # the parent raises the first one
        os._exit(2)

def keep_freed_memory():
    """Have glibc keep freed memory for the next tensor. Otherwise it returns the memory, and the
    system makes each large tensor's pages again: a member's step took 1.16 to 1.20 times as long
    (two threads, two pairs of runs)."""
    with contextlib.suppress(AttributeError, TypeError, OSError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        mallopt(-4, 0)          # M_MMAP_MAX

def main(argv=None):
    """The program: parse the flags, run the method, return the results (what results.json holds).
    An error ends the program with one sentence and exit status 2, Ctrl-C with 130."""
    threads = torch.get_num_threads()
    try:
        args = parse(argv)
        set_up(args)
        work = 1 + args.samples * (1 + len(args.baselines))  # networks, and one shot
        count = min(args.workers or threads, work)
        script = getattr(sys.modules["__main__"], "__file__", __file__)  # ranks import it
        if args.device == "cpu" and WORLD == 1 and count > 1 and os.path.exists(script):
            start_ranks(count, args)
        else:
            run(args)
        return load(Path(args.out) / "results.json")
    except NesError as error:
        print(f"nes.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nnes.py: stopped; repeat the command to resume", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader has seen enough: ... | head
        sys.exit(141)
    finally:
        torch.set_num_threads(threads)  # as the caller had it

# ---- 14. CPU kernels: what makes it fast there; skip at first reading ----------------------------
class DepthwiseGradients(torch.autograd.Function):
    """A depthwise convolution (bias-free, padding "same") whose gradients are forward convolutions.

    With k taps, stride s, dilation d, padding p = d (k - 1) / 2 and output gradient g:
        dL/dx = conv(g with s - 1 zeros between its pixels, flipped w, dilation d, padding p)
        dL/dw = sum_B conv(x, kernel g, stride d, dilation s, padding p), its first k x k values
    Exact. Most of a DARTS step on a CPU is this gradient, and PyTorch's CPU kernels run a depthwise
    convolution with 5 taps or a dilation much faster forward than backward.
    """

    @staticmethod
    def forward(ctx, x, w, stride, dilation):
        ctx.save_for_backward(x, w)
        ctx.stride, ctx.dilation = stride, dilation
        return F.conv2d(x, w, None, stride, dilation * (w.shape[-1] // 2), dilation, groups=len(w))

    @staticmethod
    def backward(ctx, g):
        """dL/dx and, where w learns, dL/dw, as above; g (B, C, H', W') is dL/d(output)."""
        (x, w), s, d = ctx.saved_tensors, ctx.stride, ctx.dilation
        (B, C, H, W), k = x.shape, w.shape[-1]
        p = d * (k // 2)
        spread, gradient_w = g, None
        if s > 1:
            spread = torch.zeros_like(x)
            spread[:, :, ::s, ::s] = g
        if ctx.needs_input_grad[1] and k == 3 and d == 1:  # the one case with a fast kernel
            gradient_w = torch.nn.grad.conv2d_weight(x, w.shape, g, s, p, d, groups=C)
        elif ctx.needs_input_grad[1]:
            image = x.permute(2, 3, 0, 1).reshape(1, H, W, B * C).permute(0, 3, 1, 2)
            kernel = g.reshape(B * C, 1, *g.shape[2:])
            taps = F.conv2d(image, kernel, None, d, p, s, groups=B * C)[:, :, :k, :k]
            gradient_w = taps.reshape(B, C, 1, k, k).sum(0)
        return F.conv2d(spread, w.flip(2, 3), None, 1, p, d, groups=C), gradient_w, None, None

class DepthwiseConv(nn.Conv2d):
    """A depthwise convolution with `taps` x `taps` values, padding "same", no bias."""

    def __init__(self, C, taps, stride, dilation=1):
        super().__init__(C, C, taps, stride, dilation * (taps // 2), dilation, groups=C, bias=False)

    def forward(self, x):
        if x.device.type == "cpu":
            return DepthwiseGradients.apply(x, self.weight, self.stride[0], self.dilation[0])
        return super().forward(x)

def gradient_channels_last(x):
    """x, whose gradient will be channels_last: torch.cat and the mean hand back slices and a
    broadcast scalar, with which every operation upstream would take its slow path."""
    if x.requires_grad:
        x.register_hook(lambda gradient: gradient.contiguous(memory_format=torch.channels_last))
    return x

if __name__ == "__main__":
    main()
