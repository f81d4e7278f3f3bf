"""Published weights and tokenizers give here what the libraries they were published for give.

golden/ holds tiny models with random weights (transformers 5.23.0), tokenizers (0.23.3), and what
these libraries give; ids are null where a text holds an added token. Run, it prints a table.
"""
import json
import shutil
import sys
import unicodedata
from functools import partial
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import (IGNORED, PublishedTokenizer, encode_turns, published_gpt,  # noqa: E402
                  published_qformer, published_vit, read_safetensors)
from model import GPT, ViT  # noqa: E402
from qformer import QFormer  # noqa: E402

GOLDEN = Path(__file__).parent / "golden"
EXPECTED = torch.load(GOLDEN / "expected.pt", weights_only=True)
IDS = json.loads((GOLDEN / "tokenizers/ids.json").read_text(encoding="utf-8"))
STRINGS = IDS.pop("strings")
POINTER = b"version https://git-lfs.github.com/spec/v1\n"  # what git-LFS leaves for a file

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
    ours = model.lm_head(model(model.token_embedding(x))) if part is GPT else model(x)
    return ((ours - EXPECTED[expected]).abs().max() / ours.abs().max()).item()


@pytest.mark.parametrize("name", PARITY)
def test_published_weights_give_what_their_library_gives(name):
    assert relative_error(name) < 1e-5


def tokenizer_in(folder):
    return PublishedTokenizer.load(folder / "tokenizer.json")


@pytest.mark.parametrize("family", IDS)
def test_published_tokenizers_give_the_ids_of_their_library_and_the_text_back(family):
    tokenizer = tokenizer_in(GOLDEN / "tokenizers" / family)
    for text, expected in zip(STRINGS, IDS[family]):
        ids = tokenizer.encode(text)
        assert expected in (None, ids), ascii(text)
        text = unicodedata.normalize("NFC", text) if family == "qwen2" else text
        text = text.removeprefix(" ") if family == "llama_metaspace" else text
        assert "\u2581" in text or tokenizer.decode(ids) == text  # U+2581 stands for a space there


def test_bytes_that_a_vocabulary_lacks_are_dropped():
    tokenizer, whole = (tokenizer_in(GOLDEN / "tokenizers/qwen2") for _ in range(2))
    del tokenizer.vocab["j"]
    assert tokenizer.encode(" tjhe just") == whole.encode(" the ust")  # what is left may be merged


@pytest.mark.parametrize("family", IDS)
def test_text_cannot_fake_an_added_token_or_a_mark_of_ours(family):
    tokenizer = tokenizer_in(GOLDEN / "tokenizers" / family)
    added = {token["content"]: token["id"] for token in tokenizer.content["added_tokens"]}
    ids = {*tokenizer.encode(" ".join(added) + "".join(added) + "<ImageHere>")}
    marks = {tokenizer.pad_id, tokenizer.image_id, tokenizer.cls_id, tokenizer.dec_id}
    assert len(marks) == 4 and not ids & {*added.values()} and not marks & (ids | {*added.values()})


@pytest.mark.parametrize("family, text, trained", [
    ("llama", "<s> ###Human: <Img>@@ </Img> Is it? ###Assistant: no</s> ###Human: Sure?"
     " ###Assistant: yes</s>", "no</s> yes</s>"),
    ("qwen2", "###Human: <Img>@@</Img> Is it?###Assistant: no<|im_end|>###Human: Sure?"
     "###Assistant: yes<|im_end|>", " no<|im_end|> yes<|im_end|>")])
def test_the_template_in_a_published_vocabulary_is_that_written_by_hand(family, text, trained):
    tokenizer = tokenizer_in(GOLDEN / "tokenizers" / family)
    tokenizer.bytes[tokenizer.image_id] = b"@"
    ids, labels = encode_turns(tokenizer, [("<image> Is it?", "no"), ("Sure?", "yes")], 2)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(label for label in labels if label != IGNORED) == trained
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels))


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


@pytest.mark.parametrize("load, name, change, message", [
    (published_gpt, "llama/model.safetensors", Path.unlink, "no weights"),
    (published_gpt, "llama/model.safetensors", partial(Path.write_bytes, data=POINTER), "LFS"),
    (published_gpt, "qwen2/model-00002-of-00003.safetensors", Path.unlink, "-of-00003"),
    (published_vit, "clip/pytorch_model.bin", partial(torch.save, {"a": print}), "model.bin"),
    (published_gpt, "llama/config.json", {"model_type": "gpt_neox"}, "model_type 'gpt_neox'"),
    (published_gpt, "llama/config.json", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    (published_vit, "clip/config.json", {"vision_config": {"hidden_act": "gelu_new"}}, "gelu_new"),
    (published_gpt, "llama/config.json", {"quantization_config": {"bits": 4}}, "quantiz"),
    (published_gpt, "llama/config.json", {"rope_parameters": {"rope_type": "llama3"}}, "'llama3'"),
    (published_gpt, "llama/config.json", {"rope_parameters": 0, "rope_scaling": {"type": "yarn"}},
     "'yarn'"), (partial(published_vit, drop_last=3), "clip/config.json", {}, "drop_last 3.* of 3"),
    (tokenizer_in, "tokenizers/gpt2/tokenizer.json", Path.unlink, "tokenizer.json is missing"),
    (tokenizer_in, "tokenizers/qwen2/tokenizer.json", {"added_tokens": []}, "lacks the eos_token"),
    (tokenizer_in, "tokenizers/gpt2/tokenizer.json", {"model": {"vocab": []}}, "json: not.*known"),
    (tokenizer_in, "tokenizers/gpt2/tokenizer.json", {"pre_tokenizer": None}, "steps"),
    (tokenizer_in, "tokenizers/gpt2/tokenizer.json", {"normalizer": {"type": "Strip"}}, "Strip")])
def test_what_is_missing_or_not_known_is_named(load, name, change, message, tmp_path):
    file = shutil.copytree((GOLDEN / name).parent, tmp_path / "x") / Path(name).name
    if isinstance(change, dict):
        content = json.loads(file.read_text(encoding="utf-8")) | change
        change = partial(Path.write_text, data=json.dumps(content), encoding="utf-8")
    change(file)
    with pytest.raises(ValueError, match=message):
        load(file.parent)


if __name__ == "__main__":
    rows = [f"| {name} | {'<' if relative_error(name) < 1e-6 else '>'} 1e-6 |" for name in PARITY]
    print("| what | relative error |", "| --- | --- |", *rows, sep="\n")
