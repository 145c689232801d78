"""Kernels whose launches are timed run many times on the same arguments, before the result of any is read."""

import pytest
import torch
from triton.runtime.autotuner import Autotuner

from recbole_ssm.ops.cases import make, right

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = {
    "preference_attention": {"H": 2, "P": 4, "M": 2, "E": 8},
    "preference_attention, one metric": {"H": 2, "P": 4, "M": 1, "E": 8},
    "preference_attention, last": {"H": 2, "P": 4, "M": 2, "E": 8},
    "ssd": {"H": 2, "P": 4, "G": 1, "N": 8},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_kernel_that_is_timed_reads_nothing_that_it_writes(name, dtype, monkeypatch):
    launches, run = [], Autotuner.run

    def thrice(kernel, *arguments, **settings):
        launches.append(kernel)
        for _ in range(3):
            result = run(kernel, *arguments, **settings)
        return result

    monkeypatch.setattr(Autotuner, "run", thrice)
    op, _, last = name.partition(", ")
    form = {"queries": "last"} if last == "last" else {}
    case = make(op, [1, 5, 18], CASES[name], dtype, DEVICE, weights=torch.float32, **form)
    assert not right(case, "triton")
    assert len(set(launches)) >= 2
