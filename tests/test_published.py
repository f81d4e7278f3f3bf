"""Published weights and tokenizers give here what the libraries they were published for give.

`golden/` holds tiny models of each family with random weights, made with `transformers` 5.23.0 (InternLM2, which it
lacks, written out after its published modeling code), tokenizers trained with `tokenizers` 0.23.3, and what those
libraries answer: logits, features and ids. `python tests/test_published.py` prints the table of the README.
"""
import hashlib
import http.server
import json
import os
import shutil
import sys
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
import sample  # noqa: E402
import train  # noqa: E402
from data import NOT_LEARNED, PublishedText, Sample, Tokenizer, encode_turns, to_python  # noqa: E402
from model import GPT, MLLM, PIXELS, ViT  # noqa: E402
from qformer import QFormer, read_pretrained, read_safetensors  # noqa: E402

GOLDEN = Path(__file__).parent / "golden"
EXPECTED = torch.load(GOLDEN / "expected.pt", weights_only=True)
IDS = json.loads((GOLDEN / "tokenizers" / "ids.json").read_text())
STRINGS = IDS.pop("strings")


def logits(family):
    model = GPT.from_pretrained(GOLDEN / family, r=2).eval()
    return model(model.token_embedding(EXPECTED["ids"])), EXPECTED[family]


def bert(expected):
    model = QFormer.from_pretrained(GOLDEN / "bert", encoder_width=16, pad_id=-1).eval()
    rows = model.encode(text=EXPECTED["ids"], kind="separate")
    return rows if expected == "bert" else model.lm_head(rows), EXPECTED[expected]


# What is loaded, and a function that gives what comes out here and what should.
PARITY = {
    "GPT, LLaMA (TinyLlama, Vicuna)": lambda: logits("llama"),
    "GPT, LLaMA with tied embeddings (SmolLM2)": lambda: logits("smollm2"),
    "GPT, Qwen2": lambda: logits("qwen2"),
    "GPT, InternLM2": lambda: logits("internlm2"),
    "ViT, CLIP": lambda: (ViT.from_pretrained(GOLDEN / "clip").eval()(EXPECTED["pixels_clip"]), EXPECTED["clip"]),
    "ViT, CLIP, last block left out": lambda: (
        ViT.from_pretrained(GOLDEN / "clip", drop_last=1).eval()(EXPECTED["pixels_clip"]), EXPECTED["clip_penultimate"]),
    "ViT, BLIP-2 (EVA-CLIP)": lambda: (
        ViT.from_pretrained(GOLDEN / "blip2").eval()(EXPECTED["pixels_blip2"]), EXPECTED["blip2_vit"]),
    "Q-Former, BLIP-2": lambda: (
        QFormer.from_pretrained(GOLDEN / "blip2").eval()(EXPECTED["blip2_vit"]), EXPECTED["blip2_qformer"]),
    "Q-Former, BERT's text branch": lambda: bert("bert"),
    "Q-Former, BERT's language head": lambda: bert("bert_logits"),
}


@torch.no_grad()
def relative_error(name: str) -> float:
    ours, expected = PARITY[name]()
    return ((ours - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("name", PARITY)
def test_published_weights_give_what_their_library_gives(name):
    assert relative_error(name) < 1e-5


@pytest.mark.parametrize("family", IDS)
def test_published_tokenizers_give_the_ids_of_their_library(family):
    tokenizer = Tokenizer.load(GOLDEN / "tokenizers" / family / "tokenizer.json")
    for text, expected in zip(STRINGS, IDS[family]):
        assert tokenizer.encode(text) == expected, ascii(text)


@pytest.mark.parametrize("family", ["gpt2", "smollm2", "llama3", "llama", "llama_metaspace"])
def test_decoding_gives_the_text_back(family, tmp_path):
    tokenizer = Tokenizer.load(GOLDEN / "tokenizers" / family / "tokenizer.json")
    tokenizer.save(tmp_path / "saved.json")
    saved = Tokenizer.load(tmp_path / "saved.json")
    for text in STRINGS:
        ids = tokenizer.encode(text)
        if "\u2581" not in text and not any(name in text for name in tokenizer.published.added):
            assert tokenizer.decode(ids) == (text.removeprefix(" ") if family == "llama_metaspace" else text)
        assert saved.encode(text) == ids and saved.end == tokenizer.end and saved.vocab_size == tokenizer.vocab_size


def test_patterns_mean_what_they_mean_to_unicode():
    for text, pattern, whole in (("\x1c", r"\s", False), ("\x1c", r"\S", True), ("\x85\u2003", r"[\s]+", True),
                                 ("\xb2\u2167\u0663", r"\p{N}+", True), ("\u4e00", r"\p{N}", False),
                                 ("\xe9\u5b57", r"[\p{L}]+", True), ("_", r"\p{L}", False), ("a1", r"[^\p{L}]+", False)):
        assert bool(to_python(pattern).fullmatch(text)) == whole, (ascii(text), pattern)
    text = PublishedText({"model": {"vocab": {}}})
    for single, parts in ((True, ["a", "1", "2", "b"]), (False, ["a", "12", "b"])):
        assert text.split({"type": "Digits", "individual_digits": single}, "a12b", True) == parts
    mark = {"type": "Metaspace", "replacement": "_", "prepend_scheme": "first", "split": False}
    text.pre_tokenizers = [{"type": "Digits", "individual_digits": True}, mark]
    assert text.words("a1", True) == ["_a", "1"] and text.words("a1", False) == ["a", "1"]


def test_whole_texts_are_not_kept_in_memory():
    tokenizer = Tokenizer.load(GOLDEN / "tokenizers" / "llama" / "tokenizer.json")     # where they are one word
    tokenizer.encode("a short one")
    kept = len(tokenizer.cache)
    tokenizer.encode("a long one " * 9)
    assert len(tokenizer.cache) == kept > 0


def test_plain_text_cannot_fake_a_special_token():
    for family in IDS:
        tokenizer = Tokenizer.load(GOLDEN / "tokenizers" / family / "tokenizer.json")
        added = tokenizer.published.added.values()
        special = {token["id"] for token in added if token["special"]}
        fakes = "".join(token["content"] for token in added) + "<ImageHere>"
        assert special & set(tokenizer.encode(fakes)) and not special & set(tokenizer.encode(fakes, plain=True))
        assert max(tokenizer.encode(fakes)) < min(tokenizer.pad, tokenizer.image, tokenizer.summary, tokenizer.dec)


def test_the_template_in_a_published_vocabulary_is_that_written_by_hand():
    tokenizer = Tokenizer.load(GOLDEN / "tokenizers" / "llama" / "tokenizer.json")
    ids, labels = encode_turns(tokenizer, [("<image> Is it red?", "no"), ("Sure?", "yes")], 2, 999)
    bos, eos, picture = tokenizer.published.vocab["<s>"], tokenizer.published.vocab["</s>"], tokenizer.image

    def text(words):                                          # the vocabulary writes a space before each piece itself
        return tokenizer.encode(words)

    expected = [([bos, *text("###Human:"), *text("<Img>"), picture, picture, *text("</Img>"), *text("Is it red?"),
                  *text("###Assistant:")], False), ([*text("no"), eos], True),
                ([*text("###Human:"), *text("Sure?"), *text("###Assistant:")], False), ([*text("yes"), eos], True)]
    assert ids == [token for part, _ in expected for token in part]
    assert labels == [token if learned else NOT_LEARNED for part, learned in expected for token in part]


# ---- Reading weights ------------------------------------------------------------------------------

def write_safetensors(path, tensors):
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in tensors.items():
        part = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        kind = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}[tensor.dtype]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + len(part)]}
        data += part
    words = json.dumps(header).encode()
    path.write_bytes(len(words).to_bytes(8, "little") + words + data)


@pytest.fixture
def llama(tmp_path):
    """A folder to spoil, and its tensors."""
    shutil.copytree(GOLDEN / "llama", tmp_path / "llama")
    return tmp_path / "llama", read_safetensors(GOLDEN / "llama" / "model.safetensors")


def test_safetensors_of_all_dtypes_read_as_written_even_where_bytes_are_not_aligned(tmp_path):
    tensors = {"a": torch.randn(3).half(), "odd": torch.randn(3, 5).bfloat16(), "b": torch.randn(2, 1, 2),
               "none": torch.empty(0, 4), "scalar": torch.tensor(7)}
    write_safetensors(tmp_path / "x.safetensors", tensors)
    read = read_safetensors(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], value) and read[name].dtype == value.dtype for name, value in tensors.items())


def test_a_safetensors_file_cut_anywhere_or_too_long_raises_and_is_named(tmp_path):
    write_safetensors(tmp_path / "x.safetensors", {"a": torch.ones(4), "b": torch.ones(2, 2)})
    whole = (tmp_path / "x.safetensors").read_bytes()
    huge = (2**63).to_bytes(8, "little") + whole[8:]
    for spoiled in [whole[:length] for length in range(len(whole))] + [whole + b"\0", huge]:
        (tmp_path / "x.safetensors").write_bytes(spoiled)
        with pytest.raises(ValueError, match="x.safetensors"):
            read_safetensors(tmp_path / "x.safetensors")


@pytest.mark.parametrize("change", [
    {"dtype": "F7"}, {"shape": [5]}, {"shape": [-4]}, {"shape": [-2, -2]}, {"shape": "4"}, {"shape": [2.0, 2]},
    {"shape": [2**62, 2**62]}, {"data_offsets": [0, 32]}, {"data_offsets": [16, 0]}, {"data_offsets": [4, 20]},
    {"data_offsets": [0]}, {"data_offsets": None}])
def test_a_safetensors_header_that_does_not_fit_raises(change, tmp_path):
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    for header in ({"a": entry | change}, {"a": entry, "b": entry | change}):
        words = json.dumps(header).encode()
        (tmp_path / "x.safetensors").write_bytes(len(words).to_bytes(8, "little") + words + bytes(16 * len(header)))
        with pytest.raises(ValueError, match="x.safetensors"):
            read_safetensors(tmp_path / "x.safetensors")


def test_tensors_that_overlap_raise_even_where_the_last_ends_with_the_file(tmp_path):
    header = {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
              "b": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}}
    words = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(len(words).to_bytes(8, "little") + words + bytes(32))
    with pytest.raises(ValueError, match="'b'.*cannot lie"):
        read_safetensors(tmp_path / "x.safetensors")


def test_code_in_a_pickle_is_not_run(llama):
    class Harmful:
        def __reduce__(self):
            return os.mkdir, (str(llama[0] / "harm"),)

    (llama[0] / "model.safetensors").unlink()
    torch.save({"a": Harmful()}, llama[0] / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin"):
        GPT.from_pretrained(llama[0])
    assert not (llama[0] / "harm").exists()


def test_a_list_of_files_may_not_leave_the_folder_and_must_keep_its_word(llama):
    folder, tensors = llama
    os.rename(folder / "model.safetensors", folder.parent / "outside.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "../outside.safetensors")}))
    with pytest.raises(ValueError, match="weight_map"):
        read_pretrained(folder)
    shutil.copy(folder.parent / "outside.safetensors", folder / "inside.safetensors")
    index.write_text(json.dumps({"weight_map": dict.fromkeys([*tensors, "lost.weight"], "inside.safetensors")}))
    with pytest.raises(ValueError, match="'lost.weight'"):
        read_pretrained(folder)
    (folder / "inside.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="inside.safetensors"):
        read_pretrained(folder)


def test_what_is_missing_left_over_or_of_another_shape_is_named(llama):
    folder, tensors = llama
    name = "model.layers.1.self_attn.k_proj.weight"
    for change, message in (({name: None}, "blocks.1.attention.wqkv.weight.*layers.1.self_attn.k_proj.weight"),
                            ({"model.layers.1.odd.bias": torch.ones(2)}, "layers.1.odd.bias"),
                            ({name: torch.ones(16, 15)}, r"\(48, 16\).*\(16, 16\) \+ \(16, 15\)"),
                            ({"lm_head.weight": torch.ones(63, 16)}, r"\(64, 16\).*\(63, 16\)")):
        changed = {key: value for key, value in (tensors | change).items() if value is not None}
        write_safetensors(folder / "model.safetensors", changed)
        with pytest.raises(ValueError, match=message):
            GPT.from_pretrained(folder, r=2)


@pytest.mark.parametrize("part, family, change, message", [
    (GPT, "llama", {"model_type": "gpt_neox"}, "gpt_neox"), (GPT, "llama", {"head_dim": 32}, "head_dim 32"),
    (GPT, "llama", {"hidden_size": "16"}, "hidden_size must be of type int"),
    (GPT, "llama", {"num_attention_heads": 0}, "positive, got 0"),
    (GPT, "llama", {"num_hidden_layers": True}, "of type int and positive, got True"),
    (GPT, "llama", {"rope_parameters": {"rope_type": "llama3"}}, "rope_type 'llama3'"),
    (GPT, "llama", {"rope_parameters": [1]}, "rotary"), (GPT, "llama", {"hidden_act": "gelu"}, "hidden_act"),
    (ViT, "clip", {"vision_config": [1]}, "expected an object"), (ViT, "llama", {}, "not of 'llama'"),
    (ViT, "clip", {"vision_config": {"hidden_act": "swish"}}, "hidden_act 'swish'"), (QFormer, "llama", {}, "not 'llama'"),
    (QFormer, "bert", {"hidden_act": "relu"}, "hidden_act 'relu'"),
    (QFormer, "blip2", {"qformer_config": {"hidden_act": "relu"}}, "hidden_act 'relu'")])
def test_a_config_that_is_not_known_raises_and_says_what(part, family, change, message, tmp_path):
    shutil.copytree(GOLDEN / family, tmp_path / "x")
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    (tmp_path / "x" / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        part.from_pretrained(tmp_path / "x")


@pytest.mark.parametrize("drop_last", [-1, 3, 5])
def test_at_least_one_block_of_a_vit_stays(drop_last):
    with pytest.raises(ValueError, match="at least one of 3 blocks"):
        ViT.from_pretrained(GOLDEN / "clip", drop_last=drop_last)


def test_a_vision_tower_without_biases_loads(tmp_path):
    config, weights = read_pretrained(GOLDEN / "blip2")
    config["vision_config"]["qkv_bias"] = False
    weights = {name: value for name, value in weights.items() if not name.endswith("qkv.bias")}
    write_safetensors(tmp_path / "model.safetensors", weights)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert ViT.from_pretrained(tmp_path).blocks[0].qkv.bias is None


def spoiled_tokenizers():
    """The content of a tokenizer.json with one thing wrong, and a word of the error."""
    content = json.loads((GOLDEN / "tokenizers" / "qwen2" / "tokenizer.json").read_text())
    regex = content["pre_tokenizer"]["pretokenizers"][0]
    for pattern in (r"(?<!", r"\P{L}", r"\p{Han}", r"\pL", "["):
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        yield content | {"pre_tokenizer": split}
    yield content | {"pre_tokenizer": regex | {"behavior": "Removed"}}
    yield content | {"pre_tokenizer": {"type": "Whitespace"}}
    yield content | {"normalizer": {"type": "Lowercase"}}
    for number in (-3, 10**20, 10**9, "7", None):
        yield content | {"added_tokens": [{"id": number, "content": "<x>", "special": True}]}
    for change in ({"type": "WordPiece"}, {"vocab": []}, {"vocab": {}}, {"merges": [["a"]]}, {"merges": ["no_such pair"]},
                   {"merges": 7}, {"end_of_word_suffix": "</w>"}):
        yield content | {"model": content["model"] | change}


@pytest.mark.parametrize("content", [*spoiled_tokenizers()])
def test_a_tokenizer_that_cannot_be_followed_raises_and_is_named(content, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="tokenizer.json"):
        Tokenizer.load(tmp_path / "tokenizer.json").encode("some text 12")


def test_a_qformer_from_bert_starts_both_ffns_alike_and_sees_with_fresh_eyes():
    torch.manual_seed(0)
    first = QFormer.from_pretrained(GOLDEN / "bert", encoder_width=16, vocab_size=40, n_queries=3)
    second = QFormer.from_pretrained(GOLDEN / "bert", encoder_width=16, vocab_size=0, n_queries=3)
    for block, without_text in zip(first.blocks, second.blocks):
        assert all(torch.equal(a, b) for a, b in zip(block.query_ffn.parameters(), block.text_ffn.parameters()))
        assert torch.equal(block.query_ffn[0].weight, without_text.query_ffn[0].weight)
    assert not torch.equal(first.blocks[0].cross_attention.q_proj.weight, second.blocks[0].cross_attention.q_proj.weight)
    assert len(first.word_embedding.weight) == 40 and not second.has_text_branch


# ---- Training from them ---------------------------------------------------------------------------

@pytest.fixture
def language_model(tmp_path):
    """A folder as of SmolLM2: random weights under LLaMA's names, with a tokenizer that fits them."""
    folder = tmp_path / "llm"
    shutil.copytree(GOLDEN / "tokenizers" / "smollm2", folder)
    sizes = dict(hidden_size=16, num_attention_heads=2, num_key_value_heads=1, intermediate_size=24, num_hidden_layers=2,
                 vocab_size=420, tie_word_embeddings=True)
    (folder / "config.json").write_text(json.dumps(sizes | {"model_type": "llama"}))
    shapes = {"input_layernorm": (16,), "post_attention_layernorm": (16,), "self_attn.q_proj": (16, 16),
              "self_attn.k_proj": (8, 16), "self_attn.v_proj": (8, 16), "self_attn.o_proj": (16, 16),
              "mlp.gate_proj": (24, 16), "mlp.up_proj": (24, 16), "mlp.down_proj": (16, 24)}
    tensors = {f"model.layers.{i}.{name}.weight": torch.randn(shape) / 4 for i in (0, 1) for name, shape in shapes.items()}
    write_safetensors(folder / "model.safetensors", tensors | {
        "model.embed_tokens.weight": torch.randn(420, 16), "model.norm.weight": torch.ones(16)})
    return folder


def run(monkeypatch, out, **values):
    values = dict(batch_size=2, read_samples=4, see_samples=4, align_samples=4, instruct_samples=4, eval_samples=4,
                  workers=0, r=2) | values
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]
    monkeypatch.setattr("sys.argv", ["train.py", "--device=cpu", "--no-bf16", f"--out={out}", *flags])
    train.main()


@pytest.mark.parametrize("qformer, stages", [("blip2", ("align", "instruct")), ("bert", ("see", "align", "instruct"))])
def test_a_run_on_published_parts_skips_their_stand_ins_and_keeps_what_is_frozen(
        qformer, stages, language_model, tmp_path, monkeypatch):
    out, vit = tmp_path / "out", GOLDEN / "blip2"
    run(monkeypatch, out, vit=vit, qformer=GOLDEN / qformer, llm=language_model)
    assert {path.stem for path in out.glob("*.pt")} == {*stages}
    model, ready = MLLM.load(out / "instruct.pt"), GPT.from_pretrained(language_model, r=2).state_dict()
    decoder = {name: value for name, value in model.decoder.state_dict().items() if "lora_" not in name}
    assert decoder and all(torch.equal(value, ready[name]) for name, value in decoder.items())
    eyes = ViT.from_pretrained(vit).state_dict()
    assert all(torch.equal(value, eyes[name]) for name, value in model.vit.state_dict().items())
    assert model.config.image_size == (28, 28) and model.config.pixel_mean == PIXELS["mean"]
    assert len(model.qformer.blocks) == (3 if qformer == "blip2" else 2)        # BERT's last has served `see`
    assert json.loads((out / "metrics.json").read_text())["seconds_by_stage"].keys() == {*stages, "evaluate"}
    loaded, tokenizer = sample.load(out, "cpu")
    asked = Sample([Image.new("RGB", (40, 30))], [("<image> What?", None)])
    assert isinstance("".join(sample.stream(loaded, tokenizer, asked, 3)), str)


def test_a_decoder_of_ones_own_can_join_published_eyes_and_is_measured_as_it_was_trained(tmp_path, monkeypatch):
    both = dict(vit=GOLDEN / "blip2", qformer=GOLDEN / "blip2")
    run(monkeypatch, tmp_path, **both, fit="pad", max_len=300, dim=16, n_layers=1, n_heads=2, n_kv_heads=2)
    assert {path.stem for path in tmp_path.glob("*.pt")} == {"read", "align", "instruct"}
    first = json.loads((tmp_path / "metrics.json").read_text())
    run(monkeypatch, tmp_path, stage="evaluate", n_queries=3)  # knows from the weights how they see
    again = json.loads((tmp_path / "metrics.json").read_text())
    assert {name: value for name, value in again.items() if "accuracy" in name} == {
        name: value for name, value in first.items() if "accuracy" in name}
    for name in ("image_size", "fit", "max_len", "pixel_mean", "pixel_std"):
        assert again["config"][name] == first["config"][name] != getattr(train.Config(), name)


def test_flags_that_published_parts_contradict_raise(language_model, monkeypatch, tmp_path):
    eyes = dict(vit=GOLDEN / "clip", llm=language_model, max_len=100)
    config = json.loads((language_model / "config.json").read_text())
    (language_model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 100}))
    for flags, message in (
            (dict(vit=GOLDEN / "blip2", qformer=GOLDEN / "blip2", n_queries=3), "n_queries is 5 in the published part"),
            (eyes | dict(n_layers=9), "n_layers is 2"), (eyes | dict(vit_drop_last=3), "at least one of 3 blocks"),
            (dict(qformer=GOLDEN / "blip2"), "give --vit"), (eyes | dict(max_len=101), "more than the 100 tokens"),
            (eyes | dict(stage="read"), "stand-in for what is given"),
            (dict(vit="me/none"), "--download me/none")):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            run(monkeypatch, tmp_path / "out", **flags)


@pytest.mark.parametrize("spoiled", ["null", "0.5", "[1, 2]", "[1, 2, 0]", '["a", "b", "c"]'])
def test_a_normalisation_that_is_none_raises_or_falls_back(spoiled, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(f'{{"image_mean": [0.5, 0.5, 0.5], "image_std": {spoiled}}}')
    if spoiled == "null":
        assert train.normalisation(tmp_path) == ((0.5, 0.5, 0.5), PIXELS["std"])
    else:
        with pytest.raises(ValueError, match="preprocessor_config.json.*three positive numbers"):
            train.normalisation(tmp_path)


def test_larger_pictures_interpolate_a_published_vit(language_model, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", f"--vit={GOLDEN / 'clip'}", "--vit-drop-last=1", "--preset=cpu",
                                     "--connector=patches", f"--llm={language_model}", "--image-size", "48", "40"])
    config = train.settings(train.parse_arguments())
    tokenizer = Tokenizer.load(language_model / "tokenizer.json")
    assert train.stages_of(config) == ("align", "instruct")
    model = train.model_for("align", config, tokenizer, tmp_path, torch.device("cpu"))
    ready = ViT.from_pretrained(GOLDEN / "clip", drop_last=1)
    assert torch.equal(model.vit.position_embedding, ready.positions((6, 5))) and len(model.vit.blocks) == 2


@pytest.mark.parametrize("given, stages", [
    ({}, train.STAGES), ({"llm"}, ("see", "align", "instruct")), ({"vit"}, train.STAGES),
    ({"vit", "qformer"}, ("read", "align", "instruct"))])
def test_only_stand_ins_for_what_is_not_given_are_trained(given, stages):
    config = train.Config(**dict.fromkeys(given, "x"), text_branch="qformer" not in given)
    assert train.stages_of(config) == stages
    assert ("vit" in train.who_learns(config, "see")) == ("vit" not in given)


def test_a_tokenizer_without_an_end_or_with_more_ids_than_the_model_raises(language_model, monkeypatch, tmp_path):
    config = json.loads((language_model / "config.json").read_text())
    (language_model / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    with pytest.raises(ValueError, match="420 ids, but the model knows 100"):
        run(monkeypatch, tmp_path / "out", llm=language_model)
    (language_model / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="eos_token"):
        run(monkeypatch, tmp_path / "out", llm=language_model)


# ---- Fetching them --------------------------------------------------------------------------------

@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A repository on a server of this machine: what it lists and holds, and what was asked for."""
    files = {"config.json": b"{}", "tokenizer.json": b"[]", "model.safetensors": b"weights", "README.md": b"no",
             "pytorch_model.bin": b"no"}
    listing = [{"type": "file", "path": path, "size": len(data)} for path, data in files.items()]
    listing[2]["lfs"] = {"oid": hashlib.sha256(files["model.safetensors"]).hexdigest()}
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            found = self.path.startswith(("/api/models/me/tiny/tree", "/me/tiny/resolve"))
            self.send_response(200 if found else 404)
            self.end_headers()
            self.wfile.write(json.dumps(listing).encode() if "api" in self.path else files[self.path.split("/")[-1]])

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    yield files, listing, asked
    server.shutdown()
    server.server_close()


def test_download_fetches_what_is_needed_once_and_checks_it(hub):
    files, listing, asked = hub
    folder = train.download("me/tiny")
    assert {path.name for path in folder.iterdir()} == {"config.json", "tokenizer.json", "model.safetensors"}
    assert (folder / "model.safetensors").read_bytes() == b"weights" and train.find_folder("me/tiny") == folder
    (folder / "config.json").unlink()
    asked.clear()
    train.download("me/tiny")
    assert [path.split("/")[-1] for path in asked] == ["main", "config.json"]   # the rest is there already
    for spoiled, message in (("model.safetensors", "hash"), ("tokenizer.json", "not the 2 bytes")):
        (folder / spoiled).unlink()
        right, files[spoiled] = files[spoiled], b"strange"
        with pytest.raises(ValueError, match=message):
            train.download("me/tiny")
        assert not (folder / spoiled).exists()
        files[spoiled] = right
    listing[:] = listing[:2]
    with pytest.raises(ValueError, match="no weights"):
        train.download("me/tiny")


def test_offline_the_error_says_which_files_to_put_where(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")                    # nothing listens there
    with pytest.raises(ValueError, match="(?s)config.json.*tokenizer.json.*safetensors.*hub.published.me.tiny"):
        train.download("me/tiny")
    with pytest.raises(FileNotFoundError, match="--download me/other"):
        train.find_folder("me/other")
    for name in ("../tiny", "me/../tiny", "/etc", "a/b/c", ""):
        with pytest.raises(ValueError, match="no name of a repository"):
            train.download(name)


if __name__ == "__main__":
    print("| what | relative error |\n| --- | --- |")
    for name in PARITY:
        print(f"| {name} | {relative_error(name):.1e} |")
