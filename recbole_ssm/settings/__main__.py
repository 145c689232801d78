"""``python -m recbole_ssm.settings``: write the schema's words into a checkout's property files and docs."""

from pathlib import Path

from recbole_ssm.config import properties_dir
from recbole_ssm.settings.text import property_files, with_tables

if __name__ == "__main__":
    files = property_files(properties_dir())
    page = Path("docs/configuration.md")
    files[page] = with_tables(page.read_text(encoding="utf-8"))
    for file, text in files.items():
        file.write_text(text, encoding="utf-8")
