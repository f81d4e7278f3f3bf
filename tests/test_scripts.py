"""The scripts measure what they say; how fast something is decides no test."""
import json
from functools import partial
from unittest.mock import Mock

import torch

import ablate
import bench
import chain
import train
from test_train import TINY, config_of

bench.REPEATS = 1


def make_table(monkeypatch, out, name):
    """A table of `ablate.py` within this process: its lines, and the stages that it ran."""
    stages = []

    def run(command, **options):
        monkeypatch.setattr("sys.argv", command[1:])
        train.main()
        stages.append(command[3].removeprefix("--stage="))

    monkeypatch.setattr("sys.argv", ["ablate.py", name, f"--out={out}", "--device=cpu", *TINY])
    monkeypatch.setattr(ablate.subprocess, "run", run)
    monkeypatch.setattr(ablate, "sight", partial(ablate.sight, n=8, among=4))
    monkeypatch.setattr(train, "texts_of", partial(train.texts_of, at_most=100))
    ablate.main()
    return json.loads((out / f"{name}.json").read_text(encoding="utf-8")), sorted(stages)


def test_a_table_runs_each_stage_once_with_the_flags_of_its_lines(monkeypatch, tmp_path):
    columns = ("trainable", "image tokens", "connector parameters", "ITG nats", *ablate.DRIFT)
    monkeypatch.setitem(ablate.TABLES, "mine", (columns, [
        ("a", "", "--recipe plora"), ("b", "", "--recipe plora --decoder.r=4"),
        ("c", "--qformer.n-queries=3", "--recipe lora")]))
    (a, b, c), stages = make_table(monkeypatch, tmp_path, "mine")
    assert stages == ["align"] * 3 + ["instruct"] * 3 + ["language"] + ["vision"] * 2
    assert b["trainable"] == 2 * a["trainable"]
    assert [line["image tokens"] for line in (a, b, c)] == [2, 2, 3]
    assert c["connector parameters"] - a["connector parameters"] == 16  # those of a query
    assert a["logits changed"] == 0 < c["logits changed"]  # LoRA changes text
    assert a["text ppl"] == a["after instruct"] and c["text ppl"] != c["after instruct"]
    assert make_table(monkeypatch, tmp_path, "mine") == ([a, b, c], [])  # not done again


def test_matching_is_measured_on_as_many_right_as_wrong_pairs():
    text = torch.arange(4)[:, None]  # picture i belongs to text i
    for judge, share in ((torch.eq, 1.0), (torch.ne, 0.0), (lambda a, b: a == a, 0.5)):
        qformer = Mock(side_effect=lambda a, b, kind: torch.stack([~judge(a, b), judge(a, b)], -1),
                       n_queries=1, itm_head=torch.Tensor.float)
        assert ablate.itm_accuracy(qformer, text, text, torch.eye(4)) == share


def test_every_flag_of_every_run_is_one_of_the_program():
    runs = sum((runs for _, runs in ablate.TABLES.values()), [])
    for _, *flags in runs + chain.RUNS:
        config_of(*" ".join(flags).split())


def test_attention_that_is_uniform_falls_on_things_by_their_share_of_the_pixels(
        monkeypatch, tmp_path):
    monkeypatch.setattr(ablate, "attention_maps", lambda model, images: torch.full(
        (len(images), 1, 2, 37), 1 / 37))
    monkeypatch.setattr(ablate, "attention", partial(ablate.attention, n=8))
    table, _ = make_table(monkeypatch, tmp_path, "attention")
    for line in table:
        assert line["least"] == line["most"] and abs(line["most"] - line["pixels"]) < 1e-6
        assert 0.05 < line["pixels"] < 0.3 and abs(line["class token"] - 1 / 37) < 1e-6


def test_the_benchmarks_of_steps_and_data_measure_every_stage(monkeypatch):
    longer = [f"--{stage}-samples=99" for stage in train.STAGES]
    monkeypatch.setattr(bench, "CONFIG", config_of(*longer))
    monkeypatch.setattr(train, "PRESETS", {"tiny": bench.CONFIG})
    monkeypatch.setattr(bench, "texts_of", lambda scenes, _: train.texts_of(scenes, at_most=100))
    for line, again, stage in zip(bench.step(), bench.data(), train.STAGES, strict=True):
        assert line["stage"] == again["stage"] == stage and line["samples a second"] > 0
        assert (again["MB a batch"] < 0.01) == (stage == "language")  # pictures of 48 x 48 bytes
