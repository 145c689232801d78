"""Result files of ``python -m benchmarks speed`` as Markdown, and their plots."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import plots
from benchmarks.report import markdown_table, versions

MIB = 2**20


def speed_tables(found: dict[str, Any], images: dict[str, Path]) -> str:
    """All parts of a result file, each with how it was measured.

    Args:
        found: the result file.
        images: plots by part, as :func:`draw` returns them; they lie in the folder ``images`` beside the page.
    """
    about = found["environment"]
    lines = [f"### Speed and memory on {about['device']}", "", f"{versions(about)}. `python -m benchmarks speed`."]
    for name, part in found["parts"].items():
        title, table = TABLES[name]
        commits = dict.fromkeys(run["commit"] for run in part.get("runs", [part]))
        same = all(part[key] == about[key] for key in ("device", "versions"))
        where = "" if same else f", on {part['device']} with {versions(part)}"
        lines += ["", f"#### {title}", "", f"Commit {' and '.join(commits)}, {part['date']}{where}. {_settings(part)}"]
        lines += [""]
        lines += table(part)
        if name in images:
            lines += ["", f"![{title}](images/{images[name].name})"]
        lines += ["", *(f"- {key}: {text}." for key, text in part["protocol"].items())]
    return "\n".join(lines)


def _settings(part: dict[str, Any]) -> str:
    known = {key: value for key, value in part["settings"].items() if value is not None}
    return "; ".join(f"{key} {value}" for key, value in known.items()) + "."


def _table(head: str, rows: list[list[str]]) -> list[str]:
    """A table whose columns are named in ``head``, separated by ``|``; the first is text and the others numbers."""
    return markdown_table([name.strip() for name in head.split("|")], rows)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _spread(values: dict[str, float]) -> str:
    """A median, and the least and largest where they differ from it."""
    least, middle, largest = (_number(values[key]) for key in ("least", "median", "largest"))
    return middle if least == largest else f"{middle} ({least} to {largest})"


def _mebibytes(count: float | None) -> str:
    return "" if count is None else _number(count / MIB)


def _training(part: dict[str, Any]) -> list[str]:
    units = list(part["rows"][0]["ratio"])
    lines = _table(
        "contender | layers | parameters | batch | targets a second | "
        + "".join(f"times {unit.split(', ')[1]} | " for unit in units)
        + "epoch, s | step's peak, MiB",
        [
            [
                row["contender"], str(row["layers"]), _number(row["parameters"]),
                f"{row['train_batch_size']} {row['batch_of']}", _spread(row["targets_per_s"]),
                *(_spread(row["ratio"][unit]) for unit in units), _number(row["epoch_s"]),
                _mebibytes(row["peak_bytes"]),
            ]
            for row in part["rows"]
        ],
    )  # fmt: skip
    tried = {
        row["contender"]: {at["batch"]: at["targets_per_s"] for at in row["search"]}
        for row in part["rows"]
        if row["search"]
    }
    sizes = sorted({batch for rates in tried.values() for batch in rates})
    if not tried:
        return lines
    lines += ["", "Targets a second by what a step trains on; nothing stands where it was not tried:", ""]
    lines += _table(
        " | ".join(["contender", "in", *map(str, sizes)]),
        [
            [row["contender"], row["batch_of"], *(_number(tried[row["contender"]].get(size)) for size in sizes)]
            for row in part["rows"]
            if row["contender"] in tried
        ],
    )
    return lines


def _evaluation(part: dict[str, Any]) -> list[str]:
    lines = _table(
        "contender | layers | batch | seconds | users a second | times as fast | peak, MiB",
        [
            [row["contender"], str(row["layers"]), "", f"left out: {row['left out']}", "", "", ""]
            if "left out" in row
            else [
                row["contender"], str(row["layers"]), str(row["eval_batch_size"]), _spread(row["seconds"]),
                _spread(row["users_per_s"]), _spread(row["ratio"]), _mebibytes(row["peak_bytes"]),
            ]
            for row in part["rows"]
        ],
    )  # fmt: skip
    equal = part["equal_weights"]
    if equal:
        metrics = equal["metrics"]
        names = list(next(iter(metrics.values())))
        lines += ["", f"SASRec with equal weights, largest difference {equal['largest_difference']:.2g}:", ""]
        lines += _table(
            "contender | " + " | ".join(names),
            [[contender, *(f"{own[name]:.6f}" for name in names)] for contender, own in metrics.items()],
        )
    return lines


def _data(part: dict[str, Any]) -> list[str]:
    lines = _table(
        "way | read and filter, s | rows, s | split, s | all, s | times as fast | before, MiB | peak, MiB",
        [
            [
                row["way"],
                *(_spread(row[key]) for key in ("read_and_filter_s", "rows_s", "split_s", "total_s", "ratio")),
                _mebibytes(row["before_bytes"]), _mebibytes(row["peak_bytes"]),
            ]
            for row in part["rows"]
        ],
    )  # fmt: skip
    made = part["generated"]
    if made:
        settings, training, estimate = made["settings"], made["training"], made["recbole_estimate"]
        lines += [
            "",
            f"{settings['interactions']:,} generated interactions of {settings['users']:,} users, "
            f"{training['items']:,} items ({settings['item_distribution']}), maximum length "
            f"{settings['MAX_ITEM_LIST_LENGTH']}: recbole_ssm reads and filters in {made['read_and_filter_s']:.3g} s, "
            f"makes rows in {made['rows_s']:.3g} s and splits in {made['split_s']:.3g} s, with a peak of "
            f"{_mebibytes(made['peak_bytes'])} MiB ({_mebibytes(made['before_bytes'])} before); "
            f"{training['steps']} steps of {settings['model']} then run at {_number(training['targets_per_s'])} "
            f"targets a second, with a peak of {_mebibytes(training['peak_bytes'])} MiB for the whole process. "
            f"RecBole's rows would take {_mebibytes(estimate['row_bytes'])} MiB ({estimate['how']}).",
        ]
    return lines


def _lengths(part: dict[str, Any]) -> list[str]:
    rows = []
    for model in part["rows"]:
        for at in model["lengths"]:
            cells = [f"{model['model']}", str(at["length"])]
            if "left out" in at:
                rows.append([*cells, f"left out: {at['left out']}", "", "", ""])
                continue
            cells += [_spread(at["ns_a_token"]), _spread(at["ratio"]), str(model["ratio_to"])]
            rows.append([*cells, _mebibytes(at["peak_bytes"])])
    return _table("model | length | ns a token | times as long | as at length | peak, MiB", rows)


def _catalogue(part: dict[str, Any]) -> list[str]:
    rows = []
    for at in part["rows"]:
        for name, loss in at["losses"].items():
            cells = [name, f"{at['items']:,}", _mebibytes(at["table_bytes"])]
            if "left out" in loss:
                rows.append([*cells, f"left out: {loss['left out']}", "", ""])
                continue
            ratio = _spread(loss["ratio"]) if "ratio" in loss else ""
            milliseconds = {key: 1e3 * value for key, value in loss["seconds"].items()}
            rows.append([*cells, _spread(milliseconds), ratio, _mebibytes(loss["peak_bytes"])])
    return _table("loss | items | table and gradient, MiB | ms | times as fast as dense | peak, MiB", rows)


def _accuracy(part: dict[str, Any]) -> list[str]:
    return _table(
        "model | train_mode | seeds | valid NDCG@10 | standard deviation | epoch, s",
        [
            [
                row["model"], row["train_mode"], str(row["seeds"]), f"{row['ndcg@10']:.4f}",
                "" if row["sd"] is None else f"{row['sd']:.4f}", _number(row["epoch_s"]),
            ]
            for row in part["rows"]
        ],
    )  # fmt: skip


def _models(part: dict[str, Any]) -> list[str]:
    head = "model | set | layers | parameters | targets a step | loss | targets a second | an epoch, s | times as long"
    rows = [
        [
            row["contender"],
            row["dataset"],
            str(row["layers"]),
            _number(row["parameters"]),
            _number(row["train_batch_size"]),
            row["loss_type"],
            _spread(row["targets_per_s"]),
            _number(row["epoch_s"]),
            _number(row["times_as_long"]),
        ]
        for row in part["rows"]
    ]
    return _table(head, rows)


TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], list[str]]]] = {
    "training": ("Training", _training),
    "models": ("An epoch of each of our models", _models),
    "evaluation": ("Evaluation", _evaluation),
    "data": ("Loading data", _data),
    "lengths": ("Longer sequences", _lengths),
    "catalogue": ("Larger catalogues: the loss alone", _catalogue),
    "accuracy": ("What whole histories and prefixes learn", _accuracy),
}


def draw(found: dict[str, Any], folder: Path, slug: str) -> dict[str, Path]:
    """Draw what grows, and what is fast; the files by part."""
    parts = found["parts"]
    files = {
        part: folder / f"speed-{part}-{slug}.svg" for part in ("training", "lengths", "catalogue") if part in parts
    }
    if "training" in parts:
        rates = {row["contender"]: row["targets_per_s"]["median"] for row in parts["training"]["rows"]}
        plots.bars(files["training"], f"Training, {parts['training']['device']}", rates, "targets a second", log=True)
    if "lengths" in parts:
        times = {
            model["model"]: [
                (at["length"], at["ns_a_token"]["median"]) for at in model["lengths"] if "ns_a_token" in at
            ]
            for model in parts["lengths"]["rows"]
        }
        title = f"A training step on {parts['lengths']['settings']['tokens']:,} tokens, {parts['lengths']['device']}"
        plots.lines(files["lengths"], title, times, "length of a sequence", "ns a token")
    if "catalogue" in parts:
        title = (
            f"Cross-entropy of {parts['catalogue']['settings']['targets']:,} targets, {parts['catalogue']['device']}"
        )
        plots.lines(
            files["catalogue"], title, _catalogue_memory(parts["catalogue"]), "items", "peak MiB, table included",
            dashed=(TABLE,),
        )  # fmt: skip
    return files


TABLE = "the table and its gradient"


def _catalogue_memory(part: dict[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """Peak MiB against items; what was held before the call, half of ``table_bytes``, is added to each peak."""
    memory: dict[str, list[tuple[float, float]]] = {}
    for at in part["rows"]:
        for name, loss in at["losses"].items():
            if loss.get("peak_bytes") is not None:
                peak = loss["peak_bytes"] + at["table_bytes"] / 2
                memory.setdefault(name, []).append((at["items"], peak / MIB))
    memory[TABLE] = [(at["items"], at["table_bytes"] / MIB) for at in part["rows"]]
    return memory
