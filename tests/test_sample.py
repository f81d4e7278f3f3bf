"""Asking a trained model, from the command line and in a conversation."""
import io

import pytest
import torch
from PIL import Image

import sample
from data import Sample, SceneSpec, Tokenizer
from model import MLLM
from qformer import attend
from test_train import config_of, model_of, train


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What train.py leaves behind, with random weights."""
    out, config = tmp_path_factory.mktemp("out"), config_of("max_len=128", "scenes.max_things=2")
    model, collate, _ = model_of(config, "instruct")
    model.save(out / "instruct.pt", run=train.asdict(config))
    collate.tokenizer.save(out / "tokenizer.json")
    return out


@pytest.fixture
def run(folder, monkeypatch, capsys):
    def run(*words, out=folder):
        monkeypatch.setattr("sys.argv", ["sample.py", "--device=cpu", f"--out={out}", *words])
        sample.main()
        return capsys.readouterr().out
    return run


def test_without_a_picture_it_draws_a_scene_of_the_kind_it_was_trained_on(run, monkeypatch):
    specs, draw = [], sample.random_things
    monkeypatch.setattr(sample, "random_things", lambda *rest: specs.append(rest[0]) or draw(*rest))
    run("--max-new-tokens=5")
    assert specs == [SceneSpec(max_things=2)]


def test_the_seed_decides_the_answer(run):
    one, again, other = (run(f"--seed={seed}", "--temperature=1", "--max-new-tokens=20")
                         for seed in (1, 1, 2))
    assert one == again != other


def test_pieces_of_the_stream_join_to_the_whole_answer(folder, monkeypatch):
    model, tokenizer = MLLM.load(folder / "instruct.pt"), Tokenizer.load(folder / "tokenizer.json")
    ids = [*tokenizer.encode(" a circle é 😀"), tokenizer.end]
    monkeypatch.setattr(model, "generate", lambda *_, **__: (torch.tensor([id]) for id in ids))
    asked = Sample([Image.new("RGB", (9, 9))], [("<image> q", None)])
    pieces = list(sample.stream(model, tokenizer, asked, 50))
    assert "".join(pieces) == "a circle é 😀" and len(pieces) > 2 and "\ufffd" not in str(pieces)


def test_a_chat_remembers_earlier_turns_and_shows_all_pictures_once(run, monkeypatch, tmp_path):
    files, given = [str(tmp_path / color) for color in ("red", "blue")], []
    for color in ("red", "blue"):
        Image.new("RGB", (30, 20), color).save(tmp_path / color, "PNG")
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo <image>\n"))
    monkeypatch.setattr(sample, "stream", lambda model, tokenizer, asked, *_, **__: given.append(
        (list(asked.turns), [image.getpixel((0, 0)) for image in asked.images])) or ["fine"])
    with pytest.raises(EOFError):                         # Ctrl-D, which ends the program
        run("--chat", "--image", *files)
    pictures, first = [(255, 0, 0), (0, 0, 255)], "<image> <image> one"
    assert given == [([(first, None)], pictures), ([(first, "fine"), ("two  ", None)], pictures)]


def test_what_the_user_can_get_wrong_is_named(run, tmp_path, monkeypatch):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    for name in ("broken.png", "absent.png"):
        with pytest.raises(ValueError, match=name):
            run(f"--image={tmp_path / name}")
    with pytest.raises(FileNotFoundError, match="instruct.pt"):
        run(out=tmp_path)
    with pytest.raises(ValueError, match="max_len 128"):
        run("--prompt", "word " * 200)
    monkeypatch.setattr(sample, "load_file", lambda _: {"run": {"data": "my.json"}})
    with pytest.raises(ValueError, match="--image"):      # a scene would be none of its pictures
        run()


def test_attention_is_that_of_the_cross_attention_and_each_query_gets_a_picture(
        folder, run, monkeypatch):
    model = MLLM.load(folder / "instruct.pt").eval()
    image = torch.randint(0, 256, (1, 3, *model.config.vit["image_size"]), dtype=torch.uint8)
    inputs, attention = [], model.qformer.blocks[0].cross_attention
    attention.register_forward_hook(lambda _, given, output: inputs.extend(given))
    maps = sample.attention_maps(model, image)  # (1, cross-attentions, Q, P + 1)
    q, k = (projection(rows).unflatten(-1, (attention.n_heads, -1)).transpose(1, 2) for projection,
            rows in zip((attention.q_proj, attention.k_proj), inputs))
    weights = attend(q, k, torch.eye(k.shape[2]).expand(1, attention.n_heads, -1, -1))
    torch.testing.assert_close(maps[:, 0], weights.mean(dim=1))
    sheet, drawn = sample.contact_sheet, []
    monkeypatch.setattr(sample, "contact_sheet", lambda pictures, *rest, **sizes: (
        drawn.extend(pictures) or sheet(pictures, *rest, **sizes)))
    run("--attention", "--max-new-tokens=2")
    assert len(drawn) == 1 + maps.shape[2] and (folder / "attention.png").exists()
