"""Result files as Markdown."""

from pathlib import Path
from typing import Any


def write_section(path: Path, key: str, text: str) -> None:
    """Put ``text`` between the page's two marks for ``key``; a page or a section that is missing is added."""
    begin, end = f"<!-- begin {key} -->", f"<!-- end {key} -->"
    page = path.read_text() if path.exists() else "# Benchmarks\n"
    if begin not in page:
        page = f"{page.rstrip()}\n\n{begin}\n{end}\n"
    before, rest = page.split(begin, 1)
    path.write_text(f"{before}{begin}\n{text.strip()}\n{end}{rest.split(end, 1)[1]}")


def ops_table(found: dict[str, Any]) -> str:
    """Every case of a result file of ``python -m benchmarks ops``."""
    about = found["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if "not" not in version)
    commits = " and ".join(dict.fromkeys(case["commit"] for case in found["cases"]))
    lines = [
        f"### Ops on {about['device']}",
        "",
        f"Commit {commits}, {about['date']}; {versions}. `python -m benchmarks ops`.",
        "",
        "Each pair is forward alone / forward and backward: milliseconds (median of rounds in which every candidate "
        "runs once), how many times as fast as the reference (median of the rounds' ratios), peak memory above what "
        "was held before, and time over that of the least traffic at this machine's copy rate "
        f"({found['copy_bytes_per_s'] / 1e9:.0f} GB/s).",
    ]
    heading = None
    for case in found["cases"]:
        title = f"{case['op']} {' '.join(f'{k} {v}' for k, v in case['sizes'].items())}, {case['dtype']}"
        if title != heading:
            heading = title
            lines += ["", f"#### {title}", ""]
            lines.append("| length | tokens | candidate | ms | times as fast | MiB | times the floor |")
            lines.append("| --- | ---: | --- | ---: | ---: | ---: | ---: |")
        for name, row in case["results"].items():
            lines.append(f"| {case['length']} | {case['tokens']} | {name} | {' | '.join(_cells(case, row))} |")
    return "\n".join(lines)


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
