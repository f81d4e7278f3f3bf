"""Bad input by the hundred: always a clear error that names the file, or a result; nothing from the inside, no code run."""
import json
import os
import random
import re
import shutil
import subprocess
import sys

import pytest
from PIL import Image

import train
from data import BadRecord, Conversations, Tokenizer, encode_turns, read_image
from model import GPT, MLLM
from test_data import GOOD, record, write
from test_published import GOLDEN

ODD = [None, True, -1, 0, 10**30, 1e308, float("inf"), "", "x", "\0", "\ud800", "/etc/passwd", "../../etc/passwd", "a" * 5000,
       "<image>" * 50, [], [[]], [[[]]], {}, {"a": {}}, ["x", None], [1, 2], {"from": "human"}]


def spoil(data: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, cut, doubled or put in."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        start = rng.randrange(len(data) + 1)
        stop = start + rng.choice((1, 1, 4, 100))
        data[start:stop] = rng.choice((b"", rng.randbytes(stop - start), b"\xff" * 8, bytes(data[:50]), b"9" * 30, b"[" * 9))
    return bytes(data)


def spoil_tree(tree, rng: random.Random):
    """A JSON tree with one part put in the place of another, or something odd in it."""
    if rng.random() < 0.3 or not isinstance(tree, (dict, list)) or not tree:
        return rng.choice(ODD)
    tree = tree.copy()
    key = rng.choice(list(tree)) if isinstance(tree, dict) else rng.randrange(len(tree))
    tree[key] = spoil_tree(tree[key], rng)
    return tree


def works_or_names(path, use) -> None:
    """`use` either works or raises what a person can act on, with the file in it."""
    try:
        use()
    except (ValueError, FileNotFoundError) as error:
        assert str(path) in str(error) and len(str(error)) < 20_000, error


def test_spoiled_json_is_read_or_named(tmp_path):
    rng, path = random.Random(0), write(tmp_path, GOOD, record("<image> q", "a", "b", "c", image=[["red.png", "blue.png"]]))
    (tmp_path / "image").mkdir()
    shutil.copy(tmp_path / "red.png", tmp_path / "image" / "7.jpg")
    records = json.loads(path.read_text())
    annotations = {"annotations": [{"image_id": "7", "caption": "A dog runs over the red field."}] * 2}
    for i in range(600):
        content = (records, annotations)[i % 2]
        text = json.dumps(spoil_tree(content, rng) if i % 4 < 2 else content).encode()
        path.write_bytes(text if i % 4 < 2 else spoil(text, rng))

        def use():
            dataset = Conversations(path, skip_bad=i % 3 == 0)
            for task in ("read", "see", "align", "instruct", "test"):
                for sample in dataset.for_task(task):
                    encode_turns(Tokenizer([]), sample.turns, 2, 500, sample.name, sample.frames)

        works_or_names(path, use)


@pytest.mark.filterwarnings("ignore")
def test_spoiled_pictures_are_read_or_named(tmp_path):
    rng = random.Random(0)
    picture = Image.effect_noise((20, 16), 90).convert("RGB")
    for kind in ("png", "jpeg", "gif", "tiff", "bmp", "ppm", "webp", "ico", "tga"):
        path = tmp_path / f"x.{kind}"
        picture.save(path)
        whole = path.read_bytes()
        for _ in range(40):
            path.write_bytes(spoil(whole, rng))
            works_or_names(path, lambda: read_image(path))


def test_a_program_is_no_picture(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "x.eps")
    shutil.copy(tmp_path / "x.eps", tmp_path / "x.png")
    for name in ("x.eps", "x.png"):
        with pytest.raises(BadRecord, match="cannot identify"):
            read_image(tmp_path / name)


@pytest.mark.parametrize("outside", ["{outside}/secret.png", "../secret.png", "images/../../secret.png", "link.png",
                                     "folder/secret.png"])
def test_no_picture_is_read_outside_the_given_folder(tmp_path, outside):
    inside = tmp_path / "inside"
    (inside / "images").mkdir(parents=True)
    path = write(inside, GOOD)
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    (inside / "link.png").symlink_to(tmp_path / "secret.png")
    (inside / "folder").symlink_to(tmp_path)
    path.write_text(json.dumps([record("<image> q", "a", image=outside.format(outside=tmp_path))]))
    with pytest.raises(BadRecord, match="record 0.*leaves the folder"):
        Conversations(path, inside)
    (inside / "captions.txt").write_text(f"{outside.format(outside=tmp_path)}\ta caption\n")
    with pytest.raises(BadRecord, match="leaves the folder"):
        Conversations(inside, inside)
    (tmp_path / "alias").symlink_to(inside)                   # a folder that is itself a link is the one given
    path.write_text(json.dumps([record("<image> q", "a", image="red.png")]))
    assert len(Conversations(tmp_path / "alias" / "my.json", tmp_path / "alias")) == 1


@pytest.mark.parametrize("name", ["qwen2", "llama", "llama_metaspace", "added_tokens_gpt2"])
def test_spoiled_tokenizers_work_or_are_named(name, tmp_path):
    rng, path = random.Random(0), tmp_path / "tokenizer.json"
    content = json.loads((GOLDEN / "tokenizers" / name / "tokenizer.json").read_text())
    content["model"]["merges"] = content["model"]["merges"][:20]
    for i in range(120):
        text = json.dumps(spoil_tree(content, rng) if i % 2 else content).encode()
        path.write_bytes(text if i % 2 else spoil(text, rng))
        works_or_names(path, lambda: Tokenizer.load(path).encode("a text 12 <s>\ud800 \U0001f600"))


def test_spoiled_weights_load_or_are_named(tmp_path):
    rng, folder = random.Random(0), tmp_path / "llama"
    shutil.copytree(GOLDEN / "llama", folder)
    whole = {name: (folder / name).read_bytes() for name in ("config.json", "model.safetensors")}
    config = json.loads(whole["config.json"])
    for i in range(150):
        for name, data in whole.items():
            (folder / name).write_bytes(data)
        if i % 3 == 0:
            (folder / "config.json").write_text(json.dumps(spoil_tree(config, rng)))
        elif i % 3 == 1:
            (folder / "config.json").write_bytes(spoil(whole["config.json"], rng))
        else:                                                 # mostly the header: the rest are numbers
            (folder / "model.safetensors").write_bytes(spoil(whole["model.safetensors"][:3000], rng)
                                                       + whole["model.safetensors"][3000:])
        works_or_names("", lambda: GPT.from_pretrained(folder, r=2))


def test_spoiled_checkpoints_load_or_are_named(tmp_path):
    rng, path = random.Random(0), tmp_path / "x.pt"
    config = train.ModelConfig(300, (16, 16), vit_dim=8, vit_layers=1, vit_heads=1, qformer_dim=8, qformer_layers=2,
                               qformer_heads=1, n_queries=1, dim=8, n_layers=1, n_heads=1, n_kv_heads=1, r=1)
    MLLM(config).save(path)
    whole = path.read_bytes()
    for i in range(150):
        path.write_bytes(spoil(whole, rng) if i % 2 else whole[:rng.randrange(len(whole))])
        works_or_names(path, lambda: MLLM.load(path))


def test_any_prompt_is_text():
    rng = random.Random(0)
    tokenizers = [Tokenizer([])] + [Tokenizer.load(GOLDEN / "tokenizers" / name / "tokenizer.json")
                                    for name in ("qwen2", "llama")]
    for i in range(300):
        text = "".join(chr(rng.randrange(0x110000 if rng.random() < 0.3 else 0x80)) for _ in range(rng.randint(0, 30)))
        text += rng.choice(("<image>", "###", "</s>", "<|im_end|>", "<ImageHere>", os.fsdecode(rng.randbytes(9))))
        for tokenizer in tokenizers:
            asked = text.replace("<image>", " ")
            ids, _ = encode_turns(tokenizer, [("<image> " + asked, None)], 2, 999)
            assert ids.count(tokenizer.image) == 2
            assert tokenizer.end not in ids or tokenizer.published is None
            assert isinstance(tokenizer.decode(ids), str)


def test_a_run_on_bad_input_ends_with_one_sentence(tmp_path):
    (tmp_path / "bad.json").write_text('[{"id": 1}]')
    for flags, sentence in ((["--data", "bad.json"], "record 0 .id 1.: expected an object"),
                            (["--resume"], "nothing to resume"), (["--out", "bad.json"], "bad.json")):
        done = subprocess.run([sys.executable, train.__file__, *flags], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 1 and re.fullmatch(rf"train.py: .*{sentence}.*\n", done.stderr)
