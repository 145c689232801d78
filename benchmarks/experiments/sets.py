"""Sets that experiments make of others: ``python -m benchmarks.experiments.sets FOLDER [NAME ...]``.

``FOLDER`` holds the sets that they are made of, and gets those made: all that can be made of what it holds, where none
is named.
"""

import argparse
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

SHARE = 0.05


def new_items(table: pd.DataFrame, generator: np.random.Generator) -> pd.DataFrame:
    """5% of the items, drawn at random, lose all interactions but those that are a user's last, which are tested."""
    user, item, time = _columns(table)
    items = np.sort(table[item].unique())
    new = generator.choice(items, int(len(items) * SHARE), replace=False)
    order = table[time].astype(float).argsort(kind="stable")
    last = ~table.iloc[order].duplicated(user, keep="last").sort_index()
    return table[~table[item].isin(new) | last]


def known_seconds(table: pd.DataFrame, _: np.random.Generator) -> pd.DataFrame:
    """Users 1 to 2,999, all of whose seconds were read; others' are estimates in part."""
    return table[table[_columns(table)[0]].astype(int) < 3000]


def shuffled(table: pd.DataFrame, generator: np.random.Generator) -> pd.DataFrame:
    """The rows of the same users in random order, so that nothing orders ties."""
    known = known_seconds(table, generator)
    return known.iloc[generator.permutation(len(known))]


def _columns(table: pd.DataFrame) -> tuple[str, ...]:
    fields = ("user_id", "item_id", "timestamp")
    return tuple(next(name for name in map(str, table) if name.startswith(field)) for field in fields)


@dataclass(frozen=True)
class Derived:
    """A set and what it is made of.

    Attributes:
        source: the name of the other.
        make: its interactions of the other's; may draw.
    """

    source: str
    make: Callable[[pd.DataFrame, np.random.Generator], pd.DataFrame]


SETS = {
    "ml-1m-new-items": Derived("ml-1m", new_items),
    "ml-1m-clock-known": Derived("ml-1m-clock", known_seconds),
    "ml-1m-clock-shuffled": Derived("ml-1m-clock", shuffled),
}


def write(folder: Path, name: str, seed: int = 0) -> None:
    """Make a set beside the one it is made of.

    Raises:
        FileNotFoundError: where that one is missing.
    """
    derived = SETS[name]
    source, place = folder / derived.source / derived.source, folder / name
    table = pd.read_csv(f"{source}.inter", sep="\t", dtype=str)
    kept = derived.make(table, np.random.default_rng(seed))
    place.mkdir(exist_ok=True)
    kept.to_csv(place / f"{name}.inter", sep="\t", index=False)
    if (items := Path(f"{source}.item")).exists():
        shutil.copyfile(items, place / f"{name}.item")
    print(f"{place}: {len(kept)} of {len(table)} interactions")


def main() -> None:
    """Make those that were named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of the sets")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SETS)}")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.names if name not in SETS]:
        parser.error(f"no set {', '.join(unknown)}: choose of {', '.join(SETS)}")
    possible = [name for name, derived in SETS.items() if (arguments.folder / derived.source).is_dir()]
    for name in arguments.names or possible:
        write(arguments.folder, name)


if __name__ == "__main__":
    main()
