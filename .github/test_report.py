"""Tests of the scripts beside this file, by hand: pytest .github/test_report.py"""
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
import few
import twins
from evidence import nes, report

def write_run(folder, seed, scores, **settings):
    """What report.py reads of a run folder: of each method two networks and their ensemble.
    scores: method -> accuracy."""
    rows = []
    for method, accuracy in scores.items():
        row = dict.fromkeys(report.COLUMNS, "1") | {
            "seed": seed, "dataset": "toy", "method": method, "accuracy": accuracy,
            "nll": 1 - accuracy}
        rows += [row | {"index": index} for index in (0, 1, "ensemble")]
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

def test_temperature_by_hand():
    # ten predictions of .9, seven right: best where they are .7, at ln 9 / ln (7 / 3)
    probs, labels = torch.tensor([[[0.9, 0.1]] * 10]), torch.tensor([0] * 7 + [1] * 3)
    T = evidence.temperature(probs, labels)
    assert T == pytest.approx(math.log(9) / math.log(7 / 3), abs=0.01)
    entropy = -0.7 * math.log(0.7) - 0.3 * math.log(0.3)
    assert evidence.tempered_nll(probs, labels, T) == pytest.approx(entropy, abs=1e-4)
    assert evidence.tempered_nll(probs, labels, 1) == pytest.approx(
        nes.ensemble_metrics(probs, labels)["nll"])

def test_size_by_hand(tmp_path):
    C, side, arch = 2, 8, torch.zeros(2, 14, 7)
    for edges in nes.EDGES_OF:
        arch[:, edges[:2], nes.NAMES.index("skip_connect")] = 1
    data = nes.Data({}, ["a", "b", "c"], torch.zeros(1, 1, 1), torch.ones(1, 1, 1), (1, side, side))
    net = nes.Network(1, 3, C, 1, arch)
    nes.save(tmp_path / "net.pt", {
        "network": net.config, "net": net.state_dict(), "mean": data.mean, "std": data.std,
        "shape": data.shape, "classes": data.classes})
    stem = 9 * C * side**2 + 9 * C * 4 * C * (side // 2) ** 2
    align, classifier = 2 * 4 * C * C * (side // 2) ** 2, 4 * C * 3
    norms = 2 * (C + 4 * C + 2 * C)
    assert evidence.size(tmp_path / "net.pt") == (
        9 * C + 9 * C * 4 * C + 2 * 4 * C * C + classifier + 3 + norms, stem + align + classifier)

def save_run(folder, files):
    """Networks' files of a run folder: file -> probabilities of the truth, class 0 of two."""
    for file, right in files.items():
        probs = torch.tensor([[p, 1 - p] for p in right])
        nes.save(folder / file, {"selection": probs, "test": probs})

ZEROS = SimpleNamespace(splits={split: (torch.zeros(8, 1, 9, 9, dtype=torch.uint8),
                                        torch.zeros(8).long()) for split in ("selection", "test")})

def test_scores_of_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "size", lambda path: (10, 20.0))
    save_run(tmp_path, {"a.pt": [0.9] * 8, "b.pt": [0.9] * 6 + [0.3] * 2})
    rows = [{"method": method, "file": file, "chosen": "1"}
            for method, file in (("single", "a.pt"), ("ours", "a.pt"), ("ours", "b.pt"))]
    args = SimpleNamespace(seed=3, epochs=5, shared_epochs=5)
    single, ours = evidence.score_rows(tmp_path, "fmnist", rows, ZEROS, args)
    assert [(row["method"], row["epochs"], row["networks"]) for row in (single, ours)] == [
        ("one network", "5", 1), ("two of ours", "10", 2)]
    assert single["with_searches"] == pytest.approx(5 + evidence.SEARCH_EPOCHS)
    assert ours["with_searches"] == pytest.approx(10 + 2 * evidence.SEARCH_EPOCHS)
    assert (ours["parameters"], ours["multiplications"], ours["accuracy"]) == (20, 40.0, 1)
    text = evidence.compared_table(evidence.lines_of([single, ours], "method", "epochs"), [
        ("two of ours, 10", "one network, 5"), ("two of ours, 10", "none")],
        {"disagreement": ("disagree, %", 100, 1)})
    assert text.splitlines()[2:] == ["| two of ours, 10 - one network, 5 | +25.0 |"]

def test_shifts_by_hand():
    image = torch.zeros(1, 1, 9, 9, dtype=torch.uint8)
    image[..., :3, :3] = 90                                     # its mean is 10
    found = evidence.shifted(image)
    assert [one.unique().tolist() for one in found["contrast"]] == [[4, 58], [6, 42], [8, 26]]
    assert not any(torch.equal(one, image) for three in found.values() for one in three)
    assert all(torch.equal(one, two) for one, two in zip(
        found["noise"], evidence.shifted(image)["noise"]))

def test_elsewhere_by_hand(tmp_path):
    save_run(tmp_path, {"a.pt": [0.9] * 8})
    right = lambda share: torch.tensor([[0.8, 0.2], [share, 1 - share]])  # every fourth of eight
    kept = {kind: torch.stack([right(0.7), right(0.7), right(0.4)])
            for kind in ("noise", "blur", "contrast", "rotation")}
    nes.save(tmp_path / "elsewhere.pt", {"a.pt": kept | {"foreign": right(0.6)[None]}})
    rows = [{"seed": "0", "method": "single", "file": "a.pt", "chosen": "1"}]
    row, = evidence.elsewhere_rows(tmp_path, rows, ZEROS, None)
    assert row["method"] == "one network" and row["auroc"] == 1
    assert row["noise"] == pytest.approx(5 / 6)                 # two, two and one of two are right
    assert row["shifted_nll"] == pytest.approx(
        -(3 * math.log(0.8) + 2 * math.log(0.7) + math.log(0.4)) / 6)

def test_pairs_by_hand(tmp_path):
    base = nes.random_architecture(0)
    entries = base.nonzero()
    one = torch.zeros_like(base)
    one[tuple(entries[0])] = 1                              # an architecture, as far as it matters
    for name, arch, right in (("a", base, [0.9] * 8), ("b", base, [0.9] * 7 + [0.1]),
                              ("c", one, [0.1] * 8), ("d", 0 * base, [0.9] * 7 + [0.1])):
        nes.save(tmp_path / f"{name}.pt", {"network": {"arch": arch}, "test": torch.tensor(
            [[p, 1 - p] for p in right])})
    rows = [{"seed": "0", "method": "ours", "file": f"{name}.pt", "chosen": "1"} for name in "abcd"]
    found = evidence.pair_rows(tmp_path, rows, torch.zeros(8).long())
    assert [(row["entries"], row["pairs"], row["disagreement"]) for row in found] == [
        (0, 3, pytest.approx(1 / 3)), (1, 2, 15 / 16), (16, 1, 1 / 8)]
    text = evidence.pair_table(found)
    assert "| trained, that share at most 14 | +60.417 |" in text   # 100 (15/16 - 1/3)
    # six pairs, at 0, 0, 0, 1, 1, 16: by the normal equations
    x, y = torch.tensor([0., 0, 0, 1, 1, 16]), torch.tensor([1 / 3] * 3 + [15 / 16] * 2 + [1 / 8])
    slope = 100 * ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    assert f"| trained | {slope:+.3f} |" in text

def test_control_is_of_the_ensembles_on_test():
    ensemble = {"seed": "0", "index": "ensemble", "nll": "0.2", "disagreement": "0.1"}
    rows = [ensemble | {"method": "ours", "accuracy": "0.9", "member_mean": "0.8"},
            {"seed": "0", "method": "ours", "index": "0", "accuracy": "0.1"},
            ensemble | {"method": "one-shot", "accuracy": "0.7", "member_mean": "0.6"}]
    row = evidence.control_row("blind", rows, 0.5)
    assert (row["method"], row["dial_error"]) == ("without L_val", 0.5)
    assert (row["trained_accuracy"], row["trained_mean"], row["shot_accuracy"], row["shot_mean"],
            row["shot_nll"]) == ("0.9", "0.8", "0.7", "0.6", "0.2")

def test_twins_differ_in_one_thing_each():
    base, dial = nes.random_architecture(0), [nes.random_architecture(i) for i in (0, 1)]
    assert twins.architecture(json.dumps(nes.genotype(base))).equal(base)
    key, other = (3, "twins"), (3, "twins", "other")
    found = twins.twins(base, dial, 3)
    assert {name: (nes.matched_entries(arch, base).item(), initial == key, order == key)
            for name, (arch, initial, order) in found.items() if name[:4] != "dial"} == {
        "base": (16, True, True), "nothing": (16, True, True), "weight": (16, True, True),
        "entry-0": (15, True, True), "entry-1": (15, True, True), "sixteen": (0, True, True),
        "init": (16, False, True), "order": (16, True, False), "both": (16, False, False),
        "both-sixteen": (0, False, False),
        **{f"late-{step}": (16, True, False) for step in twins.LATE}}
    assert found["dial-1"] == (dial[1], key, key) and "dial-0" not in found  # the base itself
    for n in (1, 4):
        some, more = (twins.changed(base, range(count), *key) for count in (n, n + 1))
        assert some.sum(-1).equal(base.sum(-1)) and nes.discretise(some).equal(some)
        assert nes.matched_entries(some, more) == 15 and nes.matched_entries(some, base) == 16 - n

def test_twins_begin_alike_and_a_row_is_a_pair(tmp_path, monkeypatch):
    args = nes.parse(["--dataset", "toy", "--channels", 2, "--epochs", 1, "--device", "cpu",
                      "--out", tmp_path])
    data, began = nes.load_data("toy"), []
    monkeypatch.setattr(nes, "train", lambda name, net, *rest: began.append(net) or SimpleNamespace(
        finish=lambda **result: None))
    base, key = nes.random_architecture(0), (0, "twins")
    for name, arch in (("base", base), ("weight", base),
                       ("entry-0", twins.changed(base, [0], *key))):
        twins.train(name, arch, key, key, data, args)
    start, weight, entry = (net.state_dict() for net in began)
    moved = {name: (weight[name] - start[name]).abs().max().item() for name in start
             if not weight[name].equal(start[name])}
    assert list(moved) == ["classifier.weight"] and 0 < moved["classifier.weight"] < 2e-6
    common = start.keys() & entry.keys()
    assert 0 < len(start.keys() - common) + len(entry.keys() - common)
    assert all(start[name].equal(entry[name]) for name in common)
    save_run(tmp_path, {"a.pt": [0.9] * 4000, "b.pt": [0.9] * 3000 + [0.1] * 1000})
    for name in "ab":
        state = nes.load(tmp_path / f"{name}.pt")
        nes.save(tmp_path / f"{name}.pt", state | {"network": {"arch": base}})
    labels = SimpleNamespace(splits={"test": (None, torch.zeros(4000).long())})
    row = twins.row("weight", ["a", "b"], "", base, labels, args)
    assert (row["entries"], row["members"], row["disagreement"]) == (0, 2, 0.25)
    # alone -log .9, and in a quarter of the images of the other -log .1; together -log .5 there
    gain = 0.25 * (-math.log(0.5) + (math.log(0.9) + math.log(0.1)) / 2)
    assert row["gain"] == pytest.approx(gain, rel=1e-5)

def test_twins_of_a_seed_count_once():
    rows = [{"seed": seed, "change": change, "disagreement": share, "accuracy": 0.9, "gain": -0.1}
            for seed, change, share in (("0", "weight", 0.1), ("1", "weight", 0.2),
                                        ("0", "entry", 0.2), ("0", "entry", 0.4),
                                        ("1", "entry", 0.2), ("0", "dial", 0.9))]
    lines = evidence.twin_lines(rows)
    assert list(lines) == ["one weight by 1e-6", "one entry"]
    assert lines["one entry"]["0"]["disagreement"] == pytest.approx(0.3)
    text = evidence.compared_table(lines, evidence.TWIN_QUESTIONS, evidence.TWIN)
    # differences 20 and 0 points: mean 10, 12.706 * 14.142 / sqrt(2) = 127.06
    assert "| one entry - one weight by 1e-6 | +10.00 [-117.06, +137.06] |" in text

def test_shots_by_hand(tmp_path):
    save_run(tmp_path, {"a.pt": [0.9] * 8, "b.pt": [0.9] * 6 + [0.3] * 2})
    rows = [{"seed": "0", "method": "one-shot", "file": file, "lambda": lam, "entries": 16,
             "accuracy": right} for file, lam, right in (("a.pt", 0, 1), ("b.pt", 0.3, 0.75))]
    rows += [rows[0] | {"method": "ours"}, rows[0] | {"file": ""}]
    shots, sizes = evidence.shot_rows(tmp_path, rows, torch.zeros(8).long())
    assert [(row["disagreement"], row["gained"]) for row in shots] == [(0, 0), (0.25, -0.25)]
    assert [row["accuracy"] for row in sizes[:2]] == [1, 1]             # together .6 of the truth
    assert sizes[1]["nll"] == pytest.approx(-0.75 * math.log(0.9) - 0.25 * math.log(0.6))

def test_the_response_and_what_averaging_gains_by_hand(tmp_path):
    shots = [{"seed": seed, "lambda": lam, "disagreement": share, "gained": -share}
             for seed, lam, share in ((0, 0.0, 0.0), (0, 0.236, 0.02), (1, 0.236, 0.04))]
    trained = [{"seed": 0, "lambda": 0.236, "disagreement": 0.05}]
    text = evidence.response_table(shots, trained)
    # -3 +- 12.706 * 1.414 / sqrt(2)
    assert "| 0.24 | 3.00 +- 1.41 | -3.00 [-15.71, +9.71] | 5.00 |" in text
    report.write(tmp_path / "ours.csv", [
        {"method": method, "file": file, "nll": nll} for method, file, nll in (
            ("ours", "a.pt", 0.3), ("ours", "b.pt", 0.5), ("ours", "", 0.25), ("deep", "c.pt", 9))])
    assert evidence.gains(tmp_path / "ours.csv") == pytest.approx(0.25 - 0.4)

def test_pairs_of_lines_are_compared_on_the_seeds_that_both_have():
    lines = {"a": {"0": {"nll": 1}, "1": {"nll": 5}}, "b": {"1": {"nll": 2}},
             "c": {"2": {"nll": 9}}}
    text = evidence.compared_table(lines, [("a", "b"), ("a", "c")], {"nll": ("NLL", 1, 1)})
    assert text.splitlines()[2:] == ["| a - b | +3.0 |"]

def test_a_longer_search_is_compared_with_a_random_architecture_of_its_seed():
    scores = {(5, "600-200-0.03"): 0.9, (5, "random-0"): 0.8, (5, "150-0-0.01"): 0.1,
              (9, "600-200-0.03"): 0.7, (9, "random-0"): 0.75, (10, "random-0"): 0.2}
    text = evidence.trial_table([{"seed": seed, "which": which, "accuracy": accuracy}
                                 for (seed, which), accuracy in scores.items()])
    nine, fresh = text.splitlines()[2:]
    assert nine.startswith("| all nine | +2.50 [") and fresh == "| the five fresh ones | -5.00 |"

def test_an_ECE_that_chance_alone_gives():
    # 400 coins of .5: of those drawn half are heads, with deviation .025; its mean size is that
    # times sqrt(2 / pi)
    probs, labels = torch.full((2, 400, 2), 0.5), torch.zeros(400).long()
    row = evidence.calibration_row("0", "coins", probs, labels, draws=2000)
    assert row["ece"] == pytest.approx(0.5)
    assert row["floor"] == pytest.approx(0.025 * math.sqrt(2 / math.pi), rel=0.05)

def test_a_ledgers_rows_are_replaced_by_their_keys(tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "SAVED", tmp_path)
    row = lambda seed, images, score: {"seed": seed, "images": images, "score": score}
    twins.add("few", [row(1, 9, "a"), row(0, 9, "b")], ("images", "seed"))
    twins.add("few", [row("1", 9, "c"), row(1, 5, "d")], ("images", "seed"))
    assert [one["score"] for one in report.read(tmp_path / "few.csv")] == ["d", "b", "c"]

def test_few_images_are_of_the_training_ones_and_of_a_seed():
    data = nes.load_data("toy")
    images, labels = few.few(data, 50, 1).splits["both"]
    assert len(images) == len(labels) == 50
    there = {image.numpy().tobytes(): label.item() for image, label in zip(*data.splits["both"])}
    assert all(there[image.numpy().tobytes()] == label for image, label in zip(images, labels))
    assert not images.equal(few.few(data, 50, 2).splits["both"][0])
    assert few.few(data, 50, 1).splits["test"] is data.splits["test"]

def test_late_twins_go_on_from_the_checkpoint_where_they_part(tmp_path, monkeypatch):
    args = nes.parse(["--dataset", "toy", "--channels", 2, "--epochs", 1, "--batch", 450,
                      "--device", "cpu", "--out", tmp_path])
    monkeypatch.setattr(twins, "LATE", (2,))
    data, base = nes.load_data("toy"), nes.random_architecture(0)
    found = twins.twins(base, [base], 0)
    names, history = ("base", "late-2", "order"), {}
    for name in names:
        twins.train(name, *found[name], data, args)
        history[name] = nes.load_finished(name, args)["history"]
    assert len(history["base"]) > 2 and history["late-2"][:2] == history["base"][:2]
    assert history["order"][:2] != history["base"][:2] and history["late-2"] != history["base"]

def test_uncertainty_by_hand():
    # of six pairs three are larger outside, one is equal
    assert evidence.auroc(torch.tensor([1.0, 2.0, 5.0]), torch.tensor([2.0, 3.0])) == 3.5 / 6
    # of the mean, (.7, .3)
    assert evidence.entropy(torch.tensor([[[0.9, 0.1]], [[0.5, 0.5]]])).item() == pytest.approx(
        -0.7 * math.log(0.7) - 0.3 * math.log(0.3))

def test_ablation_replaces_what_nes_has():
    base_p = torch.rand(2, 14, 7, generator=nes.rng(0)).softmax(-1)
    for variant in (*ablation.VARIANTS, "perturbed"):
        assert ablation.replaced(variant, base_p, 0).keys() <= vars(nes).keys()
    soft = ablation.replaced("soft", base_p, 0)["diversity_loss"]
    # sure of another operation everywhere, as far from the base as can be: 8 * (1 - 0.5)^2
    farthest = torch.nn.functional.one_hot((base_p.argmax(-1) + 1) % 7, 7).float()
    assert soft(None, farthest, None, 0.5, 8).item() == pytest.approx(2)

def test_without_L_val_only_the_diversity_term_moves_alpha():
    step = ablation.replaced("no L_val", torch.rand(2, 14, 7), 0)["search_step"]
    net, alpha = nes.Network(1, 3, 2, 2), torch.zeros(2, 14, 7, requires_grad=True)
    w = next(net.parameters()).clone()
    batch = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
    step(net, alpha.softmax(-1), alpha[0, 0, 0], batch, batch, torch.optim.SGD(net.parameters(), 1),
         torch.optim.SGD([alpha], 1))
    assert alpha[0, 0, 0] == -1 and alpha.count_nonzero() == 1
    assert not torch.equal(next(net.parameters()), w)

def test_changes_at_random_are_as_many(tmp_path):
    base_p = torch.rand(2, 14, 7, generator=nes.rng(0)).softmax(-1)
    base, hyper = nes.discretise(base_p), nes.HyperNetwork(base_p.log())
    torch.nn.init.normal_(hyper.table)
    sample = ablation.replaced("perturbed", base_p, 7)["sample"]
    dial, found = nes.sample(hyper, [0.2, 0.8]), sample(hyper, [0.2, 0.8])
    assert torch.equal(nes.matched_entries(found, base), nes.matched_entries(dial, base))
    assert torch.equal(found[1], nes.perturb(base, dial[1], 7, "perturbed", 1))
    assert not torch.equal(sample(hyper, [0.8])[0], found[1])

def test_scores_are_of_the_seeds_that_all_lines_have(tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "SAVED", tmp_path)
    report.write(tmp_path / "scores.csv", [
        {"method": method, "epochs": epochs, "seed": seed, "accuracy": accuracy, "compute": compute,
         "with_searches": epochs + 2}
        for method, epochs, seed, accuracy, compute in (
            ("one network", 5, 0, 0.8, 100), ("one network", 5, 1, 0.9, 50), ("b", 4, 1, 0.7, 30))])
    text = evidence.tables()[0]["scores"]
    assert "| one network, 5 | 90.00 | 7.0 |" in text
    assert "| b, 4 | 70.00 | 5.0 |" in text                     # 5 * 30 / 50 epochs, and searches

def test_the_tables_of_results_are_those_of_the_ledgers():
    text = (Path(__file__).parent / "results.md").read_text()
    shown, more = evidence.tables()
    assert len(shown) > 1 and not [title for title in shown if shown[title] not in text]
