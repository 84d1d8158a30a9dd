"""What evidence.sh ran, made small: CSV files in ledger/ and two pictures, from its run folders.

    python .github/evidence.py DIR CIFAR    from the run folders; what is not finished is left out
    python .github/evidence.py              the tables of results.md, from the saved CSV files alone

DIR, CIFAR: as for evidence.sh. Writes beside itself:
    ledger/fmnist-S.csv, epochs-E-S.csv, ...   the ledgers of the runs, S their seed
    ledger/scores.csv       each ensemble: epochs, size, scores; compute.png is its picture
    ledger/elsewhere.csv    the main ensembles on shifted and on foreign images
    ledger/pairs.csv        entries that two networks share, and how often they disagree; pairs.png
    ledger/control.csv      the dial with L_val, without it, and changes at random
    ledger/dial.csv         matched entries against lambda, of each search
    ledger/ablation.csv     the same with an ingredient left out, and accuracy in one shot
"""
import argparse
import itertools
import statistics
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.v2 import functional as image_functions

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

def probabilities(folder, files, split="test"):
    """What networks predict, (M, N, Y)."""
    return torch.stack([nes.load(folder / file)[split] for file in files])

def lines_of(rows, *keys):
    """A line's title -> seed -> row, for `report.score_table`; the title: the values of `keys`."""
    return {", ".join(values): {row["seed"]: row for row in found}
            for values, found in by(rows, *keys).items()}

# ---- Scores: what to choose with a budget of epochs ----------------------------------------------

SHOT = [("one network", "single", 1), ("one shot of 20", "one-shot", 20)]
LONG = [*SHOT, ("base in one shot", "one-shot", 1)]
RUNS = {  # kind of run -> its ensembles: title, method, how many of its first networks
    "fmnist": [*SHOT, ("two deep", "deep", 2), ("two of ours", "ours", 2), ("five deep", "deep", 5),
               ("five of ours", "ours", 5), ("five perturbed", "perturbed", 5),
               ("five random", "random", 5)],
    "epochs-12": LONG, "epochs-20": LONG, "wide": [("one wide network", "single", 1)]}

def tempered_nll(probs, labels, T):
    """NLL of p^(1/T), normalised; p: the ensemble's mean of probs (M, N, Y)."""
    log_p = probs.double().mean(dim=0).clamp_min(1e-12).log()
    return torch.nn.functional.cross_entropy(log_p / T, labels).item()

def temperature(probs, labels):
    """The T with the lowest `tempered_nll`: one number, fitted on held-out images (Guo et al. 2017,
    "On calibration of modern neural networks")."""
    return min((T / 100 for T in range(50, 301)), key=lambda T: tempered_nll(probs, labels, T))

def size(path):
    """Parameters, and multiplications for an image, of a network's file."""
    net, data = nes.load_member(path)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.zeros(1, *data.shape))
    return sum(p.numel() for p in net.parameters()), counter.get_total_flops() / 2

def score_rows(folder, kind, rows, data, args):
    """A row of scores.csv for each ensemble of a run folder that RUNS names."""
    found, labels = [], {split: data.splits[split][1] for split in ("selection", "test")}
    seconds = {row["file"]: float(row["seconds"]) for row in rows if row["file"]}
    for title, method, count in RUNS[kind]:
        files = files_of(rows, method)[:count]
        if len(files) < count:
            continue
        shot, probs = method == "one-shot", probabilities(folder, files)
        epochs = args.shared_epochs if shot else count * args.epochs
        T = temperature(probabilities(folder, files, "selection"), labels["selection"])
        sizes = [size(folder / file) for file in dict.fromkeys(files)]
        searches = (["base"] * (method != "random") + ["hyper"] * (shot or method == "ours")
                    + ["shared"] * shot)
        searched = sum(nes.load(folder / f"{name}.pt")["seconds"] for name in searches)
        found.append({
            "seed": str(args.seed), "method": title, "epochs": str(epochs),
            "seconds": searched + sum(seconds[file] for file in dict.fromkeys(files)),
            "parameters": sum(net for net, _ in sizes), "multiplications": sum(m for _, m in sizes),
            "compute": epochs * statistics.mean(m for _, m in sizes),
            "temperature": T, "nll_tempered": tempered_nll(probs, labels["test"], T),
            **nes.ensemble_metrics(probs, labels["test"])})
    return found

# column -> (title, scale, digits)
SCORES = {"accuracy": ("accuracy, %", 100, 2), "nll": ("NLL", 1, 4),
          "nll_tempered": ("NLL, tempered", 1, 4), "ece": ("ECE", 1, 4)}
SIZES = {"parameters": ("parameters, thousands", 1e-3, 0),
         "multiplications": ("multiplications, millions", 1e-6, 1),
         "seconds": ("minutes", 1 / 60, 0), "temperature": ("temperature", 1, 2),
         "disagreement": ("disagree, %", 100, 2)}

def compared_table(points, pairs, columns):
    """Differences of pairs of lines, paired by seed."""
    lines = [["difference", *(title.replace("%", "points") for title, _, _ in columns.values())]]
    lines += [[f"{one} - {other}", *(paired(points[one], points[other], key, scale, places)
                                     for key, (_, scale, places) in columns.items())]
              for one, other in pairs if one in points and other in points]
    return markdown(lines)

DEEP, OURS = "five deep, 25", "five of ours, 25"  # epochs
SIZED = ("one network, 12", "one wide network, 6", "one shot of 20, 12", DEEP, OURS,
         "five perturbed, 25", "five random, 25")
QUESTIONS = [(OURS, DEEP), (OURS, "five perturbed, 25"), (OURS, "five random, 25"),
             (DEEP, "one network, 20"), (OURS, "one wide network, 6"),
             *((f"one shot of 20, {epochs}", f"one network, {epochs}") for epochs in (5, 12, 20)),
             ("one shot of 20, 12", "base in one shot, 12"), ("one shot of 20, 12", "two deep, 10")]

def plot_compute(points, path):
    """Accuracy and NLL against epochs of training, a wide network's by its multiplications."""
    figure, one = Figure((10, 4), layout="constrained"), points["one network, 5"].values()
    lines = {"one network": "one network", "one wide network": "one wide network",
             "one shot of 20": "twenty in one shot", "deep": "two and five, deep ensemble",
             "of ours": "two and five of ours"}
    axes = figure.subplots(1, 2)
    for axis, key, scale, label in zip(axes, ("accuracy", "nll"), (100, 1),
                                       ("test accuracy, %", "NLL, nats")):
        for name, title in lines.items():
            found = [seeds.values() for point, seeds in points.items() if f"{name}," in point]
            if found:
                axis.plot([5 * mean(seeds, "compute") / mean(one, "compute") for seeds in found],
                          [scale * mean(seeds, key) for seeds in found], "o-", label=title)
        axis.set(xlabel="cost of training, in epochs of one network", ylabel=label,
                 xticks=range(0, 30, 5))
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)

# ---- Elsewhere: shifted and foreign images -------------------------------------------------------

def shifted(images):
    """kind -> the images (N, C, H, W) uint8 at three strengths; noise is seeded."""
    noise = torch.randn(images.shape, generator=nes.rng("noise"))
    changes = {
        "noise": (lambda s: (images + 255 * s * noise).clamp(0, 255).to(torch.uint8), .1, .2, .3),
        "blur": (lambda s: image_functions.gaussian_blur(images, [7, 7], [s, s]), .8, 1.2, 1.6),
        "contrast": (lambda s: image_functions.adjust_contrast(images, s), .6, .4, .2),
        "rotation": (lambda s: image_functions.rotate(images, s), 10.0, 20.0, 30.0)}
    return {kind: [change(s) for s in strengths] for kind, (change, *strengths) in changes.items()}

ELSEWHERE = {
    "noise": ("noise, %", 100, 1), "blur": ("blur, %", 100, 1),
    "contrast": ("less contrast, %", 100, 1), "rotation": ("rotation, %", 100, 1),
    "shifted_nll": ("NLL, shifted", 1, 3), "auroc": ("AUROC, foreign images", 1, 3)}
ELSEWHERE_COMPARED = {key: ELSEWHERE[key] for key in ("shifted_nll", "auroc")}

def auroc(inside, outside):
    """The probability that a value of `outside` is larger than one of `inside`; ties count half."""
    inside = inside.sort().values
    below, not_above = (torch.searchsorted(inside, outside, right=side) for side in (False, True))
    return ((below + not_above).double().mean() / 2 / len(inside)).item()

def entropy(probs):
    """Of the ensemble's mean prediction, (M, N, Y) -> (N,), nats."""
    return torch.special.entr(probs.double().mean(dim=0)).sum(dim=-1)

def elsewhere_rows(folder, rows, data, foreign):
    """A row of elsewhere.csv for each main ensemble. Of the test images every fourth is shifted.
    foreign: images (N, C, H, W) of another data set. Predictions are kept in the folder."""
    kept, found = nes.load(folder / "elsewhere.pt") or {}, []
    images, labels = (part[::4] for part in data.splits["test"])
    sets = {"foreign": [foreign], **shifted(images)}
    ensembles = {title: files for title, method, count in RUNS["fmnist"]
                 if count != 2 and (files := files_of(rows, method)[:count])}
    for file in {file for files in ensembles.values() for file in files} - set(kept):
        net, like = nes.load_member(folder / file)
        kept[file] = {kind: torch.stack([nes.predict(net, x, like).half() for x in some])
                      for kind, some in sets.items()}
        nes.save(folder / "elsewhere.pt", kept)
    for title, files in ensembles.items():
        own, at = probabilities(folder, files), lambda kind: torch.stack(
            [kept[file][kind].float() for file in files])                    # (M, strengths, N, Y)
        scores = {kind: [nes.ensemble_metrics(at(kind)[:, s], labels) for s in range(3)]
                  for kind in sets if kind != "foreign"}
        found.append({"seed": rows[0]["seed"], "method": title,
                      "auroc": auroc(entropy(own), entropy(at("foreign")[:, 0])),
                      **{kind: mean(three, "accuracy") for kind, three in scores.items()},
                      "shifted_nll": mean(itertools.chain(*scores.values()), "nll")})
    return found

def foreign_images(root, shape, count=5000):
    """Images of a folder of classes, every n-th one, resized; grey where the networks want grey."""
    paths = sorted(Path(root).glob("test/*/*"), key=lambda path: path.parts)
    paths = paths[::max(1, len(paths) // count)]
    return torch.stack([nes.read_image(path, shape) for path in paths])

# ---- Does lambda mean anything in function? ------------------------------------------------------

def pair_rows(folder, rows, labels):
    """Of all pairs of different networks that share as many entries: how often they disagree."""
    found = []
    for kind, methods in (("trained", ("ours", "deep", "perturbed", "random")),
                          ("one shot", ("one-shot",))):
        files = sorted({file for method in methods for file in files_of(rows, method)})
        states = [nes.load(folder / file) for file in files]
        pairs = [{"entries": int(nes.matched_entries(a["network"]["arch"], b["network"]["arch"])),
                  "disagreement": nes.ensemble_metrics(torch.stack([a["test"], b["test"]]),
                                                       labels)["disagreement"]}
                 for a, b in itertools.combinations(states, 2)]
        found += [{"seed": rows[0]["seed"], "method": kind, "entries": entries, "pairs": len(same),
                   "disagreement": mean(same, "disagreement")}
                  for (entries,), same in sorted(by(pairs, "entries").items())]
    return found

def pair_table(rows):
    """The slope of a line through all pairs, a seed each: points of disagreement an entry."""
    lines = [["pairs of networks", "seeds", "disagreement for each shared entry, points"]]
    for (kind,), found in by(rows, "method").items():
        slopes = []
        for same in by(found, "seed").values():
            x, y = ([float(row[key]) for row in same for _ in range(int(row["pairs"]))]
                    for key in ("entries", "disagreement"))
            slopes.append(100 * statistics.linear_regression(x, y).slope)
        lines.append([kind, str(len(slopes)), mean_interval(slopes, 3)])
    return markdown(lines)

def plot_pairs(rows, path):
    figure = Figure((6, 4), layout="constrained")
    axis = figure.subplots()
    for (kind,), found in by(rows, "method").items():
        points = sorted((int(entries), 100 * mean(same, "disagreement"))
                        for (entries,), same in by(found, "entries").items())
        axis.plot(*zip(*points), "o-", label=f"{kind}, mean of the seeds")
    axis.set(xlabel="entries of 16 that two networks share", ylabel="test images on which they "
             "disagree, %", title="Architectures alike, predictions alike?", ylim=(0, None))
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)

# ---- What does L_val give? -----------------------------------------------------------------------

CONTROL = {"dial_error": ("dial error", 1, 3),
           "shot_mean": ("in one shot: member, %", 100, 2), "shot_nll": ("NLL of 20", 1, 4),
           "trained_mean": ("trained: member, %", 100, 2), "trained_nll": ("NLL of 5", 1, 4)}
CONTROLS = {"fmnist": "with L_val", "blind": "without L_val", "perturbed": "changed at random"}

def control_row(folder, kind, rows, results, data):
    """A row of control.csv: five trained networks, twenty in one shot; selection split."""
    labels = data.splits["selection"][1]
    trained, shots = (probabilities(folder, files_of(rows, method), "selection")
                      for method in ("ours", "one-shot"))
    alone = lambda probs: statistics.mean(
        nes.ensemble_metrics(one[None], labels)["accuracy"] for one in probs)
    return {"seed": rows[0]["seed"], "method": CONTROLS[kind],
            "dial_error": results["lambda_response"]["dial_error"],
            "shot_mean": alone(shots), "shot_nll": nes.ensemble_metrics(shots, labels)["nll"],
            "trained_mean": alone(trained),
            "trained_nll": nes.ensemble_metrics(trained, labels)["nll"]}

# ---- The dial, and its ingredients ---------------------------------------------------------------

ABLATION = {"dial_error": ("dial error", 1, 3),
            "one_shot_selection": ("one shot, selection split, %", 100, 1)}
TENTHS = [f"{t / 10:.1f}" for t in range(11)]

def dial_row(args, response):
    """A `nes.lambda_response` as a row."""
    return {"dataset": Path(args.dataset).name, "seed": args.seed,
            "dial_error": response["dial_error"],
            **{t: point["entries"] for t, point in zip(TENTHS, response["points"])}}

def dial_table(rows):
    """A line for each kind of run: entries at four lambdas, dial error; means of seeds."""
    lines = [["run", "seeds", "0.0", "0.3", "0.7", "1.0", "dial error"]]
    for (run,), seeds in by(rows, "run").items():
        errors = [float(row["dial_error"]) for row in seeds]
        lines.append([run, str(len(seeds)), *(f"{mean(seeds, t):.1f}" for t in lines[0][2:6]),
                      mean_std(errors, 3)])
    return markdown(lines)

# ---- All of it -----------------------------------------------------------------------------------

SAVED, SEARCHES = HERE / "ledger", ("deep", "ours", "random", "nes-rs", "darts")
FILES = ("scores", "elsewhere", "pairs", "control", "dial", "ablation")

def tables():
    """title -> Markdown, of the saved CSV files that are there; results.md holds each of them."""
    fmnist, cifar = (sorted(SAVED.glob(f"{name}-?.csv")) for name in ("fmnist", "cifar10"))
    some = [path for path in fmnist if ("darts",) in by(read(path), "method")]
    saved = {name: read(SAVED / f"{name}.csv") for name in FILES}
    scores, elsewhere, pairs, control, dial, ablation = saved.values()
    points, there = lines_of(scores, "method", "epochs"), lines_of(elsewhere, "method")
    # only the seeds that all lines have, so that the lines can be compared
    common = set.intersection(*map(set, points.values())) if points else ()
    points = {title: {seed: seeds[seed] for seed in sorted(common)}
              for title, seeds in points.items()}
    controls, without = lines_of(control, "method"), lines_of(ablation, "without")
    found = {
        "scores": scores and score_table(points, SCORES),
        "sizes": scores and score_table(
            {title: points[title] for title in SIZED if title in points}, SIZES),
        "scores, compared": scores and compared_table(points, QUESTIONS, SCORES),
        "other searches": some and report.report(some, SEARCHES, report.COLUMNS),
        "elsewhere": there and score_table(there, ELSEWHERE),
        "elsewhere, compared": there and score_table(there, ELSEWHERE_COMPARED, "five deep"),
        "pairs": pairs and pair_table(pairs),
        "control, compared": controls and score_table(controls, CONTROL, "with L_val"),
        "dial": dial and dial_table(dial),
        "ingredients": without and score_table(without, ABLATION),
        "CIFAR-10": cifar and report.report(cifar, columns=report.COLUMNS)}
    return {title: text for title, text in found.items() if text}

def collect(out, cifar):
    """Write the CSV files and the pictures from the run folders that are finished."""
    files, foreign = {name: [] for name in FILES}, None
    for folder in sorted(Path(out).iterdir()):
        ablation = [{"run": folder.name} | row for row in read(folder / "ablation.csv")]
        files["dial" if folder.name.startswith("dial") else "ablation"] += ablation
        kind, results = folder.name.rpartition("-")[0], nes.load(folder / "results.json")
        if not results:
            continue
        args = argparse.Namespace(**results["settings"] | {"out": str(folder)})
        rows = read(folder / "ledger.csv")
        # a folder of images by its name alone: where it was says nothing to others
        files[folder.name] = [row | {"dataset": Path(args.dataset).name} for row in rows]
        if kind in ("fmnist", "cifar10"):
            files["dial"].append({"run": kind} | dial_row(args, results["lambda_response"]))
        if args.dataset != "fmnist":
            continue
        data = nes.load_data(args.dataset, str(HERE.parent / "data"), seed=args.seed)
        if kind in RUNS:
            files["scores"] += score_rows(folder, kind, rows, data, args)
        if kind in CONTROLS:
            files["control"].append(control_row(folder, kind, rows, results, data))
        if kind == "fmnist":
            foreign = foreign_images(cifar, data.shape) if foreign is None else foreign
            files["elsewhere"] += elsewhere_rows(folder, rows, data, foreign)
            files["pairs"] += pair_rows(folder, rows, data.splits["test"][1])
    files["scores"].sort(key=lambda row: int(row["epochs"]))
    for name, rows in files.items():
        if rows:
            report.write(SAVED / f"{name}.csv", rows)
            print(f"{name}.csv: {len(rows)} rows")
    if "one network, 5" in (points := lines_of(files["scores"], "method", "epochs")):
        plot_compute(points, HERE / "compute.png")
        plot_pairs(files["pairs"], HERE / "pairs.png")

if __name__ == "__main__":
    if len(sys.argv) not in (1, 3):
        sys.exit(__doc__)
    if len(sys.argv) == 3:
        collect(*sys.argv[1:])
    for title, text in tables().items():
        print(f"\n{title}\n\n{text}")
