"""The dial with each of its ingredients left out once, for the table in results.md.

    python .github/ablation.py --seeds 0 1 2 --out runs/ablation

Each variant replaces one function of nes.py, trains the hypernetwork from the same base, and scores
five architectures in one shot with the search's own weights (--shared-epochs 0). A row for each
variant and seed goes to <out>/ablation.csv; what is there is not run again.
"""
import argparse
import contextlib
import csv
import shutil
import sys
import time
from pathlib import Path
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import nes

VARIANTS = {"default": "nothing",
            "soft": "the finished architecture's divergence (soft JSd instead)",
            "edges": "entries (all 28 edges count instead)", "no noise": "Gumbel noise",
            "one draw": "sixteen lambdas a step (one instead)",
            "no overshoot": "overshoot of lambda", "random start": "start at the base",
            "mixture": "discrete training (the soft mixture runs instead)"}


def soft_diversity(base_p, tau):
    """c (JSd(alpha*, p) / JSd_max - lambda)^2, with alpha* the smoothed base."""
    target = nes.smooth(base_p, tau)
    other = torch.nn.functional.one_hot(target.argmax(-1), 7).roll(1, -1).float()
    largest = nes.jensen_shannon(target, other).mean()
    return lambda arch, p, base, lam, strength: strength * (
        nes.jensen_shannon(target, p).mean((-2, -1)) / largest - lam) ** 2


@contextlib.contextmanager
def without(variant, base_p, args):
    """nes.py with one ingredient replaced."""
    share_loss, step = nes.diversity_loss, nes.search_step
    seen = {}

    def draw_and_keep(*arguments, draw=nes.draw_probabilities):
        seen["p"] = draw(*arguments)
        return seen["p"]

    def edges(arch, p, base, lam, strength):
        one_hot = lambda q: torch.nn.functional.one_hot(q.argmax(-1), 7).float()
        return share_loss(one_hot(p), p, one_hot(base_p), lam, strength)

    replaced = {
        "default": {}, "no noise": {}, "soft": {"diversity_loss": soft_diversity(base_p, nes.TAU)},
        "edges": {"diversity_loss": edges}, "one draw": {"DRAWS": 1},
        "no overshoot": {"OVERSHOOT": 0.0},
        "random start": {"smooth": lambda p, tau: (1e-3 * torch.randn(
            p.shape, generator=nes.rng(args.seed, "start"))).softmax(-1)},
        "mixture": {"draw_probabilities": draw_and_keep, "search_step":
                    lambda net, arch, *rest, **more: step(net, seen["p"][0], *rest, **more)},
    }[variant]
    with patch.multiple(nes, **replaced) if replaced else contextlib.nullcontext():
        yield


def run(variant, seed, options):
    folder = Path(options.out) / f"{variant.replace(' ', '-')}-{seed}"
    flags = ["--dataset", options.dataset, "--data-dir", options.data_dir, "--seed", str(seed),
             "--shared-epochs", "0", "--device", "cpu", "--out", str(folder),
             *options.flags.split(",")]
    args = nes.parse([flag for flag in flags + ["--noise", "0"] * (variant == "no noise") if flag])
    data = nes.load_data(args.dataset, args.data_dir, args.image_size, seed)
    shared_base = Path(options.out) / f"base-{seed}.pt"
    if shared_base.exists() and not (folder / "base.pt").exists():
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(shared_base, folder / "base.pt")
    net, base_p = nes.base_search("base", data, args)
    if not shared_base.exists():
        shutil.copy(folder / "base.pt", shared_base)
    start = time.time()
    with without(variant, base_p, args):
        hyper = nes.train_hypernetwork(net, base_p, data, args)
    dial = nes.lambda_response(hyper, base_p, args.lambda_max)
    batches = [data.batch("train", 256, step, (seed, "recalibration"))[0] for step in range(20)]
    probs = torch.stack([nes.predict(nes.one_shot(net, arch, batches), data.splits["test"][0], data)
                         for arch in nes.sample(hyper, nes.sample_lambdas(5, args.lambda_max))])
    accuracy = nes.ensemble_metrics(probs, data.splits["test"][1])["accuracy"]
    return {"dataset": Path(options.dataset).name, "flags": options.flags, "without": variant,
            "seed": seed, "calibration_error": dial["calibration_error"],
            "spearman": dial["spearman"], "one_shot_accuracy": accuracy,
            **{f"entries at {point['lambda'] / args.lambda_max:.1f}": point["matched_entries"]
               for point in dial["points"]}, "seconds": round(time.time() - start)}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--without", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--dataset", default="fmnist")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--flags", default="", help="more flags of nes.py, separated by commas")
    parser.add_argument("--out", default="runs/ablation")
    options = parser.parse_args()
    file = Path(options.out) / "ablation.csv"
    for variant in options.without:
        for seed in options.seeds:
            done = list(csv.DictReader(file.open())) if file.exists() else []
            if any((row["without"], row["seed"]) == (variant, str(seed)) for row in done):
                continue
            row = run(variant, seed, options)
            print(row, flush=True)
            new = not file.exists()
            with file.open("a") as stream:
                writer = csv.DictWriter(stream, row, lineterminator="\n")
                if new:
                    writer.writeheader()
                writer.writerow(row)


if __name__ == "__main__":
    main()
