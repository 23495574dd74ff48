"""Points that nothing calls, or several copies at once."""

import pytest
import torch
from torch import nn

from dfa_kernels import attach


class Calling(nn.MultiheadAttention):
    """Attention that calls its last linear layer."""

    def forward(self, x):
        return self.out_proj(x)


def ending(module):
    return nn.Sequential(module, nn.Linear(4, 3))


def test_attention_that_calls_its_parts_has_points():
    model = ending(Calling(4, 2))
    attach(model, ["0.out_proj"])
    model(torch.ones(5, 4)).sum().backward()
    assert model[0].out_proj.weight.grad is not None


@pytest.mark.parametrize("argument", ["points", "inputs", "output"])
def test_attentions_own_parts_are_refused(argument):
    model = nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 2), nn.Linear(4, 3))
    arguments = {
        "points": ["0"],
        argument: "1.out_proj" if argument == "output" else ["1.out_proj"],
    }
    with pytest.raises(ValueError, match=rf"attach: {argument} must be .*'1.out_proj'.*give '1'"):
        attach(model, **arguments)


@pytest.mark.parametrize(
    "container",
    [
        nn.ModuleList([nn.Tanh()]),
        nn.ModuleDict({"a": nn.Tanh()}),
        nn.ParameterList([torch.ones(2)]),
        nn.ParameterDict({"a": torch.ones(2)}),
    ],
)
def test_containers_are_refused(container):
    kind = type(container).__name__
    with pytest.raises(ValueError, match=rf"attach: points .*'0': a {kind} has no forward"):
        attach(ending(container), ["0"])


def test_parametrizations_are_refused():
    linear = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    for name in ("0.parametrizations.weight", "0.parametrizations.weight.0"):
        with pytest.raises(ValueError, match=r"attach: points .*makes a weight.*give '0'"):
            attach(ending(linear), [name])


def test_inside_data_parallel_is_refused():
    model = ending(nn.DataParallel(nn.Sequential(nn.Linear(4, 4), nn.Tanh())))
    with pytest.raises(ValueError, match=r"points .*'0.module.1': '0' is an nn.DataParallel.*Dist"):
        attach(model, ["0.module.1"])
    attach(model, ["0"])
    with pytest.raises(ValueError, match=r"attach: model must not be an nn.DataParallel"):
        attach(model[0], ["module.1"])
