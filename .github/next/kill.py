import sys, subprocess, signal, time, re, os, json
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__))); import nes
out = sys.argv[1]
flags="--dataset toy --samples 2 --one-shots 3 --base-steps 4 --hyper-steps 12 --hyper-lr 0.5 --epochs 1 --shared-epochs 1 --channels 4 --search-channels 4 --batch 256 --search-batch 16 --device cpu --workers 2".split()
def start(): return subprocess.Popen([sys.executable, nes.__file__, *flags, "--out", out], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=lambda: (os.setpgrp(), signal.signal(signal.SIGINT, signal.SIG_IGN)))
for wanted in ("base +2/", "hyper +6/", "shared +4/", "members/.* 5/"):
    p=start(); next((l for l in p.stdout if re.match(wanted,l)), None); p.kill(); t=time.time(); p.communicate(timeout=30); print(wanted, "all gone after", round(time.time()-t,2))
p=subprocess.Popen([sys.executable, nes.__file__, *flags, "--out", out+"2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
next(l for l in p.stdout if re.match("hyper",l)); os.killpg(p.pid, signal.SIGINT); o,e=p.communicate(timeout=30); print("ctrl-c", p.returncode, repr(e))
p=subprocess.Popen([sys.executable, nes.__file__, *flags, "--out", out+"2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
next(l for l in p.stdout if re.match("shared",l)); p.send_signal(signal.SIGINT); o,e=p.communicate(timeout=30); print("ctrl-c to the parent", p.returncode, repr(e))
a=start(); b=start(); a.communicate(timeout=90); b.communicate(timeout=90); print("two at once", a.returncode, b.returncode)
