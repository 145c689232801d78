"""How numba compiles the kernels of a CPU."""

import os
import subprocess
import sys

import pytest
from numba.core.codegen import get_host_cpu_features

FEATURES = "import numba, recbole_ssm.ops.compiled; print(numba.config.CPU_FEATURES)"


THREADS = """
from threading import Thread
import numba, torch
from recbole_ssm.ops import causal_conv

x, weight = torch.randn(20000, 64), torch.randn(64, 4)
borders = torch.tensor([0, 3000, 20000], dtype=torch.int32)

def convolve():
    for _ in range(50):
        found.append(causal_conv(x, weight, cu_seqlens=borders, backend="cpu"))

found = []
threads = [Thread(target=convolve) for _ in range(3)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert len(found) == 150 and all(torch.equal(one, found[0]) for one in found)
print(numba.threading_layer())
"""


def features(**environment: str) -> str:
    found = subprocess.run(
        [sys.executable, "-c", FEATURES], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    return found.stdout.strip()


@pytest.mark.skipif("+avx512f" not in get_host_cpu_features(), reason="needs a CPU with AVX-512")
def test_whole_vectors_are_used_where_the_cpu_has_them():
    assert features() == f"{get_host_cpu_features()},-prefer-256-bit"


def test_features_that_a_user_chose_stay():
    assert features(NUMBA_CPU_FEATURES=get_host_cpu_features()) == get_host_cpu_features()


def test_threads_meet_in_a_pool_of_numba_which_would_end_the_process():
    words = [sys.executable, "-c", THREADS]
    environment = {**os.environ, "NUMBA_THREADING_LAYER": "workqueue"}
    found = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout.strip()) == (0, "workqueue"), found.stderr
