"""Methods over seeds, as Markdown, from the ledgers of finished runs of nes.py (one run a seed).

    python .github/report.py runs/fmnist-target-0 runs/fmnist-target-1 runs/fmnist-target-2

A saved ledger will do in place of a run folder: .github/ledger/fmnist-0.csv
Mean and standard deviation of each method's ensemble; then each method's differences to the deep
ensemble and to the perturbed base, paired by seed, with the 95 % interval of Student's t: an
interval over zero shows nothing.
"""
import csv
import json
import math
import statistics
import sys
from pathlib import Path

TITLES = {"accuracy": "accuracy, %", "nll": "NLL", "brier": "Brier", "ece": "ECE",
          "oracle_accuracy": "oracle, %", "disagreement": "disagree, %",
          "predictive_jsd": "pred. JSd", "member_mean": "mean member, %",
          "member_best": "best member (on test), %",
          "networks": "networks", "search_seconds": "search, s",
          "training_seconds": "training, s"}
DIFFERENCES = {"accuracy": "accuracy, points", "nll": "NLL", "ece": "ECE",
               "disagreement": "disagree, points", "predictive_jsd": "pred. JSd",
               "member_mean": "mean member, points"}
# The 97.5 % quantile of Student's t for 1 to 9 degrees of freedom
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def ensembles(folders):
    """method -> column -> its values, one a seed, of the methods that all runs have."""
    runs, settings = [], []
    for folder in map(Path, folders):
        file = folder if folder.suffix == ".csv" else folder / "ledger.csv"
        if not file.exists():
            sys.exit(f"{file} is not there: finish that run first")
        rows = list(csv.DictReader(file.open(newline="")))
        runs.append({row["method"]: row for row in rows if row["index"] == "ensemble"})
        beside = folder / "settings.json"  # a saved ledger tells its seed alone
        settings.append((json.loads(beside.read_text()) if beside.exists() else
                         {"--seed": rows[0]["seed"], "--dataset": rows[0]["dataset"]})
                        | {"members": runs[-1]["ours"]["networks"]})
    seeds = {run.pop("--seed") for run in settings}
    if any(run != settings[0] for run in settings) or len(seeds) < len(runs):
        sys.exit("compare runs of different seeds and otherwise the same settings; these are not: "
                 + ", ".join(map(str, folders)))
    return {method: {key: [float(run[method][key]) * (100 if "%" in title else 1) for run in runs]
                     for key, title in TITLES.items()}
            for method in runs[0] if all(method in run for run in runs)}


def digits(key):
    return 2 if "%" in TITLES[key] else 0 if key.endswith("seconds") or key == "networks" else 4


def mean_std(values, places):
    spread = f" +- {statistics.stdev(values):.{places}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{places}f}{spread}"


def mean_interval(values, places):
    """Mean and 95 % interval of paired differences; one alone has no interval."""
    mean = statistics.mean(values)
    if len(values) == 1:
        return f"{mean:+.{places}f}"
    half = T_975[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:+.{places}f} [{mean - half:+.{places}f}, {mean + half:+.{places}f}]"


def markdown(lines):
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def report(folders):
    """The tables as text, of run folders or saved ledgers."""
    methods = ensembles(folders)
    text = [markdown([["method", *TITLES.values()]] + [
        [name, *(mean_std(values[key], digits(key)) for key in TITLES)]
        for name, values in methods.items()])]
    if 1 < len(folders) <= 1 + len(T_975):
        for other in [name for name in ("deep", "perturbed") if name in methods]:
            minus = lambda name, key: mean_interval(
                [a - b for a, b in zip(methods[name][key], methods[other][key])], digits(key))
            text.append(markdown([[f"minus {other}", *DIFFERENCES.values()]] + [
                [name, *(minus(name, key) for key in DIFFERENCES)]
                for name in methods if name != other]))
    return "\n\n".join(text)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    print(report(sys.argv[1:]))
