"""Asking a trained model, from the command line and in a conversation."""
import io

import pytest
import torch
from PIL import Image

import sample
from data import END, Sample, SceneSpec, Scenes, Tokenizer, corpus
from model import MLLM, ModelConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What train.py leaves behind, with random weights."""
    out = tmp_path_factory.mktemp("out")
    tokenizer = Tokenizer.train(corpus(Scenes(SceneSpec(), "read", 50)), 400)
    tokenizer.save(out / "tokenizer.json")
    torch.manual_seed(0)
    MLLM(ModelConfig(tokenizer.vocab_size, (48, 48), vit_dim=16, vit_layers=1, vit_heads=2, qformer_dim=16,
                     qformer_layers=2, qformer_heads=2, n_queries=2, text_branch=False, dim=24, n_layers=2, n_heads=2,
                     n_kv_heads=1, r=2, max_len=128)).save(out / "instruct.pt")
    return out


def run(monkeypatch, folder, *words):
    monkeypatch.setattr("sys.argv", ["sample.py", "--device=cpu", f"--out={folder}", *words])
    sample.main()


def test_without_a_picture_it_draws_one_saves_it_and_asks(folder, monkeypatch, capsys):
    run(monkeypatch, folder, "--seed=1", "--max-new-tokens=5")
    assert Image.open(folder / "scene.png").size == (384, 384)
    printed = capsys.readouterr().out
    assert "you: Describe" in printed and "model: " in printed


def test_the_seed_decides_scene_and_answer(folder, monkeypatch, capsys):
    answers = []
    for seed in (1, 1, 2):
        run(monkeypatch, folder, f"--seed={seed}", "--temperature=1", "--max-new-tokens=20")
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != answers[2]


def test_pieces_of_the_stream_join_to_the_whole_answer(folder, monkeypatch):
    model, tokenizer = sample.load(folder, "cpu")
    ids = tokenizer.encode(" a circle é 😀")

    def generate(*rest, **sampling):
        yield from (torch.tensor([token]) for token in ids + [END])

    monkeypatch.setattr(model, "generate", generate)
    asked = Sample([Image.new("RGB", (9, 9))], [("<image> q", None)])
    pieces = list(sample.stream(model, tokenizer, asked, 50))
    assert "".join(pieces) == "a circle é 😀" and len(pieces) > 2 and "\ufffd" not in "".join(pieces)


def test_a_chat_remembers_earlier_turns_and_shows_the_picture_once(folder, monkeypatch, tmp_path):
    Image.new("RGB", (30, 20), "red").save(tmp_path / "red.png")
    asked = []

    def stream(model, tokenizer, conversation, *rest, **sampling):
        asked.append(list(conversation.turns))
        yield "fine"

    monkeypatch.setattr(sample, "stream", stream)
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo <image>\n"))
    run(monkeypatch, folder, "--chat", f"--image={tmp_path / 'red.png'}")
    assert asked == [[("<image> one", None)], [("<image> one", "fine"), ("two  ", None)]]


def test_several_pictures_stand_side_by_side_or_as_frames_of_one_clip(folder, monkeypatch, tmp_path, capsys):
    for color in ("red", "blue"):
        Image.new("RGB", (48, 48), color).save(tmp_path / f"{color}.png")
    files, given, generate = [str(tmp_path / "red.png"), str(tmp_path / "blue.png")], [], MLLM.generate

    def spy(model, prompts, images, *rest, **sampling):
        given.append((prompts[0].tolist(), images))
        return generate(model, prompts, images, *rest, **sampling)

    monkeypatch.setattr(MLLM, "generate", spy)
    for more in ([], ["--clip"]):
        run(monkeypatch, folder, "--image", *files, "--prompt=q", "--max-new-tokens=3", *more)
    (apart, images), (clip, frames) = given                   # 2 rows each: <Img> 7, placeholder 1, </Img> 8
    assert apart[3:11] == [7, 1, 1, 8, 7, 1, 1, 8] and clip[3:9] == [7, 1, 1, 1, 1, 8]
    assert torch.equal(images, frames) and images[:, 0, 0, 0].tolist() == [1, -1]


def test_what_the_user_can_get_wrong_is_named(folder, monkeypatch, tmp_path):
    with pytest.raises(FileNotFoundError, match="train.py"):
        run(monkeypatch, tmp_path)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    for name in ("broken.png", "absent.png"):
        with pytest.raises(ValueError, match=name):
            run(monkeypatch, folder, f"--image={tmp_path / name}")
    with pytest.raises(ValueError, match="max_len 128"):
        run(monkeypatch, folder, "--prompt", "word " * 200)
