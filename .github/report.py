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

# column -> (title, scale, digits)
COLUMNS = {
    "accuracy": ("accuracy, %", 100, 2), "nll": ("NLL", 1, 4), "brier": ("Brier", 1, 4),
    "ece": ("ECE", 1, 4), "oracle_accuracy": ("oracle, %", 100, 2),
    "disagreement": ("disagree, %", 100, 2), "predictive_jsd": ("pred. JSd", 1, 4),
    "member_mean": ("mean member, %", 100, 2), "member_best": ("best member (on test), %", 100, 2),
    "networks": ("networks", 1, 0), "search_seconds": ("search, s", 1, 0),
    "training_seconds": ("training, s", 1, 0), "seconds": ("search and training, s", 1, 0)}
COMPARED = ("accuracy", "nll", "ece", "disagreement", "predictive_jsd", "member_mean")
# The 97.5 % quantile of Student's t for 1 to 9 degrees of freedom
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)

def read(path):
    """The rows of a CSV file, none where there is none."""
    return list(csv.DictReader(path.open(newline=""))) if path.exists() else []

def write(path, rows):
    """A CSV file of the columns that all rows have."""
    columns = [key for key in rows[0] if all(key in row for row in rows)]
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)

def ensembles(rows):
    """method -> the row of its ensemble in a ledger, with what can be counted there.

    The saved ledgers, of nes.py until c8dafae, have seconds of searches and of networks apart.
    """
    found = {}
    for row in rows:
        if row["index"] == "ensemble":
            here = [one for one in rows if one["method"] == row["method"]]
            best = max(float(one["accuracy"]) for one in here if one["chosen"] == "1")
            parts = (float(row.get(key) or 0) for key in ("search_seconds", "training_seconds"))
            found[row["method"]] = row | {"networks": len(here) - 1, "member_best": best,
                                          "seconds": row["seconds"] or sum(parts)}
    return found

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

def paired(seeds, others, key, scale, places):
    """`mean_interval` of a column's differences between two dicts, seed -> row."""
    return mean_interval([scale * float(row[key]) - scale * float(others[seed][key])
                          for seed, row in seeds.items()], places)

def markdown(lines):
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)

def score_table(methods, columns, other=None, count_seeds=False):
    """A line a method: each column's mean and deviation over the seeds, or differences to `other`.

    methods: method -> seed -> row; columns: as COLUMNS.
    """
    lines = [[f"minus {other}" if other else "method", *["seeds"] * count_seeds,
              *(title for title, _, _ in columns.values())]]
    for method, seeds in methods.items():
        if method != other:
            lines.append([method, *[str(len(seeds))] * count_seeds, *(
                paired(seeds, methods[other], key, scale, places) if other else
                mean_std([scale * float(row[key]) for row in seeds.values()], places)
                for key, (_, scale, places) in columns.items())])
    return markdown(lines)

def read_runs(folders):
    """method -> seed -> the row of its ensemble, of the methods that all runs have."""
    runs, settings = {}, []
    for folder in map(Path, folders):
        file = folder if folder.suffix == ".csv" else folder / "ledger.csv"
        if not file.exists():
            sys.exit(f"{file} is not there: finish that run first")
        run, beside = ensembles(read(file)), folder / "settings.json"
        ours = runs.setdefault(run["ours"]["seed"], run)["ours"]
        told = json.loads(beside.read_text()) if beside.exists() else {"data": ours["dataset"]}
        settings.append(told | {"--seed": None, "members": ours["networks"]})
    if any(one != settings[0] for one in settings) or len(runs) < len(settings):
        sys.exit("compare runs of different seeds and otherwise the same settings; these are not: "
                 + ", ".join(map(str, folders)))
    return {method: {seed: run[method] for seed, run in runs.items()} for method in run
            if all(method in one for one in runs.values())}

def report(folders):
    """The tables as text, of run folders or saved ledgers."""
    methods = read_runs(folders)
    apart = all("search_seconds" in row for row in methods["ours"].values())
    left_out = ["seconds"] if apart else ["search_seconds", "training_seconds"]
    text = [score_table(methods, {key: COLUMNS[key] for key in COLUMNS if key not in left_out})]
    compared = {key: (title.replace("%", "points"), scale, places)
                for key, (title, scale, places) in COLUMNS.items() if key in COMPARED}
    text += [score_table(methods, compared, other) for other in ("deep", "perturbed")
             if other in methods and 1 < len(folders) <= 1 + len(T_975)]
    return "\n\n".join(text)

if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    print(report(sys.argv[1:]))
