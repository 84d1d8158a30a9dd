"""Twins: networks of which one thing differs, all else equal, for ledger/twins.csv; and, of two of
their ensembles, how low an ECE can be, for ledger/calibration.csv.

    python .github/twins.py DIR 0 1 2 3 4

trains them for the seeds named, at the main command's settings, into DIR/twins-SEED; what is there
is kept, and a run that was killed resumes. A row is an ensemble on test: the base's network and its
twin, or the dial's five members with the seed held. gain: its NLL less the mean of its members'.
Initial weights are a supernet's, cut to each architecture: common operations begin alike. The twin
late-STEP is the base itself for so many steps, then gets its batches in another order. The base and
the dial's architectures are those of ledger/fmnist-SEED.csv.
"""
import json
import shutil
import sys
from pathlib import Path

import torch
from torch.nn.functional import one_hot

import evidence
from evidence import LATE, nes, report

def architecture(genotype):
    """The finished architecture (2, E, O) of a ledger's genotype: `nes.genotype` backwards."""
    arch = torch.zeros(2, len(nes.EDGES), len(nes.NAMES))
    for cell, entries in zip(arch, json.loads(genotype).values()):
        for i, (name, source) in enumerate(entries):
            cell[nes.EDGES.index((source, i // 2)), nes.NAMES.index(name)] = 1
    return arch

def changed(base, which, *key):
    """The base with another random operation at some of its 16 entries, numbered in random order:
    a smaller set is part of a larger."""
    generator, arch = nes.rng(*key, "entries"), base.clone()
    places = base.nonzero()[torch.randperm(16, generator=generator)]
    shifts = torch.randint(1, 7, (16,), generator=generator)
    for i in which:
        cell, edge, operation = places[i]
        arch[cell, edge] = one_hot((operation + shifts[i]) % 7, 7).float()
    return arch

def twins(base, dial, seed):
    """name -> (architecture, key of the initial weights, key of the order of batches)."""
    key, other = (seed, "twins"), (seed, "twins", "other")
    all_entries = changed(base, range(16), *key)
    return {
        "base": (base, key, key), "nothing": (base, key, key), "weight": (base, key, key),
        **{f"entry-{i}": (changed(base, [i], *key), key, key) for i in range(2)},
        "sixteen": (all_entries, key, key), "init": (base, other, key),
        "order": (base, key, other), **{f"late-{step}": (base, key, other) for step in LATE},
        "both": (base, other, other), "both-sixteen": (all_entries, other, other),
        **{f"dial-{i}": (arch, key, key) for i, arch in enumerate(dial)
           if i > 0 or not arch.equal(base)}}

def train(name, arch, initial, order, data, args):
    """Train a twin; <out>/<name>.pt holds it then. The base's checkpoints stay, as at-STEP.pt: the
    twin late-STEP goes on from there."""
    if nes.file_of(name, args).exists():
        return
    checkpoint = nes.file_of(f"unfinished/{name}", args)
    kept = lambda step: nes.file_of(f"at-{step}", args)
    def keep(step):  # called at the start of a step: the checkpoint before it is there
        if name == "base" and step in LATE:
            shutil.copy(checkpoint, kept(step))
    if name[:4] == "late" and not checkpoint.exists():
        shutil.copy(kept(name[5:]), checkpoint)
    supernet = nes.build(initial, data, args.channels, args.cells, affine=True)
    net, weights = nes.Network(**supernet.config | {"arch": arch}), supernet.state_dict()
    net.load_state_dict({key: weights[key] for key in net.state_dict()})
    net.to(args.device, memory_format=torch.channels_last)
    if name == "weight":
        with torch.no_grad():
            net.classifier.weight[0, 0] += 1e-6
    progress = nes.train(name, net, args.epochs, order, data, args, keep)
    progress.finish(**nes.network_state(net, data))

def row(change, names, lam, base, data, args):
    """The ensemble of some twins; entries: how many of the last one's are not the base's."""
    files = [nes.load_finished(name, args) for name in names]
    labels = data.splits["test"][1]
    alone = [nes.ensemble_metrics(file["test"][None], labels)["nll"] for file in files]
    scores = nes.ensemble_metrics(torch.stack([file["test"] for file in files]), labels)
    kept = nes.matched_entries(files[-1]["network"]["arch"], base).item()
    return {"seed": args.seed, "change": change, "lambda": lam, "entries": nes.ENTRIES - kept,
            "members": len(names), "disagreement": scores["disagreement"],
            "accuracy": scores["accuracy"], "nll": scores["nll"],
            "gain": scores["nll"] - sum(alone) / len(alone)}

def add(name, rows, keys=("seed",)):
    """Put rows into a ledger, in place of those that it had with their values of `keys`."""
    file, of = evidence.SAVED / f"{name}.csv", lambda row: [int(row[key]) for key in keys]
    others = [row for row in report.read(file) if of(row) not in map(of, rows)]
    report.write(file, sorted(others + rows, key=of))

def setup(folder, seed, *flags):
    """The settings of a run folder, the data, and of the main run with this seed method -> rows of
    its networks, with their architectures in place of genotypes."""
    args = nes.parse(["--seed", seed, "--device", "cpu", "--out", folder, *flags])
    torch.set_num_threads(1)
    data = nes.load_data("fmnist", str(evidence.HERE.parent / "data"), seed=args.seed)
    rows = [row | {"arch": architecture(row["genotype"])}
            for row in report.read(evidence.SAVED / f"fmnist-{seed}.csv") if row["file"]]
    return args, data, {method: found for (method,), found in evidence.by(rows, "method").items()}

def main(out, seeds):
    for seed in seeds:
        args, data, rows = setup(f"{out}/twins-{seed}", seed)
        base, dial = rows["deep"][0]["arch"], [row["arch"] for row in rows["ours"]]
        lambdas = [float(row["lambda"]) for row in rows["ours"]]
        found = twins(base, dial, args.seed)
        for name, made_of in found.items():
            train(name, *made_of, data, args)
        held = ["dial-0" if "dial-0" in found else "base",
                *(f"dial-{i}" for i in range(1, len(dial)))]
        add("twins", [
            *(row(name.partition("-")[0] if name[:5] == "entry" else name, ["base", name], "",
                  base, data, args) for name in found if name[:4] not in ("base", "dial")),
            *(row("dial", [held[0], name], lam, base, data, args)
              for name, lam in list(zip(held, lambdas))[1:]),
            row("five of the dial", held, "", base, data, args)])
        add("calibration", [evidence.calibration_row(
            seed, title, torch.stack([nes.load_finished(name, args)["test"] for name in names]),
            data.splits["test"][1]) for title, names in (("one network", ["base"]),
                                                         ("five of the dial", held))])

if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2:])
