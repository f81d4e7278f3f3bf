"""Evidence: change one choice of the papers, leave the rest, measure, print a table.

    python tests/ablate.py recipes       who learns in which stage, and what that does to plain text
    python tests/ablate.py connectors    how many rows stand for a picture, and what makes them
    python tests/ablate.py losses        what ITC and ITM add to ITG
    python tests/ablate.py size          pictures larger than those trained on
    python tests/ablate.py rank          rank of the adapters
    python tests/ablate.py precision     frozen weights in bfloat16
    python tests/ablate.py checkpoint    activations of the ViT kept, or computed again

Each run is one of train.py with the flags that `TABLES` lists, at half of the preset's `align` and `instruct`. Runs
share stage 0 unless it is what they change. Writes NAME.json, NAME.png (but for `checkpoint`) and a folder for each
run to out/ablate/, where what is done is not done again. Flags it does not know go to every train.py.
"""
import argparse
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from data import Scenes, Tokenizer  # noqa: E402
from model import MLLM, ViT  # noqa: E402

# For each table: what to show, and each run as (label, flags). Flags before "|" are for stage 0, too. 50% means half
# of the preset's samples.
ANSWERS = ("right", "never-seen pairs", "blind", "descriptions")
COSTS = ("learning", "seconds", "GB")
TABLES = {
    "recipes": (ANSWERS + COSTS + ("reading", "text ppl", "after align", "after instruct", "logits changed"), [
        ("minigpt4, frozen", "--recipe minigpt4"), ("lora", "--recipe lora"), ("plora", "--recipe plora"),
        ("xcomposer2", "--recipe xcomposer2"),
        ("xcomposer2, slower", "--recipe xcomposer2 --vit-lr 0.1 --decoder-lr 0.1"), ("blip2_plora", "")]),
    "connectors": (("rows", "connector parameters", "ms an image") + ANSWERS + COSTS, [
        ("Q-Former, 4 queries", "--n-queries 4 |"), ("Q-Former, 16 queries", ""),
        ("Q-Former, 32 queries", "--n-queries 32 |"), ("4 patches a row", "--connector patch-merge"),
        ("each patch a row", "--connector patches")]),
    "losses": (("see seconds", "ITG nats", "recall@1", "ITM right") + ANSWERS, [
        ("ITG", "--itc-weight 0 --itm-weight 0 |"), ("ITG + ITC", "--itm-weight 0 |"), ("ITG + ITC + ITM", ""),
        ("all three in each step", "--contrast-every 1 |")]),
    "rank": (ANSWERS + COSTS, [
        ("r = 1", "--recipe plora --r 1 --alpha 4"), ("r = 4", "--recipe plora --r 4 --alpha 16"),
        ("r = 32", "--recipe plora"), ("r = 128", "--recipe plora --r 128 --alpha 512")]),
    "size": (("patches",) + ANSWERS, []),                     # its runs are those of `larger_pictures`
    "checkpoint": ((), []),                                   # see `checkpointing`
    "precision": (ANSWERS + ("weights MB", "seconds", "GB"), [
        ("frozen in float32", "--recipe plora"), ("frozen in bfloat16", "--recipe plora --half-frozen")]),
}


# ---- Running train.py -----------------------------------------------------------------------------

class Runner:
    """Calls train.py in folders named after its flags, several at a time, each on its share of the CPU cores."""

    def __init__(self, out: Path, jobs: int, flags: list[str]):
        self.out, self.jobs, self.flags = out, jobs, flags
        self.config = train.settings(train.parse_arguments(flags))
        out.mkdir(parents=True, exist_ok=True)
        if (out / "flags.json").exists() and json.loads((out / "flags.json").read_text()) != flags:
            raise ValueError(f"{out} holds runs with other flags, see flags.json there: give another --out")
        (out / "flags.json").write_text(json.dumps(flags))

    def share(self, found: re.Match) -> str:
        """"--align-samples 50%" as a number of samples."""
        samples = train.stage_samples(self.config, found[1]) * int(found[2]) // 100
        return f"--{found[1]}-samples {samples}"

    def stage(self, folder: Path, stage: str, flags: str, jobs: int) -> None:
        """One stage in a folder, unless what it ends with is there: its weights, or the metrics."""
        if (folder / ("metrics.json" if stage in ("evaluate", "instruct") else f"{stage}.pt")).exists():
            return
        flags = re.sub(r"--(\w+)-samples (\d+)%", self.share, flags).split()
        command = [sys.executable, ROOT / "train.py", "--out", folder, "--stage", stage, *self.flags, *flags]
        environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
        with open(folder / "log.txt", "a") as log:
            print(*command, file=log, flush=True)
            if subprocess.run(command, stdout=log, stderr=log, env=environment).returncode:
                raise RuntimeError(f"{' '.join(map(str, command))} failed: see {folder}/log.txt")

    def folder(self, name: str, start: Path, **links: str) -> Path:
        """A folder whose run starts from `start`: from its tokenizer, its read.pt and {stage: weights of a stage}."""
        folder = self.out / re.sub(r"\W+", "_", name).strip("_")
        folder.mkdir(exist_ok=True)
        files = {f"{stage}.pt": f"{weights}.pt" for stage, weights in links.items()}
        for name, file in ({"tokenizer.json": "tokenizer.json", "read.pt": "read.pt"} | files).items():
            if not (folder / name).exists():
                (folder / name).symlink_to((start / file).resolve())
        return folder

    def read(self) -> Path:
        """The folder of the first stage, which is the same for all."""
        folder = self.out / "read"
        folder.mkdir(exist_ok=True)
        self.stage(folder, "read", "", jobs=1)
        return folder

    def see(self, flags: str) -> Path:
        """The folder of stage 0 with these flags."""
        folder = self.folder(f"see {flags}", self.read())
        self.stage(folder, "see", flags, self.jobs)
        return folder

    def stages_1_and_2(self, flags: str) -> Path:
        """The two stages of the papers at half the preset's length, from the stage 0 that belongs to the flags."""
        first, _, more = flags.rpartition("|")
        folder = self.folder(f"run {flags}", self.see(first.strip()), see="see")
        for stage in ("align", "instruct"):
            self.stage(folder, stage, f"--align-samples 50% --instruct-samples 50% {first} {more}", self.jobs)
        return folder

    def all(self, flags: list[str]) -> list[Path]:
        """The folders of all runs. Each stage 0 is trained before what starts from it."""
        self.read()
        with ThreadPoolExecutor(self.jobs) as pool:
            list(pool.map(self.see, sorted({these.rpartition("|")[0].strip() for these in flags})))
            return list(pool.map(self.stages_1_and_2, flags))


# ---- Measuring what a run left behind -------------------------------------------------------------

@torch.no_grad()
def text_drift(folder: Path, config: train.Config) -> dict:
    """What the stages did to text without pictures: perplexity of the answers to questions about written
    descriptions, and the share of logits that are not bit for bit those of the decoder from stage 0."""
    texts, tokenizer = train.Task(config).test["read"], Tokenizer.load(folder / "tokenizer.json")
    collate = train.make_collate(tokenizer, config)
    batch = collate.conversations([texts[i] for i in range(len(texts))])
    logits, perplexity = {}, {}
    for stage in ("see", "align", "instruct"):
        model = MLLM.load(folder / f"{stage}.pt").eval()
        # No images: an empty tensor keeps adapters in the graph.
        logits[stage] = model(batch["input_ids"], batch["images"])[0]
        perplexity[stage] = model(**batch)[1].exp().item()
    changed = (logits["instruct"] != logits["see"]).float().mean().item()
    return {"text ppl": perplexity["see"], "after align": perplexity["align"],
            "after instruct": perplexity["instruct"], "logits changed": changed}


@torch.no_grad()
def sight(folder: Path, config: train.Config, n: int = 500, among: int = 100) -> dict:
    """Of the Q-Former after `see`, on held-out pictures: nats per token of ITG, how often ITC finds a picture's own
    text among `among`, how often ITM, if it has learned, tells pairs from hard wrong ones."""
    model, tokenizer = MLLM.load(folder / "see.pt").eval(), Tokenizer.load(folder / "tokenizer.json")
    collate = train.make_collate(tokenizer, model.config)
    scenes = Scenes(train.Task(config).spec, "see", n, "test")
    sums = torch.zeros(3)
    for start in range(0, n, among):
        batch = collate.pairs([scenes[i] for i in range(start, start + among)])
        images, text = batch["images"], batch["text"]
        features = model.ln_vision(model.vit(images))
        itg, queries = model.qformer.itg_loss(features, batch["to_generate"])
        found = model.qformer.similarity(queries, text).argmax(dim=1)
        own = (text[found] == text).all(dim=1).float().mean()                     # some scenes share their text
        sums += torch.stack([itg, own, itm_accuracy(model, features, text, queries)])
    itg, own, matched = (sums / (n / among)).tolist()
    return {"ITG nats": itg, "recall@1": own, "ITM right": matched}


def itm_accuracy(model: MLLM, features: torch.Tensor, text: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """Share right of 2B pairs: each text with its picture, and with the wrong one that ITC finds most like it."""
    same = (text[:, None] == text[None]).all(dim=2)
    hardest = model.qformer.similarity(queries, text).masked_fill(same, float("-inf")).argmax(dim=0)
    rows = model.qformer.encode(torch.cat([features, features[hardest]]), text.repeat(2, 1), "joint")
    is_pair = model.qformer.itm_head(rows[:, :model.config.n_queries]).mean(dim=1).argmax(dim=1)
    return (is_pair == (torch.arange(2 * len(text)) < len(text))).float().mean()


@torch.no_grad()
def ms_an_image(model: MLLM, n: int = 64, repeats: int = 20) -> float:
    """Median time of an image's way to the decoder, in a batch of n, float32, on the CPU."""
    images, times = torch.randn(n, 3, *model.config.image_size), []
    for _ in range(repeats):
        start = time.perf_counter()
        model.encode_images(images)
        times.append(time.perf_counter() - start)
    return median(times) / n * 1000


def measure(folder: Path, columns: tuple[str, ...]) -> dict:
    """The columns of a run's line."""
    metrics = json.loads((folder / "metrics.json").read_text())
    config, seconds = train.Config(**metrics["config"]), metrics["seconds_by_stage"]
    saved = torch.load(folder / "instruct.pt", weights_only=True)
    model = MLLM.load(folder / "instruct.pt").eval()
    line = {"right": metrics["qa_accuracy"], "never-seen pairs": metrics["qa_accuracy_unseen"],
            "blind": metrics["qa_accuracy_blind"], "descriptions": metrics["description_exact"],
            "reading": metrics["reading_accuracy"],
            "learning": metrics["learning_parameters"]["instruct"], "GB": saved["memory"],
            "seconds": seconds["align"] + seconds["instruct"], "see seconds": seconds["see"],
            "rows": model.config.n_rows, "patches": config.n_patches,
            "connector parameters": train.count_parameters(model, ("qformer", "projector")),
            "weights MB": sum(value.numel() * value.element_size() for value in saved["model"].values()) / 1e6}
    if "ms an image" in columns:
        line["ms an image"] = ms_an_image(model)
    if "text ppl" in columns:
        line |= text_drift(folder, config)
    if "recall@1" in columns:
        line |= sight(folder, config)
    return {name: line[name] for name in columns}


def checkpointing(n: int = 16, repeats: int = 3) -> list[dict]:
    """A step of a ViT-S/14 on n images of 224 x 224, on the CPU in float32: what is kept for the way back, how long
    it takes, and the largest difference of a gradient to that of the first line."""
    lines, gradients, images = [], [], torch.rand(n, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    for label, again in (("kept", False), ("computed again", True)):
        torch.manual_seed(0)
        vit, kept, times = ViT(224, 14, 384, 12, 6, use_grad_checkpoint=again), {}, []
        own = {parameter.untyped_storage().data_ptr() for parameter in vit.parameters()}

        def keep(x: torch.Tensor) -> torch.Tensor:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        for _ in range(repeats):
            vit.zero_grad()
            kept.clear()
            start = time.perf_counter()
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                loss = vit(images).square().mean()
            held = sum(size for pointer, size in kept.items() if pointer not in own)
            loss.backward()
            times.append(time.perf_counter() - start)
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in vit.parameters()]))
        lines.append({"activations": label, "kept MB": held / 1e6, "seconds": median(times),
                      "largest difference": (gradients[-1] - gradients[0]).abs().max().item()})
    return lines


# ---- Larger pictures ------------------------------------------------------------------------------

def larger_pictures(runner: Runner) -> list[tuple[str, Path]]:
    """Trained at the preset's size, shown pictures of 1.5 and 2 times the side: with the position embedding
    interpolated, with zeros where the learned grid ends, and after a short tuning of ViT, projector and adapters.
    (label, folder) of each."""
    trained = runner.all([""])[0]
    model = MLLM.load(trained / "instruct.pt")
    side, runs = model.config.image_size[0], []
    for larger in (3 * side // 2, 2 * side):
        size = f"--image-size {larger} {larger}"
        plain = runner.folder(f"{larger} interpolated", trained, see="see", align="align", instruct="instruct")
        padded = runner.folder(f"{larger} padded", trained, see="see", align="align")
        tuned = runner.folder(f"{larger} tuned", trained, see="see", align="instruct")
        save_padded(model, larger, trained, padded)
        runs += [(f"{larger}, not interpolated", padded, "evaluate", size),
                 (f"{larger}, interpolated", plain, "evaluate", size),
                 (f"{larger}, interpolated and tuned", tuned, "instruct",
                  f"{size} --instruct-samples 20% --recipe xcomposer2 --decoder-lr 0")]
    with ThreadPoolExecutor(runner.jobs) as pool:
        list(pool.map(lambda run: runner.stage(*run[1:], runner.jobs), runs))
    return [(f"{side}, as trained", trained)] + [(label, folder) for label, folder, _, _ in runs]


def save_padded(model: MLLM, side: int, start: Path, folder: Path) -> None:
    """The model for larger pictures whose learned positions stay in the top left corner, zeros elsewhere."""
    larger = model.renewed(replace(model.config, image_size=(side, side)))
    rows, columns = model.vit.grid
    with torch.no_grad():
        positions = torch.zeros(*larger.vit.grid, model.config.vit_dim)
        positions[:rows, :columns] = model.vit.position_embedding[0, 1:].unflatten(0, (rows, columns))
        larger.vit.position_embedding[0, 1:] = positions.flatten(0, 1)
    saved = torch.load(start / "instruct.pt", weights_only=True)
    larger.save(folder / "instruct.pt", **{key: saved[key] for key in ("losses", "seconds", "memory", "learning")})


# ---- Table and chart ------------------------------------------------------------------------------

def show(value) -> str:
    """A cell of the table; "0" is exactly zero."""
    if isinstance(value, str) or value == 0:
        return str(value or 0)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.0f}" if value >= 100 else f"{value:.3f}" if value >= 0.01 else f"{value:.4f}"


def print_table(lines: list[dict]) -> None:
    """The lines as Markdown."""
    print(f"\n| {' | '.join(lines[0])} |\n|{' --- |' * len(lines[0])}")
    for line in lines:
        print(f"| {' | '.join(show(value) for value in line.values())} |")


def draw_chart(lines: list[dict], path: Path, width: int = 300, row: int = 44) -> None:
    """For each run a bar of what it answers right, and under it one of never-seen pairs."""
    font, left = ImageFont.load_default(13), 210
    chart = Image.new("RGB", (left + width + 50, row * len(lines) + 34), "white")
    canvas = ImageDraw.Draw(chart)
    for i, line in enumerate(lines):
        top = i * row + 8
        canvas.text((left - 8, top + 14), line[""], "black", font, anchor="rm")
        for j, (column, color) in enumerate((("right", (45, 85, 215)), ("never-seen pairs", (230, 150, 40)))):
            y = top + 15 * j
            canvas.rectangle((left, y, left + width * line[column], y + 13), color)
            canvas.text((left + width * line[column] + 5, y + 7), f"{line[column]:.2f}", "black", font, anchor="lm")
    y = row * len(lines) + 16
    canvas.text((left, y), "right", (45, 85, 215), font, anchor="lm")
    canvas.text((left + 60, y), "right on never-seen pairs", (190, 110, 10), font, anchor="lm")
    chart.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--out", type=Path, default=Path("out/ablate"))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each with its share of the CPU cores")
    arguments, flags = parser.parse_known_args()
    runner, start = Runner(arguments.out, arguments.jobs, flags), time.time()
    columns, runs = TABLES[arguments.table]
    if arguments.table == "size":
        runs = larger_pictures(runner)
    else:
        runs = list(zip((label for label, _ in runs), runner.all([flags for _, flags in runs]) if runs else ()))
    lines = [{"": label} | measure(folder, columns) for label, folder in runs] or checkpointing()
    (arguments.out / f"{arguments.table}.json").write_text(json.dumps(lines, indent=2))
    if columns:
        draw_chart(lines, arguments.out / f"{arguments.table}.png")
    print_table(lines)
    print(f"\n{time.time() - start:.0f} s, wrote to {arguments.out}")


if __name__ == "__main__":
    main()
