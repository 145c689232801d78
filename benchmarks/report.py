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
    """Forward and backward of every case: tokens a microsecond, memory, and how many times as fast as the rest."""
    about = found["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if "not" not in version)
    lines = [
        f"### Ops on {about['device']}",
        "",
        f"Commit {about['commit']}, {about['date']}; {versions}. Forward and backward; time is the median of rounds in "
        "which every candidate runs once; 'times as fast' is the median of the rounds' ratios to the reference; memory "
        "is the peak above what was held before; the floor is the least traffic over this machine's copy rate "
        f"({found['copy_bytes_per_s'] / 1e9:.0f} GB/s). `python -m benchmarks ops`.",
    ]
    heading = None
    for case in found["cases"]:
        title = f"{case['op']} {' '.join(f'{k} {v}' for k, v in case['sizes'].items())}, {case['dtype']}"
        if title != heading:
            heading = title
            lines += [
                "",
                f"#### {title}",
                "",
                "| length | tokens | candidate | ms | times as fast | MiB | times floor |",
            ]
            lines += ["| --- | ---: | --- | ---: | ---: | ---: | ---: |"]
        for name, row in case["results"].items():
            start = f"| {case['length']} | {case['tokens']} | {name} "
            if "both_s" not in row:
                lines.append(f"{start}| left out: {row['left out']} | | | |")
                continue
            ratio = row.get("times_as_fast_as", {}).get("reference", {}).get("both")
            memory = row["both_peak_bytes"]
            lines.append(
                f"{start}| {row['both_s'] * 1e3:.4g} | {'' if ratio is None else f'{ratio:.3g}'} "
                f"| {'' if memory is None else f'{memory / 2**20:.0f}'} | {row['both_s'] / case['floor_both_s']:.3g} |"
            )
    return "\n".join(lines)
