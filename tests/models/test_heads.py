from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import erf

from hpcssl.models.heads import DinoHead, DinoHeadConfig

CONFIG = DinoHeadConfig(out_dim=11, hidden_dim=8, bottleneck_dim=5)


def _logits(weights: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    for layer in (0, 2, 4):
        x = x @ weights[f"mlp.{layer}.weight"].T + weights[f"mlp.{layer}.bias"]
        if layer < 4:
            x = x * 0.5 * (1 + erf(x / np.sqrt(2)))
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    v = weights["last_v"]
    return x @ (weights.get("last_g", 1.0) * v / np.linalg.norm(v, axis=1, keepdims=True)).T


@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_head_is_the_published_function(norm_last_layer):
    torch.manual_seed(0)
    config = DinoHeadConfig(out_dim=11, hidden_dim=8, bottleneck_dim=5, norm_last_layer=norm_last_layer)
    head = DinoHead(6, config).double()
    assert ("last_g" in dict(head.named_parameters())) is not norm_last_layer
    if not norm_last_layer:
        torch.nn.init.uniform_(head.last_g, 0.5, 2)
    x = torch.randn(7, 6, dtype=torch.float64)
    weights = {name: value.detach().numpy() for name, value in head.state_dict().items()}
    np.testing.assert_allclose(head(x).detach().numpy(), _logits(weights, x.numpy()), rtol=1e-10, atol=1e-12)


def test_logits_are_cosines_whatever_the_length_of_the_prototypes():
    head = DinoHead(6, CONFIG)
    x = torch.randn(7, 6)
    before = head(x)
    with torch.no_grad():
        head.last_v.mul_(9.0)
    torch.testing.assert_close(head(x), before)
    assert before.abs().max() <= 1 + 1e-6


def test_only_the_last_layers_parameters_begin_with_last():
    head = DinoHead(6, DinoHeadConfig(out_dim=11, hidden_dim=8, bottleneck_dim=5, norm_last_layer=False))
    assert [name for name, _ in head.named_parameters() if name.startswith("last_")] == ["last_v", "last_g"]
    assert head.mlp[0].weight.std() < 0.03
    assert all(head.mlp[i].bias.abs().max() == 0 for i in (0, 2, 4))


def test_defaults_are_the_papers():
    head = DinoHead(384, DinoHeadConfig(out_dim=100))
    assert {name: tuple(p.shape) for name, p in head.named_parameters() if not name.endswith("bias")} == {
        "mlp.0.weight": (2048, 384),
        "mlp.2.weight": (2048, 2048),
        "mlp.4.weight": (256, 2048),
        "last_v": (100, 256),
    }
    assert DinoHeadConfig().out_dim == 65536
