"""A page of text, tables and plots, written as Markdown and as one HTML file that needs nothing beside it."""

import html
import re
from collections.abc import Sequence
from pathlib import Path

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 66rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 0.85rem; display: block; overflow-x: auto; }
th, td { padding: 0.25rem 0.6rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
svg { max-width: 100%; height: auto; }
code { font-size: 0.85em; background: #f4f4f4; padding: 0.1em 0.3em; }
"""


class Page:
    """Blocks in order; text may hold ``**bold**``, `` `code` `` and ``[links](address)``.

    Args:
        title: first heading.
    """

    def __init__(self, title: str):
        self.title = title
        self._markdown = [f"# {title}"]
        self._html = [f"<h1>{_inline(title)}</h1>"]

    def heading(self, text: str, level: int = 2) -> None:
        """A heading below the title."""
        self._markdown.append(f"{'#' * level} {text}")
        self._html.append(f"<h{level}>{_inline(text)}</h{level}>")

    def text(self, text: str) -> None:
        """A paragraph."""
        self._markdown.append(text)
        self._html.append(f"<p>{_inline(text)}</p>")

    def bullets(self, items: Sequence[str]) -> None:
        """A list."""
        self._markdown.append("\n".join(f"- {item}" for item in items))
        self._html.append("<ul>" + "".join(f"<li>{_inline(item)}</li>" for item in items) + "</ul>")

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table; the first column is text and the others are numbers."""
        lines = [list(head), ["---", *["---:"] * (len(head) - 1)], *rows]
        self._markdown.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
        body = "".join("<tr>" + "".join(f"<td>{_inline(cell)}</td>" for cell in row) + "</tr>" for row in rows)
        heads = "".join(f"<th>{_inline(cell)}</th>" for cell in head)
        self._html.append(f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>")

    def figure(self, picture: Path, page: Path, title: str) -> None:
        """An SVG file: beside the Markdown page a link to it, in the HTML page its content."""
        self._markdown.append(f"![{title}]({picture.relative_to(page.parent).as_posix()})")
        drawing = picture.read_text()
        self._html.append(f"<figure>{drawing[drawing.index('<svg') :]}</figure>")

    def write(self, file: Path) -> None:
        """Write ``file`` as Markdown, and the HTML page beside it."""
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n\n".join(self._markdown) + "\n")
        body = "\n".join(self._html)
        file.with_suffix(".html").write_text(
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(self.title)}</title>'
            f"<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
        )


def _inline(text: str) -> str:
    """The few marks of Markdown that a page's text uses, as HTML."""
    text = html.escape(text, quote=False)
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
    text = re.sub(r"\*\*([^*]+)\*\*", r"<b>\1</b>", text)
    # Of an address only what can neither end the attribute nor name another scheme, such as javascript.
    return re.sub(r"\[([^\]]+)\]\(((?:https?://)?[\w./#?=&;%~-]+)\)", r'<a href="\2">\1</a>', text)
