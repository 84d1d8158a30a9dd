"""Fashion-MNIST: base whole; hypernetwork, shared weights and a member at step 300. usage: steps.py DIR_OF_NES OUT"""
import sys, os
from pathlib import Path
src, out = sys.argv[1:]
sys.path.insert(0, src)
import torch
torch.set_num_threads(1)
import nes
out = Path(out); out.mkdir(parents=True, exist_ok=True)
args = nes.parse(["--dataset","fmnist","--samples","5","--device","cpu","--workers","1","--out",str(out/"run"),"--data-dir","data"])
data = nes.load_data(args.dataset, args.data_dir, args.image_size, args.seed)
net, base_p = nes.base_search("base", data, args)
torch.save({"net": net.state_dict(), "p": base_p}, out/"base_final.pt")
class Stop(Exception): pass
batch = nes.Data.batch
def stopping(self, split, size, step, *a, **k):
    if step == 300: raise Stop
    return batch(self, split, size, step, *a, **k)
nes.Data.batch = stopping
seen = {}
build, H = nes.build, nes.HyperNetwork
def spy_build(*a, **k):
    seen["net"] = build(*a, **k); return seen["net"]
nes.build = spy_build
class SpyH(H):
    def __init__(self, *a, **k):
        super().__init__(*a, **k); seen["hyper"] = self
nes.HyperNetwork = SpyH
try: nes.train_hypernetwork(net, base_p, data, args)
except Stop: pass
hyper = seen["hyper"]
torch.save({"net": net.state_dict(), "table": hyper.state_dict()}, out/"hyper300.pt")
try: nes.train_shared("shared", hyper, data, args)
except Stop: pass
torch.save(seen["net"].state_dict(), out/"shared300.pt")
arch = nes.sample(hyper, [0.618])[0]
try: nes.train_member("members/x-1", arch, 1, data, args)
except Stop: pass
torch.save({"net": seen["net"].state_dict(), "arch": arch}, out/"member300.pt")
print("done")
