from __future__ import annotations

import pytest
import torch
from torch import nn

from prefopt.models.packed import STEPS, packed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_layers_give_the_same_products_and_are_put_back(dtype):
    # asked of torch, not of what is tested: packing that never happens is no reason to skip
    able = torch.backends.mkldnn.is_available()
    if not able or (dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        pytest.skip(f"this torch build or processor cannot lay out {dtype} weights")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 300), nn.ReLU(), nn.Linear(300, 150, bias=False), nn.Linear(150, 3)).to(dtype)
    x = torch.randn(5, 1, 200, dtype=dtype)
    with torch.no_grad():
        plain = model(x)
        with packed(model, STEPS):
            changed = ["forward" in vars(layer) for layer in model]
            torch.testing.assert_close(model(x), plain)
    assert not any("forward" in vars(layer) for layer in model)
    assert changed == [True, False, True, False]  # the last is too small to gain


def test_layers_that_are_more_than_linear_stay_as_they_are():
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model = nn.Sequential(Doubled(300, 300), nn.Linear(300, 300).double())
    with packed(model, STEPS):
        assert not any("forward" in vars(layer) for layer in model)


def test_a_failure_meanwhile_puts_layers_back():
    model = nn.Sequential(nn.Linear(300, 300))
    with pytest.raises(KeyError), packed(model, STEPS):
        raise KeyError
    assert "forward" not in vars(model[0])
