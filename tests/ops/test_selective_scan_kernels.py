"""The scan's Triton kernels where test_parity.py does not lead.

Widths of the models, borders of chunks, tables longer than needed, final states alone, and what a call launches.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from recbole_ssm.ops import selective_scan, selective_scan_last
from recbole_ssm.ops.cases import make, results, right
from recbole_ssm.ops.packing import borders
from recbole_ssm.ops.scan_arguments import ScanArguments

scan = pytest.importorskip("recbole_ssm.ops.selective_scan.triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNELS = ("_chunk_states", "_pass_states", "_outputs", "_gradients")


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Uninitialised memory is NaN, so that a row which a kernel forgets to write, or reads unasked, shows."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


class Filled:
    """Tables of a batch that was filled up to fixed sizes: chunks past the last sequence's end, unused boundaries."""

    def __init__(self, known, chunks=3, boundaries=2):
        self.known, self.more_chunks, self.more_boundaries = known, chunks, boundaries

    def chunks(self, size):
        sequences, starts = self.known.chunks(size)
        filler = sequences.new_full((self.more_chunks,), len(starts) - 2)
        return torch.cat([sequences, filler]), starts

    def chunk_boundaries(self, size):
        starts, count = self.known.chunk_boundaries(size)
        return starts, count + self.more_boundaries


def widths(lengths, D, N, *slow):
    """Of the same program, whose loads and stores alone know of the dtype: one width in both, the others in float32."""
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        marks = [pytest.mark.slow] * (name in slow)
        yield pytest.param(lengths, D, N, dtype, marks=marks, id=f"{lengths}-{D}-{N}-{name}")


@pytest.mark.parametrize(
    ("lengths", "D", "N", "dtype"),
    [
        *widths([17], 128, 32, "fp32", "bf16"),
        *widths([18, 1], 8, 16, "bf16"),
        *widths([15, 16], 8, 64, "bf16"),
        *widths([40, 1, 0], 3, 4),
        *widths([18], 36, 6, "bf16"),
    ],
)
def test_widths_of_the_models(lengths, D, N, dtype):
    assert right(make("selective_scan", lengths, {"D": D, "N": N}, dtype, DEVICE), "triton") == {}


@pytest.mark.parametrize("states", [True, False])
@pytest.mark.parametrize("lengths", [pytest.param([17, 3, 20], marks=pytest.mark.slow), [20, 0]], ids=str)
def test_chunks_that_fill_up_a_table(lengths, states, monkeypatch):
    monkeypatch.setattr(scan, "borders", lambda cu_seqlens: Filled(borders(cu_seqlens)))
    assert right(make("selective_scan", lengths, {"D": 5, "N": 3}, device=DEVICE, states=states), "triton") == {}


@pytest.mark.parametrize(("programs", "chunks"), [(1, 2), pytest.param(3, 2048, marks=pytest.mark.slow), (12, 3)])
def test_programs_that_go_through_several_chunks_and_blocks(programs, chunks, monkeypatch):
    monkeypatch.setattr(scan, "PROGRAMS", programs)
    monkeypatch.setattr(scan, "CHUNKS", chunks)
    monkeypatch.setattr(scan, "borders", lambda cu_seqlens: Filled(borders(cu_seqlens)))
    assert right(make("selective_scan", [20, 3], {"D": 17, "N": 3}, device=DEVICE), "triton") == {}


def test_many_programs_share_out_the_work():
    assert scan._grid_of_gradients(150, 16) == (150, 16)
    assert scan._grid_of_gradients(2048, 16) == (2048, 2)
    assert scan._grid_of_gradients(32768, 16) == (2048, 1)
    assert scan._grid_of_gradients(0, 16) == (1, 16)


@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize("lengths", [[1, 0, 16], [17, 33], [0, 0]], ids=str)
def test_final_states_without_outputs(lengths, filled, monkeypatch):
    """``C`` absent: final states and all gradients, with an initial state."""
    if filled:
        monkeypatch.setattr(scan, "borders", lambda cu_seqlens: Filled(borders(cu_seqlens)))
    case = make("selective_scan", lengths, {"D": 5, "N": 3}, device=DEVICE)
    inputs = {name: t for name, t in case.inputs.items() if name not in ("C", "D", "z")}
    exact = {name: t for name, t in case.exact().items() if name not in ("C", "D", "z")}
    cu_seqlens = case.fixed["cu_seqlens"]
    _, truth = selective_scan(
        C=torch.zeros_like(exact["B"]), **exact, dt_softplus=True, cu_seqlens=cu_seqlens, return_final_state=True,
        backend="reference",
    )  # fmt: skip
    y, final = scan.selective_scan_triton(
        ScanArguments(C=None, **inputs, dt_softplus=True, cu_seqlens=cu_seqlens, return_final_state=True)
    )
    assert y is None
    found, want = results(case, (final,), inputs), results(case, (truth,), exact)
    for name, expected in want.items():
        torch.testing.assert_close(
            found[name].double(), expected, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


class Count(TorchDispatchMode):
    """Counts torch operators that launch something on a GPU."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if not func.is_view and name not in ("empty", "new_empty", "empty_like", "detach", "_unsafe_view"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


class Launches:
    """A kernel that notes its launches."""

    def __init__(self, kernel, names):
        self.kernel, self.names = kernel, names

    def __getitem__(self, grid):
        def launch(*args, **settings):
            self.names.append(self.kernel.fn.__name__)
            with _disable_current_modes():  # the interpreter works with torch, too
                self.kernel[grid](*args, **settings)

        return launch


@pytest.mark.parametrize("last", [False, True])
def test_what_a_call_launches(last, monkeypatch):
    torch.use_deterministic_algorithms(False)  # which fills every new tensor
    case = make("selective_scan", [17, 1], {"D": 16, "N": 4}, device=DEVICE, states=False)
    inputs = {name: t for name, t in case.inputs.items() if name != "z" and not (last and name == "D")}
    launched: list[str] = []
    for name in KERNELS:
        monkeypatch.setattr(scan, name, Launches(getattr(scan, name), launched))
    # B and C lie side by side in one projection, and are read there.
    both = torch.cat([inputs["B"], inputs["C"]], -1).detach().requires_grad_()
    inputs["B"], inputs["C"] = both.chunk(2, dim=-1)
    if last:
        inputs["C"] = inputs["C"][case.fixed["cu_seqlens"][1:].long() - 1].detach()
    known = borders(case.fixed["cu_seqlens"])  # as the loader has found them
    known.chunks(scan.ROWS), known.chunk_boundaries(scan.ROWS)
    with Count() as forward:
        if last:
            y = selective_scan_last(**inputs, **case.fixed, backend="triton")
        else:
            y = selective_scan(**inputs, **case.fixed, backend="triton")
    assert launched == (["_chunk_states", "_pass_states"] if last else ["_chunk_states", "_pass_states", "_outputs"])
    # selective_scan_last's own product with C comes on top.
    assert forward.names[:1] == ["clone"]
    assert len(launched) + len(forward.names) <= (6 if last else 4)
    launched.clear()
    gradient = torch.ones_like(y)
    wanted = [inputs[name] for name in ("x", "dt", "A", "dt_bias")] + [inputs["B"] if last else both]
    with Count() as backward:
        torch.autograd.grad(y, wanted, gradient)
    assert launched == ([] if last else ["_chunk_states"]) + ["_pass_states", "_gradients"]
    # Two sums over programs; selective_scan_last's own product; the gradient of the projection put together.
    assert sorted(backward.names) == ["bmm" if last else "cat", "sum", "sum"]
