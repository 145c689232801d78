import pytest
import torch
import torch.nn.functional as F

from recbole_ssm.layers import PreferenceAwareAttention


@pytest.mark.parametrize("residual", [True, False])
def test_one_position_attends_to_itself_alone(residual):
    torch.manual_seed(0)
    layer = PreferenceAwareAttention(8, 2, dropout_prob=0.0, residual=residual)
    x = torch.randn(3, 8)

    out = layer(x, torch.randn(3, 8), torch.tensor([0, 1, 2, 3], dtype=torch.int32))

    value = layer.query_key_value(x)[:, 16:]
    context = layer.out_proj(value * F.silu(layer.context_gate(value)))
    expected = layer.norm(x + context if residual else context)
    torch.testing.assert_close(out, expected)
