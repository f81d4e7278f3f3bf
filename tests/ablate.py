"""Evidence: change one choice of the papers, leave the rest, measure, print a table.

    python tests/ablate.py recipes       what is trainable when, and what that does to plain text
    python tests/ablate.py connectors    how many tokens an image becomes, and what makes them
    python tests/ablate.py losses        what ITC and ITM add to ITG
    python tests/ablate.py rank          rank of the adapters
    python tests/ablate.py optimizer     Muon against AdamW alone, from `vision` on
    python tests/ablate.py attention     how much of the Q-Former's attention falls on things

Each run has the flags in `TABLES` and half of the preset's `align` and `instruct`. Runs share stage
0 unless they change it. Writes to out/ablate/ and repeats nothing. Other flags go to train.py.
"""
import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.nn import functional as F

from bench import CONFIG, ROOT, write  # first, for the path
import train
from data import Scenes, draw, to_pixels, tokenizer_from
from model import MLLM, load_model
from sample import attention_maps, collate_for

# Columns of each table, and its runs: (label, flags from `vision` on, flags from `align` on).
ANSWERS = ("right", "unseen pairs", "blind", "descriptions")
COSTS = ("trainable", "seconds")
DRIFT = ("reading", "text ppl", "after align", "after instruct", "logits changed")
TABLES = {
    "recipes": (ANSWERS + COSTS + DRIFT, [
        (name, "", "" if name == "blip2_plora" else f"--recipe {name}") for name in train.RECIPES]),
    "connectors": (("image tokens", "connector parameters") + ANSWERS + COSTS, [
        ("Q-Former, 4 queries", "--qformer.n-queries 4", ""), ("Q-Former, default", "", ""),
        ("Q-Former, 32 queries", "--qformer.n-queries 32", ""),
        ("4 patches a token", "", "--connector patch-merge"),
        ("each patch a token", "", "--connector patches")]),
    "losses": (("vision seconds", "ITG nats", "recall@1", "ITM right") + ANSWERS, [
        ("ITG", "--itc-weight 0 --itm-weight 0", ""), ("ITG + ITC", "--itm-weight 0", ""),
        ("ITG + ITC + ITM", "", ""), ("all three in each step", "--contrast-every 1", "")]),
    "rank": (ANSWERS + COSTS, [
        (f"r = {r}", "", f"--recipe plora --decoder.r {r} --decoder.alpha {4 * r}")
        for r in (1, 4, 32, 128)]),
    "optimizer": (("vision seconds", "ITG nats") + ANSWERS, [("Muon", "", "")] + [
        (f"AdamW, rates x {x}", f"--no-muon --vision-lr {CONFIG.vision_lr * x:g} --align-lr "
         f"{CONFIG.align_lr * x:g} --instruct-lr {CONFIG.instruct_lr * x:g}", "")
        for x in (1, 0.3, 0.1)]),
    "attention": ((), [("", "", "")]),
}


def run(options, name, stages, flags, start=None):
    """Run stages from the weights in the folder `start`. Returns the folder that they wrote to."""
    folder = options.out / "_".join([name, *flags.split()])
    folder.mkdir(parents=True, exist_ok=True)
    for path in start.glob("*.pt") if start else []:
        (folder / path.name).write_bytes(path.read_bytes())
    cores = {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // options.jobs))}
    for stage in stages:
        command = [sys.executable, str(ROOT / "train.py"), f"--out={folder}", f"--stage={stage}",
                   *options.flags, *flags.split()]
        done, text = folder / f"{stage}.done", " ".join(command + options.preset)
        if stage == "language":  # later stages take the settings from its checkpoint
            command += options.preset
        if not done.exists() or done.read_text(encoding="utf-8") != text:
            with open(folder / "log.txt", "a", encoding="utf-8") as log:
                subprocess.run(command, stdout=log, stderr=log, env=os.environ | cores, check=True)
            done.write_text(text, encoding="utf-8")
    return folder


def run_all(options, runs):
    """[(label, folder)] of runs as in `TABLES`. Each stage 0 is trained once, for all of them."""
    language = run(options, "language", ["language"], "")
    with ThreadPoolExecutor(options.jobs) as pool:
        vision = {first: pool.submit(run, options, "vision", ["vision"], first, language)
                  for first in {first for _, first, _ in runs}}
        folders = [pool.submit(run, options, "run", ["align", "instruct"], f"{first} {more}",
                               vision[first].result()) for _, first, more in runs]
        return [(label, folder.result()) for (label, *_), folder in zip(runs, folders)]


def text_drift(folder, config):
    """What `align` and `instruct` did to text without pictures: perplexity of the right answers to
    questions about written descriptions, and the share of logits that are not the same bits."""
    texts = list(train.scene_sets(config)[1]["reading_accuracy"])
    logits, perplexity = [], []
    for stage in ("vision", "align", "instruct"):
        model, checkpoint = load_model(folder / f"{stage}.pt")
        collate = collate_for(model.eval(), tokenizer_from(checkpoint["tokenizer"]))
        batch = collate.conversations(texts)
        # `images` is an empty tensor here, which keeps adapters at work; None would not.
        logits.append(model(batch["input_ids"], batch["images"])[0])
        perplexity.append(model(**batch)[1].exp().item())
    changed = (logits[2] != logits[0]).float().mean().item()
    return dict(zip(DRIFT[1:], [*perplexity, changed]))


def sight(folder, config, n=500, among=100):
    """Of the Q-Former after `vision`, on held-out pictures: nats per token of ITG, how often ITC
    finds a picture's own text among `among`, how often ITM tells pairs from hard wrong ones."""
    model, checkpoint = load_model(folder / "vision.pt")
    collate = collate_for(model.eval(), tokenizer_from(checkpoint["tokenizer"]))
    scenes = Scenes(train.scene_sets(config)[0]["vision"].spec, "vision", n, "test")
    sums = torch.zeros(3)
    for start in range(0, n, among):
        batch = collate.pairs([scenes[i] for i in range(start, start + among)])
        features, text = model.image_features(batch["images"]), batch["text"]
        itg, queries = model.connector.itg_loss(features, batch["to_generate"], batch["labels"])
        similarity = model.connector.similarity(queries, text)
        own = (text[similarity.argmax(dim=1)] == text).all(dim=1)  # some scenes share their text
        matched = itm_accuracy(model.connector, features, text, similarity)
        sums += torch.stack([itg, own.float().mean(), matched])
    return dict(zip(("ITG nats", "recall@1", "ITM right"), (sums / (n / among)).tolist()))


def itm_accuracy(qformer, features, text, similarity):
    """Share right of 2B pairs: each text (B, T) with its picture, features (B, P, Dv), and with
    the wrong one that ITC finds most like it, by similarity (B, B)."""
    same = (text[:, None] == text[None]).all(dim=2)
    wrong = similarity.masked_fill(same, float("-inf")).argmax(dim=0)
    images = torch.cat([features, features[wrong]])
    queries = qformer(images, text.repeat(2, 1), "joint")[:, :qformer.n_queries]
    is_pair = qformer.itm_head(queries).mean(dim=1).argmax(dim=1)
    return (is_pair == (torch.arange(2 * len(text)) < len(text))).float().mean()


def measure(folder, columns):
    """These columns of a run, by name."""
    model, checkpoint = load_model(folder / "instruct.pt")
    config = train.Config(**checkpoint["run"])
    model.train_only(train.lr_scales(config, "instruct"))
    connector = [*model.connector.parameters(), *model.projector.parameters()]
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    seconds = metrics["seconds_by_stage"]
    cells = {"right": metrics["qa_accuracy"], "unseen pairs": metrics["qa_accuracy_unseen"],
             "blind": metrics["qa_accuracy_blind"], "descriptions": metrics["description_exact"],
             "reading": metrics["reading_accuracy"], "image tokens": model.n_image_tokens,
             "vision seconds": seconds["vision"], "seconds": seconds["align"] + seconds["instruct"],
             "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
             "connector parameters": sum(p.numel() for p in connector)}
    if "text ppl" in columns:
        cells |= text_drift(folder, config)
    if "ITG nats" in columns:
        cells |= sight(folder, config)
    return {name: cells[name] for name in columns}


def attention(folder, n=500):
    """Where the Q-Former looks in held-out scenes, before and after `vision` and in the end: the
    share of a query's attention that falls on pixels of things, and of these on all pixels."""
    trained, checkpoint = load_model(folder / "vision.pt")
    config, table = train.Config(**checkpoint["run"]), []
    torch.manual_seed(config.seed)
    fresh = MLLM(train.model_config(config, "vision", tokenizer_from(checkpoint["tokenizer"])))
    scenes = Scenes(train.scene_sets(config)[0]["vision"].spec, "vision", n, "test")
    size = config.vit["image_size"]
    full = torch.stack([to_pixels(scene.images[0], size) for scene in scenes])
    ground = [draw([], size[0], scenes.things(i)[1]) for i in range(n)]  # the same without things
    is_thing = full != torch.stack([to_pixels(picture, size) for picture in ground])
    is_thing = is_thing.any(dim=1, keepdim=True).float()  # (n, 1, height, width)
    covered = F.avg_pool2d(is_thing, config.vit["patch_size"]).flatten(1)  # (n, P - 1)
    for label, model in (("before vision", fresh), ("after vision", trained),
                         ("after instruct", load_model(folder / "instruct.pt")[0])):
        maps = attention_maps(model.eval(), full)[..., 1:]  # (n, cross-attentions, Q, P - 1)
        sums = maps.sum(dim=-1)  # (n, cross-attentions, Q)
        on = (maps @ covered[:, None, :, None])[..., 0] / sums  # (n, cross-attentions, Q)
        for i, queries in enumerate(on.mean(dim=0)):
            block = i * config.qformer["cross_attention_every"]
            table.append({"": f"{label}, block {block}", "mean query": queries.mean().item(),
                          "least": queries.min().item(), "most": queries.max().item(),
                          "pixels": covered.mean().item(),
                          "class token": 1 - sums[:, i].mean().item()})
    return table


def main():
    parser = argparse.ArgumentParser(description="Change one choice, measure, print a table.")
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--out", type=Path, default=Path("out/ablate"))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the cores")
    parser.add_argument("--preset", choices=train.PRESETS, help="all settings at once, as train.py")
    options, options.flags = parser.parse_known_args()
    options.preset = [f"--preset={options.preset}"] if options.preset else []
    config, _ = train.settings(train.parse_arguments(options.preset + options.flags), None)
    for stage in ("align", "instruct"):
        options.flags.append(f"--{stage}-samples={getattr(config, f'{stage}_samples') // 2}")
    columns, runs = TABLES[options.table]
    done = run_all(options, runs)
    with torch.no_grad():
        if options.table == "attention":
            table = attention(done[0][1])
        else:
            table = [{"": label} | measure(folder, columns) for label, folder in done]
    write(table, options.out / f"{options.table}.json")


if __name__ == "__main__":
    main()
