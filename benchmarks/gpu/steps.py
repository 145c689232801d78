"""What a training step takes: time, the GPU's work, launches, waits and memory; and a process's first step."""

import time
from collections import Counter
from collections.abc import Iterator
from statistics import median
from tempfile import TemporaryDirectory

import psutil
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu import grid
from benchmarks.gpu.jobs import Lane, Row
from benchmarks.gpu.subjects import PRECISIONS, built, chosen, load
from benchmarks.speed.contenders import RELEASED, Steps

LIMIT_S = 140.0
PROTOCOL = {
    "ms": "by the clock on the wall, the trainer's own steps on its loader's next batches: median of rounds",
    "busy, kernels, copies, waits": "of torch's profiler, a step: the difference of two profiles of different length, "
    "so that what an epoch does once (its last look at the loss) is not counted; waits are calls by which the host "
    "waits for the device, and busy is the time of all kernels",
    "MiB": "most that torch's allocator has handed out, all above what the system had given it in brackets",
    "start-up": "a process by itself; the first with empty caches (Triton's, numba's and that of the self-check), the "
    "second with what the first has left; to_first_step_s is all from loaded data to the first step's end",
}
TARGETS = (2_048, 16_384)
WAITS = (
    "cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy", "cuStreamSynchronize",
    "cuCtxSynchronize", "cuEventSynchronize",
)  # fmt: skip


def stages(about: Row) -> Iterator[tuple[list[Lane], int]]:
    """float32, then the start of a process, then bfloat16: a process a model, one after another."""
    models = chosen(about)

    def steps(precision: str) -> list[Lane]:
        return [
            Lane(
                f"{__name__}:measure_steps",
                tuple(
                    {"measure": "steps", "model": model, "precision": precision, "targets": targets, "graphs": graphs}
                    for targets in targets_of(model, about["quick"])
                    for graphs in (("off",) if about["quick"] else ("auto", "off"))
                ),
                about,
                60.0,
            )
            for model in models
        ]

    yield steps(PRECISIONS[0]), 1
    with TemporaryDirectory() as caches:
        empty = {name: caches for name in ("TRITON_CACHE_DIR", "XDG_CACHE_HOME", "NUMBA_CACHE_DIR")}
        yield [
            Lane(
                f"{__name__}:measure_start", ({"measure": "start", "model": models[0], "process": which},), about, 90.0,
                environment=empty, fresh=True,
            )
            for which in ("first", "second")
        ], 1  # fmt: skip
    yield steps(PRECISIONS[1]), 1


def targets_of(model: str, quick: bool) -> tuple[int, ...]:
    """How many targets a step has."""
    if quick:
        return (64,)
    return (RELEASED["train_batch_size"],) if model == "SSD4Rec" else TARGETS


def measure_steps(about: Row, measure: str, model: str, precision: str, targets: int, graphs: str) -> Row:
    """A model's steps at one size."""
    cuda, quick = about["device"] == "cuda", about["quick"]
    subject = built(about, model, precision, train_batch_size=targets, cuda_graphs=graphs)
    steps = Steps(subject)
    steps.steps = 2 if quick else 24
    steps.take()  # compile, tune, capture
    steps.take()
    begin = time.perf_counter()
    steps.take()
    a_step = (time.perf_counter() - begin) / steps.steps
    steps.steps = steps.steps if quick else max(4, min(64, round(0.25 / a_step)))
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    rounds = []
    for _ in range(2 if quick else 4):
        begin = time.perf_counter()
        steps.take()
        seconds = time.perf_counter() - begin
        rounds.append((seconds / steps.steps, steps.num_targets / seconds))
    row = {
        "ms": median(seconds for seconds, _ in rounds) * 1e3,
        "least_ms": min(rounds)[0] * 1e3,
        "targets_per_s": median(rate for _, rate in rounds),
        "steps": steps.steps,
    }
    row["epoch_s"] = row["ms"] / 1e3 * len(subject.train_data)
    if cuda:
        row["peak_MiB"] = torch.cuda.max_memory_allocated() / 2**20
        row["reserved_MiB"] = torch.cuda.max_memory_reserved() / 2**20
    state = subject.trainer.graphs
    row["replays"] = state.replays if state is not None and state.active else 0
    few, many = (1, 2) if quick else (4, 12)
    less, more = (_profiled(steps, count, cuda) for count in (few, many))
    for name in more:
        row[name] = (more[name] - less[name]) / (many - few)
    return row


def _profiled(steps: Steps, count: int, cuda: bool) -> Counter[str]:
    """What ``count`` steps asked of the device."""
    steps.steps = count
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as profiler:
        steps.take()
    found: Counter[str] = Counter(busy_ms=0, kernels=0, copies=0, fetches=0, waits=0)
    for event in profiler.events():
        if event.device_type != DeviceType.CUDA:
            found["waits"] += event.name in WAITS
        elif event.name.startswith(("Memcpy", "Memset")):
            found["copies"] += 1
            found["fetches"] += "DtoH" in event.name
            found["busy_ms"] += event.time_range.elapsed_us() / 1e3
        elif not event.is_user_annotation:
            found["kernels"] += 1
            found["busy_ms"] += event.time_range.elapsed_us() / 1e3
    return found


def measure_start(about: Row, measure: str, model: str, process: str) -> Row:
    """Seconds from the start of this process to its first step."""
    imports = time.time() - psutil.Process().create_time()
    begin = time.perf_counter()
    load(about, model)
    loaded = time.perf_counter() - begin
    Steps(built(about, model)).take()
    all_s = time.perf_counter() - begin
    return {"imports_s": imports, "data_s": loaded, "to_first_step_s": all_s - loaded, "all_s": imports + all_s}


def table(rows: list[Row]) -> list[str]:
    """A row a size, and the two processes."""
    heads = ["model", "precision", "targets", "graphs", "ms", "busy_ms", "kernels", "copies", "waits", "targets_per_s",
             "epoch_s", "peak_MiB", "reserved_MiB", "replays"]  # fmt: skip
    steps = [row for row in rows if row["measure"] == "steps" and row["state"] == "done"]
    starts = [row for row in rows if row["measure"] == "start" and row["state"] == "done"]
    of_start = ["process", "model", "imports_s", "data_s", "to_first_step_s", "all_s"]
    return [
        *grid(heads, [[row.get(name) for name in heads] for row in steps]),
        "",
        *grid(of_start, [[row[name] for name in of_start] for row in starts]),
    ]
