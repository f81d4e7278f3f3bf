"""Evidence: change one choice of the papers, leave the rest, measure, print a table.

    python tests/ablate.py recipes       what is trainable when, and what that does to plain text
    python tests/ablate.py connectors    how many rows stand for a picture, and what makes them
    python tests/ablate.py losses        what ITC and ITM add to ITG
    python tests/ablate.py size          pictures larger than those trained on
    python tests/ablate.py rank          rank of the adapters
    python tests/ablate.py precision     frozen weights in bfloat16
    python tests/ablate.py checkpoint    activations of the ViT kept, or computed again

Each run is one of train.py with the flags in `TABLES`, half of the preset's `align` and `instruct`
long; runs share stage 0 unless it is what they change. Writes NAME.json and a folder for each run
to out/ablate/, where what is done is not done again. Other flags go to every train.py.
"""
import argparse
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from bench import ROOT, kept_for_backward, seconds, write  # first, for the path
import train
from data import Scenes, Tokenizer
from model import MLLM, PARTS, ViT, load_file, part_of, save_file

# Columns of each table, and its runs: (label, flags from `vision` on, flags from `align` on).
ANSWERS = ("right", "never-seen pairs", "blind", "descriptions")
COSTS = ("trainable", "seconds")
DRIFT = ("reading", "text ppl", "after align", "after instruct", "logits changed")
TABLES = {
    "recipes": (ANSWERS + COSTS + DRIFT, [
        (name, "", "" if name == "blip2_plora" else f"--recipe {name}") for name in train.RECIPES]),
    "connectors": (("rows", "connector parameters", "ms an image") + ANSWERS + COSTS, [
        ("Q-Former, 4 queries", "--set qformer.n_queries=4", ""), ("Q-Former, default", "", ""),
        ("Q-Former, 32 queries", "--set qformer.n_queries=32", ""),
        ("4 patches a row", "", "--connector patch-merge"),
        ("each patch a row", "", "--connector patches")]),
    "losses": (("vision seconds", "ITG nats", "recall@1", "ITM right") + ANSWERS, [
        ("ITG", "--set itc_weight=0.0 --set itm_weight=0.0", ""),
        ("ITG + ITC", "--set itm_weight=0.0", ""), ("ITG + ITC + ITM", "", ""),
        ("all three in each step", "--set contrast_every=1", "")]),
    "rank": (ANSWERS + COSTS, [
        (f"r = {r}", "", f"--recipe plora --set decoder.r={r} --set decoder.alpha={4 * r}")
        for r in (1, 4, 32, 128)]),
    "precision": (ANSWERS + ("weights MB", "seconds"), [
        ("frozen in float32", "", "--recipe plora"),
        ("frozen in bfloat16", "", "--recipe plora --set half_frozen=true")]),
    "size": (("patches",) + ANSWERS, []),  # its runs are those of `larger_pictures`
    "checkpoint": ((), []),  # see `checkpointing`
}


# ---- Running train.py ------------------------------------------------------------------------

@dataclass
class Runner:
    """Calls train.py in folders named after its flags; what it prints is in log.txt there."""
    out: Path
    jobs: int
    flags: list[str]

    def run(self, name: str, stages: list[str], flags: str, start: Path | None = None) -> Path:
        """Run stages from the weights in the folder `start`. Returns the folder they wrote to."""
        folder = self.out / re.sub(r"\W+", "_", f"{name} {flags}").strip("_")
        folder.mkdir(parents=True, exist_ok=True)
        for path in [start / "tokenizer.json", *start.glob("*.pt")] if start else []:
            if not (folder / path.name).exists():  # train.py replaces links, and writes to none
                (folder / path.name).symlink_to(path.resolve())
        cores = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // self.jobs))}
        for stage in stages:
            command = [sys.executable, str(ROOT / "train.py"), f"--out={folder}",
                       f"--stage={stage}", *self.flags, *flags.split()]
            done = folder / f"{stage}.done"
            if done.exists() and done.read_text() == " ".join(command):
                continue
            with open(folder / "log.txt", "a") as log:
                subprocess.run(command, stdout=log, stderr=log, env=os.environ | cores, check=True)
            done.write_text(" ".join(command))
        return folder

    def run_all(self, runs: list[tuple[str, str, str]]) -> list[tuple[str, Path]]:
        """(label, folder) of runs as in `TABLES`. Each stage 0 is trained once, for all of them."""
        language = self.run("language", ["language"], "")
        with ThreadPoolExecutor(self.jobs) as pool:
            vision = {first: pool.submit(self.run, "vision", ["vision"], first, language)
                      for first in {first for _, first, _ in runs}}
            folders = [pool.submit(self.run, "run", ["align", "instruct"], f"{first} {more}",
                                   vision[first].result()) for _, first, more in runs]
            return [(label, folder.result()) for (label, *_), folder in zip(runs, folders)]


def larger_pictures(runner: Runner) -> list[tuple[str, Path]]:
    """(label, folder) of a run, and of its model shown pictures of 1.5 and 2 times the side."""
    trained = runner.run_all([("", "", "")])[0][1]
    side = load_file(trained / "instruct.pt")["run"]["vit"]["image_size"][0]
    runs = [(f"{side}, as trained", trained)]
    for larger in (3 * side // 2, 2 * side):
        flags = f"--image-size {larger} {larger}"
        save_padded(trained / "instruct.pt", larger, runner.run("padded", [], flags, trained))
        runs += [(f"{larger}, {how}", runner.run(name, ["evaluate"], flags, trained))
                 for how, name in (("not interpolated", "padded"), ("interpolated", "plain"))]
    return runs


def save_padded(source: Path, side: int, folder: Path) -> None:
    """The model for pictures of another side: learned positions in a corner, zeros elsewhere."""
    saved = load_file(source)
    vit, weights = saved["config"]["vit"], saved["model"]
    old, new = (length // vit["patch_size"] for length in (vit["image_size"][0], side))
    class_token, patches = weights["vit.position_embedding"].split([1, old * old], dim=1)
    grid = nn.functional.pad(patches.unflatten(1, (old, old)), (0, 0, 0, new - old, 0, new - old))
    weights["vit.position_embedding"] = torch.cat([class_token, grid.flatten(1, 2)], dim=1)
    vit["image_size"] = (side, side)
    save_file(saved, folder / "instruct.pt")


# ---- Measuring what a run left behind --------------------------------------------------------

@torch.no_grad()
def text_drift(folder: Path, config: train.Config) -> dict:
    """What `align` and `instruct` did to text without pictures: perplexity of the right answers to
    questions about written descriptions, and the share of logits that are not the same bits."""
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    texts, logits, perplexity = train.Task(config).test["language"], [], []
    for stage in ("vision", "align", "instruct"):
        model = MLLM.load(folder / f"{stage}.pt").eval()
        collate = train.collate_for(model, tokenizer, config)
        batch = collate.conversations([texts[i] for i in range(len(texts))])
        # `images` is an empty tensor here, which keeps adapters at work; None would not.
        logits.append(model(batch["input_ids"], batch["images"])[0])
        perplexity.append(model(**batch)[1].exp().item())
    changed = (logits[2] != logits[0]).float().mean().item()
    return dict(zip(DRIFT[1:], [*perplexity, changed]))


@torch.no_grad()
def sight(folder: Path, config: train.Config, n: int = 500, among: int = 100) -> dict:
    """Of the Q-Former after `vision`, on held-out pictures: nats per token of ITG, how often ITC
    finds a picture's own text among `among`, how often ITM tells pairs from hard wrong ones."""
    model, tokenizer = MLLM.load(folder / "vision.pt"), Tokenizer.load(folder / "tokenizer.json")
    collate = train.collate_for(model.eval(), tokenizer, config)
    scenes, sums = Scenes(train.Task(config).spec, "vision", n, "test"), torch.zeros(3)
    for start in range(0, n, among):
        batch = collate.pairs([scenes[i] for i in range(start, start + among)])
        features, text = model.image_features(batch["images"]), batch["text"]
        itg, queries = model.qformer.itg_loss(features, batch["to_generate"], batch["targets"])
        found = model.qformer.similarity(queries, text).argmax(dim=1)
        own = (text[found] == text).all(dim=1).float().mean()  # some scenes share their text
        sums += torch.stack([itg, own, itm_accuracy(model.qformer, features, text, queries)])
    return dict(zip(("ITG nats", "recall@1", "ITM right"), (sums / (n / among)).tolist()))


def itm_accuracy(qformer, features: Tensor, text: Tensor, queries: Tensor) -> Tensor:
    """Share right of 2B pairs: each text (B, T) with its picture, features (B, P, Dv), and with
    the wrong one that ITC finds most like it."""
    same = (text[:, None] == text[None]).all(dim=2)
    similarity = qformer.similarity(queries, text).masked_fill(same, float("-inf"))
    images = torch.cat([features, features[similarity.argmax(dim=0)]])
    rows = qformer(images, text.repeat(2, 1), "joint")[:, :qformer.n_queries]
    is_pair = qformer.itm_head(rows).mean(dim=1).argmax(dim=1)
    return (is_pair == (torch.arange(2 * len(text)) < len(text))).float().mean()


@torch.no_grad()
def measure(folder: Path, columns: tuple[str, ...]) -> dict:
    """The columns of a run's row."""
    weights = load_file(folder / "instruct.pt")["model"]
    metrics = json.loads((folder / "metrics.json").read_text())
    config, spent = train.Config(**metrics["config"]), metrics["seconds_by_stage"]
    model, size = MLLM.load(folder / "instruct.pt").eval(), config.vit["image_size"]
    images, sizes = torch.randn(64, 3, *size), dict.fromkeys(PARTS, 0)
    for name, value in weights.items():
        sizes[part_of(name)] += value.numel()
    row = {"right": metrics["qa_accuracy"], "never-seen pairs": metrics["qa_accuracy_unseen"],
           "blind": metrics["qa_accuracy_blind"], "descriptions": metrics["description_exact"],
           "reading": metrics["reading_accuracy"], "vision seconds": spent["vision"],
           "seconds": spent["align"] + spent["instruct"], "rows": model.config.n_rows(size),
           "trainable": sum(sizes[part] for part in train.shares_of(config, "instruct")),
           "connector parameters": sizes["qformer"] + sizes["projector"],
           "patches": size[0] * size[1] // config.vit["patch_size"] ** 2,
           "weights MB": sum(value.nbytes for value in weights.values()) / 1e6,
           "ms an image": 1e3 * seconds(lambda: model.encode_images(images))[0] / len(images)}
    if "text ppl" in columns:
        row |= text_drift(folder, config)
    if "recall@1" in columns:
        row |= sight(folder, config)
    return {name: row[name] for name in columns}


def checkpointing(n: int = 16, n_layers: int = 12) -> list[dict]:
    """A step of a ViT-S/14 on n images of 224 x 224, in float32 on the CPU. The largest difference
    is that of a gradient to the first row's."""
    steps, rows, gradients, images = [], [], [], torch.rand(n, 3, 224, 224)
    for label, again in (("kept", False), ("computed again", True)):
        torch.manual_seed(0)
        vit = ViT(224, 14, 384, n_layers, 6, use_grad_checkpoint=again)
        kept, y = kept_for_backward(vit, lambda: vit(images))
        y.square().mean().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in vit.parameters()]))
        rows.append({"activations": label, "kept MB": kept,
                     "largest difference": (gradients[-1] - gradients[0]).abs().max().item()})
        steps.append(lambda vit=vit: vit(images).square().mean().backward())
    return [row | {"seconds": each} for row, each in zip(rows, seconds(*steps))]


def main() -> None:
    parser = argparse.ArgumentParser(description="Change one choice, measure, print a table.")
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--out", type=Path, default=Path("out/ablate"))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the cores")
    arguments, flags = parser.parse_known_args()
    columns, runs = TABLES[arguments.table]
    config = train.settings(train.parse_arguments(flags))
    for stage in ("align", "instruct"):
        flags.append(f"--{stage}-samples={getattr(config, f'{stage}_samples') // 2}")
    runner = Runner(arguments.out, arguments.jobs, flags)
    done = runner.run_all(runs) if runs else larger_pictures(runner) if columns else []
    rows = [{"": label} | measure(folder, columns) for label, folder in done] or checkpointing()
    write(rows, arguments.out / f"{arguments.table}.json")


if __name__ == "__main__":
    main()
