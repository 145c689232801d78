"""The wheel and the wheel built from the sdist hold the property files; the tests themselves run on the checkout."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from recbole_ssm.config import properties_dir

ROOT = Path(__file__).parent.parent
SHIPPED = sorted(path.relative_to(properties_dir()).as_posix() for path in properties_dir().rglob("*.yaml"))


def build(kind: str, source: Path, target: Path) -> Path:
    """Run the build backend as pip does, without the network that pip's own environment would need."""
    target.mkdir()
    script = f"import hatchling.build as b; print(b.build_{kind}(r'{target}'))"
    done = subprocess.run([sys.executable, "-c", script], cwd=source, capture_output=True, text=True, check=True)
    return target / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """The wheel of this checkout, and that of its sdist."""
    folder = tmp_path_factory.mktemp("dist")
    sdist = build("sdist", ROOT, folder / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (source,) = (folder / "unpacked").iterdir()
    return {"wheel": build("wheel", ROOT, folder / "a"), "wheel of the sdist": build("wheel", source, folder / "b")}


@pytest.mark.parametrize("kind", ["wheel", "wheel of the sdist"])
def test_wheel_finds_its_properties(wheels, kind, tmp_path):
    with zipfile.ZipFile(wheels[kind]) as archive:
        archive.extractall(tmp_path / "site")
        assert not [name for name in archive.namelist() if name.startswith(("tests", "benchmarks", "docs"))]
    script = (
        "import recbole_ssm.config as c; r = c.properties_dir(); "
        "print(r); print(*sorted(p.relative_to(r).as_posix() for p in r.rglob('*.yaml')), sep='\\n')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": ""},
    )  # fmt: skip
    folder, *found = done.stdout.splitlines()
    assert Path(folder) == tmp_path / "site" / "recbole_ssm" / "properties"
    assert found == SHIPPED


def test_checkout_reads_its_own_properties():
    assert properties_dir() == ROOT / "properties"


def test_import_needs_no_optional_package():
    script = (
        "import sys; sys.modules.update(dict.fromkeys(('ray', 'triton', 'mamba_ssm', 'causal_conv1d'))); "
        "import recbole_ssm; print(recbole_ssm.Config('STARRec', 'ml-100k')['n_experts'])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "8"
