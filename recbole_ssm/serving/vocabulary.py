"""What a model is built from where there are no data: the tokens behind a checkpoint's ids."""

import logging
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from recbole_ssm.data.identity import tokens_of
from recbole_ssm.errors import UserError


class Vocabulary:
    """Tokens by id, in the place of RecBole's dataset.

    Args:
        config: the checkpoint's configuration, with its :attr:`~recbole_ssm.Config.identity`.

    Attributes:
        items: token of each item, ``[n_items]``; id 0 is the padding.

    Raises:
        UserError: where the checkpoint names no items.
    """

    def __init__(self, config: Any):
        self.uid_field, self.iid_field = config["USER_ID_FIELD"], config["ITEM_ID_FIELD"]
        fields = config.identity.get("vocabulary", {})
        self.field2id_token = {field: np.array(["[PAD]", *tokens_of(config.identity, field)]) for field in fields}
        if self.iid_field not in self.field2id_token:
            raise UserError(
                "the checkpoint names no items, for an earlier version wrote it: train it again, or --resume it."
            )
        self.items: np.ndarray = self.field2id_token[self.iid_field]
        self._index = pd.Index(self.items[1:])

    def num(self, field: str) -> int:
        """How many ids a field has, the padding's among them."""
        return len(self.field2id_token[field])

    @property
    def item_num(self) -> int:
        """How many item ids there are."""
        return self.num(self.iid_field)

    @property
    def user_num(self) -> int:
        """How many user ids there are."""
        return self.num(self.uid_field)

    def find(self, tokens: Iterable[Any]) -> np.ndarray:
        """Ids of item tokens, int64 ``[n]``: 0 for those that the model does not know. Numbers stand for their decimal
        form.
        """
        words = pd.Index(tokens if isinstance(tokens, pd.Series | pd.Index | np.ndarray) else list(tokens)).astype(str)
        return (self._index.get_indexer(words) + 1).astype(np.int64)

    def ids(self, tokens: Iterable[Any]) -> np.ndarray:
        """As :meth:`find`; a line of the log says what the model does not know."""
        tokens = tokens if isinstance(tokens, pd.Series | np.ndarray) else list(tokens)
        found = self.find(tokens)
        unknown = np.flatnonzero(found == 0)
        if len(unknown):
            first = tokens.iloc[unknown[0]] if isinstance(tokens, pd.Series) else tokens[unknown[0]]
            logging.getLogger().warning(
                f"{len(unknown)} of {len(found)} items are unknown to the model and left out, such as {str(first)!r}"
            )
        return found

    def id(self, token: Any) -> int:
        """The id of an item.

        Raises:
            UserError: where the model does not know it.
        """
        found = int(self._index.get_indexer([str(token)])[0]) + 1
        if not found:
            raise UserError(f"the model does not know the item {str(token)!r}.")
        return found
