"""What evidence.sh ran, made small: CSV files in ledger/ and one picture, from its run folders.

    python .github/evidence.py DIR CIFAR    from the run folders; what is not finished is left out
    python .github/evidence.py              the tables of results.md, from the saved CSV files alone

DIR, CIFAR: as for evidence.sh. Writes beside itself:
    ledger/fmnist-S.csv, epochs-E-S.csv, cifar10-S.csv   the ledgers of the runs, S their seed
    ledger/dial.csv          matched entries against lambda, of each search
    ledger/compute.csv       scores against epochs of training spent, and compute.png, its picture
    ledger/uncertainty.csv   does the entropy of the prediction tell what is wrong, or foreign?
    ledger/architectures.csv each trained architecture: accuracy trained, and in one shot
Those saved now were made by nes.py of commit c8dafae or earlier, with other columns, and with a
method more, "chosen". Both kinds are read.
"""
import argparse
import statistics
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import nes
import report
from report import markdown, mean_interval, mean_std, paired, read, score_table

def by(rows, *keys):
    """The rows that share their values of `keys`, together: (values) -> rows."""
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups

def mean(rows, key):
    return statistics.mean(float(row[key]) for row in rows)

def files_of(rows, method):
    """The files of the networks in a method's ensemble, in the ledger's order."""
    return [row["file"] for row in rows if row["method"] == method and row["chosen"] == "1"]

def search_seconds(rows, method):
    """Of the searches that a method needs: what its ensemble took, and its networks did not."""
    *networks, ensemble = (row for row in rows if row["method"] == method)
    return float(ensemble.get("search_seconds") or
                 float(ensemble["seconds"]) - sum(float(row["seconds"]) for row in networks))

# ---- The dial ------------------------------------------------------------------------------------

TENTHS = [f"{t / 10:.1f}" for t in range(11)]

def dial_row(args, response):
    """A `nes.lambda_response` as a row."""
    return {"dataset": Path(args.dataset).name, "seed": args.seed,
            "calibration_error": response["calibration_error"], "spearman": response["spearman"],
            **{t: point["matched_entries"] for t, point in zip(TENTHS, response["points"])}}

def dial_table(rows):
    """A line for each kind of run: mean entries over its seeds, calibration error of each."""
    lines = [["run", "seeds", *TENTHS, "calibration error", "mean", "Spearman, worst"]]
    for (run,), seeds in by(rows, "run").items():
        errors = [float(row["calibration_error"]) for row in seeds]
        lines.append([run, str(len(seeds)), *(f"{mean(seeds, t):.1f}" for t in TENTHS),
                      ", ".join(f"{error:.3f}" for error in errors), mean_std(errors, 3),
                      f"{max(float(row['spearman']) for row in seeds):.3f}"])
    return markdown(lines)

# ---- Equal compute: what to choose with a budget of epochs ---------------------------------------

CORES = 2  # of the machine: the search used both of them, a network one

def compute_rows(folder, rows, labels, args, epoch_seconds):
    """Scores of the ensembles that a run's networks make, with the epochs of training they cost.

    search_epochs: the seconds of the search that the method needs, in epochs of a member.
    """
    choices = [("one network", "single", 1, args.epochs),
               ("ours, one shot of 20", f"one-shot of {args.one_shots}", 20, args.shared_epochs)]
    choices += [(title, method, count, count * args.epochs) for count in (2, 3, 5)
                for title, method in (("deep ensemble", "deep"), ("ours", "ours"))]
    found = []
    for title, method, count, spent in choices:
        files = files_of(rows, method)[:count]
        if len(files) == count and spent > 0:
            search = CORES * search_seconds(rows, "ours" if "ours" in title else "single")
            probs = torch.stack([nes.load(folder / file)["test"] for file in files])
            found.append({"seed": rows[0]["seed"], "method": title, "networks": count,
                          "epochs": spent, "search_epochs": round(search / epoch_seconds, 2),
                          **nes.ensemble_metrics(probs, labels)})
    return found

def compute_points(rows):
    """(method, epochs) -> seed -> row, in order; only seeds that have all points, so that no point
    has luckier seeds than another."""
    points = {(method, int(spent)): {row["seed"]: row for row in here}
              for (method, spent), here in by(rows, "method", "epochs").items()}
    methods, complete = [*by(rows, "method")], set.intersection(*map(set, points.values()))
    return {point: {seed: row for seed, row in points[point].items() if seed in complete}
            for point in sorted(points, key=lambda point: (methods.index(point[:1]), point[1]))}

def compute_table(rows):
    lines = [["method", "networks", "epochs, all networks", "with the search", "accuracy, %", "NLL",
              "seeds"]]
    for (method, spent), seeds in compute_points(rows).items():
        networks, search, accuracy, nll = (mean(seeds.values(), key) for key in (
            "networks", "search_epochs", "accuracy", "nll"))
        lines.append([method, f"{networks:.0f}", str(spent), f"{spent + search:.1f}",
                      f"{100 * accuracy:.2f}", f"{nll:.4f}", str(len(seeds))])
    return markdown(lines)

COMPARED = {"ours": (10, 15, 25), "deep ensemble": (10, 15, 25), "ours, one shot of 20": (8, 12)}
LONGER = [("one network", epochs) for epochs in (8, 12, 20)]  # than the default 5

def compared_table(rows):
    """Each point minus the deep ensemble of as many epochs, and minus one network for longer:
    accuracy, then NLL, paired by seed."""
    points, tables = compute_points(rows), []
    for title, *column in (("accuracy, points", "accuracy", 100, 2), ("NLL", "nll", 1, 4)):
        lines = [[title, "minus deep ensemble, as many epochs",
                  *(f"minus {method}, {epochs} epochs" for method, epochs in LONGER)]]
        lines += [[f"{method}, {spent} epochs", *(
            paired(points[method, spent], points[other], *column)
            if other in points and other != (method, spent) else ""
            for other in (("deep ensemble", spent), *LONGER))]
            for method in COMPARED for spent in COMPARED[method] if (method, spent) in points]
        tables.append(markdown(lines))
    return "\n\n".join(tables)

def plot_compute(rows, path):
    """Accuracy and NLL against epochs."""
    figure = Figure((10, 4), layout="constrained")
    points = [(method, spent, seeds.values())
              for (method, spent), seeds in compute_points(rows).items()]
    for axis, key, scale, title in zip(figure.subplots(1, 2), ("accuracy", "nll"), (100, 1),
                                       ("test accuracy, %", "NLL, nats")):
        for method in dict.fromkeys(method for method, _, _ in points):
            axis.plot(*zip(*((spent + mean(here, "search_epochs"), scale * mean(here, key))
                             for one, spent, here in points if one == method)), "o-", label=method)
        axis.set(xlabel="epochs of training, the search counted in them", ylabel=title)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)

# ---- What is an ensemble for? --------------------------------------------------------------------

# column -> (title, scale, digits)
UNCERTAINTY = {"auroc": ("AUROC", 1, 3), "auroc_of_one": ("of its members alone, mean", 1, 3),
               "errors_least_certain": ("errors among the 10 % least certain, %", 100, 1),
               "errors_caught": ("their part of all errors, %", 100, 1),
               "errors_rest": ("errors among the other 90 %, %", 100, 2)}

def auroc(inside, outside):
    """The probability that a value of `outside` is larger than one of `inside`; ties count half."""
    inside = inside.sort().values
    below, not_above = (torch.searchsorted(inside, outside, right=side) for side in (False, True))
    return ((below + not_above).double().mean() / 2 / len(inside)).item()

def entropy(probs):
    """Of the ensemble's mean prediction, (M, N, Y) -> (N,), nats."""
    return torch.special.entr(probs.double().mean(dim=0)).sum(dim=-1)

def errors_by_certainty(probs, labels, share=0.1):
    """Of the `share` of the images whose prediction has most entropy: (how many of them are wrong,
    how many of all wrong ones are among them, how many of the other images are wrong), shares."""
    order = entropy(probs).argsort(descending=True)
    wrong = (probs.mean(dim=0).argmax(dim=-1) != labels)[order].double()
    unsure, rest = wrong.tensor_split([int(share * len(labels))])
    return [value.item() for value in (unsure.mean(), unsure.sum() / wrong.sum(), rest.mean())]

def uncertainty_rows(folder, rows, labels, foreign):
    """A row a method; foreign: images (N, C, H, W) of another data set. Predictions are kept."""
    predicted, found = nes.load(folder / "foreign.pt") or {}, []
    for file in {row["file"] for row in rows if row["file"]} - set(predicted):
        net, data = nes.load_member(folder / file)
        predicted[file] = nes.predict(net, foreign, data)
    nes.save(folder / "foreign.pt", predicted)
    for (method,) in by(rows, "method"):
        files = files_of(rows, method)
        own = torch.stack([nes.load(folder / file)["test"] for file in files])
        other = torch.stack([predicted[file] for file in files])
        alone = [auroc(entropy(a[None]), entropy(b[None])) for a, b in zip(own, other)]
        values = (auroc(entropy(own), entropy(other)), statistics.mean(alone),
                  *errors_by_certainty(own, labels))
        found.append({"seed": rows[0]["seed"], "method": method, "networks": len(files),
                      **dict(zip(UNCERTAINTY, values))})
    return found

def uncertainty_table(rows):
    """A line a method, over its seeds; then differences, paired by seed."""
    methods = {method: {row["seed"]: row for row in found}
               for (method,), found in by(rows, "method").items()}
    compared = {key: UNCERTAINTY[key] for key in ("auroc", "errors_caught", "errors_rest")}
    return "\n\n".join([score_table(methods, UNCERTAINTY, count_seeds=True), *(
        score_table(methods, compared, other, count_seeds=True)
        for other in ("single", "deep", "perturbed") if other in methods)])

def foreign_images(root, shape, count=5000):
    """Images of a folder of classes, every n-th one, resized; grey where the networks want grey."""
    paths = sorted(Path(root).glob("test/*/*"))
    paths = paths[::max(1, len(paths) // count)]
    return torch.stack([nes.read_image(path, shape) for path in paths])

# ---- Questions, a number a seed ------------------------------------------------------------------

PAIRS = [("ours", "perturbed"), ("ours", "random"), ("ours", "deep"), ("chosen", "ours"),
         ("ours, one-shot", "ours"), ("one-shot of 50", "single"), ("ours", "darts"),
         ("ours", "nes-rs")]
SLOPES = [("trained accuracy", "ours", "accuracy"),
          ("one-shot accuracy", "one-shot of 50", "accuracy"),
          ("one-shot accuracy on selection", "one-shot of 50", "selection_accuracy")]

def rank_correlation(x, y):
    """Spearman's; equal values share their rank."""
    x, y = (torch.as_tensor(v, dtype=torch.double) for v in (x, y))
    ranks = lambda v: (v[:, None] > v).double().sum(1) + (v[:, None] == v).double().sum(1) / 2
    return torch.corrcoef(torch.stack([ranks(x), ranks(y)]))[0, 1].item()

def architecture_rows(folder, rows, data, args):
    """A row for each trained architecture: its accuracy trained, on test (of several networks the
    mean), and in one shot, on selection; the methods that have it."""
    found, trained = [], [row for row in rows if row["file"].startswith("members")]
    for here in by(trained, "genotype").values():
        networks = {row["file"]: row for row in here}.values()
        arch = nes.load(folder / here[0]["file"])["network"]["arch"]
        name = f"one_shot/{nes.fingerprint(arch)}"
        if not nes.file_of(name, args).exists():
            hyper = nes.load_hypernetwork(folder)
            nes.make_one_shots([name], [arch], None, hyper, data, args)
        probs, labels = nes.load_network(name, args)["selection"], data.splits["selection"][1]
        found.append({"seed": rows[0]["seed"], "architecture": nes.fingerprint(arch),
                      "methods": " ".join(dict.fromkeys(row["method"] for row in here)),
                      "networks": len(networks), "trained_test": mean(networks, "accuracy"),
                      "one_shot_selection": nes.ensemble_metrics(probs[None], labels)["accuracy"]})
    return found

def questions(rows, found):
    """question -> its number, of one seed; rows: of its ledger; found: of `architecture_rows`.

    What asks for methods or columns that the ledger lacks is left out.
    """
    accuracy = {row["method"]: float(row["accuracy"]) for row in rows if row["index"] == "ensemble"}
    numbers = {f"{a} minus {b}, points": 100 * (accuracy[a] - accuracy[b])
               for a, b in PAIRS if a in accuracy and b in accuracy}
    ours = [row for row in found if "ours" in row["methods"].split()]
    for title, some in (("ours", ours), ("all trained", found)):
        numbers[f"one-shot (selection) and trained (test) accuracy, rank correlation, {title}"] = (
            rank_correlation([float(row["one_shot_selection"]) for row in some],
                             [float(row["trained_test"]) for row in some]))
    for title, method, key in SLOPES:
        points = [(float(row["lambda"]), float(row[key])) for row in rows
                  if row["method"] == method and row["lambda"] and row.get(key)]
        if points:
            numbers[f"{title}, slope from lambda = 0 to 1, points"] = (
                100 * statistics.linear_regression(*zip(*points)).slope)
    ours, base = (search_seconds(rows, method) for method in ("ours", "single"))
    return numbers | {"search of ours, in base searches": ours / base}

def question_table(ledgers, architectures):
    """The mean over seeds; architectures: the rows of `architecture_rows`."""
    found = by(architectures, "seed")
    numbers = [questions(rows, found[rows[0]["seed"],]) for rows in ledgers]
    lines = [["", "seeds", "mean and 95 % interval"]]
    for question in dict.fromkeys(question for seed in numbers for question in seed):
        values = [seed[question] for seed in numbers if question in seed]
        lines.append([question, str(len(values)), mean_interval(values, 2)])
    return markdown(lines)

def lambda_table(ledgers):
    """Accuracy of ours against lambda, trained and in one shot, over the seeds."""
    lines = [["lambda", "entries of 16", "trained, %", "one shot, %"]]
    percent = lambda found: mean_std([100 * float(row["accuracy"]) for row in found], 2)
    points = by((row for rows in ledgers for row in rows if row["lambda"]), "method", "lambda")
    lines += [[f"{float(lam):.3f}", f"{mean(found, 'entries'):.1f}", percent(found),
               percent(points["ours, one-shot", lam])]
              for (method, lam), found in sorted(points.items()) if method == "ours"]
    return markdown(lines)

# ---- All of it -----------------------------------------------------------------------------------

SAVED, FILES = HERE / "ledger", ("dial", "compute", "uncertainty", "architectures")

def tables():
    """title -> Markdown, of the saved CSV files; results.md holds each of them."""
    fmnist, cifar = (sorted(SAVED.glob(f"{name}-?.csv")) for name in ("fmnist", "cifar10"))
    ledgers = [read(path) for path in fmnist]
    some = [path for path, rows in zip(fmnist, ledgers) if ("darts",) in by(rows, "method")]
    dial, compute, uncertainty, architectures = (read(SAVED / f"{name}.csv") for name in FILES)
    found = {"all seeds": report.report(fmnist), "accuracy against lambda": lambda_table(ledgers)}
    if some:
        found["the seeds with all baselines"] = report.report(some)
    return found | {
        "CIFAR-10": report.report(cifar), "dial": dial_table(dial),
        "compute": compute_table(compute), "compute, paired": compared_table(compute),
        "uncertainty": uncertainty_table(uncertainty),
        "questions": question_table(ledgers, architectures)}

def collect(out, cifar):
    """Write the CSV files and the picture from the run folders that are finished."""
    files, foreign = {name: [] for name in FILES}, None
    dial, compute, uncertainty, architectures = files.values()
    for folder in sorted(Path(out).glob("*-*")):
        dial += [{"run": folder.name} | row for row in read(folder / "ablation.csv")]
        kind, results = folder.name.rpartition("-")[0], nes.load(folder / "results.json")
        if not results:
            continue
        args = argparse.Namespace(**results["settings"] | {"out": str(folder)})
        rows = read(folder / "ledger.csv")
        # a folder of images by its name alone: where it was says nothing to others
        files[folder.name] = [row | {"dataset": Path(args.dataset).name} for row in rows]
        if kind in ("fmnist", "cifar10"):
            dial.append({"run": kind} | dial_row(args, results["lambda_response"]))
        if kind == "cifar10":
            continue
        data = nes.load_data(args.dataset, str(HERE.parent / "data"), seed=args.seed)
        labels = data.splits["test"][1]
        # longer runs, too, in epochs of the main one, whose search they have: the machine was not
        # always as free
        main = folder.with_name(f"fmnist-{args.seed}")
        *networks, _ = by(read(main / "ledger.csv"), "method")["ours",]
        epochs = nes.load(main / "results.json")["settings"]["epochs"]
        compute += compute_rows(folder, rows, labels, args, mean(networks, "seconds") / epochs)
        if kind == "fmnist":
            foreign = foreign_images(cifar, data.shape) if foreign is None else foreign
            uncertainty += uncertainty_rows(folder, rows, labels, foreign)
            architectures += architecture_rows(folder, rows, data, args)
    for name, rows in files.items():
        if rows:
            report.write(SAVED / f"{name}.csv", rows)
            print(f"{name}.csv: {len(rows)} rows")
    plot_compute(read(SAVED / "compute.csv"), HERE / "compute.png")

if __name__ == "__main__":
    if len(sys.argv) not in (1, 3):
        sys.exit(__doc__)
    if len(sys.argv) == 3:
        collect(*sys.argv[1:])
    for title, text in tables().items():
        print(f"\n{title}\n\n{text}")
