"""What evidence.sh ran, made small: CSV files in ledger/ and one picture, from its run folders.

    python .github/evidence.py DIR CIFAR    from the run folders; what is not finished is left out
    python .github/evidence.py              the tables of results.md, from the saved CSV files alone

DIR, CIFAR: as for evidence.sh. Writes beside itself, a file a run and one for each question:
    ledger/fmnist-S.csv, epochs-E-S.csv, cifar10-S.csv   the ledgers of the runs, S their seed
    ledger/dial.csv          matched entries against lambda, of each search
    ledger/compute.csv       scores against epochs of training spent, and compute.png, its picture
    ledger/uncertainty.csv   does the entropy of the prediction tell what is wrong, or foreign?
    ledger/architectures.csv each trained architecture: accuracy trained, and in one shot
    ledger/questions.csv     a number a seed for each question of results.md
"""
import argparse
import csv
import json
import statistics
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import nes
import report


def read(path):
    return list(csv.DictReader(path.open(newline=""))) if path.exists() else []


def write(path, rows):
    nes.save(path, nes.ledger(rows))
    print(f"{path.name}: {len(rows)} rows", flush=True)


def settings_of(folder):
    return json.loads((folder / "results.json").read_text())["settings"]


def probabilities(folder, files, split="test"):
    """(M, N, Y), as the run saved them."""
    return torch.stack([nes.load(folder / file)[split] for file in files])


def files_of(rows, method):
    """The files of a method's members, in the ledger's order, only those in its ensemble."""
    return [row["file"] for row in rows if row["method"] == method and row["index"] != "ensemble"
            and row["chosen"] == "1"]


def by(rows, *keys):
    """The rows that share their values of `keys`, together: (values) -> rows."""
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def mean(values):
    return statistics.mean(map(float, values))


# ---- The dial ------------------------------------------------------------------------------------

TENTHS = [f"{t / 10:.1f}" for t in range(11)]


def dial_rows(folder):
    """Of a run of nes.py, one row; of one of ablation.py, those that it wrote."""
    if (folder / "ablation.csv").exists():
        return [{"run": folder.name, "dataset": row["dataset"], "seed": row["seed"],
                 "calibration_error": row["calibration_error"], "spearman": row["spearman"],
                 **{t: row[f"entries at {t}"] for t in TENTHS}}
                for row in read(folder / "ablation.csv")]
    results = json.loads((folder / "results.json").read_text())
    response, settings = results["lambda_response"], results["settings"]
    return [{"run": folder.name.rpartition("-")[0], "dataset": Path(settings["dataset"]).name,
             "seed": settings["seed"], "calibration_error": response["calibration_error"],
             "spearman": response["spearman"],
             **{t: point["matched_entries"] for t, point in zip(TENTHS, response["points"])}}]


def dial_table(rows):
    """A line for each kind of run: mean entries over its seeds, calibration error of each."""
    lines = [["run", "seeds", *TENTHS, "calibration error", "mean", "Spearman, worst"]]
    for (run,), seeds in by(rows, "run").items():
        errors = [float(row["calibration_error"]) for row in seeds]
        entries = [f"{mean(row[t] for row in seeds):.1f}" for t in TENTHS]
        lines.append([run, str(len(seeds)), *entries,
                      ", ".join(f"{error:.3f}" for error in errors), report.mean_std(errors, 3),
                      f"{max(float(row['spearman']) for row in seeds):.3f}"])
    return report.markdown(lines)


# ---- Equal compute: what to choose with a budget of epochs ---------------------------------------

CORES = 2  # of the machine: the search used both of them, a network one


def seconds_an_epoch(folder):
    """Of a member of ours, mean. Of the main run also for the runs that were trained for longer:
    they share its search, and the machine was not always as free as when it ran."""
    rows, settings = read(folder / "ledger.csv"), settings_of(folder)
    return mean(row["seconds"] for row in rows
                if row["method"] == "ours" and row["seconds"]) / settings["epochs"]


def compute_rows(folder, rows, labels, epochs, shared_epochs, epoch_seconds):
    """Scores of the ensembles that a run's networks make, with the epochs of training they cost.

    search_epochs: the seconds of the search that the method needs, in epochs of a member.
    """
    search = {row["method"]: CORES * float(row["search_seconds"]) for row in rows
              if row["index"] == "ensemble"}
    shots = next(method for method in search if method.startswith("one-shot"))
    choices = [("one network", "single", 1, epochs)]
    choices += [("deep ensemble", "deep", count, count * epochs) for count in (2, 3, 5)]
    choices += [("ours", "ours", count, count * epochs) for count in (2, 3, 5)]
    choices += [("ours, one shot of 20", shots, 20, shared_epochs)] * (shared_epochs > 0)
    found = []
    for title, method, count, spent in choices:
        files = files_of(rows, method)[:count]
        if len(files) == count:
            found.append({"seed": rows[0]["seed"], "method": title, "networks": count,
                          "epochs": spent,
                          "search_epochs": round(search[method] / epoch_seconds, 2),
                          **nes.ensemble_metrics(probabilities(folder, files), labels)})
    return found


def complete(rows):
    """Those of the seeds that have all points, so that no point has luckier seeds than another."""
    points = by(rows, "method", "epochs").values()
    seeds = set.intersection(*({row["seed"] for row in here} for here in points))
    return [row for row in rows if row["seed"] in seeds]


def compute_points(rows):
    """method -> its points (networks, epochs, with the search, accuracy in %, NLL, seeds), means
    over the seeds that have all."""
    points = {}
    for (method, spent), here in by(complete(rows), "method", "epochs").items():
        of = lambda key: mean(row[key] for row in here)
        points.setdefault(method, []).append((
            int(here[0]["networks"]), float(spent), float(spent) + of("search_epochs"),
            100 * of("accuracy"), of("nll"), len(here)))
    return {method: sorted(found, key=lambda point: point[1]) for method, found in points.items()}


def compute_table(rows):
    lines = [["method", "networks", "epochs, all networks", "with the search", "accuracy, %", "NLL",
              "seeds"]]
    lines += [[method, str(networks), f"{spent:.0f}", f"{total:.1f}", f"{accuracy:.2f}",
               f"{nll:.4f}", str(seeds)] for method, points in compute_points(rows).items()
              for networks, spent, total, accuracy, nll, seeds in points]
    return report.markdown(lines)


COMPARED = [(method, spent) for method in ("ours", "deep ensemble") for spent in (10, 15, 25)]
COMPARED += [("ours, one shot of 20", spent) for spent in (8, 12)]
LONGER = [("one network", epochs) for epochs in (8, 12, 20)]  # than the default 5


def compared_table(rows):
    """Each point minus the deep ensemble of as many epochs, and minus one network for longer:
    accuracy, then NLL, paired by seed, over the seeds that have all points."""
    points = {(method, int(epochs)): {row["seed"]: row for row in found}
              for (method, epochs), found in by(complete(rows), "method", "epochs").items()}

    def minus(point, other, key, scale, places):
        if point == other or other not in points:
            return ""
        return report.mean_interval([scale * (float(row[key]) - float(points[other][seed][key]))
                                     for seed, row in points[point].items()], places)

    def table(title, *scores):
        lines = [[title, "minus deep ensemble, as many epochs",
                  *(f"minus {method}, {epochs} epochs" for method, epochs in LONGER)]]
        lines += [[f"{method}, {spent} epochs", *(
            minus((method, spent), other, *scores)
            for other in (("deep ensemble", spent), *LONGER))]
            for method, spent in COMPARED if (method, spent) in points]
        return report.markdown(lines)
    return table("accuracy, points", "accuracy", 100, 2) + "\n\n" + table("NLL", "nll", 1, 4)


def plot_compute(rows, path):
    """Accuracy and NLL against epochs, mean of the seeds that have all points."""
    figure = Figure((10, 4), layout="constrained")
    titles = ("test accuracy, %", "NLL, nats")
    for axis, column, title in zip(figure.subplots(1, 2), (3, 4), titles):
        for method, points in compute_points(rows).items():
            axis.plot([point[2] for point in points], [point[column] for point in points], "o-",
                      label=method)
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


def errors_by_certainty(probs, labels, share=0.1):
    """Of the `share` of the images whose prediction has most entropy: (how many of them are wrong,
    how many of all wrong ones are among them, how many of the other images are wrong), shares."""
    order = entropy(probs).argsort(descending=True)
    wrong = (probs.mean(dim=0).argmax(dim=-1) != labels)[order].double()
    unsure, rest = wrong.tensor_split([int(share * len(labels))])
    return [value.item() for value in (unsure.mean(), unsure.sum() / wrong.sum(), rest.mean())]


# column -> (title, scale, digits)
UNCERTAINTY = {"auroc": ("AUROC", 1, 3), "auroc_of_one": ("of its members alone, mean", 1, 3),
               "errors_least_certain": ("errors among the 10 % least certain, %", 100, 1),
               "errors_caught": ("their part of all errors, %", 100, 1),
               "errors_rest": ("errors among the other 90 %, %", 100, 2)}


def uncertainty_rows(folder, rows, labels, foreign):
    """A row a method; foreign: images (N, C, H, W) of another data set. Predictions are kept."""
    predicted, found = nes.load(folder / "foreign.pt") or {}, []
    for file in {row["file"] for row in rows if row["file"]} - set(predicted):
        net, data = nes.load_member(folder / file)
        predicted[file] = nes.predict(net, foreign, data)
    nes.save(folder / "foreign.pt", predicted)
    for method in dict.fromkeys(row["method"] for row in rows):
        files = files_of(rows, method)
        own, other = probabilities(folder, files), torch.stack([predicted[file] for file in files])
        alone = [auroc(entropy(a[None]), entropy(b[None])) for a, b in zip(own, other)]
        values = [auroc(entropy(own), entropy(other)), mean(alone),
                  *errors_by_certainty(own, labels)]
        found.append({"seed": rows[0]["seed"], "method": method, "networks": len(files),
                      **dict(zip(UNCERTAINTY, values))})
    return found


def uncertainty_table(rows):
    """A line a method, over its seeds; then differences, paired by seed."""
    methods = {method: {row["seed"]: row for row in found}
               for (method,), found in by(rows, "method").items()}
    titles = [title for title, _, _ in UNCERTAINTY.values()]
    text = [report.markdown([["method", "seeds", *titles]] + [
        [method, str(len(seeds)), *(
            report.mean_std([scale * float(row[key]) for row in seeds.values()], places)
            for key, (_, scale, places) in UNCERTAINTY.items())]
        for method, seeds in methods.items()])]
    compared = {key: UNCERTAINTY[key] for key in ("auroc", "errors_caught", "errors_rest")}
    for other in ("single", "deep", "perturbed"):
        lines = [[f"minus {other}", "seeds", *(title for title, _, _ in compared.values())]]
        for method, seeds in methods.items():
            minus = lambda key, scale: [
                scale * (float(row[key]) - float(methods[other][seed][key]))
                for seed, row in seeds.items()]
            lines += [[method, str(len(seeds)), *(
                report.mean_interval(minus(key, scale), places)
                for key, (_, scale, places) in compared.items())]] * (method != other)
        text.append(report.markdown(lines))
    return "\n\n".join(text)


def foreign_images(root, shape, count=5000):
    """Images of a folder of classes, every n-th one, resized; grey where the networks want grey."""
    paths = sorted(Path(root).glob("test/*/*"))
    return torch.stack([nes.read_image(path, shape) for path in paths[::len(paths) // count]])


# ---- Questions, a number a seed ------------------------------------------------------------------

PAIRS = [("ours", "perturbed"), ("ours", "random"), ("ours", "deep"), ("chosen", "ours"),
         ("ours, one-shot", "ours"), ("one-shot of 50", "single"), ("ours", "darts"),
         ("ours", "nes-rs")]


def rank_correlation(x, y):
    """Spearman's; equal values share their rank."""
    x, y = (torch.as_tensor(v, dtype=torch.double) for v in (x, y))
    ranks = lambda v: (v[:, None] > v).double().sum(1) + (v[:, None] == v).double().sum(1) / 2
    return torch.corrcoef(torch.stack([ranks(x), ranks(y)]))[0, 1].item()


def architecture_rows(folder, rows, data, args):
    """A row for each trained architecture: its accuracy trained, on test (of several networks the
    mean), and in one shot, on selection; the methods that have it."""
    trained = {}
    for row in rows:
        if row["file"].startswith("members"):
            trained.setdefault(row["genotype"], []).append(row)
    found = []
    for here in trained.values():
        networks = {row["file"]: row["accuracy"] for row in here}
        arch = nes.load(folder / here[0]["file"])["network"][4]
        name = nes.one_shot_name(arch)
        if not (folder / f"{name}.pt").exists():
            nes.make_one_shot(name, arch, data, args)
        scores = nes.member_metrics(nes.load(folder / f"{name}.pt")["selection"],
                                    data.splits["selection"][1])
        found.append({"seed": rows[0]["seed"], "architecture": Path(name).name,
                      "methods": " ".join(dict.fromkeys(row["method"] for row in here)),
                      "networks": len(networks), "trained_test": mean(networks.values()),
                      "one_shot_selection": scores["accuracy"]})
    return found


def one_shot_tells(found):
    """Rank correlation of accuracy in one shot and trained, of rows of `architecture_rows`."""
    return rank_correlation([float(row["one_shot_selection"]) for row in found],
                            [float(row["trained_test"]) for row in found])


def question_rows(rows, found):
    """question -> its number, of one seed; found: of `architecture_rows`."""
    ensembles = {row["method"]: row for row in rows if row["index"] == "ensemble"}

    def slope(method, key):
        chosen = [row for row in rows if row["method"] == method and row["lambda"]]
        return 100 * statistics.linear_regression(
            [float(row["lambda"]) for row in chosen], [float(row[key]) for row in chosen]).slope
    numbers = {f"{a} minus {b}, points": 100 * (float(ensembles[a]["accuracy"])
                                               - float(ensembles[b]["accuracy"]))
               for a, b in PAIRS if a in ensembles and b in ensembles}
    tells = "one-shot (selection) and trained (test) accuracy, rank correlation, "
    numbers[tells + "ours"] = one_shot_tells(
        [row for row in found if "ours" in row["methods"].split()])
    numbers[tells + "all trained"] = one_shot_tells(found)
    for title, method, key in (("trained accuracy", "ours", "accuracy"),
                               ("one-shot accuracy", "one-shot of 50", "accuracy"),
                               ("one-shot accuracy on selection", "one-shot of 50",
                                "selection_accuracy")):
        numbers[f"{title}, slope from lambda = 0 to 1, points"] = slope(method, key)
    numbers["search of ours, in base searches"] = (
        float(ensembles["ours"]["search_seconds"]) / float(ensembles["deep"]["search_seconds"]))
    return [{"seed": rows[0]["seed"], "question": name, "value": value}
            for name, value in numbers.items()]


def question_table(rows):
    lines = [["", "seeds", "mean and 95 % interval"]]
    for (question,), seeds in by(rows, "question").items():
        lines.append([question, str(len(seeds)),
                      report.mean_interval([float(row["value"]) for row in seeds], 2)])
    return report.markdown(lines)


def lambda_table(ledgers):
    """Accuracy of ours against lambda, trained and in one shot, over the seeds."""
    lines = [["lambda", "entries of 16", "trained, %", "one shot, %"]]
    rows = [row for ledger in ledgers for row in read(ledger) if row["lambda"]]
    ours = by([row for row in rows if row["method"] == "ours"], "lambda")
    for (lam,), found in sorted(ours.items()):
        shots = [row for row in rows if row["method"] == "ours, one-shot" and row["lambda"] == lam]
        percent = lambda rows: report.mean_std([100 * float(row["accuracy"]) for row in rows], 2)
        lines.append([f"{float(lam):.3f}", f"{mean(row['entries'] for row in found):.1f}",
                      percent(found), percent(shots)])
    return report.markdown(lines)


# ---- All of it -----------------------------------------------------------------------------------

def tables():
    """title -> Markdown, of the saved CSV files; results.md holds each of them."""
    saved = HERE / "ledger"
    fmnist, cifar = (sorted(saved.glob(f"{name}-?.csv")) for name in ("fmnist", "cifar10"))
    some = [path for path in fmnist if {"nes-rs", "darts"} <= {row["method"] for row in read(path)}]
    found = {"all seeds": report.report(fmnist), "accuracy against lambda": lambda_table(fmnist)}
    if len(some) > 1:
        found["the seeds with all baselines"] = report.report(some)
    if cifar:
        found["CIFAR-10"] = report.report(cifar)
    for title, name, make in (("dial", "dial", dial_table), ("compute", "compute", compute_table),
                              ("compute, paired", "compute", compared_table),
                              ("uncertainty", "uncertainty", uncertainty_table),
                              ("questions", "questions", question_table)):
        if rows := read(saved / f"{name}.csv"):
            found[title] = make(rows)
    return found


def collect(out, cifar):
    """Write the CSV files and the picture from the run folders that are finished."""
    out, saved, foreign = Path(out), HERE / "ledger", None
    dials, compute, uncertain, architectures, questions = [], [], [], [], []
    for folder in sorted(out.glob("*-*")):
        if (folder / "ablation.csv").exists() or (folder / "results.json").exists():
            dials += dial_rows(folder) * (not folder.name.startswith("epochs"))
        if not (folder / "results.json").exists():
            continue
        # a folder of images by its name alone: where it was says nothing to others
        rows = [row | {"dataset": Path(row["dataset"]).name} for row in read(folder / "ledger.csv")]
        write(saved / f"{folder.name}.csv", rows)
        settings = settings_of(folder)
        args = argparse.Namespace(**settings | {"out": str(folder)})
        if args.dataset != "fmnist":
            continue
        data = nes.load_data("fmnist", str(HERE.parent / "data"), seed=args.seed)
        labels = data.splits["test"][1]
        compute += compute_rows(folder, rows, labels, args.epochs, args.shared_epochs,
                                seconds_an_epoch(out / f"fmnist-{args.seed}"))
        if folder.name.startswith("fmnist"):
            foreign = foreign_images(cifar, data.shape) if foreign is None else foreign
            uncertain += uncertainty_rows(folder, rows, labels, foreign)
            architectures += (found := architecture_rows(folder, rows, data, args))
            questions += question_rows(rows, found)
    for name, rows in (("dial", dials), ("compute", compute), ("uncertainty", uncertain),
                       ("architectures", architectures), ("questions", questions)):
        write(saved / f"{name}.csv", rows)
    plot_compute(compute, HERE / "compute.png")


if __name__ == "__main__":
    if len(sys.argv) not in (1, 3):
        sys.exit(__doc__)
    if len(sys.argv) == 3:
        collect(*sys.argv[1:])
    for title, text in tables().items():
        print(f"\n{title}\n\n{text}")
