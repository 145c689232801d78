"""The table of ``python -m benchmarks models``."""

from typing import Any

from benchmarks.report import markdown_table


def differ(here: dict[str, Any], old: dict[str, Any] | None) -> bool:
    """Whether both ran and one of their metrics is another number, to six decimals."""
    return old is not None and "metrics" in here and "metrics" in old and here["metrics"] != old["metrics"]


def compared(model: dict[str, Any]) -> str:
    """What is said of a model beside RecBole 1.2.0."""
    here, old, unfused = model["here"], model["old"], model["unfused"]
    if old is None:
        return "not compared"
    if "error" in old:
        return f"RecBole 1.2.0 does not run it: {old['error']}"
    if "error" in here:
        return "no"
    if not differ(here, old):
        return "yes"
    if unfused is not None and "metrics" in unfused and not differ(unfused, old):
        return "yes, by RecBole's optimizer"
    largest = max(abs(here["metrics"][name] - value) for name, value in old["metrics"].items())
    return f"no: up to {largest:.2g}"


def table(result: dict[str, Any]) -> str:
    """The section of the page: counts, what was compared and a line for each model."""
    models = result["models"]
    verdicts = [compared(model) for model in models.values()]
    run = sum("metrics" in model["here"] for model in models.values())
    equal = [verdicts.count(word) for word in ("yes", "yes, by RecBole's optimizer")]
    old_runs = sum("metrics" in (model["old"] or {}) for model in models.values())
    whole = sum(model["sequence_mode"] == "yes" for model in models.values())
    packages = {where: ", ".join(f"{n} {v}" for n, v in (about or {}).items())
                for where, about in result["versions"].items()}  # fmt: skip
    about = result["environment"]
    lines = [
        f"`python -m benchmarks models --old PYTHON`, commit {about['commit']}, {about['date']}. Here: "
        f"{packages['here']}. Old: {packages['old'] or 'not given'}.",
        "",
        f"Of RecBole's {len(models)} models {run} run here and {old_runs} in the old environment. Of these "
        f"all metrics of both sets are the same to six decimals for {equal[0]}, and for {equal[1]} more once the "
        f"optimizer takes RecBole's steps instead of fused ones. Of all {whole} train on whole histories.",
        "",
    ]
    rows = []
    for (name, model), verdict in zip(models.items(), verdicts, strict=True):
        runs = "yes" if "metrics" in model["here"] else f"no: {model['here']['error']}"
        rows.append([name, model["family"], runs, verdict, model["sequence_mode"] or ""])
    heads = ["model", "family", "runs", "equal", "sequence mode"]
    return "\n".join(lines + markdown_table(heads, rows, text=range(len(heads))))
