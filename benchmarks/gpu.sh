#!/usr/bin/env bash
# All that a machine with a GPU is needed for: benchmarks/gpu.sh PART..., each part 3 minutes at most, all five 10.
#   check   ops, CUDA graphs and memory accesses are right     steps   what a training step takes
#   ops     beside others' kernels    peers   beside the authors' code    train   whole runs, and what they learn
#   all     these, in this order      study   hours: the study on a GPU, gone on with when it is started again
# Words that begin with a dash go to each part (python -m benchmarks gpu --help). Needs no network.
#
#   DATA=folder that holds ml-1m      RESULTS=folder for result files and tables; benchmarks/results
#   SSD4REC=, MAMBA4REC=checkouts of their released code (github, ZhangYifeng1995/SSD4Rec, chengkai-liu/Mamba4Rec)
#   WHEELS=folder of wheels to use that are not installed     COMMIT=what is measured, where there is no repository
#
# mamba_ssm, causal_conv1d, compute-sanitizer and RecTools take part where they are installed. docs/benchmarks.md tells
# how to use a chip of which there are 15 minutes.
set -uo pipefail
cd "$(dirname "$0")/.."
results=${RESULTS:-benchmarks/results}
parts=() options=()
for word in "$@"; do case $word in -*) options+=("$word") ;; *) parts+=("$word") ;; esac; done
case "${parts[*]:-all}" in all) parts=(check steps ops peers train) ;; esac

if [ -n "${WHEELS:-}" ]; then
    packages=$(mktemp -d)
    trap 'rm -rf "$packages"' EXIT
    python3 -m pip install -q --no-index --no-deps --target "$packages" "$WHEELS"/*.whl || exit 1
    export PYTHONPATH=$packages${PYTHONPATH:+:$PYTHONPATH}
fi
mkdir -p "$results"
failed=0
for part in "${parts[@]}"; do
    if [ "$part" = study ]; then
        # Rows go to a file of their own: a GPU's are not a CPU's. SSD4Rec as released, which a CPU is too slow for, too.
        python3 -m benchmarks accuracy --data_path "$DATA" --datasets ml-1m --jobs 4 --results "$results/gpu" \
            --models STARRec Mamba4Rec SASRec SSD4Rec-released --work saved/study-gpu --page docs/study-gpu.md || failed=1
        continue
    fi
    # The part keeps its own time; this is for one that does not.
    timeout -k 5 195 python3 -u -m benchmarks gpu "$part" --data_path "${DATA:-dataset}" --results "$results" \
        ${SSD4REC:+--ssd4rec "$SSD4REC"} ${MAMBA4REC:+--mamba4rec "$MAMBA4REC"} ${options[@]+"${options[@]}"} \
        >"$results/gpu-$part.log" 2>&1 || failed=1
    # What a lent machine shows of all is its last lines.
    sed -n '/^####/,$p' "$results/gpu-$part.log" | grep . || tail -n 30 "$results/gpu-$part.log"
done
exit $failed
