"""Tests of report.py, evidence.py and ablation.py, by hand: pytest .github/test_report.py"""
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import ablation
import evidence
from evidence import nes, report

def write_run(folder, seed, scores, ensemble=(("seconds", 20),), **settings):
    """What report.py reads of a run folder: of each method two networks, of which one is chosen.

    scores: method -> accuracy; ensemble: columns and values of an ensemble's seconds.
    """
    rows = []
    for method, accuracy in scores.items():
        row = {key: 0 for key in report.COLUMNS if not key.endswith("seconds")} | {
            "seed": seed, "dataset": "toy", "method": method, "accuracy": accuracy,
            "nll": 1 - accuracy} | dict.fromkeys(dict(ensemble), 5)
        rows += [row | {"index": 0, "chosen": 1}, row | {"index": 1, "chosen": 0, "accuracy": 0.99},
                 row | {"index": "ensemble", "chosen": ""} | dict(ensemble)]
    note = json.dumps({"--seed": seed, "--epochs": 1} | settings)
    nes.save(folder / "settings.json", note.encode())
    report.write(folder / "ledger.csv", rows)
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
    for wrong, words in (([*runs, runs[0]], "different seeds"), ([*runs, other], "same settings"),
                         ([tmp_path / "none"], "finish that run first")):
        with pytest.raises(SystemExit, match=words):
            report.report(wrong)

def test_ledgers_of_both_kinds(tmp_path):
    new = write_run(tmp_path / "new", 0, {"ours": 0.9})
    old = write_run(tmp_path / "old", 1, {"ours": 0.9}, [
        ("seconds", ""), ("search_seconds", 12), ("training_seconds", 10)])
    # the best of those that were chosen, how many networks, seconds; of searches: 20 - 2 * 5
    for run, end, search in ((new, "90.00 | 2 | 20 |", 10), (old, "90.00 | 2 | 12 | 10 |", 12)):
        assert report.report([run]).endswith(end)
        assert evidence.search_seconds(report.read(run / "ledger.csv"), "ours") == search
    assert report.report([new, old]).endswith("90.00 +- 0.00 | 2 +- 0 | 21 +- 1 |")

def test_uncertainty_by_hand():
    # of six pairs three are larger outside, one is equal
    assert evidence.auroc(torch.tensor([1.0, 2.0, 5.0]), torch.tensor([2.0, 3.0])) == 3.5 / 6
    sure, torn = [0.9, 0.1], [0.4, 0.6]
    probs = torch.tensor([[sure, torn, sure, torn, sure, sure, torn]])
    # of the three torn two are wrong, and one of the four sure ones
    assert evidence.errors_by_certainty(
        probs, torch.tensor([0, 1, 1, 0, 0, 0, 0]), 3 / 7) == pytest.approx([2 / 3, 2 / 3, 1 / 4])
    assert torch.allclose(evidence.entropy(probs)[0], torch.tensor(
        -0.9 * math.log(0.9) - 0.1 * math.log(0.1)).double())

def test_questions_by_hand():
    # ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: 4.5 / sqrt(4.5 * 5)
    assert evidence.rank_correlation([3, 5, 5, 9], [5, 6, 7, 8]) == pytest.approx(math.sqrt(0.9))
    rows = [{"method": method, "index": 0, "lambda": str(lam), "accuracy": 0.9 + rise * lam,
             "selection_accuracy": 0.9, "seconds": 1}
            for method, rise in (("ours", -0.02), ("one-shot of 50", 0.01))
            for lam in (0.0, 0.4, 0.8)]
    rows += [{"method": method, "index": "ensemble", "accuracy": accuracy, "lambda": "",
              "seconds": seconds} for method, accuracy, seconds in (
        ("ours", "0.93", "123"), ("single", "0.92", "60"), ("perturbed", "0.935", "60"))]
    found = [{"methods": methods, "trained_test": trained, "one_shot_selection": shot}
             for methods, trained, shot in (("ours single perturbed", 0.91, 0.80),
                                            ("ours", 0.92, 0.81), ("perturbed", 0.93, 0.70))]
    assert evidence.questions(rows, found) == pytest.approx({
        "ours minus perturbed, points": -0.5,
        "one-shot (selection) and trained (test) accuracy, rank correlation, ours": 1,
        "one-shot (selection) and trained (test) accuracy, rank correlation, all trained": -0.5,
        "trained accuracy, slope from lambda = 0 to 1, points": -2,
        "one-shot accuracy, slope from lambda = 0 to 1, points": 1,
        "one-shot accuracy on selection, slope from lambda = 0 to 1, points": 0,
        "search of ours, in base searches": 2})  # (123 - 3 * 1) / 60

def test_an_architecture_belongs_to_every_method_that_has_it(tmp_path):
    arch = nes.random_architecture(0)
    nes.save(tmp_path / "members/a-0.pt", {"network": {"arch": arch}})
    nes.save(tmp_path / f"one_shot/{nes.fingerprint(arch)}.pt",
             {"selection": torch.tensor([[0.9, 0.1], [0.9, 0.1]])})
    data = SimpleNamespace(splits={"selection": (None, torch.tensor([0, 1]))})
    rows = [{"seed": "0", "method": method, "file": f"members/a-{i}.pt", "genotype": "g",
             "accuracy": accuracy} for method, i, accuracy in (
        ("ours", 0, "0.91"), ("deep", 0, "0.91"), ("deep", 1, "0.93"))]
    row, = evidence.architecture_rows(tmp_path, rows, data, SimpleNamespace(out=tmp_path))
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

def test_ablation_replaces_what_nes_has():
    base_p = torch.rand(2, 14, 7, generator=nes.rng(0)).softmax(-1)
    for variant in ablation.VARIANTS:
        assert ablation.replaced(variant, base_p, 0).keys() <= vars(nes).keys()
    soft = ablation.replaced("soft", base_p, 0)["diversity_loss"]
    # sure of another operation everywhere, as far from the base as can be: 8 * (1 - 0.5)^2
    farthest = torch.nn.functional.one_hot((base_p.argmax(-1) + 1) % 7, 7).float()
    assert soft(None, farthest, None, 0.5, 8).item() == pytest.approx(2)

def test_the_tables_of_results_are_those_of_the_ledgers():
    text = (Path(__file__).parent / "results.md").read_text()
    tables = evidence.tables()
    assert len(tables) > 1 and not [title for title in tables if tables[title] not in text]
