"""What the Triton kernels of all ops share."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from recbole_ssm.ops.backend import tf32_allowed

# Under TRITON_INTERPRET=1 kernels run in NumPy on the CPU, one program after another: for tests.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


# Most rows of the left operand of a product of blocks. From 64 rows and 4 warps on, Triton takes Hopper's warp-group
# products (wgmma), and 3.6 to 3.7 address their shared memory wrongly where blocks are small: an illegal access
# (triton-lang/triton issues 11366, 10486, 10573, 10629). With 32 it takes the older mma.sync, on every GPU.
MOST_ROWS = tl.constexpr(32)


def tuned(key: list[str], launches: Sequence[tuple[int, int]], **blocks: int):
    """Time a kernel once for each value of ``key`` and kind of launch, and keep the fastest, on disk, too.

    Timing runs it many times on the arguments of its first call, so it must not read what it writes.

    Args:
        key: arguments of the kernel; dtypes count by themselves.
        launches: numbers of warps and of stages to choose among; under the interpreter the first is taken.
        blocks: rows of the blocks that the launch does not set, by the kernel's name for them.

    Raises:
        ValueError: for a block of more than :data:`MOST_ROWS` rows.
    """
    for name, size in blocks.items():
        if size > MOST_ROWS.value:
            raise ValueError(f"{name} is {size}, but blocks of more than {MOST_ROWS.value} rows are not sound")
    configs = [triton.Config(blocks, num_warps=warps, num_stages=stages) for warps, stages in launches]
    if INTERPRETED.value:
        return triton.autotune(configs[:1], key)
    return triton.autotune(configs, key, cache_results=True)


def dot_precision() -> str:
    """How products of float32 blocks are taken: as exactly as torch's own, by ``set_float32_matmul_precision``.

    ``tf32x3`` runs on tensor cores in three passes and keeps float32's accuracy.
    """
    return "tf32" if tf32_allowed(torch.device("cuda")) else "tf32x3"


def dense_rows(tensor: Tensor) -> Tensor:
    """The tensor, its last dimension contiguous, as kernels address it by the stride of its rows alone."""
    in_place = tensor.stride(-1) == 1 and all(
        tensor.stride(i) == tensor.shape[i + 1] * tensor.stride(i + 1) for i in range(1, tensor.dim() - 1)
    )
    return tensor if in_place else tensor.contiguous()


# Sizes of a batch: Triton would compile a kernel anew for those that are 1 or a multiple of 16.
BATCH_SIZES = ["n_rows", "n_sequences"]


def dense(tensor: Tensor | None) -> Tensor | None:
    """The tensor as kernels read those that have no rows: contiguous."""
    return None if tensor is None else tensor.contiguous()


def rows_per_block(n_rows: int, n_sequences: int) -> int:
    """Rows of a sequence worked on together, 16 to :data:`MOST_ROWS`.

    Short sequences leave most of a long block empty; products of matrices start at 16 rows.
    """
    return max(16, min(MOST_ROWS.value, triton.next_power_of_2(-(-n_rows // max(1, n_sequences)))))


def columns_per_block(width: int) -> int:
    """Columns of a block that holds ``width`` of them."""
    return max(16, triton.next_power_of_2(width))


@triton.jit
def load_rows(matrix, t, real, stride, offset, WIDTH: tl.constexpr, BLOCK: tl.constexpr, start=0):
    """``[rows, BLOCK]``: of the ``WIDTH`` columns at ``offset`` those from ``start`` on, of rows ``t``; else zeros."""
    column = start + tl.arange(0, BLOCK)
    inside = real[:, None] & (column < WIDTH)[None, :]
    return tl.load(matrix + t[:, None] * stride + offset + column[None, :], mask=inside, other=0.0)


@triton.jit
def store_rows(matrix, t, real, stride, offset, value, WIDTH: tl.constexpr, BLOCK: tl.constexpr, start=0):
    """Write what :func:`load_rows` would read, in the matrix's dtype."""
    column = start + tl.arange(0, BLOCK)
    inside = real[:, None] & (column < WIDTH)[None, :]
    place = t[:, None] * stride + offset + column[None, :]
    tl.store(matrix + place, value.to(matrix.dtype.element_ty), mask=inside)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """Product of two blocks of one dtype, summed in float32; the first has at most :data:`MOST_ROWS` rows."""
    tl.static_assert(a.shape[0] <= MOST_ROWS, "a product of so many rows is not sound on every GPU")
    tl.static_assert(a.dtype == b.dtype, "a product needs operands of one dtype")
    if INTERPRETED:  # NumPy has no bfloat16; a product of two is exact in float32
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def sigmoid(v):
    """1 / (1 + exp(-v))."""
    return 1.0 / (1.0 + tl.exp(-v))


@triton.jit
def softplus(v):
    """log(1 + exp(v)), to float32's accuracy where it is tiny, too: a step size's relative error counts."""
    w = tl.exp(-tl.abs(v))
    # log1p(w) = 2 atanh(w / (2 + w)), whose series in s <= 1/3 is exact to 2e-8 after seven terms.
    s = w / (2.0 + w)
    q = s * s
    series = 1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13))))))
    return tl.maximum(v, 0.0) + 2.0 * s * series
