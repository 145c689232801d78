"""RecBole's filters of interactions: none leaves a row out without saying so, or guesses at what is asked for."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from recbole.data import dataset as recbole_datasets
from recbole.utils.enum_type import FeatureType

from recbole_ssm.errors import UserError
from recbole_ssm.settings.parts import intervals_of

NUMBER_INTERVALS = (
    "user_inter_num_interval", "item_inter_num_interval", "entity_kg_num_interval", "relation_kg_num_interval",
)  # fmt: skip


class Filters(recbole_datasets.Dataset):
    """Mixin for RecBole's dataset classes: what a filter leaves out is told."""

    inter_feat: Any  # RecBole's: a DataFrame until the split, an Interaction from then on

    @contextmanager
    def telling(self, *settings: str) -> Iterator[None]:
        """Log how many interactions are left out by a filter with these settings."""
        before = len(self.inter_feat)
        yield
        if left_out := before - len(self.inter_feat):
            by = " and ".join(f"{setting} ({self.config[setting]})" for setting in settings)
            self.logger.info(f"{left_out} of {before} interactions of {self.dataset_name} are left out by {by}.")

    def _remove_duplication(self):
        with self.telling("rm_dup_inter"):
            super()._remove_duplication()

    def _filter_inter_by_user_or_item(self):
        with self.telling("filter_inter_by_user_or_item"):
            super()._filter_inter_by_user_or_item()

    def _filter_by_inter_num(self):
        with self.telling("user_inter_num_interval", "item_inter_num_interval"):
            super()._filter_by_inter_num()

    def _filter_link(self):
        before = len(self.inter_feat)
        super()._filter_link()  # of datasets with a knowledge graph
        if left_out := before - len(self.inter_feat):
            self.logger.info(
                f"{left_out} of {before} interactions of {self.dataset_name} are left out: "
                "no entity is linked to their item."
            )

    def _filter_by_field_value(self):
        """As RecBole's; a row whose number is missing is left out.

        Raises:
            UserError: for a ``val_interval`` that is not an interval for numbers and a list for tokens.
        """
        wanted = self.config["val_interval"] or {}
        if not isinstance(wanted, dict):
            raise UserError(f"val_interval is {wanted!r}: make it {{'a column': 'an interval, or a list of tokens'}}.")
        with self.telling("val_interval"):
            for field, values in wanted.items():
                ftype = self.field2type.get(field)
                if ftype not in (FeatureType.TOKEN, FeatureType.FLOAT):
                    raise UserError(f"val_interval names {field}, which is no loaded column of tokens or numbers.")
                if ftype == FeatureType.TOKEN and (
                    not isinstance(values, Collection) or isinstance(values, str | dict)
                ):
                    raise UserError(f"val_interval of {field} is {values!r}: make it a list of tokens.")
                for name in self.feat_name_list:
                    feat = getattr(self, name)
                    if not any(feat is other for other in self.field2feats(field)):
                        continue
                    if ftype == FeatureType.TOKEN:
                        kept = feat[field].isin([str(value) for value in values])  # of which YAML makes numbers
                    else:
                        kept = self._within_intervals(feat[field], self._parse_intervals_str(values))
                    setattr(self, name, feat[kept])

    def _parse_intervals_str(self, intervals_str):
        """As RecBole's: intervals such as ``[5,inf)``, by ``;``.

        Raises:
            UserError: for anything else.
        """
        if intervals_str is None:
            return None
        names = [name for name in NUMBER_INTERVALS if self.config[name] == intervals_str] or ["val_interval"]
        try:
            return intervals_of(intervals_str, " and ".join(names))
        except ValueError as error:
            raise UserError(str(error)) from error

    def _reset_index(self):
        if self.inter_feat.empty:
            raise UserError(
                f"the filters leave no interaction of {self.dataset_name}: loosen user_inter_num_interval "
                f"({self.config['user_inter_num_interval']}), item_inter_num_interval "
                f"({self.config['item_inter_num_interval']}) or val_interval ({self.config['val_interval']})."
            )
        if isinstance(self, recbole_datasets.SequentialDataset):
            missing = int(self.inter_feat[self.time_field].isna().sum())
            if missing:
                raise UserError(
                    f"{missing} of {len(self.inter_feat)} interactions of {self.dataset_name} have no "
                    f"{self.time_field}: fill it in or remove these rows, for a sequence needs an order."
                )
        super()._reset_index()
