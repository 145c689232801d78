"""What the Triton kernels of all ops share."""

import triton
import triton.language as tl
from torch import Tensor
from torch.backends import cuda

# Under TRITON_INTERPRET=1 kernels run in NumPy on the CPU, one program after another: for tests.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def tuned(configs: list[triton.Config], key: list[str]):
    """Time ``configs`` once for each value of ``key``, and keep the fastest; under the interpreter take the first."""
    return triton.autotune(configs[:1] if INTERPRETED.value else configs, key)


def dot_precision() -> str:
    """How products of float32 blocks are taken: as exactly as torch's own, by ``set_float32_matmul_precision``.

    ``tf32x3`` runs on tensor cores in three passes and keeps float32's accuracy.
    """
    # torch 2.9 and later refuse to tell the one by the other's name once both have been set.
    precision = getattr(cuda.matmul, "fp32_precision", None)
    allowed = cuda.matmul.allow_tf32 if precision is None else precision == "tf32"
    return "tf32" if allowed else "tf32x3"


def rows(tensor: Tensor) -> Tensor:
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
    """Rows of a sequence worked on together, 16 to 64.

    Short sequences leave most of a long block empty; products of matrices start at 16 rows.
    """
    return max(16, min(64, triton.next_power_of_2(-(-n_rows // max(1, n_sequences)))))


def columns_per_block(width: int) -> int:
    """Columns of a block that holds ``width`` of them."""
    return max(16, triton.next_power_of_2(width))


@triton.jit
def load_rows(matrix, t, real, stride, offset, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """``[rows, BLOCK]``: columns ``offset`` to ``offset + WIDTH`` of the rows ``t``, zeros elsewhere."""
    column = tl.arange(0, BLOCK)
    inside = real[:, None] & (column < WIDTH)[None, :]
    return tl.load(matrix + t[:, None] * stride + offset + column[None, :], mask=inside, other=0.0)


@triton.jit
def store_rows(matrix, t, real, stride, offset, value, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Write what :func:`load_rows` would read, in the matrix's dtype."""
    column = tl.arange(0, BLOCK)
    inside = real[:, None] & (column < WIDTH)[None, :]
    place = t[:, None] * stride + offset + column[None, :]
    tl.store(matrix + place, value.to(matrix.dtype.element_ty), mask=inside)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """Product of two blocks of one dtype, summed in float32."""
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
