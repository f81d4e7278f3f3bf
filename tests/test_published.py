"""Published weights and tokenizers give here what the libraries they were published for give.

golden/ holds tiny models with random weights (transformers 5.23.0), tokenizers (0.23.3), and what
these libraries give; ids are null where a text holds an added token. Run, it prints a table.
"""
import json
import sys
import unicodedata
from functools import partial
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import (IGNORED, Tokenizer, encode_turns, published_gpt, published_pixels,  # noqa: E402
                  published_qformer, published_vit, read_json, read_safetensors)
from model import GPT, ViT  # noqa: E402
from qformer import QFormer  # noqa: E402

GOLDEN = Path(__file__).parent / "golden"
EXPECTED = torch.load(GOLDEN / "expected.pt", weights_only=True)
IDS = json.loads((GOLDEN / "tokenizers" / "ids.json").read_text())
STRINGS = IDS.pop("strings")

# What is loaded: the part, how and from where, what it is given and what should come out.
PARITY = {
    "GPT, LLaMA (TinyLlama, Vicuna)": (GPT, published_gpt, "llama", "ids", "llama"),
    "GPT, LLaMA with tied embeddings (SmolLM2)": (GPT, published_gpt, "smollm2", "ids", "smollm2"),
    "GPT, Qwen2": (GPT, published_gpt, "qwen2", "ids", "qwen2"),  # in three files
    "ViT, CLIP": (ViT, published_vit, "clip", "pixels_clip", "clip"),  # in a .bin
    "ViT, CLIP, last block left out": (
        ViT, partial(published_vit, drop_last=1), "clip", "pixels_clip", "clip_penultimate"),
    "ViT, BLIP-2 (EVA-CLIP)": (ViT, published_vit, "blip2", "pixels_blip2", "blip2_vit"),
    "Q-Former, BLIP-2": (QFormer, published_qformer, "blip2", "blip2_vit", "blip2_qformer")}
LLAMA = dict(vocab_size=32000, dim=4096, n_layers=32, n_heads=32, ffn_dim=11008, n_kv_heads=None,
             norm_eps=1e-6, rope_theta=10_000, tied=False, qkv_bias=False)
CLIP = dict(image_size=(224, 224), patch_size=32, dim=768, n_heads=12, n_layers=12, mlp_ratio=4,
            activation="quick_gelu", norm_eps=1e-5, pre_norm=True, post_norm=False)
EVA = CLIP | dict(patch_size=14, dim=1408, n_heads=16, n_layers=39, mlp_ratio=6144 / 1408,
                  activation="gelu", norm_eps=1e-6, pre_norm=False, post_norm=True)
BLIP2 = dict(dim=768, n_layers=12, n_heads=12, ffn_dim=3072, n_queries=32, encoder_width=1408,
             cross_attention_every=2, norm_eps=1e-12)


def load(part, arguments, weights):
    """The model with its weights, whose names must be all of it but the adapters."""
    model = part(**arguments).eval()
    adapters = {name: value for name, value in model.state_dict().items() if "lora_" in name}
    model.load_state_dict(adapters | weights)
    return model


@torch.no_grad()
def relative_error(name: str) -> float:
    part, published, family, given, expected = PARITY[name]
    model, x = load(part, *published(GOLDEN / family)), EXPECTED[given]
    ours = model(model.token_embedding(x) if part is GPT else x)
    return ((ours - EXPECTED[expected]).abs().max() / ours.abs().max()).item()


@pytest.mark.parametrize("name", PARITY)
def test_published_weights_give_what_their_library_gives(name):
    assert relative_error(name) < 1e-5


@pytest.mark.parametrize("family", IDS)
def test_published_tokenizers_give_the_ids_of_their_library_and_the_text_back(family):
    tokenizer = Tokenizer.load(GOLDEN / "tokenizers" / family / "tokenizer.json")
    for text, expected in zip(STRINGS, IDS[family]):
        ids = tokenizer.encode(text)
        assert expected in (None, ids), ascii(text)
        text = unicodedata.normalize("NFC", text) if family == "qwen2" else text
        text = text.removeprefix(" ") if family == "llama_metaspace" else text
        assert "\u2581" in text or tokenizer.decode(ids) == text  # U+2581 stands for a space there


@pytest.mark.parametrize("family", IDS)
def test_text_cannot_fake_an_added_token_or_a_mark_of_ours(family):
    tokenizer = Tokenizer.load(GOLDEN / "tokenizers" / family / "tokenizer.json")
    added = {token["content"]: token["id"] for token in tokenizer.content["added_tokens"]}
    ids = {*tokenizer.encode(" ".join(added) + "".join(added) + "<ImageHere>")}
    marks = {tokenizer.pad, tokenizer.image, tokenizer.summary, tokenizer.dec}
    assert len(marks) == 4 and not ids & {*added.values()} and not marks & (ids | {*added.values()})


def test_the_template_in_a_published_vocabulary_is_that_written_by_hand():
    tokenizer = Tokenizer.load(GOLDEN / "tokenizers" / "llama" / "tokenizer.json")
    ids, labels = encode_turns(tokenizer, [("<image> Is it?", "no"), ("Sure?", "yes")], 2, 999)
    text, picture = tokenizer.encode, [tokenizer.image] * 2
    first = [1, *text("###Human:"), *text("<Img>"), *picture, *text("</Img>"), *text("Is it?"),
             *text("###Assistant:")]  # <s> is 1, </s> 2; the vocabulary begins a text with " "
    no, second = text("no") + [2], text("###Human:") + text("Sure?") + text("###Assistant:")
    assert ids == first + no + second + text("yes") + [2]
    assert labels == [IGNORED] * len(first) + no + [IGNORED] * len(second) + text("yes") + [2]


@pytest.mark.parametrize("change, message", [
    ({"normalizer": {"type": "Lowercase"}}, "BPE with the steps .'Lowercase', 'ByteLevel'"),
    ({"pre_tokenizer": {"type": "Metaspace"}}, "BPE with the steps .'Metaspace'"),
    ({"normalizer": {"type": "Split", "pattern": {"Regex": "\\p{Lu}"}}}, "bad escape"),
    ({"model": {"vocab": {}}}, "merges")])
def test_an_unknown_tokenizer_is_refused_with_its_file_and_steps(tmp_path, change, message):
    content = json.loads((GOLDEN / "tokenizers" / "gpt2" / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(content | change))
    with pytest.raises(ValueError, match=f"tokenizer.json: not a tokenizer .*{message}"):
        Tokenizer.load(tmp_path / "tokenizer.json")


def test_safetensors_of_all_types_read_as_written_even_where_bytes_are_not_aligned(tmp_path):
    tensors = {"F16": torch.randn(3).half(), "BF16": torch.randn(3, 5).bfloat16(),
               "F32": torch.randn(2, 1, 2), "I64": torch.tensor(7)}
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for kind, tensor in tensors.items():
        first, data = len(data), data + tensor.flatten().view(torch.uint8).numpy().tobytes()
        header[kind] = dict(dtype=kind, shape=[*tensor.shape], data_offsets=[first, len(data)])
    words = json.dumps(header).encode()
    (tmp_path / "x").write_bytes(len(words).to_bytes(8, "little") + words + data)
    read = read_safetensors(tmp_path / "x")
    assert [*read] == [*tensors] and all(map(torch.equal, read.values(), tensors.values()))


def write_folder(folder, config, weights):
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(weights, folder / "pytorch_model.bin")
    return folder


def test_weights_that_are_missing_damaged_or_code_are_refused_by_name(tmp_path):
    llama = {"model_type": "llama"}
    (tmp_path / "config.json").write_text(json.dumps(llama))
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}: no weights"):
        published_gpt(tmp_path)
    with pytest.raises(ValueError, match="pytorch_model.bin: damaged"):
        published_gpt(write_folder(tmp_path, llama, {"a": print}))
    whole = (GOLDEN / "llama" / "model.safetensors").read_bytes()
    for length in (0, 5, 500, -1):
        (tmp_path / "model.safetensors").write_bytes(whole[:length])
        with pytest.raises(ValueError, match="model.safetensors: damaged"):
            published_gpt(tmp_path)


def test_what_is_missing_left_over_or_of_another_shape_is_named(tmp_path):
    config, weights = read_json(GOLDEN / "llama" / "config.json"), read_safetensors(
        GOLDEN / "llama" / "model.safetensors")
    weights["odd.bias"] = weights.pop("model.layers.1.self_attn.k_proj.weight")
    weights["lm_head.weight"] = torch.ones(63, 16)
    wrong = "(?s)Missing.*blocks.1.attention.wqkv.*Unexpected.*odd.bias.*lm_head.weight.*63, 16"
    with pytest.raises(RuntimeError, match=wrong):
        load(GPT, *published_gpt(write_folder(tmp_path, config, weights)))


@pytest.mark.parametrize("published, family, change, message", [
    (published_gpt, "llama", {"model_type": "gpt_neox"}, "model_type 'gpt_neox'"),
    (published_gpt, "llama", {"attention_bias": True}, "attention_bias True"),
    (published_qformer, "clip", {}, "'clip'"),
    (published_gpt, "llama", {"rope_parameters": {"rope_type": "llama3"}}, "rope_type 'llama3'"),
    (published_gpt, "llama", {"rope_parameters": 0, "rope_scaling": {"type": "yarn"}}, "'yarn'"),
    (published_gpt, "llama", {"hidden_act": "relu"}, "hidden_act 'relu'"),
    (published_gpt, "qwen2", {"use_sliding_window": True}, "use_sliding_window True"),
    (published_vit, "clip", {"model_type": "siglip"}, "model_type 'siglip'"),
    (published_vit, "clip", {"vision_config": {"hidden_act": "swish"}}, "hidden_act 'swish'"),
    (partial(published_vit, drop_last=3), "clip", {}, "drop_last 3 must leave one of 3 blocks"),
    (published_qformer, "blip2", {"qformer_config": {"hidden_act": "relu"}}, "hidden_act 'relu'")])
def test_what_is_not_known_is_refused_by_name(tmp_path, published, family, change, message):
    config = read_json(GOLDEN / family / "config.json")
    with pytest.raises(ValueError, match=message):
        published(write_folder(tmp_path, config | change, {}))


@pytest.mark.parametrize("published, kind, sizes", [
    (published_gpt, "llama", LLAMA), (published_vit, "clip", CLIP), (published_vit, "blip-2", EVA),
    (published_gpt, "qwen2", LLAMA | dict(vocab_size=151936, ffn_dim=22016, qkv_bias=True)),
    (published_qformer, "blip-2", BLIP2)])
def test_sizes_that_a_config_leaves_out_are_those_of_the_library(tmp_path, published, kind, sizes):
    assert published(write_folder(tmp_path, {"model_type": kind}, {}))[0] == sizes


def test_pixels_are_normalised_as_the_file_says_or_as_for_clip(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.4, 0.3]}')
    assert published_pixels(tmp_path) == {"pixel_mean": (0.5, 0.4, 0.3), "pixel_std": (
        0.26862954, 0.26130258, 0.27577711)}


if __name__ == "__main__":
    rows = [f"| {name} | {'<' if relative_error(name) < 1e-6 else '>'} 1e-6 |" for name in PARITY]
    print("| what | relative error |", "| --- | --- |", *rows, sep="\n")
