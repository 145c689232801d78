#!/usr/bin/env bash
# All that a machine with a GPU is needed for: kernels and models checked on the chip, then timed beside others'.
# Results: benchmarks/results/*-<device>.json, tables and plots in docs/. Takes some 30 minutes; a part of it, say
# because a machine is lent for less: benchmarks/gpu.sh tests | ops | profile | speed | study, and more options after the
# word. A study that is stopped goes on from where it was when it is started again.
#
#   DATA=folder that holds ml-1m, for profile, speed and study
#   SSD4REC=checkout of SSD4Rec's released code (github, ZhangYifeng1995), to train beside ours; needs mamba_ssm
#
# mamba_ssm and causal_conv1d take part where they are installed (docs/backends.md has the lines).
set -euo pipefail
cd "$(dirname "$0")/.."
part=${1:-all}
shift || true

python3 -c 'import torch; assert torch.cuda.is_available(), "no GPU that torch can use"'
wanted() { [ "$part" = all ] || [ "$part" = "$1" ]; }
if wanted tests; then
    python3 -m pytest -q -n 4 tests/ops tests/layers tests/models tests/test_losses.py tests/test_trainer.py
fi
if wanted ops; then python3 -m benchmarks ops "$@"; fi
if wanted profile; then
    python3 -m benchmarks profile --data_path "$DATA" --models STARRec Mamba4Rec SSD4Rec "$@"
    # bfloat16 in the same places; --output and --page keep it from writing over the first.
    python3 -m benchmarks profile --data_path "$DATA" --models STARRec Mamba4Rec SSD4Rec --settings enable_amp=True \
        --output benchmarks/results/profile-amp.json --page docs/benchmarks-amp.md "$@"
fi
if wanted speed; then
    python3 -m benchmarks speed --data_path "$DATA" --parts training evaluation lengths catalogue \
        ${SSD4REC:+--authors_ssd4rec "$SSD4REC"} "$@"
fi
if [ "$part" = study ]; then # hours, so it is no part of all
    # Rows go to a file of their own: a GPU's are not a CPU's. SSD4Rec as released, which a CPU is too slow for, too.
    python3 -m benchmarks accuracy --data_path "$DATA" --datasets ml-1m --jobs 4 --results benchmarks/results/gpu \
        --models STARRec Mamba4Rec SASRec SSD4Rec-released --work saved/study-gpu --page docs/study-gpu.md "$@"
fi
