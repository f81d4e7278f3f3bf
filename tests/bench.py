"""How fast and how large: ratios of what is measured side by side, medians of repeats that take turns.

    python tests/bench.py plora          the adapters against a plain linear and against gathering the image rows
    python tests/bench.py frozen         a stage in which ViT and Q-Former are frozen, with each picture seen once or anew
    python tests/bench.py step           where the time of a training step goes, and how near it is to the matrix rate
    python tests/bench.py generation     tokens a second with the cache and without
    python tests/bench.py memory         what each stage holds: weights, gradients, optimizer, activations
    python tests/bench.py growth         time a sample against image size, queries, text length and width

Each prints a Markdown table and writes NAME.json to out/bench (growth a chart, too). Sizes are those of the device's
preset; matrix products are in bfloat16 as in training.

What the profile said of `python train.py` on two CPU cores, before any work on it: of a step of `read`, 30 % are matrix
products, 16 % products of single elements (rotary positions, SwiGLU, norms), 14 % attention, 12 % copies between float32
and bfloat16; by parts of the program, 16 % are Muon, which costs the same for any batch, and 5 % the logits with their
loss, although only 8 % of all positions are trained. 26 % of all tokens are padding. What came of it: texts of like length
share a batch in `read` (a step takes a sixth less, and as much is learned), ITC and ITM run in one step of four (`see`, a
sixth), the adapters' rows are masked where they are narrow (`instruct`, a twelfth), and logits are those of trained
positions (nothing at this vocabulary, a tenth at 49,152 ids). Tried without gain: batches of like length in the other
stages (faster, but less is learned), casting once what several products read, padding to multiples of 8, picking rows by
index for the adapters, larger pages of memory, a worker of low priority, batches of 128, two processes of one thread.
"""
import argparse
import copy
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))

import train  # noqa: E402
from ablate import print_table  # noqa: E402
from data import Scenes, SceneSpec, Tokenizer, corpus  # noqa: E402
from model import MLLM, PARTS, part_of  # noqa: E402
from plora import PLoRALinear  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CONFIG = train.PRESETS["gpu" if DEVICE.type == "cuda" else "cpu"]


REPEATS = 9


def seconds(*functions: Callable) -> list[float]:
    """The median time of each function, all of them in turn `REPEATS` times after one turn to warm up."""
    times = [[] for _ in functions]
    for repeat in range(REPEATS + 1):
        for function, own in zip(functions, times):
            start = time.perf_counter()
            function()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            if repeat:
                own.append(time.perf_counter() - start)
    return [median(own) for own in times]


def matrix_rate(n: int = 2048) -> float:
    """Multiplications and additions a second of a large product of bfloat16 matrices."""
    a = torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16)
    return 2 * n ** 3 / seconds(lambda: a @ a)[0]


def setting(**changes) -> tuple[train.Config, train.Task, MLLM]:
    """The preset with changes, data for it and a fresh model, as it is after `see`."""
    config = replace(CONFIG, workers=0, **changes)
    task = train.Task(config)
    tokenizer = Tokenizer.train(corpus(task.train("read"), 2000), config.vocab_size)
    torch.manual_seed(0)
    task.collate = train.make_collate(tokenizer, config)
    return config, task, MLLM(train.model_config(config, tokenizer)).to(DEVICE)


# ---- Adapters -------------------------------------------------------------------------------------

class Gathered(PLoRALinear):
    """The same layer as published: the delta is computed for the image rows alone, picked out and put back."""

    def forward(self, x: Tensor, is_image: Tensor) -> Tensor:
        y = F.linear(x, self.weight)
        delta = F.linear(F.linear(x[is_image], self.lora_A), self.lora_B) * (self.alpha / self.r)
        y[is_image] = y[is_image] + delta
        return y


def plora() -> list[dict]:
    """Forward and backward of one layer whose base is frozen, for three shares of image rows."""
    lines = []
    for dim, r, tokens in ((192, 32, (64, 120)), (4096, 256, (4, 256))):
        for share in (0.0, 0.25, 1.0):
            x = torch.randn(*tokens, dim, device=DEVICE, requires_grad=True)
            is_image = (torch.arange(tokens[1], device=DEVICE) < share * tokens[1]).expand(tokens)
            layers = [layer.to(DEVICE) for layer in (nn.Linear(dim, dim, bias=False), PLoRALinear(dim, dim, r, r),
                                                     Gathered(dim, dim, r, r))]
            for layer in layers:
                layer.weight.requires_grad_(False)

            def step(layer: nn.Module) -> Callable:
                def run() -> None:
                    with torch.autocast(DEVICE.type, torch.bfloat16):
                        y = layer(x) if type(layer) is nn.Linear else layer(x, is_image)
                    y.backward(y.detach())
                return run

            plain, ours, gathered = seconds(*map(step, layers))
            lines.append({"width": dim, "rank": r, "image rows": share, "plain ms": 1e3 * plain,
                          "PLoRA / plain": ours / plain, "gathered / plain": gathered / plain})
    return lines


# ---- Frozen work ----------------------------------------------------------------------------------

def frozen(n: int = 128) -> list[dict]:
    """Samples a second of `align` with the recipe minigpt4 on n pictures of one's own, all work of a pass counted:
    reading pictures, the model forward and backward, Muon."""
    lines = []
    for side in (CONFIG.image_size[0], 2 * CONFIG.image_size[0], 4 * CONFIG.image_size[0]):
        with tempfile.TemporaryDirectory() as folder:
            scenes = Scenes(SceneSpec(side), "align", n)
            for i in range(n):
                scenes[i].images[0].save(f"{folder}/{i}.png")
            Path(folder, "captions.txt").write_text("".join(f"{i}.png\t{scenes[i].turns[0][1]}\n" for i in range(n)))
            config, task, model = setting(data=folder, recipe="minigpt4", image_size=(side, side))
            model.drop_text_branch()
            model.train_only(train.who_learns(config, "align"))
            anew = task.train("align")
            once = copy.copy(anew)
            once.seen = train.see_once(model, anew, task.collate, config, Path(folder))
            optimizers = train.make_optimizers(model, config, "align")

            def a_pass(dataset) -> Callable:
                def run() -> None:
                    batch = train.to_device(task.collate.conversations([dataset[i] for i in range(64)]), DEVICE)
                    with train.autocast(DEVICE, config):
                        loss = train.stage_loss(model, "align", batch, config)
                    loss.backward()
                    for optimizer in optimizers:
                        optimizer.step()
                return run

            slow, fast = seconds(a_pass(anew), a_pass(once))
        lines.append({"image side": side, "patches": config.n_patches, "anew, samples a second": 64 / slow,
                      "once, samples a second": 64 / fast, "once / anew": slow / fast})
    return lines


# ---- A training step ------------------------------------------------------------------------------

STEPS = train.GROUP                      # batches that stand for all


def step() -> list[dict]:
    """For each stage the milliseconds of a step by what they are spent on, and the share of the matrix rate that the
    products of forward and backward reach."""
    lines, rate = [], matrix_rate()
    config, task, model = setting()
    for stage in train.STAGES:
        if stage == "align":
            model.drop_text_branch()
        loader = iter(task.batches(stage, task.collate, 0))
        batches = [train.to_device(next(loader), DEVICE) for _ in range(STEPS)]
        model.train_only(train.who_learns(config, stage))
        optimizers = train.make_optimizers(model, config, stage)
        learns = [value for value in model.parameters() if value.requires_grad]

        def forward(backward: bool = False) -> None:
            for i, batch in enumerate(batches):
                with train.autocast(DEVICE, config):
                    loss = train.stage_loss(model, stage, batch, config, i)
                if backward:
                    loss.backward()

        def optimise() -> None:
            nn.utils.clip_grad_norm_(learns, config.clip)
            for optimizer in optimizers:
                optimizer.step()

        @torch.no_grad()
        def see() -> None:
            with train.autocast(DEVICE, config):
                model.ln_vision(model.vit(batches[0]["images"]))

        data, ahead, both, rest, vit = seconds(lambda: next(loader), forward, lambda: forward(True), optimise, see)
        ahead, both = ahead / STEPS, both / STEPS
        with FlopCounterMode(display=False) as counter:
            forward(True)
        texts = torch.cat([batch["text" if stage == "see" else "input_ids"].flatten() for batch in batches])
        lines.append({"stage": stage, "data (other process)": 1e3 * data, "ViT forward": 1e3 * vit * (stage != "read"),
                      "forward": 1e3 * ahead, "backward": 1e3 * (both - ahead), "optimizer": 1e3 * rest,
                      "samples a second": config.batch_size / (both + rest),
                      "of the matrix rate": counter.get_total_flops() / STEPS / both / rate,
                      "not padding": (texts != task.collate.tokenizer.pad).float().mean().item()})
    print(f"matrix rate: {rate / 1e12:.2f} TFLOP/s")
    return lines


# ---- Generation -----------------------------------------------------------------------------------

SMOLLM2 = dict(dim=576, n_layers=30, n_heads=9, n_kv_heads=3,
               decoder_options={"vocab_size": 49152, "ffn_dim": 1536, "tied": True})


@torch.no_grad()
def generation(n_new: int = 256) -> list[dict]:
    """Tokens a second in float32, from a prompt with one picture; without the cache each token reads the whole text
    again, here as long as half-way through the answer. Bare: the products of one token with all weight matrices of the
    decoder, and nothing else. The second decoder has the size of SmolLM2-135M."""
    lines = []
    for name, changes, batches in (("preset", {}, (1, 64)), ("135M", SMOLLM2, (1,))):
        _, task, model = setting(max_len=1024, **changes)
        model.drop_text_branch()
        model.eval()
        matrices = [module for module in model.decoder.modules() if isinstance(module, nn.Linear)]
        for B in batches:
            samples = [task.train("instruct")[i] for i in range(B)]
            prompts = [replace(sample, turns=[(sample.turns[0][0], None)]) for sample in samples]
            prompts, images = train.prompt_ids(prompts, task.collate), task.collate.images(samples).to(DEVICE)
            T = max(map(len, prompts)) + n_new // 2
            text = torch.randn(B, T, model.config.dim, device=DEVICE)
            inputs = [torch.randn(B, 1, module.in_features, device=DEVICE) for module in matrices]

            def cached() -> None:
                for _ in model.generate(prompts, images, n_new, stop_id=-1):
                    pass

            def prefill() -> None:
                next(model.generate(prompts, images, n_new, stop_id=-1))

            def bare() -> None:
                for module, rows in zip(matrices, inputs):
                    F.linear(rows, module.weight)

            whole, first, products, again = seconds(cached, prefill, bare, lambda: model.decoder(text))
            token = (whole - first) / (n_new - 1)
            lines.append({"decoder": name, "batch": B, "prefill ms": 1e3 * first, "ms a token": 1e3 * token,
                          "times the bare products": token / products, "tokens a second": B * n_new / whole,
                          "times without cache": again * n_new / whole})
    return lines


# ---- Memory ---------------------------------------------------------------------------------------

def memory() -> list[dict]:
    """MB that a step of each stage needs, by what it is for; activations: what autograd keeps for the way back."""
    lines = []
    for stage in train.STAGES:
        config, task, model = setting()
        if stage in ("align", "instruct"):
            model.drop_text_branch()
        model.train_only(train.who_learns(config, stage))
        dataset = task.train(stage)
        batch = train.to_device((task.collate.pairs if stage == "see" else task.collate.conversations)(
            [dataset[i] for i in range(config.batch_size)]), DEVICE)
        weights = {value.untyped_storage().data_ptr() for value in model.parameters()}
        kept = {}

        def keep(value: Tensor) -> Tensor:
            kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
            return value

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value), train.autocast(DEVICE, config):
            loss = train.stage_loss(model, stage, batch, config)
        activations = sum(size for place, size in kept.items() if place not in weights)
        loss.backward()
        optimizers = train.make_optimizers(model, config, stage)
        for optimizer in optimizers:
            optimizer.step()
        states = [value for optimizer in optimizers for state in optimizer.state.values() for value in state.values()
                  if isinstance(value, Tensor)]
        frozen = [value for name, value in model.named_parameters() if not value.requires_grad]
        lines.append({"stage": stage, "weights": size_of(model.parameters()),
                      "gradients": size_of(value.grad for value in model.parameters() if value.grad is not None),
                      "gradients of what is frozen": size_of(value.grad for value in frozen if value.grad is not None),
                      "optimizer": size_of(states), "activations": activations / 1e6,
                      "parts that learn": " ".join(part for part in PARTS if any(
                          part_of(name) == part and value.requires_grad for name, value in model.named_parameters()))})
    return lines


def size_of(values) -> float:
    return sum(value.numel() * value.element_size() for value in values) / 1e6


# ---- How cost grows -------------------------------------------------------------------------------

def growth() -> list[dict]:
    """Milliseconds a sample of `instruct` (forward and backward) when one size changes and the others stay."""
    lines = []
    side = CONFIG.image_size[0]
    for name, values in (("image_size", (side, 3 * side // 2, 2 * side, 3 * side)), ("n_queries", (4, 16, 32, 64, 128)),
                         ("text", (32, 64, 128, 256, 384)), ("dim", (96, 192, 384, 768))):
        for value in values:
            change = {"image_size": (value, value)} if name == "image_size" else {name: value} if name != "text" else {}
            config, task, model = setting(**change)
            model.drop_text_branch()
            model.train_only(train.who_learns(config, "instruct"))
            n_text = value if name == "text" else 64
            rows = config.n_rows
            ids = torch.randint(10, 200, (16, rows + n_text), device=DEVICE)
            ids[:, :rows] = model.config.image_id
            images, labels = torch.randn(16, 3, *config.image_size, device=DEVICE), torch.full_like(ids, -100)
            labels[:, -n_text // 8:] = 10                     # an answer's share

            def both() -> None:
                with train.autocast(DEVICE, config):
                    model(ids, images, labels)[1].backward()

            both()
            lines.append({"size": name, "value": value, "ms a sample": 1e3 * seconds(both)[0] / 16})
    return lines


def draw_growth(lines: list[dict], path: Path, width: int = 260, height: int = 200) -> None:
    """One panel for each size: milliseconds a sample against it, from zero."""
    font, panels = ImageFont.load_default(13), {}
    for line in lines:
        panels.setdefault(line["size"], []).append((line["value"], line["ms a sample"]))
    chart = Image.new("RGB", (width * len(panels), height), "white")
    canvas = ImageDraw.Draw(chart)
    for i, (name, points) in enumerate(panels.items()):
        left, right, top, bottom = i * width + 44, (i + 1) * width - 16, 30, height - 26
        most, highest = points[-1][0], max(value for _, value in points)
        canvas.text((left, 8), f"{name}: ms a sample", "black", font)
        canvas.line((left, top, left, bottom, right, bottom), "gray")
        places = [(left + (right - left) * size / most, bottom - (bottom - top) * value / highest) for size, value in points]
        canvas.line(places, (45, 85, 215), 2)
        for (x, y), (size, _) in zip(places, points):
            canvas.circle((x, y), 3, (45, 85, 215))
            if size * 8 > most or size == points[0][0]:       # no room for others
                canvas.text((x, bottom + 5), str(size), "black", font, anchor="mt")
        canvas.text((left - 5, top), f"{highest:.3g}", "black", font, anchor="rt")
        canvas.text((left - 5, bottom), "0", "black", font, anchor="rb")
    chart.save(path)


TABLES = {function.__name__: function for function in (plora, frozen, step, generation, memory, growth)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    lines = TABLES[arguments.table]()
    (arguments.out / f"{arguments.table}.json").write_text(json.dumps(lines, indent=2))
    if arguments.table == "growth":
        draw_growth(lines, arguments.out / "growth.png")
    print_table(lines)


if __name__ == "__main__":
    main()
