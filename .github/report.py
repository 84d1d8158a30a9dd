"""Methods over seeds, as Markdown, from the ledgers of finished runs of nes.py (one run a seed).

    python .github/report.py runs/fmnist-target-0 runs/fmnist-target-1 runs/fmnist-target-2

A saved ledger will do in place of a run folder: .github/ledger/fmnist-0.csv
Mean and standard deviation of each method's ensemble; then each method's differences to the deep
ensemble, paired by seed, with the 95 % interval of Student's t. Where it contains zero there is no
measurable difference.
"""
import csv
import json
import math
import statistics
import sys
from pathlib import Path

# column -> (title, scale, digits)
COLUMNS = {
    "accuracy": ("accuracy, %", 100, 2), "nll": ("NLL", 1, 4), "ece": ("ECE", 1, 4),
    "disagreement": ("disagree, %", 100, 2)}
MINUTES = {"seconds": ("minutes, search and training", 1 / 60, 0)}
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

def mean_std(values, places):
    """Mean and standard deviation; none of it where all are the same."""
    spread = f" +- {statistics.stdev(values):.{places}f}" if len({*values}) > 1 else ""
    return f"{statistics.mean(values):.{places}f}{spread}"

def mean_interval(values, places):
    """Mean and 95 % interval of paired differences; one alone has no interval."""
    mean = statistics.mean(values)
    if len(values) == 1:
        return f"{mean:+.{places}f}"
    half = T_975[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:+.{places}f} [{mean - half:+.{places}f}, {mean + half:+.{places}f}]"

def paired(seeds, others, key, scale, places):
    """`mean_interval` of a column's differences between two dicts, seed -> row; of common seeds."""
    return mean_interval([scale * float(row[key]) - scale * float(others[seed][key])
                          for seed, row in seeds.items() if seed in others], places)

def markdown(lines):
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)

def known(methods, columns):
    """Those of the columns that all rows have."""
    rows = [row for seeds in methods.values() for row in seeds.values()]
    return {key: columns[key] for key in columns if all(key in row for row in rows)}

def score_table(methods, columns, other=None, first="method"):
    """A line a method: each column's mean and deviation over the seeds, or differences to `other`.
    methods: method -> seed -> row; columns: as COLUMNS; first: what the lines are."""
    columns = known(methods, columns)
    lines = [[f"minus {other}" if other else first, *(
        title.replace("%", "points") if other else title for title, _, _ in columns.values())]]
    for method, seeds in methods.items():
        if method != other:
            lines.append([method, *(
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
        rows, beside = read(file), folder / "settings.json"
        run = {row["method"]: row for row in rows if row["index"] == "ensemble"}
        told = json.loads(beside.read_text()) if beside.exists() else {"data": rows[0]["dataset"]}
        members = [sum(row["method"] == method for row in rows) for method in ("ours", "one-shot")]
        settings.append(told | {"--seed": None, "members": members})
        runs.setdefault(rows[0]["seed"], run)
    if any(one != settings[0] for one in settings) or len(runs) < len(settings):
        sys.exit("compare runs of different seeds and otherwise the same settings; these are not: "
                 + ", ".join(map(str, folders)))
    return {method: {seed: run[method] for seed, run in runs.items()} for method in run
            if all(method in one for one in runs.values())}

def report(folders):
    """The tables as text, of run folders or saved ledgers."""
    methods = read_runs(folders)
    text = [score_table(methods, COLUMNS | MINUTES)]
    if "deep" in methods and 1 < len(folders) <= 1 + len(T_975):
        text.append(score_table(methods, COLUMNS, "deep"))
    return "\n\n".join(text)

if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    print(report(sys.argv[1:]))
