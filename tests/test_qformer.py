"""Q-Former: who reads whom, what the three losses are, and what is left without the text branch."""
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qformer import Attention, QFormer, attend, attention_mask

Q = 3


def make_qformer(n_layers=3, **options):
    """A tiny Q-Former in eval mode whose every parameter is random, biases and norms too."""
    torch.manual_seed(0)
    settings = dict(n_heads=2, n_queries=Q, encoder_width=10, vocab_size=30, max_text_len=8, itc_dim=4)
    model = QFormer(16, n_layers, **(settings | options))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model.eval()


def make_batch(B=2):
    """Image features (B, 5, 10), text (B, 4) without padding, which is id 0."""
    torch.manual_seed(1)
    return torch.randn(B, 5, 10), torch.randint(1, 30, (B, 4))


# ---- Structure ------------------------------------------------------------------------------------

def test_only_every_second_block_has_cross_attention():
    model = make_qformer(n_layers=5)
    assert [block.cross_attention is not None for block in model.blocks] == [True, False, True, False, True]
    model = make_qformer(n_layers=4, cross_attention_every=3)
    assert [block.cross_attention is not None for block in model.blocks] == [True, False, False, True]


@pytest.mark.parametrize("masked", [False, True])
def test_attention_equals_that_of_torch(masked):
    torch.manual_seed(0)
    ours, theirs = Attention(16, 4, kv_dim=10, dropout=0.0), nn.MultiheadAttention(
        16, 4, kdim=10, vdim=10, batch_first=True)
    theirs.load_state_dict({
        "q_proj_weight": ours.q_proj.weight, "k_proj_weight": ours.k_proj.weight,
        "v_proj_weight": ours.v_proj.weight, "out_proj.weight": ours.out_proj.weight,
        "in_proj_bias": torch.cat([ours.q_proj.bias, ours.k_proj.bias, ours.v_proj.bias]),
        "out_proj.bias": ours.out_proj.bias})
    x, source = torch.randn(2, 3, 16), torch.randn(2, 5, 10)
    may_read = torch.tensor([[1, 1, 0, 0, 1], [0, 1, 0, 0, 0], [1, 1, 1, 1, 1]]).bool() if masked else None
    expected, _ = theirs(x, source, source, attn_mask=~may_read if masked else None)
    torch.testing.assert_close(ours(x, source, may_read), expected)


def test_attend_is_a_softmax_and_keeps_the_type_of_its_input():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 4, 8)
    expected = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(8), dim=-1) @ v
    torch.testing.assert_close(attend(q, k, v), expected)
    with torch.autocast("cpu", torch.bfloat16):
        low = attend(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), expected, atol=0.03, rtol=0.03)


def test_every_row_leaves_a_block_normalised():
    model, (image, text) = make_qformer(), make_batch()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.reset_parameters()
    rows = model.encode(image, text)
    torch.testing.assert_close(rows.mean(dim=-1), torch.zeros(2, Q + 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(rows.var(dim=-1, unbiased=False), torch.ones(2, Q + 4), atol=1e-3, rtol=0)


def test_queries_and_text_have_feed_forward_networks_of_their_own():
    model, (image, text) = make_qformer(n_layers=1), make_batch()
    model.encode(image, text)[:, :Q].sum().backward()
    assert all(parameter.grad is None or torch.count_nonzero(parameter.grad) == 0
               for parameter in model.blocks[0].text_ffn.parameters())
    model.zero_grad()
    model.encode(image, text)[:, Q:].sum().backward()
    assert all(torch.count_nonzero(parameter.grad) == 0
               for parameter in model.blocks[0].query_ffn.parameters())


def test_text_rows_do_not_pass_through_cross_attention():
    model, (image, text) = make_qformer(n_layers=1), make_batch()
    # In a single block text meets the queries before they have read the image, so it cannot know it.
    assert torch.equal(model.encode(image, text)[:, Q:], model.encode(image + 1, text)[:, Q:])
    assert not torch.allclose(model.encode(image, text)[:, :Q], model.encode(image + 1, text)[:, :Q])


@pytest.mark.parametrize("n_patches", [1, 2, 7, 50])
def test_any_number_of_patches_in_any_order_gives_the_same_number_of_rows(n_patches):
    model, features = make_qformer(), torch.randn(2, n_patches, 10)
    rows = model(features)
    assert rows.shape == (2, Q, 16)
    # Attention is a weighted mean over patches: their order and a second copy of all of them change nothing.
    torch.testing.assert_close(model(features.flip(1)), rows)
    torch.testing.assert_close(model(features.repeat(1, 2, 1)), rows)


def test_images_of_a_batch_do_not_see_each_other():
    model, (image, _) = make_qformer(), make_batch(B=3)
    torch.testing.assert_close(model(image), torch.cat([model(image[i:i + 1]) for i in range(3)]))


def test_heads_that_do_not_divide_the_width_raise():
    with pytest.raises(ValueError, match="multiple of n_heads"):
        QFormer(16, 1, 3, Q, 10)


@pytest.mark.parametrize("vocab_size", [0, 30])
def test_reset_parameters_initialises_every_parameter(vocab_size):
    model = make_qformer(vocab_size=vocab_size)
    for parameter in model.parameters():
        nn.init.constant_(parameter, float("nan"))
    model.reset_parameters()
    assert [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()] == []
    assert model.query_tokens.std() > 0.01                    # equal queries would stay equal for ever


# ---- Masks ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind, rows", [
    ("separate", ["11000", "11000", "00111", "00111", "00111"]),
    ("joint", ["11111", "11111", "11111", "11111", "11111"]),
    ("causal", ["11000", "11000", "11100", "11110", "11111"])])
def test_mask_equals_the_one_written_by_hand(kind, rows):
    expected = [[mark == "1" for mark in row] for row in rows]
    assert attention_mask(kind, n_queries=2, n_text=3).tolist() == expected


def test_an_unknown_mask_raises():
    with pytest.raises(ValueError, match="'both'.*separate.*joint.*causal"):
        attention_mask("both", 2, 3)


def test_text_cannot_move_the_queries_under_the_causal_mask():
    model, (image, text) = make_qformer(), make_batch()
    queries = model.encode(image, text, "causal")[:, :Q]
    assert torch.equal(queries, model.encode(image, text.flip(1), "causal")[:, :Q])
    torch.testing.assert_close(queries, model(image))


@pytest.mark.parametrize("position", [1, 2, 3])
def test_later_text_cannot_move_earlier_outputs_under_the_causal_mask(position):
    model, (image, text) = make_qformer(), make_batch()
    other = text.clone()
    other[:, position] = text[:, position] % 29 + 1
    before, after = model.encode(image, text, "causal"), model.encode(image, other, "causal")
    torch.testing.assert_close(before[:, :Q + position], after[:, :Q + position])
    assert not torch.allclose(before[:, Q + position], after[:, Q + position])


def test_the_two_sides_do_not_see_each_other_under_the_separate_mask():
    model, (image, text) = make_qformer(), make_batch()
    alone = torch.cat([model(image), model.encode(text=text)], dim=1)
    torch.testing.assert_close(model.encode(image, text, "separate"), alone)


def test_both_sides_see_each_other_under_the_joint_mask():
    model, (image, text) = make_qformer(), make_batch()
    rows, other_text = model.encode(image, text, "joint"), model.encode(image, text.flip(0), "joint")
    assert not torch.allclose(rows[:, :Q], other_text[:, :Q])
    assert not torch.allclose(rows[:, Q:], model.encode(image.flip(0), text, "joint")[:, Q:])


@pytest.mark.parametrize("kind", ["separate", "joint", "causal"])
def test_padding_changes_no_row(kind):
    model, (image, text) = make_qformer(), make_batch()
    padded = F.pad(text, (0, 3))
    rows = model.encode(image, text, kind)
    torch.testing.assert_close(model.encode(image, padded, kind)[:, :Q + 4], rows)
    torch.testing.assert_close(model.encode(text=padded)[:, :4], model.encode(text=text))


# ---- Positions ------------------------------------------------------------------------------------

def test_queries_have_no_position():
    model, (image, text) = make_qformer(), make_batch()
    rows, order = model.encode(image, text), [2, 0, 1]
    model.query_tokens.data = model.query_tokens.data[:, order]
    swapped = model.encode(image, text)
    torch.testing.assert_close(swapped[:, :Q], rows[:, order])
    torch.testing.assert_close(swapped[:, Q:], rows[:, Q:])


@pytest.mark.parametrize("with_image", [False, True])
def test_text_positions_start_at_0_with_or_without_queries(with_image):
    model, (image, text) = make_qformer(), make_batch()
    image = image if with_image else None
    rows = model.encode(image, text)
    model.position_embedding.weight.data[4:] *= -1            # the text has 4 tokens: 0, 1, 2, 3
    assert torch.equal(model.encode(image, text), rows)
    for position in range(4):
        model.position_embedding.weight.data[position] = torch.randn(16)
        moved = model.encode(image, text)
        assert not torch.allclose(moved, rows)
        rows = moved


def test_text_that_is_too_long_raises():
    with pytest.raises(ValueError, match="9 tokens.*max_text_len 8"):
        make_qformer().encode(text=torch.ones(1, 9, dtype=torch.long))


# ---- Losses ---------------------------------------------------------------------------------------

def test_similarity_is_the_best_cosine_divided_by_the_temperature(monkeypatch):
    model = make_qformer(itc_dim=2)
    monkeypatch.setattr(model, "itc_image", nn.Identity())
    monkeypatch.setattr(model, "itc_text", nn.Identity())
    # The summary token is the first; the second row of each text must not count.
    texts = torch.tensor([[[3.0, 0.0], [9.0, 9.0]], [[6.0, 8.0], [9.0, 9.0]]])
    monkeypatch.setattr(model, "encode", lambda text: texts)
    images = torch.tensor([[[2.0, 0.0], [-1.0, 0.0]], [[0.0, -1.0], [0.0, 5.0]]])
    model.temperature.data.fill_(0.1)
    # Cosines by hand: image 0 points along x, image 1 along y; text 1 is (0.6, 0.8).
    torch.testing.assert_close(model.similarity(images, None), torch.tensor([[10.0, 6.0], [0.0, 8.0]]))


def test_similarity_of_a_pair_does_not_depend_on_the_rest_of_the_batch():
    model, (image, text) = make_qformer(), make_batch(B=3)
    model.temperature.data.fill_(0.07)
    whole = model.similarity(model(image), text)
    for i in range(3):
        for j in range(3):
            one = model.similarity(model(image[i:i + 1]), text[j:j + 1])
            torch.testing.assert_close(whole[i, j], one[0, 0])


def test_itc_loss_equals_the_one_worked_by_hand():
    loss = make_qformer().itc_loss(torch.tensor([[2.0, 0.0], [1.0, 3.0]]))
    # Rows: 2 against 0, 3 against 1. Columns: 2 against 1, 3 against 0.
    rows = math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-2))
    columns = math.log(1 + math.exp(-1)) + math.log(1 + math.exp(-3))
    assert loss.item() == pytest.approx((rows / 2 + columns / 2) / 2, abs=1e-6)


def record_pairs(model, monkeypatch):
    """Let `encode` note the images and texts that it is given."""
    calls, encode = [], model.encode
    monkeypatch.setattr(model, "encode", lambda *inputs: calls.append(inputs) or encode(*inputs))
    return calls


def test_itm_never_draws_the_true_pair_as_a_wrong_one(monkeypatch):
    model, (image, text) = make_qformer(), make_batch()
    calls = record_pairs(model, monkeypatch)
    for _ in range(5):                                        # the true pairs are by far the most alike
        model.itm_loss(image, text, 100 * torch.eye(2))
    for images, texts, kind in calls:
        assert kind == "joint"
        # With two samples just one choice is left: the other one.
        assert torch.equal(images, image[[0, 1, 1, 0, 0, 1]])
        assert torch.equal(texts, text[[0, 1, 0, 1, 1, 0]])


def test_itm_draws_the_most_similar_wrong_pair(monkeypatch):
    model, (image, text) = make_qformer(), make_batch(B=3)
    calls = record_pairs(model, monkeypatch)
    alike = torch.tensor([[0.0, 0.0, 99.0], [99.0, 0.0, 0.0], [0.0, 99.0, 0.0]])
    model.itm_loss(image, text, alike)
    images, texts, _ = calls[0]
    assert torch.equal(images[3:6], image[[1, 2, 0]])         # the best other image of each text: columns
    assert torch.equal(texts[6:9], text[[2, 0, 1]])           # the best other text of each image: rows


def test_itm_loss_counts_one_right_pair_in_three():
    model, (image, text) = make_qformer(), make_batch()
    nn.init.zeros_(model.itm_head.weight)
    model.itm_head.bias.data = torch.tensor([0.0, 2.0])       # it always says "a pair", with odds e^2
    loss = model.itm_loss(image, text, torch.zeros(2, 2))
    right, wrong = math.log(1 + math.exp(-2)), math.log(1 + math.exp(2))
    assert loss.item() == pytest.approx(right / 3 + 2 * wrong / 3, abs=1e-5)


def test_itm_needs_two_samples_and_the_other_losses_need_one():
    model, (image, text) = make_qformer(), make_batch(B=1)
    model.temperature.data.fill_(0.07)
    similarity = model.similarity(model(image), text)
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        model.itm_loss(image, text, similarity)
    assert model.itc_loss(similarity).item() == 0             # nothing to mistake it for
    loss, queries = model.itg_loss(image, text)
    assert loss.isfinite() and queries.shape == (1, Q, 16)


def test_itg_loss_equals_a_slow_reference_and_skips_padding():
    model, (image, text) = make_qformer(), make_batch()
    text[1, 2:] = 0
    loss, queries = model.itg_loss(image, text)
    losses = []
    for b, length in enumerate([4, 2]):
        for t in range(length - 1):                           # only what was read so far is there
            rows = model.encode(image[b:b + 1], text[b:b + 1, :t + 1], "causal")
            losses.append(-model.lm_head(rows[0, -1]).log_softmax(dim=-1)[text[b, t + 1]])
    torch.testing.assert_close(loss, torch.stack(losses).mean())
    torch.testing.assert_close(queries, model(image))


def test_every_parameter_learns_from_the_three_losses_together():
    model, (image, text) = make_qformer(), make_batch()
    model.temperature.data.fill_(0.07)
    image.requires_grad_()
    loss, queries = model.itg_loss(image, text)
    similarity = model.similarity(queries, text)
    loss = loss + model.itc_loss(similarity) + model.itm_loss(image, text, similarity)
    loss.backward()
    assert [name for name, parameter in model.named_parameters()
            if parameter.grad is None or torch.count_nonzero(parameter.grad) == 0] == []
    assert image.grad.abs().sum() > 0                         # so the image encoder can learn too


def test_generation_never_asks_for_what_leaves_the_last_block():
    model, (image, text) = make_qformer(), make_batch()
    model.itg_loss(image, text)[0].backward()
    asked = {name.split(".")[1] for name, parameter in model.named_parameters()
             if "query_ffn." in name and parameter.grad is not None and parameter.grad.any()}
    assert asked == {"0", "1"}                                # text reads the queries on their way into 1 and 2


# ---- Without the text branch ----------------------------------------------------------------------

def test_dropping_the_text_branch_leaves_forward_bit_identical():
    model, (image, text) = make_qformer(), make_batch()
    rows = model(image)
    model.drop_text_branch()
    assert torch.equal(model(image), rows)
    with pytest.raises(ValueError, match="no text branch"):
        model.encode(image, text)


def test_dropping_the_text_branch_leaves_exactly_what_the_queries_use():
    model, (image, _) = make_qformer(), make_batch()
    model.drop_text_branch()
    names = set(model.state_dict())
    assert names == set(make_qformer(vocab_size=0).state_dict())
    model(image).square().sum().backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == names
