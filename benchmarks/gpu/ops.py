"""The ops beside others' kernels, at sizes from a small step's to a long context's."""

from collections.abc import Iterator
from functools import cache

import torch

from benchmarks.gpu import grid
from benchmarks.gpu.jobs import Lane, Row
from benchmarks.gpu.subjects import PRECISIONS
from benchmarks.measure import copy_rate
from benchmarks.ops import CHECKED, SIZES, checks, floor_bytes, measure, sequences, timed_case
from recbole_ssm.ops.backend import BACKENDS
from recbole_ssm.ops.cases import OPS

LIMIT_S = 100.0
PROTOCOL = {
    "us": "microseconds forward / forward and backward, by the GPU's clock: median of 3 to 20 rounds in which all take "
    "their turn; others' kernels in the layout that they want, so that no conversion is timed",
    "ratio": "how many times as fast as the other, medians over rounds; of results that both agree with the reference "
    "in float64 (benchmarks/ops.py), else the pair is left out",
    "floor": "least traffic at this machine's copy rate",
    "bias": "others' attention gets the same similarity as a bias that is written out, which is part of the work",
}
ROWS, LENGTHS = (2_400, 32_768, 524_288), ("200", "16", "10000", "beauty")
# At which torch's compiler is waited for.
COMPILED_ROWS, COMPILED_LENGTHS = (32_768,), ("200", "beauty")
LIMIT_A_CALL_S = 0.3
QUICK_CHECKED = (1, 0, 18)

_previous: dict[tuple[str, str, str, bool], dict[str, float]] = {}


def stages(about: Row) -> Iterator[tuple[list[Lane], int]]:
    """An op and a dtype a process, one after another; what must be compiled last."""
    small = about["quick"]
    rows, lengths = ((64,), ("16",)) if small else (ROWS, LENGTHS)
    ops = ("causal_conv",) if small else tuple(OPS)

    def lane(op: str, dtype: str, rows: tuple[int, ...], lengths: tuple[str, ...], compiled: bool) -> Lane:
        cases = tuple(
            {"op": op, "dtype": dtype, "length": length, "rows": count, "compiled": compiled}
            for length in lengths
            for count in rows
            if length == "beauty" or int(length) <= count
        )
        return Lane(f"{__name__}:measure_op", cases, about, 60.0)

    lanes = [lane(op, dtype, rows, lengths, False) for dtype in PRECISIONS for op in ops]
    if not small:
        lanes += [lane("preference_attention", d, COMPILED_ROWS, COMPILED_LENGTHS, True) for d in PRECISIONS]
    yield lanes, 1


@cache
def _checked(op: str, dtype: str, device: str, compiled: bool, quick: bool) -> dict[str, dict[str, float]]:
    lengths = QUICK_CHECKED if quick else CHECKED
    return checks(op, SIZES[op][0], getattr(torch, dtype), device, compiled, lengths)


@cache
def _copy_rate(device: str) -> float:
    return copy_rate(device)


def measure_op(about: Row, op: str, dtype: str, length: str, rows: int, compiled: bool) -> Row:
    """All that is right, at one size."""
    device, sizes = about["device"], SIZES[op][0]
    checked = _checked(op, dtype, device, compiled, about["quick"])
    # On a GPU the reference is no opponent, and takes all the time.
    able = {name: wrong for name, wrong in checked.items() if name != "reference" or device == "cpu"}
    case = timed_case(op, sequences(length, rows), sizes, getattr(torch, dtype), device)
    previous = _previous.setdefault((op, dtype, length, compiled), {})
    results = measure(case, able, LIMIT_A_CALL_S, previous, compiled)
    forward, both = (moved / _copy_rate(device) for moved in floor_bytes(case, next(iter(case.inputs.values()))))
    wrong = {name: max(off.values()) for name, off in checked.items() if off}
    return {"results": results, "wrong": wrong or None, "floor_us": forward * 1e6, "floor_both_us": both * 1e6}


def table(rows: list[Row]) -> list[str]:
    """A line a size and candidate, with the ratio of ours to each other's."""
    cells = []
    for row in (row for row in rows if row["state"] == "done"):
        about = [row["op"], row["dtype"], row["length"], row["rows"]]
        ours = next((n for n in ("triton", "cpu") if "both_s" in row["results"].get(n, {})), None)
        faster = row["results"][ours]["times_as_fast_as"] if ours else {}
        cells.append([*about, "floor", _pair(row["floor_us"], row["floor_both_us"]), None])
        for name, found in row["results"].items():
            if "left out" in found:
                cells.append([*about, name, f"left out: {found['left out']}", None])
            else:
                ratio = faster.get(name) if name not in BACKENDS or name == "mamba_ssm" else None
                told = _pair(found["forward_s"] * 1e6, found["both_s"] * 1e6)
                cells.append([*about, name, told, ratio and _pair(ratio["forward"], ratio["both"])])
        cells += [
            [*about, name, f"disagrees: {off:.3g} times what may be", None]
            for name, off in (row["wrong"] or {}).items()
        ]
    return grid(["op", "dtype", "length", "rows", "candidate", "us", "ours, times as fast as that"], cells)


def _pair(forward: float, both: float) -> str:
    return f"{forward:.3g} / {both:.3g}"
