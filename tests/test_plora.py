"""PLoRALinear: the delta reaches image tokens only, the adapter stays in the autograd graph."""
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

from plora import PLoRALinear


def make_layer(**options):
    """A layer whose adapter is not zero, so that its delta shows."""
    torch.manual_seed(0)
    layer = PLoRALinear(6, 5, **(dict(r=3, alpha=12) | options))
    nn.init.normal_(layer.lora_B)
    return layer


def make_input():
    torch.manual_seed(1)
    is_image = torch.tensor([[True, False, True, False], [False, False, True, True]])
    return torch.randn(2, 4, 6), is_image


@pytest.mark.parametrize("a, b", [(1.5, 1.5), (3e38, 3e38), (float("nan"), 1.5)])
def test_text_tokens_are_bit_identical_with_any_A_and_any_finite_B(a, b):
    layer, (x, is_image) = make_layer(), make_input()
    nn.init.constant_(layer.lora_A, a)
    nn.init.constant_(layer.lora_B, b)
    plain, y = F.linear(x, layer.weight, layer.bias), layer(x, is_image)
    assert torch.equal(y[~is_image], plain[~is_image])
    assert not torch.equal(y[is_image], plain[is_image])


@pytest.mark.parametrize("options", [{}, {"bias": False}])
def test_without_a_mask_it_is_the_plain_linear_and_leaves_the_adapter_alone(options):
    layer, (x, _) = make_layer(**options), make_input()
    assert (layer.bias is None) == (nn.Linear(6, 5, **options).bias is None)
    nn.init.constant_(layer.lora_B, float("nan"))
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    layer(x).sum().backward()
    assert layer.lora_A.grad is None and layer.lora_B.grad is None


def test_a_fresh_adapter_changes_nothing_and_yet_gets_a_gradient():
    layer, (x, is_image) = PLoRALinear(6, 5, r=3, alpha=12), make_input()
    assert torch.equal(layer(x, is_image), layer(x))
    layer(x, is_image).sum().backward()
    assert layer.lora_B.grad.abs().sum() > 0


def test_image_tokens_equal_a_slow_reference_and_text_tokens_give_adapters_a_gradient_of_zero():
    layer, (x, is_image) = make_layer(), make_input()
    y = layer(x, is_image)
    for b, t in is_image.nonzero().tolist():
        delta = layer.lora_B @ (layer.lora_A @ x[b, t])
        expected = layer.weight @ x[b, t] + layer.bias + 12 / 3 * delta
        torch.testing.assert_close(y[b, t], expected)
    y[~is_image].square().sum().backward()
    assert not layer.lora_A.grad.any() and not layer.lora_B.grad.any()


def test_only_a_trainable_adapter_in_training_drops_and_only_from_its_delta():
    layer, (x, is_image) = make_layer(dropout=0.5), make_input()
    first, second = layer(x, is_image), layer(x, is_image)
    assert torch.equal(first[~is_image], layer(x)[~is_image])
    assert not torch.equal(first[is_image], second[is_image])
    layer.lora_A.requires_grad_(False)  # while the linear around it trains
    frozen = layer(x, is_image)
    layer.eval().requires_grad_(True)
    assert torch.equal(frozen, layer(x, is_image))


@pytest.mark.parametrize("shape, r, message", [
    ((1, 4), 3, r"is_image.*\(2, 4\).*\(1, 4\)"), ((2, 4), 0, "rank r of at least 1, got 0")])
def test_what_cannot_work_raises_and_says_why(shape, r, message):
    with pytest.raises(ValueError, match=message):
        make_layer(r=r)(make_input()[0], torch.ones(shape, dtype=torch.bool))


@pytest.mark.filterwarnings("ignore")
def test_it_is_captured_whole_and_one_graph_serves_any_share_of_image_tokens():
    layer, (x, is_image), counter = make_layer(), make_input(), CompileCounter()
    captured = torch.compile(layer, fullgraph=True, backend=counter)  # raises where a graph breaks
    for mask in (is_image, torch.zeros_like(is_image), torch.ones_like(is_image)):
        assert torch.equal(captured(x, mask), layer(x, mask))
    assert counter.frame_count == 1
