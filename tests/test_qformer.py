"""Q-Former: which token attends to which, the three losses, and what is left without text."""
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qformer import QFormer, attention_mask

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


def test_only_every_nth_block_has_cross_attention():
    blocks = make_qformer(n_layers=5, cross_attention_every=3).blocks
    assert [i for i, block in enumerate(blocks) if block.cross_attention] == [0, 3]


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
    assert not torch.isclose(model(image, text, "joint"), alone, atol=1e-3).all(dim=-1).any()


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


@pytest.mark.parametrize("autocast", [False, True])
def test_similarity_is_the_best_cosine_divided_by_the_temperature_also_under_autocast(autocast):
    model, (image, text) = make_qformer(), make_batch(B=8)
    model.temperature.data.fill_(0.01)  # it magnifies each rounding error a hundred times
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        queries, cls = model(image), model(text=text, mask_kind="separate")[:, 0]
        similarity = model.similarity(queries, text)
        images, texts = model.itc_image(queries), model.itc_text(cls)
    for i in range(8):
        cosines = F.cosine_similarity(images[i, None].double(), texts[:, None].double(), dim=-1)
        expected = cosines.amax(dim=1) / 0.01  # of (8 texts, 3 queries)
        torch.testing.assert_close(similarity[i].double(), expected, rtol=0, atol=1e-4)


def test_itc_loss_equals_the_one_worked_by_hand():
    loss = make_qformer().itc_loss(torch.tensor([[2.0, 0.0], [1.0, 3.0]]))
    # Texts of an image: 2 against 0, 3 against 1. Images of a text: 2 against 1, 3 against 0.
    texts = math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-2))
    images = math.log(1 + math.exp(-1)) + math.log(1 + math.exp(-3))
    assert loss.item() == pytest.approx((texts / 2 + images / 2) / 2, abs=1e-6)


def test_itm_loss_equals_a_slow_reference_with_the_most_similar_wrong_pairs():
    model, (image, text) = make_qformer(), make_batch(B=3)
    similarity = torch.tensor([[0.0, -200, -99], [-99, 0.0, -200], [-200, -99, 0.0]])
    wrong_text, wrong_image = [2, 0, 1], [1, 2, 0]  # by lines, by columns; never the true one
    losses = []
    for i in range(3):
        for a, b, is_pair in ((i, i, 1), (wrong_image[i], i, 0), (i, wrong_text[i], 0)):
            queries = model(image[a, None], text[b, None], "joint")[0, :Q]
            votes = model.itm_head(queries).mean(dim=0)
            losses.append(-votes.log_softmax(dim=0)[is_pair])
    expected = torch.stack(losses).mean()
    torch.testing.assert_close(model.itm_loss(image, text, similarity), expected)


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


def test_without_the_text_half_a_trained_one_keeps_exactly_what_its_queries_use():
    whole, half, (image, _) = make_qformer(), make_qformer(vocab_size=0), make_batch()
    half.load_state_dict(whole.state_dict(), strict=False)
    queries = whole(image)
    assert torch.equal(half(image), queries)
    queries.square().sum().backward()
    used = {name for name, parameter in whole.named_parameters() if parameter.grad is not None}
    assert set(half.state_dict()) == used
