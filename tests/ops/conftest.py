"""What tests of kernels share."""

import pytest
import torch


@pytest.fixture
def poisoned_memory(monkeypatch):
    """Uninitialised memory is NaN, so that a row which a kernel forgets to write shows."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    yield
    torch.use_deterministic_algorithms(deterministic)
