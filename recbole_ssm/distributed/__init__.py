"""Several processes that train one model: what they share (here), how they are started, and the same on a Ray cluster.

:mod:`~recbole_ssm.distributed.launch` starts them on this machine (``--nproc``),
:mod:`~recbole_ssm.distributed.ray_training` on a cluster (``--engine=ray``).
"""

from recbole_ssm.distributed.processes import (
    MergedEvaluator,
    from_all,
    mean_over_processes,
    meet_on_this_machine,
    own_rows,
    rank,
    same_weights,
    shard,
    shard_batches,
    surplus_rows,
    weight_of,
    world_size,
)

__all__ = [
    "MergedEvaluator", "from_all", "mean_over_processes", "meet_on_this_machine", "own_rows", "rank", "same_weights",
    "shard", "shard_batches", "surplus_rows", "weight_of", "world_size",
]  # fmt: skip
