"""Evidence: change one choice of the papers, leave the rest, measure, print a table.

    python tests/ablate.py recipes       what is trainable when, and what that does to plain text
    python tests/ablate.py connectors    how many rows stand for a picture, and what makes them
    python tests/ablate.py losses        what ITC and ITM add to ITG
    python tests/ablate.py rank          rank of the adapters
    python tests/ablate.py optimizer     Muon against AdamW alone, from `vision` on
    python tests/ablate.py attention     how much of the Q-Former's attention falls on things

Each run has the flags in `TABLES` and half of the preset's `align` and `instruct`; runs share stage
0 unless they change it. Writes to out/ablate/ and repeats nothing. Other flags go to train.py.
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

from bench import CONFIG, ROOT, write  # first, for the path
import train
from data import Scenes, Tokenizer, draw, to_pixels
from model import MLLM, PARTS, load_file, part_of
from sample import attention_maps

# Columns of each table, and its runs: (label, flags from `vision` on, flags from `align` on).
ANSWERS = ("right", "unseen pairs", "blind", "descriptions")
COSTS = ("trainable", "seconds")
DRIFT = ("reading", "text ppl", "after align", "after instruct", "logits changed")
TABLES = {
    "recipes": (ANSWERS + COSTS + DRIFT, [
        (name, "", "" if name == "blip2_plora" else f"--recipe {name}") for name in train.RECIPES]),
    "connectors": (("rows", "connector parameters") + ANSWERS + COSTS, [
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
    "optimizer": (("vision seconds", "ITG nats") + ANSWERS, [("Muon", "", "")] + [
        (f"AdamW, rates x {x}", "--set muon=false" + "".join(
            f" --set {stage}_lr={getattr(CONFIG, f'{stage}_lr') * x:g}"
            for stage in train.STAGES[1:]), "") for x in (1, 0.3, 0.1)]),
    "attention": ((), []),  # of a run, see `attention`
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
        itg, queries = model.qformer.itg_loss(features, batch["to_generate"], batch["labels"])
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
    sizes = dict.fromkeys(PARTS, 0)
    for name, value in weights.items():
        sizes[part_of(name)] += value.numel()
    row = {"right": metrics["qa_accuracy"], "unseen pairs": metrics["qa_accuracy_unseen"],
           "blind": metrics["qa_accuracy_blind"], "descriptions": metrics["description_exact"],
           "reading": metrics["reading_accuracy"], "vision seconds": spent["vision"],
           "seconds": spent["align"] + spent["instruct"], "rows": model.config.n_rows(size),
           "trainable": sum(sizes[part] for part in train.shares_of(config, "instruct")),
           "connector parameters": sizes["qformer"] + sizes["projector"]}
    if "text ppl" in columns:
        row |= text_drift(folder, config)
    if "ITG nats" in columns:
        row |= sight(folder, config)
    return {name: row[name] for name in columns}


@torch.no_grad()
def attention(folder: Path, n: int = 500) -> list[dict]:
    """Where the Q-Former looks in held-out scenes, before and after `vision` and in the end: the
    share of a query's attention that falls on pixels of things, and of these on all pixels."""
    saved, rows = load_file(folder / "vision.pt"), []
    config = train.Config(**saved["run"])
    tokenizer, spec = Tokenizer.load(folder / "tokenizer.json"), train.Task(config).spec
    scenes, patch = Scenes(spec, "vision", n, "test"), config.vit["patch_size"]
    pictures = [[draw(things, spec.image_size, rng) for things, rng in (  # with things, and without
        scenes.things(i), ([], scenes.things(i)[1]))] for i in range(n)]
    full, empty = (torch.stack([to_pixels(image, config.vit["image_size"]) for image in side])
                   for side in zip(*pictures))
    is_thing = (full != empty).any(dim=1, keepdim=True).float()  # (n, 1, height, width)
    covered = nn.functional.avg_pool2d(is_thing, patch).flatten(1)  # (n, P)
    torch.manual_seed(config.seed)
    for label, model in (("before vision", MLLM(train.model_config(config, "vision", tokenizer))),
                         ("after vision", MLLM.load(folder / "vision.pt")),
                         ("after instruct", MLLM.load(folder / "instruct.pt"))):
        maps = attention_maps(model.eval(), full)[..., 1:]  # (n, cross-attentions, Q, P)
        for i, of_queries in enumerate(maps.unbind(dim=1)):
            on = (of_queries @ covered[..., None])[..., 0] / of_queries.sum(dim=-1)  # (n, Q)
            on = on.mean(dim=0)
            block = i * config.qformer["cross_attention_every"]
            rows.append({"": f"{label}, block {block}", "mean query": on.mean().item(),
                         "least": on.min().item(), "most": on.max().item(),
                         "pixels": covered.mean().item(),
                         "class token": 1 - of_queries.sum(dim=-1).mean().item()})
    return rows


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
    if arguments.table == "attention":
        rows = attention(runner.run_all([("", "", "")])[0][1])
    else:
        done = runner.run_all(runs)
        rows = [{"": label} | measure(folder, columns) for label, folder in done]
    write(rows, arguments.out / f"{arguments.table}.json")


if __name__ == "__main__":
    main()
