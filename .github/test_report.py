"""Test of report.py, by hand-computed means and intervals: pytest .github/test_report.py"""
import json
import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).resolve().parents[1])]
import nes
import report


def write_run(folder, seed, scores, **settings):
    """What report.py reads of a run folder; scores: method -> accuracy."""
    rows = [dict.fromkeys(report.TITLES, 0) | {
        "method": method, "index": "ensemble", "accuracy": accuracy, "nll": 1 - accuracy}
        for method, accuracy in scores.items()]
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
    other = write_run(tmp_path / "other", 3, {"deep": 0.9, "ours": 0.9}, **{"--epochs": 2})
    for wrong, words in ((runs[:2] + runs[:1], "different seeds"), (runs + [other], "same settings"),
                         ([tmp_path / "none"], "finish that run first")):
        with pytest.raises(SystemExit, match=words):
            report.report(wrong)
