"""ViT, projector, decoder and the whole: who reads whom, what stays untouched, and cached generation."""
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from model import (GPT, MLLM, PARTS, DropPath, GPTAttention, ModelConfig, PatchMerge, QuickGELU, ViT, ViTBlock,
                   make_projector, part_of, pick_token, rotate, rotation)

Q, IMAGE, V = 3, 1, 40                                        # rows an image takes, placeholder id, ids
PICTURE = [IMAGE] * Q
NEVER = V                                                     # an id that no model yields: nothing stops


def scramble(module, std=0.4):
    """Make every parameter random: a fresh adapter or residual branch is zero, so it would hide faults."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std)
    return module.eval()


def make_model(**options):
    settings = dict(vocab_size=V, image_size=(8, 8), patch_size=4, vit_dim=16, vit_layers=2, vit_heads=2,
                    qformer_dim=16, qformer_layers=2, qformer_heads=2, n_queries=Q, text_branch=False, dim=16,
                    n_layers=2, n_heads=4, n_kv_heads=2, r=2, alpha=4, max_len=40)
    return scramble(MLLM(ModelConfig(**(settings | options))), std=0.8)


def make_images(N):
    return torch.rand(N, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


def make_vit(**options):
    return scramble(ViT(**(dict(image_size=(8, 12), patch_size=4, dim=16, n_layers=2, n_heads=2) | options)))


def make_gpt(**options):
    return scramble(GPT(**(dict(vocab_size=V, dim=16, n_layers=2, n_heads=4, n_kv_heads=2, r=2) | options)))


def fill_with_nan(module):
    for parameter in module.parameters():
        nn.init.constant_(parameter, float("nan"))


def not_finite(module):
    return [name for name, parameter in module.named_parameters() if not parameter.isfinite().all()]


# ---- ViT ------------------------------------------------------------------------------------------

def test_at_the_original_size_the_position_embedding_is_returned_as_it_is():
    vit = make_vit()
    assert torch.equal(vit.positions((2, 3)), vit.position_embedding)


@pytest.mark.parametrize("class_token", [True, False])
def test_interpolated_positions_keep_rows_columns_and_the_class_token(class_token):
    vit = make_vit(class_token=class_token)
    rows, columns = torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0, 30.0])
    with torch.no_grad():                                     # channels 0-7 know the row, 8-15 the column
        patches = vit.position_embedding[0, class_token:].view(2, 3, 16)
        patches[..., :8], patches[..., 8:] = rows[:, None, None], columns[:, None]
    grown = vit.positions((5, 4))
    assert torch.equal(grown[:, :class_token], vit.position_embedding[:, :class_token])
    grown = grown[0, class_token:].view(5, 4, 16)
    torch.testing.assert_close(grown[..., 0], grown[:, :1, 0].expand(5, 4))
    torch.testing.assert_close(grown[..., 8], grown[:1, :, 8].expand(5, 4))
    assert (grown[1:, 0, 0] > grown[:-1, 0, 0]).all() and (grown[0, 1:, 8] > grown[0, :-1, 8]).all()


def test_patches_stand_in_reading_order_behind_the_class_token():
    vit, image = make_vit(n_layers=0), torch.zeros(1, 3, 8, 20)
    before = vit(image)
    assert before.shape == (1, 1 + 2 * 5, 16)
    image[:, :, 4:8, 12:16] = 1                               # the patch at row 1, column 3 of 5
    changed = (vit(image) != before).any(dim=-1)[0]
    assert changed.nonzero().tolist() == [[1 + 1 * 5 + 3]]


def test_vit_block_equals_that_of_torch():
    ours = scramble(ViTBlock(16, 4, 24, qkv_bias=True, activation="gelu", drop_path_rate=0.0))
    theirs = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, activation="gelu", layer_norm_eps=1e-6,
                                        batch_first=True, norm_first=True)
    names = {"self_attn.in_proj_": "qkv.", "self_attn.out_proj.": "out_proj.", "linear1.": "mlp.0.",
             "linear2.": "mlp.2.", "norm1.": "norm1.", "norm2.": "norm2."}
    state = ours.state_dict()
    theirs.load_state_dict({their + kind: state[our + kind]
                            for their, our in names.items() for kind in ("weight", "bias")})
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(ours(x), theirs(x))


def test_quick_gelu_is_close_to_gelu():
    x = torch.linspace(-4, 4, 100)
    torch.testing.assert_close(QuickGELU()(x), F.gelu(x), atol=0.025, rtol=0)
    assert QuickGELU()(torch.tensor(1.0)).item() == pytest.approx(1 / (1 + math.exp(-1.702)))


@pytest.mark.parametrize("height, width", [(9, 8), (8, 10), (0, 8), (2, 8)])
def test_an_image_that_is_no_whole_number_of_patches_raises(height, width):
    with pytest.raises(ValueError, match=f"patch_size 4, got {height} x {width}"):
        make_vit()(torch.zeros(1, 3, height, width))
    with pytest.raises(ValueError, match=f"patch_size 4, got {height} x {width}"):
        make_vit(image_size=(height, width))


def test_vit_heads_that_do_not_divide_the_width_raise():
    with pytest.raises(ValueError, match="multiple of n_heads"):
        make_vit(n_heads=3)


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for use_grad_checkpoint in (False, True):
        vit = make_vit(use_grad_checkpoint=use_grad_checkpoint, drop_path_rate=0.5).train()
        torch.manual_seed(3)                                  # so that both drop the same paths
        vit(torch.ones(4, 3, 8, 12)).square().sum().backward()
        gradients.append([parameter.grad for parameter in vit.parameters()])
    for plain, checkpointed in zip(*gradients):
        torch.testing.assert_close(plain, checkpointed)


def test_gradient_checkpointing_keeps_the_inside_of_the_blocks_out_of_memory():
    kept = []
    for use_grad_checkpoint in (False, True):
        vit, sizes = make_vit(use_grad_checkpoint=use_grad_checkpoint), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            vit(torch.ones(4, 3, 8, 12))
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 2


def test_drop_path_drops_whole_samples_and_keeps_the_expectation():
    torch.manual_seed(0)
    y = DropPath(0.25)(torch.ones(20_000, 2, 3))
    torch.testing.assert_close(y, y[:, :1, :1].expand_as(y))
    assert y.unique().tolist() == pytest.approx([0, 4 / 3])
    assert y.mean().item() == pytest.approx(1, abs=0.02)


def test_drop_path_is_the_identity_in_eval_mode():
    x = torch.randn(8, 2, 3)
    assert torch.equal(DropPath(0.9).eval()(x), x)
    assert torch.equal(DropPath(0.0)(x), x)


def test_drop_path_grows_from_zero_with_depth():
    vit = make_vit(n_layers=3, drop_path_rate=0.4)
    assert [block.drop_path.rate for block in vit.blocks] == pytest.approx([0, 0.2, 0.4])


# ---- Patch merging --------------------------------------------------------------------------------

@pytest.mark.parametrize("n", [4, 1])
def test_patch_merging_puts_neighbours_side_by_side_and_drops_the_class_token(n):
    features = torch.randn(2, 9, 5)
    rows = PatchMerge(n)(features)
    assert rows.shape == (2, 8 // n, 5 * n)
    for i in range(8 // n):
        assert torch.equal(rows[:, i], torch.cat([features[:, 1 + n * i + j] for j in range(n)], dim=1))
    with pytest.raises(ValueError, match="there are 6"):
        PatchMerge(4)(torch.randn(2, 7, 5))


@pytest.mark.parametrize("connector, n_rows", [("patch-merge", 2), ("patches", 8)])
def test_a_model_without_a_qformer_takes_a_row_for_every_few_patches(connector, n_rows):
    model = make_model(connector=connector, image_size=(8, 16))                   # 2 x 4 patches
    assert model.config.n_rows == n_rows and not list(model.qformer.parameters())
    ids = torch.tensor([[5, *[IMAGE] * n_rows, 7, 8]])
    images = torch.rand(1, 3, 8, 16, requires_grad=True)
    model(ids, images, ids)[1].backward()
    assert (images.grad != 0).all()                           # every pixel is seen
    if connector == "patch-merge":
        with pytest.raises(ValueError, match="4 patches in a row, but an image has 6"):
            make_model(connector=connector, image_size=(8, 12)).config.n_rows
    with pytest.raises(ValueError, match="unknown connector 'mlp'"):
        make_model(connector="mlp")


# ---- Projector ------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind, n_linears", [("linear", 1), ("mlp", 2), ("mlp1x_gelu", 1), ("mlp2x_gelu", 2),
                                             ("mlp3x_gelu", 3)])
def test_projector_equals_its_linears_with_gelu_between_them(kind, n_linears):
    projector = scramble(make_projector(kind, 6, 10))
    linears = [module for module in projector if isinstance(module, nn.Linear)]
    assert len(linears) == n_linears
    x = torch.randn(2, 3, 6)
    expected = x
    for i, linear in enumerate(linears):
        expected = F.linear(F.gelu(expected) if i else expected, linear.weight, linear.bias)
    assert torch.equal(projector(x), expected) and expected.shape == (2, 3, 10)


def test_mlp_projector_takes_a_hidden_width_and_an_activation():
    first, activation, second = projector = scramble(make_projector("mlp", 6, 10, 7, "silu"))
    assert first.out_features == 7
    x = torch.randn(2, 6)
    assert torch.equal(projector(x), second(F.silu(first(x))))


def test_identity_projector_returns_its_input_and_takes_one_width_only():
    x = torch.randn(2, 3, 6)
    assert torch.equal(make_projector("identity", 6, 6)(x), x)
    with pytest.raises(ValueError, match="width 6 to 10"):
        make_projector("identity", 6, 10)


@pytest.mark.parametrize("kind", ["conv", "mlp0x_gelu", "mlpx_gelu", "mlp2x_relu", ""])
def test_an_unknown_projector_raises_and_names_those_there_are(kind):
    with pytest.raises(ValueError, match=f"'{kind}'.*'linear'.*'mlp'.*'mlpNx_gelu'.*'identity'"):
        make_projector(kind, 6, 10)


@pytest.mark.parametrize("kind", ["linear", "mlp", "mlp2x_gelu", "identity"])
def test_normalization_normalises_the_output_of_every_projector(kind):
    y = make_projector(kind, 10, 10, normalization=True)(torch.randn(4, 10) * 7 + 3)
    torch.testing.assert_close(y.mean(dim=-1), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.var(dim=-1, unbiased=False), torch.ones(4), atol=1e-3, rtol=0)


# ---- Decoder --------------------------------------------------------------------------------------

def test_rotation_turns_each_pair_by_the_angle_worked_by_hand():
    x = torch.tensor([1.0, 1.0, 0.0, 0.0]).expand(1, 3, 1, 4)  # pairs (0, 2) and (1, 3), both at angle 0
    y = rotate(x, rotation(torch.tensor([[0, 1, 5]]), 4, theta=100.0))
    assert torch.equal(y[0, 0], x[0, 0])                      # position 0 turns nothing
    for row, position in enumerate([0, 1, 5]):                # speeds 100^0 and 100^(-2/4) = 0.1
        angles = position, position / 10
        expected = [math.cos(angles[0]), math.cos(angles[1]), math.sin(angles[0]), math.sin(angles[1])]
        assert y[0, row, 0].tolist() == pytest.approx(expected, abs=1e-6)


def test_the_product_of_rotated_vectors_depends_on_their_distance_alone():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8)

    def product(q_position, k_position):
        turned_q = rotate(q, rotation(torch.tensor([[q_position]]), 8, 10_000.0))
        return (turned_q * rotate(k, rotation(torch.tensor([[k_position]]), 8, 10_000.0))).sum().item()

    assert product(7, 3) == pytest.approx(product(104, 100), abs=1e-4)
    assert product(7, 3) != pytest.approx(product(7, 4), abs=1e-2)
    assert product(7, 3) != pytest.approx(product(3, 7), abs=1e-2)


def test_shifting_all_positions_changes_no_logits():
    gpt, x = make_gpt(), torch.randn(2, 5, 16)
    torch.testing.assert_close(gpt(x, positions=torch.arange(5)[None] + 20), gpt(x), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(gpt(x, positions=torch.arange(5)[None] * 2), gpt(x), atol=1e-2)


@pytest.mark.parametrize("position", [0, 2, 4])
def test_no_token_sees_a_later_one(position):
    gpt, x = make_gpt(), torch.randn(2, 5, 16)
    is_image, other = torch.tensor([[True, False, True, False, True]] * 2), x.clone()
    other[:, position] += 1
    changed = (gpt(x, is_image) - gpt(other, is_image)).abs().amax(dim=(0, 2))
    assert (changed[:position] < 1e-5).all() and (changed[position:] > 1e-4).all()


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_grouped_query_attention_equals_a_slow_reference_with_repeated_heads(n_kv_heads):
    attention = scramble(GPTAttention(16, 4, n_kv_heads, qkv_bias=True, r=2, alpha=4))
    x, positions = torch.randn(2, 5, 16), torch.arange(5)[None]
    rope = rotation(positions, 4, 10_000.0)
    q, k, v = attention.wqkv(x).split([16, 4 * n_kv_heads, 4 * n_kv_heads], dim=-1)
    q = rotate(q.unflatten(-1, (4, 4)), rope)
    k, v = rotate(k.unflatten(-1, (n_kv_heads, 4)), rope), v.unflatten(-1, (n_kv_heads, 4))
    y = torch.zeros(2, 5, 4, 4)
    for head in range(4):
        shared = head // (4 // n_kv_heads)                    # neighbours share keys and values
        for t in range(5):
            scores = torch.einsum("bd,bsd->bs", q[:, t, head], k[:, :t + 1, shared]) / math.sqrt(4)
            y[:, t, head] = torch.einsum("bs,bsd->bd", scores.softmax(dim=-1), v[:, :t + 1, shared])
    torch.testing.assert_close(attention(x, positions, rope, None, None), attention.wo(y.flatten(2)))


def test_feed_forward_is_swiglu_of_the_normed_input():
    block = scramble(make_gpt(n_layers=1)).blocks[0]
    nn.init.zeros_(block.attention.wo.weight)                 # leaves the feed-forward half alone
    x, positions = torch.randn(1, 3, 16), torch.arange(3)[None]
    h = block.ffn_norm.weight * x / (x.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
    gate, value = h @ block.w1.weight.T, h @ block.w3.weight.T
    expected = x + (gate * torch.sigmoid(gate) * value) @ block.w2.weight.T
    torch.testing.assert_close(block(x, positions, rotation(positions, 4, 1e4), None, None), expected)


def test_all_five_linears_of_a_block_hold_an_adapter_that_image_rows_use():
    gpt, x, is_image = make_gpt(n_layers=1), torch.randn(1, 4, 16), torch.ones(1, 4, dtype=torch.bool)
    names = [name for name, _ in gpt.named_parameters() if name.endswith("lora_B")]
    assert [name.split(".")[-2] for name in names] == ["wqkv", "wo", "w1", "w3", "w2"]
    logits = gpt(x, is_image)
    for name in names:
        nn.init.zeros_(gpt.get_parameter(name))
        changed = gpt(x, is_image)
        assert not torch.allclose(changed, logits)
        logits = changed


def test_tied_embeddings_are_one_parameter():
    tied, untied = make_gpt(tied=True), make_gpt()
    assert tied.lm_head.weight is tied.token_embedding.weight
    assert untied.lm_head.weight is not untied.token_embedding.weight


@pytest.mark.parametrize("sizes", [dict(dim=16, n_heads=3), dict(dim=12, n_heads=4), dict(n_kv_heads=3)])
def test_decoder_heads_that_do_not_divide_raise(sizes):
    with pytest.raises(ValueError, match="n_heads"):
        make_gpt(**sizes)


# ---- Images among the tokens ----------------------------------------------------------------------

def test_image_rows_take_the_place_of_their_placeholders_in_order():
    model, images = make_model(), make_images(3)
    ids = torch.tensor([[5, *PICTURE, 6, *PICTURE, 0, 0], [*PICTURE, 7, 8, 9, 0, 0, 0, 0]])
    x, is_image = model.embed(ids, images)
    rows = iter(model.encode_images(images).flatten(0, 1))
    for b, t in [(b, t) for b in range(2) for t in range(10)]:
        token = int(ids[b, t])
        assert is_image[b, t] == (token == IMAGE)
        expected = next(rows) if token == IMAGE else model.decoder.token_embedding.weight[token]
        assert torch.equal(x[b, t], expected)
    assert next(rows, None) is None


@pytest.mark.parametrize("n_images", [0, 1, 5])
def test_a_wrong_number_of_images_raises_with_both_numbers(n_images):
    ids = torch.tensor([[5, *PICTURE, *PICTURE, 6]])
    with pytest.raises(ValueError, match=rf"\b{n_images} images.*\b2 images"):
        make_model()(ids, make_images(n_images))


def test_swapping_two_images_changes_the_logits_from_the_first_image_on():
    model, images = make_model(), make_images(2)
    ids = torch.tensor([[5, 6, *PICTURE, 7, *PICTURE, 8]])
    changed = (model(ids, images)[0] - model(ids, images.flip(0))[0]).abs().amax(dim=2)[0]
    assert (changed[:2] == 0).all() and (changed[2:] > 1e-4).all()


def test_each_text_of_a_batch_sees_its_own_images_only():
    model, images = make_model(), make_images(3)
    texts = [[5, *PICTURE, 6, *PICTURE], [7, 8, 9, 10, 11, 12, 13, 14], [*PICTURE, 9, 10, 11, 12, 13]]
    logits, _ = model(torch.tensor(texts), images)
    for text, own, expected in zip(texts, (images[:2], images[:0], images[2:]), logits):
        torch.testing.assert_close(model(torch.tensor([text]), own)[0][0], expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("a, b", [(3.0, 3.0), (3e38, 3e38), (float("inf"), 3.0), (float("nan"), 3.0)])
def test_logits_of_a_text_without_images_are_bit_identical_with_any_A_and_any_finite_B(a, b):
    model, ids = make_model(), torch.tensor([[5, 6, 7, 8]])
    before, _ = model(ids, make_images(0))
    for name, parameter in model.named_parameters():
        if part_of(name) == "plora":
            nn.init.constant_(parameter, a if "lora_A" in name else b)
    assert torch.equal(model(ids, make_images(0))[0], before)


def test_an_adapter_moves_no_text_before_the_first_image():
    model, ids = make_model(), torch.tensor([[5, 6, *PICTURE, 7]])
    before, _ = model(ids, make_images(1))
    for name, parameter in model.named_parameters():
        if part_of(name) == "plora":
            nn.init.normal_(parameter)
    changed = (model(ids, make_images(1))[0] - before).abs().amax(dim=2)[0]
    assert (changed[:2] == 0).all() and (changed[2:] > 1e-4).all()


def test_a_batch_without_images_gives_adapters_and_image_parts_gradients_of_exactly_zero():
    model, ids = make_model(), torch.tensor([[5, 6, 7, 8]])
    model.train()
    model(ids, make_images(0), ids)[1].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name               # data-parallel training waits for each
        assert (torch.count_nonzero(parameter.grad) > 0) == (part_of(name) == "decoder"), name


@torch.no_grad()
def test_lora_changes_text_and_partial_lora_never_does():
    ids = torch.tensor([[5, 6, 7, 8]])
    partial, everywhere = make_model(lora_on="image"), make_model(lora_on="all")
    plain = partial.decoder(partial.decoder.token_embedding(ids))
    for images in (None, make_images(0)):
        assert torch.equal(partial(ids, images)[0], plain)
        assert ((everywhere(ids, images)[0] - plain).abs().amax(dim=2) > 1e-4).all()
    with pytest.raises(ValueError, match="unknown lora_on 'text'"):
        make_model(lora_on="text")


def test_images_of_none_run_the_plain_decoder_alone():
    model, ids = make_model(), torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(model(ids, None)[0], model(ids, make_images(0))[0])
    model(ids, None, ids)[1].backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (part_of(name) == "decoder"), name
    with pytest.raises(ValueError, match=r"\b0 images.*\b1 images"):
        model(torch.tensor([[5, *PICTURE]]), None)


def test_a_batch_with_an_image_gives_every_parameter_a_gradient():
    model, ids = make_model(), torch.tensor([[5, *PICTURE, 7, 8], [6, 7, 8, 9, 10, 11]])
    model(ids, make_images(1), ids)[1].backward()
    assert [name for name, parameter in model.named_parameters()
            if torch.count_nonzero(parameter.grad) == 0] == []


def test_padding_changes_neither_loss_nor_logits():
    model, images = make_model(), make_images(1)
    ids = torch.tensor([[5, *PICTURE, 7, 8]])
    labels = torch.tensor([[-100, -100, -100, -100, 7, 8]])
    logits, loss = model(ids, images, labels)
    padded_logits, padded_loss = model(F.pad(ids, (0, 4)), images, F.pad(labels, (0, 4), value=-100))
    torch.testing.assert_close(padded_logits, logits)
    torch.testing.assert_close(model(F.pad(ids, (0, 4)), images)[0][:, :6], model(ids, images)[0])
    torch.testing.assert_close(padded_loss, loss)


def test_loss_is_that_of_predicting_each_label_from_the_logits_before_it():
    model, images = make_model(), make_images(1)
    ids = torch.tensor([[5, *PICTURE, 7, 8], [6, 7, 8, 9, 10, 11]])
    labels = torch.tensor([[-100, -100, -100, -100, 7, 8], [-100, 7, -100, 9, -100, -100]])
    trained = [(0, 4), (0, 5), (1, 1), (1, 3)]
    (every, _), (logits, loss) = model(ids, images), model(ids, images, labels)
    losses = [-every[b, t - 1].log_softmax(dim=-1)[labels[b, t]] for b, t in trained]
    torch.testing.assert_close(loss, torch.stack(losses).mean())
    torch.testing.assert_close(logits, torch.stack([every[b, t - 1] for b, t in trained]))


# ---- Generation -----------------------------------------------------------------------------------

UNEVEN = [[2, *PICTURE, 5], [7], [3, *PICTURE, 8, *PICTURE, 9], [4, 5, 6]]


def generate(model, prompts, n_images, n_tokens, stop_id=NEVER, **sampling):
    """The ids that `generate` yields, one list for each prompt."""
    steps = list(model.generate([torch.tensor(prompt) for prompt in prompts], make_images(n_images), n_tokens,
                                stop_id, **sampling))
    return torch.stack(steps, dim=1).tolist()


def generate_slowly(model, prompt, images, n_tokens):
    """Greedy answer to one prompt that runs the whole text again for each token."""
    x, is_adapted = model.embed(torch.tensor([prompt]), images)
    answer = []
    for _ in range(n_tokens):
        answer.append(int(model.decoder(x, is_adapted)[0, -1].argmax()))
        x = torch.cat([x, model.decoder.token_embedding.weight[answer[-1]][None, None]], dim=1)
        is_adapted = F.pad(is_adapted, (0, 1), value=model.config.lora_on == "all")
    return answer


@pytest.mark.parametrize("prompts", [UNEVEN, [[7]], [[5, 6, 7], [8, 9, 10]]],
                         ids=["uneven", "one token", "even"])
@pytest.mark.parametrize("lora_on", ["image", "all"])
@torch.no_grad()
def test_generation_with_a_cache_equals_the_full_forward(prompts, lora_on):
    model = make_model(lora_on=lora_on, alpha=4 if lora_on == "image" else 0.5)
    images = iter(make_images(3).unsqueeze(1))
    expected = []
    for prompt in prompts:
        own = [next(images) for _ in range(prompt.count(IMAGE) // Q)]
        expected.append(generate_slowly(model, prompt, torch.cat(own) if own else make_images(0), 10))
    n_images = sum(prompt.count(IMAGE) for prompt in prompts) // Q
    answers = generate(model, prompts, n_images, 10)
    assert answers == expected
    assert all(len(set(answer)) > 2 for answer in answers)    # a model that repeats itself shows little


def test_a_row_that_has_stopped_yields_stop_id_while_the_others_go_on():
    model = make_model()
    free = generate(model, UNEVEN, 3, 8)
    stop_id = next(answer[2] for answer in free if answer[2] not in answer[:2])
    stopped = generate(model, UNEVEN, 3, 8, stop_id)
    ends = [answer.index(stop_id) if stop_id in answer else 8 for answer in free]
    assert min(ends) < max(ends)                              # else this test would show nothing
    for answer, free_answer, end in zip(stopped, free, ends):
        assert answer == free_answer[:end] + [stop_id] * (8 - end)


def test_generation_ends_when_all_rows_have_stopped():
    model = make_model()
    first = generate(model, [[7]], 0, 8)[0]
    assert generate(model, [[7]], 0, 8, stop_id=first[3]) == [first[:first.index(first[3]) + 1]]


def test_a_prompt_that_leaves_no_room_for_the_answer_raises():
    model, prompt = make_model(max_len=8), [5, *PICTURE, 6]
    assert len(generate(model, [prompt], 1, 3)[0]) == 3       # 5 + 3 just fits
    with pytest.raises(ValueError, match="5 tokens.*up to 4.*max_len 8"):
        generate(model, [prompt], 1, 4)


def test_generation_draws_from_its_own_generator():
    model, sampling = make_model(), dict(temperature=2.0)
    first, again, other = (
        generate(model, UNEVEN, 3, 8, generator=torch.Generator().manual_seed(seed), **sampling)
        for seed in (5, 5, 6))
    assert first == again != other
    assert generate(model, UNEVEN, 3, 8) != first


def test_picking_from_one_token_only_is_greedy():
    logits = torch.randn(50, V, generator=torch.Generator().manual_seed(0))
    greedy = logits.argmax(dim=-1)
    assert torch.equal(pick_token(logits), greedy)
    assert torch.equal(pick_token(logits, temperature=2.0, top_k=1), greedy)
    assert torch.equal(pick_token(logits, temperature=2.0, top_p=1e-6), greedy)


@pytest.mark.parametrize("sampling, expected", [
    (dict(), [0.15, 0.5, 0.05, 0.3]),
    (dict(top_k=2), [0, 0.625, 0, 0.375]),
    (dict(top_k=9), [0.15, 0.5, 0.05, 0.3]),
    (dict(top_p=0.49), [0, 1, 0, 0]),
    (dict(top_p=0.6), [0, 0.625, 0, 0.375]),                  # 0.5 does not reach 0.6, with 0.3 it does
    (dict(top_p=0.9), [0.15 / 0.95, 0.5 / 0.95, 0, 0.3 / 0.95])])
def test_tokens_are_drawn_with_the_probabilities_worked_by_hand(sampling, expected):
    logits = 2 * torch.tensor([0.15, 0.5, 0.05, 0.3]).log().expand(20_000, 4)
    tokens = pick_token(logits, temperature=2.0, generator=torch.Generator().manual_seed(0), **sampling)
    assert (torch.bincount(tokens, minlength=4) / 20_000).tolist() == pytest.approx(expected, abs=0.015)
    for token, probability in enumerate(expected):
        assert probability > 0 or token not in tokens


# ---- Parts, freezing, files -----------------------------------------------------------------------

def test_every_parameter_belongs_to_a_part_and_every_part_has_some():
    names = [name for name, _ in make_model(text_branch=True).named_parameters()]
    assert {part_of(name) for name in names} == set(PARTS)
    assert part_of("ln_vision.weight") == "vit"
    assert part_of("decoder.blocks.0.w1.lora_A") == "plora"
    assert part_of("decoder.blocks.0.w1.weight") == "decoder"


@pytest.mark.parametrize("part", PARTS)
def test_only_the_chosen_part_learns(part):
    model, ids = make_model(), torch.tensor([[5, *PICTURE, 7, 8]])
    model.train_only((part,))
    model(ids, make_images(1), ids)[1].backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (part_of(name) == part), name
        assert (parameter.grad is not None) == (part_of(name) == part), name


def test_frozen_parts_stay_in_eval_mode_until_they_learn_again():
    model, images = make_model(drop_path_rate=0.5, qformer_dropout=0.5), make_images(4)
    model.train_only(("projector", "decoder"))
    model.train()
    assert torch.equal(model.encode_images(images), model.encode_images(images))
    frozen = nn.ModuleList([model.vit, model.ln_vision, model.qformer])
    assert not any(module.training for part in frozen for module in part.modules())
    assert all(module.training for module in (*model.projector.modules(), model.decoder, model))
    model.train_only(PARTS)
    assert all(module.training for module in model.modules())
    assert not torch.equal(model.vit(images), model.vit(images))
    assert not torch.equal(model.qformer(torch.ones(1, 4, 16)), model.qformer(torch.ones(1, 4, 16)))
    model.eval()
    assert not any(module.training for module in model.modules())


def test_an_unknown_part_raises():
    with pytest.raises(ValueError, match="'brain'.*'vit', 'qformer', 'projector', 'plora', 'decoder'"):
        make_model().train_only(("vit", "brain"))


@pytest.mark.parametrize("make", [
    lambda: make_model(text_branch=True, projector="mlp2x_gelu", projector_norm=True), make_vit,
    lambda: make_vit(pre_norm=True, qkv_bias=False), lambda: make_gpt(qkv_bias=True),
    lambda: make_gpt(tied=True)],
    ids=["MLLM", "ViT", "ViT pre-norm", "GPT", "GPT tied"])
def test_reset_parameters_initialises_every_parameter(make):
    module = make()
    fill_with_nan(module)
    module.reset_parameters()
    assert not_finite(module) == []


def test_a_fresh_model_starts_with_adapters_that_change_nothing():
    model, ids = make_model(), torch.tensor([[5, *PICTURE, 7]])
    model.reset_parameters()
    x, is_image = model.embed(ids, make_images(1))
    assert torch.equal(model.decoder(x, is_image), model.decoder(x))


@pytest.mark.parametrize("text_branch", [True, False])
def test_a_saved_model_comes_back_the_same(tmp_path, text_branch):
    model, ids = make_model(text_branch=True), torch.tensor([[5, *PICTURE, 7, 8]])
    if not text_branch:
        model.drop_text_branch()
    model.save(tmp_path / "model.pt", stage="align")
    loaded = MLLM.load(tmp_path / "model.pt").eval()
    assert loaded.config == model.config and loaded.config.text_branch == text_branch
    assert torch.equal(loaded(ids, make_images(1))[0], model(ids, make_images(1))[0])
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert torch.load(tmp_path / "model.pt", weights_only=True)["stage"] == "align"


def test_the_last_blocks_of_the_qformer_go_with_its_text_branch():
    model, images = make_model(text_branch=True, qformer_layers=3, qformer_drop_last=1), make_images(2)
    features = model.ln_vision(model.vit(images))
    rows = []
    model.qformer.blocks[1].register_forward_hook(lambda block, inputs, output: rows.append(output))
    model.qformer(features)
    model.drop_text_branch()
    assert torch.equal(model.qformer(features), rows[0]) and model.config.qformer_layers == 2
    with pytest.raises(ValueError, match="qformer_drop_last 3 would leave none of 3 blocks"):
        make_model(text_branch=True, qformer_layers=3, qformer_drop_last=3)


def test_a_renewed_model_keeps_all_that_still_fits():
    model = make_model()
    renewed = model.renewed(replace(model.config, r=5, projector="mlp", projector_hidden_dim=7, projector_norm=True,
                                    projector_activation="relu"))
    assert renewed.config.r == 5 and renewed.decoder.blocks[0].w1.lora_A.shape[0] == 5
    first, activation, second, norm = renewed.projector
    assert first.out_features == 7 and isinstance(activation, nn.ReLU) and isinstance(norm, nn.LayerNorm)
    for name, parameter in renewed.named_parameters():
        if part_of(name) not in ("projector", "plora"):
            assert torch.equal(parameter, model.get_parameter(name)), name
    ids = torch.tensor([[5, *PICTURE, 7]])
    x, is_adapted = renewed.embed(ids, make_images(1))
    assert torch.equal(renewed.decoder(x, is_adapted), renewed.decoder(x))    # fresh adapters change nothing
    assert model.renewed(model.config) is model


def test_a_model_renewed_for_larger_images_answers_as_one_that_interpolates_each_time():
    model, images = make_model(), torch.rand(2, 3, 12, 16)
    renewed = model.renewed(replace(model.config, image_size=(12, 16))).eval()
    assert renewed.vit.grid == (3, 4) and renewed.vit.position_embedding.shape[1] == 1 + 12
    torch.testing.assert_close(renewed.encode_images(images), model.encode_images(images))


def test_casting_touches_frozen_linears_and_convolutions_alone_and_no_result_under_autocast():
    model, ids = make_model(), torch.tensor([[5, *PICTURE, 7, 8]])
    model.train_only(("projector", "plora"))
    with torch.autocast("cpu", torch.bfloat16):
        before = model(ids, make_images(1))[0]
        model.cast_frozen(torch.bfloat16)
        assert torch.equal(model(ids, make_images(1))[0], before)
        model(ids, make_images(1), ids)[1].backward()
    half = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.bfloat16}
    linears = {f"{name}.{kind}" for name, module in model.named_modules() for kind in ("weight", "bias")
               if isinstance(module, (nn.Linear, nn.Conv2d)) and part_of(f"{name}.{kind}") != "projector"}
    assert half == linears & dict(model.named_parameters()).keys()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters() if parameter.requires_grad)


class Trap:
    """Unpickling it would raise ZeroDivisionError: a stand-in for any code in a file."""

    def __reduce__(self):
        return eval, ("1 / 0",)


def test_loading_runs_no_code_from_the_file(tmp_path):
    make_model().save(tmp_path / "model.pt", trap=Trap())
    with pytest.raises(ValueError, match="damaged or not of this program"):
        MLLM.load(tmp_path / "model.pt")
