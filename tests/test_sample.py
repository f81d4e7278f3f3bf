"""Asking a trained model: from the command line, in a conversation, and a thousand questions."""
import io
import json
from dataclasses import asdict

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
                          seen.pop().random(), seen.pop()) for seed in (1, 1, 2))
    assert one == again and {*one} & {*other} == {SceneSpec(max_things=2)}


def test_pieces_of_the_stream_join_to_the_whole_answer(parts, monkeypatch):
    model, collate, _ = parts
    ids = [*collate.tokenizer.encode(" a circle é 😀"), collate.tokenizer.end_id, 20]
    monkeypatch.setattr(model, "generate", lambda *_, **__: (torch.tensor([id]) for id in ids))
    pieces = list(sample.stream(model, collate, Sample([RED], [("<image> q", None)]), 50))
    assert "".join(pieces) == "a circle é 😀" and len(pieces) > 2 and "\ufffd" not in str(pieces)


def test_a_chat_remembers_earlier_turns_and_shows_all_pictures_once(run, monkeypatch):
    given, first = [], "<image> <image> one"
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo <image>\n"))
    monkeypatch.setattr(sample, "read_image", str)
    monkeypatch.setattr(sample, "stream", lambda model, collate, asked, *_, **__: given.append(
        (list(asked.turns), *asked.images)) or ["fi", "ne"])
    with pytest.raises(EOFError):  # Ctrl-D, which ends the program
        run("--chat", "--image", "a", "b")
    assert given == [([(first, None)], "a", "b"), ([(first, "fine"), ("two  ", None)], "a", "b")]


def test_what_the_user_can_get_wrong_is_named(run, parts, tmp_path, monkeypatch):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    for flag in ("--image={}/broken.png", "--image={}/absent.png", "--out={}/absent"):
        with pytest.raises((ValueError, OSError), match=flag[-6:]):
            run(flag.format(tmp_path))
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


def read_numbers(model, samples, collate):
    """In place of `answer`: a picture is a number here and is read, at a loss of 1, else 0."""
    return [("".join(map(str, each.images)), len(each.images)) for each in samples]


def test_blind_shows_each_question_the_picture_of_another(monkeypatch):
    monkeypatch.setattr(sample, "answer", read_numbers)
    records = sample.ask_all(None, [Sample([i], [("q", "a")]) for i in range(250)], None)
    assert [record["blind"] for record in records] == [str((i + 125) % 250) for i in range(250)]


def test_right_blind_floor_and_answers_json_are_those_worked_by_hand(monkeypatch, tmp_path):
    monkeypatch.setattr(sample, "answer", read_numbers)
    samples = [Sample([1], [("", "1")], "a"), Sample([2], [("<image> q", "x")], "a", ("x", "2")),
               Sample([5], [("", "1")], "a"), Sample([3], [("", "x")], "a", ("x", "1")),
               Sample([], [("", "")], "b"), Sample([5], [("", "5")], "b")]
    metrics = sample.evaluate(torch.nn.Module(), {"test": samples}, None, tmp_path)
    # right, blind, floor (which is "1" for a), loss, blind loss
    assert [*metrics["test_by_type"]["a"].values()] == [2 / 4, 1 / 2, 3 / 4, 1, 1]
    assert [*metrics.values()][1:] == [4 / 6, 1 / 2, 4 / 6, 5 / 6, 1]
    saved = json.loads((tmp_path / "answers.json").read_text())
    assert [record["blind"] for record in saved] == ["3", None, None, "1", None, None]  # or none
    assert [saved[1][key] for key in ("question", "references", "answer")] == ["q", ["x", "2"], "2"]
