"""A recommender as files that run without this package: ONNX graphs, the items' names and a model card."""

import importlib.util
import json
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from recbole_ssm.config import FILE_SETTINGS, PROCESS_SETTINGS
from recbole_ssm.data.context import beside, column
from recbole_ssm.errors import UserError
from recbole_ssm.places import writing
from recbole_ssm.serving.histories import Histories
from recbole_ssm.serving.model_card import model_card

if TYPE_CHECKING:
    from recbole_ssm.serving.recommender import Recommender

FORMAT = "recbole_ssm export 1"
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
SCORING, STEP, VOCABULARY, SETTINGS, EXAMPLE, CARD = (
    "scoring.onnx", "step.onnx", "vocabulary.json", "config.json", "example.npz", "README.md",
)  # fmt: skip
PLACES = FILE_SETTINGS | PROCESS_SETTINGS | {"data_path"}  # settings that are the trainer's own business
NEXT = "next."  # what the names of states after a step begin with

# Weights that one file can hold; of larger ones ONNX keeps a second file beside it.
BYTES_IN_ONE_FILE = 1 << 30

# float32 sums in another order; scores are compared with the largest of them.
TOLERANCE = 1e-4


class Scoring(nn.Module):
    """Scores of all items for padded histories, ``[B, n_items]``; the padding, id 0, has the lowest."""

    def __init__(self, model: Any, packs: bool, item_num: int):
        super().__init__()
        self.model, self.packs, self.item_num = model, packs, item_num

    def forward(self, items: Tensor, lengths: Tensor, columns: Tensor | None = None) -> Tensor:
        """For ids ``[B, L]``, the items of each history in its first ``lengths [B]`` places.

        Columns of time are ``[B, L, C]``.
        """
        if not self.packs:  # RecBole's own, whose rows are padded
            return self._scores(self.model(items, lengths), self.model.item_embedding.weight)
        from recbole_ssm.serving.padded import padded_borders

        count, longest = items.shape
        last = torch.arange(count) * longest + lengths - 1
        hidden = self.model.encode(beside(items, columns).flatten(0, 1), padded_borders(lengths, longest), read=last)
        return self.of_hidden(hidden)

    def of_hidden(self, hidden: Tensor) -> Tensor:
        """Scores for hidden states ``[B, d]``."""
        return self._scores(*self.model.score_factors(self.model.read_out(hidden), self.model.score_table()))

    def _scores(self, hidden: Tensor, table: Tensor) -> Tensor:
        scores = hidden @ table[1 : self.item_num].T
        return torch.cat([torch.full_like(scores[:, :1], -torch.inf), scores], 1)


class Step(nn.Module):
    """One more item of each history: scores of all items, and the states after it."""

    def __init__(self, scoring: Scoring, names: list[str]):
        super().__init__()
        self.scoring, self.names = scoring, names

    def forward(self, state: list[Tensor], items: Tensor, columns: Tensor | None = None) -> tuple[Tensor, ...]:
        """For states ``[B, ...]`` in the order of their names, ids ``[B]`` and columns ``[B, C]``."""
        hidden, after = self.scoring.model.step(beside(items, columns), dict(zip(self.names, state, strict=True)))
        return self.scoring.of_hidden(hidden), *(after[name] for name in self.names)


def export(recommender: "Recommender", folder: str | Path, overwrite: bool = False) -> None:
    """Write a recommender as files that ONNX Runtime and NumPy run, all of them or none.

    - ``scoring.onnx``: ``items`` ``[B, L]`` and ``lengths`` ``[B]`` (and ``columns`` ``[B, L, C]`` where the model
      reads times, see :mod:`recbole_ssm.data.context`), int64, to ``scores`` ``[B, n_items]``, float32, for any ``B``
      and ``L`` from 1. Rows are padded at their end, and the score of id 0, the padding, is -inf.
    - ``step.onnx``, where the model steps: ``items`` ``[B]`` (``columns`` ``[B, C]``) and states by name to ``scores``
      and the states after, whose names begin with ``next.``. A history begins with zeros.
    - ``vocabulary.json``: the items by id; ``config.json``: the names and shapes of all of this, and the settings;
      ``example.npz``: inputs and their scores; ``README.md``: a model card.

    What is written has been run in ONNX Runtime and gave the scores that the recommender gives.

    Args:
        recommender: what is exported; of RecBole's own models one whose output is multiplied with ``item_embedding``.
        folder: a new one.
        overwrite: put it in the place of an earlier export.

    Raises:
        UserError: where packages are missing, the folder is there already, or the model cannot be exported.
        CannotWrite: where the folder cannot be written.
    """
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise UserError(f"an export needs {' and '.join(missing)}: pip install 'recbole-ssm[onnx]'.")
    folder = Path(os.path.abspath(folder))
    _check_folder(folder, overwrite)
    about = describe(recommender)
    example: dict[str, Any] = examples(recommender)
    remedy = "choose another folder"
    with writing(folder, remedy):
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        with writing(folder, remedy):
            _write_graphs(recommender, about, scratch)
            check(scratch, about, example)
            np.savez(scratch / EXAMPLE, **example)
            (scratch / VOCABULARY).write_text(
                json.dumps(recommender.vocabulary.items.tolist(), ensure_ascii=False), encoding="utf-8"
            )
            (scratch / SETTINGS).write_text(json.dumps(about, indent=1), encoding="utf-8")
            (scratch / CARD).write_text(model_card(recommender, about), encoding="utf-8")
            os.umask(umask := os.umask(0))
            scratch.chmod(0o777 & ~umask)  # mkdtemp's is its owner's alone
            _put(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def describe(recommender: "Recommender") -> dict[str, Any]:
    """What runs the graphs has to know: the content of ``config.json``.

    Raises:
        UserError: for a model that is not exported.
    """
    name, model = recommender.config["model"], recommender.model
    if not getattr(model, "var_len", True):
        raise UserError(f"{name} with var_len: False is not exported: train it with var_len: True.")
    if not recommender.packs and not isinstance(getattr(model, "item_embedding", None), nn.Embedding):
        raise UserError(f"{name} has no table of item embeddings to score with, and is not exported.")
    state = {}
    if recommender.packs and model.steps:
        device = recommender.device
        width = len(recommender.time_columns)
        one = torch.ones((1, 1 + width) if width else 1, dtype=torch.int64, device=device)
        with torch.no_grad():
            _, carried = model.prefill(one, torch.tensor([0, 1], dtype=torch.int32, device=device))
        state = {
            key: {"shape": list(value.shape[1:]), "dtype": str(value.dtype).removeprefix("torch.")}
            for key, value in carried.items()
        }
    return {
        "format": FORMAT,
        "model": name,
        "dataset": recommender.config["dataset"],
        "digest": recommender.digest,
        "max_item_list_length": recommender.max_length,
        "columns": list(recommender.time_columns),
        "state": state,
        "settings": {key: value for key, value in recommender.config.given.items() if key not in PLACES},
    }


def examples(recommender: "Recommender") -> dict[str, np.ndarray]:
    """Histories of several lengths up to the longest that the model reads, and the recommender's own scores.

    Returns:
        ``items`` ``[B, L]``, ``lengths`` ``[B]``, of a model that reads times ``columns`` ``[B, L, C]``, and ``scores``
        ``[B, n_items]``.
    """
    most, item_num = recommender.max_length, recommender.vocabulary.item_num
    lengths = np.unique([1, min(2, most), (most + 1) // 2, most])
    generator = np.random.default_rng(0)
    real = np.arange(most) < lengths[:, None]
    example = {"items": generator.integers(1, item_num, real.shape) * real, "lengths": lengths}
    columns = at = None
    if names := recommender.time_columns:
        kinds = [min(20, column(name).kinds or 20) for name in names]
        example["columns"] = generator.integers(0, kinds, (*real.shape, len(names))) * real[..., None]
        columns, at = example["columns"][real], np.zeros(len(lengths))
    histories = Histories(example["items"][real], lengths, columns, at=at)
    with torch.inference_mode():
        scores = recommender._scores_of(histories, recommender.candidate_ids())(slice(None)).float().cpu().numpy()
    return {**example, "scores": np.pad(scores, ((0, 0), (1, 0)), constant_values=-np.inf)}


def check(folder: Path, about: dict[str, Any], example: dict[str, np.ndarray]) -> None:
    """Run the graphs in ONNX Runtime.

    Raises:
        UserError: where they do not give the scores of the ``example``.
    """
    import onnxruntime

    inputs = {key: value for key, value in example.items() if key != "scores"}
    session = onnxruntime.InferenceSession(folder / SCORING, providers=["CPUExecutionProvider"])
    scores = session.run(["scores"], inputs)[0]
    session = None  # so that no two graphs are in memory at a time
    _compare(about["model"], scores, example["scores"])
    if not about["state"]:
        return
    session = onnxruntime.InferenceSession(folder / STEP, providers=["CPUExecutionProvider"])
    lengths = inputs.pop("lengths")
    state = {key: np.zeros((len(lengths), *of["shape"]), of["dtype"]) for key, of in about["state"].items()}
    for place in range(lengths.max()):
        now, *after = session.run(None, {**state, **{key: value[:, place] for key, value in inputs.items()}})
        state = dict(zip(state, after, strict=True))
        scores[lengths == place + 1] = now[lengths == place + 1]
    _compare(about["model"], scores, example["scores"])


def _compare(name: str, found: np.ndarray, expected: np.ndarray) -> None:
    largest = np.abs(expected[:, 1:]).max()
    if found.shape != expected.shape or not np.allclose(found, expected, TOLERANCE, TOLERANCE * largest):
        raise UserError(f"{name}, as it is set, is not exported: ONNX Runtime gives other scores than the model.")


def _write_graphs(recommender: "Recommender", about: dict[str, Any], folder: Path) -> None:
    from recbole_ssm.serving.padded import padded

    scoring = Scoring(padded(recommender.model), recommender.packs, recommender.vocabulary.item_num)
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    rows: dict[str, Tensor] = {"items": torch.ones(2, 3, dtype=torch.int64), "lengths": torch.tensor([3, 2])}
    if about["columns"]:
        rows["columns"] = torch.ones(2, 3, len(about["columns"]), dtype=torch.int64)
    shapes: dict[str, Any] = {name: {0: batch, 1: length} for name in rows} | {"lengths": {0: batch}}
    _write_graph(scoring, rows, shapes, list(rows), ["scores"], folder / SCORING, about["model"])
    if not about["state"]:
        return
    names = list(about["state"])
    state = [torch.zeros(2, *of["shape"], dtype=getattr(torch, of["dtype"])) for of in about["state"].values()]
    row = {name: value[:, 0] for name, value in rows.items() if name != "lengths"}
    shapes = {"state": [{0: batch}] * len(state), **{name: {0: batch} for name in row}}
    outputs = ["scores", *(NEXT + name for name in names)]
    _write_graph(
        Step(scoring, names), {"state": state, **row}, shapes, [*names, *row], outputs, folder / STEP, about["model"]
    )


def _write_graph(
    module: nn.Module, inputs: dict[str, Any], shapes: dict[str, Any], names: list[str], outputs: list[str], file: Path,
    model: str,
) -> None:  # fmt: skip
    weights = sum(tensor.nbytes for tensor in module.state_dict().values())
    with _quietly(), torch.inference_mode(False), torch.no_grad():
        try:
            program: Any = torch.onnx.export(
                module, kwargs=inputs, dynamo=True, dynamic_shapes=shapes, input_names=names, output_names=outputs,
                verbose=False,
            )  # fmt: skip
        except Exception as error:  # the exporter's own, of a dozen types that wrap one another
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            why = (str(cause).splitlines() or [""])[0]
            raise UserError(
                f"{model}, as it is set, is not exported: torch {torch.__version__} cannot write it as ONNX "
                f"({type(cause).__name__}: {why})."
            ) from error
        import onnx_ir.passes.common

        # Its optimizer leaves constants that nothing reads, of which ONNX Runtime tells wherever it loads them.
        onnx_ir.passes.common.RemoveUnusedNodesPass()(program.model)
        program.save(file, external_data=weights > BYTES_IN_ONE_FILE)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without what torch's exporter tells of packages that it does not need here, and of its own deprecated calls."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _check_folder(folder: Path, overwrite: bool) -> None:
    if not os.path.lexists(folder):
        return
    if not overwrite:
        raise UserError(f"{folder} is there already: name a new folder, or overwrite it (--overwrite).")
    written = None
    with suppress(OSError, ValueError):
        written = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    if folder.is_symlink() or not isinstance(written, dict) or written.get("format") != FORMAT:
        raise UserError(f"{folder} is no export of a recommender, and is left as it is: name another folder.")


def _put(scratch: Path, folder: Path) -> None:
    """Rename ``scratch`` to ``folder``, and remove what was there."""
    if not folder.exists():
        os.replace(scratch, folder)
        return
    aside = scratch.with_name(f"{scratch.name}-before")
    os.replace(folder, aside)
    try:
        os.replace(scratch, folder)
    except OSError:
        os.replace(aside, folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)
