"""Few images: one network, and five each of deep, ours and random, for ledger/few.csv.

    python .github/few.py DIR 1000 0 1 2 3 4

trains them on so many of the training images, 30 epochs, for the seeds named, into
DIR/few-1000-SEED; what is there is kept, and a run that was killed resumes. A seed draws the images
from the split "both"; selection and test are as they are. Architectures are those of
ledger/fmnist-SEED.csv: searched on all images, as the pixels' mean and deviation are of all, too.
"""
import sys

import torch

from evidence import nes
from twins import add, setup

METHODS = {"one network": ("deep", 1), "five deep": ("deep", 5), "five of ours": ("ours", 5),
           "five random": ("random", 5)}

def few(data, count, seed):
    """The data with `count` of the images to train on."""
    images, labels = data.splits["both"]
    chosen = torch.randperm(len(labels), generator=nes.rng(seed, "few"))[:count]
    return data._replace(splits=data.splits | {"both": (images[chosen], labels[chosen])})

def row(title, names, count, data, args):
    """A row of few.csv: an ensemble on test. train_loss: of its members, over the last epochs."""
    files = [nes.load_finished(name, args) for name in names]
    probs = torch.stack([file["test"] for file in files])
    return {"seed": args.seed, "images": count, "method": title, "epochs": args.epochs,
            "train_loss": sum(file["history"][-1]["train"] for file in files) / len(files),
            **nes.ensemble_metrics(probs, data.splits["test"][1])}

def main(out, count, seeds):
    for seed in seeds:
        args, data, rows = setup(f"{out}/few-{count}-{seed}", seed, "--epochs", 30)
        data, found = few(data, int(count), args.seed), []
        for title, (method, size) in METHODS.items():
            archs = [row["arch"] for row in rows[method][:size]]
            names = [f"{nes.fingerprint(arch)}-{i}" for i, arch in enumerate(archs)]
            for i, (name, arch) in enumerate(zip(names, archs)):
                if not nes.file_of(name, args).exists():
                    nes.train_member(name, arch, i, data, args)
            found.append(row(title, names, count, data, args))
        add("few", found, ("images", "seed"))

if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
