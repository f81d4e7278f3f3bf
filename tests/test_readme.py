"""What the README says, where it can be checked."""
import re
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image

import data
import model
import plora
import qformer
import sample
import train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_table_of_recipes_is_the_one_in_the_code():
    rows = re.findall(r"^\| `(\w+)`.*?\| (.+) \| (.+) tokens \| (.+) \| (.+) \|$",
                      README.split("## Recipes")[1], re.MULTILINE)
    stated = {recipe: (connector, lora_on, align.split(", "), instruct.split(", "))
              for recipe, connector, lora_on, align, instruct in rows}
    assert stated == {recipe: (row["connector"], row["lora_on"], list(row["align"]),
                               list(row["instruct"])) for recipe, row in train.RECIPES.items()}


def test_the_commands_parse_and_every_flag_in_the_text_is_known(monkeypatch):
    joined = README.replace("\\\n", " ")  # a command may go on in the next line
    commands = re.findall(r"^ *python ((?:train|sample)\.py[^#\n]*)", joined, re.MULTILINE)
    for command in commands:
        monkeypatch.setattr("sys.argv", shlex.split(command))
        (train if command.startswith("train") else sample).parse_arguments()
    named, known = {*re.findall(r"--[a-z][\w.-]*\w", README)}, {"--local-dir", "--nproc_per_node"}
    for name in ("train.py", "sample.py"):
        known |= {*re.findall(r"--[a-z][a-z-]*", (ROOT / name).read_text(encoding="utf-8"))}
    for name in train.flat(train.CPU):
        known |= {"--" + name.replace("_", "-"), "--no-" + name.replace("_", "-")}
    assert len(commands) > 4 and len(named) > 20 and named <= known


def test_all_code_in_it_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (4, 4)).save("1.png")
    Path("birds.csv").write_text("file,name\n1.png,a wren\n", encoding="utf-8")
    names = {"x": torch.randn(1, 3, 8), "is_image": torch.tensor([[True, False, False]]),
             "image_features": torch.randn(2, 5, 16)}
    for code in re.findall(r"```python\n(.+?)```", README, re.DOTALL):
        for ours, small in (("4096, 4096, r=256", "8, 8, r=2"), ("=1408", "=16"),
                            ("768, n_layers=12", "24, n_layers=2"),
                            ("openai/clip-vit-base-patch16", str(ROOT / "tests/golden/clip"))):
            code = code.replace(ours, small)
        exec(code, names)
    assert names["y"].shape == (1, 3, 8) and names["tokens"].shape == (2, 32, 24)
    assert len(names["vit"].blocks) == 2
    assert data.read_own_data("birds.json")[0].turns == [("<image> What is it?", "a wren")]


@pytest.mark.parametrize("module, shown", [
    (plora, r"text +0\.000 +[1-9.]+ +0\.000 +0\.000"), (qformer, "causal:.*text  1 1 1 0 0"),
    (model, r"decoder +\(1, 20, 192\) -> \(1, 20, 192\)"), (data, "'###' +trained")])
def test_each_file_run_as_a_program_shows_what_it_is_about(module, shown, capsys):
    module.main()
    assert re.search(shown, capsys.readouterr().out, re.DOTALL)
