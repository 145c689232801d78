"""Catalogues in which there is no item to draw as a negative, for which samplers would look for ever."""

from typing import Any

import numpy as np
from recbole.sampler import RepeatableSampler

from recbole_ssm.errors import UserError

REMEDY = (
    "train without negatives (loss_type: CE, train_neg_sample_args: ~), rank all items (mode: full in eval_args), or "
    "bring more items."
)

# Least share of the draws that must fall on other items than the commonest.
LEAST_SHARE = 1e-6


def check_loader(config: Any, loader: Any, arguments: dict[str, Any] | None) -> None:
    """Refuse to draw negatives for the rows of a loader of RecBole's where there are none.

    Args:
        config: the configuration.
        loader: one for training or evaluation; of a knowledge graph's, that of interactions.
        arguments: how it draws negatives, as in ``train_neg_sample_args``.

    Raises:
        UserError: where a row has none.
    """
    loader = getattr(loader, "general_dataloader", loader)
    dataset, sampler = loader._dataset, getattr(loader, "_sampler", None)
    if config["transform"] == "mask_itemseq":
        _check_masked(dataset, config)
    if sampler is None or (arguments or {}).get("sample_num", "none") == "none":
        return
    if sampler.distribution == "popularity":
        items = [item for item, probability in sampler.prob.items() if probability > 0]
    else:
        items = list(range(1, sampler.item_num))
    if isinstance(sampler, RepeatableSampler):  # draws what is not the row's own item
        check_shares(np.ones(len(items)), dataset.dataset_name)
        return
    users = np.unique(dataset.inter_feat[dataset.uid_field].numpy())
    full = [user for user in users if len(used := sampler.used_ids[user]) >= len(items) and used.issuperset(items)]
    if full:
        raise UserError(
            f"{len(full)} users of {dataset.dataset_name}, {dataset.id2token(dataset.uid_field, full[0])} the first, "
            f"have had all {len(items)} items that negatives are drawn from: filter them by user_inter_num_interval, "
            f"or {REMEDY}"
        )


def check_shares(weights: np.ndarray, name: str) -> None:
    """Refuse to draw other items than the commonest where there are none, or hardly any.

    Args:
        weights: how often each item is drawn, up to a factor.
        name: the dataset's.

    Raises:
        UserError: see above.
    """
    total = weights.sum()
    if not 0 < total < np.inf or weights.max() > (1 - LEAST_SHARE) * total:
        raise UserError(f"all negatives of {name} would be one item, with nothing to tell it from: {REMEDY}")


def _check_masked(dataset: Any, config: Any) -> None:
    """Refuse histories of all items, where RecBole's masks draw items from outside of each."""
    field = config["ITEM_ID_FIELD"] + config["LIST_SUFFIX"]
    if field not in dataset.inter_feat or dataset.inter_feat[field].shape[1] < dataset.item_num - 1:
        return
    histories = dataset.inter_feat[field].sort(1).values
    different = (histories.diff(dim=1) != 0).sum(1) + (histories[:, 0] != 0)
    if full := int((different >= dataset.item_num - 1).sum()):
        raise UserError(
            f"{full} histories of {dataset.dataset_name} hold all its items, so that mask_itemseq (transform) has "
            f"none to draw: filter them by user_inter_num_interval, or {REMEDY}"
        )
