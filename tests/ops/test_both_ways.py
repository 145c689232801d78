"""Sequences laid out in both directions, and what is known of their borders."""

import pytest
import torch

from recbole_ssm.ops.both_ways import both_ways, twice
from recbole_ssm.ops.packing import Borders, borders, cu_seqlens_from_lengths, know

LENGTHS = [[3, 0, 40, 1, 0], [16], [0, 0], [33, 17]]


def test_the_order_of_rows():
    order, cu_seqlens = both_ways(cu_seqlens_from_lengths(torch.tensor([3, 0, 2])))
    assert order.tolist() == [0, 1, 2, 3, 4, 2, 1, 0, 4, 3]
    assert cu_seqlens.tolist() == [0, 3, 3, 5, 8, 8, 10]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_tables_are_those_of_twice_as_many_sequences(lengths):
    known = borders(twice(cu_seqlens_from_lengths(torch.tensor(lengths))))
    expected = Borders(torch.tensor(lengths * 2))
    for name, table in expected.all_tables().items():
        assert known.table(name).dtype == torch.int32
        assert torch.equal(known.table(name), table), name
    assert known.total == expected.total
    assert known.longest == expected.longest
    assert known.chunk_boundaries(16)[1] == expected.chunk_boundaries(16)[1]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_tables_with_room(lengths):
    """Each chunk finds its rows, each surplus one none, and each sequence has boundaries of its own."""
    cu_seqlens, room = cu_seqlens_from_lengths(torch.tensor(lengths)), max(*lengths, 1) + 20
    know(cu_seqlens, Borders(torch.tensor(lengths), room=room))
    doubled = twice(cu_seqlens)
    known = borders(doubled)
    sequences, first = known.chunks(16)
    covered = []
    for chunk, sequence in enumerate(sequences.tolist()):
        begin = int(doubled[sequence]) + 16 * (chunk - int(first[sequence]))
        covered += range(begin, min(begin + 16, int(doubled[sequence + 1])))
    assert sorted(covered) == list(range(2 * sum(lengths)))
    first, count = known.chunk_boundaries(16)
    taken = [int(first[s]) + i for s, length in enumerate(lengths * 2) for i in range(max(0, length - 1) // 16)]
    assert len(set(taken)) == len(taken)
    assert all(place < count for place in taken)
