import sys, os; sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import tempfile, subprocess, torch, time
from pathlib import Path
from PIL import Image
import nes
t=Path(tempfile.mkdtemp())
im=Image.new("RGBA",(8,8),(0,0,0,0)); [im.putpixel((x,y),(0,0,0,255)) for x in range(4) for y in range(4)]
im.save(t/"a.png"); print("191.25 =", nes.read_image(t/"a.png",(3,8,8)).float().mean().item())
im.quantize(4).save(t/"p.png"); print("P", nes.read_image(t/"p.png",(3,8,8)).float().mean().item(), Image.open(t/"p.png").mode)
g=Image.linear_gradient("L").resize((8,4)).convert("RGB"); ex=Image.Exif(); ex[274]=6
for ext in ("jpg","tiff","png","webp"):
    g.save(t/f"o.{ext}",exif=ex); x=nes.read_image(t/f"o.{ext}",(3,8,4)); y=nes.v2.functional.pil_to_tensor(g.rotate(-90,expand=True)); print(ext,(x.float()-y.float()).abs().max().item())
for mode in ("1","L","P","CMYK","YCbCr","LA","RGB","HSV","LAB"):
    try:
        m=Image.radial_gradient("L").resize((8,8)).convert("RGB").convert(mode) if mode not in("HSV","LAB") else None
        if m is None: continue
        ext="tiff" if mode in("CMYK","YCbCr") else "png"
        m.save(t/f"m.{ext}"); a=nes.read_image(t/f"m.{ext}",(3,8,8)); b=nes.v2.functional.pil_to_tensor(Image.open(t/f"m.{ext}").convert("RGB")); print(mode,(a.float()-b.float()).abs().max().item())
    except Exception as e: print(mode, repr(e))
root=t/os.fsdecode(b"caf\xe9")
for part in("train","test"):
    for c in "ab":
        for i in range(15):
            p=root/part/c/f"{i}.png"; p.parent.mkdir(parents=True,exist_ok=True); Image.effect_noise((9,9),50).save(p)
    (root/part/".ipynb_checkpoints").mkdir(); (root/part/"a"/"@eaDir").mkdir(); Image.new("L",(9,9)).save(root/part/"a"/"@eaDir"/"x.png")
Image.new("L",(9,9)).save(root/"train/a/z.gif"); (root/"train/a/n.txt").write_text("x"); Image.new("L",(9,9)).save(root/"train/a/j.jfif","JPEG")
d=nes.load_data(str(root),image_size=9); print({k:len(v[1]) for k,v in d.splits.items()}, d.classes)
flags="--samples 2 --one-shots 2 --base-steps 2 --hyper-steps 4 --epochs 1 --shared-epochs 1 --channels 4 --search-channels 4 --batch 8 --search-batch 4 --image-size 16 --device cpu".split()
def go(*a, env={}, shell=None, stdin=None, cwd=t):
    r=subprocess.run(shell or [sys.executable, nes.__file__, *a], shell=bool(shell), capture_output=True, text=True, errors="replace", env={**os.environ, **env}, cwd=cwd, input=stdin, timeout=100)
    print(a[:2], shell and shell[-40:], "rc", r.returncode, "| err:", r.stderr[-250:].strip(), "| out:", r.stdout[-60:].strip().replace("\n"," "))
go("--dataset",str(root),*flags,"--workers","1",env={"PYTHONIOENCODING":"ascii"})
print([p.name for p in (t/"runs").iterdir()], [p.name for p in next((t/"runs").iterdir()).iterdir()])
go("--dataset","toy",env={"WORLD_SIZE":"2"})
go("--dataset","toy",env={"WORLD_SIZE":"2","RANK":""})
go("--objective","paper","--lambda-max","inf")
go("--samples","many"); go("--seed","x")
go(shell=f"{sys.executable} {nes.__file__} --dataset toy {' '.join(flags)} --workers 1 --out {t}/h | head -1")
go(shell=f"{sys.executable} {nes.__file__} --dataset toy {' '.join(flags)} --workers 2 --out {t}/h2 | head -1; echo ${{PIPESTATUS[0]}}")
script=f"import sys; sys.path.insert(0,{str(Path(nes.__file__).parent)!r}); import nes; nes.main({['--dataset','toy',*flags,'--workers','2','--out',str(t/'g')]!r})"
(t/"script.py").write_text(script)
go(shell=f"{sys.executable} {t}/script.py"); go(shell=f"{sys.executable} -", stdin=script)
for bad,what in ((t,"folder"),(t/"none.pt","missing")):
    try: nes.load_member(bad)
    except nes.NesError as e: print(what, "->", str(e)[:150])
torch.save(torch.ones(3), t/"other.pt"); (t/"d.pt").write_bytes(b"abc")
for n in("other.pt","d.pt"):
    try: nes.load_member(t/n)
    except nes.NesError as e: print(n, "->", str(e)[:150])
try: nes.load_ensemble(next((t/"runs").iterdir()), -1)
except nes.NesError as e: print(str(e)[:150])
nes.save(t/"q.txt","x"); (t/"y.999999.part").write_text(""); (t/f"y.{os.getpid()}.part").write_text(""); nes.remove_parts(t); print([p.name for p in t.rglob("*.part")])
s=time.time(); p=torch.rand(300,10000,10).softmax(-1); nes.ensemble_metrics(p, torch.zeros(10000).long()); print("300x10000", time.time()-s)
os.makedirs(t/"toy/train/a"); go("--dataset","./toy")
