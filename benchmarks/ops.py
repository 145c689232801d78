"""``python -m benchmarks ops``: the ops on every backend, beside others' kernels, in one run."""

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from torch import Tensor

from benchmarks.environment import environment, slug
from benchmarks.measure import copy_rate, peak_bytes, rounds, seconds
from benchmarks.outside import AGREES, outside
from benchmarks.report import ops_table, write_section
from recbole_ssm.ops.backend import BACKENDS, why_not
from recbole_ssm.ops.cases import OPS, Case, make, right, true_results

HERE = Path(__file__).parent
TOKENS = (4096, 32768, 131072, 524288)
LENGTHS = ("50", "200", "1000", "10000", "beauty")
# Lengths of amazon-beauty's histories, cut to 50 items, and how many users have them.
BEAUTY = (
    (5, 7162), (6, 4221), (7, 2680), (8, 1811), (9, 1366), (10, 1576), (13, 1358), (16, 823), (21, 570), (28, 383),
    (37, 187), (49, 226),
)  # fmt: skip

# The models' own sizes: Mamba4Rec's and STARRec's scan, SSD4Rec's SSD and convolution, STARRec's attention.
SIZES: dict[str, list[dict[str, int]]] = {
    "selective_scan": [{"D": 128, "N": 32}],
    "ssd": [{"H": 32, "P": 16, "G": 1, "N": 64}],
    "causal_conv": [{"D": 128, "K": 4}],
    "preference_attention": [{"H": 8, "P": 8, "M": 8, "E": 64}],
}
# On a GPU, the range of sizes too.
MORE_SIZES: dict[str, list[dict[str, int]]] = {
    "selective_scan": [{"D": 128, "N": 16}, {"D": 512, "N": 16}, {"D": 512, "N": 64}],
    "ssd": [{"H": 8, "P": 16, "G": 1, "N": 16}, {"H": 8, "P": 64, "G": 1, "N": 64}],
    "causal_conv": [{"D": 640, "K": 4}],
    "preference_attention": [{"H": 2, "P": 32, "M": 2, "E": 64}],
}
REFERENCE_BYTES_ON_CPU = 6 << 30
# Lengths at which a backend must be right before its time counts.
CHECKED = (1, 2, 3, 63, 64, 0, 65, 200, 1000)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS), help="which ops")
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS, help="tokens of all sequences together")
    parser.add_argument("--lengths", nargs="+", choices=LENGTHS, default=LENGTHS, help="length of each sequence")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), help="float32; on a GPU both")
    parser.add_argument("--limit", type=float, default=4.0, help="leave out what takes more seconds a call than this")
    parser.add_argument("--output", type=Path, help="result file; benchmarks/results/ops-<device>.json")
    parser.add_argument("--page", type=Path, default=HERE.parent / "docs" / "benchmarks.md", help="page for the table")
    parser.set_defaults(run=main)


def sequences(length: str, tokens: int) -> list[int]:
    """Lengths of sequences that have ``tokens`` rows together, the last one cut."""
    if length != "beauty":
        count = int(length)
        return [count] * (tokens // count) + [tokens % count] * bool(tokens % count)
    known = torch.tensor(BEAUTY)
    generator = torch.Generator().manual_seed(0)
    drawn = known[torch.multinomial(known[:, 1].double(), tokens // 5 + 1, True, generator=generator), 0]
    kept = drawn[drawn.cumsum(0) <= tokens]
    return kept.tolist()


@dataclass
class Candidate:
    """One way to compute a case: ``forward`` of leaves."""

    forward: Callable[[], Tensor]
    leaves: list[Tensor]

    def both(self) -> None:
        """Forward and backward."""
        out = self.forward()
        torch.autograd.grad(out, self.leaves, torch.ones_like(out), allow_unused=True)

    def alone(self) -> None:
        """Forward, as in evaluation."""
        with torch.no_grad():
            self.forward()


def candidates(case: Case, checked: dict[str, Any], compiled: bool = False) -> Iterator[tuple[str, Candidate, float]]:
    """What is timed for a case, and the bytes that it needs as far as known: each that has passed its check."""
    leaves = list(case.inputs.values())
    longest = int(case.fixed["cu_seqlens"].diff().max())
    for name in (backend for backend in BACKENDS if checked.get(backend) == {}):
        needed = reference_bytes(case, longest) if name == "reference" else 0.0
        yield name, Candidate(lambda name=name: case.run(name)[0], leaves), needed  # type: ignore[misc]
    for name, other in outside(case, compiled).items():
        if checked.get(name) == {}:
            own = other.leaves(case)
            yield name, Candidate(lambda f=other.function, i=own: f(**i), list(own.values())), other.bytes  # type: ignore[misc]


def checks(
    op: str,
    sizes: dict[str, int],
    dtype: torch.dtype,
    device: str,
    compiled: bool = False,
    lengths: tuple[int, ...] = CHECKED,
) -> dict[str, dict[str, float]]:
    """What is wrong with each backend and each of others' kernels; nothing where it may be timed."""
    checked: dict[str, dict[str, float]] = {"reference": {}}
    for name in backends(op, device, dtype):
        checked[name] = right(make(op, list(lengths), sizes, dtype, device, states=name != "mamba_ssm"), name)
    # Theirs know neither of states nor of empty sequences.
    case = timed_case(op, [length for length in lengths if length], sizes, dtype, device)
    others = outside(case, compiled)
    truth = true_results(case) if others else {}
    return checked | {name: other.disagrees(case, truth) for name, other in others.items()}


def timed_case(op: str, lengths: list[int], sizes: dict[str, int], dtype: torch.dtype, device: str) -> Case:
    """A case with what all candidates have: no states, skip or gate."""
    case = make(op, lengths, sizes, dtype, device, states=False)
    for unused in ("D", "z"):
        case.inputs.pop(unused, None)
    return case


def backends(op: str, device: str, dtype: torch.dtype) -> list[str]:
    """Those that can run here."""
    probe = torch.zeros(1, device=device, dtype=dtype)
    return [name for name in BACKENDS[1:] if not why_not(op, name, probe)]


def reference_bytes(case: Case, longest: int) -> float:
    """About what the reference keeps for its backward pass, so that nothing is started that cannot end."""
    s = {name: t.shape for name, t in case.inputs.items()}
    total = case.fixed["cu_seqlens"][-1].item()
    if case.op == "selective_scan":
        return 24.0 * total * s["A"].numel()
    if case.op == "ssd":
        return 24.0 * total * s["A"].numel() * min(64, longest) + 8.0 * total * s["x"][1:].numel()
    if case.op == "causal_conv":
        return 80.0 * s["x"].numel()
    return 24.0 * total * s["q"][1] * longest


def floor_bytes(case: Case, out: Tensor) -> tuple[float, float]:
    """Least traffic of a forward pass, and of forward and backward: each input, output and gradient moved once."""
    moved = [sum(t.numel() * t.element_size() for t in ts) for ts in (case.inputs.values(), [out])]
    return moved[0] + moved[1], 3 * moved[0] + 2 * moved[1]


def measure(
    case: Case, checked: dict[str, Any], limit: float, previous: dict[str, float], compiled: bool = False
) -> dict[str, Any]:  # fmt: skip
    """Times, ratios and memory of every candidate for one case.

    Args:
        case: what is computed.
        checked: what each backend's parity check found.
        limit: most seconds that a call may take.
        previous: seconds a token of each candidate, kept from case to case.
        compiled: see :func:`benchmarks.outside.outside`.
    """
    cuda = case.fixed["cu_seqlens"].is_cuda
    total = case.fixed["cu_seqlens"][-1].item()
    longest = int(case.fixed["cu_seqlens"].diff().max())
    # On a CPU, what is fetched anew from the system page by page at every call measures the system.
    free = torch.cuda.mem_get_info()[0] if cuda else min(psutil.virtual_memory().available, REFERENCE_BYTES_ON_CPU)
    rows: dict[str, Any] = {}
    timed: dict[str, Candidate] = {}
    round_s = 0.0
    for name, candidate, needed in candidates(case, checked, compiled):
        quadratic = case.op == "preference_attention"
        expected = previous.get(name, 0.0) * total * (longest if quadratic else 1)
        if needed > 0.6 * free:
            rows[name] = {"left out": f"needs about {needed / 2**30:.0f} GiB"}
        elif expected > limit:
            rows[name] = {"left out": f"takes about {expected:.0f} s a call"}
        else:
            candidate.both()  # compile, tune, warm up
            taken = seconds(candidate.both, cuda)
            round_s += taken
            previous[name] = taken / (total * (longest if quadratic else 1))
            timed[name] = candidate
            rows[name] = {}
    count = max(3, min(20, math.ceil(1.0 / max(round_s, 1e-3))))
    forward = rounds({name: c.alone for name, c in timed.items()}, count, cuda)
    both = rounds({name: c.both for name, c in timed.items()}, count, cuda)
    for name, candidate in timed.items():
        rows[name] = {
            "forward_s": median(forward[name]),
            "both_s": median(both[name]),
            "forward_peak_bytes": peak_bytes(candidate.alone, cuda),
            "both_peak_bytes": peak_bytes(candidate.both, cuda),
        }
    for name in timed:  # how many times as fast as each other candidate: the median over rounds
        if name in BACKENDS:
            rows[name]["times_as_fast_as"] = {
                other: {
                    "forward": median(b / a for a, b in zip(forward[name], forward[other], strict=True)),
                    "both": median(b / a for a, b in zip(both[name], both[other], strict=True)),
                }
                for other in timed
                if other != name
            }
    return rows


def main(arguments: argparse.Namespace) -> None:
    """Measure, and write the result file and its table."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtypes = arguments.dtypes or (("float32", "bfloat16") if device == "cuda" else ("float32",))
    found: dict[str, Any] = {
        "environment": environment(),
        "protocol": {
            "timing": "median of 3 to 20 rounds, every candidate once a round; ratios are medians over rounds",
            "memory": "peak above what was held before: torch's allocator on a GPU, resident set on a CPU",
            "parity": f"against the reference in float64, lengths {CHECKED}, before anything is timed; of others' "
            f"kernels norms of the errors, up to {', '.join(f'{v:g} in {k}' for k, v in AGREES.items())}",
            "options": "dt_softplus, dt_bias, no D, no z; silu; no window, all queries; no states",
            "sequences": {"beauty": "lengths of amazon-beauty's users, cut to 50"},
        },
        "copy_bytes_per_s": copy_rate(device),
        "cases": [],
    }
    output = arguments.output or HERE / "results" / f"ops-{slug()}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    found["cases"] = _earlier_cases(output, found["environment"])
    for op in arguments.ops:
        for sizes in SIZES[op] + (MORE_SIZES[op] if device == "cuda" else []):
            for dtype in dtypes:
                checked = checks(op, sizes, getattr(torch, dtype), device)
                for name, wrong in checked.items():
                    if wrong:
                        print(f"{op} {sizes} {dtype}: {name} FAILS its parity check, so it is not timed: {wrong}")
                for length in arguments.lengths:
                    previous: dict[str, float] = {}
                    for tokens in sorted(arguments.tokens):
                        if length != "beauty" and int(length) > tokens:
                            continue
                        case = timed_case(op, sequences(length, tokens), sizes, getattr(torch, dtype), device)
                        rows = measure(case, checked, arguments.limit, previous)
                        moved = floor_bytes(case, next(iter(case.inputs.values())))
                        _put(found["cases"], {
                            "op": op, "sizes": sizes, "dtype": dtype, "length": length, "tokens": tokens,
                            "commit": found["environment"]["commit"],
                            "floor_forward_s": moved[0] / found["copy_bytes_per_s"],
                            "floor_both_s": moved[1] / found["copy_bytes_per_s"],
                            "parity": {name: excess or "passed" for name, excess in checked.items()},
                            "results": rows,
                        })  # fmt: skip
                        print(f"{op} {sizes} {dtype} length {length} tokens {tokens}: {_line(rows)}", flush=True)
                        output.write_text(json.dumps(found, indent=1) + "\n")
    write_section(arguments.page, f"ops {slug()}", ops_table(found))
    print(f"written: {output} and {arguments.page}")


def _earlier_cases(output: Path, now: dict[str, Any]) -> list[dict[str, Any]]:
    """Cases of an earlier run with the same versions on the same device, for those that this run does not repeat."""
    if not output.exists():
        return []
    earlier = json.loads(output.read_text())
    same = all(earlier["environment"][key] == now[key] for key in ("device", "versions"))
    return earlier["cases"] if same else []


def _put(cases: list[dict[str, Any]], case: dict[str, Any]) -> None:
    """Add a case, in the place of the same one if there is one."""
    for place, other in enumerate(cases):
        if all(other[key] == case[key] for key in ("op", "sizes", "dtype", "length", "tokens")):
            cases[place] = case
            return
    cases.append(case)


def _line(rows: dict[str, Any]) -> str:
    return "; ".join(
        f"{name} {row['both_s'] * 1e3:.3g} ms" if "both_s" in row else f"{name} left out: {row['left out']}"
        for name, row in rows.items()
    )
