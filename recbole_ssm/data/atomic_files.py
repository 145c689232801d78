"""Atomic files read by RecBole's datasets, with a plain sentence where one cannot be read."""

import os
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from recbole.data import dataset as recbole_datasets
from recbole.utils.enum_type import FeatureSource, FeatureType
from recbole.utils.url import decide_download, download_url, extract_zip, rename_atomic_files

from recbole_ssm.data.identity import digest_of, tokens_of
from recbole_ssm.errors import UserError

HEADER_EXAMPLE = "user_id:token<TAB>item_id:token<TAB>timestamp:float"


class AtomicFiles(recbole_datasets.Dataset):
    """What goes in front of any of RecBole's dataset classes: clear errors, safe downloads, pandas 3."""

    inter_feat: Any  # RecBole's: a DataFrame until the split, an Interaction from then on
    learned_from: dict[str, Any]  # number and digest of the interactions; see recbole_ssm.data.identity

    def _download(self):
        """As RecBole's, but a broken download leaves nothing behind, and a single process needs no process group."""
        if self.config["local_rank"] == 0:
            self._download_here()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()

    def _download_here(self):
        folder = Path(self.dataset_path)
        remedy = (
            f"Put {self.dataset_name}.inter into that folder, or point --data_path at the folder that holds "
            f"{self.dataset_name}/."
        )
        url = self._get_download_url("url", allow_none=True)
        if url is None:
            raise UserError(
                f"dataset {self.dataset_name} not found: there is no folder {folder}, and RecBole knows no download "
                f"of that name. {remedy}"
            )
        self.logger.info(f"Prepare to download dataset [{self.dataset_name}] from [{url}].")
        try:
            if not decide_download(url):
                raise UserError(f"dataset {self.dataset_name} was not downloaded. {remedy}")
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
                unpacked = Path(scratch) / self.dataset_name
                archive = download_url(url, str(unpacked))
                extract_zip(archive, str(unpacked))
                os.unlink(archive)
                rename_atomic_files(str(unpacked), Path(archive).stem, self.dataset_name)
                os.replace(unpacked, folder)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"dataset {self.dataset_name} not found: there is no folder {folder}, and the download from {url} "
                f"failed ({error}). {remedy}"
            ) from error

    def _load_inter_feat(self, token, dataset_path):
        names = [f"{token}.{part}.inter" for part in self.benchmark_filename_list or []] or [f"{token}.inter"]
        for name in names:
            if not Path(dataset_path, name).is_file():
                found = ", ".join(sorted(path.name for path in Path(dataset_path).iterdir())) or "nothing"
                raise UserError(f"{dataset_path} holds no {name} (it holds {found}): put the interactions there.")
        super()._load_inter_feat(token, dataset_path)

    def _load_feat(self, filepath, source):
        try:
            _check_header(Path(filepath), self.config["field_separator"], self.config["encoding"])
            feat = self._read(filepath, source)
        except UserError:
            raise
        except UnicodeDecodeError as error:
            raise UserError(f"{filepath} is not in UTF-8 ({error}): convert it, or set --encoding.") from error
        except ValueError as error:
            raise UserError(f"{filepath} cannot be read: {error}") from error
        except AttributeError as error:  # under pandas 3 RecBole fills a copy of the empty places
            raise UserError(f"{filepath} has an empty place in a column of lists: fill it in.") from error
        if source == FeatureSource.INTERACTION:
            self._check_interactions(Path(filepath), feat)
        return feat

    def _read(self, filepath, source):
        return super()._load_feat(filepath, source)

    def _check_interactions(self, path: Path, feat) -> None:
        if feat is None:
            raise UserError(f"load_col ({self.config['load_col']}) names no column of {path}.")
        needed = [self.uid_field, self.iid_field]
        sequential = isinstance(self, recbole_datasets.SequentialDataset)
        if sequential and self.config["benchmark_filename"] is None:
            needed.append(self.time_field)
        missing = [field for field in needed if field is not None and field not in feat]
        if missing:
            raise UserError(
                f"{path} has no column {' and '.join(missing)} (it has {', '.join(feat.columns)}): add it to the file, "
                "or name the right one by USER_ID_FIELD, ITEM_ID_FIELD or TIME_FIELD."
            )
        if self.time_field in needed and self.field2type[self.time_field] != FeatureType.FLOAT:
            raise UserError(f"{path} has {self.time_field}:{self.field2type[self.time_field].value}: make it float.")

    def _filter_nan_user_or_item(self):
        """As RecBole's, which mistakes row names for places once it has dropped a row."""
        fields = [field for field in (self.uid_field, self.iid_field) if field is not None]
        missing = self.inter_feat[fields].isna().any(axis=1)
        if missing.any():
            self.logger.warning(
                f"{missing.sum()} interactions of {self.dataset_name} have no {' or '.join(fields)} "
                f"(the first is line {missing.idxmax() + 2}); they are left out."
            )
            self.inter_feat = self.inter_feat[~missing].reset_index(drop=True)
        super()._filter_nan_user_or_item()

    def _reset_index(self):
        if self.inter_feat.empty:
            raise UserError(
                f"the filters leave no interaction of {self.dataset_name}: loosen user_inter_num_interval "
                f"({self.config['user_inter_num_interval']}), item_inter_num_interval "
                f"({self.config['item_inter_num_interval']}) or val_interval ({self.config['val_interval']})."
            )
        super()._reset_index()

    def _remap(self, remap_list):
        """As RecBole's, which counts on ``Series.agg`` to reach into lists; in pandas 3 it sees the column."""
        if not remap_list:
            return
        is_list = [ftype == FeatureType.TOKEN_SEQ for _, _, ftype in remap_list]
        if len(remap_list) == 1 and not is_list[0]:
            ((feat, field, _),) = remap_list
            flat = [feat[field]]
            ids, tokens = pd.factorize(feat[field])  # of categories without looking at their names again
        else:
            columns = [feat[field].to_numpy() for feat, field, _ in remap_list]
            flat = [np.concatenate(column) if lists else column for column, lists in zip(columns, is_list, strict=True)]
            ids, tokens = pd.factorize(np.concatenate(flat))
        ids, tokens = self._known_ids([field for _, field, _ in remap_list], ids, tokens)
        parts = np.split(ids + 1, np.cumsum([len(column) for column in flat])[:-1])
        tokens = np.array(["[PAD]", *tokens])
        token_ids = {token: i for i, token in enumerate(tokens)}
        for (feat, field, _), lists, part in zip(remap_list, is_list, parts, strict=True):
            if lists:
                rows = np.split(part, np.cumsum([len(row) for row in feat[field]])[:-1])
                feat[field] = pd.Series(rows, feat.index, dtype=object)
            else:
                feat[field] = part
            self.field2id_token.setdefault(field, tokens)
            self.field2token_id.setdefault(field, token_ids)

    def _known_ids(self, fields: list[str], ids: np.ndarray, tokens: Any) -> tuple[np.ndarray, Any]:
        """The ids that a checkpoint gave to these fields' tokens, with those of new tokens behind them.

        Args:
            fields: of one id space.
            ids: places in ``tokens``; -1 where there is none.
            tokens: in order of appearance.

        Returns:
            Ids, and tokens in their order.
        """
        if isinstance(self, recbole_datasets.KnowledgeBasedDataset):
            return ids, tokens  # numbers items and entities together, later
        kept = getattr(self.config, "identity", {})
        known = next((found for field in fields if (found := tokens_of(kept, field))), None)
        if known is None:
            return ids, tokens
        tokens = np.asarray(tokens, dtype=object)
        places = pd.Index(known, dtype=object).get_indexer(tokens)
        new = places < 0
        places[new] = len(known) + np.arange(new.sum())
        return np.where(ids < 0, -1, places[ids]), [*known, *tokens[new]]

    def _remap_ID_all(self):
        super()._remap_ID_all()
        feat = self.inter_feat
        columns = [
            feat[field].to_numpy() for field in (self.uid_field, self.iid_field, self.time_field) if field in feat
        ]
        if isinstance(self, recbole_datasets.SequentialDataset) and self.time_field in feat:
            order = np.lexsort((columns[2], columns[0]))  # that of the lines does not matter, but of ties
            columns = [column[order] for column in columns]
        self.learned_from = {"interactions": len(feat), "digest": digest_of(columns)}

    def _benchmark_presets(self):
        """As RecBole's, which counts on ``Series.agg`` as well."""
        suffix = self.config["LIST_SUFFIX"]
        for field in [field for field in self.inter_feat if field + suffix in self.inter_feat]:
            setattr(self, f"{field}_list_field", field + suffix)
        length = self.config["ITEM_LIST_LENGTH_FIELD"]
        self.set_field_property(length, FeatureType.TOKEN, FeatureSource.INTERACTION, 1)
        self.inter_feat[length] = self.inter_feat[self.iid_field + suffix].map(len)

    def _fill_nan(self):
        """As RecBole's, which fills a copy in pandas 3: ids by 0, numbers by their mean, lists by empty ones."""
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


def _check_header(path: Path, separator: str, encoding: str | None) -> None:
    with open(path, encoding=encoding) as file:
        header, first_row = file.readline().rstrip("\n"), file.readline()
    if not header:
        raise UserError(f"{path} is empty: its first line should read like {HEADER_EXAMPLE}.")
    types = [ftype.value for ftype in FeatureType]
    for column in header.split(separator):
        name, _, ftype = column.partition(":")
        if not name or ftype not in types:
            raise UserError(
                f"{path} has a bad header: column {column!r} should be name:type with a type of {', '.join(types)}, "
                f"separated by {separator!r}, such as {HEADER_EXAMPLE}."
            )
    if not first_row:
        raise UserError(f"{path} has a header but no rows.")


@lru_cache(maxsize=None)
def hardened(dataset_class: type) -> type:
    """``dataset_class`` of RecBole with :class:`AtomicFiles` in front."""
    if issubclass(dataset_class, AtomicFiles):
        return dataset_class
    name = dataset_class.__name__
    return type(name, (AtomicFiles, dataset_class), {"__module__": __name__, "__qualname__": name})


def __getattr__(name: str):
    """Lets pickle find a hardened class by its name, for RecBole's ``save_dataset``."""
    base = getattr(recbole_datasets, name, None)
    if isinstance(base, type):
        return hardened(base)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
