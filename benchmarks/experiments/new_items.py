"""A set with items that training never has: ``python -m benchmarks.experiments.new_items FOLDER``.

Of ``FOLDER/ml-1m`` it makes ``FOLDER/ml-1m-new-items``: 5% of the items, drawn at random, lose all interactions but
those that are a user's last, which the test set ranks.
"""

import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd

SOURCE, NAME = "ml-1m", "ml-1m-new-items"
SHARE = 0.05


def write(folder: Path, seed: int = 0) -> None:
    """Write the set beside the one it is made of."""
    table = pd.read_csv(folder / SOURCE / f"{SOURCE}.inter", sep="\t", dtype=str)
    names = list(map(str, table))
    user, item, time = (next(n for n in names if n.startswith(field)) for field in ("user_id", "item_id", "timestamp"))
    items = np.sort(table[item].unique())
    new = np.random.default_rng(seed).choice(items, int(len(items) * SHARE), replace=False)
    order = table[time].astype(float).argsort(kind="stable")
    last = ~table.iloc[order].duplicated(user, keep="last").sort_index()
    kept = table[~table[item].isin(new) | last]
    place = folder / NAME
    place.mkdir(exist_ok=True)
    kept.to_csv(place / f"{NAME}.inter", sep="\t", index=False)
    shutil.copyfile(folder / SOURCE / f"{SOURCE}.item", place / f"{NAME}.item")
    tested = (last & table[item].isin(new)).sum()
    print(f"{place}: {len(kept)} interactions, {len(new)} items without any in training, of {tested} test users")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
