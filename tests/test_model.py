"""ViT, projector, decoder and the whole: what attends to what, stays untouched, comes out."""
from dataclasses import asdict
from unittest.mock import Mock

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from model import (GPT, MLLM, PARTS, ModelConfig, PatchMerge, ViT, cast_frozen, drop_path,
                   load_file, load_model, make_projector, part_of, pick_token, rotate, rotation,
                   save_file)

Q, IMAGE, V = 3, 1, 40  # tokens of an image, placeholder id, ids
PICTURE = [IMAGE] * Q


def scramble(module, std=0.4):
    """Make every parameter random: a fresh adapter is zero, for instance, and would hide faults."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std)
    return module.eval()


VIT = dict(image_size=(8, 8), patch_size=4, dim=16, n_layers=2, n_heads=2)
QFORMER = dict(dim=16, n_layers=2, n_heads=2, n_queries=Q, encoder_width=16)
DECODER = dict(vocab_size=V, dim=16, n_layers=2, n_heads=4, n_kv_heads=2, r=2, alpha=4)


def make_model(vit={}, qformer={}, projector={}, decoder={}, max_len=40, **options):
    config = ModelConfig(VIT | vit, dict(in_dim=16, out_dim=16) | projector, DECODER | decoder,
                         QFORMER | qformer, max_len=max_len, **options)
    return scramble(MLLM(config), std=0.8)


def make_images(N):
    return torch.rand(N, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


def make_vit(**options):
    return scramble(ViT(**(VIT | dict(image_size=(8, 12)) | options)))


def test_positions_for_images_of_other_sizes_keep_rows_columns_and_the_class_token():
    vit = make_vit(n_layers=0, dim=2, n_heads=1)  # for a grid of 2 x 3 patches
    nn.init.zeros_(vit.patch_embedding.bias)
    places = torch.cartesian_prod(torch.arange(2.0), torch.arange(3.0))  # (row, column)
    vit.position_embedding.data[0, 1:] = places
    grown = vit(torch.zeros(1, 3, 20, 16))[0]
    torch.testing.assert_close(grown[0], (vit.class_token + vit.position_embedding)[0, 0])
    rows, columns = grown[1:].view(5, 4, 2).unbind(dim=-1)
    torch.testing.assert_close(rows, rows[:, :1].expand(5, 4))
    torch.testing.assert_close(columns, columns[:1].expand(5, 4))
    assert (rows[:, 0].diff() > 0).all() and (columns[0].diff() > 0).all()


def test_gradient_checkpointing_runs_each_block_again_and_keeps_the_gradients():
    gradients = []
    for use_grad_checkpoint, n_calls in ((False, 1), (True, 2)):
        vit = make_vit(use_grad_checkpoint=use_grad_checkpoint, drop_path_rate=0.5).train()
        calls = Mock(return_value=None)
        vit.blocks[1].norm1.register_forward_hook(calls)
        torch.manual_seed(3)  # so that both drop the same paths
        vit(torch.ones(4, 3, 8, 12)).square().sum().backward()
        gradients.append([parameter.grad for parameter in vit.parameters()])
        assert calls.call_count == n_calls
    torch.testing.assert_close(*gradients)


def test_drop_path_drops_whole_samples_in_training_and_keeps_the_expectation():
    torch.manual_seed(0)
    x = torch.ones(20_000, 2, 16)
    y = drop_path(x, 0.25, training=True)
    torch.testing.assert_close(y, y[:, :1, :1].expand_as(y))
    assert y.unique().tolist() == pytest.approx([0, 4 / 3])
    assert y.mean().item() == pytest.approx(1, abs=0.02)
    rates = [block.drop_path_rate for block in make_vit(n_layers=3, drop_path_rate=0.6).blocks]
    assert rates == pytest.approx([0, 0.3, 0.6])  # deeper blocks are dropped more often


def test_patch_merging_puts_neighbors_side_by_side_and_drops_the_class_token():
    features = torch.randn(2, 9, 5)
    expected = torch.cat([features[:, 1 + i::4] for i in range(4)], dim=-1)  # (2, 2, 20)
    assert torch.equal(PatchMerge(4)(features), expected)
    assert torch.equal(PatchMerge(1)(features), features[:, 1:])


def test_projector_equals_its_linears_with_activations_between_them_and_a_norm_behind():
    x = torch.randn(2, 6)
    a, _, b, _, c = deep = make_projector(6, 10, "mlp3x_gelu")
    assert torch.equal(deep(x), c(F.gelu(b(F.gelu(a(x))))))
    options = dict(hidden_dim=7, activation="quick_gelu", normalization=True)
    a, _, b, norm = mlp = scramble(make_projector(6, 10, "mlp", **options))
    hidden = a(x)  # (2, 7)
    torch.testing.assert_close(mlp(x), norm(b(hidden * torch.sigmoid(1.702 * hidden))))
    assert [(m.in_features, m.out_features) for m in (a, b, c)] == [(6, 7), (7, 10), (10, 10)]
    assert [type(module) for module in make_projector(6, 10)] == [nn.Linear]
    assert torch.equal(make_projector(6, 6, "identity")(x), x)


@pytest.mark.parametrize("ask, message", [
    (lambda: make_vit(image_size=(0, 8)), "patch_size 4, got 0 x 8"),
    (lambda: make_vit()(torch.zeros(1, 3, 8, 10)), "patch_size 4, got 8 x 10"),
    (lambda: make_projector(6, 10, "mlp0x_gelu"), "'mlp0x_gelu'"),
    (lambda: make_projector(6, 10, "identity"), "width 6 to 10"),
    (lambda: make_model(decoder=dict(dim=12)), "n_heads 4 an even width"),
    (lambda: make_model(connector="mlp"), "no connector 'mlp'"),
    (lambda: make_model(lora_on="text"), "lora_on 'text'"),
    (lambda: make_model()(torch.tensor([PICTURE]), make_images(2)), "3 place.* 2 images make 6"),
    (lambda: generate(make_model(max_len=8), [[5] * 5], 0, 4), "5 tokens.*up to 4.*max_len 8")])
def test_what_cannot_work_raises_and_says_why(ask, message):
    with pytest.raises(ValueError, match=message):
        ask()


def test_fresh_biases_of_the_first_block_let_head_h_look_h_plus_one_tokens_back():
    gpt = GPT(V, dim=64, n_layers=1, n_heads=4, n_kv_heads=2, qkv_bias=True, r=2)
    heads = gpt.blocks[0].attention.wqkv(torch.zeros(1, 12, 64)).view(1, 12, 8, 16)
    heads = rotate(heads, rotation(torch.arange(12)[None], 16, 10_000.0))[0]
    for head in range(4):
        scores = heads[:, head] @ heads[:, 4 + head // 2].T
        for t in range(head + 1, 12):
            assert scores[t, :t + 1].argmax() == t - (head + 1)


@pytest.mark.parametrize("image_id", [IMAGE, V + 1])  # V + 1: beyond a published vocabulary
def test_image_tokens_take_the_place_of_their_placeholders_in_order(image_id):
    model, images, picture = make_model(image_id=image_id), make_images(3), [image_id] * Q
    ids = torch.tensor([[5, *picture, 6, *picture, 0, 0], [*picture, 7, 8, 9, 0, 0, 0, 0]])
    x, is_image = model.embed(ids, images)
    assert torch.equal(is_image, ids == image_id)
    assert torch.equal(x[is_image], model.encode_images(images).flatten(0, 1))
    assert torch.equal(x[~is_image], model.decoder.token_embedding.weight[ids[~is_image]])


def test_bytes_are_normalized_with_mean_and_deviation_of_their_channel():
    model = make_model(pixel_mean=(0.5, 0.25, 0.4), pixel_std=(0.25, 0.25, 0.2))
    pixels = torch.tensor([255, 0, 51], dtype=torch.uint8)[None, :, None, None].expand(2, 3, 1, 4)
    normalized = model.normalize(pixels)
    expected = torch.tensor([2.0, -1.0, -1.0])[:, None, None].expand(2, 3, 1, 4)
    torch.testing.assert_close(normalized, expected)
    assert torch.equal(model.normalize(normalized), normalized)


@pytest.mark.parametrize("text, images", [([5, 6, *PICTURE, 7], make_images(1)),
                                          ([5, 6], make_images(0)), ([5, 6], None)])
@torch.no_grad()
def test_partial_lora_keeps_text_up_to_an_image_bit_identical_and_lora_changes_it(text, images):
    for lora_on, n_same in (("image", 2), ("all", 0)):
        model = make_model(lora_on=lora_on)
        x, is_adapted = model.embed(torch.tensor([text]), images)
        changed = (model.decoder(x, is_adapted) - model.decoder(x)).abs().amax(dim=2)[0]
        assert (changed[:n_same] == 0).all() and (changed[n_same:] > 1e-4).all()


@pytest.mark.parametrize("images", [None, make_images(0), make_images(1)], ids=["None", "0", "1"])
def test_a_batch_without_images_gives_all_but_the_decoder_no_gradient_or_exactly_zero(images):
    model, n = make_model().train(), 0 if images is None else len(images)
    ids = torch.tensor([[5, *PICTURE * n, 6, 7, 8]])
    model(ids, images, ids)[1].backward()
    for name, parameter in model.named_parameters():
        if n or part_of(name) == "decoder":
            assert parameter.grad.any(), name
        elif images is None:  # the plain decoder runs alone
            assert parameter.grad is None, name
        else:  # data-parallel training waits for each
            assert torch.count_nonzero(parameter.grad) == 0, name
    adapted = {name.split(".")[-2] for name, _ in model.named_parameters() if "lora_B" in name}
    assert adapted == {"wqkv", "wo", "w1", "w2", "w3"}


def test_loss_is_that_of_predicting_each_label_from_the_logits_before_it():
    model, images = make_model(), make_images(1)
    ids = torch.tensor([[5, *PICTURE, 7, 8], [6, 7, 8, 9, 10, 11]])
    labels = torch.tensor([[-100, -100, -100, -100, 7, 8], [-100, 7, -100, 9, -100, -100]])
    (every, _), (logits, loss) = model(ids, images), model(ids, images, labels)
    expected = torch.stack([every[b, t - 1] for b, t in [(0, 4), (0, 5), (1, 1), (1, 3)]])
    torch.testing.assert_close(logits, expected)
    losses = -expected.log_softmax(dim=-1)[range(4), [7, 8, 7, 9]]
    torch.testing.assert_close(loss, losses.mean())


UNEVEN = [[2, *PICTURE, 5], [7], [3, *PICTURE, 8, *PICTURE, 9], [4, 5, 6]]


def generate(model, prompts, n_images, n_tokens, stop_id=V, **sampling):
    """The ids that `generate` yields, one list for each prompt; no model yields V."""
    steps = model.generate([torch.tensor(prompt) for prompt in prompts], make_images(n_images),
                           n_tokens, stop_id, **sampling)
    return torch.stack(list(steps), dim=1).tolist()


@pytest.mark.parametrize("prompts", [UNEVEN, [[7]]], ids=["uneven", "one token"])
@pytest.mark.parametrize("lora_on", ["image", "all"])
@torch.no_grad()
def test_generation_with_a_cache_equals_the_full_forward(prompts, lora_on):
    model = make_model(lora_on=lora_on, decoder=dict(alpha=4 if lora_on == "image" else 0.5))
    n_images = [prompt.count(IMAGE) // Q for prompt in prompts]
    own = make_images(sum(n_images)).split(n_images)
    answers = generate(model, prompts, sum(n_images), 10)
    for prompt, images, answer in zip(prompts, own, answers, strict=True):
        x, is_adapted = model.embed(torch.tensor([prompt]), images)
        for token in answer:  # the slow way: the whole text again for each token
            x_last = model.decoder(x, is_adapted)[0, -1]
            assert model.decoder.lm_head(x_last).argmax() == token
            x = torch.cat([x, model.decoder.token_embedding.weight[token][None, None]], dim=1)
            is_adapted = F.pad(is_adapted, (0, 1), value=lora_on == "all")
        assert len(answer) == 10 and len(set(answer)) > 2  # one that repeats itself shows little


def test_a_text_that_has_stopped_yields_stop_id_until_all_have_stopped():
    model = make_model()
    free = generate(model, UNEVEN, 3, 20)
    stop_id = next(token for token in free[0][:8] if token not in free[1][:8])
    ends = [answer.index(stop_id) if stop_id in answer else 20 for answer in free]
    length = min(20, max(ends) + 1)
    for answer, free_answer, end in zip(generate(model, UNEVEN, 3, 20, stop_id), free, ends):
        assert answer == free_answer[:end] + [stop_id] * (length - end)
    assert generate(model, [[7]], 0, 20, stop_id=free[1][0]) == [free[1][:1]]


@pytest.mark.parametrize("sampling, expected", [
    (dict(temperature=0.0), [0, 1, 0, 0]),
    (dict(temperature=2.0), [0.15, 0.5, 0.05, 0.3]),
    (dict(temperature=2.0, top_k=2), [0, 0.625, 0, 0.375])])
def test_tokens_are_drawn_with_the_probabilities_worked_by_hand(sampling, expected):
    logits = 2 * torch.tensor([0.15, 0.5, 0.05, 0.3]).log().expand(20_000, 4)
    tokens = pick_token(logits, generator=torch.Generator().manual_seed(0), **sampling)
    shares = torch.bincount(tokens, minlength=4) / 20_000
    torch.testing.assert_close(shares, torch.tensor(expected).float(), atol=0.015, rtol=0)
    assert not shares[torch.tensor(expected) == 0].any()


def test_frozen_modules_stay_in_eval_mode_until_they_are_trainable_again():
    model = make_model(dict(drop_path_rate=0.5), dict(dropout=0.5), decoder=dict(lora_dropout=0.5))
    images, x = make_images(4), torch.ones(1, 4, 16)
    model.train_only(("projector", "adapters"))
    nn.Sequential(model).train()  # as a wrapper around the model does
    frozen = model.vit, model.ln_vision, model.connector, model.decoder.norm
    assert not any(module.training for part in frozen for module in part.modules())
    trainable = model, *model.projector.modules(), model.decoder, model.decoder.blocks[0].w1
    assert all(module.training for module in trainable)
    assert torch.equal(model.encode_images(images), model.encode_images(images))
    model.train_only(PARTS)
    assert all(module.training for module in model.modules())
    for part, given in ((model.vit, [images]), (model.connector, [x]),
                        (model.decoder, [x, torch.ones(1, 4, dtype=torch.bool)])):
        assert not torch.equal(part(*given), part(*given))


@pytest.mark.parametrize("tied", [True, False])
def test_a_fresh_model_leaves_no_parameter_uninitialized(tied):
    config = make_model(dict(pre_norm=True), dict(vocab_size=9 * tied),
                        decoder=dict(tied=tied, qkv_bias=True)).config
    torch.use_deterministic_algorithms(True)  # fills the memory of torch.empty with NaN
    try:
        model = MLLM(config)
    finally:
        torch.use_deterministic_algorithms(False)
    assert [name for name, p in model.named_parameters() if not p.isfinite().all()] == []
    assert (model.decoder.lm_head.weight is model.decoder.token_embedding.weight) == tied
    assert model.connector.query_tokens.std() > 0.01  # equal queries would stay equal for ever


def test_casting_touches_frozen_linears_and_convolutions_alone_and_no_result_under_autocast():
    model, ids = make_model(decoder=dict(lora_dropout=0.0)), torch.tensor([[5, *PICTURE, 7, 8]])
    model.train_only(("projector", "adapters"))
    with torch.autocast("cpu", torch.bfloat16):
        before = model(ids, make_images(1))[0]
        cast_frozen(model)
        assert torch.equal(model(ids, make_images(1))[0], before)
        model(ids, make_images(1), ids)[1].backward()
    half = {name for name, p in model.named_parameters() if p.dtype == torch.bfloat16}
    linears = {f"{name}.{kind}" for name, module in model.named_modules()
               for kind in ("weight", "bias") if isinstance(module, (nn.Linear, nn.Conv2d))}
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert half == linears & frozen
    assert {p.grad.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def save_model(path, **more):
    model = make_model(qformer=dict(vocab_size=9))
    save_file(dict(config=asdict(model.config), model=model.state_dict(), **more), path)
    return model


def test_a_saved_model_comes_back_the_same_even_after_a_save_to_a_full_disk(tmp_path, monkeypatch):
    def fill(content, path):
        path.write_bytes(b"half of it")
        raise RuntimeError("unexpected pos 64 vs 0")  # torch's words

    model = save_model(tmp_path / "model.pt", stage="align")
    monkeypatch.setattr(torch, "save", fill)
    with pytest.raises(OSError, match="cannot write .*model.pt"):
        save_model(tmp_path / "model.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]
    loaded, checkpoint = load_model(tmp_path / "model.pt")
    assert loaded.config == model.config and checkpoint["stage"] == "align"
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_a_file_that_is_damaged_or_has_code_in_it_is_refused_without_advice_to_run_it(tmp_path):
    path = tmp_path / "model.pt"
    save_model(path, function=print)
    whole = path.read_bytes()
    for content in (whole, whole[:-1000], b"no checkpoint", b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="model.pt") as error:
            load_file(path)
        assert "weights_only" not in str(error.value)
