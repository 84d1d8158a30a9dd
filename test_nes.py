"""Tests of nes.py against independent computations, in the order of its sections; none needs a
network: pytest test_nes.py. A search step against the textbook's, timed: python test_nes.py."""
import copy
import csv
import gzip
import json
import math
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations, count, product
from pathlib import Path, PurePath
from unittest.mock import MagicMock, Mock

if __name__ != "__main__":  # the benchmark uses all cores; the tests leave one to the tutorial
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import nbformat
import numpy
import torch
import torch.nn.functional as F
import torchvision
from nbclient import NotebookClient
from PIL import Image, PngImagePlugin
from pytest import approx, fixture, mark, raises
from torch.optim.optimizer import register_optimizer_step_pre_hook

import nes

# ---- the textbook supernet: each operation of each edge by itself, NCHW, gradients of everything.
# w: an iterator over a nes.Network's weights, which come in the order in which they are used here

norm = lambda x: F.batch_norm(x, None, None, training=True)
align = lambda x, w: norm(F.conv2d(x, next(w)))

def textbook_conv(x, w, stride, dilation=1):
    taps = next(w)
    padding = dilation * (taps.shape[-1] // 2)
    return align(F.conv2d(F.relu(x), taps, None, stride, padding, dilation, x.shape[1]), w)

def textbook_reduce(x, w):
    moved = F.pad(x[:, :, 1:, 1:], (0, 1, 0, 1))
    return norm(torch.cat([F.conv2d(y, next(w), stride=2) for y in (x, moved)], dim=1))

def textbook_op(name, x, w, stride):
    if name == "max_pool_3x3":
        return norm(F.max_pool2d(x, 3, stride, 1))
    if name == "avg_pool_3x3":
        return norm(F.avg_pool2d(x, 3, stride, 1, count_include_pad=False))
    if name == "skip_connect":
        return x if stride == 1 else textbook_reduce(F.relu(x), w)
    x = textbook_conv(x, w, stride, 2 if name.startswith("dil") else 1)
    return textbook_conv(x, w, 1) if name.startswith("sep") else x

def textbook(network, x, arch, kinds):
    """What a nes.Network without an architecture must give; kinds: of its cells, 1 reduces."""
    w, before, last, reduced = iter(network.cells.parameters()), *[network.stem(x)] * 2, 0
    for kind in kinds:
        first, edges = textbook_reduce if reduced else align, iter(arch[kind])
        states = [first(F.relu(before), w), align(F.relu(last), w)]
        for node in range(4):
            terms = [weight * textbook_op(name, states[source], w, 2 if kind and source < 2 else 1)
                     for source in range(node + 2) for name, weight in zip(nes.NAMES, next(edges))]
            states.append(sum(terms))
        before, last, reduced = last, torch.cat(states[2:], dim=1), kind
    assert next(w, None) is None
    return network.classifier(last.mean((2, 3)))

def benchmark(C=16, kinds=(0, 1, 0, 1, 0), batch=64, size=28, rounds=5):
    """Seconds of a weight and an architecture step, nes.py and the textbook in turn; the ratio."""
    torch.manual_seed(0)
    plain = nes.Network(1, 10, C, len(kinds))
    network = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    x, y = torch.randn(batch, 1, size, size), torch.randint(10, (batch,))
    x_last = x.contiguous(memory_format=torch.channels_last)
    alpha, ratios = torch.zeros(2, 14, 7, requires_grad=True), []
    def textbook_steps():
        for _ in range(2):
            loss = F.cross_entropy(textbook(plain, x, alpha.softmax(-1), kinds), y)
            torch.autograd.grad(loss, [alpha, *plain.parameters()])
    def nes_steps():
        F.cross_entropy(network(x_last, alpha.detach().softmax(-1)), y).backward()
        network.requires_grad_(False)
        torch.autograd.grad(F.cross_entropy(network(x_last, alpha.softmax(-1)), y), alpha)
        network.requires_grad_(True)
    for _ in range(rounds + 1):  # the first round warms up
        times = [time.time(), textbook_steps() or time.time(), nes_steps() or time.time()]
        ratios.append((times[1] - times[0]) / (times[2] - times[1]))
        print(f"nes.py {times[2] - times[1]:.2f} s, the textbook {ratios[-1]:.2f} times that")
    print(f"median {sorted(ratios[1:])[rounds // 2]:.2f}, {torch.get_num_threads()} threads")

TINY = ("--dataset toy --samples 2 --one-shots 3 --base-steps 4 --hyper-steps 12 --hyper-lr 0.5 "
        "--epochs 1 --shared-epochs 1 --channels 4 --search-channels 4 --batch 256 "
        "--device cpu --workers 1").split()
TOY = nes.load_data("toy")
IMAGES, LABELS = ({name: part[i] for name, part in TOY.splits.items()} for i in range(2))
TUTORIAL = Path(__file__).with_name("tutorial.ipynb")
tiny = lambda out, *flags: [*TINY, "--out", str(out), *flags]
settings = lambda *flags: nes.parse(tiny(*flags))
run_tiny = lambda *flags: nes.main(tiny(*flags))
command = lambda *flags: [sys.executable, nes.__file__, *tiny(*flags)]
start = lambda argv, on_interrupt: subprocess.Popen(  # in a new session, with what Ctrl-C does
    argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    preexec_fn=lambda: signal.signal(signal.SIGINT, on_interrupt), cwd=TUTORIAL.parent)
tiny_net = lambda *key: nes.build(key, TOY, 4, 2)
soft = lambda *key: torch.randn(2, 14, 7, generator=nes.rng(*key)).softmax(-1)  # an architecture
all_equal = lambda a, b: all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
all_close = lambda a, b, **by: all(torch.allclose(*pair, **by) for pair in zip(a, b, strict=True))

def wild_hypernetwork(base_p, scale=3.0):  # at the base at 0, and after that anywhere
    hyper = nes.HyperNetwork(base_p.log())
    hyper.table.data[1:] += scale * torch.randn(5, 2, 14, 7, generator=nes.rng("wild"))
    return hyper

def without_times(results):  # but with all else, which must be the same in two runs
    kept = {name: v for name, v in results["settings"].items() if name not in nes.FREE}
    return re.sub(r'"seconds": [0-9.e-]+', "", json.dumps(results | {"settings": kept}))

def ledger(out, method=None):  # all rows, or those of a method's networks
    rows = list(csv.DictReader((out / "ledger.csv").open(newline="")))
    return [row for row in rows if row["method"] == method and row["file"]] if method else rows

@fixture(scope="module")
def finished(tmp_path_factory):
    return (out := tmp_path_factory.mktemp("run")), run_tiny(out, "--baselines", "all")

@fixture
def bad(capsys, tmp_path):
    def check(flags, *words):  # they must end it with status 2 and one sentence with these words
        raises(SystemExit, run_tiny, tmp_path / "bad", *flags).match("^2$")
        error = capsys.readouterr().err
        assert re.fullmatch("nes.py: error: .*\n", error) and all(w in error for w in words), error
    return check

def test_splits_are_disjoint_and_complete_and_the_seed_draws_them():
    of = {name: set(map(bytes, x.flatten(1).numpy())) for name, x in IMAGES.items()}
    assert {name: len(found) for name, found in of.items()} == {
        "train": 1080, "validation": 1080, "selection": 240, "test": 600, "both": 2160}
    assert len(set.union(*of.values())) == 3000 and of["both"] == of["train"] | of["validation"]
    assert not torch.equal(IMAGES["train"], nes.load_data("toy", seed=4).splits["train"][0])
    assert TOY.mean.item() == approx((IMAGES["train"].double() / 255).mean().item())
    assert TOY.std.item() == approx((IMAGES["train"].double() / 255).std().item(), 1e-5)
    storage = {IMAGES[name].untyped_storage().data_ptr() for name in (*nes.SHARES, "both")}
    assert len(storage) == 1 and IMAGES["both"][:1080].equal(IMAGES["train"])
    for three in (numpy.int64(3), numpy.uint8(3), torch.tensor(3)):  # numbers are not all Python's
        assert all_equal(*(nes.load_data("toy", seed=n).splits["selection"] for n in (three, 3)))

def test_batches_are_all_images_once_an_epoch_in_a_new_order_shifted_and_mirrored_in_training():
    images, order, seen = torch.arange(8 * 25).byte().view(8, 1, 5, 5), [], set()
    data = nes.Data({"both": (images, torch.arange(8))}, ["a"], torch.zeros(1, 1, 1),
                    torch.ones(1, 1, 1), (1, 5, 5), crop=1, mirror=True)
    for step in range(120):
        x, y = data.batch("both", 2, step, ("k",))  # labels are the images' numbers
        plain, labels = data.batch("both", 2, step, ("k",), augment=False)
        assert torch.equal(y, labels) and torch.allclose(plain * 255, images[y].float())
        order += y.tolist()
        x, padded = (x * 255).round(), F.pad(images[y].float(), (1, 1, 1, 1), mode="replicate")
        for i in range(2):  # next finds the shift and whether it is mirrored, or fails
            seen.add(next((r, c, m) for r in range(3) for c in range(3) for m in range(2)
                          if torch.equal(padded[i, :, r:r + 5, c:c + 5].flip([2] * m), x[i])))
    epochs = {tuple(order[i:i + 8]) for i in range(0, 240, 8)}
    assert all(sorted(e) == [*range(8)] for e in epochs) and len(epochs) == 30 and len(seen) == 18

def test_discretise_on_a_worked_example():
    p = torch.full((2, 14, 7), 0.01)
    p[:, :, 2] = 0.1                                    # everywhere a weak skip_connect
    p[0, 1, 3], p[0, 0, 0] = 0.5, 0.4                   # node 0: both its edges
    p[0, 2, 4], p[0, 3, 1], p[0, 4, 6] = 0.3, 0.6, 0.5  # node 1: sources 1 and 2
    arch = nes.discretise(p)
    skips = [["skip_connect", 0], ["skip_connect", 1]]
    first = [["max_pool_3x3", 0], ["sep_conv_3x3", 1], ["avg_pool_3x3", 1], ["dil_conv_5x5", 2]]
    assert nes.genotype(arch) == {"normal": first + skips * 2, "reduction": skips * 4}
    assert nes.discretise(arch).equal(arch) and set(arch.unique().tolist()) == {0, 1}
    many = torch.stack([soft(i) for i in range(6)]).view(2, 3, 2, 14, 7)
    assert nes.discretise(many)[1, 2].equal(nes.discretise(soft(5)))

@mark.parametrize("taps, stride, dilation, size", [*product((3, 5), (1, 2), (1, 2), (8, 7))])
def test_depthwise_gradients_are_those_of_pytorch(taps, stride, dilation, size):
    x = torch.randn(3, 4, size, size, dtype=torch.double, requires_grad=True)
    conv = nes.DepthwiseConv(4, taps, stride, dilation).double()
    found = conv(x), F.conv2d(x, conv.weight, None, stride, dilation * (taps // 2), dilation, 4)
    gradients = (torch.autograd.grad(y.exp().sum(), [x, conv.weight]) for y in found)
    assert torch.allclose(*found) and all_close(*gradients)
    inputs = x[:1, :, :5, :5], conv.weight[:4], stride, dilation
    assert torch.autograd.gradgradcheck(nes.DepthwiseGradients.apply, inputs)

@mark.parametrize("size", [16, 13])
def test_supernet_and_its_gradients_are_the_textbooks(size):
    net = nes.Network(2, 3, 4, 3).double().to(memory_format=torch.channels_last)
    x, arch = torch.randn(3, 2, size, size).double(), torch.rand(2, 14, 7).double().requires_grad_()
    two = net(x, arch), textbook(net, x, arch, (0, 1, 1))
    assert torch.allclose(*two) and net.classifier.in_features == 4 * 4 * 2 * 2
    assert all_close(*(torch.autograd.grad(y.norm(), [arch, *net.cells.parameters()]) for y in two))

def test_a_finished_network_is_the_supernet_with_its_architecture_also_in_eval_mode():
    arch, x = nes.random_architecture(5), torch.randn(5, 1, 16, 16)
    supernet, finished = nes.Network(1, 4, 4, 3), nes.Network(1, 4, 4, 3, arch)
    missing = finished.load_state_dict(supernet.state_dict(), strict=False).missing_keys
    assert missing and all(key.endswith(("weight", "bias")) for key in missing)  # scale 1, shift 0
    for cell in supernet.cells:  # what has weight 0 is not run
        for e, o in (arch[int(cell.reduction)] == 0).nonzero():
            cell.edges[e].ops[nes.NAMES[o]].forward = None
    for _ in range(2):
        assert torch.allclose(supernet(x, arch), finished(x), atol=1e-5)
        supernet.load_state_dict(finished.state_dict(), strict=False)  # running statistics
        supernet.eval(), finished.eval()

def test_second_order_gradient_against_finite_differences():
    torch.manual_seed(0)
    net, y = nes.Network(1, 3, 2, 1).double(), torch.tensor([0, 1, 2, 0])
    x, x_val = torch.randn(2, 4, 1, 8, 8, dtype=torch.double)
    alpha = torch.randn(2, 14, 7, dtype=torch.double, requires_grad=True)
    def loss(a):  # the definition: copy the network, take the inner step, see the validation loss
        stepped = copy.deepcopy(net)
        F.cross_entropy(stepped(x, a.detach().softmax(-1)), y).backward()
        torch.optim.SGD(stepped.parameters(), 0.5).step()
        return F.cross_entropy(stepped(x_val, a.softmax(-1)), y).item()
    mine = nes.second_order_loss(net, (x, y), (x_val, y), alpha.softmax(-1), 0.5)
    gradient, = torch.autograd.grad(mine, alpha)
    assert mine.item() == approx(loss(alpha))
    for index in [(0, 0, 3), (0, 5, 0), (0, 9, 6), (0, 13, 2)]:
        (step := torch.zeros_like(alpha))[index] = 1e-5
        difference = (loss(alpha + step) - loss(alpha - step)) / 2e-5
        assert gradient[index].item() == approx(difference, rel=1e-3, abs=1e-7)

@mark.parametrize("second", [False, True])
def test_a_round_is_clipped_sgd_on_w_alone_then_adam_on_alpha_alone(second, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip := Mock())  # a Mock clips nothing
    args = settings(tmp_path, "--base-steps", "1", *["--second-order"] * second)
    mine, (net, p) = tiny_net(0, "base"), nes.base_search("base", TOY, args)
    alpha = torch.nn.Parameter(1e-3 * torch.randn(2, 14, 7, generator=nes.rng(0, "base")))
    batches = [TOY.batch(split, 256, 0, (0, "base", split)) for split in ("train", "validation")]
    loss = lambda arch, x, y: F.cross_entropy(mine(x, arch), y)
    loss(alpha.detach().softmax(-1), *batches[0]).backward()
    assert clip.call_args.args[1] == 5.0
    torch.optim.SGD(mine.parameters(), args.search_lr, momentum=0.9, weight_decay=3e-4).step()
    assert all_close(net.parameters(), mine.parameters(), atol=1e-6)
    exact = lambda arch, *_: nes.second_order_loss(mine, *batches, arch, args.search_lr)
    (exact if second else loss)(alpha.softmax(-1), *batches[1]).backward(inputs=[alpha])
    torch.optim.Adam([alpha], args.alpha_lr, betas=(0.5, 0.999)).step()
    assert torch.allclose(p, alpha.softmax(-1), atol=1e-5)

def test_jensen_shannon_and_the_papers_term_which_is_minus_lambda_jsd_of_the_smoothed_base():
    (p, q), js = torch.rand(2, 50, 7, dtype=torch.double).softmax(-1), nes.jensen_shannon
    entropy = lambda v: torch.special.entr(v).sum(-1)
    assert js(p, q).allclose(entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2)
    assert js(p, q).allclose(js(q, p)) and js(p, q).min() > 0 and js(p, q).max() < math.log(2)
    assert js(p, p).abs().max() < 1e-12 and js(*torch.eye(7)[:2]).item() == approx(math.log(2))
    near = torch.rand(1000, 7, generator=nes.rng("near")).softmax(-1)  # float32: rounding shows
    moved = (near.log() + 1e-4 * torch.randn(7)).softmax(-1)
    assert js(near, moved).min() >= 0 and js(near, near + 1e-7).min() >= 0
    logits = torch.tensor([500.0, 0, 0, 0, 0, 0, 0], requires_grad=True)
    assert torch.autograd.grad(js(logits.softmax(-1), torch.eye(7)[0]), logits)[0].isfinite().all()
    base = nes.smooth(soft("p"), 0.1)
    assert base.sum(-1).allclose(torch.ones(2, 14)) and base.max().item() == approx(0.9 + 0.1 / 7)
    assert nes.discretise(base).equal(nes.discretise(soft("p")))
    jsd = js(base, swapped := base.roll(1, dims=-1)).mean().item()
    assert nes.paper_diversity_loss(swapped, base, 2.0).item() == approx(-2 * jsd)

def test_the_diversity_term_is_the_jsd_of_the_finished_architecture_and_pushes_all_entries():
    base = nes.discretise(soft("base"))
    entries = lambda arch: {(kind, i // 2, *entry) for kind, cell in nes.genotype(arch).items()
                            for i, entry in enumerate(cell)}
    p = torch.stack([(soft("other", i).log() + (5 - i / 6) * base).softmax(-1)
                     for i in range(40)]).requires_grad_()  # from the base itself to hardly a trace
    archs, lams = nes.discretise(p), torch.linspace(0, 1, 40)
    kept = torch.tensor([len(entries(arch) & entries(base)) for arch in archs])
    share, jsd = 1 - kept / 16, math.log(2) * (1 - kept / 16)
    assert torch.equal(nes.matched_entries(archs, base), kept) and 16 in kept and kept.min() < 4
    assert nes.divergence(archs, base).allclose(jsd, atol=1e-6)
    assert nes.divergence(archs[20], base).item() == approx(jsd[20].item())
    loss, over = nes.diversity_loss(archs, p, base, lams, 3.0), share - lams
    gradient, = torch.autograd.grad(loss.sum(), p)
    assert torch.allclose(loss, 3 * over**2, atol=1e-5)  # next: at all entries of the base, chosen
    assert torch.allclose(gradient, 6 * over.view(-1, 1, 1, 1) * -base / 16, atol=1e-6)  # or not
    a, q, b = (tensor.flatten(-3, -2) for tensor in (archs, p, base))  # lifted out, a base may
    assert nes.diversity_loss(a, q, b, lams, 3.0).equal(loss)          # have any dimensions
    assert nes.matched_entries(a, b).equal(kept) and nes.divergence(a, b).allclose(jsd, atol=1e-6)

def test_hypernetwork_is_numpys_interpolation_lambdas_are_spread_and_noise_is_gumbels():
    hyper, pivots = nes.HyperNetwork(torch.zeros(2, 14, 7), 5, 4.0), torch.arange(5.0)
    torch.nn.init.normal_(hyper.table)  # at a pivot, its own table; beside it, no jump
    lam = torch.cat([torch.linspace(0, 4, 33), pivots[:-1] + 1e-4, pivots[1:] - 1e-4])
    for mine, table in zip(hyper(lam).detach().flatten(1).T, hyper.table.detach().flatten(1).T):
        assert numpy.allclose(mine, numpy.interp(lam, pivots, table), atol=1e-5)
    hyper(lam).square().sum().backward()
    assert all(hyper.table.grad[k].abs().max() > 0 for k in range(5))
    few, many = nes.sample_lambdas(5, 2.0), nes.sample_lambdas(100, 2.0)
    gaps = torch.tensor(sorted(many) + [2.0]).diff()
    assert many[:5] == few and few[0] == 0 and gaps.max() < 3 * 2.0 / 100 and gaps.min() > 0
    lams = nes.draw_lambdas(4000, 2.0, nes.rng("lambda"))
    assert lams.min() == 0 and lams.max() == 2 and lams.mean().item() == approx(1, abs=0.05)
    assert (lams == 0).double().mean().item() == approx(1 / 12, abs=0.02)  # the overshoot
    logits, noise = torch.tensor([2.0, 1.0, 0.0]).repeat(20000, 1), nes.rng("noise")
    drawn = nes.noisy_softmax(logits, 1.0, noise).argmax(-1).bincount() / 20000
    assert torch.allclose(drawn, logits[0].softmax(-1), atol=0.02)  # the Gumbel trick
    assert torch.allclose(nes.noisy_softmax(logits, 0.0, noise), logits.softmax(-1))

def test_the_validation_loss_reaches_the_hypernetwork_and_diversity_all_its_pivots(tmp_path):
    dense = tiny_net(0)  # next: each entry of arch has a gradient there, if arch lets it
    dense.forward = lambda x, arch, run=dense.forward: run(x, arch) * (arch * soft("any")).sum()
    for net, strength, pivots, edges in (  # L_val alone, and both
            (tiny_net(0), 0, (1, 2), 16), (dense, 0, (1, 2), 16), (tiny_net(0), 30, (6,), 32)):
        args = settings(tmp_path / str(id(net)), "--strength", str(strength), "--hyper-steps", "1")
        hyper = nes.train_hypernetwork(net, soft("b"), TOY, args)
        moved = (hyper.table - nes.smooth(soft("b"), nes.TAU).log()).abs().amax(-1) > 1e-4
        assert moved.any(-1).any(-1).sum() in pivots  # those beside one lambda, or beside sixteen
        assert 0 < moved.any(0).sum() <= edges  # of the finished architecture, and of the base

def test_learning_rates_rise_and_fall_and_the_noise_falls(tmp_path, monkeypatch):
    flags = "--base-steps 20 --hyper-steps 20 --epochs 1 --batch 108".split()  # 20 steps an epoch
    args, rates, step = settings(tmp_path, *flags), {}, numpy.arange(20)
    monkeypatch.setattr(nes, "noisy_softmax", noise := Mock(wraps=nes.noisy_softmax))
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: (
        rates.setdefault(type(optimizer).__name__, []).append(optimizer.param_groups[0]["lr"])))
    nes.train_member("member", nes.random_architecture(0), 0, TOY, args)
    nes.train_hypernetwork(*nes.base_search("base", TOY, args), TOY, args)
    hook.remove()
    fall = (1 + numpy.cos(math.pi * step / 20)) / 2
    rise = numpy.where(step < 4, step / 4 + 0.01, (20 - step) / 16)
    assert rates == {"SGD": approx([*args.search_lr * fall] * 2), "AdamW": approx(args.lr * rise),
                     "Adam": approx([*args.alpha_lr * fall, *args.hyper_lr * fall])}
    assert [call.args[1] for call in noise.call_args_list] == approx(0.3 * (20 - step) / 20)

def test_a_thousand_architectures_in_one_shot_and_the_response_of_a_perfect_and_of_a_flat_dial():
    base_p, lambdas, start = nes.smooth(soft("p"), 0.1), nes.sample_lambdas(1000), time.time()
    archs = nes.sample(hyper := wild_hypernetwork(base_p), lambdas)
    points = nes.lambda_response(hyper, base_p, lambdas)["points"]
    assert time.time() - start < 5 and (points[0]["entries"], points[0]["share"]) == (16, 0)
    assert torch.equal(archs, nes.discretise(torch.stack([*map(hyper, lambdas)]).softmax(-1)))
    assert [p["genotype"] for p in points] == [*map(nes.genotype, archs)]
    assert [p["share"] for p in points] == approx([1 - p["entries"] / 16 for p in points], abs=1e-6)
    kept = nes.discretise(base_p).sum(-1).flatten().nonzero().flatten()
    flat = nes.lambda_response(nes.HyperNetwork(base_p.log()), base_p, [0.0, 0.25, 0.5, 0.75, 1.0])
    assert flat["dial_error"] == approx(0.5)
    for top, entries in ((1.0, 16), (0.5, 8), (4.0, 16)):  # a share, half of it, and beyond
        hyper = nes.HyperNetwork(base_p.log(), entries + 1, top)
        for k in range(entries + 1):  # at pivot k the first k entries have another operation
            flipped = hyper.table.data[k].view(28, 7)
            flipped[kept[:k]] = flipped[kept[:k]].roll(1, dims=-1)
        grid = torch.linspace(0, top, entries + 1).tolist()
        assert nes.lambda_response(hyper, base_p, grid)["dial_error"] < 1e-6
        points = nes.lambda_response(hyper, base_p)["points"]  # by default eleven, over the whole
        assert [p["lambda"] for p in points] == approx([top * tenth / 10 for tenth in range(11)])

def test_members_and_shared_weights_see_all_images_every_epoch_reordered(tmp_path, monkeypatch):
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
    wanted = sorted(map(bytes, IMAGES["both"].flatten(1).numpy()))
    assert len(set(epochs)) == 4 and all(sorted(epoch) == wanted for epoch in epochs)
    half = set(map(nes.fingerprint, nes.sample(hyper, torch.linspace(0, 0.5, 4001))))
    sampled = {nes.fingerprint(arch) for arch in run[18:]}  # one a step
    assert run[:18] == [None] * 18 and sampled <= half and len(sampled) > 9
    net = tiny_net("predicts").train()
    probs, x = nes.predict(net, IMAGES["test"], TOY), TOY.normalise(IMAGES["test"])
    assert not net.training and probs.allclose(net(x).softmax(-1), atol=1e-5)
    assert not probs.allclose(net.train()(x).softmax(-1), atol=1e-3)
    few = settings(tmp_path / "few", "--epochs", "2", "--batch", "4000")  # more than there are
    nes.train_member("few", nes.random_architecture(1), 0, TOY, few)
    assert nes.load_finished("few", few)["step"] == 2  # still one an epoch

def test_one_shot_networks_are_the_shared_weights_recalibrated_for_each(finished, tmp_path):
    shared, archs = tiny_net(0), [nes.random_architecture(i) for i in range(2)]
    batches = [TOY.batch("train", 256, step, ("recalibration",))[0] for step in range(8)]
    shared(batches[0] + 5)  # leaves statistics that must not be taken over
    first, other, again = (nes.one_shot(shared, archs[i], batches) for i in (0, 1, 0))
    probs = [nes.predict(net, IMAGES["test"], TOY) for net in (first, other, again)]
    assert torch.equal(probs[0], probs[2]) and not torch.allclose(probs[0], probs[1], atol=1e-2)
    with torch.no_grad():  # recomputed, a plain average
        means = torch.stack([shared.stem[0](x).mean((0, 2, 3)) for x in batches]).mean(0)
        assert torch.allclose(first.stem[1].running_mean, means, atol=1e-5)
        assert torch.allclose(first.train()(batches[0]), shared(batches[0], archs[0]), atol=1e-4)
    stem, args = "stem.0.weight", settings(tmp_path, "--shared-epochs", "0")  # the search's own
    nes.make_one_shot("shot", shared, archs[0], TOY, args)
    assert torch.equal(nes.load(tmp_path / "shot.pt")["net"][stem], shared.stem[0].weight)
    files = finished[1]["one_shots"]["files"][0], "shared.pt"
    assert torch.equal(*(nes.load(finished[0] / file)["net"][stem] for file in files))

def test_metrics_by_hand_their_identities_and_forward_selection():
    probs = torch.tensor([[[0.8, 0.2], [0.6, 0.4], [0.3, 0.7]],
                          [[0.4, 0.6], [0.2, 0.8], [0.1, 0.9]]])  # (.6, .4), (.4, .6), (.2, .8)
    h = lambda *shares: -sum(a * math.log(a) + (1 - a) * math.log(1 - a) for a in shares)
    assert nes.ensemble_metrics(probs, torch.tensor([0, 0, 1])) == approx({
        "accuracy": 2 / 3, "nll": -(math.log(0.6) + math.log(0.4) + math.log(0.8)) / 3,
        "brier": 2 * (0.16 + 0.36 + 0.04) / 3, "oracle_accuracy": 1.0, "disagreement": 2 / 3,
        "ece": 2 / 3 * 0.1 + 1 / 3 * 0.2,  # a bin of both .6, accuracy 1/2; one of .8, accuracy 1
        "predictive_jsd": (h(.6, .4, .2) - h(.8, .4, .6, .2, .3, .1) / 2) / 3}, abs=1e-6)
    probs, labels = torch.randn(4, 200, 5).double().softmax(-1), torch.randint(5, (200,))
    ensemble, *members = (nes.ensemble_metrics(p, labels) for p in (probs, *probs[:, None]))
    spread = (probs - probs.mean(0)).square().sum(-1).mean().item()
    assert sum(m["brier"] for m in members) / 4 - ensemble["brier"] == approx(spread)
    assert sum(m["nll"] for m in members) / 4 >= ensemble["nll"]
    pairs = [(p != q).double().mean() for p, q in combinations(probs.argmax(-1), 2)]
    assert ensemble["disagreement"] == approx(sum(pairs).item() / 6)
    with torch.autograd.profiler.profile(profile_memory=True) as seen:  # next: M N, not M M N
        nes.ensemble_metrics(torch.full((300, 1000, 2), 0.5), torch.zeros(1000).long())
    assert max(event.cpu_memory_usage for event in seen.key_averages()) < 100 * 300 * 1000
    (missing := probs.clone())[0, 0, 0] = math.nan
    for wrong in (probs.log(), 100 * probs, probs / 2, missing, 1.1 - probs):
        raises(ValueError, nes.ensemble_metrics, wrong, labels).match("must be probabilities")
    copies = nes.ensemble_metrics(probs[:1].repeat(3, 1, 1), labels)
    assert copies == approx(members[0], abs=1e-12) and copies["disagreement"] == 0
    right = torch.tensor([[.5, .5, .9, .5], [.9, .9, .2, .9], [.85, .85, .2, .85], [.1] * 4])
    pool = torch.stack([1 - right, right], dim=-1)  # network 2 is the second best alone, but
    assert nes.forward_selection(pool, torch.ones(4).long(), 4) == [1, 0, 2, 3]  # too like 1

def test_random_architectures_match_by_chance_and_perturbed_ones_just_as_the_member_does():
    archs = torch.stack([nes.random_architecture("chance", i) for i in range(3000)])
    base, moved = nes.random_architecture("base"), []
    assert abs(nes.matched_entries(archs, base).double().mean() - nes.CHANCE_ENTRIES) < 0.1
    matched = lambda arch: ((arch.sum(-1) * base.sum(-1)).sum(), nes.matched_entries(arch, base))
    for i in range(40):
        member = nes.discretise((soft("member", i).log() + (4 - i / 10) * base).softmax(-1))
        arch = nes.perturb(base, member, "key", i)
        assert matched(arch) == matched(member) and nes.discretise(arch).equal(arch)  # finished
        moved.append(16 - matched(arch)[0])
    assert min(moved) < 2 and max(moved) > 5 and torch.equal(nes.perturb(base, base, 7), base)
    assert not torch.equal(nes.perturb(base, member, 7), nes.perturb(base, member, 8))

def test_a_run_leaves_what_it_promises_and_a_ledger_row_for_each_network_and_ensemble(finished):
    out, results = finished
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    assert {"cells.png", "results.png", "base.pt", "shared.pt"} <= {*os.listdir(out)}
    metrics = set(nes.ensemble_metrics(torch.eye(2)[None], torch.tensor([0, 1])))
    assert metrics <= results["ensemble"].keys() & results["one_shots"].keys()
    assert metrics | {"lambda", "genotype", "entries", "file"} <= results["members"][0].keys()
    for part, keys in (
            (results, "settings versions base lambda_response members methods one_shots ensemble"),
            (results["base"], "genotype"), (results["versions"], "python torch"),
            (dial := results["lambda_response"], "points dial_error"),
            (dial["points"][0], "lambda genotype share entries")):
        assert part.keys() == {*keys.split()}
    column = lambda method, key: [row[key] for row in ledger(out, method)]
    assert {method: len(ledger(out, method)) for method in results["methods"]} == {"ours": 2,
        "single": 1, "deep": 2, "random": 2, "perturbed": 2, "nes-rs": 4, "darts": 2, "one-shot": 3}
    for method, n, top in (("ours", 2, 1), ("one-shot", 3, 0.5)):
        assert [*map(float, column(method, "lambda"))] == (lambdas := nes.sample_lambdas(n, top))
        assert column(method, "genotype") == [json.dumps(nes.genotype(arch)) for arch in nes.sample(
            nes.load_hypernetwork(out), lambdas)]
    *bases, other = map(json.loads, column("deep", "genotype") + column("darts", "genotype"))
    assert bases == [results["base"]["genotype"]] * 3 and other != bases[0]
    assert column("single", "file") == column("deep", "file")[:1]
    assert column("perturbed", "entries") == column("ours", "entries")
    assert column("random", "genotype") == column("nes-rs", "genotype")[:2]
    for row in ledger(out):
        if row["index"] == "ensemble":
            assert float(row["nll"]) == results["methods"][row["method"]]["nll"]
            continue
        net = nes.load(out / row["file"])
        assert json.loads(row["genotype"]) == nes.genotype(net["network"]["arch"])
        assert float(row["accuracy"]) == (net["test"].argmax(-1) == LABELS["test"]).double().mean()
    trained = {row["file"] for row in ledger(out) if row["file"].startswith("members")}
    assert len(list((out / "members").iterdir())) == len(trained) < 17  # methods share networks

def test_nes_rs_chooses_on_the_selection_split(finished, tmp_path):
    copied = shutil.copytree(finished[0], tmp_path / "run")
    files = [copied / row["file"] for row in ledger(copied, "nes-rs")]
    pool = torch.stack([nes.load(file)["test"] for file in files])
    worst = sorted({*range(4)} - {*nes.forward_selection(pool, LABELS["test"], 2)})
    for file in (files[i] for i in worst):  # look perfect on the selection split
        nes.save(file, nes.load(file) | {"selection": F.one_hot(LABELS["selection"], 6).float()})
    nll = run_tiny(copied, "--baselines", "nes-rs")["methods"]["nes-rs"]["nll"]
    assert nll == approx(nes.ensemble_metrics(pool[worst], LABELS["test"])["nll"])
    assert [int(row["index"]) for row in ledger(copied, "nes-rs") if row["chosen"] == "1"] == worst

def test_the_flags_that_no_other_test_gives_while_the_clock_is_set_back(tmp_path, monkeypatch):
    monkeypatch.setattr(nes, "time", Mock(wraps=time, time=count(0, -60).__next__))
    results = run_tiny(tmp_path, *("--second-order --objective paper --lambda-max 4 --mirror "
                                   "--crop 2 --cells 3 --shared-epochs 0").split())
    assert max(point["lambda"] for point in results["lambda_response"]["points"]) == 4
    assert nes.load(tmp_path / results["members"][1]["file"])["network"]["cells"] == 3
    history = nes.load(tmp_path / "hyper.pt")["history"]  # penalty: - lambda JSd
    assert all(row["penalty"] <= 0 for row in history) and not (tmp_path / "shared.pt").exists()
    assert all(0 <= float(row["seconds"]) < 60 for row in ledger(tmp_path))

def test_reloaded_networks_predict_the_same_others_are_refused(finished, tmp_path, monkeypatch):
    (out, results), images, dial = finished, IMAGES["test"], nes.load_hypernetwork(finished[0])
    for member in results["members"]:
        assert nes.genotype(nes.sample(dial, member["lambda"])) == member["genotype"]
        net, data = nes.load_member(file := out / member["file"])  # no data set, no settings
        probs = net(data.normalise(images)).softmax(dim=-1)
        assert probs.allclose(nes.load(file)["test"], atol=1e-5) and len(data.classes) == 6
        assert data.normalise(images.to("meta")).device.type == "meta"  # where the images are
    monkeypatch.setattr(nes, "predict", predict := Mock(wraps=nes.predict))
    nes.Ensemble([net, net], data)(images)
    assert predict.call_count == 1  # a network that is there twice runs once
    for count, name, method in ((0, "ensemble", "ours"), (3, "one_shots", "one-shot")):
        probs = torch.stack([nes.load(out / row["file"])["test"] for row in ledger(out, method)])
        assert torch.allclose(nes.load_ensemble(out, count)(images), probs.mean(0), atol=1e-5)
        assert nes.ensemble_metrics(probs, LABELS["test"]).items() <= results[name].items()
    nes.save(tmp_path / "begun.pt", {"step": 7, "net": {}})  # no finished network
    torch.save({"step": 7, "net": {}}, tmp_path / "old.pt")  # what an older version left
    torch.save(torch.ones(3), tmp_path / "other.pt")
    member, ensemble = lambda name: nes.load_member(tmp_path / name), nes.load_ensemble
    for words, function, *arguments in (
            ("begun.pt holds no finished network", member, "begun.pt"),
            ("there is no .*none.pt", member, "none.pt"), ("^(?!.*delete).*Is a dir", member, ""),
            ("old.pt is damaged, or of another version", member, "old.pt"),
            ("other.pt is damaged, or of .* if a run wrote it, delete", member, "other.pt"),
            ("finish its", ensemble, tmp_path), ("must be uint8", ensemble(out), images / 255),
            ("not 4", ensemble, out, 4), ("not -1", ensemble, out, -1),
            ("no hyper.pt", nes.load_hypernetwork, tmp_path), ("1: .*-0.1", dial, [0.5, -0.1]),
            ("between 0 and 1", dial, 1.1), ("between 0 and 1", dial, math.nan)):
        raises((nes.NesError, ValueError), function, *arguments).match(words)
    monkeypatch.setattr(Path, "read_bytes", Mock(side_effect=PermissionError(13, "Not yours")))
    raises(nes.NesError, ensemble, out).match("^(?!.*delete).*Not yours")

def test_two_workers_give_what_one_gives_and_killed_at_any_moment_go_on(finished, tmp_path):
    for lines in ("base +2/", "base: .* [12] of 4|hyper +6/", "hyper: .* [56] of 12|base-1 +2/",
                  "base-1: .* [12] of 4|members/.* 4/", "members/.*: resumes .* of 8"):
        process = start(command(tmp_path, *"--baselines all --workers 2".split()), signal.SIG_IGN)
        for wanted in lines.split("|"):  # a row is printed, then saved
            next(line for line in process.stdout if re.match(wanted, line))
        process.send_signal(signal.SIGKILL)
        assert process.communicate(timeout=60)[0].count(" 8/8 ") < 2  # all of them end at once
    assert without_times(run_tiny(tmp_path, "--baselines", "all")) == without_times(finished[1])

@mark.parametrize("step", [4, 8])  # half way; and between the last step and the scores
def test_a_stopped_member_goes_on_to_the_same_weights(step, finished, tmp_path, monkeypatch):
    file, args = finished[1]["members"][0]["file"], settings(tmp_path)
    whole, unfinished = nes.load(finished[0] / file), tmp_path / "unfinished" / file
    train = lambda: nes.train_member(file[:-3], whole["network"]["arch"], 0, TOY, args)
    def save_and_stop(path, state, save=nes.save):
        save(path, state)
        if path.suffix == ".pt" and state.get("step") == step:
            raise KeyboardInterrupt
    with monkeypatch.context() as patch, raises(KeyboardInterrupt):
        patch.setattr(nes, "save", save_and_stop)
        train()
    stopped, _, again = nes.load(unfinished), train(), nes.load(tmp_path / file)
    assert stopped["step"] == step and again["step"] == whole["step"] == 8
    assert torch.equal(again["test"], whole["test"]) and not unfinished.exists()
    assert all_equal(again["net"].values(), whole["net"].values())

def shell(line, folder):  # with the status of what comes before a pipe, in an odd environment
    line = line.format(python=shlex.quote(sys.executable), nes=shlex.join(command("run")))
    odd = dict(PYTHONPATH=TUTORIAL.parent, PYTHONIOENCODING="ascii", RANK="", WORLD_SIZE="")
    return subprocess.run(["bash", "-o", "pipefail", "-c", line], env=os.environ | odd, cwd=folder,
                          capture_output=True, text=True, timeout=240)

@mark.parametrize("line, words", [("WORLD_SIZE=2 {nes}", "torchrun"), ("{nes} | head -1", ""),
    ("{nes} --workers 2 --lr 1e30", "not a number .* --lr"), ("{nes} --workers 2 | head -1", ""),
    ("WORLD_SIZE=2 RANK=0 {nes}", "torchrun"), ("{python} script.py", "__main__.* --workers 1"),
    ("{python} < script.py", None)])  # whose ranks could not import it: it runs in one process
def test_a_shell_sees_one_sentence_or_nothing(line, words, tmp_path):
    (tmp_path / "script.py").write_text(f"import nes; nes.main({tiny('run', '--workers', '2')})")
    done, error = shell(line, tmp_path), f"nes.py: error: .*{words}.*\n" if words else ""
    status = {None: 0, "": 141}.get(words, 2)
    assert done.returncode == status and re.fullmatch(error, done.stderr), done

def test_ranks_at_most_networks_share_the_epochs_and_give_threads_back(bad, tmp_path, monkeypatch):
    monkeypatch.setattr(nes.mp.get_context("spawn"), "Barrier", Mock(side_effect=OSError(38)))
    bad(["--workers", "2"], "(38)", "add --workers 1")  # this system has no semaphores
    made = MagicMock(WORLD=2)
    for name in ("WORLD", "train_shared", "make_one_shot", "train_member", "score", "start_ranks"):
        monkeypatch.setattr(nes, name, getattr(made, name))
    rows = [{"name": f"{method} {i}", "method": method, "arch": None, "index": i}
            for method, count in (("ours", 3), ("deep", 2), ("one-shot", 2)) for i in range(count)]
    args = settings(tmp_path, *"--shared-epochs 12 --epochs 5".split())
    nes.make_networks([*rows, rows[0]], None, None, TOY, args)  # methods share networks
    names = lambda mock: [call.args[0] for call in mock.call_args_list]
    assert names(made.make_one_shot) == ["one-shot 0", "one-shot 1"]
    assert names(made.train_member) == ["deep 0"]  # when the other rank has 15 epochs
    assert run_tiny(tmp_path, *"--workers 64 --baselines deep random".split()) is None  # no results
    assert made.start_ranks.call_args.args[0] == 1 + 2 * 3  # one shot, and two members a method
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", threads := Mock())
    monkeypatch.setattr(nes, "make_networks", Mock(side_effect=KeyError))
    raises(KeyError, run_tiny, tmp_path)
    assert names(threads) == [1, 2]

@mark.parametrize("when, kill", [("begin", os.kill), ("members", os.kill), ("members", os.killpg)])
def test_an_interrupt_of_all_or_of_the_parent_alone_ends_all_workers(when, kill, tmp_path):
    process = start([sys.executable, "-u", "-c", f"""import multiprocessing, os, time, nes
try:
    print("begin")
    nes.main({tiny(tmp_path, *"--workers 2 --epochs 1000 --shared-epochs 1000".split())})
except SystemExit as stop:  # as a notebook does
    print("ended", stop.code, multiprocessing.active_children(), "MALLOC" in str(os.environ))
time.sleep(2)"""], signal.SIG_DFL)
    next(line for line in process.stdout if line.startswith(when))
    time.sleep(0.5)
    kill(process.pid, signal.SIGINT)
    assert "ended 130 [] False\n" in list(process.stdout)[-1:]
    assert process.communicate()[1] == "\nnes.py: stopped; repeat the command to resume\n"

def test_two_starts_in_one_folder_do_no_harm_and_what_a_kill_left_is_removed(finished, tmp_path):
    out, name = tmp_path / "run", f"x.pt.nes-{'0f' * 8}"
    for part, age in ((f"{name}.part", 4000), (f"{name} (conflicted copy).part", 4000),
                      (f"y{name}.part", 3000), ("film.2019.part", 4000)):  # the last is not ours
        nes.save(out / part, b"")
        os.utime(out / part, (time.time() - age,) * 2)
    both = [start(command(out, "--baselines", "all"), signal.SIG_DFL) for _ in range(2)]
    assert [process.communicate(timeout=240) and process.returncode for process in both] == [0, 0]
    assert {path.name for path in out.glob("*.part")} == {"film.2019.part", f"y{name}.part"}
    assert without_times(nes.load(out / "results.json")) == without_times(finished[1])

def test_files_are_written_under_random_names_with_ordinary_rights(tmp_path, monkeypatch):
    names, move = [], Path.replace
    monkeypatch.setattr(Path, "replace", lambda part, to: (names.append(part.name), move(part, to)))
    monkeypatch.setattr(os, "getpid", lambda: 7)  # as two containers may have the same
    for _ in range(2):
        nes.save(tmp_path / "x.pt", {})
        nes.check_settings(TOY, settings(tmp_path))  # settings.json is written where there is none
    (tmp_path / "plain").write_text("")
    assert len(set(names)) == len(names) == 3
    assert all(re.fullmatch(r"(x\.pt|settings\.json)\.nes-.{16}\.part", n) for n in names)
    assert (tmp_path / "x.pt").stat().st_mode == (tmp_path / "plain").stat().st_mode

def test_torchrun_of_two_gives_exactly_what_one_gives_and_another_seed_does_not(finished, tmp_path):
    (tmp_path / "go.py").write_text(f"""import nes
for _ in range(2):  # the second run finds the process group of the first
    nes.main({tiny("run", "--baselines", "all")})""")
    run = shell("{python} -m torch.distributed.run --standalone --nproc-per-node 2 go.py", tmp_path)
    assert run.returncode == 0, run.stderr
    assert without_times(nes.load(tmp_path / "run/results.json")) == without_times(finished[1])
    for file in (tmp_path / "run/members").iterdir():  # each was trained once, by one of the two
        assert len(re.findall(f"members/{file.stem} +8/8 ", run.stdout)) == 1
    assert run_tiny(tmp_path / "other", "--seed", "1")["ensemble"] != finished[1]["ensemble"]

def test_only_a_worker_keeps_freed_memory_and_after_its_data_are_read(tmp_path, monkeypatch):
    calls = Mock(**{"base_search.side_effect": KeyError})
    for library in (calls, None):  # glibc; another
        monkeypatch.setattr(nes.ctypes, "CDLL", lambda _: library)
        nes.keep_freed_memory()
    assert [call.args for call in calls.mallopt.call_args_list] == [(-1, 2**31 - 1), (-4, 0)]
    for name in ("load_data", "keep_freed_memory", "base_search"):
        monkeypatch.setattr(nes, name, getattr(calls, name))
    for is_worker in (False, True):
        raises(KeyError, nes.run, settings(tmp_path), is_worker)
    assert [call[0] for call in calls.mock_calls[2:]] == [
        "load_data", "base_search", "load_data", "keep_freed_memory", "base_search"]

def test_the_picture_of_a_hundred_members_can_be_read_and_shows_disagreement(finished, monkeypatch):
    out, results = finished
    shots = [row | {"lambda": float(row["lambda"])} for row in ledger(out, "one-shot")]
    monkeypatch.setattr(nes, "plot_cell", Mock())
    monkeypatch.setattr(nes, "save", Mock())
    monkeypatch.setattr(nes, "plot_response", dial := Mock(wraps=nes.plot_response))
    for many in (50, 1):
        more = {"members": results["members"] * many}
        nes.save_pictures(results | more, shots, LABELS["test"], settings(out))
        figure = dial.call_args.args[0].figure
        ticks = figure.axes[2].get_xticks().tolist()
        assert len(ticks) < 20 and all(tick == int(tick) for tick in ticks)
        boxes = [axis.get_tightbbox() for axis in figure.axes]
        assert all(one.x1 < other.x0 for one, other in zip(boxes, boxes[1:]))  # no label touches
    own, shared = figure.axes[1].lines
    probs = lambda rows: torch.stack([nes.load(out / row["file"])["test"] for row in rows])
    for line, rows in ((own, results["members"]), (shared, shots)):
        assert [*line.get_xdata()] == [row["lambda"] for row in rows]
        for row, share in zip(rows, line.get_ydata()):  # the metric, of a network and the first
            pair = nes.ensemble_metrics(probs([rows[0], row]), LABELS["test"])
            assert share == approx(pair["disagreement"])
    assert max(own.get_ydata()) > 0

def test_process_groups_of_others_and_none_and_fewer_gpus_than_processes(monkeypatch):
    monkeypatch.setattr(nes, "dist", group := Mock(get_rank=lambda: 5, get_world_size=lambda: 6))
    monkeypatch.setattr(torch, "cuda", cuda := Mock(device_count=lambda: 2))
    for local, wanted in (("", 1), ("4", 0)):  # another machine may have the first ranks
        monkeypatch.setenv("LOCAL_RANK", local) if local else None
        nes.set_up(Mock(device="cuda"))
        assert (nes.RANK, nes.WORLD, nes.barrier) == (5, 6, group.barrier)
        assert cuda.set_device.call_args.args == (wanted,) and not group.init_process_group.called
    monkeypatch.setattr(nes, "dist", Mock(spec=["is_available"], is_available=lambda: False))
    nes.set_up(Mock(device="cuda"))
    assert (nes.RANK, nes.WORLD, nes.barrier()) == (0, 1, None)

def test_help_opens_with_two_examples_and_bad_flags_are_named(bad, tmp_path):
    text = shell("{nes} --help && echo status 0", tmp_path).stdout
    assert text.count("python nes.py") == 2 and text.endswith("\nstatus 0\n")
    assert text.index("python nes.py") < text.index("--dataset DATASET") < text.index("fmnist)")
    for flags in ("--nonsense|--samples 0|--samples many|--lambda-max -1|--lambda-max 0|--lr nan|"
                  "--lambda-max 2|--lambda-max inf --objective paper|--objective other|"
                  "--baselines other|--shared-part 1.1|--device abacus|--device cpu:x|"
                  "--device meta|--dataset /no/such/folder|--out /dev/null/run").split("|"):
        bad(flags.split(), flags.split()[0])
    torch.cuda.is_available() or bad(["--device", "cuda"], "--device")

def test_an_image_is_read_as_viewers_show_it(tmp_path, monkeypatch):
    square, turned, xmp = Image.new("RGBA", (8, 8)), Image.Exif(), PngImagePlugin.PngInfo()
    square.paste("black", (0, 0, 4, 4))  # the rest is transparent
    turned[0x0112] = 6  # a quarter clockwise
    for image, name in ((square, "rgba.png"), (square.quantize(4), "palette.png")):
        image.save(tmp_path / name)
        assert nes.read_image(tmp_path / name, (3, 8, 8)).double().mean() == 191.25
    xmp.add_text("xmp", "tiff:Orientation")  # text, where Pillow looks for bytes
    gradient, garbage = Image.linear_gradient("L"), b"Exif\0\0garbage"  # its bottom is white
    for name, notes in (("turned.jpg", {}), ("turned.png", {}), ("turned.tiff", {}),
                        ("xmp.png", {"pnginfo": xmp}), ("xmp.png", {"pnginfo": xmp, "exif": None}),
                        ("garbage.png", {"exif": garbage}), ("garbage.webp", {"exif": garbage})):
        gradient.save(tmp_path / name, **{"exif": turned, **notes})
        image, upright = nes.read_image(tmp_path / name, (1, 256, 256))[0], "exif" not in notes
        first, last = (image.T if upright else image.flip(0))[[0, -1]]
        assert first.min() > 240 and last.max() < 15, name
    composite, white = Image.alpha_composite, Image.new("RGBA", (20, 20), "white")
    monkeypatch.setattr(Image, "alpha_composite", None)
    for mode in ("RGB", "L", "P", "CMYK", "1"):  # opaque: not composited, and the same pixels
        path = tmp_path / f"{mode}.tiff"
        Image.effect_mandelbrot((20, 20), (-2, -2, 2, 2), 9).convert("RGB").convert(mode).save(path)
        seen = composite(white, Image.open(path).convert("RGBA")).convert("RGB")
        assert numpy.array_equal(nes.read_image(path, (3, 20, 20)).permute(1, 2, 0), seen)

def draw(folder, classes="ab", mode="RGB", count=12):  # a folder of images; returns its name
    for part, label, i in product(("train", "test"), classes, range(count)):
        (path := Path(folder, part, label)).mkdir(parents=True, exist_ok=True)
        Image.frombytes(mode, (12, 9), os.urandom(108 * len(mode))).save(path / f"{i}.png")
    return folder

def test_folders_of_images_good_and_bad(bad, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, mode in (("colour", "RGB"), ("grey", "L"), ("toy", "RGB")):
        data = nes.load_data(f"./{draw(name, mode=mode)}", "", 10)
        (x, labels), shape = data.splits["test"], (len(mode), 10, 10)
        assert data.classes == ["a", "b"] and labels.tolist() == [0] * 12 + [1] * 12
        assert data.shape == shape and x[12].equal(nes.read_image(f"{name}/test/b/0.png", shape))
    assert nes.load_data("toy").digest == TOY.digest  # the bare word is no folder
    bad(["--dataset", draw("one", classes="a")], "two or more")
    bad(["--dataset", draw("few", count=1)], "too few")
    run_tiny("fine", *"--dataset grey --image-size 16".split())
    shutil.copy("grey/train/a/0.png", "grey/train/a/1.png")
    bad("--dataset grey/ --image-size 16 --out fine".split(), "fine", "with images")
    Image.new("I;16", (12, 9)).save("grey/train/a/6.png")
    bad(["--dataset", "grey"], "6.png", "not 8 bits")
    for name in ("a/5.png", "a/9.h5", "b/0.png", "b/2.mpg", "b/3.png", "b/4.png"):
        Path("grey/train", name).write_bytes(b"not a picture")
    bad(["--dataset", "grey"], "5.png", "6.png", "9.h5", "b/0.png", "2.mpg", "replace", "7 in all")
    for i in range(988):
        os.link("toy/train/a/0.png", f"toy/train/a/x{i}.png")
    nes.load_data("./toy")
    assert "1000 of 1012 images of train are read" in capsys.readouterr().out
    for name in ("toy/train/a", "toy/test/a"):  # one letter, spelt in two ways
        Path(name).rename(f"{name[:-1]}{'E' if 'train' in name else 'F'}\u0301")
    bad(["--dataset", "toy/"], "1 are in both", "['F\u0301'] only in test")
    Path("toy/test/F\u0301").rename("toy/test/\u00c9")
    assert nes.load_data("./toy").classes == ["b", "\u00c9"]
    digest = nes.load_data(draw("mixed", classes="aB")).digest
    monkeypatch.setattr(PurePath, "__lt__", lambda a, b: str(a).lower() < str(b).lower())
    assert nes.load_data("mixed").digest == digest  # also on Windows, where paths sort like this

def test_a_run_on_a_folder_whose_name_no_terminal_has_and_with_more_in_it_than_images(tmp_path):
    part = draw(tmp_path / os.fsdecode(b"caf\xe9"), mode="L") / "test"
    for name in ("../train/.ipynb_checkpoints/0.png", "@eaDir/0.png", "a/__MACOSX/0.png",
                 "b/.thumbs/0.png", "b/._0.png", "b/1/2/0.PNG", "a/Thumbs.db", "a/notes.txt"):
        nes.save(part / name, (part / "a/0.png").read_bytes())
    Image.new("L", (9, 9)).save(part / "a/x.gif")
    Image.new("L", (9, 9)).save(part / "a/x.jfif", "JPEG")
    log = shell("{nes} --out '' --dataset caf* --image-size 16", tmp_path).stdout
    assert "51 images; 7 other files are skipped" in log
    out = tmp_path / f"runs/{part.parent.name}-target-0"
    assert {"ledger.csv", "results.json", "results.png", "cells.png"} <= {*os.listdir(out)}

def test_damaged_and_missing_data_files_and_how_cifar10s_are_read(bad, tmp_path, monkeypatch):
    names = [f"{a}-{b}-ubyte" for a in ("train", "t10k") for b in ("images-idx3", "labels-idx1")]
    fashion, no_network = ["--dataset", "fmnist", "--data-dir"], "http://127.0.0.1:9/"
    for name in names:
        nes.save(tmp_path / "FashionMNIST/raw" / name, b"\0\0\x08\x03short")
    bad([*fashion, str(tmp_path)], "FashionMNIST", "delete the damaged files")
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "mirrors", [no_network])
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", f"{no_network}nothing")
    monkeypatch.setattr(nes, "DEBIAN_FASHION_MNIST", tmp_path / "package")
    bad([*fashion, f"{tmp_path}/new"], "FashionMNIST", "check the network", "dataset-fashion-mnist")
    bad(["--dataset", "cifar10", "--data-dir", str(tmp_path)], "CIFAR10", "check the network")
    for name in names:  # now it is installed: found although the download left its folder behind
        sizes = (60, 28, 28) if "images" in name else (60,)
        header = bytes([0, 0, 8, len(sizes)]) + numpy.array(sizes, ">i4").tobytes()
        pixels = bytes(i % 10 for i in range(math.prod(sizes)))
        nes.save(tmp_path / "package" / f"{name}.gz", gzip.compress(header + pixels))
    assert nes.load_data("fmnist", f"{tmp_path}/new").splits["test"][1].tolist() == [*range(10)] * 6
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    pixels = torch.randint(256, (4, 3072), dtype=torch.uint8).numpy()
    for i, name in enumerate([f"data_batch_{n}" for n in "12345"] + ["test_batch", "batches.meta"]):
        nes.save(tmp_path / "cifar-10-batches-py" / name, pickle.dumps({
            "data": pixels + i, "labels": [0, 1, 2, 3], "label_names": list("abcdefghij")}))
    data = nes.load_data("cifar10", str(tmp_path))
    assert sum(len(data.splits[name][1]) for name in nes.SHARES) == 20
    assert torch.equal(data.splits["test"][0], torch.from_numpy(pixels + 5).view(4, 3, 32, 32))

def test_what_is_there_survives_errors_and_more_samples(bad, finished, tmp_path, monkeypatch):
    copied = shutil.copytree(finished[0], tmp_path / "run")
    here = ["--out", str(copied)]
    before = {path: path.read_bytes() for path in [*copied.rglob("*.pt"), copied / "settings.json"]}
    bad([*here, *"--hyper-lr 0.1 --pivots 9".split()], "--hyper-lr 0.5 (now 0.1)", "6 (now 9)")
    nes.base_search("base", TOY, settings(copied))  # functions, too, may use this folder,
    with raises(nes.NesError, match="--search-lr"):  # but must have its settings
        nes.train_member("x", nes.random_architecture(), 0, TOY, settings(copied, "--search-lr", 1))
    member = finished[1]["members"][0]["file"]
    for file in (copied / name for name in ("base.pt", "hyper.pt", "settings.json", member)):
        file.write_bytes(before[file][:len(before[file]) // 2])
        bad(here, file.name, "delete it")
        assert all(path.read_bytes() == whole for path, whole in before.items() if path != file)
        file.write_bytes(before[file])
    (copied / member).unlink()
    with monkeypatch.context() as patch:
        patch.setattr(nes, "train_member", Mock())  # as if another machine had trained it
        bad(here, f"{member} is missing", "must share --out")
        patch.setattr(nes, "VERSION", 5)
        patch.setattr(nes, "NAMES", nes.NAMES[::-1])
        patch.setattr(nes, "TOY_CLASSES", nes.TOY_CLASSES[::-1])
        bad(here, "version 4 (now 5)", "images", "operations")
    assert without_times(run_tiny(copied, "--baselines", "all")) == without_times(finished[1])
    monkeypatch.setattr(nes, "train_member", spy := Mock(wraps=nes.train_member))
    scores = lambda results: [(m["file"], m["nll"]) for m in results["members"][:2]]
    assert scores(run_tiny(copied, "--samples", 4)) == scores(finished[1])
    assert [call.args[2] for call in spy.call_args_list] == [2, 3]
    bad(["--lr", "1e30"], "not a number", "at step", "--lr")
    assert (tmp_path / "bad/hyper.pt").exists()
    bad(["--search-lr", "1e30", "--out", f"{tmp_path}/nan"], "loss of base", "another --out")

@mark.skipif(not (nes.DEBIAN_FASHION_MNIST.exists() or Path("data/FashionMNIST").exists()),
             reason="no Fashion-MNIST here")
def test_real_fashion_mnist_is_learned(tmp_path):
    data = nes.load_data("fmnist", "data" if Path("data/FashionMNIST/raw").exists() else tmp_path)
    assert [len(data.splits[name][1]) for name in nes.SHARES] == [27000, 27000, 6000]
    images, labels = data.splits["test"]
    assert images.shape == (10000, 1, 28, 28) and labels[:5].tolist() == [9, 2, 1, 1, 6]
    assert data.classes[9] == "Ankle boot"
    data.splits["both"] = tuple(part[:6400] for part in data.splits["both"])
    args = nes.parse(f"--channels 8 --epochs 1 --device cpu --out {tmp_path}".split())
    nes.train_member("member", nes.random_architecture(0), 0, data, args)
    probs = nes.load_finished("member", args)["test"]
    assert 0.6 < nes.ensemble_metrics(probs[None], labels)["accuracy"] < 0.95

def test_the_tutorial_was_saved_as_it_ran():
    code = [cell for cell in nbformat.read(TUTORIAL, 4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))  # in order
    outputs = [output for cell in code for output in cell.outputs]
    assert all(output.output_type in ("stream", "display_data") for output in outputs)
    assert sum("image/png" in output.get("data", ()) for output in outputs) >= 20
    lines = [cell.source.split("\n") for cell in code]
    assert max(map(len, lines)) <= 15 and max(map(len, sum(lines, []))) <= 100
    assert TUTORIAL.stat().st_size < 3e6

@fixture(scope="module", autouse=True)
def tutorial(request):
    """The notebook's short version, then its exercises' answers: runs while the other tests do."""
    wanted = any(item.name == "test_the_tutorial_runs" for item in request.session.items)
    os.environ["NES_TUTORIAL_QUICK"] = "1"
    book = nbformat.read(TUTORIAL, 4)
    answers = re.findall(r"```python\n(.*?)```", book.cells[-1].source, re.DOTALL)
    book.cells += map(nbformat.v4.new_code_cell, answers)
    run = NotebookClient(book, timeout=240, resources={"metadata": {"path": str(TUTORIAL.parent)}})
    with ThreadPoolExecutor(1) as pool:
        yield wanted and pool.submit(run.execute)

def test_the_tutorial_runs(tutorial):
    out = str([cell.get("outputs") for cell in tutorial.result().cells])  # raises what one raised
    assert "difference of the logits" in out and "keys of the results" in out and "% right" in out

if __name__ == "__main__":
    benchmark()
