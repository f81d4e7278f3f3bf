"""The scripts measure what they say."""
import json
import re
import tempfile
from functools import partial

import torch
from PIL import Image

import ablate
import chain
import train
from test_train import TINY, config_of, finished  # noqa: F401


def make_table(monkeypatch, out):
    """A table of `ablate.py` within this process: its lines, and the stages that it ran."""
    stages = []

    def run(command, **options):
        monkeypatch.setattr("sys.argv", command[1:])
        train.main()
        stages.append(command[3].removeprefix("--stage="))

    monkeypatch.setattr("sys.argv", ["ablate.py", "mine", f"--out={out}", "--device=cpu",
                                      "--preset=tiny", *TINY])
    monkeypatch.setattr(ablate.subprocess, "run", run)
    monkeypatch.setattr(ablate, "sight", partial(ablate.sight, n=8, among=4))
    monkeypatch.setattr(train, "texts_of", partial(train.texts_of, at_most=100))
    ablate.main()
    return json.loads((out / "mine.json").read_text(encoding="utf-8")), sorted(stages)


def test_a_table_runs_each_stage_once_with_the_flags_of_its_lines(monkeypatch, tmp_path):
    columns = ("trainable", "image tokens", "connector parameters", "ITG nats", *ablate.DRIFT)
    monkeypatch.setitem(ablate.TABLES, "mine", (columns, [
        ("a", "", "--recipe plora"), ("b", "", "--recipe plora --decoder.r=4"),
        ("c", "--qformer.n-queries=3", "--recipe lora")]))
    (a, b, c), stages = make_table(monkeypatch, tmp_path)
    assert stages == ["align"] * 3 + ["instruct"] * 3 + ["language"] + ["vision"] * 2
    assert b["trainable"] == 2 * a["trainable"]
    assert [line["image tokens"] for line in (a, b, c)] == [2, 2, 3]
    assert c["connector parameters"] - a["connector parameters"] == 16  # those of a query
    assert a["logits changed"] == 0 < c["logits changed"]  # LoRA changes text
    assert a["text ppl"] == a["after instruct"] and c["text ppl"] != c["after instruct"]
    assert make_table(monkeypatch, tmp_path) == ([a, b, c], [])  # not done again


def test_every_flag_of_every_run_is_one_of_the_program():
    runs = sum((runs for _, runs in ablate.TABLES.values()), [])
    for _, *flags in runs + chain.RUNS:
        config_of(*" ".join(flags).split())


@torch.no_grad()
def test_uniform_attention_falls_on_things_by_their_share_of_the_pixels(monkeypatch, finished):
    monkeypatch.setattr(ablate, "attention_maps", lambda model, images: torch.full(
        (len(images), 1, 2, 37), 1 / 37))
    for line in ablate.attention(finished, n=8):
        assert line["least"] == line["most"] and abs(line["most"] - line["pixels"]) < 1e-6
        assert 0.05 < line["pixels"] < 0.3 and abs(line["class token"] - 1 / 37) < 1e-6


def test_the_chain_is_compared_on_class_folders_and_leaves_no_file(monkeypatch, tmp_path, capsys):
    for color in ("red", "blue"):
        (tmp_path / color).mkdir()
        Image.new("RGB", (9, 9), color).save(tmp_path / color / "a.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["chain.py", "--short", "--data=.", "--val=.", *TINY])
    chain.main()
    assert len([*tmp_path.rglob("*")]) == 4
    assert len(re.findall(r"\| [01]\.[05]00 \| \d+ \|\n", capsys.readouterr().out)) == 2
