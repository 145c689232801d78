"""The model card of an export: what it is, what it was measured on, and how to run it without this package."""

import json
import platform
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from recbole_ssm.data.context import NEXT, column, reads_request
from recbole_ssm.results import protocol

if TYPE_CHECKING:
    from recbole_ssm.serving.recommender import Recommender

VERSIONS = ("recbole-ssm", "recbole", "torch", "onnx", "onnxscript", "onnxruntime", "numpy")

SCORING = """\
import json
import numpy as np
import onnxruntime

items = json.load(open("vocabulary.json", encoding="utf-8"))
scoring = onnxruntime.InferenceSession("scoring.onnx")

example = dict(np.load("example.npz"))  # is all as it should be on this machine?
expected = example.pop("scores")
found = scoring.run(["scores"], example)[0]
np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3 * np.abs(expected[:, 1:]).max())

history = [items.index(item) for item in {history}]  # oldest first
scores = scoring.run(["scores"], {inputs})[0][0]
scores[history] = -np.inf  # what was there already is not recommended
print([items[i] for i in np.argsort(-scores)[:10]])"""

STEP = """\
about = json.load(open("config.json", encoding="utf-8"))
step = onnxruntime.InferenceSession("step.onnx")
state = {name: np.zeros((1, *of["shape"]), of["dtype"]) for name, of in about["state"].items()}
for place, item in enumerate(history):
    scores, *after = step.run(None, {**state, {inputs}})
    state = dict(zip(state, after))
scores[0, history] = -np.inf
print([items[i] for i in np.argsort(-scores[0])[:10]])"""


def model_card(recommender: "Recommender", about: dict[str, Any]) -> str:
    """The card of a recommender.

    Args:
        recommender: what is exported.
        about: the content of its ``config.json``.

    Returns:
        Markdown, whose Python code runs as it is where the exported files are.
    """
    config, vocabulary, results = recommender.config, recommender.vocabulary, recommender.results
    data = config.identity.get("data", {})
    facts = {
        "dataset": config["dataset"],
        "users": vocabulary.user_num - 1,
        "items": vocabulary.item_num - 1,
        "interactions": data.get("interactions", "unknown"),
        "digest of the interactions": data.get("digest", "unknown"),
    }
    measured_by = {**protocol(config), "longest history that is read": about["max_item_list_length"]}
    metrics = results.get("best_valid_result") or {}
    measured = _table("metric", metrics) if metrics else "The checkpoint holds none."
    if metrics and "epoch" in results:
        measured = f"Of epoch {results['epoch'] + 1}, the best, on the validation set.\n\n{measured}"
    return f"""\
# {about["model"]} on {about["dataset"]}

A sequential recommender: of the items of a history, oldest first, it gives each item of its catalogue a score for
coming next. Written by recbole-ssm on {date.today().isoformat()}; digest of the model: `{about["digest"]}`.

## Data

{_table("what", facts)}

## Metrics

{measured}

## Protocol

{_table("setting", measured_by)}

By the mode `full` all items are ranked, by others samples of them. All settings are in `config.json`.

## How to run it

It needs `pip install onnxruntime numpy`; in this folder:

```python
{_scoring(recommender, about)}
```

`scoring.onnx` takes any number of histories of any length from 1 to {about["max_item_list_length"]}, all int64: `items`
`[B, L]`, each history in the first `lengths` `[B]` places of its row{_columns(about, "[B, L, ")}.
It gives `scores` `[B, {len(vocabulary.items)}]`, a column an item of `vocabulary.json`; that of the first, the padding,
is -inf.{_untrained(recommender)}
{_step(about)}
## Versions

{_table("package", {name: _version(name) for name in VERSIONS} | {"Python": platform.python_version()})}
"""


def _scoring(recommender: "Recommender", about: dict[str, Any]) -> str:
    count = min(3, about["max_item_list_length"])
    some = json.dumps(recommender.vocabulary.items[1 : 1 + count].tolist(), ensure_ascii=False)
    inputs = '{"items": np.array([history]), "lengths": np.array([len(history)])}'
    if about["columns"]:
        inputs = inputs[:-1] + f', "columns": np.array([{_example(about)}[: len(history)]])}}'
    return SCORING.replace("{history}", some).replace("{inputs}", inputs)


def _untrained(recommender: "Recommender") -> str:
    if recommender.allow_repeats:
        return ""
    return """ Leave out what a history holds, as above, for whatever you use the scores: those of its own items were
never trained (`allow_repeats: False`)."""


def _step(about: dict[str, Any]) -> str:
    if not about["state"]:
        return "\nThe model carries no state from item to item: a longer history is read anew.\n"
    inputs = '"items": np.array([item])' + (
        f', "columns": np.array([{_example(about)}[place]])' if about["columns"] else ""
    )
    waits = ""
    if reads_request(tuple(about["columns"])):
        waits = """ To ask what comes next, give the last item with the time of the
request, and forget the states that come of it; give it again once the time of the next item is known."""
    return f"""
`step.onnx` reads one more item of each history, at a cost that does not grow: `items` `[B]`{_columns(about, "[B, ")}
and the states of `config.json`, which begin with zeros, to `scores` and the next states. It reads on past
{about["max_item_list_length"]} items, where `scoring.onnx` would read the latest of them anew.{waits}
After the code above:

```python
{STEP.replace("{inputs}", inputs)}
```
"""


def _columns(about: dict[str, Any], shape: str) -> str:
    if not about["columns"]:
        return ""
    follows = ", of what follows the item: at last the request"
    meanings = [column(name).meaning + follows * name.startswith(NEXT) for name in about["columns"]]
    return f", and `columns` `{shape}{len(meanings)}]`: {'; '.join(meanings)}"


def _example(about: dict[str, Any]) -> str:
    """Three items' columns, as Python."""
    kinds = [column(name).kinds or 10 for name in about["columns"]]
    return str([[number % kind for kind in kinds] for number in (0, 5, 9)])


def _table(head: str, rows: dict[str, Any]) -> str:
    lines = [f"| {head} | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # a checkout that was never installed
        return "unknown"
