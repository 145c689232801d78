"""Every Triton kernel compiles for a GPU, which needs none: the interpreter that other tests use is more lenient."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from recbole_ssm.ops.causal_conv import triton as conv
from recbole_ssm.ops.preference_attention import triton as attention
from recbole_ssm.ops.selective_scan import triton as scan
from recbole_ssm.ops.ssd import triton as ssd

dtype = sys.argv[1]
INDEX = ("cu_seqlens", "cu_queries", "cu_keys", "sequences", "starts", "joints", "positions")
OPTIONAL = "D z dt_bias bias initial final edge last grad_final grad_D grad_z grad_bias grad_initial".split()
LIKE_INPUT = (
    "x dt B C z y q k v out grad_y grad_out grad_x grad_dt grad_z grad_q grad_k grad_v grad_sum".split()
)
whole, part = scan._state_blocks(128, 32)
of_scan = {"WIDTH": 128, "N": 32, "ROWS": scan.ROWS}
of_scan |= {"X_STRIDE": 128, "DT_STRIDE": 128, "B_STRIDE": 36, "C_STRIDE": 32, "Z_STRIDE": 128, "Y_STRIDE": 128}
scan_parts = {**of_scan, "SOFTPLUS": True, "CHANNELS": part[0], "STATES": part[1]}
scan_outputs = {**of_scan, "SOFTPLUS": True, "CHANNELS": whole[0], "STATES": whole[1], "UNROLLED": scan.UNROLLED}
scan_gradients = {**scan_parts, "CHANNELS": scan.GRADIENT_CHANNELS, "STATES": scan.GRADIENT_STATES, "SHARED": True}
scan_passes = {**of_scan, "LOCAL": True, "BLOCK": scan.PASSED, "AHEAD": scan.AHEAD}
conv_sizes = {"K": 4, "ROWS": conv.ROWS, "CHANNELS": conv.CHANNELS}
dual = {"Q": 32, "P": 16, "N": 64, "BLOCK_P": 16, "BLOCK_N": 64, "SOFTPLUS": True, "PRECISION": "tf32x3"}
attend = {"P": 8, "E": 64, "BLOCK_P": 16, "BLOCK_E": 64, "PRECISION": "tf32x3", "QUERIES": 32, "KEYS": 32}
for kernel, constants in (
    (scan._chunk_states, {**scan_parts, "REVERSE": False}),
    (scan._chunk_states, {**scan_parts, "REVERSE": True}),
    (scan._pass_states, {**scan_passes, "REVERSE": False}),
    (scan._pass_states, {**scan_passes, "REVERSE": True}),
    (scan._outputs, scan_outputs),
    (scan._gradients, scan_gradients),
    (conv._forward, {**conv_sizes, "SILU": True}),
    (conv._backward_weight, {**conv_sizes, "SILU": True}),
    (conv._backward_input, conv_sizes),
    (ssd._pass_states, {**dual, "REVERSE": False}),
    (ssd._pass_states, {**dual, "REVERSE": True}),
    (ssd._forward, {**dual, "HEADS": 2}),
    (ssd._backward, {**dual, "HEADS": 2}),
    (attention._forward, {**attend, "WINDOW": None}),
    (attention._backward_queries, {**attend, "WINDOW": 5}),
    (attention._backward_keys, {**attend, "WINDOW": 5}),
):
    kernel = kernel.fn if isinstance(kernel, triton.runtime.Autotuner) else kernel
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature, aligned = {}, {}
    if dtype == "bf16":  # once with all of them, in float32, and once without
        constants = {**constants, **{name: None for name in OPTIONAL if name in kernel.arg_names}}
    for place, name in enumerate(kernel.arg_names):
        if name not in constants and not name.startswith("n_") and name != "zero":
            aligned[(place,)] = [["tt.divisibility", 16]]  # as the tensors of a real call are
        if name in constants:
            signature[name] = "constexpr"
        elif name.startswith("n_") or name.endswith("_stride") or name in ("heads_per_group", "zero"):
            signature[name] = "i32"
        else:
            signature[name] = "*i32" if name in INDEX else f"*{dtype}" if name in LIKE_INPUT else "*fp32"
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": 4, "num_stages": 1}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    print(kernel.__module__, kernel.__name__, "shared", compiled.metadata.shared, flush=True)
    assert compiled.metadata.shared < 99 * 1024, "more shared memory than a block has on most GPUs"
"""


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_kernel_compiles(dtype, tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, dtype], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("shared") == 16
