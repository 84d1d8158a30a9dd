"""When is it decided what a network predicts? Copies that part late, for ledger/when.csv.

    python .github/when.py DIR 0 1 2

trains the base alone for some of its five epochs; then three copies go on apart, each with its own
order of batches, into DIR/when-SEED. What is there is kept, and a run that was killed resumes. A
row is the three copies' ensemble on test. The base is that of ledger/fmnist-SEED.csv.
"""
import shutil
import sys

import torch

from evidence import nes
from twins import add, setup

COPIES = 3
STEPS = (0, 800, 1700, 2500, 3400)  # where a checkpoint is, of 4,218: near 0, 1, 2, 3 and 4 epochs

def train(name, step, base, order, data, args):
    """Train the base in the order of batches that `order` names; <out>/<name>.pt holds it then. It
    starts from the checkpoint <out>/at-STEP.pt, at step 0 from the initial weights."""
    if nes.file_of(name, args).exists():
        return
    begun = nes.file_of(f"unfinished/{name}", args)
    if step and not begun.exists():
        begun.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(nes.file_of(f"at-{step}", args), begun)
    net = nes.build((args.seed, "when"), data, args.channels, args.cells, base)
    progress = nes.train(name, net, args.epochs, order, data, args)
    progress.finish(**nes.network_state(net, data))

def keep_checkpoints(base, data, args):
    """Train the base once, and keep its checkpoints at STEPS as <out>/at-STEP.pt."""
    def keep(step):  # at the start of a step the checkpoint before it is written
        if step in STEPS[1:]:
            shutil.copy(nes.file_of("unfinished/base", args), nes.file_of(f"at-{step}", args))
    if not nes.file_of("base", args).exists():
        net = nes.build((args.seed, "when"), data, args.channels, args.cells, base)
        progress = nes.train("base", net, args.epochs, (args.seed, "when"), data, args, keep)
        progress.finish(**nes.network_state(net, data))

def main(out, seeds):
    for seed in seeds:
        args, data, rows = setup(f"{out}/when-{seed}", seed)
        base = rows["deep"][0]["arch"]
        keep_checkpoints(base, data, args)
        steps, found = args.epochs * len(data.splits["both"][1]) // args.batch, []
        for step in STEPS:
            names = [f"copy-{step}-{i}" for i in range(COPIES)]
            for i, name in enumerate(names):
                train(name, step, base, (args.seed, "when", i), data, args)
            probs = torch.stack([nes.load_finished(name, args)["test"] for name in names])
            alone = args.epochs * step / steps
            found.append({"seed": seed, "alone": f"{alone:.1f}",
                          "epochs": f"{alone + COPIES * (args.epochs - alone):.1f}",
                          **nes.ensemble_metrics(probs, data.splits["test"][1])})
        add("when", found)

if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2:])
