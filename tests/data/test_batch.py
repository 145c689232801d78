"""Batches: filled up, cut and laid out in one buffer, what they say stays."""

import pytest
import torch

from recbole_ssm.data.batch import SequenceBatch, size_class
from recbole_ssm.ops.packing import Borders, borders, cu_seqlens_from_lengths, know


def batch_of(lengths, last=False, negatives=None):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor(lengths)
    rows, cu_seqlens = int(lengths.sum()), cu_seqlens_from_lengths(lengths)
    target_rows = (
        cu_seqlens[1:].long() - 1 if last else torch.randperm(rows, generator=generator)[: -(-rows // 2)].sort()[0]
    )
    drawn = None if negatives is None else torch.randint(1, 9, (len(target_rows), negatives), generator=generator)
    items = torch.randint(1, 9, (rows,), generator=generator)
    return SequenceBatch(items, cu_seqlens, target_rows, items[target_rows], drawn, last=last)


def test_sizes_are_few_and_at_most_an_eighth_too_large():
    sizes = {count: size_class(count) for count in range(1, 5000)}
    assert all(count <= size <= max(16, count * 1.125 + 1) for count, size in sizes.items() if count > 128)
    assert all(count <= size < count + 16 for count, size in sizes.items() if count <= 128)
    assert len({size for count, size in sizes.items() if count > 128}) <= 8 * 6
    assert all(size_class(size) == size for size in sizes.values())


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("lengths", [[1], [3, 1, 17], [16] * 8, [5] * 100, [30, 30, 1]], ids=str)
def test_a_filled_batch_holds_the_batch(lengths, last):
    batch = batch_of(lengths, last, negatives=2)
    filled = batch.filled(longest=max(lengths))
    known, count = borders(filled.cu_seqlens), len(batch)
    assert len(filled.items) == size_class(len(filled.items)) >= len(batch.items)
    assert torch.equal(filled.items[: len(batch.items)], batch.items)
    assert not filled.items[len(batch.items) :].any()
    assert known.lengths[: len(lengths)].tolist() == lengths
    assert known.lengths.max() <= known.room == known.longest
    for name in ("target_rows", "targets", "negatives"):
        assert torch.equal(getattr(filled, name)[:count], getattr(batch, name))
        assert len(getattr(filled, name)) == len(filled.target_weights)
    assert filled.target_weights[:count].tolist() == pytest.approx([1 / count] * count)
    assert not filled.target_weights[count:].any()
    torch.testing.assert_close(known.lengths, filled.cu_seqlens.diff().long())
    assert filled.target_rows.max() < len(filled.items)
    if last:
        assert torch.equal(filled.target_rows, filled.cu_seqlens[1:].long() - 1)
        assert known.lengths.min() > 0


def test_batches_of_like_size_have_one_shape():
    shapes = {batch_of([7] * n + [9, 3]).filled(50).shape for n in (130, 131, 133)}
    assert len(shapes) == 1
    assert shapes.pop() != batch_of([7] * 300).filled(50).shape


def test_tables_say_what_the_borders_say():
    lengths = torch.tensor([3, 0, 33, 1])
    cu_seqlens = cu_seqlens_from_lengths(lengths)
    tables = borders(cu_seqlens).all_tables()
    rows = [(s, p) for s, length in enumerate(lengths.tolist()) for p in range(length)]
    assert tables["sequence_ids"].tolist() == [s for s, _ in rows]
    assert tables["positions"].tolist() == [p for _, p in rows]
    assert tables["flip_rows"].tolist() == [2, 1, 0, *range(35, 2, -1), 36]
    assert tables["last_rows"].tolist() == [2, 2, 35, 36]
    assert tables["chunks/16"].tolist() == [0, 2, 2, 2, 3]
    assert tables["first_chunks/16"].tolist() == [0, 1, 1, 4, 5]
    assert tables["chunk_boundaries/16"].tolist() == [0, 0, 0, 2, 2]
    assert {table.dtype for table in tables.values()} == {torch.int32}


def test_with_room_tables_of_chunks_have_the_shape_of_their_number_of_rows():
    one, other = (Borders(torch.tensor(lengths), room=40) for lengths in ([40, 1, 1], [14, 14, 14]))
    for size in (16, 32):
        assert len(one.chunks(size)[0]) == len(other.chunks(size)[0]) == 42 // size + 3
        assert one.chunk_boundaries(size)[1] == other.chunk_boundaries(size)[1] == 42 // size
        exact = Borders(torch.tensor([40, 1, 1])).chunks(size)[0]
        assert torch.equal(one.chunks(size)[0][: len(exact)], exact)
        assert set(one.chunks(size)[0][len(exact) :].tolist()) <= {2}


def test_in_one_buffer_all_is_the_same_and_known():
    batch = batch_of([3, 1, 17], negatives=3).filled(17)
    flat = batch.in_one_buffer(pinned=False)
    assert flat.shape == batch.shape
    begin, end = flat.buffer.data_ptr(), flat.buffer.data_ptr() + flat.buffer.numel()
    for name, tensor in flat._tensors().items():
        assert torch.equal(tensor, batch._tensors()[name]), name
        assert begin <= tensor.data_ptr() < end
        assert tensor.data_ptr() % 16 == 0
    assert borders(flat.cu_seqlens).room == borders(batch.cu_seqlens).room


def test_a_buffer_written_over_holds_the_next_batch():
    first, second = (batch_of(lengths).filled(20).in_one_buffer(pinned=False) for lengths in ([9, 9], [12, 6]))
    assert first.shape == second.shape
    first.buffer.copy_(second.buffer)
    assert torch.equal(first.items, second.items)
    assert torch.equal(first.cu_seqlens, second.cu_seqlens)


def test_cut_into_parts():
    batch = batch_of([3, 1, 17, 2], last=True, negatives=1)
    parts = batch.split([2, 1, 1])
    assert [borders(part.cu_seqlens).lengths.tolist() for part in parts] == [[3, 1], [17], [2]]
    for name in ("items", "targets", "negatives"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))
    assert all(torch.equal(part.target_rows, part.cu_seqlens[1:].long() - 1) for part in parts)
    assert batch.split([4]) == [batch]


def test_what_is_known_ends_with_a_change():
    cu_seqlens = torch.tensor([0, 2, 3], dtype=torch.int32)
    know(cu_seqlens, Borders(torch.tensor([2, 1])))
    assert borders(cu_seqlens).lengths.tolist() == [2, 1]
    cu_seqlens[1] = 1
    assert borders(cu_seqlens).lengths.tolist() == [1, 2]
