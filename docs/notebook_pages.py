"""A hook of mkdocs: notebooks are pages, whose links are checked as those of all others."""

import json

from mkdocs.structure.files import File


class Notebook(File):
    """A notebook, read as Markdown; what its cells printed stands below them."""

    def is_documentation_page(self) -> bool:
        """It is one."""
        return True

    @property
    def content_string(self) -> str:
        """Its cells, as mkdocs reads pages."""
        cells = json.loads(super().content_string)["cells"]
        return "\n\n".join(part for cell in cells for part in _parts(cell))


def on_files(files, config):
    """Put notebooks among the pages."""
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        files.remove(file)
        files.append(Notebook(file.src_uri, file.src_dir, config.site_dir, config.use_directory_urls))
    return files


def _parts(cell):
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        yield source
        return
    yield f"```python\n{source}\n```"
    for output in cell["outputs"]:
        text = "".join(output["text"] if "text" in output else output["data"]["text/plain"])
        yield f"```text\n{text.rstrip()}\n```"
