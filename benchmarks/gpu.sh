#!/usr/bin/env bash
# All that a machine with a GPU is needed for: the kernels checked on the chip at all sizes, then timed beside others'.
# Takes some 15 minutes. Results: benchmarks/results/ops-<device>.json and its table in docs/benchmarks.md.
#
# mamba_ssm and causal_conv1d take part where they are installed (docs/backends.md has the lines); a part of it:
#   benchmarks/gpu.sh --ops ssd --lengths 50 beauty
set -euo pipefail
cd "$(dirname "$0")/.."

python3 -c 'import torch; assert torch.cuda.is_available(), "no GPU that torch can use"'
python3 -m pytest -q -n 4 tests/ops
python3 -m benchmarks ops "$@"
