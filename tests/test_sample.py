"""Asking a trained model: from the command line, in a conversation, and a thousand questions."""
import io
import re
from dataclasses import asdict
from functools import partial

import pytest
import torch
from PIL import Image

import qformer
import sample
from data import Sample, SceneSpec, encode_turns
from model import save_file
from test_train import config_of, model_of

RED, BLUE = (Image.new("RGB", (9, 9), color) for color in ("red", "blue"))


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A model with random weights, what batches for it, and the folder that train.py leaves."""
    out, config = tmp_path_factory.mktemp("o"), config_of("--max-len=128", "--scenes.max-things=2")
    model, collate, _ = model_of(config, "instruct")
    save_file({"config": asdict(model.config), "model": model.state_dict(), "run": asdict(config),
               "tokenizer": collate.tokenizer.state}, out / "instruct.pt")
    return model.eval(), collate, out


@pytest.fixture
def run(parts, monkeypatch, capsys):
    def run(*words):
        monkeypatch.setattr("sys.argv", ["sample.py", "--device=cpu", f"--out={parts[2]}", *words])
        sample.main()
        return capsys.readouterr().out
    return run


def test_without_a_picture_a_scene_is_drawn_as_in_training_and_the_seed_decides(run, monkeypatch):
    seen = []
    monkeypatch.setattr(sample, "random_things", lambda *given: seen.extend(given) or [])
    one, again, other = ((run(f"--seed={seed}", "--temperature=1", "--max-new-tokens=20"),
                          seen.pop(), seen.pop().random(), seen.pop()) for seed in (1, 1, 2))
    assert one == again and {*one} & {*other} == {"test", SceneSpec(max_things=2)}


def test_pieces_of_the_stream_join_to_the_whole_answer(parts, monkeypatch):
    model, collate, _ = parts
    ids = [*collate.tokenizer.encode(" a circle é 😀"), collate.tokenizer.end_id, 20]
    monkeypatch.setattr(model, "generate", lambda *_, **__: (torch.tensor([id]) for id in ids))
    pieces = list(sample.stream(model, collate, Sample([RED], [("<image> q", None)]), 50))
    assert "".join(pieces) == "a circle é 😀" and len(pieces) > 2 and "\ufffd" not in str(pieces)


def test_a_chat_keeps_its_latest_turns_and_shows_all_pictures_once(run, parts, monkeypatch):
    given = []

    def stream(model, collate, asked, *_, **__):
        assert not model.training and asked.images == ["a", "b"]
        given.append(asked.turns)
        return ["fi", "ne"]

    asked = "".join(f"is it <image>{i}?\n" for i in range(9))
    monkeypatch.setattr("sys.stdin", io.StringIO(asked))
    monkeypatch.setattr(sample, "read_image", str)
    monkeypatch.setattr(sample, "stream", stream)
    with pytest.raises(EOFError):  # Ctrl-D, which ends the program
        run("--chat", "--max-new-tokens=50", "--image", "a", "b")
    one, two = (len(encode_turns(parts[1].tokenizer, turns, 2)[0]) for turns in given[:2])
    most = 1 + (128 - 50 - one) // (two - one)  # as many turns fit
    for i, turns in enumerate(given):
        (first, *questions), answers = zip(*turns)
        n = min(i + 1, most)
        assert first == f"<image> <image> is it  {i + 1 - n}?" and len(questions) == n - 1
        assert answers == (*["fine"] * (n - 1), None)
    assert len(given) == 9 > most > 1


def test_what_the_user_can_get_wrong_is_named(run, parts, tmp_path, monkeypatch, capsys):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    for flag, message in (("--image={}/broken.png", "broken.png"), ("--out={}/absent", "absent"),
                          ("--image={}/absent.png", "absent.png"), ("--device=cuda:77", "cuda:77"),
                          ("--top-k=-1", "--top-k.*at least 0"), ("--temperature=nan", "'nan'"),
                          ("--max-new-tokens=0", "--max-new-tokens.*at least 1")):
        with pytest.raises((ValueError, OSError, SystemExit)) as error:
            run(flag.format(tmp_path))
        assert re.search(message, f"{error.value} {capsys.readouterr().err}")
    own = {"run": {"data": "my.json"}, "tokenizer": {}}
    monkeypatch.setattr(sample, "load_model", lambda _: (parts[0], own))
    with pytest.raises(ValueError, match="--image"):  # a scene would be none of its pictures
        run()


def test_attention_maps_are_the_softmax_of_the_cross_attention(run, parts, monkeypatch):
    calls, attend = [], qformer.attend
    monkeypatch.setattr(qformer, "attend", lambda *qkv, **more: calls.append(qkv) or attend(*qkv))
    maps = sample.attention_maps(parts[0], torch.rand(1, 3, *parts[0].vit.image_size))
    q, k, *_ = calls[1]  # the call after self-attention
    weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1).mean(dim=1)  # (1, Q, P)
    torch.testing.assert_close(maps[:, 0], weights)
    assert "attention.png" in run("--attention", "--max-new-tokens=2")


def test_answers_and_losses_are_those_of_the_last_question_after_the_true_turns(parts):
    model, collate, _ = parts
    tokenizer, n = collate.tokenizer, collate.n_image_tokens
    samples = [Sample([RED], [("<image> q", "a long circle"), ("why?", "it is")]),
               Sample([], [("q", "small")]), Sample([BLUE, RED], [("<image><image>", "longest")])]
    for asked, (text, loss) in zip(samples, sample.answer(model, samples, collate), strict=True):
        ids, _ = encode_turns(tokenizer, [*asked.turns[:-1], (asked.turns[-1][0], None)], n)
        true_ids, _ = encode_turns(tokenizer, asked.turns, n)
        images, start = collate.images([asked]), len(ids)
        logits = model(torch.tensor([true_ids]), images)[0][0, start - 1:-1].log_softmax(dim=-1)
        nats = -logits.gather(1, torch.tensor(true_ids[start:])[:, None])
        assert loss == pytest.approx(nats.mean().item(), rel=1e-4)
        for _ in [*tokenizer.encode_part("longest"), tokenizer.end_id]:
            token = model(torch.tensor([ids]), images)[0][0, -1].argmax().item()
            if token == tokenizer.end_id:
                break
            ids.append(token)
        assert text == tokenizer.decode(ids[start:]).strip()


picture = partial(Image.new, "L", (1, 1))


@pytest.fixture
def reader(monkeypatch):
    """In place of a model: it says which numbers pictures are, at a loss of 1, else 0."""
    def answer(model, samples, collate):
        assert not model.training
        return [("".join(f"A{image.getpixel((0, 0))}" for image in each.images), len(each.images))
                for each in samples]

    monkeypatch.setattr(sample, "answer", answer)
    return torch.nn.Module()


@pytest.mark.parametrize("numbers", [range(250), [i // 3 for i in range(30)], [7, 7, 5], [7, 7]])
def test_blind_shows_each_question_another_picture_or_none_if_all_are_alike(numbers, reader):
    samples = [Sample([picture(number)], [("q", "a")]) for number in numbers]
    records = sample.ask_all(reader.eval(), samples, None, 16)
    for number, record in zip(numbers, records, strict=True):
        assert record["blind"] not in (f"A{number}", "")
        assert (record["blind"] is None) == (len({*numbers}) == 1)


def test_right_blind_and_floor_equal_those_worked_by_hand_and_classes_count_to_the_sign(reader):
    one, two, three, five = map(picture, (1, 2, 3, 5))
    samples = [Sample([one], [("", "a1.")], "a"),
               Sample([two], [("<image> q", "x")], "a", ("x", "A2")),
               Sample([five], [("", "A1")], "a"), Sample([three], [("", "x")], "a", ("x", "A1")),
               Sample([], [("", "")], "class"), Sample([five], [("", "A5.")], "class"),
               Sample([five], [("", "a5")], "class"), Sample([five], [("", "A5")], "class")]
    metrics, records, _ = sample.evaluate(reader.train(), {"test": samples}, None, 4)
    # right, blind, floor (which is "a1" for a), loss, blind loss
    assert [*metrics["test_by_type"]["a"].values()] == [2 / 4, 1 / 4, 3 / 4, 1, 1]
    assert [*metrics.values()][1:] == [4 / 8, 1 / 7, 4 / 8, 7 / 8, 1]
    assert [each["blind"] for each in records] == ["A5", "A5", "A1", "A5", None, "A2", "A3", "A3"]
    assert [*records[1].values()][:4] == ["a", ("x", "A2"), "q", "A2"]
