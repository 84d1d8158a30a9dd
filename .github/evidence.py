"""What evidence.sh ran, made small: CSV files in ledger/ and one picture, from its run folders.

    python .github/evidence.py DIR CIFAR

DIR, CIFAR: as for evidence.sh. What is not finished yet is left out, so that it can be run at any
time. Writes beside itself
    ledger/fmnist-S.csv, epochs-E-S.csv, cifar10-S.csv   the ledgers of the runs, a file a seed S
    ledger/compute.csv       scores against epochs of training spent
    ledger/uncertainty.csv   does the entropy of the prediction tell what is wrong, or foreign?
    compute.png              the picture of compute.csv
report.py makes tables of the first ones.
"""
import csv
import json
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import nes


def read(path):
    return list(csv.DictReader(path.open(newline="")))


def write(path, rows):
    nes.save(path, nes.ledger(rows))
    print(f"{path.name}: {len(rows)} rows")


def probabilities(folder, files, split="test"):
    """(M, N, Y), as the run saved them."""
    return torch.stack([nes.load(folder / file)[split] for file in files])


def files_of(rows, method):
    """The files of a method's members, in the ledger's order, only those in its ensemble."""
    return [row["file"] for row in rows if row["method"] == method and row["index"] != "ensemble"
            and row["chosen"] == "1"]


# ---- Equal compute: what to choose with a budget of epochs ---------------------------------------

CORES = 2  # of the machine: the search used both of them, a network one


def compute_rows(folder, rows, labels, epochs, shared_epochs):
    """Scores of the ensembles that a run's networks make, with the epochs of training they cost.

    search_epochs: the seconds of the search that the method needs, in epochs of a member.
    """
    search = {row["method"]: CORES * float(row["search_seconds"]) for row in rows
              if row["index"] == "ensemble"}
    members = [float(row["seconds"]) for row in rows if row["method"] == "ours" and row["seconds"]]
    epoch = sum(members) / len(members) / epochs
    shots = next(method for method in search if method.startswith("one-shot"))
    choices = [("deep ensemble", "deep", count, count * epochs) for count in (2, 3, 5)]
    choices += [("ours", "ours", count, count * epochs) for count in (2, 3, 5)]
    choices += [("one network", "single", 1, epochs)]
    choices += [("ours, one shot of 20", shots, 20, shared_epochs)] * (shared_epochs > 0)
    found = []
    for title, method, count, spent in choices:
        files = files_of(rows, method)[:count]
        if len(files) == count:
            found.append({"seed": rows[0]["seed"], "method": title, "networks": count,
                          "epochs": spent, "search_epochs": round(search[method] / epoch, 2),
                          **nes.ensemble_metrics(probabilities(folder, files), labels)})
    return found


def plot_compute(rows, path):
    """Accuracy and NLL against epochs, mean of the seeds that have the point."""
    figure = Figure((10, 4), layout="constrained")
    for axis, key, scale, title in zip(figure.subplots(1, 2), ("accuracy", "nll"), (100, 1),
                                       ("test accuracy, %", "NLL, nats")):
        for method in dict.fromkeys(row["method"] for row in rows):
            mine, points = [row for row in rows if row["method"] == method], []
            for spent in sorted({row["epochs"] for row in mine}):
                here = [row for row in mine if row["epochs"] == spent]
                mean = lambda name: sum(row[name] for row in here) / len(here)
                points.append((spent + mean("search_epochs"), scale * mean(key)))
            axis.plot(*zip(*points), "o-", label=method)
        axis.set(xlabel="epochs of training, the search counted in them", ylabel=title)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)


# ---- What is an ensemble for? --------------------------------------------------------------------

def auroc(inside, outside):
    """The probability that a value of `outside` is larger than one of `inside`; ties count half."""
    inside = inside.sort().values
    below, not_above = (torch.searchsorted(inside, outside, right=side) for side in (False, True))
    return ((below + not_above).double().mean() / 2 / len(inside)).item()


def entropy(probs):
    """Of the ensemble's mean prediction, (M, N, Y) -> (N,), nats."""
    return torch.special.entr(probs.double().mean(dim=0)).sum(dim=-1)


def least_certain_errors(probs, labels, share=0.1):
    """The share of errors among the `share` of the images whose prediction has most entropy."""
    order = entropy(probs).argsort(descending=True)[:int(share * len(labels))]
    return (probs.mean(dim=0).argmax(dim=-1) != labels)[order].double().mean().item()


def uncertainty_rows(folder, rows, labels, foreign):
    """A row a method; foreign: images (N, C, H, W) of another data set."""
    predicted, found = {}, []
    for method in dict.fromkeys(row["method"] for row in rows):
        files = files_of(rows, method)
        for file in files:
            if file not in predicted:
                net, data = nes.load_member(folder / file)
                predicted[file] = nes.predict(net, foreign, data)
        own, other = probabilities(folder, files), torch.stack([predicted[file] for file in files])
        found.append({"seed": rows[0]["seed"], "method": method, "networks": len(files),
                      "auroc": auroc(entropy(own), entropy(other)),
                      "errors_least_certain": least_certain_errors(own, labels)})
    return found


def foreign_images(root, shape, count=5000):
    """Images of a folder of classes, every n-th one, resized; grey where the networks want grey."""
    paths = sorted(Path(root).glob("test/*/*"))
    return torch.stack([nes.read_image(path, shape) for path in paths[::len(paths) // count]])


def main(out, cifar):
    out, compute, uncertain, foreign = Path(out), [], [], None
    for folder in sorted(out.glob("*-*")):
        if not (folder / "results.json").exists():
            continue
        # a folder of images by its name alone: where it was says nothing to others
        rows = [row | {"dataset": Path(row["dataset"]).name} for row in read(folder / "ledger.csv")]
        write(HERE / "ledger" / f"{folder.name}.csv", rows)
        settings = json.loads((folder / "settings.json").read_text())
        if settings["--dataset"] != "fmnist":
            continue
        data = nes.load_data("fmnist", str(HERE.parent / "data"), seed=settings["--seed"])
        labels = data.splits["test"][1]
        compute += compute_rows(folder, rows, labels, settings["--epochs"],
                                settings["--shared-epochs"])
        if folder.name.startswith("fmnist"):
            foreign = foreign_images(cifar, data.shape) if foreign is None else foreign
            uncertain += uncertainty_rows(folder, rows, labels, foreign)
    write(HERE / "ledger" / "compute.csv", compute)
    write(HERE / "ledger" / "uncertainty.csv", uncertain)
    plot_compute(compute, HERE / "compute.png")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
