"""Tests of report.py and evidence.py, by hand: pytest .github/test_report.py"""
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

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
    assert "| ours | +2.00 [-0.48, +4.48] | -0.0200 [-0.0448, +0.0048] | " in text
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
    probs = torch.tensor([[sure, torn, sure, torn, sure, sure, torn]])
    # of the three torn one is wrong, and one of the four sure ones
    assert evidence.errors_by_certainty(probs, torch.tensor([0, 1, 1, 0, 0, 0, 1]), 3 / 7) == [
        pytest.approx(1 / 3), 1 / 2, 1 / 4]
    assert torch.allclose(evidence.entropy(probs)[0], torch.tensor(
        -0.9 * math.log(0.9) - 0.1 * math.log(0.1)).double())


def test_questions_by_hand():
    # ranks 1, 2, 3 against 1, 3, 2: 1 - 6 * 2 / (3 * 8)
    assert evidence.rank_correlation([0.1, 0.2, 0.9], [5, 7, 6]) == pytest.approx(0.5)
    ensembles = [{"method": method, "index": "ensemble", "accuracy": accuracy, "lambda": "",
                  "search_seconds": seconds, "seed": 3} for method, accuracy, seconds in (
        ("ours", "0.93", "120"), ("deep", "0.92", "60"), ("perturbed", "0.935", "60"))]
    members = [{"method": method, "index": i, "lambda": lam, "accuracy": accuracy,
                "selection_accuracy": 0.9}
               for method, rise in (("ours", -0.02), ("one-shot of 50", 0.01))
               for i, (lam, accuracy) in enumerate((x, 0.9 + rise * x) for x in (0.0, 0.4, 0.8))]
    found = [{"methods": methods, "trained_test": trained, "one_shot_selection": shot}
             for methods, trained, shot in (("ours single perturbed", 0.91, 0.80),
                                            ("ours", 0.92, 0.81), ("perturbed", 0.93, 0.70))]
    rows = evidence.question_rows(ensembles + members, found)
    assert {row["question"]: round(row["value"], 9) for row in rows} == {
        "ours minus perturbed, points": -0.5, "ours minus deep, points": 1,
        "one-shot (selection) and trained (test) accuracy, rank correlation, ours": 1,
        "one-shot (selection) and trained (test) accuracy, rank correlation, all trained": -0.5,
        "trained accuracy, slope from lambda = 0 to 1, points": -2,
        "one-shot accuracy, slope from lambda = 0 to 1, points": 1,
        "one-shot accuracy on selection, slope from lambda = 0 to 1, points": 0,
        "search of ours, in base searches": 2}


def test_an_architecture_belongs_to_every_method_that_has_it(tmp_path):
    arch = nes.random_architecture(0)
    for file in ("members/a-0.pt", "members/a-1.pt"):
        nes.save(tmp_path / file, {"network": [None, None, None, None, arch]})
    nes.save(tmp_path / f"{nes.one_shot_name(arch)}.pt",
             {"selection": torch.tensor([[0.9, 0.1], [0.9, 0.1]])})
    data = SimpleNamespace(splits={"selection": (None, torch.tensor([0, 1]))})
    rows = [{"seed": "0", "method": method, "file": file, "genotype": "g", "accuracy": accuracy}
            for method, file, accuracy in (("ours", "members/a-0.pt", "0.91"),
                                           ("deep", "members/a-0.pt", "0.91"),
                                           ("deep", "members/a-1.pt", "0.93"))]
    row, = evidence.architecture_rows(tmp_path, rows, data, None)
    assert (row["methods"], row["networks"]) == ("ours deep", 2)
    assert row["trained_test"] == pytest.approx(0.92) and row["one_shot_selection"] == 0.5


def test_compared_points_are_paired_by_seed():
    points = [("ours", 10, 0, 0.93), ("ours", 10, 1, 0.94), ("ours", 10, 2, 0.50),
              ("deep ensemble", 10, 1, 0.93), ("deep ensemble", 10, 0, 0.91),
              ("one network", 8, 0, 0.93), ("one network", 8, 1, 0.92), ("one network", 8, 2, 0.90)]
    rows = [{"method": method, "epochs": str(epochs), "seed": str(seed), "accuracy": accuracy,
             "nll": 1 - accuracy} for method, epochs, seed, accuracy in points]
    # seed 2 lacks a point; 2 and 1, 0 and 2, -2 and 1 points: 12.706 / sqrt(2) deviations each way
    text = evidence.compared_table(rows)
    assert "| ours, 10 epochs | +1.50 [-4.85, +7.85] | +1.00 [-11.71, +13.71] |  |  |" in text
    assert "| deep ensemble, 10 epochs |  | -0.50 [-19.56, +18.56] |  |  |" in text
    assert "| ours, 10 epochs | -0.0150 [-0.0785, +0.0485] | " in text


def test_the_tables_of_results_are_those_of_the_ledgers():
    text = (Path(__file__).parent / "results.md").read_text()
    missing = [title for title, table in evidence.tables().items() if table not in text]
    assert not missing and len(evidence.tables()) > 1
