"""PLoRALinear: the delta reaches image rows only, and the adapter never leaves the autograd graph."""
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

from plora import PLoRALinear


def make_layer(dropout=0.0, bias=True):
    """A layer whose adapter is not zero, so that its delta shows."""
    torch.manual_seed(0)
    layer = PLoRALinear(6, 5, r=3, alpha=12, dropout=dropout, bias=bias)
    nn.init.normal_(layer.lora_B)
    return layer


def make_input():
    torch.manual_seed(1)
    is_image = torch.tensor([[True, False, True, False], [False, False, True, True]])
    return torch.randn(2, 4, 6), is_image


@pytest.mark.parametrize("a, b", [(1.5, 1.5), (1e30, 1e30), (3e38, 3e38), (float("inf"), 1.5), (float("nan"), 1.5)])
def test_text_rows_are_bit_identical_with_any_A_and_any_finite_B(a, b):
    layer, (x, is_image) = make_layer(), make_input()
    nn.init.constant_(layer.lora_A, a)
    nn.init.constant_(layer.lora_B, b)
    y = layer(x, is_image)
    assert torch.equal(y[~is_image], F.linear(x, layer.weight, layer.bias)[~is_image])
    assert not torch.equal(y[is_image], F.linear(x, layer.weight, layer.bias)[is_image])


@pytest.mark.parametrize("bias", [True, False])
def test_without_a_mask_it_is_the_plain_linear_bit_for_bit(bias):
    layer, (x, _) = make_layer(bias=bias), make_input()
    nn.init.constant_(layer.lora_B, float("nan"))
    plain = nn.Linear(6, 5, bias=bias)
    plain.load_state_dict({name: value for name, value in layer.state_dict().items() if "lora" not in name})
    assert torch.equal(layer(x), plain(x))
    layer(x).sum().backward()
    assert layer.lora_A.grad is None and layer.lora_B.grad is None


def test_a_fresh_adapter_changes_nothing():
    torch.manual_seed(0)
    layer, (x, is_image) = PLoRALinear(6, 5, r=3, alpha=12, bias=True), make_input()
    assert torch.equal(layer(x, is_image), layer(x))


def test_a_fresh_adapter_still_learns():
    layer, (x, is_image) = PLoRALinear(6, 5, r=3, alpha=12), make_input()
    layer(x, is_image).sum().backward()
    assert layer.lora_B.grad.abs().sum() > 0


def test_image_rows_equal_a_slow_reference():
    layer, (x, is_image) = make_layer(), make_input()
    y = layer(x, is_image)
    for b, t in is_image.nonzero().tolist():
        delta = layer.lora_B @ (layer.lora_A @ x[b, t])
        expected = layer.weight @ x[b, t] + layer.bias + 12 / 3 * delta
        torch.testing.assert_close(y[b, t], expected)


def test_a_batch_without_images_gives_the_adapter_a_gradient_of_exactly_zero():
    layer, (x, is_image) = make_layer(dropout=0.5), make_input()
    layer(x, torch.zeros_like(is_image)).square().sum().backward()
    for gradient in (layer.lora_A.grad, layer.lora_B.grad):
        assert gradient is not None and torch.count_nonzero(gradient) == 0
    assert layer.weight.grad.abs().sum() > 0


def test_text_rows_leave_no_trace_in_the_gradient_of_the_adapter():
    layer, (x, is_image) = make_layer(), make_input()
    layer(x, is_image).square().sum().backward()
    gradient = layer.lora_A.grad.clone()
    layer.zero_grad()
    layer(torch.where(is_image[..., None], x, x + 100), is_image).square().sum().backward()
    torch.testing.assert_close(layer.lora_A.grad, gradient)


def test_dropout_touches_the_delta_only_and_only_in_training():
    layer, (x, is_image) = make_layer(dropout=0.5), make_input()
    plain = layer(x)
    first, second = layer(x, is_image), layer(x, is_image)
    assert torch.equal(first[~is_image], plain[~is_image])
    assert not torch.equal(first[is_image], second[is_image])
    layer.eval()
    assert torch.equal(layer(x, is_image), layer(x, is_image))


def test_dropout_keeps_the_expected_delta():
    layer, (x, is_image) = make_layer(dropout=0.5), make_input()
    many = layer(x.expand(20_000, 2, 4, 6), is_image.expand(20_000, 2, 4)).mean(dim=0)
    torch.testing.assert_close(many, layer.eval()(x, is_image), atol=0.2, rtol=0)


@pytest.mark.parametrize("shape", [(2, 3), (2,), (2, 4, 1), (1, 4), (2, 4, 6)])
def test_a_mask_of_another_shape_raises(shape):
    layer, (x, _) = make_layer(), make_input()
    with pytest.raises(ValueError, match="is_image"):
        layer(x, torch.ones(shape, dtype=torch.bool))


@pytest.mark.parametrize("r", [0, -1])
def test_a_rank_below_one_raises(r):
    with pytest.raises(ValueError, match=f"got {r}"):
        PLoRALinear(6, 5, r=r, alpha=1)


def test_no_shape_depends_on_the_mask():
    # Tensors on the meta device hold no data: whatever looks at a value fails there.
    layer = PLoRALinear(6, 5, r=3, alpha=12).to("meta")
    x, is_image = torch.empty(2, 4, 6, device="meta"), torch.empty(2, 4, dtype=torch.bool, device="meta")
    assert layer(x, is_image).shape == (2, 4, 5)


def test_vmap_over_the_mask_equals_a_loop():
    layer, (x, _) = make_layer(), make_input()
    masks = torch.rand(7, 2, 4) < 0.5
    looped = torch.stack([layer(x, is_image) for is_image in masks])
    torch.testing.assert_close(torch.func.vmap(lambda is_image: layer(x, is_image))(masks), looped)


def test_reset_parameters_initialises_every_parameter():
    layer = make_layer()
    for parameter in layer.parameters():
        nn.init.constant_(parameter, float("nan"))
    layer.reset_parameters()
    assert all(parameter.isfinite().all() for parameter in layer.parameters())
    assert layer.lora_A.abs().sum() > 0 and torch.count_nonzero(layer.lora_B) == 0


@pytest.mark.filterwarnings("ignore")
def test_it_is_captured_whole_and_one_graph_serves_any_share_of_image_rows():
    layer, (x, is_image), counter = make_layer(), make_input(), CompileCounter()
    captured = torch.compile(layer, fullgraph=True, backend=counter)              # raises where a graph would break
    for mask in (is_image, torch.zeros_like(is_image), torch.ones_like(is_image)):
        assert torch.equal(captured(x, mask), layer(x, mask))
    assert counter.frame_count == 1
