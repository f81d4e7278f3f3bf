"""How fast: medians of repeats that take turns, sizes of the device's preset.

    python tests/bench.py plora          adapters against a plain linear and gathered image rows
    python tests/bench.py step           where the time of a training step goes
    python tests/bench.py generation     tokens a second with the cache and without
    python tests/bench.py data           samples a second of the data, for each preset

Each prints a Markdown table and writes out/bench/NAME.json.
"""
import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from data import Tokenizer, corpus  # noqa: E402
from model import MLLM  # noqa: E402
from plora import PLoRALinear  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CONFIG = train.PRESETS["gpu" if DEVICE.type == "cuda" else "cpu"]
REPEATS = 9


def seconds(*functions: Callable) -> list[float]:
    """The median time of each function, all in turn `REPEATS` times after one turn to warm up."""
    times = [[] for _ in functions]
    for _ in range(REPEATS + 1):
        for function, own in zip(functions, times):
            start = time.perf_counter()
            function()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            own.append(time.perf_counter() - start)
    return [median(own[1:]) for own in times]


def show(value) -> str:
    """A cell of a table; "0" is exactly zero."""
    if isinstance(value, float) and value:
        return f"{value:.{0 if value >= 100 else 3 if value >= 0.01 else 4}f}"
    return f"{value:,}" if isinstance(value, int) else str(value or 0)


def write(rows: list[dict], path: Path) -> None:
    """Print the rows as Markdown, and write them as JSON."""
    print(f"\n| {' | '.join(rows[0])} |\n|{' --- |' * len(rows[0])}")
    for row in rows:
        print(f"| {' | '.join(map(show, row.values()))} |")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=2))


class Setting:
    """A stage of the preset with changes: its data, its fresh model, its optimizers."""

    def __init__(self, stage: str, config: train.Config | None = None, **sizes: dict):
        config = config or CONFIG
        sizes = {part: getattr(config, part) | changes for part, changes in sizes.items()}
        self.config = replace(config, workers=0, **sizes)
        self.task = train.Task(self.config)
        tokenizer = Tokenizer.train(corpus(self.task.train("language"), 2000), config.vocab_size)
        torch.manual_seed(0)
        self.model = MLLM(train.model_config(self.config, stage, tokenizer)).to(DEVICE)
        self.model.train_only(train.shares_of(self.config, stage))
        self.collate = train.collate_for(self.model, tokenizer, self.config)
        self.loss_of = train.StageLoss(self.model, stage, self.config)
        self.optimizers = train.make_optimizers(self.model, self.config, stage)
        self.loader = iter(self.task.batches(stage, self.collate))

    def batch(self) -> dict[str, Tensor]:
        return next(self.loader)

    def loss(self, batch: dict[str, Tensor], step: int = 0) -> Tensor:
        with train.autocast(DEVICE, self.config):
            return self.loss_of(batch, step)

    def optimize(self) -> None:
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        for optimizer in self.optimizers:
            optimizer.step()


class Gathered(PLoRALinear):
    """The same layer as published: the delta of the image rows alone, picked out and put back."""

    def forward(self, x: Tensor, is_image: Tensor) -> Tensor:
        y = F.linear(x, self.weight)
        delta = F.linear(F.linear(x[is_image], self.lora_A), self.lora_B) * (self.alpha / self.r)
        y[is_image] = y[is_image] + delta
        return y


def plora() -> list[dict]:
    """Forward and backward of one layer with a frozen base, for three shares of image rows."""
    rows = []
    for dim, r, tokens in ((192, 32, (64, 120)), (4096, 256, (4, 256))):
        for share in (0.0, 0.25, 1.0):
            x = torch.randn(*tokens, dim, device=DEVICE, requires_grad=True)
            is_image = (torch.arange(tokens[1], device=DEVICE) < share * tokens[1]).expand(tokens)
            layer, gathering = (kind(dim, dim, r, r).to(DEVICE) for kind in (PLoRALinear, Gathered))
            layer.weight.requires_grad = gathering.weight.requires_grad = False

            def step(layer: nn.Module, is_image: Tensor | None) -> None:
                with torch.autocast(DEVICE.type, torch.bfloat16):
                    y = layer(x, is_image)
                y.backward(y.detach())

            plain, ours, gathered = seconds(
                lambda: step(layer, None), lambda: step(layer, is_image),
                lambda: step(gathering, is_image))
            rows.append({"width": dim, "rank": r, "image rows": share, "plain ms": 1e3 * plain,
                         "PLoRA / plain": ours / plain, "gathered / plain": gathered / plain})
    return rows


def step() -> list[dict]:
    """Milliseconds of a step of each stage by what they are spent on, and the share that its
    products reach of the rate of one large product in bfloat16."""
    square = torch.randn(2048, 2048, device=DEVICE, dtype=torch.bfloat16)
    rate, rows = 2 * 2048 ** 3 / seconds(lambda: square @ square)[0], []
    for stage in train.STAGES:
        its = Setting(stage)
        n = its.config.contrast_every  # steps that stand for all
        batches = [its.batch() for _ in range(n)]

        def forward(then: Callable) -> None:
            for i, batch in enumerate(batches):
                then(its.loss(batch, i))

        data, ahead, both, rest = seconds(its.batch, lambda: forward(Tensor.detach),
                                          lambda: forward(Tensor.backward), its.optimize)
        with FlopCounterMode(display=False) as counter:
            forward(Tensor.backward)
        rows.append({"stage": stage, "data (other process)": 1e3 * data, "forward": 1e3 * ahead / n,
                     "backward": 1e3 * (both - ahead) / n, "optimizer": 1e3 * rest,
                     "samples a second": its.config.batch_size / (both / n + rest),
                     "of the matrix rate": counter.get_total_flops() / both / rate})
    print(f"matrix rate: {rate / 1e12:.2f} TFLOP/s")
    return rows


@torch.no_grad()
def generation(n_new: int = 256) -> list[dict]:
    """Tokens a second in float32, after a picture and 16 tokens. Without the cache each reads the
    text again, here half of the answer. Bare products: one token times all weight matrices."""
    rows = []
    smollm2 = dict(vocab_size=49152, dim=576, n_layers=30, n_heads=9, n_kv_heads=3, ffn_dim=1536)
    for name, sizes, B in (("preset", {}, 1), ("preset", {}, 64), ("SmolLM2-135M", smollm2, 1)):
        its = Setting("instruct", decoder=sizes)
        batch, T, decoder = its.batch(), its.collate.n_rows + 16, its.model.eval().decoder
        matrices = [part.weight for part in decoder.modules() if isinstance(part, nn.Linear)]
        prompts, images = list(batch["input_ids"][:B, :T]), batch["images"][:B]
        text = decoder.token_embedding.weight[:1].expand(B, T + n_new // 2, -1)

        def answer(length: int) -> list[Tensor]:
            return list(its.model.generate(prompts, images, length, stop_id=-1))

        whole, first, again, products = seconds(
            lambda: answer(n_new), lambda: answer(1), lambda: decoder(text),
            lambda: [F.linear(matrix[:B], matrix) for matrix in matrices])
        token = (whole - first) / (n_new - 1)
        rows.append({"decoder": name, "batch": B, "prefill ms": 1e3 * first,
                     "ms a token": 1e3 * token, "times the bare products": token / products,
                     "tokens a second": B * n_new / whole,
                     "times without cache": again * n_new / whole})
    return rows


def data() -> list[dict]:
    """Samples a second that one core draws, writes and collates, and the MB of a batch."""
    rows = []
    for preset, config in train.PRESETS.items():
        for stage in train.STAGES:
            its = Setting(stage, config)
            spent, batch = seconds(its.batch)[0], its.batch()
            rows.append({"preset": preset, "stage": stage,
                         "samples a second": config.batch_size / spent,
                         "MB a batch": sum(tensor.nbytes for tensor in batch.values()) / 1e6})
    return rows


TABLES = {function.__name__: function for function in (plora, step, generation, data)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure time, print a table.")
    parser.add_argument("table", choices=TABLES)
    table = parser.parse_args().table
    write(TABLES[table](), Path(f"out/bench/{table}.json"))


if __name__ == "__main__":
    main()
