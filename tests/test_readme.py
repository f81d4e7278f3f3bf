"""What the README says, where it can be checked."""
import re
import shlex
from pathlib import Path

import pytest

import ablate
import bench
import sample
import train
from test_published import PARITY

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_table_of_who_learns_is_the_one_in_the_code():
    rows = re.findall(r"^\| `(\w+)`[^|]*\| ([^|]+) \| ([^|]+) \|([^|]*)\|$", README.split("## Who")[1], re.MULTILINE)
    stated = {recipe: (tuple(align.split(", ")), tuple(instruct.split(", "))) for recipe, align, instruct, _ in rows}
    assert stated == {recipe: (who["align"], who["instruct"]) for recipe, who in train.WHO_LEARNS.items()}
    on = {recipe: rows.strip().split(" ")[0] for recipe, _, _, rows in rows if rows.strip()}
    assert on == {recipe: train.LORA_ON.get(recipe, "image") for recipe, who in train.WHO_LEARNS.items()
                  if "plora" in who["align"] + who["instruct"]}


def test_every_module_is_in_the_reading_order_and_there_is_no_other():
    named = set(re.findall(r"^\| \[(\w+\.py)\]", README, re.MULTILINE))
    assert named == {path.name for path in ROOT.glob("*.py")}


def test_the_commands_parse(monkeypatch):
    joined = README.replace("\\\n", " ")                       # a command may go on in the next line
    commands = re.findall(r"^ *python ((?:train|sample)\.py[^#\n]*)", joined, re.MULTILINE)
    assert len(commands) > 4
    for command in commands:
        monkeypatch.setattr("sys.argv", shlex.split(command))
        (train if command.startswith("train") else sample).parse_arguments()


@pytest.mark.parametrize("name", ablate.TABLES)
def test_each_table_of_evidence_stands_under_its_command(name):
    section = README.split(f"python tests/ablate.py {name}")[1].split("```")[1]
    columns, runs = ablate.TABLES[name]
    header, _, *lines = [[cell.strip() for cell in line.split("|")[1:-1]]
                         for line in re.findall(r"^\|.*\|$", section, re.MULTILINE)]
    assert tuple(header[1:]) == columns or not columns
    assert [line[0] for line in lines] == [label for label, _ in runs] or not runs


@pytest.mark.parametrize("name", bench.TABLES)
def test_each_table_of_costs_stands_under_its_command(name):
    assert re.match(r"\n```\n\n\| .*\n\|[ -|]+\n\| ", README.split(f"python tests/bench.py {name}")[1])


def test_every_flag_named_in_text_is_one_of_the_program(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train.py", "--help"])
    with pytest.raises(SystemExit):
        train.parse_arguments()
    known = capsys.readouterr().out
    named = set(re.findall(r"--[a-z][a-z0-9-]*", "".join(re.findall(r"`[^`\n]+`", README))))
    assert len(named) > 20 and named - set(re.findall(r"--[a-z][a-z0-9-]*", known)) <= {"--clip", "--jobs"}


def test_the_code_to_copy_runs():
    code = re.search(r"```python\n(.+?)```", README.split("## Copy one piece")[1], re.DOTALL)[1]
    code = code.replace("4096, 4096, r=256", "8, 8, r=2").replace("768, n_layers=12", "24, n_layers=2")
    code = code.replace("encoder_width=1408", "encoder_width=16")
    names = {"x": train.torch.randn(1, 3, 8), "is_image": train.torch.tensor([[True, False, False]]),
             "image_features": train.torch.randn(2, 5, 16)}
    exec(code, names)
    assert names["y"].shape == (1, 3, 8) and names["rows"].shape == (2, 32, 24)


def test_the_code_that_loads_published_weights_runs_and_the_table_lists_them_all():
    section = README.split("## From the toy")[1].split("\n## ")[0]
    code = re.search(r"```python\n(.+?)```", section, re.DOTALL)[1]
    for name, golden in (("HuggingFaceTB/SmolLM2-135M", "smollm2"), ("openai/clip-vit-base-patch16", "clip")):
        code = code.replace(name, str(ROOT / "tests" / "golden" / golden))
    exec(code, names := {})
    assert len(names["vit"].blocks) == 2 and names["decoder"].token_embedding.num_embeddings == 64
    table = dict(re.findall(r"^\| ([^|]+) \| (\S+) \|$", section, re.MULTILINE))
    assert [name for name in table if name not in ("what", "---")] == [*PARITY]
    assert all(float(table[name]) < 1e-5 for name in PARITY)
