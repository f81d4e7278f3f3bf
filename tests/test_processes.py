"""Several processes on parts of a batch learn what one learns from the whole (gloo, on the CPU)."""
import json
import os
import socket

import pytest
import torch
import torch._dynamo  # noqa: F401  else each fork imports it, which takes seconds
from PIL import Image

import train
from test_train import DROPOUT, STAGES, checkpoint, same, words

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def start(argv, environment):
    """Train in a new process, which ends with 0 unless training raises. Returns its number."""
    if process := os.fork():
        return process
    os.environ.update(environment)
    torch.set_num_threads(1)  # the parent's threads do not live on in a fork
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1), os.dup2(quiet, 2)
    try:
        train.sys.argv = argv
        train.main()
    except BaseException:
        os._exit(1)
    os._exit(0)


def train_in(n, out, *more):
    """Train in n processes, as `torchrun` starts them. Returns which of them came to their end."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [start(words(out, *more), shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
                 for rank in range(n)]
    return [os.waitpid(process, 0)[1] == 0 for process in processes]


def test_two_processes_train_like_one_even_where_one_has_no_picture(tmp_path, monkeypatch):
    Image.effect_noise((48, 48), 90).save(tmp_path / "a.png")
    records = []
    for i in range(8):  # without merges each byte is a token: all answers have as many
        talk = [("human", f"{'<image>' * (i % 2)} what is {i}?"), ("gpt", f"it is a {9 - i}")]
        records.append({"image": ["a.png"] * (i % 2), "conversations": [
            {"from": who, "value": text} for who, text in talk]})
    (tmp_path / "data.json").write_text(json.dumps(records))

    def plain_steps(model, config, stage):  # Muon and AdamW do not mind the scale of a gradient
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return [torch.optim.SGD([dict(params=trainable, peak=0.02)])]

    monkeypatch.setattr(train, "make_optimizers", plain_steps)
    monkeypatch.setattr(train, "MAX_GRADIENT_NORM", 1e9)  # nor does what clips it
    alike = [f"--data={tmp_path / 'data.json'}", "--vocab-size=265", "--batch-size=2",
             "--itc-weight=0", "--itm-weight=0", *(f"--{stage}-samples=6" for stage in STAGES),
             *(f"{flag}=0" for flag in DROPOUT)]
    assert train_in(1, tmp_path / "one", *alike) == [True]
    assert train_in(2, tmp_path / "two", *alike) == [True, True]
    for stage in STAGES:
        one, two = (checkpoint(tmp_path / out, stage)["model"] for out in ("one", "two"))
        torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-5)


def test_a_run_killed_while_it_writes_a_state_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    save, settings = torch.save, ("--batch-size=8", "--vision-samples=24")

    def write_half(content, path):
        if len(content["losses"]) == 2:  # after the second step of `vision`
            open(path, "wb").write(b"half of it")
            os._exit(1)
        save(content, path)

    assert train_in(2, tmp_path / "whole", *settings) == [True, True]
    monkeypatch.setattr(torch, "save", write_half)
    assert train_in(2, tmp_path / "cut", *settings, "--save-every=1") == [False, False]
    monkeypatch.setattr(torch, "save", save)
    assert train_in(2, tmp_path / "cut", "--resume") == [True, True]
    whole, cut = (checkpoint(tmp_path / out) for out in ("whole", "cut"))
    assert same(whole["model"], cut["model"]) and whole["losses"] == cut["losses"]
