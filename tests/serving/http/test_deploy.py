"""The files in ``deploy`` call ``run_serve`` as it is."""

import json
import re
from pathlib import Path

import pytest

from recbole_ssm.cli.run_serve import REDIS, TOKEN, build_parser

DEPLOY = Path(__file__).parents[3] / "deploy"


def words(file: str) -> list[str]:
    """Arguments of ``run_serve`` in a file."""
    text = (DEPLOY / file).read_text()
    if file == "Containerfile":
        found = [word for line in re.findall(r"^(?:ENTRYPOINT|CMD) (.*)$", text, re.M) for word in json.loads(line)]
    else:
        (line,) = re.findall(r"^ExecStart=(.*)$", text, re.M)
        found = line.split()
    assert Path(found[0]).name == "run_serve"
    return found[1:]


@pytest.mark.parametrize("file", ["Containerfile", "recbole-ssm.service"])
def test_the_command_is_one_that_run_serve_takes(file):
    args = build_parser().parse_args(words(file))
    assert args.port == 8000


def test_the_unit_waits_for_requests_that_have_begun():
    unit = (DEPLOY / "recbole-ssm.service").read_text()
    (stop,) = re.findall(r"^TimeoutStopSec=(\d+)$", unit, re.M)
    args = build_parser().parse_args(words("recbole-ssm.service"))
    assert float(stop) > args.timeout + 1
    assert args.host == "127.0.0.1"
    assert TOKEN in unit
    assert REDIS in unit
