"""What the README says, where it can be checked."""
import re
import shlex
from pathlib import Path

import torch
from PIL import Image

import model
import sample
import train
from data import read_own_data

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_table_of_recipes_is_the_one_in_the_code():
    rows = re.findall(r"^\| `(\w+)`.*?\| (.+) \| (.+) tokens \| (.+) \| (.+) \|$",
                      README.split("## Recipes")[1], re.MULTILINE)
    stated = {recipe: (connector, lora_on, align.split(", "), instruct.split(", "))
              for recipe, connector, lora_on, align, instruct in rows}
    assert stated == {recipe: (row["connector"], row["lora_on"], list(row["align"]),
                               list(row["instruct"])) for recipe, row in train.RECIPES.items()}


def test_every_module_is_in_the_reading_order_and_there_is_no_other():
    named = set(re.findall(r"^\| \[(\w+\.py)\]", README, re.MULTILINE))
    assert named == {path.name for path in ROOT.glob("*.py")}


def test_the_commands_parse_and_name_known_settings(monkeypatch):
    joined = README.replace("\\\n", " ")                  # a command may go on in the next line
    commands = re.findall(r"^ *python ((?:train|sample)\.py[^#\n]*)", joined, re.MULTILINE)
    assert len(commands) > 4
    for command in commands:
        monkeypatch.setattr("sys.argv", shlex.split(command))
        (train if command.startswith("train") else sample).parse_arguments()


def test_every_flag_named_in_text_is_one_of_the_program():
    named = set(re.findall(r"--[a-z][a-z0-9._-]*", "".join(re.findall(r"`[^`\n]+`", README))))
    source = (ROOT / "train.py").read_text() + (ROOT / "sample.py").read_text()
    known = set(re.findall(r"--[a-z][a-z-]*", source))
    for name in train.flat(train.CPU):
        known |= {"--" + name.replace("_", "-"), "--no-" + name.replace("_", "-")}
    assert len(named) > 10 and named <= known | {"--local-dir", "--nproc_per_node"}


def test_the_code_to_copy_runs():
    code = re.search(r"```python\n(.+?)```", README.split("## Copy one piece")[1], re.DOTALL)[1]
    for size, small in (("4096, 4096, r=256", "8, 8, r=2"), ("768, n_layers=12", "24, n_layers=2"),
                        ("encoder_width=1408", "encoder_width=16")):
        code = code.replace(size, small)
    names = {"x": torch.randn(1, 3, 8), "is_image": torch.tensor([[True, False, False]]),
             "image_features": torch.randn(2, 5, 16)}
    exec(code, names)
    assert names["y"].shape == (1, 3, 8) and names["tokens"].shape == (2, 32, 24)


def test_the_code_that_loads_published_weights_runs():
    section = README.split("## Published weights")[1].split("\n## ")[0]
    code = re.search(r"```python\n(.+?)```", section, re.DOTALL)[1]
    golden = str(ROOT / "tests" / "golden" / "clip")
    exec(code.replace("openai/clip-vit-base-patch16", golden), names := {})
    assert len(names["vit"].blocks) == 2


def test_the_model_shows_a_sample_on_its_way(capsys):
    model.main()
    assert "decoder    (1, 20, 192) -> (1, 20, 192)" in capsys.readouterr().out


def test_the_code_that_turns_a_table_into_records_gives_what_the_program_reads(
        tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (4, 4)).save("1.png")
    Path("birds.csv").write_text("file,name\n1.png,a wren\n", encoding="utf-8")
    exec(re.search(r"```python\n(import csv.+?)```", README, re.DOTALL)[1], {})
    assert read_own_data("birds.json")[0].turns == [("<image> What is it?", "a wren")]
