"""Compare two folders of .pt files to the bit: compare.py OLD NEW"""
import sys, torch
from pathlib import Path
old, new = map(Path, sys.argv[1:])
same = 0
def eq(a, b):
    if torch.is_tensor(a): return torch.equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(eq(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(eq, a, b))
    return a == b
for path in sorted(old.rglob("*.pt")):
    a = torch.load(path, weights_only=True); b = torch.load(new / path.relative_to(old), weights_only=True)
    if isinstance(a.get("network"), list): a["network"] = dict(zip("C_in classes C cells arch affine".split(), a["network"]))
    skip = {"seconds", "version", "finished"}
    keys = {k for k in a if "optimizer" not in k} - skip
    bad = [k for k in keys if k not in b or not eq(a[k], b[k])]
    same += not bad
    if bad: print("DIFFERENT", path, bad)
print(same, "files the same;", len(list(new.rglob("*.pt"))), "in new")
