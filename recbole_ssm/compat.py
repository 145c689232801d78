"""What RecBole's own models lack on today's stack, in subclasses of them: RecBole's modules stay as they are.

- ``dok_matrix._update``, by which the graph models fill their adjacency matrix, left SciPy in 1.13.
- KSR multiplies single-precision numbers by the double-precision ones of a pre-trained file.
- ``torch_scatter`` (KGIN, MCCLK) and ``dgl`` below 1.0 (KGAT) are built for old versions of torch, and RecBole does not
  declare them. Where ``torch_scatter`` is installed it is used.
"""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import scipy.sparse
import torch
from torch import Tensor


class _DokMatrix(scipy.sparse.dok_matrix):
    def _update(self, values: dict[tuple[int, int], float]) -> None:
        rows, columns = zip(*values, strict=True)
        self[rows, columns] = list(values.values())


class _Sparse(ModuleType):
    """:mod:`scipy.sparse` whose ``dok_matrix`` is filled as it was before 1.13."""

    dok_matrix = _DokMatrix

    def __getattr__(self, name: str) -> Any:
        return getattr(scipy.sparse, name)


def _fills_dok_matrix(function: Any) -> bool:
    return isinstance(function, FunctionType) and {"dok_matrix", "_update"} <= set(function.__code__.co_names)


def _with_old_sparse(function: FunctionType) -> FunctionType:
    """The same code, to which ``sp`` is :class:`_Sparse`."""
    names = {**function.__globals__, "sp": _Sparse("scipy.sparse")}
    return FunctionType(
        function.__code__, names, function.__name__, function.__defaults__, function.__closure__
    )  # fmt: skip


def scatter_mean(src: Tensor, index: Tensor, dim: int, dim_size: int) -> Tensor:
    """Mean of the rows of ``src [E, d]`` with the same ``index [E]``, ``[dim_size, d]``; 0 where there is none."""
    count = torch.bincount(index, minlength=dim_size).clamp(min=1)
    return src.new_zeros(dim_size, src.shape[1]).index_add(dim, index, src) / count[:, None]


def scatter_softmax(src: Tensor, index: Tensor, dim: int) -> Tensor:
    """Softmax of ``src [E, d]`` over the rows with the same ``index [E]``."""
    index = index[:, None].expand_as(src)
    shape = (int(index.max()) + 1, src.shape[1])
    largest = src.new_zeros(shape).scatter_reduce(dim, index, src, "amax", include_self=False)
    exponentials = (src - largest.detach().gather(dim, index)).exp()
    return exponentials / src.new_zeros(shape).scatter_add(dim, index, exponentials).gather(dim, index)


@contextmanager
def _standing_in(name: str, *functions: Any) -> Iterator[None]:
    """Let an import of ``name`` find ``functions``, in here alone: others look whether the package is installed."""
    module = ModuleType(name)
    vars(module).update({function.__name__: function for function in functions})
    before = sys.modules.get(name)
    sys.modules[name] = module
    try:
        yield
    finally:
        del sys.modules[name]
        if before is not None:
            sys.modules[name] = before


class WithoutScatter:
    """Mixin for KGIN and MCCLK, whose layers import ``torch_scatter`` in each forward pass."""

    def forward(self, *arguments):
        """As RecBole's."""
        with _standing_in("torch_scatter", scatter_mean, scatter_softmax):
            return super().forward(*arguments)  # type: ignore[misc]


class _GraphsAsMatrices:
    """A dataset whose graphs are sparse matrices, whatever form is asked for."""

    def __init__(self, dataset: Any):
        self._dataset = dataset

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dataset, name)

    def ckg_graph(self, form: str, value_field: str) -> scipy.sparse.coo_matrix:
        return self._dataset.ckg_graph("coo", value_field)


class WithoutDgl:
    """Mixin for KGAT, which takes from a ``dgl`` graph nothing but the adjacency of each relation."""

    ckg: scipy.sparse.coo_matrix
    device: torch.device

    def __init__(self, config, dataset):
        super().__init__(config, _GraphsAsMatrices(dataset))  # type: ignore[call-arg]

    def init_graph(self) -> Tensor:
        """Sum over relations of the adjacency matrix divided by its row sums, sparse ``[nodes, nodes]``."""
        graph = self.ckg
        edge_kind = graph.row.astype(np.int64) * (int(graph.data.max()) + 1) + graph.data.astype(np.int64)
        _, kind, count = np.unique(edge_kind, return_inverse=True, return_counts=True)
        matrix = scipy.sparse.coo_matrix((1 / count[kind], (graph.row, graph.col)), graph.shape).tocsr().tocoo()
        indices = torch.from_numpy(np.stack([matrix.row, matrix.col]).astype(np.int64))
        values = torch.from_numpy(matrix.data).float()
        return torch.sparse_coo_tensor(indices, values, matrix.shape, check_invariants=False).to(self.device)


class SinglePrecision:
    """Mixin for KSR, whose relations come from a file as float64."""

    relation_Matrix: Tensor

    def __init__(self, config, dataset):
        super().__init__(config, dataset)  # type: ignore[call-arg]
        self.relation_Matrix = self.relation_Matrix.float()


def ignore_recboles_warnings() -> None:
    """Pass over what RecBole does that torch and pandas warn of: it is not for the person at a command to mend."""
    warnings.filterwarnings("ignore", module=r"recbole\.|thop\.")


MIXINS: dict[str, type] = {"KGAT": WithoutDgl, "KSR": SinglePrecision}
if find_spec("torch_scatter") is None:
    MIXINS |= {"KGIN": WithoutScatter, "MCCLK": WithoutScatter}


@lru_cache(maxsize=None)
def mended(model_class: type) -> type:
    """``model_class`` as it runs here: itself, or a subclass of the same name with what it lacks."""
    bases = [found for cls in model_class.__mro__ if (found := _mixin_of(cls))]
    methods = {
        name: _with_old_sparse(function)
        for cls in reversed(model_class.__mro__)
        for name, function in vars(cls).items()
        if _fills_dok_matrix(function)
    }
    if not bases and not methods:
        return model_class
    return type(model_class.__name__, (*bases, model_class), methods)


def _mixin_of(cls: type) -> type | None:
    return MIXINS.get(cls.__name__) if cls.__module__.startswith("recbole.model.") else None
