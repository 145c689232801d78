"""Interactions in three files that were split beforehand (``benchmark_filename``)."""

from pathlib import Path
from typing import Any

import pandas as pd
from recbole.data import dataset as recbole_datasets
from recbole.utils.enum_type import FeatureSource, FeatureType

from recbole_ssm.data.list_columns import LISTS
from recbole_ssm.errors import UserError

TOKENS = (FeatureType.TOKEN, FeatureType.TOKEN_SEQ)


class SplitFiles(recbole_datasets.Dataset):
    """Mixin for RecBole's dataset classes; of sequential ones each row is a history and the item after it."""

    inter_feat: Any  # RecBole's: a DataFrame until the split, an Interaction from then on

    def parts(self) -> list[str]:
        """What stands between the names of the set and of the kind in the three files' names; empty for one file."""
        parts = self.config["benchmark_filename"]
        if parts is None:
            return []
        names = isinstance(parts, list | tuple) and all(
            isinstance(part, str) and Path(part).name == part for part in parts
        )
        if not names or len(parts) != 3:
            raise UserError(
                f"benchmark_filename is {parts!r}: name the parts for training, validation and test, such as "
                "['train', 'valid', 'test']."
            )
        return list(parts)

    @property
    def history_field(self) -> str | None:
        """The column of histories in files that were split beforehand, of sequential datasets."""
        if self.config["benchmark_filename"] is None or not isinstance(self, recbole_datasets.SequentialDataset):
            return None
        return self.iid_field + self.config["LIST_SUFFIX"]

    def _load_inter_feat(self, token, dataset_path):
        names = [f"{token}.{part}.inter" for part in self.parts()] or [f"{token}.inter"]
        for name in names:
            if not Path(dataset_path, name).is_file():
                found = ", ".join(sorted(path.name for path in Path(dataset_path).iterdir())) or "nothing"
                raise UserError(
                    f"{dataset_path} holds no {name} (it holds {found}): put the interactions there, or "
                    "change benchmark_filename."
                )
        if len(names) == 1:
            return super()._load_inter_feat(token, dataset_path)
        feats: list[pd.DataFrame] = []
        columns: dict[str, FeatureType] = {}
        widths: dict[str, int] = {}
        self.field2seqlen: dict[str, int]
        for name in names:
            path = Path(dataset_path, name)
            feat = self._load_feat(path, FeatureSource.INTERACTION)
            own = {field: self.field2type[field] for field in feat}
            if columns and own != columns:
                differing = sorted({field for field, _ in own.items() ^ columns.items()})
                raise UserError(f"{path} and {names[0]} differ in {', '.join(differing)}: give them the same columns.")
            columns = own
            if self.history_field is not None:
                self._keep_latest(path, feat)
            widths = {field: max(widths.get(field, 0), self.field2seqlen[field]) for field in feat}
            feats.append(feat)
        self.inter_feat, self.file_size_list = pd.concat(feats, ignore_index=True), [len(feat) for feat in feats]
        self.field2seqlen = widths

    def _keep_latest(self, path: Path, feat: pd.DataFrame) -> None:
        """Cut histories to their last ``MAX_ITEM_LIST_LENGTH`` items; an empty one is refused."""
        most, suffix = self.config["MAX_ITEM_LIST_LENGTH"], self.config["LIST_SUFFIX"]
        lengths = feat[self.history_field].map(len)
        if not lengths.all():
            raise UserError(
                f"{(lengths == 0).sum()} rows of {path} have an empty {self.history_field}, from which nothing can be "
                "predicted: take these rows out."
            )
        if (lengths > most).any():
            self.logger.info(
                f"{(lengths > most).sum()} rows of {path} are longer than MAX_ITEM_LIST_LENGTH ({most}); "
                "their last items are read."
            )
        lists = [field for field, ftype in self.field2type.items() if field in feat and ftype in LISTS]
        for field in [field for field in lists if field.endswith(suffix)]:
            feat[field] = feat[field].map(lambda row: row[-most:])
            self.field2seqlen[field] = min(most, self.field2seqlen[field])

    def _set_alias(self, alias_name, default_value):
        """As RecBole's; the items of histories are items without being told."""
        given = self.config[f"alias_of_{alias_name}"] or []
        # Of all files: RecBole's token_like_fields leaves those of additional_feat_suffix out.
        tokens = [name for name, ftype in self.field2type.items() if ftype in TOKENS]
        if isinstance(given, str) or not set(given) <= set(tokens):
            raise UserError(
                f"alias_of_{alias_name} is {given!r}: make it a list of loaded columns of tokens (there are: "
                f"{', '.join(tokens)})."
            )
        if alias_name == "item_id" and self.history_field is not None:
            default_value = [*default_value, self.history_field]
        super()._set_alias(alias_name, default_value)

    def _benchmark_presets(self):
        """As RecBole's, which counts on ``Series.agg`` as well."""
        suffix = self.config["LIST_SUFFIX"]
        for field in [field for field in self.inter_feat if field + suffix in self.inter_feat]:
            setattr(self, f"{field}_list_field", field + suffix)
        length = self.config["ITEM_LIST_LENGTH_FIELD"]
        self.set_field_property(length, FeatureType.TOKEN, FeatureSource.INTERACTION, 1)
        self.inter_feat[length] = self.inter_feat[self.history_field].map(len)
