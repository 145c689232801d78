"""What RecBole's datasets do to columns of lists by ``Series.agg`` and by filling in place, which pandas 3 changed."""

from typing import Any

import numpy as np
import pandas as pd
from recbole.data.dataset import Dataset
from recbole.utils.enum_type import FeatureType

from recbole_ssm.errors import UserError

LISTS = (FeatureType.TOKEN_SEQ, FeatureType.FLOAT_SEQ)


def in_one(lists: pd.Series) -> np.ndarray:
    """All lists of a column end to end."""
    return np.concatenate(lists.to_list())


def as_before(values: np.ndarray, lists: pd.Series) -> pd.Series:
    """What :func:`in_one` made of a column, cut into lists of the same lengths."""
    rows = np.split(values, np.cumsum(lists.map(len))[:-1])
    return pd.Series(rows, lists.index, dtype=object)


class ListColumns(Dataset):
    """Mixin for RecBole's dataset classes; each method does what the one of its name does under pandas 2."""

    inter_feat: Any  # RecBole's: a DataFrame until the split, an Interaction from then on

    def _fill_nan(self):
        """As RecBole's: ids are filled by 0, numbers by their mean, lists by empty ones."""
        for feat_name in self.feat_name_list:
            feat = getattr(self, feat_name)
            for field in feat:
                ftype = self.field2type[field]
                if ftype == FeatureType.TOKEN:
                    feat[field] = feat[field].fillna(0)
                elif ftype == FeatureType.FLOAT:
                    feat[field] = feat[field].fillna(feat[field].mean())
                else:
                    empty = np.array([], dtype=np.int64 if ftype == FeatureType.TOKEN_SEQ else np.float64)
                    feat[field] = feat[field].apply(lambda x, empty=empty: empty if isinstance(x, float) else x)

    def _normalize(self):
        """As RecBole's: numbers, those of all lists of a column together, are brought between 0 and 1."""
        named, everything = self.config["normalize_field"], self.config["normalize_all"]
        if named and everything:
            raise UserError("normalize_field and normalize_all are both set: leave one out.")
        fields = self._numeric(named, "normalize_field") if named else self.float_like_fields if everything else []
        for field in fields:
            for feat in self.field2feats(field):
                if self.field2type[field] == FeatureType.FLOAT_SEQ:
                    feat[field] = as_before(self._between_0_and_1(field, in_one(feat[field])), feat[field])
                else:
                    feat[field] = self._between_0_and_1(field, feat[field].to_numpy())

    def _between_0_and_1(self, field: str, values: np.ndarray) -> np.ndarray:
        low, high = (values.min(), values.max()) if len(values) else (0, 0)
        if low < high:
            return (values - low) / (high - low)
        self.logger.warning(f"All values of {field} are the same; normalized, they are 1.")
        return np.ones_like(values, dtype=np.float64)

    def _numeric(self, fields: Any, setting: str) -> list[str]:
        """The names that a setting gives to columns of numbers."""
        if isinstance(fields, str) or not all(field in self.float_like_fields for field in fields):
            raise UserError(
                f"{setting} is {fields!r}: make it a list of columns of numbers (there are: "
                f"{', '.join(self.float_like_fields) or 'none'})."
            )
        return list(fields)

    def _discretization(self):
        """As RecBole's: of ``numerical_features`` numbers become pairs, ``(1, bucket)`` or ``(number, 1)``."""
        methods = self.config["discretization"] or {}
        for field in self._numeric(methods, "discretization"):
            if field not in self.config["numerical_features"]:
                raise UserError(f"discretization names {field}: name it in numerical_features as well.")
        for field in self._numeric(self.config["numerical_features"], "numerical_features"):
            for feat in self.field2feats(field):
                lists = self.field2type[field] == FeatureType.FLOAT_SEQ
                values = in_one(feat[field]) if lists else feat[field].to_numpy()
                pair = values, np.ones_like(values)
                if field in methods:
                    buckets = self._buckets(values, field, **methods[field])
                    self.field2bucketnum[field] = int(buckets.max() + 1)
                    pair = np.ones_like(buckets), buckets
                if lists:
                    first, second = (as_before(half, feat[field]) for half in pair)
                    feat[field] = pd.Series(list(zip(first, second, strict=True)), feat.index, dtype=object)
                else:
                    feat[field] = np.stack(pair, axis=-1).tolist()

    def _buckets(self, values: np.ndarray, field: str, method: str = "", bucket: int | None = None) -> np.ndarray:
        if method == "ED" and bucket is not None:
            low, high = values.min(), values.max() + 1e-9
            if low != high:
                return np.floor((values - low) * bucket / (high - low) + 1)
            self.logger.warning(f"All values of {field} are the same; they are in one bucket.")
            return np.ones_like(values) * bucket
        if method == "LD":
            large = values > 2
            logarithms = np.floor(np.log(values * large + 1e-9) ** 2 + 1)
            return np.unique(np.where(large, logarithms, values), return_inverse=True)[1]
        raise UserError(
            f"discretization of {field} is {self.config['discretization'][field]}: "
            "make it {'method': 'ED', 'bucket': 10} or {'method': 'LD'}."
        )

    def _concat_remaped_tokens(self, remap_list):
        """As RecBole's, which its datasets with a knowledge graph ask for names of items and entities."""
        tokens = [
            in_one(feat[field]) if ftype in LISTS else feat[field].to_numpy() for feat, field, ftype in remap_list
        ]
        return np.concatenate(tokens), np.cumsum([len(part) for part in tokens])[:-1]

    def _reset_ent_remapID(self, field, idmap, id2token, token2id):
        """As RecBole's, of its datasets with a knowledge graph: other ids for the same tokens."""
        self.field2id_token[field], self.field2token_id[field] = id2token, token2id
        for feat in self.field2feats(field):
            if self.field2type[field] in LISTS:
                feat[field] = as_before(idmap[in_one(feat[field])], feat[field])
            else:
                feat[field] = idmap[feat[field].to_numpy()]
