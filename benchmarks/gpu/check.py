"""Whether what runs is right on this chip: each op beside float64, steps under a memory checker, CUDA graphs."""

import logging
import shutil
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
import yaml

from benchmarks.gpu import grid
from benchmarks.gpu.jobs import Lane, Row
from benchmarks.gpu.subjects import PRECISIONS, built, chosen, wait, without_dropout
from benchmarks.speed.contenders import Steps
from recbole_ssm.config import properties_dir
from recbole_ssm.doctor import MODELS, needs, probe
from recbole_ssm.ops import self_check, self_check_child
from recbole_ssm.ops.backend import BACKENDS, why_not
from recbole_ssm.ops.cases import compared, true_results

LIMIT_S = 140.0
PROTOCOL = {
    "ops": "outputs and all gradients against the reference in float64, at the models' own widths and at hidden sizes "
    "of 128, 256 and 512; an error is the largest deviation over the largest value, and right where it is at most 8 "
    "times the reference's own at that dtype; 14 processes side by side",
    "forms": "plain: with the form for the last rows alone; states: sequences begin with a state and give theirs back; "
    "filled: tables as of a batch for a CUDA graph, longer than needed; tf32: products may be rounded",
    "graphs": "steps of the trainer with cuda_graphs: auto, without dropout, and as many plain ones from the same "
    "weights: how far the change of all weights is from theirs, relative to it",
    "memcheck": "one plain step under compute-sanitizer, without torch's caching of memory",
}

AT_ONCE = 14
WIDE = (128, 256, 512)
# Empty, of one row, of parts of chunks, of several chunks, and as many as a small step has.
LENGTHS = (1, 0, 33, 200, 17, 64, 65, 16, 0, 3, *(200,) * 4)
INERT = (30, 30, 29, 0, 0)  # what a batch is filled up with
SMALL = {"hidden_size": 16, "d_state": 4, "headdim": 8, "n_heads": 2}
QUICK_OPS, QUICK_LENGTHS = ("causal_conv", "preference_attention"), (1, 0, 18)
OF_PRODUCTS = ("ssd", "preference_attention")


def stages(about: Row) -> Iterator[tuple[list[Lane], int]]:
    """Ops, then graphs, then the memory checker, which takes longest."""
    ops = op_cases(about)
    here = f"{__name__}:"
    at_once = AT_ONCE if about["device"] == "cuda" else 2
    # Neighbours, which differ in their form alone, go to different processes.
    yield (
        [Lane(f"{here}check_op", tuple(ops[i::at_once]), about, 60.0) for i in range(at_once) if ops[i::at_once]],
        at_once,
    )
    graphs = [{"check": "graphs", "model": m, "precision": p} for p in PRECISIONS for m in chosen(about)]
    yield [Lane(f"{here}check_graphs", (case,), about, 90.0) for case in graphs], at_once
    sanitizer = shutil.which("compute-sanitizer")
    watch = [sanitizer, "--tool", "memcheck", "--target-processes", "application-only", "--error-exitcode", "86"]
    steps = [{"check": "memcheck", "model": m, "precision": "float32"} for m in chosen(about)]
    yield [
        Lane(
            f"{here}one_step", (case,), about, 100.0, tuple(filter(None, watch)) if sanitizer else (),
            {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )
        for case in steps
    ], at_once  # fmt: skip


def op_cases(about: Row) -> list[Row]:
    """Each op at each size, backend, dtype and form."""
    device = torch.device(about["device"])
    plain = [need for model in MODELS for need in _needs(model, {})]
    if about["quick"]:
        plain = [need for need in _needs("STARRec", SMALL) if need[0] in QUICK_OPS]
    wide = [] if about["quick"] else [need for size in WIDE for need in _needs("STARRec", {"hidden_size": size})]
    found = []
    for op, sizes in dict.fromkeys([*plain, *wide]):
        forms = ["plain"] + (["filled", "states"] if (op, sizes) in plain else [])
        for backend in (b for b in BACKENDS[2:] if not why_not(op, b, probe(device))):
            for dtype in PRECISIONS:
                for form in [*forms, *(["tf32"] if op in OF_PRODUCTS and dtype == "float32" else [])]:
                    if form == "states" and (op == "preference_attention" or backend == "mamba_ssm"):
                        continue
                    row = {"op": op, "backend": backend, "dtype": dtype, "form": form}
                    found.append({"check": "op", **row, "sizes": dict(sizes)})
    return found


def _needs(model: str, settings: Row) -> list[tuple[str, tuple[tuple[str, int], ...]]]:
    """Ops and sizes; each is checked in all dtypes, whichever a model calls it in."""
    file = properties_dir() / "model" / f"{model}.yaml"
    return [need[:2] for need in needs(model, yaml.safe_load(file.read_text(encoding="utf-8")) | settings)]


def check_op(about: Row, check: str, op: str, backend: str, dtype: str, form: str, sizes: dict[str, int]) -> Row:
    """One op's outputs and gradients beside those in float64, and with them its form for the last rows."""
    device = "cuda:0" if about["device"] == "cuda" else "cpu"
    torch.set_float32_matmul_precision("high" if form == "tf32" else "highest")
    asked = self_check.Check(op, backend, device, dtype, tuple(sizes.items()), form == "states", form == "tf32")
    lengths = (QUICK_LENGTHS if about["quick"] else LENGTHS) + (INERT if form == "filled" else ())
    worst, name, largest = 0.0, "", 0.0
    for case in self_check_child.cases(asked, lengths, filled=form == "filled"):
        for result, (off, allowed) in compared(case, backend, true_results(case)).items():
            largest = max(largest, off)
            if off / max(allowed, self_check_child.ROUNDING) >= worst:
                worst, name = off / max(allowed, self_check_child.ROUNDING), f"{case.op}: {result}"
    return {"verdict": "right" if worst <= 1 else "wrong", "error": largest, "of_allowed": worst, "worst": name}


class _Warnings(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.told: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.told.append(record.getMessage())


def check_graphs(about: Row, check: str, model: str, precision: str) -> Row:
    """Whether steps replay as CUDA graphs, and train as plain steps do."""
    warnings = _Warnings()
    logging.getLogger().addHandler(warnings)
    settings = without_dropout(model)
    count = 6 if about["quick"] else 40
    changes, graphs = [], None
    for choice in ("auto", "off"):
        subject = built(about, model, precision, cuda_graphs=choice, **settings)
        before = _weights(subject.model)
        steps = Steps(subject)
        steps.steps = count
        steps.take()
        changes.append(_weights(subject.model) - before)
        graphs = graphs if choice == "off" else subject.trainer.graphs
    off = float((changes[0] - changes[1]).norm() / changes[1].norm())
    captured = graphs is not None and graphs.active and graphs.replays > 0
    return {
        "verdict": "right" if captured else "no graphs",
        "replays": graphs.replays if graphs else 0,
        "shapes": len(graphs._recorded) if graphs else 0,
        "steps": count,
        "off": off,
        "told": "; ".join(warnings.told) or None,
    }


def _weights(model: Any) -> torch.Tensor:
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def one_step(about: Row, check: str, model: str, precision: str) -> Row:
    """One plain step, for a tool to watch."""
    batch = 64 if model == "SSD4Rec" or about["quick"] else 512
    subject = built(about, model, precision, cuda_graphs="off", train_batch_size=batch)
    Steps(subject).take()
    wait(about)
    watched = about["device"] == "cuda" and shutil.which("compute-sanitizer") is not None
    return {"verdict": "right" if watched else "runs; compute-sanitizer is not installed"}


def table(rows: list[Row]) -> list[str]:
    """What is not right by itself, the rest in numbers."""
    ops = [row for row in rows if row["check"] == "op"]
    by_op: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in ops:
        by_op[row["op"], row["backend"], row["dtype"]].append(row)
    lines = grid(
        ["op", "backend", "dtype", "right", "of", "largest error", "of what is allowed"],
        [
            [*key, sum(row.get("verdict") == "right" for row in of), len(of), *_largest(of, "error", "of_allowed")]
            for key, of in by_op.items()
        ],
    )
    wrong = [row for row in ops if row.get("verdict") == "wrong"]
    lines += [
        f"- **wrong**: {row['op']} on {row['backend']}, {row['dtype']}, {row['form']}, {row['sizes']}: {row['worst']} "
        f"is off by {row['of_allowed']:.3g} times what is allowed."
        for row in wrong
    ]
    heads = ["check", "model", "precision", "found", "replays", "shapes", "steps", "off", "told"]
    others = [row for row in rows if row["check"] != "op"]
    cells = [[row["check"], row["model"], row["precision"], row.get("verdict", row["state"])] for row in others]
    rest = [[row.get(name) for name in heads[4:]] for row in others]
    return [*lines, "", *grid(heads, [a + b for a, b in zip(cells, rest, strict=True)])]


def _largest(rows: list[Row], *names: str) -> list[float | None]:
    return [max((row[name] for row in rows if name in row), default=None) for name in names]
