"""Several processes on parts of a batch learn what one learns from the whole (gloo, on the CPU)."""
import json
import os
import socket

import pytest
import torch
from PIL import Image
from torch import distributed

import train
from data import Sample
from model import MLLM
from test_train import captions_folder, flags, forked, parts, same, weights  # noqa: F401

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
STILL = dict(qformer_dropout=0.0, lora_dropout=0.0, itc_weight=0.0, itm_weight=0.0)    # the same for any split


def in_processes(n, work):
    """Run work() in n processes that know of each other as those of `torchrun` do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [forked(work, RANK=str(rank), WORLD_SIZE=str(n), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
                        MASTER_PORT=str(port)) for rank in range(n)]
    return [os.waitpid(process, 0)[1] == 0 for process in processes]


def train_in(n, out, *more, **values):
    def work():
        train.sys.argv = [*flags(**STILL | values), f"--out={out}", *more]
        train.main()
    return in_processes(n, work)


@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("stage", ["read", "see", "align", "instruct"])
def test_gradients_of_two_halves_equal_those_of_the_whole_even_where_one_has_no_picture(
        stage, shard, parts, tmp_path):  # noqa: F811
    config, task, model, collate = parts
    config = train.replace(config, **STILL)
    model.train_only(train.who_learns(config, stage))
    model.eval()
    collate = train.replace(collate, max_len=200)
    picture = [Image.effect_noise((48, 48), 90).convert("RGB")]
    shown = [Sample(picture, [("<image> what is this?", "a"), ("and where?", "on the left side of it")]),
             Sample(picture * 2, [("<image> or <image>?", "both")])]
    told = [Sample([], [("a word", "b")]), Sample([], [("another word", "a longer answer than the others have")])]
    if stage == "read":
        shown = told[::-1]
    if stage == "see":                                        # where each has one
        told = [train.replace(sample, images=picture) for sample in told]
    make = collate.pairs if stage == "see" else collate.conversations

    def gradients(batch, shard):
        loss_of = train.over_processes(train.StageLoss(model, stage, config), shard, torch.device("cpu"))
        loss_of(batch, 0).backward()
        return {name: train.put_together(parameter.grad)
                for name, parameter in model.named_parameters() if parameter.requires_grad}

    def work():
        train.join_processes(torch.device("cpu"))
        rank = distributed.get_rank()
        torch.save(gradients(make((shown, told)[rank]), shard), tmp_path / f"{rank}.pt")

    assert in_processes(2, work) == [True, True]
    assert in_processes(1, lambda: torch.save(gradients(make(shown + told), False), tmp_path / "whole.pt")) == [True]
    whole, *halves = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("whole", 0, 1)[:3 - shard])
    for half in halves:
        assert whole.keys() == half.keys()
        for name, gradient in whole.items():
            if gradient is None:
                assert half[name] is None
            else:
                torch.testing.assert_close(half[name], gradient, rtol=1e-3, atol=1e-7, msg=name)


@pytest.mark.parametrize("shard", [False, True])
def test_two_processes_train_like_one(shard, tmp_path):
    assert train_in(1, tmp_path / "one") == [True]
    assert train_in(2, tmp_path / "two", save_every=1, shard=shard) == [True, True]
    numbers = [json.loads((tmp_path / out / "metrics.json").read_text()) for out in ("one", "two")]
    assert numbers[0].keys() == numbers[1].keys()
    for stage in train.STAGES:
        losses = [torch.load(tmp_path / out / f"{stage}.pt", weights_only=True)["losses"] for out in ("one", "two")]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert MLLM.load(tmp_path / "two" / "instruct.pt")


@pytest.mark.parametrize("shard", [False, True])
def test_a_stopped_run_of_two_goes_on_with_two_to_the_same_bits(shard, tmp_path, monkeypatch):
    values = dict(qformer_dropout=0.1, lora_dropout=0.1, save_every=1, data=captions_folder(tmp_path), accumulate=2,
                  shard=shard)
    assert train_in(2, tmp_path / "whole", **values) == [True, True]
    loss, calls = train.stage_loss, []

    def fail(model, stage, *rest):
        calls.append(stage)
        if calls.count("align") == 6:                         # in the third step of three
            os._exit(1)
        return loss(model, stage, *rest)

    monkeypatch.setattr(train, "stage_loss", fail)
    assert train_in(2, tmp_path / "cut", **values) == [False, False]
    monkeypatch.setattr(train, "stage_loss", loss)
    assert train_in(1, tmp_path / "cut", "--resume") == [False]                  # one cannot go on for two
    assert train_in(2, tmp_path / "cut", "--resume") == [True, True]
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))


def test_each_sample_goes_to_one_process(parts, monkeypatch):  # noqa: F811
    config, task, _, collate = parts
    task.config = train.replace(config, batch_size=12, accumulate=2, align_samples=36)
    whole = [batch["labels"] for batch in task.batches("align", collate, 1)]
    shared = []
    for rank in range(3):
        monkeypatch.setattr(train, "rank_and_world", lambda: (rank, 3))
        shared.append([batch["labels"] for batch in task.batches("align", collate, 1)])
    assert len(whole) == 4 and all(len(part) == 4 and len(part[0]) == 2 for part in shared)
    for i, labels in enumerate(whole):
        rows = [row[row != -100].tolist() for part in shared for row in part[i]]
        assert rows == [row[row != -100].tolist() for row in labels]


def test_a_model_is_not_split_in_one_process(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", "--shard"])
    with pytest.raises(ValueError, match="start them with torchrun"):
        train.settings(train.parse_arguments())


def test_a_batch_that_does_not_divide_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr("sys.argv", ["train.py", "--batch-size=64"])
    with pytest.raises(ValueError, match="batch_size 64 does not divide into 1 micro-batches for 3 processes"):
        train.settings(train.parse_arguments())
