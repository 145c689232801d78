"""What items are called, from RecBole's ``.item`` file."""

import logging
from pathlib import Path

from recbole_ssm.config import Config
from recbole_ssm.data.reading import NAMES, AtomicFile, file_format
from recbole_ssm.errors import UserError
from recbole_ssm.serving.vocabulary import Vocabulary


class Titles:
    """Titles of the items that a model knows.

    Args:
        vocabulary: of the model.
        by_token: titles; an item without one is called by its token.
    """

    def __init__(self, vocabulary: Vocabulary, by_token: dict[str, str] | None = None):
        self._by_token = by_token or {}
        self._tokens: list[str] = vocabulary.items[1:].tolist()
        self._searched = [self._by_token.get(token, token).casefold() for token in self._tokens]

    def of(self, token: str) -> str | None:
        """The title of an item, if it has one."""
        return self._by_token.get(token)

    def search(self, words: str, limit: int) -> list[str]:
        """Tokens of items whose titles hold all of these words, in any order and case; those that begin so first."""
        parts = words.casefold().split()
        found = [i for i, title in enumerate(self._searched) if all(part in title for part in parts)]
        if parts:
            found.sort(key=lambda i: not self._searched[i].startswith(parts[0]))
        return [self._tokens[i] for i in found[:limit]]


def titles_beside(config: Config, vocabulary: Vocabulary) -> Titles:
    """Titles from the ``.item`` file of the dataset that a model was trained on.

    None where there is no such file, nor, with a line of the log, where it cannot be read or has no titles.
    """
    file = Path(config["data_path"], f"{config['dataset']}.item")
    try:
        return read_titles(file, config, vocabulary) if file.is_file() else Titles(vocabulary)
    except UserError as error:
        logging.getLogger().warning(f"items are called by their ids: {error}")
        return Titles(vocabulary)


def read_titles(file: str | Path, config: Config, vocabulary: Vocabulary, column: str | None = None) -> Titles:
    """Titles from a file in RecBole's atomic format.

    Args:
        file: with a column of items, named as in the data that the model was trained on, and written as these.
        config: of the model.
        vocabulary: of the model.
        column: with the titles; the first whose name holds ``title`` or ``name`` where absent.

    Raises:
        UserError: for a file that cannot be read, or has no such columns.
    """
    try:
        items = AtomicFile(Path(file), *file_format(config))
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): name RecBole's .item file.") from error
    names = list(items.columns)
    if column is None:
        column = next((name for name in names if "title" in name.lower() or "name" in name.lower()), None)
    missing = [name for name in (vocabulary.iid_field, column) if name not in names]
    if missing:
        what = f"no column {missing[0]!r}" if missing[0] else "no column whose name holds 'title' or 'name'"
        raise UserError(f"{file} has {what}: it has {', '.join(names)}; name the titles' column with --title.")
    table = items.read({name: NAMES for name in (vocabulary.iid_field, column) if name})
    table = table[table[column].notna() & (table[column] != "")]
    return Titles(vocabulary, dict(zip(table[vocabulary.iid_field].astype(str), table[column], strict=True)))
