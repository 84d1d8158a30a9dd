"""What evidence.sh ran, made small: CSV files in ledger/ and pictures, from its run folders.

    python .github/evidence.py DIR CIFAR    from the run folders; what is not finished is left out
    python .github/evidence.py              tables and pictures of results.md, from the saved files

DIR, CIFAR: as for evidence.sh. Writes beside itself:
    ledger/fmnist-S.csv, epochs-E-S.csv, ...   the ledgers of the runs, S their seed
    ledger/shots.csv        each network in one shot: its lambda, how often it disagrees with that
                            at lambda = 0; finding.png shows it beside the trained twins
    ledger/sizes.csv        the first 1, 2, 3, 5, 10 and 20 networks in one shot, together
    ledger/scores.csv       each ensemble: epochs, size, scores; compute.png is its picture
    ledger/elsewhere.csv    the main ensembles on shifted and on foreign images
    ledger/pairs.csv        entries that two networks share, and how often they disagree
    ledger/control.csv      the dial with L_val, without it, and changes at random
    ledger/dial.csv         matched entries against lambda, of each search
    ledger/ablation.csv     the same with an ingredient left out, and accuracy in one shot
twins.py writes twins.csv and calibration.csv, few.py few.csv.
"""
import argparse
import itertools
import json
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

def of_common_seeds(lines):
    """Only the seeds that all lines have, so that the lines can be compared."""
    common = set.intersection(*map(set, lines.values())) if lines else ()
    return {title: {seed: seeds[seed] for seed in sorted(common)} for title, seeds in lines.items()}

# ---- The finding: what moves predictions? --------------------------------------------------------

TWINS = {"nothing": "nothing", "weight": "one weight by 1e-6", "entry": "one entry",
         "sixteen": "all sixteen entries", "init": "the initial weights",
         "order": "the order of batches", "both": "a new seed: both of these",
         "both-sixteen": "a new seed and all sixteen entries"}
# Of 4,218 steps those where the order of batches is changed late, and their epochs: each is one
# after which a checkpoint was written
LATE = {1700: "2.0", 2500: "3.0", 3400: "4.0"}
GAIN = {"gain": ("NLL, less the members' mean", 1, 4)}
TWIN = {"disagreement": ("disagree, %", 100, 2), "accuracy": ("accuracy of the pair, %", 100, 2),
        **GAIN}
MOVED = {key: TWIN[key] for key in ("disagreement", "gain")}
TWIN_QUESTIONS = [(TWINS[one], TWINS[other]) for one, other in (
    ("entry", "weight"), ("sixteen", "weight"), ("both", "weight"), ("sixteen", "both"),
    ("both-sixteen", "both"))]

def twin_lines(rows, titles=TWINS):
    """What is changed -> seed -> row; where a seed has several draws, their mean."""
    return {titles[change]: {seed: {key: mean(draws, key) for key in TWIN}
                            for (seed,), draws in by(same, "seed").items()}
            for (change,), same in by(rows, "change").items() if change in titles}

MEMBER = {"member_mean": ("a member's accuracy, %", 100, 2)}
SIZES = {"accuracy": ("accuracy, %", 100, 2), "nll": ("NLL", 1, 4)}

def plot_twins(rows, path):
    """Disagreement against what is changed, a point a seed."""
    figure, lines = Figure((7, 4), layout="constrained"), twin_lines(rows)
    axis = figure.subplots()
    for y, seeds in enumerate(lines.values()):
        values = [100 * row["disagreement"] for row in seeds.values()]
        axis.plot(values, [y] * len(values), "o", color="tab:blue", alpha=0.5)
        axis.plot(statistics.mean(values), y, "|", color="black", markersize=18)
    axis.set(xlim=(0, 1.05 * axis.get_xlim()[1]), yticks=range(len(lines)), yticklabels=lines,
             xlabel="test images on which two networks disagree, %", title="What is changed?")
    axis.invert_yaxis()
    figure.savefig(path, dpi=110)

def shot_rows(folder, rows, labels):
    """Rows of shots.csv and of sizes.csv, of the networks in one shot, the first at lambda = 0."""
    shots = [row for row in rows if row["method"] == "one-shot" and row["file"]]
    probs = probabilities(folder, [row["file"] for row in shots])
    scores = lambda probs: nes.ensemble_metrics(probs, labels)
    alone = scores(probs[:1])["accuracy"]
    return [{"seed": row["seed"], "lambda": row["lambda"], "entries": row["entries"],
             "disagreement": scores(probs[[0, i]])["disagreement"], "accuracy": row["accuracy"],
             "gained": float(row["accuracy"]) - alone} for i, row in enumerate(shots)], [
            {"seed": rows[0]["seed"], "networks": count, **scores(probs[:count])}
            for count in (1, 2, 3, 5, 10, 20)]

def response_table(shots, trained):
    """Disagreement with the network at lambda = 0: in one shot, at four of its twenty lambdas; and
    trained with the seed held, where lambda has its members."""
    lines = [["lambda", "in one shot: disagree, %", "accuracy, less that at lambda = 0, points",
              "trained, seed held: disagree, %"]]
    column = lambda rows, key: [100 * float(row[key]) for row in rows]
    at = lambda rows: by([row | {"at": f"{float(row['lambda']):.2f}"} for row in rows], "at")
    shots, trained = at(shots), at(trained)
    for lam in ("0.12", "0.24", "0.35", "0.47", "0.62", "0.85"):
        shot, own = shots.get((lam,)), trained.get((lam,))
        lines.append([lam, mean_std(column(shot, "disagreement"), 2) if shot else "",
                      mean_interval(column(shot, "gained"), 2) if shot else "",
                      mean_std(column(own, "disagreement"), 2) if own else ""])
    return markdown(lines)

def gains(path):
    """The NLL of ours in a saved ledger, less its members' mean."""
    rows = [row for row in read(path) if row["method"] == "ours"]
    (ensemble,), members = ([row for row in rows if bool(row["file"]) == own]
                            for own in (False, True))
    return float(ensemble["nll"]) - mean(members, "nll")

def plot_finding(dial, shots, twins, path):
    """Architectures along the dial, and predictions along it: means, and a point a seed."""
    figure = Figure((10, 4), layout="constrained")
    (left, right), level = figure.subplots(1, 2, sharex=True), by(twins, "change")
    percent = lambda rows: 100 * mean(rows, "disagreement")
    def curve(axis, rows, scale, key, color, label):
        points = sorted((float(lam), scale * mean(same, key))
                        for (lam,), same in by(rows, "lambda").items())
        axis.plot(*zip(*points), "-", color=color, label=label)
        axis.plot([float(row["lambda"]) for row in rows], [scale * float(row[key]) for row in rows],
                  ".", color=color, alpha=0.4)
    entries = [{"lambda": t, "entries": row[t]} for row in dial for t in TENTHS]
    curve(left, entries, 1, "entries", "tab:blue", "ours (dots: five seeds)")
    left.plot([0, 1], [nes.ENTRIES, 0], ":", color="grey", label="ideal: 16 (1 - lambda)")
    left.set(xlabel="lambda", ylabel="entries of 16 that are the base's", ylim=(0, None),
             title="Lambda is a dial of architectures ...")
    curve(right, shots, 100, "disagreement", "tab:orange", "in one shot: weights shared")
    curve(right, level["dial",], 100, "disagreement", "tab:blue", "trained, the seed held")
    right.plot(0, 0, "o", color="tab:blue", mfc="none", label="the network at lambda = 0 itself")
    for change, style, label in (("both", "--", "the base, another seed"),
                                 ("weight", ":", "the base, one weight moved by 1e-6")):
        right.axhline(percent(level[change,]), ls=style, color="grey", label=label)
    right.set(xlabel="lambda", ylabel="test images predicted differently\nthan at lambda = 0, %",
              ylim=(0, None), title="... of predictions only where weights are shared")
    for axis in (left, right):
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)

# ---- Scores: what to choose with a budget of epochs ----------------------------------------------

SHOT = [("one network", "single", 1), ("one shot of 20", "one-shot", 20)]
LONG = [*SHOT, ("base in one shot", "one-shot", 1)]
RUNS = {  # kind of run -> its ensembles: title, method, how many of its first networks
    "fmnist": [*SHOT, ("two deep", "deep", 2), ("two of ours", "ours", 2), ("five deep", "deep", 5),
               ("five of ours", "ours", 5), ("five perturbed", "perturbed", 5),
               ("five random", "random", 5)],
    "epochs-12": LONG, "epochs-20": LONG, "wide": [("one wide network", "single", 1)],
    "augmented-12": [(f"{title}, augmented", method, count) for title, method, count in SHOT]}
# A search takes as long as so many epochs of one network: 68 s against 49 s, one thread, alone
SEARCH_EPOCHS = 1.4

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
    for title, method, count in RUNS[kind]:
        files = files_of(rows, method)[:count]
        if len(files) < count:
            continue
        shot, probs = method == "one-shot", probabilities(folder, files)
        epochs = args.shared_epochs if shot else count * args.epochs
        T = temperature(probabilities(folder, files, "selection"), labels["selection"])
        sizes = [size(folder / file) for file in dict.fromkeys(files)]
        searches = (method != "random") + (shot or method == "ours")
        found.append({
            "seed": str(args.seed), "method": title, "epochs": str(epochs),
            "with_searches": epochs + SEARCH_EPOCHS * searches, "networks": len(sizes),
            "parameters": sum(net for net, _ in sizes), "multiplications": sum(m for _, m in sizes),
            "compute": epochs * statistics.mean(m for _, m in sizes),
            "temperature": T, "nll_tempered": tempered_nll(probs, labels["test"], T),
            **nes.ensemble_metrics(probs, labels["test"])})
    return found

# column -> (title, scale, digits)
SCORES = {"accuracy": ("accuracy, %", 100, 2), "nll": ("NLL", 1, 4),
          "nll_tempered": ("NLL, tempered", 1, 4), "ece": ("ECE", 1, 4), "brier": ("Brier", 1, 4)}
COMPARED = {key: SCORES[key] for key in ("accuracy", "nll", "nll_tempered")}
COST = {"cost": ("cost, with searches", 1, 1), "networks": ("networks to run", 1, 1)}
SIZED = {"multiplications": ("multiplications for an image, millions", 1e-6, 1),
         "parameters": ("parameters, thousands", 1e-3, 0), "temperature": ("temperature", 1, 2),
         "disagreement": ("disagree, %", 100, 2)}

def score_lines(scores):
    """`lines_of` the ensembles, and what each costs to train and search, in epochs of that seed's
    one network: a wide network's epochs count by their multiplications."""
    points = lines_of(scores, "method", "epochs")
    for row in scores:
        one = points["one network, 5"][row["seed"]]
        row["cost"] = (5 * float(row["compute"]) / float(one["compute"])
                       + float(row["with_searches"]) - float(row["epochs"]))
    return points

def compared_table(points, pairs, columns):
    """Differences of pairs of lines, paired by seed, over the seeds that both have."""
    lines = [["difference", *(title.replace("%", "points") for title, _, _ in columns.values())]]
    lines += [[f"{one} - {other}", *(paired(points[one], points[other], key, scale, places)
                                     for key, (_, scale, places) in columns.items())]
              for one, other in pairs if points.get(one, {}).keys() & points.get(other, {}).keys()]
    return markdown(lines)

DEEP, OURS, RANDOM = "five deep, 25", "five of ours, 25", "five random, 25"  # epochs
FIRST = "base in one shot, 12"
QUESTIONS = [(OURS, DEEP), (OURS, "five perturbed, 25"), (OURS, RANDOM),
             (OURS, "one wide network, 6"), ("two deep, 10", "one network, 12"),
             ("one shot of 20, 12", "one network, 12"), ("one shot of 20, 12", "two deep, 10"),
             (FIRST, "one network, 12")]
LONGER = [(DEEP, "one network, 20"), ("one shot of 20, 12", FIRST),
          ("one network, 20", "one network, 12"), *(
              (f"one shot of 20, {epochs}", f"one network, {epochs}") for epochs in (5, 20))]
ONE, SHOT_12 = "one network, augmented, 12", "one shot of 20, augmented, 12"
REGULARISED = [(SHOT_12, ONE), (ONE, "one network, 12")]
CIFAR = {key: report.COLUMNS[key] for key in ("accuracy", "nll", "disagreement")}
CIFAR_QUESTIONS = [("ours", "deep"), ("ours", "perturbed"), ("deep", "single"),
                   ("one-shot", "single")]
HELD = "five of the dial, seed held"
# These lines are in scores.csv alone, lest the table be longer than what it shows
LESS = ("one shot of 20, 5", "one shot of 20, 20", FIRST, "base in one shot, 20",
        "two of ours, 10", ONE, SHOT_12)

def plot_compute(points, path):
    """Accuracy and NLL against the cost of training and searching, in epochs of one network. Bars:
    a standard deviation."""
    figure = Figure((10, 4), layout="constrained")
    lines = {"one network": "one network", "one wide network": "one wide network",
             "one shot of 20": "twenty in one shot", "deep": "two and five, deep ensemble",
             "of ours": "two and five of ours"}
    axes = figure.subplots(1, 2)
    for axis, key, scale, label in zip(axes, ("accuracy", "nll"), (100, 1),
                                       ("test accuracy, %", "NLL, nats")):
        for name, title in lines.items():
            found = [seeds.values() for point, seeds in points.items() if f"{name}," in point
                     and "augmented" not in point]
            if found:
                values = [[scale * float(row[key]) for row in seeds] for seeds in found]
                axis.errorbar([mean(seeds, "cost") for seeds in found],
                              [*map(statistics.mean, values)], [*map(statistics.stdev, values)],
                              fmt="o-", capsize=2, label=title)
        axis.set(xlabel="cost of training and searching, in epochs of one network", ylabel=label,
                 xticks=range(0, 30, 5))
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)

# ---- Few images, and how low an ECE can be -------------------------------------------------------

FEW = {"accuracy": ("accuracy, %", 100, 2), "nll": ("NLL", 1, 4),
       "disagreement": ("disagree, %", 100, 2), "train_loss": ("training loss", 1, 3)}
FEW_QUESTIONS = [("five of ours", "five deep"), ("five random", "five deep")]
FLOOR = {"ece": ("ECE", 1, 4), "floor": ("ECE, were it calibrated", 1, 4),
         "spread": ("deviation of that", 1, 4)}

def calibration_row(seed, method, probs, labels, draws=200):
    """How low can an ECE be? On labels drawn from the predictions, which are calibrated for them,
    it is above 0 by chance alone. A row of calibration.csv."""
    p, generator = probs.mean(dim=0), nes.rng("calibration", seed)
    drawn = torch.multinomial(p, draws, replacement=True, generator=generator).T
    eces = [nes.ensemble_metrics(p[None], some)["ece"] for some in drawn]
    return {"seed": seed, "method": method, "ece": nes.ensemble_metrics(probs, labels)["ece"],
            "floor": statistics.mean(eces), "spread": statistics.stdev(eces)}

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

# ---- Pairs of trained networks: architectures alike, predictions alike? --------------------------

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

def slopes(groups, x, y):
    """Of each seed's rows the slope of a line through (x, y), y in %, as mean and interval."""
    return mean_interval([100 * statistics.linear_regression(
        *([float(row[key]) for row in rows] for key in (x, y))).slope for rows in groups], 3)

def pair_table(rows):
    """Points of disagreement for each entry that two networks share. Pairs of one architecture, or
    nearly, pull the line down at its end: so it is drawn without them, too."""
    lines = [["pairs of networks", "disagreement for each shared entry, points"]]
    for (kind,), found in by(rows, "method").items():
        for title, most in ((kind, nes.ENTRIES), (f"{kind}, that share at most 14", 14)):
            pairs = [[row for row in same for _ in range(int(row["pairs"]))
                      if int(row["entries"]) <= most] for same in by(found, "seed").values()]
            lines.append([title, slopes(pairs, "entries", "disagreement")])
    return markdown(lines)

# ---- What does L_val give? -----------------------------------------------------------------------

DIAL_ERROR = {"dial_error": ("dial error", 1, 3)}
CONTROL = {"shot_mean": ("in one shot: a member, %", 100, 2),
           "shot_accuracy": ("20 together, %", 100, 2), "shot_nll": ("their NLL", 1, 4),
           "shot_disagreement": ("they disagree, %", 100, 2),
           "trained_mean": ("trained: a member, %", 100, 2),
           "trained_accuracy": ("5 together, %", 100, 2), "trained_nll": ("their NLL", 1, 4),
           "trained_disagreement": ("they disagree, %", 100, 2)}
CONTROLS = {"fmnist": "with L_val", "blind": "without L_val", "perturbed": "changed at random"}

def control_row(kind, rows, dial_error):
    """A row of control.csv, of a run's ledger: five trained networks, twenty in one shot; test."""
    found = {"seed": rows[0]["seed"], "method": CONTROLS[kind], "dial_error": dial_error}
    for name, method in (("shot", "one-shot"), ("trained", "ours")):
        ensemble, = (row for row in rows if (row["method"], row["index"]) == (method, "ensemble"))
        found |= {f"{name}_mean": ensemble["member_mean"], **{
            f"{name}_{key}": ensemble[key] for key in ("accuracy", "nll", "disagreement")}}
    return found

# ---- The dial, and its ingredients ---------------------------------------------------------------

ABLATION = {**DIAL_ERROR, "one_shot_selection": ("one shot, selection split, %", 100, 1)}
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

def trial_table(trials):
    """A base search of 600 steps was tried, one network a seed: its accuracy, less that of a random
    architecture. It was chosen on seeds 5 to 8; the other five are fresh."""
    accuracy = {(row["seed"], row["which"]): 100 * row["accuracy"] for row in trials}
    gained = {seed: accuracy[seed, which] - accuracy[seed, "random-0"]
              for seed, which in accuracy if which == "600-200-0.03"}
    fresh = [gain for seed, gain in gained.items() if seed > 8]
    return markdown([["seeds", "600 steps - random, points"],
                     ["all nine", mean_interval(list(gained.values()), 2)],
                     ["the five fresh ones", mean_interval(fresh, 2)]])

# ---- All of it -----------------------------------------------------------------------------------

SAVED, SEARCHES = HERE / "ledger", ("deep", "ours", "nes-rs", "darts")
FILES = ("scores", "elsewhere", "pairs", "control", "dial", "ablation", "shots", "sizes")
OTHERS = ("twins", "few", "calibration")  # of other scripts
def tables():
    """title -> Markdown, of the saved CSV files that are there: a dict of those that results.md
    holds, and one of more, of which it has numbers in its prose."""
    fmnist, cifar = (sorted(SAVED.glob(f"{name}-?.csv")) for name in ("fmnist", "cifar10"))
    some = [path for path in fmnist if ("darts",) in by(read(path), "method")]
    others = report.read_runs(some) if some else {}
    scores, elsewhere, pairs, control, dial, ablation, shots, sizes, twins, few, floor = (
        read(SAVED / f"{name}.csv") for name in (*FILES, *OTHERS))
    file = SAVED / "trials.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    trials = [row for row in map(json.loads, lines) if "which" in row]
    points, there = score_lines(scores), lines_of(elsewhere, "method")
    best = of_common_seeds({title: points[title] for title in points if title not in LESS})
    trained = [row for row in twins if row["change"] == "dial"]
    late = of_common_seeds(twin_lines(twins, {
        "order": "0", **{f"late-{step}": epochs for step, epochs in LATE.items()}}))
    held = {HELD: {row["seed"]: row for row in twins if row["change"] == "five of the dial"},
            OURS: {seed: row | {"gain": gains(SAVED / f"fmnist-{seed}.csv")}
                   for seed, row in points.get(OURS, {}).items()}}
    ours = [[row for row in read(path) if row["method"] == "ours" and row["file"]]
            for path in fmnist]
    controls, without = lines_of(control, "method"), lines_of(ablation, "without")
    fewer = lines_of([row for row in few if row["images"] == "1000"], "method")
    abroad = report.read_runs(cifar) if cifar else {}
    shown = {
        "twins": twins and score_table(twin_lines(twins), TWIN),
        "twins, compared": twins and compared_table(twin_lines(twins), TWIN_QUESTIONS, MOVED),
        "response": shots and twins and response_table(shots, trained),
        "CIFAR-10": abroad and score_table(abroad, CIFAR),
        "CIFAR-10, compared": abroad and compared_table(abroad, CIFAR_QUESTIONS, CIFAR),
        "augmented": ONE in points and compared_table(points, REGULARISED, SCORES),
        "few": few and score_table(fewer, FEW),
        "few, compared": few and compared_table(fewer, FEW_QUESTIONS, {
            key: FEW[key] for key in FEW if key != "train_loss"}),
        "late": len(late) > 1 and score_table(late, MOVED, first="epochs together"),
        "scores": scores and score_table(best, SCORES | COST),
        "scores, compared": scores and compared_table(points, QUESTIONS, COMPARED),
        "dial": dial and dial_table(
            [row for row in dial if row["run"] in ("fmnist", "cifar10", "dial-paper")]),
        "control, compared": controls and score_table(
            {kind: seeds for kind, seeds in controls.items() if kind != "changed at random"},
            CONTROL, "with L_val"),
        "elsewhere, compared": there and score_table(there, ELSEWHERE_COMPARED, "five deep"),
        "ingredients": without and score_table({variant: without[variant] for variant in (
            "default", "soft", "edges", "mixture", "no L_val")}, ABLATION)}
    more = {
        "twins, compared in all": twins and compared_table(
            twin_lines(twins), TWIN_QUESTIONS, TWIN),
        "seed held": twins and scores and compared_table(
            held, [(HELD, OURS)], report.known(held, report.COLUMNS | GAIN)),
        "CIFAR-10, ECE": abroad and score_table(abroad, {"ece": report.COLUMNS["ece"]}),
        "other searches": others and score_table(
            {method: others[method] for method in SEARCHES}, report.COLUMNS, "deep"),
        "sizes": sizes and score_table(lines_of(sizes, "networks"), SIZES, first="networks"),
        "sizes, compared": sizes and compared_table(
            lines_of(sizes, "networks"), [("20", "5")], SIZES),
        "dial, other steps": dial and dial_table(
            [row for row in dial if row["run"] in ("dial-half", "dial-twice")]),
        "control, all": controls and score_table(controls, DIAL_ERROR | CONTROL, "with L_val"),
        "scores, compared in all": scores and compared_table(points, QUESTIONS + LONGER, SCORES),
        "augmented, each": ONE in points and score_table(
            {title: points[title] for title in (ONE, SHOT_12)}, SCORES),
        "sizes of networks": scores and score_table(points, SIZED),
        "sizes of networks, compared": scores and compared_table(points, [
            (OURS, DEEP), (OURS, RANDOM), (DEEP, RANDOM)], SIZED | SCORES),
        "elsewhere": there and score_table(there, ELSEWHERE),
        "elsewhere, ours": there and compared_table(there, [
            ("five of ours", other) for other in ("five perturbed", "five random")], ELSEWHERE),
        "ingredients, all": without and score_table(without, ABLATION),
        "ingredients, compared": without and score_table(without, ABLATION, "default"),
        "members, compared": fmnist and compared_table(
            report.read_runs(fmnist), [("deep", "random"), ("ours", "random")], MEMBER),
        "accuracy of ours, points per unit of lambda": ours and slopes(ours, "lambda", "accuracy"),
        "disagreement with lambda = 0, points per unit of lambda": trained and shots and markdown(
            [["networks", "slope"], *([title, slopes(
                by(rows, "seed").values(), "lambda", "disagreement")] for title, rows in (
                    ("trained, seed held", trained), ("in one shot", shots),
                    ("in one shot, lambda above .3", [
                        row for row in shots if float(row["lambda"]) > 0.3])))]),
        "pairs": pairs and pair_table(pairs),
        "a base search of 600 steps, selection split": trials and trial_table(trials),
        "calibration": floor and score_table(lines_of(floor, "method"), FLOOR)}
    return [{title: text for title, text in found.items() if text} for found in (shown, more)]

def pictures():
    """finding.png, twins.png and compute.png, of the saved CSV files that are there."""
    twins, shots, dial, scores = (read(SAVED / f"{name}.csv")
                                  for name in ("twins", "shots", "dial", "scores"))
    dial = [row for row in dial if row["run"] == "fmnist"]
    if twins:
        plot_twins(twins, HERE / "twins.png")
    if twins and shots and dial:
        plot_finding(dial, shots, twins, HERE / "finding.png")
    if scores:
        plot_compute(score_lines(scores), HERE / "compute.png")

def collect(out, cifar):
    """Write the CSV files from the run folders that are finished."""
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
        if kind == "epochs-12":
            shots, sizes = shot_rows(folder, rows, data.splits["test"][1])
            files["shots"] += shots
            files["sizes"] += sizes
        if kind in CONTROLS:
            error = results["lambda_response"]["dial_error"]
            files["control"].append(control_row(kind, rows, error))
        if kind == "fmnist":
            foreign = foreign_images(cifar, data.shape) if foreign is None else foreign
            files["elsewhere"] += elsewhere_rows(folder, rows, data, foreign)
            files["pairs"] += pair_rows(folder, rows, data.splits["test"][1])
    files["scores"].sort(key=lambda row: int(row["epochs"]))
    for name, rows in files.items():
        if rows:
            report.write(SAVED / f"{name}.csv", rows)
            print(f"{name}.csv: {len(rows)} rows")
if __name__ == "__main__":
    if len(sys.argv) not in (1, 3):
        sys.exit(__doc__)
    if len(sys.argv) == 3:
        collect(*sys.argv[1:])
    pictures()
    shown, more = tables()
    for title, text in (shown | more).items():
        print(f"\n{title}\n\n{text}")
