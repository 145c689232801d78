"""Every Triton kernel compiles for GPUs, which needs none: the interpreter that other tests use is more lenient.

Kernels are compiled as :mod:`tests.ops.kernel_launches` finds the ops launch them, at the sizes of the models.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from recbole_ssm.config import properties_dir

ROOT = Path(__file__).parents[2]
GPUS = (80, 89, 90, 100, 120)
SHARED = 99 * 1024  # bytes that a block may have on consumer cards
SPILLED = 1280  # bytes a thread; most of ours have none, widest heads and ssd's backward pass in float32 up to 1,100
DTYPES = ("float32", "bfloat16")


def sizes_of(settings: dict) -> list[tuple[str, dict]]:
    """What a model with these settings asks of the ops."""
    asked, hidden = [], settings["hidden_size"]
    if "use_pma" in settings:  # other models with heads have torch's attention
        asked.append(
            ("preference_attention", {"H": settings["n_heads"], "P": hidden // settings["n_heads"], "E": hidden})
        )
    if "d_state" in settings:
        inner, states = settings["expand"] * hidden, settings["d_state"]
        if "headdim" in settings:
            asked.append(("ssd", {"H": inner // settings["headdim"], "P": settings["headdim"], "N": states}))
            inner += 2 * states
        else:
            asked.append(("selective_scan", {"D": inner, "N": states}))
        asked.append(("causal_conv", {"D": inner, "K": settings["d_conv"]}))
    return asked


def model_settings() -> list[dict]:
    return [yaml.safe_load(file.read_text()) for file in sorted((properties_dir() / "model").glob("*.yaml"))]


def own_sizes() -> list[tuple[str, dict]]:
    """The models', each once."""
    found = [asked for settings in model_settings() for asked in sizes_of(settings)]
    return [asked for i, asked in enumerate(found) if asked not in found[:i]]


def further_sizes() -> list[tuple[str, dict]]:
    """The models at other hidden sizes, and what papers name: d 128 of STAR-Rec, N 16 of Mamba."""
    found = [
        asked
        for settings in model_settings()
        for hidden in (64, 128, 256)
        for asked in sizes_of({**settings, "hidden_size": hidden})
    ]
    attention = [{"H": 8, "P": 64, "E": 512}, {"H": 2, "P": 32, "E": 64}, {"H": 8, "P": 8, "E": 0}]
    attention.append({"H": 8, "P": 8, "E": 64, "window": 50})
    found += [("preference_attention", sizes) for sizes in attention]
    found += [("selective_scan", {"D": 128, "N": 16}), ("selective_scan", {"D": 128, "N": 64})]
    # Not P 64, Mamba-2's own: in float32 its backward pass spills 1 KiB a thread with 8 warps and 13 with 4, which are
    # there for autotune to leave aside; with N 128 even 14 and 25.
    found.append(("ssd", {"H": 8, "P": 32, "N": 64, "G": 2}))
    own = own_sizes()
    return [asked for i, asked in enumerate(found) if asked not in found[:i] and asked not in own]


def compiled(cases: list[dict], capabilities: tuple[int, ...], folder: Path, mutant: str = "") -> list[dict]:
    request = json.dumps({"cases": cases, "capabilities": capabilities, "mutant": mutant})
    run = subprocess.run(
        [sys.executable, "-m", "tests.ops.kernel_launches"],
        input=request, cwd=ROOT, env={**os.environ, "TRITON_CACHE_DIR": str(folder), "TRITON_INTERPRET": "0"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def cases(op: str, sizes: list[dict], dtypes=DTYPES, lengths=("long",), launches="all", every=False) -> list[dict]:
    return [
        {"op": op, "sizes": letters, "dtype": dtype, "lengths": length, "launches": launches, "every": every}
        for letters in sizes
        for dtype in dtypes
        for length in lengths
    ]


def faults(found: list[dict]) -> list[str]:
    """What no kernel of ours may have, with where it was found."""
    wrong = []
    for kernel in found:
        held = {
            "a warp-group product": kernel["wgmma"] == 0 and kernel["tcgen05"] == 0,
            f"{kernel['shared']} bytes of shared memory": kernel["shared"] <= SHARED,
            f"{kernel['spilled']} bytes spilled": kernel["spilled"] is not None and kernel["spilled"] <= SPILLED,
        }
        wrong += [f"{fault}: {kernel}" for fault, fine in held.items() if not fine]
    return wrong


OWN, FURTHER = own_sizes(), further_sizes()
OPS = sorted({op for op, _ in OWN})


# The scan multiplies no blocks, and its 60 kernels take longest; attention has been as it is for long.
SLOW = ("selective_scan", "preference_attention")


@pytest.mark.parametrize("op", [pytest.param(op, marks=[pytest.mark.slow] * (op in SLOW)) for op in OPS])
def test_kernels_at_the_models_sizes(op, tmp_path):
    sizes = [sizes for name, sizes in OWN if name == op]
    # float32 takes most registers and shared memory.
    asked = cases(op, sizes, ["float32"]) + cases(op, sizes, ["bfloat16"], launches="first")
    found = compiled(asked, (90,), tmp_path)
    assert {kernel["dtype"] for kernel in found} == set(DTYPES)
    assert len({kernel["kernel"] for kernel in found}) > 1  # forward and backward
    assert faults(found) == []


@pytest.mark.slow
@pytest.mark.parametrize("capability", GPUS)
@pytest.mark.parametrize("op", OPS)
def test_kernels_on_every_gpu(op, capability, tmp_path):
    own = [sizes for name, sizes in OWN if name == op]
    further = [sizes for name, sizes in FURTHER if name == op]
    asked = cases(op, own, lengths=("long", "short"), every=True) + cases(op, further)
    assert faults(compiled(asked, (capability,), tmp_path)) == []


@pytest.mark.parametrize(
    ("mutant", "sizes", "fault"),
    [
        ("64 rows", {"H": 1, "P": 16, "E": 16}, "a warp-group product"),
        ("untiled", {"H": 1, "P": 16, "E": 256}, "bytes of shared memory"),
    ],
)
def test_a_broken_rule_is_noticed(mutant, sizes, fault, tmp_path):
    found = compiled(cases("preference_attention", [sizes], ["bfloat16"], launches="first"), (90,), tmp_path, mutant)
    assert any(fault in wrong for wrong in faults(found))
