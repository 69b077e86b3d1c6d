import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from pipeline.quant.granularity import Granularity
from pipeline.quant.grid import dequantize, fake_quantize_activation
from pipeline.quant.modules import QuantTarget, prepare
from pipeline.quant.spec import BitWidths, QuantSpec


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("bits", ["2-2-32", "4-4-8", "8-8-8"])
def test_a_quantized_linear_is_linear_in_the_dequantized_weight(transposed, granularity, bits):
    torch.manual_seed(0)
    layer = Conv1D(7, 12) if transposed else nn.Linear(12, 7)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    model = nn.Sequential(layer)
    prepare(
        model,
        [QuantTarget("0", "linear", symmetric_input=False, transposed=transposed)],
        QuantSpec(BitWidths.parse(bits), granularity=Granularity.parse(granularity)),
    )
    assert torch.equal(model[0].weight, layer.weight.T if transposed else layer.weight)
    codes, scale = model[0].quantizer.freeze(model[0].weight)
    assert scale.shape == ((7, 1) if granularity == "per_channel" else (1, 1))
    x = torch.randn(5, 4, 12)
    inputs = fake_quantize_activation(x, 8, symmetric=False) if bits.endswith("-8") else x
    assert torch.equal(model(x), F.linear(inputs, dequantize(codes, scale, model[0].quantizer.grid), layer.bias))


def test_the_gradient_of_a_transposed_weight_is_the_transpose():
    torch.manual_seed(0)
    layer, x = Conv1D(7, 12), torch.randn(5, 12)
    layer(x).square().sum().backward()
    model = nn.Sequential(layer)
    prepare(model, [QuantTarget("0", "linear", transposed=True)], QuantSpec(BitWidths.parse("32-32-32")))
    model(x).square().sum().backward()
    torch.testing.assert_close(model[0].weight.grad, layer.weight.grad.T)


@pytest.mark.parametrize("ste", ["clipped", "identity"])
def test_prepare_passes_the_straight_through_estimator_on(ste):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 7, bias=False))
    prepare(model, [QuantTarget("0", "linear")], QuantSpec(BitWidths.parse("2-2-32"), ste=ste))
    model(torch.eye(12)).sum().backward()
    weight = model[0].weight.detach()
    scale = model[0].quantizer.scale_of(weight.reshape(1, -1))
    inside = weight.abs() < scale  # the outermost level at 2 bits
    assert 0 < inside.sum() < inside.numel()
    assert torch.equal(model[0].weight.grad, inside.float() if ste == "clipped" else torch.ones(7, 12))


def test_the_padding_row_of_an_embedding_gets_no_gradient():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4, padding_idx=3))
    prepare(model, [QuantTarget("0", "embedding")], QuantSpec(BitWidths.parse("2-2-8"), ste="identity"))
    out = model(torch.tensor([[2, 3, 3]]))
    out.sum().backward()
    assert out[0, 1].tolist() == [0] * 4  # torch starts a padding row at zero
    assert model[0].weight.grad.sum(1).tolist() == [0, 0, 4] + [0] * 6
