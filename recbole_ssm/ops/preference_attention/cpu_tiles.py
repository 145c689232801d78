"""Preference-aware attention on a CPU: the layouts of a sequence's rows, and products of these.

Rows are padded with zeros to whole tiles; where keys are the lanes of a product, they are panels of :data:`LANES` keys
with the features down each panel. Every matrix product is made of tiles of :data:`ROWS` by :data:`LANES` that are
summed in registers, :func:`multiply`.
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from recbole_ssm.ops.compiled import helper

ROWS = 8  # of a product in registers: as many sums as it takes to keep two multiply-adds a cycle busy
LANES = 16  # floats in the widest vector register there is; narrower ones are used several at a time

# Stands for minus infinity, which the kernels are compiled to assume never occurs.
HIDDEN = np.float32(-1e30)


def _multiplier(transposed, vectors):
    """A kernel's matrix product; LLVM does not keep its sums in registers when it is written as loops over arrays."""

    @intrinsic
    def multiply(typingctx, out, row, column, a, a_row, a_column, b, b_row, b_column, count, keep):
        signature = types.void(
            out, types.intp, types.intp, a, types.intp, types.intp, b, types.intp, types.intp, types.intp, types.boolean
        )
        vector = ir.VectorType(ir.FloatType(), LANES)
        first = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
        undefined = ir.Constant(vector, ir.Undefined)

        def generate(context, builder, signature, arguments):
            out, row, column, a, a_row, a_column, b, b_row, b_column, count, keep = arguments

            def constant(number):
                return context.get_constant(types.intp, number)

            def matrix(position, value):
                array = context.make_array(signature.args[position])(context, builder, value)
                width = cgutils.unpack_tuple(builder, array.shape)[1]
                return lambda i, j: builder.gep(array.data, [builder.add(builder.mul(i, width), j)])

            def lanes(pointer):
                return builder.bitcast(pointer, vector.as_pointer())

            out_at, a_at, b_at = matrix(0, out), matrix(3, a), matrix(6, b)
            columns = [constant(LANES * c) for c in range(vectors)]
            places = [
                [lanes(out_at(builder.add(row, constant(r)), builder.add(column, c))) for c in columns]
                for r in range(ROWS)
            ]
            sums = [[cgutils.alloca_once(builder, vector) for _ in columns] for _ in range(ROWS)]
            pairs = [pair for r in range(ROWS) for pair in zip(places[r], sums[r], strict=True)]
            for place, total in pairs:
                old = builder.load(place, align=4)
                builder.store(builder.select(keep, old, ir.Constant(vector, None)), total)
            with cgutils.for_range(builder, count) as loop:
                k = builder.add(b_row, loop.index)
                rights = [builder.load(lanes(b_at(k, builder.add(b_column, c))), align=4) for c in columns]
                for r in range(ROWS):
                    down, along = (loop.index, constant(r)) if transposed else (constant(r), loop.index)
                    left = builder.load(a_at(builder.add(a_row, down), builder.add(a_column, along)))
                    spread = builder.shuffle_vector(
                        builder.insert_element(undefined, left, ir.Constant(ir.IntType(32), 0)), undefined, first
                    )
                    for right, total in zip(rights, sums[r], strict=True):
                        term = builder.fmul(spread, right, flags=("contract",))
                        builder.store(builder.fadd(builder.load(total), term, flags=("contract",)), total)
            for place, total in pairs:
                builder.store(builder.load(total), place, align=4)
            return context.get_dummy_value()

        return signature, generate

    return multiply


# ``out[row + r, column + l] = sum_k a[a_row + r, a_column + k] b[b_row + k, b_column + l]`` for ROWS r, LANES l and
# ``count`` k, added to what is there where ``keep``; twice as many l; and both with ``a[a_row + k, a_column + r]``.
multiply, _multiply_double = _multiplier(False, 1), _multiplier(False, 2)
_multiply_transposed, _multiply_transposed_double = _multiplier(True, 1), _multiplier(True, 2)


@helper
def multiply_rows(out, row, a, a_row, a_column, b, b_row, count, keep):
    """:func:`multiply` for whole rows of ``out`` and ``b``."""
    width = out.shape[1]
    for e in range(0, width - LANES, 2 * LANES):
        _multiply_double(out, row, e, a, a_row, a_column, b, b_row, e, count, keep)
    if width % (2 * LANES):
        multiply(out, row, width - LANES, a, a_row, a_column, b, b_row, width - LANES, count, keep)


@helper
def add_transposed_rows(out, row, a, a_row, a_column, b, b_row, count):
    """The same with ``a`` transposed, always added."""
    width = out.shape[1]
    for e in range(0, width - LANES, 2 * LANES):
        _multiply_transposed_double(out, row, e, a, a_row, a_column, b, b_row, e, count, True)
    if width % (2 * LANES):
        _multiply_transposed(out, row, width - LANES, a, a_row, a_column, b, b_row, width - LANES, count, True)


@intrinsic
def larger(typingctx, a, b):
    """The larger of two numbers that are no NaN; a running ``max`` is not vectorised, for it must look out for them."""

    def generate(context, builder, signature, arguments):
        a, b = arguments
        return builder.select(builder.fcmp_ordered(">", a, b, flags=("fast",)), a, b, flags=("fast",))

    return a(a, b), generate


# In the loops below every array is first cut to where the loop begins: an index that might be negative, and count
# from the end, keeps a loop from being vectorised.


@helper
def dot(a, b):
    """``a . b``."""
    total = np.float32(0.0)
    for e in range(len(a)):
        total += a[e] * b[e]
    return total


@helper
def add_multiple(target, factor, source):
    """``target += factor * source``."""
    for e in range(len(target)):
        target[e] += factor * source[e]


@helper
def whole(count, step):
    """The smallest multiple of ``step`` that is not below ``count``."""
    return (count + step - 1) // step * step


@helper
def _zeros(length, heads, width):
    """Padded rows, ``[H, L, width]`` with ``L`` and ``width`` up to whole tiles."""
    return np.zeros((heads, whole(length, LANES), whole(width, LANES)), np.float32)


@helper
def padded_rows(source):
    """A copy of ``[L, H, width]`` as padded rows."""
    length, heads, width = source.shape
    rows = _zeros(length, heads, width)
    for i in range(length):
        for h in range(heads):
            for e in range(width):
                rows[h, i, e] = source[i, h, e]
    return rows


@helper
def unpad(rows, target):
    """Copy padded rows into ``[L, H, width]``."""
    length, heads, width = target.shape
    for i in range(length):
        for h in range(heads):
            for e in range(width):
                target[i, h, e] = rows[h, i, e]


@helper
def inner_products(a, b):
    """Of the rows of two ``[L, H, width]``, as ``[H, L]``."""
    length, heads, _ = a.shape
    products = np.empty((heads, length), np.float32)
    for i in range(length):
        for h in range(heads):
            products[h, i] = dot(a[i, h], b[i, h])
    return products


@helper
def panels(rows, width):
    """Padded rows as panels ``[H, L / LANES * width, LANES]``: a row is a lane of one panel."""
    tiles = rows.reshape(-1, LANES, rows.shape[2])
    panels = np.empty((len(tiles), width, LANES), np.float32)
    for panel in range(len(tiles)):
        for e in range(width):
            for lane in range(LANES):
                panels[panel, e, lane] = tiles[panel, lane, e]
    return panels.reshape(len(rows), -1, LANES)
