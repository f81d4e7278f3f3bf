"""Several processes on parts of a batch learn what one learns from the whole (gloo, on the CPU)."""
import json
import os
import socket

import pytest
import torch
import torch._dynamo  # noqa: F401  else each fork imports it, which takes seconds
from PIL import Image
from torch import multiprocessing

import train
from test_data import record
from test_train import DROPOUT, STAGES, checkpoint, words

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def work(rank, world, port, argv):
    """One of the processes that `torchrun` starts."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world),
                   "RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)  # the parent's threads do not live on in a fork
    train.sys.argv = argv
    train.main()


def train_in(world, out, *more):
    """Train in so many processes. Raises when one of them does not come to its end."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    multiprocessing.start_processes(work, (world, port, words(out, *more)), world,
                                    start_method="fork")


def test_two_processes_train_like_one_even_where_one_has_no_picture(tmp_path, monkeypatch):
    Image.effect_noise((48, 48), 90).save(tmp_path / "a.png")
    # Without merges each byte is a token: all answers have as many.
    records = [record(f"{'<image>' * (i % 2)} what is {i}?", f"it is a {9 - i}",
                      image=["a.png"] * (i % 2)) for i in range(8)]
    (tmp_path / "data.json").write_text(json.dumps(records), encoding="utf-8")

    def plain_steps(model, config, stage):  # Muon and AdamW do not mind the scale of a gradient
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return [torch.optim.SGD([dict(params=trainable, peak=0.02)])]

    monkeypatch.setattr(train, "make_optimizers", plain_steps)
    monkeypatch.setattr(train, "MAX_GRADIENT_NORM", 1e9)  # nor does what clips it
    alike = [f"--data={tmp_path / 'data.json'}", "--vocab-size=265", "--batch-size=2",
             "--itc-weight=0", "--itm-weight=0", "--vit.image-size", "48", "96",
             *(f"--{stage}-samples=6" for stage in STAGES), *(f"{flag}=0" for flag in DROPOUT)]
    train_in(1, tmp_path / "one", *alike)
    train_in(2, tmp_path / "two", *alike)
    for stage in STAGES:
        one, two = (checkpoint(tmp_path / out, stage)["model"] for out in ("one", "two"))
        torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-5)
