"""What kinds of items a user's history holds."""

from pathlib import Path

import numpy as np
from recbole.utils.enum_type import FeatureType

from recbole_ssm.data.reading import NAMES, AtomicFile, file_format
from recbole_ssm.data.sequence_dataset import SequenceDataset
from recbole_ssm.errors import UserError


def history_categories(eval_data, file: Path, field: str) -> tuple[list[str], np.ndarray]:
    """How each row's history divides among categories such as genres.

    An item of several categories counts for each in equal shares; one that the file lacks counts for none.

    Args:
        eval_data: validation or test loader.
        file: RecBole's atomic file of items.
        field: its column of categories, of type token_seq.

    Returns:
        The ``C`` categories' names, and float64 ``[N, C]``, rows in the loader's order, each summing to 1 or, without
        any known item, to 0.

    Raises:
        UserError: where the file has no such column.
    """
    dataset: SequenceDataset = eval_data._dataset
    items = AtomicFile(file, *file_format(dataset.config))
    choice = [name for name, ftype in items.columns.items() if ftype == FeatureType.TOKEN_SEQ]
    if field not in choice or dataset.iid_field not in items.columns:
        raise UserError(
            f"{file} has no column {field}:token_seq beside {dataset.iid_field}: choose one of {', '.join(choice)}."
        )
    known = dataset.field2token_id[dataset.iid_field]
    table = items.read({dataset.iid_field: NAMES, field: NAMES})
    words_of = items.lists(field, table[field], dataset.separator("seq_separator"))
    lists = dict(zip(table[dataset.iid_field], (words.tolist() for words in words_of), strict=True))
    names = sorted({name for words in lists.values() for name in words})
    number = {name: i for i, name in enumerate(names)}
    weight = np.zeros((dataset.item_num, len(names)))
    for token, words in lists.items():
        if token in known and words:
            weight[known[token], [number[word] for word in words]] = 1 / len(words)
    running = np.concatenate([np.zeros((1, len(names))), weight[dataset.sorted_items.numpy()].cumsum(0)])
    target = dataset.inter_feat[SequenceDataset.TARGET_POSITION].numpy()
    share = running[target] - running[dataset.user_start[target].numpy()]
    total = share.sum(1, keepdims=True)
    return names, np.divide(share, total, out=np.zeros_like(share), where=total > 0)
