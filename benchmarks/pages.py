"""A page of text, tables and plots, written as Markdown and as one HTML file that needs nothing beside it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markdown_it import MarkdownIt

from benchmarks.report import markdown_table

LAYOUT = Environment(autoescape=True).from_string("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title><style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 66rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 0.85rem; display: block; overflow-x: auto; }
th, td { padding: 0.25rem 0.6rem; border-bottom: 1px solid #ddd; text-align: left; white-space: nowrap; }
svg { max-width: 100%; height: auto; }
code { font-size: 0.85em; background: #f4f4f4; padding: 0.1em 0.3em; }
</style></head>
<body>
{{ body | safe }}</body></html>
""")


class Page:
    """Blocks of Markdown in order; HTML in them is text.

    Args:
        title: first heading.
    """

    def __init__(self, title: str):
        self.title = title
        self._blocks = [f"# {title}"]
        self._drawings: dict[str, str] = {}

    def heading(self, text: str, level: int = 2) -> None:
        """A heading below the title."""
        self._blocks.append(f"{'#' * level} {text}")

    def text(self, text: str) -> None:
        """A paragraph."""
        self._blocks.append(text)

    def bullets(self, items: Sequence[str]) -> None:
        """A list."""
        self._blocks.append("\n".join(f"- {item}" for item in items))

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table; the first column is text and the others are numbers."""
        self._blocks.append("\n".join(markdown_table(head, rows)))

    def figure(self, picture: Path, page: Path, title: str) -> None:
        """An SVG file: beside the Markdown page a link to it, in the HTML page its content."""
        place = picture.relative_to(page.parent).as_posix()
        self._blocks.append(f"![{title}]({place})")
        drawing = picture.read_text()
        self._drawings[place] = drawing[drawing.index("<svg") :]

    def write(self, file: Path) -> None:
        """Write ``file`` as Markdown, and the HTML page beside it."""
        text = "\n\n".join(self._blocks) + "\n"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        markdown = MarkdownIt("js-default")  # whose HTML is off

        def image(renderer: Any, tokens: Any, index: int, options: Any, env: Any) -> str:
            drawing = self._drawings.get(tokens[index].attrs["src"])
            return renderer.image(tokens, index, options, env) if drawing is None else drawing

        markdown.add_render_rule("image", image)
        file.with_suffix(".html").write_text(LAYOUT.render(title=self.title, body=markdown.render(text)))
