"""How numba compiles the kernels of a CPU."""

import os
import subprocess
import sys

import pytest
from numba.core.codegen import get_host_cpu_features

CODE = "import numba, recbole_ssm.ops.compiled; print(numba.config.CPU_FEATURES)"


def features(**environment: str) -> str:
    found = subprocess.run(
        [sys.executable, "-c", CODE], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    return found.stdout.strip()


@pytest.mark.skipif("+avx512f" not in get_host_cpu_features(), reason="needs a CPU with AVX-512")
def test_whole_vectors_are_used_where_the_cpu_has_them():
    assert features() == f"{get_host_cpu_features()},-prefer-256-bit"


def test_features_that_a_user_chose_stay():
    assert features(NUMBA_CPU_FEATURES=get_host_cpu_features()) == get_host_cpu_features()
