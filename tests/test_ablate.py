"""The script that measures each choice: its runs, and what it measures of them."""
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import ablate
import train
from data import Scenes, SceneSpec, Tokenizer, corpus
from model import MLLM

TINY = ("--device=cpu --vit-dim=16 --vit-layers=1 --vit-heads=2 --qformer-dim=16 --qformer-layers=2 --qformer-heads=2 "
        "--n-queries=2 --dim=24 --n-layers=2 --n-heads=2 --n-kv-heads=1 --r=2 --batch-size=4 --read-samples=8 "
        "--see-samples=8 --align-samples=8 --instruct-samples=80 --eval-samples=8 --workers=0 --no-bf16").split()


def tiny_config(**values):
    return train.replace(train.settings(train.parse_arguments(TINY)), **values)


@pytest.fixture
def in_process(monkeypatch):
    """The runs of a table within this process; returns their command lines."""
    commands = []

    def run(command, **options):
        commands.append([str(word) for word in command[2:]])
        monkeypatch.setattr("sys.argv", ["train.py", *commands[-1]])
        train.main()
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(ablate.subprocess, "run", run)
    return commands


def table(monkeypatch, out, name):
    monkeypatch.setattr("sys.argv", ["ablate.py", name, f"--out={out}", *TINY])
    ablate.main()
    return json.loads((out / f"{name}.json").read_text())


def test_a_table_trains_each_stage_0_once_and_each_run_once(in_process, monkeypatch, tmp_path, capsys):
    columns = ablate.ANSWERS + ablate.COSTS + ("text ppl", "logits changed", "recall@1", "rows", "ms an image")
    monkeypatch.setitem(ablate.TABLES, "mine", (columns, [
        ("a", "--recipe plora"), ("b", "--recipe plora --r 3"), ("c", "--n-queries 3 | --recipe lora")]))
    lines = table(monkeypatch, tmp_path, "mine")
    stages = [command[command.index("--stage") + 1] for command in in_process]
    assert sorted(stages) == ["align"] * 3 + ["instruct"] * 3 + ["read"] + ["see"] * 2
    assert [line[""] for line in lines] == ["a", "b", "c"] and [line["rows"] for line in lines] == [2, 2, 3]
    assert lines[0]["learning"] * 3 == lines[1]["learning"] * 2                   # ranks 2 and 3
    assert [line["logits changed"] > 0 for line in lines] == [False, False, True]
    assert "| a |" in capsys.readouterr().out and Image.open(tmp_path / "mine.png").height > 100
    assert table(monkeypatch, tmp_path, "mine")[2]["right"] == lines[2]["right"] and len(in_process) == len(stages)
    with pytest.raises(ValueError, match="flags.json"):       # the runs there are not those of other flags
        ablate.Runner(tmp_path, 1, ["--seed=1"])


def test_larger_pictures_are_shown_with_and_without_interpolation_and_tuning(in_process, monkeypatch, tmp_path):
    lines = table(monkeypatch, tmp_path, "size")
    assert [line["patches"] for line in lines] == [36, 81, 81, 81, 144, 144, 144]
    plain, padded = (MLLM.load(tmp_path / f"72_{how}" / "instruct.pt").vit for how in ("interpolated", "padded"))
    grid = padded.position_embedding[0, 1:].unflatten(0, (9, 9))
    assert torch.equal(grid[:6, :6].flatten(0, 1), plain.position_embedding[0, 1:])
    assert not grid[6:].any() and not grid[:, 6:].any()
    with pytest.raises(RuntimeError, match="log.txt"):
        monkeypatch.setattr(ablate.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1))
        table(monkeypatch, tmp_path / "other", "size")


@pytest.mark.parametrize("lora_on, changed", [("image", 0.0), ("all", 1.0)])
def test_text_drifts_with_lora_and_not_by_a_bit_with_partial_lora(lora_on, changed, tmp_path):
    config = tiny_config(lora_on=lora_on)
    tokenizer = Tokenizer.train(corpus(Scenes(SceneSpec(), "read", 20)), 300)
    tokenizer.save(tmp_path / "tokenizer.json")
    torch.manual_seed(0)
    model = MLLM(train.model_config(config, tokenizer))
    for stage in ("see", "align", "instruct"):
        model.save(tmp_path / f"{stage}.pt")
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
    drift = ablate.text_drift(tmp_path, config)
    assert drift["logits changed"] == pytest.approx(changed, abs=0.01)
    assert (drift["text ppl"] == drift["after align"] == drift["after instruct"]) == (lora_on == "image")


@pytest.mark.parametrize("judge, expected", [(lambda right: right, 1.0), (lambda right: ~right, 0.0),
                                             (lambda right: right | True, 0.5)])
def test_matching_is_measured_on_as_many_right_as_wrong_pairs(judge, expected):
    text = features = torch.arange(4)[:, None]                # picture i belongs to text i

    def encode(images, texts, kind):
        is_pair = judge(images == texts)
        return torch.stack([~is_pair, is_pair], dim=-1).float()                   # (2B, 1 query, 2)

    qformer = SimpleNamespace(similarity=lambda rows, text: torch.eye(4), encode=encode, itm_head=lambda rows: rows)
    model = SimpleNamespace(qformer=qformer, config=SimpleNamespace(n_queries=1))
    assert ablate.itm_accuracy(model, features, text, None) == expected


def test_computing_activations_again_keeps_less_and_changes_no_gradient():
    kept, again = ablate.checkpointing(n=1, repeats=1)
    assert again["kept MB"] < kept["kept MB"] / 5 and again["largest difference"] < 1e-6


@pytest.mark.parametrize("name", ablate.TABLES)
def test_every_flag_of_every_run_is_one_of_the_program(name):
    for _, flags in ablate.TABLES[name][1]:
        train.settings(train.parse_arguments(flags.replace("|", " ").replace("%", "").split()))
    assert f"python tests/ablate.py {name} " in ablate.__doc__ and sys.path.count(str(ablate.ROOT)) >= 1
