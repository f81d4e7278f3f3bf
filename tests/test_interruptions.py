"""Whatever stops a run, it can go on from its last whole state, to the same bits."""
import json
import math
import os
import random
import signal
import time

import pytest
import torch

import train
from model import MLLM
from test_train import flags, forked, run, same, weights

STATE = ("resume.pt", "resume_before.pt")


def child(out, delay=None, *more, **values):
    """Train in a process of its own, killed after `delay` seconds. Returns whether it came to its end."""
    def work():
        train.sys.argv = [*flags(**values), f"--out={out}", *more]
        train.main()

    process = forked(work)
    if delay is not None:
        time.sleep(delay)
        os.kill(process, signal.SIGKILL)
    status = os.waitpid(process, 0)[1]
    assert status in (0, signal.SIGKILL)
    return status == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_killed_at_many_moments_ends_bit_for_bit_like_an_uninterrupted_one(tmp_path):
    assert child(tmp_path / "whole", save_every=1)
    rng, kills, cut = random.Random(0), 0, tmp_path / "cut"
    while not child(cut, rng.uniform(0.02, 0.3) * (1 + kills / 12),
                    *["--resume"] * any((cut / name).exists() for name in STATE), save_every=1):
        kills += 1
        for path in cut.glob("*.pt"):                         # nothing is ever half there
            torch.load(path, weights_only=True)
    assert kills >= 5
    for stage in train.STAGES:
        assert same(weights(cut, stage), weights(tmp_path / "whole", stage))
    numbers = [json.loads((out / "metrics.json").read_text()) for out in (cut, tmp_path / "whole")]
    assert all(numbers[0][name] == numbers[1][name] for name in numbers[0]
               if not any(word in name for word in ("seconds", "memory", "config")))
    assert not any((cut / name).exists() for name in STATE)   # nothing is left to resume


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """A run that stopped in `see`, and the uninterrupted one."""
    run(monkeypatch, tmp_path / "whole")
    loss, calls = train.stage_loss, []

    def stop_at_last(model, stage, *rest):
        calls.append(stage)
        if calls.count("see") == 3:
            raise RuntimeError("power cut")
        return loss(model, stage, *rest)

    monkeypatch.setattr(train, "stage_loss", stop_at_last)
    with pytest.raises(RuntimeError, match="power cut"):
        run(monkeypatch, tmp_path / "cut", save_every=1)
    monkeypatch.setattr(train, "stage_loss", loss)
    return tmp_path / "cut", tmp_path / "whole"


def test_a_damaged_state_gives_way_to_the_one_before(stopped, monkeypatch, capsys):
    cut, whole = stopped
    (cut / "resume.pt").write_bytes((cut / "resume.pt").read_bytes()[:-100])
    run(monkeypatch, cut, "--resume")
    assert "resume.pt is damaged" in capsys.readouterr().out and same(weights(cut), weights(whole))


def test_without_a_whole_state_there_is_a_clear_end(stopped, monkeypatch):
    cut, _ = stopped
    (cut / "resume.pt").write_bytes(b"")
    torch.save({"stage": "see"}, cut / "resume_before.pt")
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        run(monkeypatch, cut, "--resume")


def test_another_run_does_not_leave_the_state_of_the_last_one(stopped, monkeypatch):
    cut, _ = stopped
    monkeypatch.setattr(train, "train_stage", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(monkeypatch, cut, seed=3)
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        run(monkeypatch, cut, "--resume")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 64 vs 0")])
def test_a_full_disk_stops_with_a_sentence_and_keeps_what_was_saved(error, stopped, monkeypatch):
    cut, whole = stopped
    before = {path.name: path.read_bytes() for path in cut.glob("*.pt")}
    save = torch.save

    def half(content, file):
        file.write(b"half of it")
        raise error

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="cannot write .*see.pt .* still there"):
        run(monkeypatch, cut, "--resume")
    monkeypatch.setattr(torch, "save", save)
    assert {path.name: path.read_bytes() for path in cut.iterdir() if ".pt" in path.name} == before
    run(monkeypatch, cut, "--resume")
    assert same(weights(cut), weights(whole))


def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    run(monkeypatch, tmp_path / "whole")
    loss, calls = train.stage_loss, []

    def press(model, stage, *rest):
        calls.append(stage)
        if calls.count("align") == 2:
            signal.raise_signal(signal.SIGINT)
        return loss(model, stage, *rest)

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(train, "stage_loss", press)
    with pytest.raises(KeyboardInterrupt, match="after step 2 of 'align' and saved: go on with --resume"):
        run(monkeypatch, tmp_path / "cut", save_every=100)
    assert "once more stops at once" in capsys.readouterr().err and signal.getsignal(signal.SIGINT) == handler
    monkeypatch.setattr(train, "stage_loss", loss)
    run(monkeypatch, tmp_path / "cut", "--resume")
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))


def test_ctrl_c_twice_stops_at_once(tmp_path, monkeypatch):
    def press(*_):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(train, "stage_loss", press)
    with pytest.raises(KeyboardInterrupt) as stop:
        run(monkeypatch, tmp_path)
    assert not str(stop.value) and not (tmp_path / "resume.pt").exists()


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(what, tmp_path, monkeypatch):
    loss, calls = train.stage_loss, []

    def spoil(model, stage, *rest):
        calls.append(stage)
        value = loss(model, stage, *rest)
        if calls.count("instruct") != 3:
            return value
        weight = model.decoder.blocks[0].w1.lora_A
        return value * math.inf if what == "loss" else value + (weight.sum() * 0).sqrt()    # whose slope is infinite

    monkeypatch.setattr(train, "stage_loss", spoil)
    run(monkeypatch, tmp_path, save_every=1)                  # the state before the spoiled step stays on the disk
    instruct = torch.load(tmp_path / "instruct.pt", weights_only=True)
    assert [math.isnan(value) for value in instruct["losses"]] == [False, False, True]
    assert all(value.isfinite().all() for value in instruct["model"].values())


def test_many_such_steps_stop_the_run_and_name_the_records(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "stage_loss", lambda model, *_: math.nan * next(
        parameter for parameter in model.parameters() if parameter.requires_grad).sum())
    with pytest.raises(ValueError, match="align: .* in 10 steps in a row; the last saw scene 60, scene 61, scene 62, scene 63"):
        run(monkeypatch, tmp_path, align_samples=80)


def test_a_file_that_is_no_model_is_named(tmp_path):
    for content in (b"", b"PK\3\4 and then", json.dumps({"config": 1}).encode()):
        (tmp_path / "x.pt").write_bytes(content)
        with pytest.raises(ValueError, match="x.pt is damaged"):
            MLLM.load(tmp_path / "x.pt")
    for content in ({"config": {}, "model": {}}, {"config": {"odd": 1}, "model": {}}, {"config": None, "model": {}}, [1],
                    {"config": {"vocab_size": 9, "image_size": (8, 8)}, "model": {"a": torch.ones(1)}}):
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(ValueError, match="x.pt"):
            MLLM.load(tmp_path / "x.pt")
