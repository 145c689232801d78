"""The notebook does what it says, from its first cell to its last."""

import json
import re
import shlex
import sys
from pathlib import Path

from recbole_ssm.cli.run_serve import build_parser

NOTEBOOK = Path(__file__).parents[2] / "docs" / "train_to_serve.ipynb"


def test_every_cell_runs_and_the_server_takes_its_command(monkeypatch):
    """Cells are plain Python, so no kernel is started; ``sys.argv`` is that of one, which RecBole must not read."""
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    names: dict = {}
    text = ""
    for number, cell in enumerate(json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            text += source
        else:
            exec(compile(source, f"cell {number} of {NOTEBOOK.name}", "exec"), names)
    assert names["result"]["test_result"]["ndcg@10"] > 0
    assert [len(items) for items in names["found"].items] == [5, 5]
    assert Path("shipped", "scoring.onnx").is_file()
    (command,) = re.findall(r"^run_serve (.+)$", text, re.MULTILINE)
    assert names["checkpoint"] in Path().glob(build_parser().parse_args(shlex.split(command)).checkpoint)
