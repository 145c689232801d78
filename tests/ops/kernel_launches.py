"""Compile every Triton kernel that the public ops launch, as they launch it, for GPUs that need not be there.

A script of its own, as Triton's interpreter is chosen when kernels are defined: ``python -m tests.ops.kernel_launches``
reads a request (JSON) from its standard input and writes a line (JSON) a compiled kernel. What an op hands to a kernel
is taken from its real call, forward and backward, on CPU tensors, where the launch is replaced by a compilation; so new
kernels, constants, warps and autotune's configurations need no word here.
"""

import contextlib
import inspect
import io
import json
import os
import re
import sys
from collections.abc import Callable

os.environ["TRITON_INTERPRET"] = "0"
os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.autotuner import Autotuner
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from recbole_ssm import ops
from recbole_ssm.ops.packing import cu_seqlens_from_lengths, single_rows

LENGTHS = {"long": [130, 0, 70], "short": [3, 1, 9, 16]}  # blocks of 32 and of 16 rows


class NoGPU:
    """Stands in for Triton's driver; each compute capability counts as a device of its own."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return self.capability

    def get_current_stream(self, device=None):
        return 0


class Recorder:
    """Compiles instead of launching, and tells what came of it; each distinct kernel once."""

    def __init__(self, report: Callable[[dict], None]):
        self.report, self.seen, self.label, self.launches = report, set(), {}, "all"
        self.compile = JITFunction.run
        JITFunction.run = lambda fn, *args, grid, warmup, **settings: self.launch(fn, args, settings)
        Autotuner.run = lambda tuned, *args, grid, warmup=False, **settings: [
            self.launch(tuned.fn, args, {**settings, **config.all_kwargs()})
            for config in tuned.configs[: 1 if self.launches == "first" else None]
        ]

    def launch(self, fn, args, settings):
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            kernel = self.compile(fn, *args, grid=(1,), warmup=True, **settings)
        if id(kernel) in self.seen:
            return
        self.seen.add(id(kernel))
        # Spills as the assembler counts them; a kernel with none says so.
        spilled = re.findall(r"(\d+) bytes spill stores", log.getvalue())
        ptx = kernel.asm["ptx"]
        self.report({
            **self.label,
            "kernel": f"{fn.__module__.removeprefix('recbole_ssm.ops.')}.{fn.__name__}",
            "capability": driver.active.capability,
            "launch": {name: value for name, value in settings.items() if isinstance(value, int | str)},
            "wgmma": ptx.count("wgmma.mma_async"),
            "tcgen05": ptx.count("tcgen05.mma"),
            "shared": kernel.metadata.shared,
            "spilled": sum(map(int, spilled)) if spilled else None,
        })  # fmt: skip


def empty(*shape, dtype=torch.float32, grad=True):
    return torch.empty(shape, dtype=dtype, requires_grad=grad)


def train(outputs):
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.backward(outputs, [torch.empty_like(t) for t in outputs])


# Inputs as the layers make them: columns of one projection, parameters in float32. `every` asks for all forms in which
# a model may call the op, beside that of a training step.


def preference_attention(cu_seqlens, dtype, every, H, P, E, **options):
    total = int(cu_seqlens[-1])
    q, k, v = empty(total, 3 * H * P, dtype=dtype).unflatten(-1, (3, H, P)).unbind(1)
    feature = empty(total, H, E) if E else empty(total, 1, 1, grad=False)
    weights = [empty(H), empty(H), empty(H, grad=False)]
    train(ops.preference_attention(q, k, v, feature, *weights, cu_seqlens=cu_seqlens, **options))
    if every:
        options["cu_seqlens"] = cu_seqlens.unique_consecutive()
        train(ops.preference_attention(q, k, v, feature, *weights, queries="last", **options))


def ssd(cu_seqlens, dtype, every, H, P, N, G=1):
    total, sequences = int(cu_seqlens[-1]), len(cu_seqlens) - 1
    xBC, dt = empty(total, H * P + 2 * G * N + H, dtype=dtype).split([H * P + 2 * G * N, H], -1)
    x, B, C = xBC.split([H * P, G * N, G * N], -1)
    x, B, C = x.unflatten(-1, (H, P)), B.unflatten(-1, (G, N)), C.unflatten(-1, (G, N))
    per_head = [empty(H), empty(H)]
    settings = {"dt_softplus": True, "cu_seqlens": cu_seqlens}
    train(ops.ssd(x, dt, empty(H), B, C, *per_head, **settings))
    if "backend" in inspect.signature(ops.ssd_last).parameters:
        train(ops.ssd_last(x, dt, empty(H), B, empty(sequences, G, N, dtype=dtype), empty(H), **settings))
    if not every:
        return
    # As SSD4Rec's pass over reversed prefixes has it: no skip, no bias, and a state of one number.
    one = empty(total, 1, 1)
    train(ops.ssd(empty(total, H, 1), empty(total, H), empty(H), one, one, cu_seqlens=cu_seqlens))
    train(ops.ssd(x, empty(total, H), empty(H), B, C, cu_seqlens=cu_seqlens))
    with torch.no_grad():
        carried = {"cu_seqlens": single_rows(total, x.device), "return_final_state": True}
        state = empty(total, H, P, N)
        ops.ssd(x, dt, empty(H), B, C, *per_head, dt_softplus=True, initial_state=state, **carried)


def selective_scan(cu_seqlens, dtype, every, D, N):
    total, sequences = int(cu_seqlens[-1]), len(cu_seqlens) - 1
    x, dt = empty(total, D, dtype=dtype), empty(total, D, dtype=dtype)
    _, B = empty(total, D // 32 + N, dtype=dtype).split([D // 32, N], -1)
    C, A, bias, skip = empty(total, N, dtype=dtype), empty(D, N), empty(D), empty(D)
    settings = {"dt_softplus": True, "cu_seqlens": cu_seqlens}
    train(ops.selective_scan(x, dt, A, B, C, dt_bias=bias, **settings))
    if not every:
        return
    train(ops.selective_scan(x, dt, A, B, C, skip, empty(total, D, dtype=dtype), bias, **settings))
    train(ops.selective_scan_last(x, dt, A, B, empty(sequences, N, dtype=dtype), dt_bias=bias, **settings))
    with torch.no_grad():
        carried = {"cu_seqlens": single_rows(total, x.device), "return_final_state": True}
        state = empty(total, D, N)
        ops.selective_scan(x, dt, A, B, C, dt_bias=bias, dt_softplus=True, initial_state=state, **carried)


def causal_conv(cu_seqlens, dtype, every, D, K):
    x, _ = empty(int(cu_seqlens[-1]), D + 16, dtype=dtype).split([D, 16], -1)
    for activation, bias in (("silu", empty(D)), (None, None))[: 1 + every]:
        train(ops.causal_conv(x, empty(D, K), bias, activation, cu_seqlens=cu_seqlens))


def mutate(name: str) -> None:
    """Break a rule on purpose, to show that it is noticed."""
    from recbole_ssm.ops import kernels
    from recbole_ssm.ops.preference_attention import triton as attention

    if name == "64 rows":
        kernels.MOST_ROWS = triton.language.constexpr(64)
    if name == "untiled":
        attention.TILE = 1 << 20


def main() -> None:
    """Answer the request on standard input: ``capabilities``, ``cases`` of op, sizes, dtype, lengths, launches, every.

    Of autotune's configurations a case compiles ``all`` or the ``first``.
    """
    request = json.load(sys.stdin)
    mutate(request.get("mutant", ""))
    for name, module in list(sys.modules.items()):
        if name.startswith("recbole_ssm.ops") and hasattr(module, "choose"):
            module.choose = lambda *_args: "triton"
    driver.set_active(NoGPU(0))
    recorder = Recorder(lambda found: print(json.dumps(found), file=sys.__stdout__, flush=True))
    for capability in request["capabilities"]:
        driver.active.capability = capability
        for case in request["cases"]:
            cu_seqlens = cu_seqlens_from_lengths(torch.tensor(LENGTHS[case["lengths"]]))
            recorder.label = {key: case[key] for key in ("op", "sizes", "dtype", "lengths")}
            recorder.launches = case["launches"]
            run = globals()[case["op"]]
            run(cu_seqlens, getattr(torch, case["dtype"]), case["every"], **case["sizes"])


if __name__ == "__main__":
    main()
