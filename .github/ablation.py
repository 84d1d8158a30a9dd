"""The method with one of its ingredients left out, for the tables in results.md.

    python .github/ablation.py --seeds 0 1 2 --out runs/ablation
    python .github/ablation.py --run "no L_val" --seed 0 --out runs/blind-0

The first: each variant replaces something in nes.py, trains the hypernetwork from the same base,
and scores five architectures in one shot with the search's own weights, on the selection split. A
row for each variant and seed goes to <out>/ablation.csv; what is there is not run again. The
second: all of nes.py with a variant in place, into a run folder that has a base.pt. Other flags are
handed to nes.py.
"""
import argparse
import contextlib
import itertools
import time
from pathlib import Path
from unittest.mock import patch

import torch
from torch.nn.functional import one_hot

import evidence
from evidence import nes, report

VARIANTS = ("default", "soft", "edges", "no noise", "one draw", "no overshoot", "random start",
            "mixture", "no L_val")

def replaced(variant, base_p, seed, draw=nes.noisy_softmax, share_loss=nes.diversity_loss,
             step=nes.search_step, sample=nes.sample):
    """Names of nes.py -> what stands there in a variant."""
    target, hot, drawn = nes.smooth(base_p, nes.TAU), lambda p: one_hot(p.argmax(-1), 7).float(), []
    largest = nes.jensen_shannon(target, hot(target).roll(1, -1)).mean()

    def soft(arch, p, base, lam, strength):
        """c (JSd(alpha*, p) / JSd_max - lambda)^2, with alpha* the smoothed base."""
        share = nes.jensen_shannon(target, p).mean((-2, -1)) / largest
        return strength * (share - lam) ** 2

    def draw_and_keep(*arguments):
        drawn[:] = [draw(*arguments)]
        return drawn[0]

    def perturbed(hyper, lambdas):
        """Of several lambdas, a member's: the networks of `perturbed`. Of one: fresh changes."""
        base, key = nes.discretise(base_p), lambda i: i if len(lambdas) > 1 else float(lambdas[0])
        return torch.stack([nes.perturb(base, arch, seed, "perturbed", key(i))
                            for i, arch in enumerate(sample(hyper, lambdas))])

    return {
        "default": {}, "no noise": {},  # the latter by a flag, see `run`
        # in place of the finished architecture's divergence the soft one, of entries all 28 edges
        "soft": {"diversity_loss": soft},
        "edges": {"diversity_loss": lambda arch, p, base, *more: share_loss(
            hot(p), p, hot(base_p), *more)},
        "one draw": {"DRAWS": 1}, "no overshoot": {"OVERSHOOT": 0.0},
        "random start": {"smooth": lambda p, tau: (1e-3 * torch.randn(
            p.shape, generator=nes.rng(seed, "start"))).softmax(-1)},
        # what is drawn runs itself, not the architecture that is read off it
        "mixture": {"noisy_softmax": draw_and_keep,
                    "search_step": lambda net, arch, *more: step(net, drawn[0][0], *more)},
        # L_val has no gradient; the weights are trained as always
        "no L_val": {"search_step": lambda net, arch, *more: step(net, arch.detach(), *more)},
        # not of the dial: what is sampled is the base with as many entries changed at random
        "perturbed": {"sample": perturbed},
    }[variant]

def run(variant, seed, out, flags):
    """A row of ablation.csv."""
    args = nes.parse([*flags, "--seed", str(seed), "--shared-epochs", "0", "--device", "cpu",
                      "--out", f"{out}/base-{seed}"])
    data = nes.load_data(args.dataset, args.data_dir, args.image_size, seed)
    net, base_p = nes.base_search("base", data, args)
    args.out = f"{out}/{variant.replace(' ', '-')}-{seed}"
    args.noise = 0.0 if variant == "no noise" else args.noise
    start, new = time.time(), replaced(variant, base_p, seed)
    with patch.multiple(nes, **new) if new else contextlib.nullcontext():
        hyper = nes.train_hypernetwork(net, base_p, data, args)
    dial = nes.lambda_response(hyper, base_p)
    batches = [data.batch("train", 256, step, (seed, "recalibration"))[0] for step in range(20)]
    images, labels = data.splits["selection"]
    probs = torch.stack([nes.predict(nes.one_shot(net, arch, batches), images, data)
                         for arch in nes.sample(hyper, nes.sample_lambdas(5, args.lambda_max))])
    accuracy = nes.ensemble_metrics(probs, labels)["accuracy"]
    return {"flags": " ".join(flags), "without": variant, **evidence.dial_row(args, dial),
            "one_shot_selection": accuracy, "seconds": round(time.time() - start)}

def run_all(variant, flags):
    """nes.py with the variant in place; one process, since others would not have it."""
    flags = [*flags, "--workers", "1", "--device", "cpu"]
    args = nes.parse(flags)
    alpha = nes.load_finished("base", args)["architecture"]["alpha"]
    with patch.multiple(nes, **replaced(variant, alpha.softmax(-1), args.seed)):
        nes.main(flags)

def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--without", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--run", choices=["no L_val", "perturbed"])
    parser.add_argument("--out", default="runs/ablation")
    options, flags = parser.parse_known_args()
    if options.run:
        return run_all(options.run, [*flags, "--out", options.out])
    file = Path(options.out) / "ablation.csv"
    for variant, seed in itertools.product(options.without, options.seeds):
        done = report.read(file)
        if (variant, str(seed)) not in [(row["without"], row["seed"]) for row in done]:
            report.write(file, [*done, run(variant, seed, options.out, flags)])

if __name__ == "__main__":
    main()
