"""How fast: medians of repeats that take turns, sizes of the device's preset.

    python tests/bench.py plora          adapters against a plain linear and gathered image tokens
    python tests/bench.py step           where the time of a training step goes
    python tests/bench.py generation     tokens a second with the cache and without
    python tests/bench.py data           samples a second of the data, for each preset

Each prints a Markdown table and writes out/bench/NAME.json.
"""
import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from data import Tokenizer, texts_of  # noqa: E402
from model import MLLM  # noqa: E402
from plora import PLoRALinear  # noqa: E402
from sample import collate_for  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CONFIG = train.PRESETS["gpu" if DEVICE.type == "cuda" else "cpu"]
REPEATS = 9


def seconds(*functions):
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


def show(value):
    """A cell of a table; "0" is exactly zero."""
    if isinstance(value, float) and value:
        return f"{value:.{0 if value >= 100 else 3 if value >= 0.01 else 4}f}"
    return f"{value:,}" if isinstance(value, int) else str(value or 0)


def write(table, path):
    """Print a list of dicts as a table in Markdown, and write it as JSON."""
    print(f"\n| {' | '.join(table[0])} |\n|{' --- |' * len(table[0])}")
    for line in table:
        print(f"| {' | '.join(map(show, line.values()))} |")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=2), encoding="utf-8")


def prepare(stage, config):
    """A stage as train.py runs it: (its fresh model, a function that gives its next batch)."""
    config = replace(config, workers=0)
    data, _ = train.scene_sets(config)
    tokenizer = Tokenizer.train(texts_of(data["language"], 2000), config.vocab_size)
    torch.manual_seed(0)
    model = MLLM(train.model_config(config, stage, tokenizer)).to(DEVICE)
    model.train_only(train.lr_scales(config, stage))
    collate = collate_for(model, tokenizer)
    batches = iter(train.make_batches(config, stage, data[stage], collate))
    return model, lambda: next(batches)


def gathered(layer, x, is_image):
    """`PLoRALinear` as published: the delta of image tokens alone, picked out and put back."""
    y = F.linear(x, layer.weight)
    delta = F.linear(F.linear(x[is_image], layer.lora_A), layer.lora_B) * (layer.alpha / layer.r)
    y[is_image] = y[is_image] + delta
    return y


def plora():
    """Forward and backward of one layer with a frozen base, for three shares of image tokens."""
    table = []
    for dim, r, tokens in ((192, 32, (64, 120)), (4096, 256, (4, 256))):
        for share in (0.0, 0.25, 1.0):
            x = torch.randn(*tokens, dim, device=DEVICE, requires_grad=True)
            is_image = (torch.arange(tokens[1], device=DEVICE) < share * tokens[1]).expand(tokens)
            layer = PLoRALinear(dim, dim, r, r, bias=False).to(DEVICE)
            layer.weight.requires_grad_(False)

            def step(forward, *arguments):
                with torch.autocast(DEVICE.type, torch.bfloat16):
                    y = forward(*arguments)
                y.backward(y.detach())

            plain, ours, published = seconds(
                lambda: step(layer, x), lambda: step(layer, x, is_image),
                lambda: step(gathered, layer, x, is_image))
            table.append({"width": dim, "rank": r, "image tokens": share, "plain ms": 1e3 * plain,
                          "PLoRA / plain": ours / plain, "gathered / plain": published / plain})
    return table


def step():
    """Milliseconds of a step of each stage by what they are spent on, and the share that its
    products reach of the rate of one large product in bfloat16."""
    square = torch.randn(2048, 2048, device=DEVICE, dtype=torch.bfloat16)
    rate = 2 * 2048 ** 3 / seconds(lambda: square @ square)[0]
    print(f"matrix rate: {rate / 1e12:.2f} TFLOP/s")
    table = []
    for stage in train.STAGES:
        model, next_batch = prepare(stage, CONFIG)
        optimizers = train.make_optimizers(model, CONFIG, stage)
        n = CONFIG.contrast_every  # steps that stand for all
        batches = [next_batch() for _ in range(n)]

        def forward(then):
            for i, batch in enumerate(batches):
                with torch.autocast(DEVICE.type, torch.bfloat16, enabled=CONFIG.bf16):
                    loss = train.stage_loss(model, stage, batch, i, CONFIG)
                then(loss)

        def optimize():
            nn.utils.clip_grad_norm_(model.parameters(), train.MAX_GRADIENT_NORM)
            for optimizer in optimizers:
                optimizer.step()

        data, ahead, both, rest = seconds(next_batch, lambda: forward(torch.Tensor.detach),
                                          lambda: forward(torch.Tensor.backward), optimize)
        with FlopCounterMode(display=False) as counter:
            forward(torch.Tensor.backward)
        waiting = 0 if CONFIG.workers else data  # workers prepare it meanwhile
        table.append({"stage": stage, "data": 1e3 * data, "forward": 1e3 * ahead / n,
                      "backward": 1e3 * (both - ahead) / n, "optimizer": 1e3 * rest,
                      "samples a second": CONFIG.batch_size / (waiting + both / n + rest),
                      "of the matrix rate": counter.get_total_flops() / both / rate})
    return table


@torch.no_grad()
def generation(n_new=256):
    """Tokens a second in float32, after a picture and 16 tokens. Without the cache each reads the
    text again, here half of the answer. Bare products: one token times all weight matrices."""
    table = []
    smollm2 = dict(vocab_size=49152, dim=576, n_layers=30, n_heads=9, n_kv_heads=3, ffn_dim=1536)
    for name, sizes, B in (("preset", {}, 1), ("preset", {}, 64), ("SmolLM2-135M", smollm2, 1)):
        config = replace(CONFIG, decoder=CONFIG.decoder | sizes)
        model, next_batch = prepare("instruct", config)
        batch, T = next_batch(), model.eval().n_image_tokens + 16
        prompts, images = list(batch["input_ids"][:B, :T]), batch["images"][:B]
        text = model.decoder.token_embedding.weight[:1].expand(B, T + n_new // 2, -1)
        matrices = [part.weight for part in model.decoder.modules() if isinstance(part, nn.Linear)]
        whole, first, again, products = seconds(
            lambda: list(model.generate(prompts, images, n_new, stop_id=-1)),
            lambda: list(model.generate(prompts, images, 1, stop_id=-1)),
            lambda: model.decoder.lm_head(model.decoder(text)),
            lambda: [F.linear(matrix[:B], matrix) for matrix in matrices])
        token = (whole - first) / (n_new - 1)
        table.append({"decoder": name, "batch": B, "prefill ms": 1e3 * first,
                      "ms a token": 1e3 * token, "times the bare products": token / products,
                      "tokens a second": B * n_new / whole,
                      "times without cache": again * n_new / whole})
    return table


def data():
    """Samples a second that one core draws, writes and collates, and the MB of a batch."""
    table = []
    for preset, config in train.PRESETS.items():
        for stage in train.STAGES:
            _, next_batch = prepare(stage, config)
            spent, batch = seconds(next_batch)[0], next_batch()
            table.append({"preset": preset, "stage": stage,
                          "samples a second": config.batch_size / spent,
                          "MB a batch": sum(tensor.nbytes for tensor in batch.values()) / 1e6})
    return table


TABLES = {function.__name__: function for function in (plora, step, generation, data)}


def main():
    parser = argparse.ArgumentParser(description="Measure time, print a table.")
    parser.add_argument("table", choices=TABLES)
    table = parser.parse_args().table
    write(TABLES[table](), Path(f"out/bench/{table}.json"))


if __name__ == "__main__":
    main()
