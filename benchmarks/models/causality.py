"""Which of RecBole's sequential models can be trained on whole histories: decided by running them."""

from typing import Any

import recbole.data.dataset
import recbole.trainer
import torch
from recbole.data.interaction import Interaction
from recbole.utils import get_model, get_trainer
from torch import Tensor, nn

from recbole_ssm.compat import mended
from recbole_ssm.data.batch import SequenceBatch
from recbole_ssm.models.sequence_mode import with_sequence_mode
from recbole_ssm.ops.packing import cu_seqlens_from_lengths

LENGTHS = (5, 3)  # of the histories; rows are padded to MAX_ITEM_LIST_LENGTH, which must be more


def reason_against(config: Any, dataset: Any) -> str | None:
    """Why a model cannot be trained in sequence mode (``train_mode``); None where it can.

    Of random histories one pass must give what RecBole's rows give, for single positions and for all together: the
    loss and every gradient, in double precision where the model computes in it, without dropout. As a row ends before
    its target, no output of such a model depends on what follows, or on padding.

    Args:
        config: of the model, for instance with its ``loss_type``.
        dataset: its training set.
    """
    name = config["model"]
    if get_trainer(config["MODEL_TYPE"], name) is not recbole.trainer.Trainer:
        return "it has a trainer of its own"
    if hasattr(recbole.data.dataset, f"{name}Dataset"):
        return "it has a dataset of its own"
    model_class = mended(get_model(name))
    plain, one_pass = model_class(config, dataset), with_sequence_mode(model_class)(config, dataset)
    one_pass.load_state_dict(plain.state_dict())
    drawn = torch.Generator().manual_seed(0)
    known = dataset.inter_feat[plain.ITEM_ID]
    histories = [known[torch.randint(len(known), (length + 1,), generator=drawn)] for length in LENGTHS]
    negatives = torch.randint(1, plain.n_items, (sum(LENGTHS),), generator=drawn)
    batch = SequenceBatch(
        torch.cat([history[:-1] for history in histories]),
        cu_seqlens_from_lengths(torch.tensor(LENGTHS)),
        torch.arange(sum(LENGTHS)),
        torch.cat([history[1:] for history in histories]),
        negatives[:, None],
    )
    rows = _rows(plain, histories, negatives, config["MAX_ITEM_LIST_LENGTH"])
    for choice in ([0, 1], [3], [6], range(len(negatives))):
        targets = torch.tensor(list(choice))
        try:
            expected, tolerance = _by_rows(plain, rows[targets])
        except KeyError as error:
            return f"it reads {error} of each row"
        part = SequenceBatch(
            batch.items, batch.cu_seqlens, targets, batch.targets[targets], negatives[targets][:, None]
        )  # fmt: skip
        try:
            found = _loss_and_gradients(one_pass.to(expected[0].dtype), part)
        except (RuntimeError, IndexError, ValueError):
            return "it computes one output a row"
        if not all(torch.allclose(a, b, rtol=tolerance, atol=tolerance) for a, b in zip(found, expected, strict=True)):
            return "its output depends on what follows, or on padding"
    return None


def _rows(model: Any, histories: list[Tensor], negatives: Tensor, width: int) -> Interaction:
    """RecBole's row of each target."""
    prefixes = [history[: end + 1] for history in histories for end in range(len(history) - 1)]
    items = torch.stack([nn.functional.pad(prefix, (0, width - len(prefix))) for prefix in prefixes])
    columns = {
        model.ITEM_SEQ: items,
        model.ITEM_SEQ_LEN: torch.tensor([len(prefix) for prefix in prefixes]),
        model.POS_ITEM_ID: torch.cat([history[1:] for history in histories]),
        model.NEG_ITEM_ID: negatives,
    }
    return Interaction(columns)


def _by_rows(model: Any, rows: Interaction) -> tuple[list[Tensor], float]:
    """Loss and gradients of rows, and how exactly they are known: some models make single-precision numbers."""
    try:
        return _loss_and_gradients(model.double(), rows), 1e-9
    except RuntimeError:
        return _loss_and_gradients(model.float(), rows), 1e-4


def _loss_and_gradients(model: Any, batch: Any) -> list[Tensor]:
    model.eval().zero_grad()
    loss = model.calculate_loss(batch).squeeze()
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
