"""Result files as Markdown."""

from collections.abc import Container, Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]], text: Container[int] = (0,)) -> list[str]:
    """A table's lines; columns with the numbers ``text`` stand to the left, those of numbers to the right."""
    rule = ["---" if i in text else "---:" for i in range(len(heads))]
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (heads, *rows)]
    return [f"| {' | '.join(line)} |" for line in (cells[0], rule, *cells[1:])]


def write_section(path: Path, key: str, text: str) -> None:
    """Put ``text`` between the page's two marks for ``key``; a page or a section that is missing is added."""
    begin, end = f"<!-- begin {key} -->", f"<!-- end {key} -->"
    page = path.read_text() if path.exists() else "# Benchmarks\n"
    if begin not in page:
        page = f"{page.rstrip()}\n\n{begin}\n{end}\n"
    before, rest = page.split(begin, 1)
    path.write_text(f"{before}{begin}\n{text.strip()}\n{end}{rest.split(end, 1)[1]}")


def versions(about: dict[str, Any]) -> str:
    """Of all packages that are installed, in one line."""
    return ", ".join(f"{name} {version}" for name, version in about["versions"].items() if "not" not in version)


def ops_table(found: dict[str, Any]) -> str:
    """Every case of a result file of ``python -m benchmarks ops``."""
    about = found["environment"]
    commits = " and ".join(dict.fromkeys(case["commit"] for case in found["cases"]))
    lines = [
        f"### Ops on {about['device']}",
        "",
        f"Commit {commits}, {about['date']}; {versions(about)}. `python -m benchmarks ops`.",
        "",
        "Each pair is forward alone / forward and backward: milliseconds (median of rounds in which every candidate "
        "runs once), how many times as fast as the reference (median of the rounds' ratios), peak memory above what "
        "was held before, and time over that of the least traffic at this machine's copy rate "
        f"({found['copy_bytes_per_s'] / 1e9:.0f} GB/s).",
    ]
    heads = ["length", "tokens", "candidate", "ms", "times as fast", "MiB", "times the floor"]
    for title, cases in groupby(found["cases"], _title):
        rows = [
            [str(case["length"]), str(case["tokens"]), name, *_cells(case, row)]
            for case in cases
            for name, row in case["results"].items()
        ]
        lines += ["", f"#### {title}", "", *markdown_table(heads, rows, text=(0, 2))]
    return "\n".join(lines)


def _title(case: dict[str, Any]) -> str:
    return f"{case['op']} {' '.join(f'{k} {v}' for k, v in case['sizes'].items())}, {case['dtype']}"


def _cells(case: dict[str, Any], row: dict[str, Any]) -> list[str]:
    if "left out" in row:
        return [f"left out: {row['left out']}", "", "", ""]
    ratio = row.get("times_as_fast_as", {}).get("reference", {})
    memory = [None if b is None else b / 2**20 for b in (row["forward_peak_bytes"], row["both_peak_bytes"])]
    return [
        _pair(row["forward_s"] * 1e3, row["both_s"] * 1e3),
        _pair(ratio.get("forward"), ratio.get("both")),
        _pair(*memory),
        _pair(row["forward_s"] / case["floor_forward_s"], row["both_s"] / case["floor_both_s"]),
    ]


def _pair(forward: float | None, both: float | None) -> str:
    return "" if forward is None or both is None else f"{forward:.3g} / {both:.3g}"


def profile_table(found: dict[str, Any], picture: str) -> str:
    """Every model of a result file of ``python -m benchmarks profile``; ``picture`` is its place beside the page."""
    about = found["environment"]
    title = f"Where the time goes on {about['device']}"
    lines = [f"### {title}", "", f"Commit {about['commit']}, {about['date']}; {versions(about)}."]
    lines += ["`python -m benchmarks profile`.", "", f"![{title}]({picture})"]
    for model in found["models"]:
        told = ", ".join(f"{key} {value}" for key, value in model["settings"].items() if value and key != "given")
        lines += ["", f"#### {model['model']} on {model['settings']['dataset']}", ""]
        lines.append(
            f"{told}. {model['steps']} of {model['batches']} batches an epoch; {model['ms_per_step']:.4g} ms a step, "
            f"{model['profiled_ms_per_step']:.4g} ms while profiled. At best "
            f"{model['operations_per_s'] / 1e9:.0f} GFLOP/s and {model['copy_bytes_per_s'] / 1e9:.0f} GB/s."
        )
        host = any("host_ms_per_step" in row for row in model["parts"])
        heads = ["part", "ms a step", *(["host ms"] * host), "s an epoch", "share", "floor s", "times the floor"]
        rows = []
        for row in model["parts"]:
            cells = [row["part"], f"{row['ms_per_step']:.3g}"]
            cells += [f"{row['host_ms_per_step']:.3g}"] if host and "host_ms_per_step" in row else [""] * host
            cells += [f"{row['seconds_per_epoch']:.3g}", f"{row['share']:.1%}", *_floor_cells(row)]
            rows.append(cells)
        sums = ["**step**", f"{model['ms_per_step']:.4g}", *([""] * host), f"{model['seconds_per_epoch']:.4g}", "100%"]
        rows.append([*sums, "", "", ""])
        evaluation = ["evaluation", "", *([""] * host), f"{model['evaluation']['seconds']:.3g}", ""]
        rows.append([*evaluation, *_floor_cells(model["evaluation"])])
        lines += ["", *markdown_table([*heads, "by"], rows, text=(0, len(heads)))]
    lines += ["", "How it is measured:", "", *(f"- {key}: {text}." for key, text in found["protocol"].items())]
    lines += ["", "What the floors count:", "", *(f"- {part}: {text}." for part, text in found["floors"].items())]
    return "\n".join(lines)


def _floor_cells(row: dict[str, Any]) -> list[str]:
    if "floor_seconds" not in row:
        return ["", "", ""]
    ratio = row["times_the_floor"]
    return [f"{row['floor_seconds']:.3g}", "" if ratio is None else f"{ratio:.3g}", row["floor_by"]]
