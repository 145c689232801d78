"""Atomic files in RecBole's datasets, with a plain sentence where one cannot be read or rows are left out."""

import os
import tempfile
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from recbole.data import dataset as recbole_datasets
from recbole.utils.enum_type import FeatureSource, FeatureType
from recbole.utils.url import decide_download, download_url, extract_zip, rename_atomic_files

from recbole_ssm.data.filters import Filters
from recbole_ssm.data.identity import digest_of, tokens_of
from recbole_ssm.data.list_columns import LISTS, ListColumns, as_before
from recbole_ssm.data.negatives import check_shares
from recbole_ssm.data.reading import NAMES, NUMBERS, AtomicFile, file_format, first_line, separator
from recbole_ssm.data.split_files import SplitFiles
from recbole_ssm.errors import UserError
from recbole_ssm.settings import Common

# Attributes that name the columns in which a row must not be empty, by what the file is of.
NAMED = {
    FeatureSource.INTERACTION: ("uid_field", "iid_field"),
    FeatureSource.USER: ("uid_field",),
    FeatureSource.ITEM: ("iid_field",),
    FeatureSource.KG: ("head_entity_field", "relation_field", "tail_entity_field"),
    "link": ("iid_field", "entity_field"),
}


class AtomicFiles(SplitFiles, Filters, ListColumns):
    """Mixin for any of RecBole's dataset classes: every row read or told of, safe downloads, pandas 3.

    Attributes:
        own_columns: names that the dataset gives to columns itself.
        learned_from: number and digest of the interactions; see :mod:`recbole_ssm.data.identity`.
    """

    own_columns: tuple[str, ...] = ()
    learned_from: dict[str, Any]

    def _dataframe_to_interaction(self, data):
        with warnings.catch_warnings():
            # Of a frame's columns, which nobody writes to afterwards.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return super()._dataframe_to_interaction(data)

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

    def _data_processing(self):
        super()._data_processing()
        if isinstance(self, recbole_datasets.DIENDataset):  # draws negatives as soon as it is made
            check_shares(np.ones(self.item_num - 1), self.dataset_name)

    def _from_scratch(self):
        self.read_columns: dict[str, list[str]] = {}  # of each file, by its suffix
        try:
            super()._from_scratch()
        except UserError:
            raise
        except (ValueError, AssertionError) as error:  # RecBole's own sentences
            set_so = settings_of(self.config)
            raise UserError(
                f"dataset {self.dataset_name} cannot be read as it is set{set_so}: {one_line(error)}."
            ) from error
        self._check_columns()

    def _check_columns(self) -> None:
        """Refuse settings that name tables which are not read, and tell of those that name such columns."""
        for setting in ("load_col", "unload_col", "unused_col"):
            for suffix in self.config[setting] or {}:
                if suffix not in self.read_columns:
                    message = f"{setting} names the suffix {suffix!r}, of which no file is read"
                    if setting == "unused_col":
                        raise UserError(f"{message}: leave it out.")
                    self.logger.warning(message)
        for suffix, columns in self.read_columns.items():
            for setting in ("load_col", "unload_col"):
                named = (self.config[setting] or {}).get(suffix) or ()
                if unknown := [name for name in named if name not in columns and named != "*"]:
                    self.logger.warning(f"{setting} names {', '.join(unknown)}, which the .{suffix} file has not")
        lists = {name for name, ftype in self.field2type.items() if ftype in LISTS}
        if unknown := [name for name in self.config["seq_len"] or {} if name not in lists]:
            self.logger.warning(f"seq_len names {', '.join(unknown)}, which is no loaded column of lists")

    def _load_feat(self, filepath, source):
        """As RecBole's, by :class:`~recbole_ssm.data.reading.AtomicFile`."""
        load, unload = self._get_load_and_unload_col(source)
        if load == set() and source != FeatureSource.INTERACTION:
            return None
        path = Path(filepath)
        try:
            file = AtomicFile(path, *file_format(self.config))
            self.read_columns[getattr(source, "value", source)] = list(file.columns)
            columns = {
                name: ftype
                for name, ftype in file.columns.items()
                if (load is None or name in load) and name not in (unload or ())
            }
            if source == FeatureSource.INTERACTION:
                self._check_interactions(file, columns)
            if not columns:
                self.logger.warning(f"No columns has been loaded from [{source}]")
                return None
            feat = file.read({name: self._kind(name, ftype, source) for name, ftype in columns.items()})
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error}.") from error
        for name, ftype in columns.items():
            if source != "link":
                self.field2source[name], self.field2type[name] = source, ftype
                if ftype in (FeatureType.FLOAT, FeatureType.FLOAT_SEQ):
                    self.field2bucketnum[name] = 2
            if ftype not in LISTS:
                if source != "link":
                    self.field2seqlen[name] = 1
                continue
            lists = file.lists(name, feat[name], self.separator("seq_separator"))
            most = (self.config["seq_len"] or {}).get(name)
            feat[name] = lists if most is None else lists.map(lambda row, most=most: row[:most])
            self.field2seqlen[name] = int(feat[name].map(len).max())
        return self._named(path, source, feat)

    def separator(self, setting: str) -> str:
        """See :func:`~recbole_ssm.data.reading.separator`."""
        return separator(self.config, setting)

    def _kind(self, name: str, ftype: FeatureType, source: FeatureSource | str) -> str:
        """What :meth:`~recbole_ssm.data.reading.AtomicFile.read` shall make of a column."""
        return NUMBERS if ftype == FeatureType.FLOAT else NAMES

    def _named(self, path: Path, source: FeatureSource | str, feat: pd.DataFrame) -> pd.DataFrame:
        """The rows that have their names, and of users and items the first of each name."""
        fields: list[str] = [getattr(self, name) for name in NAMED.get(source, ()) if getattr(self, name, None) in feat]
        if not fields:
            return feat.reset_index(drop=True)
        unnamed = feat[fields].isna().any(axis=1)
        wrong = {f"have no {' or '.join(fields)}": unnamed}
        if source in (FeatureSource.USER, FeatureSource.ITEM):
            wrong[f"have the {fields[0]} of a row above"] = feat.duplicated(fields) & ~unnamed
        kept = ~unnamed
        for what, rows in wrong.items():
            if rows.any():
                self.logger.warning(
                    f"{rows.sum()} rows of {path} {what} (the first is line {first_line(rows)}); they are left out."
                )
                kept &= ~rows
        if not kept.any():
            raise UserError(f"no row of {path} has a {' and a '.join(fields)}: fill them in.")
        return (feat if kept.all() else feat[kept]).reset_index(drop=True)

    def _check_interactions(self, file: AtomicFile, columns: dict[str, FeatureType]) -> None:
        """Refuse a file, or a choice of its columns, in which one is missing, of another type or has a taken name."""
        path, chosen = file.path, f"load_col ({self.config['load_col']}) or unload_col ({self.config['unload_col']})"
        if not columns:
            raise UserError(f"load_col ({self.config['load_col']}) names no column of {path}.")
        types = dict.fromkeys([self.uid_field, self.iid_field], FeatureType.TOKEN)
        if self.history_field is not None:
            types[self.history_field] = FeatureType.TOKEN_SEQ
        elif isinstance(self, recbole_datasets.SequentialDataset):
            types[self.time_field] = FeatureType.FLOAT
        types.pop(None, None)
        if missing := [field for field in types if field not in file.columns]:
            raise UserError(
                f"{path} has no column {' and '.join(missing)} (it has {', '.join(file.columns)}): add it to the file, "
                "or name the right one by USER_ID_FIELD, ITEM_ID_FIELD or TIME_FIELD."
            )
        if missing := [field for field in types if field not in columns]:
            raise UserError(f"{' and '.join(missing)} of {path} is left out by {chosen}: it must be loaded.")
        for field, ftype in types.items():
            if columns[field] != ftype:
                raise UserError(f"{path} has {field}:{columns[field].value}: make it {ftype.value}.")
        made = set()
        if isinstance(self, recbole_datasets.SequentialDataset):
            made = {self.config["NEG_PREFIX"] + self.iid_field, *self.own_columns}
            if self.history_field is None:
                made |= {field + self.config["LIST_SUFFIX"] for field in columns}
                made.add(self.config["ITEM_LIST_LENGTH_FIELD"])
        if taken := [field for field in columns if field in made]:
            raise UserError(
                f"{path} has a column {' and '.join(taken)}, as rows made of it have one: name it otherwise in the "
                "file, leave it out by load_col, or change LIST_SUFFIX, NEG_PREFIX or ITEM_LIST_LENGTH_FIELD."
            )

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
            feat[field] = as_before(part, feat[field]) if lists else part
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


def one_line(error: Exception) -> str:
    """What an exception of RecBole's says, in one line."""
    return " ".join(str(error).split()).rstrip(".")


def settings_of(config: Any) -> str:
    """In brackets, the settings of the data that are not RecBole's defaults; nothing where there are none."""
    fields = Common.model_fields
    found = [
        f"{key}: {config[key]!r}"
        for key in config.parameters["Dataset"]
        if key in fields and config[key] != fields[key].default
    ]
    return f" ({', '.join(found)})" if found else ""


@lru_cache(maxsize=None)
def hardened(dataset_class: type) -> type:
    """``dataset_class`` of RecBole with the mixin :class:`AtomicFiles`."""
    if issubclass(dataset_class, AtomicFiles):
        return dataset_class
    name = dataset_class.__name__
    return type(name, (AtomicFiles, dataset_class), {"__module__": __name__, "__qualname__": name})


def __getattr__(name: str):
    """Lets pickle find a hardened class by its name, for Ray's object store."""
    base = getattr(recbole_datasets, name, None)
    if isinstance(base, type):
        return hardened(base)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
