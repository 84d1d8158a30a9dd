"""Tests of report.py and evidence.py, by hand: pytest .github/test_report.py"""
import json
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).resolve().parents[1])]
import evidence
import nes
import report


def write_run(folder, seed, scores, **settings):
    """What report.py reads of a run folder; scores: method -> accuracy."""
    rows = [dict.fromkeys(report.TITLES, 0) | {
        "method": method, "index": "ensemble", "accuracy": accuracy, "nll": 1 - accuracy}
        for method, accuracy in scores.items()]
    rows = [row | {"seed": seed, "dataset": "toy"} for row in rows]
    nes.save(folder / "ledger.csv", nes.ledger(rows))
    nes.save(folder / "settings.json", json.dumps({"--seed": seed, "--epochs": 1} | settings))
    return folder


def test_means_and_intervals_paired_by_seed(tmp_path):
    runs = [write_run(tmp_path / str(seed), seed, {"deep": deep, "ours": ours})
            for seed, (deep, ours) in enumerate([(0.90, 0.92), (0.80, 0.83), (0.85, 0.86)])]
    text = report.report(runs)
    assert "| ours | 87.00 +- 4.58 | 0.1300 +- 0.0458 |" in text
    # 4.303 * 1 / sqrt(3) = 2.484
    assert "| ours | +2.00 [-0.48, +4.48] | -0.0200 [-0.0448, +0.0048] |" in text
    assert report.report([run / "ledger.csv" for run in runs]) == text
    other = write_run(tmp_path / "other", 3, {"deep": 0.9, "ours": 0.9}, **{"--epochs": 2})
    for wrong, words in ((runs[:2] + runs[:1], "different seeds"), (runs + [other],
                          "same settings"),
                         ([tmp_path / "none"], "finish that run first")):
        with pytest.raises(SystemExit, match=words):
            report.report(wrong)


def test_uncertainty_by_hand():
    # of six pairs three are larger outside, one is equal
    assert evidence.auroc(torch.tensor([1.0, 2.0, 5.0]), torch.tensor([2.0, 3.0])) == 3.5 / 6
    sure, torn = [0.9, 0.1], [0.4, 0.6]
    probs, labels = torch.tensor([[sure, torn, sure, torn]]), torch.tensor([0, 1, 1, 0])
    assert evidence.least_certain_errors(probs, labels, 0.5) == 0.5   # second, last
    assert torch.allclose(evidence.entropy(probs)[0], torch.tensor(
        -0.9 * math.log(0.9) - 0.1 * math.log(0.1)).double())


def test_questions_by_hand():
    # ranks 1, 2, 3 against 1, 3, 2: 1 - 6 * 2 / (3 * 8)
    assert evidence.rank_correlation([0.1, 0.2, 0.9], [5, 7, 6]) == pytest.approx(0.5)
    ensembles = [{"method": method, "index": "ensemble", "accuracy": accuracy, "lambda": "",
                  "search_seconds": seconds, "seed": 3} for method, accuracy, seconds in (
        ("ours", "0.93", "120"), ("deep", "0.92", "60"), ("perturbed", "0.935", "60"))]
    members = [{"method": method, "index": i, "lambda": lam, "accuracy": accuracy}
               for method, rise in (("ours", -0.02), ("one-shot of 50", 0.01))
               for i, (lam, accuracy) in enumerate((x, 0.9 + rise * x) for x in (0.0, 0.4, 0.8))]
    found = [(0.91, 0.80, True), (0.92, 0.81, True), (0.93, 0.70, False)]
    rows = evidence.question_rows(ensembles + members, found)
    assert {row["question"]: round(row["value"], 9) for row in rows} == {
        "ours minus perturbed, points": -0.5, "ours minus deep, points": 1,
        "one-shot (selection) and trained (test) accuracy, rank correlation": -0.5,
        "the same, of the sampled architectures alone": 1,
        "trained accuracy, from lambda = 0 to 1, points": -2,
        "one-shot accuracy, from lambda = 0 to 1, points": 1,
        "search of ours, in base searches": 2}


def test_the_tables_of_results_are_those_of_the_ledgers():
    text = (Path(__file__).parent / "results.md").read_text()
    missing = [title for title, table in evidence.tables().items() if table not in text]
    assert not missing and len(evidence.tables()) > 1
