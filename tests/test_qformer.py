"""Q-Former: which token attends to which, the three losses, and what is left without text."""
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qformer import QFormer, QFormerBlock, attention_mask

Q = 3


def make_qformer(n_layers=3, **options):
    """A tiny Q-Former in eval mode whose every parameter is random, biases and norms too."""
    torch.manual_seed(0)
    settings = dict(n_heads=2, n_queries=Q, encoder_width=10, vocab_size=30, max_text_len=8,
                    itc_dim=4)
    model = QFormer(16, n_layers, **(settings | options))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model.eval()


def make_batch(B=2):
    """Image features (B, 5, 10), text (B, 4) without padding, which is id 0."""
    torch.manual_seed(1)
    return torch.randn(B, 5, 10), torch.randint(1, 30, (B, 4))


def test_queries_pass_through_a_block_as_through_the_post_ln_decoder_layer_of_torch():
    torch.manual_seed(0)
    ours = QFormerBlock(16, 4, 24, dropout=0.0, encoder_width=16, has_text=True)
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.4)
    theirs = nn.TransformerDecoderLayer(16, 4, 24, dropout=0.0, activation="gelu", batch_first=True)
    state, renamed = ours.state_dict(), {}
    names = {"self_attn.out_proj": "self_attention.out_proj", "norm1": "self_attention_norm",
             "multihead_attn.out_proj": "cross_attention.out_proj", "norm2": "cross_attention_norm",
             "linear1": "query_ffn.0", "linear2": "query_ffn.2", "norm3": "query_ffn_norm"}
    for kind in ("weight", "bias"):
        renamed |= {f"{their}.{kind}": state[f"{our}.{kind}"] for their, our in names.items()}
        for their, our in (("self_attn", "self_attention"), ("multihead_attn", "cross_attention")):
            projections = [state[f"{our}.{part}_proj.{kind}"] for part in "qkv"]
            renamed[f"{their}.in_proj_{kind}"] = torch.cat(projections)
    theirs.load_state_dict(renamed)
    x, image = torch.randn(2, Q, 16), torch.randn(2, 5, 16)
    torch.testing.assert_close(ours(x, Q, image, None), theirs(x, image))


@pytest.mark.parametrize("every, blocks", [(2, [0, 2, 4]), (3, [0, 3])])
def test_only_every_nth_block_has_cross_attention(every, blocks):
    model = make_qformer(n_layers=5, cross_attention_every=every)
    assert [i for i, block in enumerate(model.blocks) if block.cross_attention] == blocks


@pytest.mark.parametrize("mask_kind, lines", [
    ("separate", ["11000", "11000", "00111", "00111", "00111"]),
    ("joint", ["11111", "11111", "11111", "11111", "11111"]),
    ("causal", ["11000", "11000", "11100", "11110", "11111"])])
def test_mask_equals_the_one_written_by_hand(mask_kind, lines):
    expected = [[mark == "1" for mark in line] for line in lines]
    assert attention_mask(mask_kind, n_queries=2, n_text=3).tolist() == expected


def test_queries_and_text_attend_to_each_other_under_the_joint_mask_not_the_separate_one():
    model, (image, text) = make_qformer(), make_batch()
    alone = torch.cat([model(image), model(text=text)], dim=1)
    torch.testing.assert_close(model(image, text, "separate"), alone)
    joint = model(image, text, "joint")
    assert not torch.isclose(joint, alone, atol=1e-3).all(dim=-1).any()


@pytest.mark.parametrize("mask_kind", ["separate", "joint", "causal"])
def test_padding_changes_no_other_token(mask_kind):
    model, (image, text) = make_qformer(), make_batch()
    padded = F.pad(text, (0, 3))
    for images in (image, None):
        tokens = model(images, text, mask_kind)
        again = model(images, padded, mask_kind)[:, :tokens.shape[1]]
        torch.testing.assert_close(again, tokens)


@pytest.mark.parametrize("with_image", [False, True])
def test_text_positions_start_at_0_with_or_without_queries(with_image):
    model, (image, text) = make_qformer(), make_batch()
    model(image if with_image else None, text).square().sum().backward()
    used = model.position_embedding.weight.grad.abs().sum(dim=1) > 0
    assert used.tolist() == [True] * 4 + [False] * 4  # the text has 4 tokens: 0, 1, 2, 3


@pytest.mark.parametrize("ask, message", [
    (lambda: make_qformer(n_heads=3), "dim 16 must be a multiple of n_heads 3"),
    (lambda: make_qformer().itm_loss(*make_batch(1), torch.ones(1, 1)), "2 samples, got 1"),
    (lambda: attention_mask("both", 2, 3), "'both'.*separate.*joint.*causal")])
def test_what_cannot_work_raises_and_says_why(ask, message):
    with pytest.raises(ValueError, match=message):
        ask()


def test_similarity_is_the_best_cosine_divided_by_the_temperature(monkeypatch):
    model = make_qformer(itc_dim=2)
    monkeypatch.setattr(model, "itc_image", nn.Identity())
    monkeypatch.setattr(model, "itc_text", nn.Identity())
    # The summary token is the first; the second token of each text must not count.
    texts = torch.tensor([[[3.0, 0.0], [9.0, 9.0]], [[6.0, 8.0], [9.0, 9.0]]])
    monkeypatch.setattr(model, "forward", lambda text, mask_kind: texts)
    images = torch.tensor([[[2.0, 0.0], [-1.0, 0.0]], [[0.0, -1.0], [0.0, 5.0]]])
    model.temperature.data.fill_(0.1)
    # Cosines by hand: image 0 points along x, image 1 along y; text 1 is (0.6, 0.8).
    expected = torch.tensor([[10.0, 6.0], [0.0, 8.0]])
    torch.testing.assert_close(model.similarity(images, None), expected)


def test_itc_loss_equals_the_one_worked_by_hand():
    loss = make_qformer().itc_loss(torch.tensor([[2.0, 0.0], [1.0, 3.0]]))
    # Texts of an image: 2 against 0, 3 against 1. Images of a text: 2 against 1, 3 against 0.
    texts = math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-2))
    images = math.log(1 + math.exp(-1)) + math.log(1 + math.exp(-3))
    assert loss.item() == pytest.approx((texts / 2 + images / 2) / 2, abs=1e-6)


def test_itm_draws_the_most_similar_wrong_pairs_and_never_the_true_one(monkeypatch):
    model, (image, text) = make_qformer(), make_batch(B=3)
    calls, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda *inputs: calls.append(inputs) or forward(*inputs))
    similarity = torch.tensor([[0.0, -200, -99], [-99, 0.0, -200], [-200, -99, 0.0]])
    model.itm_loss(image, text, similarity)
    [(images, texts, mask_kind)] = calls
    assert mask_kind == "joint"
    assert torch.equal(images, torch.cat([image, image[[1, 2, 0]], image]))  # columns
    assert torch.equal(texts, torch.cat([text, text, text[[2, 0, 1]]]))  # lines


def test_itm_loss_counts_one_right_pair_in_three():
    model, (image, text) = make_qformer(), make_batch()
    nn.init.zeros_(model.itm_head.weight)
    model.itm_head.bias.data = torch.tensor([0.0, 2.0])  # it always says "a pair", with odds e^2
    loss = model.itm_loss(image, text, torch.zeros(2, 2))
    right, wrong = math.log(1 + math.exp(-2)), math.log(1 + math.exp(2))
    assert loss.item() == pytest.approx(right / 3 + 2 * wrong / 3, abs=1e-5)


def test_itm_loss_of_numbers_that_have_blown_up_is_nan():
    image, text = make_batch()
    assert make_qformer().itm_loss(image * math.nan, text, torch.full((2, 2), math.nan)).isnan()


def test_itg_loss_equals_a_slow_reference_and_skips_padding():
    model, (image, text) = make_qformer(), make_batch()
    text[1, 2:] = 0
    loss, queries = model.itg_loss(image, text, text.masked_fill(text == 0, -100))
    losses = []
    for b, length in enumerate([4, 2]):
        for t in range(length - 1):  # later tokens are not even there
            tokens = model(image[b:b + 1], text[b:b + 1, :t + 1], "causal")
            losses.append(-model.lm_head(tokens[0, -1]).log_softmax(dim=-1)[text[b, t + 1]])
    torch.testing.assert_close(loss, torch.stack(losses).mean())
    torch.testing.assert_close(queries, model(image))


def test_itg_trains_nothing_that_the_queries_become_in_the_last_block():
    model, (image, text) = make_qformer(), make_batch()
    model.itg_loss(image, text, labels=text)[0].backward()
    trained = {name.split(".")[0] for name, parameter in model.blocks[-1].named_parameters()
               if parameter.grad is not None and parameter.grad.any()}
    assert trained == {"self_attention", "self_attention_norm", "text_ffn", "text_ffn_norm"}


def test_without_the_text_half_a_trained_one_keeps_exactly_what_its_queries_use():
    whole, half, (image, _) = make_qformer(), make_qformer(vocab_size=0), make_batch()
    half.load_state_dict(whole.state_dict(), strict=False)
    queries = whole(image)
    assert torch.equal(half(image), queries)
    queries.square().sum().backward()
    used = {name for name, parameter in whole.named_parameters() if parameter.grad is not None}
    assert set(half.state_dict()) == used
