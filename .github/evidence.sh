#!/usr/bin/env bash
# All runs of the evidence in results.md, one after the other, into one folder; what is there is
# kept, and a run that was killed resumes. Some twenty-two hours on two cores:
#     bash .github/evidence.sh DIR CIFAR
# DIR: where the run folders are made; CIFAR: CIFAR-10 as a folder of train/ and test/.
set -euo pipefail
out=$1 cifar=$2
nes() { python "$(dirname "$0")/../nes.py" "$@"; }  # keeps what a folder has
with_search_of() {         # the same search, not repeated
  mkdir -p "$2"
  cp -u "$1"/{base,hyper}.pt "$2"
}

main() {                   # the main command, shared weights for 5 epochs: main SEED BASELINES
  nes --dataset fmnist --samples 5 --shared-epochs 5 --seed $1 --baselines "${@:2}" \
    --out "$out/fmnist-$1"
}
variant() {                # variant SEED NAME VARIANT FILES: nes.py with something left out
  mkdir -p "$out/$2-$1"
  cp -ru "${@:4}" "$out/$2-$1"
  python "$(dirname "$0")/ablation.py" --run "$3" --shared-epochs 5 --seed $1 --out "$out/$2-$1"
}
for seed in 0 1 2 3 4; do
  main $seed single deep perturbed random
  run=$out/fmnist-$seed
  for epochs in 12 20; do  # equal compute: one network, and shared weights, for longer
    with_search_of "$run" "$out/epochs-$epochs-$seed"
    nes --samples 1 --baselines single --epochs $epochs --shared-epochs $epochs --seed $seed \
      --out "$out/epochs-$epochs-$seed"
  done
  with_search_of "$run" "$out/augmented-12-$seed"
  nes --samples 1 --baselines single --epochs 12 --shared-epochs 12 --mirror --crop 2 \
    --seed $seed --out "$out/augmented-12-$seed"
  with_search_of "$run" "$out/wide-$seed"
  nes --samples 1 --baselines single --channels 24 --cells 3 --epochs 6 --shared-epochs 0 \
    --seed $seed --out "$out/wide-$seed"
  variant $seed blind "no L_val" "$run/base.pt"
  variant $seed perturbed perturbed "$run"/{base.pt,hyper.pt,members}
done
dial() {                   # the dial after half and twice the steps, and with the paper's objective
  OMP_NUM_THREADS=1 python "$(dirname "$0")/ablation.py" --without default --seeds 0 1 2 3 4 \
    --out "$out/dial-$1" "${@:2}"
}
dial twice --hyper-steps 2000 &
dial half --hyper-steps 500
dial paper --objective paper --lambda-max 4
wait
OMP_NUM_THREADS=1 python "$(dirname "$0")/ablation.py" --out "$out/ablation"
for seed in 0 1 2 3 4 5 6 7; do  # another data set
  nes --dataset "$cifar" --samples 3 --epochs 6 --shared-epochs 6 --crop 4 --mirror --seed $seed \
    --baselines single deep perturbed --out "$out/cifar10-$seed"
done
for seed in 0 1 2; do main $seed single deep perturbed random nes-rs darts; done
# Last, as these take the architectures of the main runs from the ledgers
python "$(dirname "$0")/evidence.py" "$out" "$cifar"
python "$(dirname "$0")/twins.py" "$out" 0 1 2 3 4
python "$(dirname "$0")/few.py" "$out" 1000 0 1 2 3 4
python "$(dirname "$0")/evidence.py"  # tables and pictures of all of it
