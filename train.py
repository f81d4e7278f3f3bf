"""Train the model: `python train.py`, eight minutes on two CPU cores, no downloads.

    stage      trained on                 what it stands for
    language   text                       a pretrained language model
    vision     pictures with their text   a pretrained BLIP-2 (losses ITC + ITM + ITG)
    align      short, noisy captions      stage 1 of the papers
    instruct   questions, descriptions    stage 2 of the papers

The papers start from downloaded parts. `language` and `vision` (stage 0) make small stand-ins for
those parts. A stage is left out where the parts are given (`--vit-folder`, `--qformer-folder`,
`--llm-folder`). Each stage starts from the weights of the one before, and writes its own to
out/<stage>.pt. In the end `evaluate` in sample.py asks about held-out pictures.

    python train.py --recipe minigpt4         another published choice of what is trainable when
    python train.py --stage instruct          one stage, from out/align.pt
    python train.py --resume                  go on where an interrupted run stopped
    python train.py --data my.json            your own pictures and conversations
    torchrun --nproc_per_node=4 train.py      four processes share each batch

B batch, T text tokens, P patches and the class token, Q queries, Dv vision width.
"""
import argparse
import inspect
import json
import math
import os
import random
import re
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean

import torch
from torch import distributed, nn
from torch.utils.data import DataLoader, RandomSampler
from tqdm import tqdm

from data import (CLIP_PIXELS, PublishedTokenizer, Scenes, SceneSpec, Tokenizer, check,
                  contact_sheet, draw_curves, encode_turns, for_stage, hold_out, keep_usable,
                  published_gpt, published_qformer, published_vit, questions_of, read_image,
                  read_own_data, texts_of, tokenizer_from)
from model import (ACTIVATIONS, CONNECTORS, MLLM, PARTS, PATCHES_PER_TOKEN, ModelConfig,
                   cast_frozen, load_file, load_model, part_of, resize_positions, save_file)
from sample import at_least, collate_for, evaluate, find_device

# ---- Recipes and settings --------------------------------------------------------------------
STAGES = ("language", "vision", "align", "instruct")

# What is trainable in each stage, and at which share of the stage's learning rate. Other parts are
# frozen. Stage 0 is the same for all recipes: the ViT learns through a Q-Former in any case.
PRETRAINING = {"language": {"decoder": 1.0}, "vision": {"vit": 1.0, "connector": 1.0}}
# What stands between ViT and decoder, and the adapters inside the decoder.
NEW_PARTS = {"connector": 1.0, "projector": 1.0, "adapters": 1.0}
RECIPES = {
    # As in BLIP-2 (arXiv 2301.12597, section 3.2), with Partial LoRA.
    "blip2_plora": {"connector": "qformer", "lora_on": "image",
                    "align": NEW_PARTS, "instruct": NEW_PARTS},
    # The projector alone, one linear layer: arXiv 2304.10592, section 3.
    "minigpt4": {"connector": "qformer", "lora_on": "image",
                 "align": {"projector": 1.0}, "instruct": {"projector": 1.0}},
    # Low-rank adapters (arXiv 2106.09685) in the second stage, on every token.
    "lora": {"connector": "qformer", "lora_on": "all",
             "align": {"projector": 1.0}, "instruct": {"adapters": 1.0}},
    # The same, on image tokens.
    "plora": {"connector": "qformer", "lora_on": "image",
              "align": {"projector": 1.0}, "instruct": {"adapters": 1.0}},
    # arXiv 2401.16420, section 3. With full steps ViT and decoder would forget what they know.
    "xcomposer2": {"connector": "patches", "lora_on": "image",
                   "align": {"vit": 0.1, "projector": 1.0, "adapters": 1.0},
                   "instruct": {"vit": 0.1, "projector": 1.0, "adapters": 1.0, "decoder": 0.1}},
    # The projector alone, from each patch, between a frozen ViT and a frozen language model.
    "frozen": {"connector": "patches", "lora_on": "image",
               "align": {"projector": 1.0}, "instruct": {"projector": 1.0}},
}


@dataclass(frozen=True)
class Config:
    """A whole run. Each field is a flag, `--align-lr 1e-3`, and so is each size: `--vit.dim 256`.
    The comments are what `--help` says."""
    vit: dict                            # argument of ViT
    qformer: dict                        # argument of QFormer
    projector: dict                      # argument of make_projector
    decoder: dict                        # argument of GPT
    scenes: dict                         # argument of SceneSpec
    recipe: str = "blip2_plora"          # what is trainable when
    connector: str = ""                  # between ViT and projector; empty: the recipe's
    vit_folder: str = ""                 # published CLIP or BLIP-2 to take the ViT from
    vit_drop_last: int = 0               # blocks of that ViT to leave out
    qformer_folder: str = ""             # published BLIP-2 to take the Q-Former from
    llm_folder: str = ""                 # published language model, LLaMA family or Qwen2
    vocab_size: int = 1024               # at most; a tokenizer stops earlier when no pair repeats
    max_len: int = 512                   # longest prompt and answer together, in tokens
    data: str = ""                       # own data to train on; empty: built-in scenes
    val: str = ""                        # own data to be measured on; empty: a twentieth of it
    images: str = ""                     # folder of their pictures; empty: beside the file
    augment: bool = False                # move and flip own pictures in training
    language_turns: int = 2              # questions about each description
    instruct_turns: int = 3              # questions about each picture
    language_samples: int = 48_000       # length of the stage
    vision_samples: int = 32_000         # length of the stage
    align_samples: int = 6_400           # length of the stage
    instruct_samples: int = 28_800       # length of the stage
    eval_samples: int = 1000             # held-out questions
    batch_size: int = 64                 # samples for each step of the optimizer
    language_lr: float = 3.5e-3          # peak learning rate of the stage
    vision_lr: float = 6e-3              # peak learning rate of the stage
    align_lr: float = 6e-3               # peak learning rate of the stage
    instruct_lr: float = 4e-3            # peak learning rate of the stage
    ffn_lr_scale: float = 0.1            # of feed-forward nets in Q-Former and decoder
    own_lr_scale: float = 0.25           # of ViT and Q-Former on own pictures
    muon: bool = True                    # for hidden matrices; without it AdamW trains them, too
    itc_weight: float = 0.1              # of this loss beside ITG; 0 leaves it out
    itm_weight: float = 0.1              # of this loss beside ITG; 0 leaves it out
    contrast_every: int = 4              # ITC and ITM run in one step of so many
    bf16: bool = True                    # matrix products in bfloat16 (autocast)
    half_frozen: bool = False            # keep frozen weights in bfloat16 after stage 0
    workers: int = 0                     # processes that prepare data
    save_every: int = 200                # steps between two states to resume from
    seed: int = 0                        # of weights, data and order


CPU = Config(
    vit=dict(image_size=(48, 48), patch_size=8, dim=128, n_layers=4, n_heads=4, drop_path_rate=0.0,
             use_grad_checkpoint=False),
    qformer=dict(dim=128, n_layers=3, n_heads=4, n_queries=16, cross_attention_every=2,
                 dropout=0.0),
    projector=dict(kind="linear", hidden_dim=0, activation="gelu", normalization=False),
    # RoPE with base 100: its slowest pair turns by 1.33 rad in a text of 100 tokens. With the usual
    # base of 10,000 it would turn by 0.018, too little to tell positions apart.
    decoder=dict(dim=192, n_layers=3, n_heads=6, n_kv_heads=6, rope_theta=100.0, qkv_bias=True,
                 r=32, alpha=128.0, lora_dropout=0.0),
    scenes=dict(n_colors=5, n_shapes=4, n_places=5, max_things=3))
GPU = replace(
    CPU,
    vit=CPU.vit | dict(image_size=(96, 96), patch_size=12, dim=192, n_heads=6),
    qformer=CPU.qformer | dict(dim=192, n_heads=6, n_queries=32),
    decoder=CPU.decoder | dict(dim=256, n_layers=4, n_heads=8, n_kv_heads=4, r=64, alpha=256.0),
    scenes=dict(n_colors=6, n_shapes=4, n_places=9, max_things=5),
    language_turns=6, instruct_turns=6, workers=4, save_every=1000,
    language_samples=110_000, vision_samples=300_000, align_samples=16_000, instruct_samples=80_000,
    # Half of the rates above (but for `language`): parts of this width learned little at those,
    # until the schedule lowered them.
    vision_lr=3e-3, align_lr=3e-3, instruct_lr=2e-3)
TINY = replace(  # all stages in forty seconds, for a first look and after a change
    CPU,
    vit=CPU.vit | dict(image_size=(32, 32), n_layers=2),
    qformer=CPU.qformer | dict(n_queries=8),
    decoder=CPU.decoder | dict(dim=128, n_heads=4, n_kv_heads=4),
    scenes=dict(n_colors=3, n_shapes=2, n_places=3, max_things=2),
    language_samples=8_000, vision_samples=5_000, align_samples=1_200, instruct_samples=5_000,
    eval_samples=200)
PRESETS = {"cpu": CPU, "gpu": GPU, "tiny": TINY}


def connector_of(config):
    return config.connector or RECIPES[config.recipe]["connector"]


def needed_stages(config):
    """The stages of a run. Published parts need no stand-ins."""
    stages = list(STAGES)
    if config.llm_folder:
        stages.remove("language")
    # With a published ViT, `vision` is there for our own Q-Former alone.
    if config.vit_folder and (config.qformer_folder or connector_of(config) != "qformer"):
        stages.remove("vision")
    return stages


def lr_scales(config, stage):
    """The trainable parts of a stage, each with its share of the stage's learning rate."""
    scales = dict(PRETRAINING.get(stage) or RECIPES[config.recipe][stage])
    if stage == "vision" and config.vit_folder:  # a published ViT stays as it is
        del scales["vit"]
    if config.data:
        for part in ("vit", "connector"):
            if part in scales:  # photographs want smaller steps than scenes
                scales[part] *= config.own_lr_scale
    return scales


def n_steps(config, stage):
    return max(1, getattr(config, f"{stage}_samples") // config.batch_size)


# ---- Losses ----------------------------------------------------------------------------------
def vision_loss(model, batch, step, config):
    """BLIP-2's three losses, weighed, of a batch of `Collate.pairs` in data.py.
    `QFormer` in qformer.py says what each of them is. Source: arXiv 2301.12597, section 3.1."""
    qformer = model.connector
    image_features = model.image_features(batch["images"])  # (B, P, Dv)
    text, to_generate, labels = (batch[name].to(model.device, non_blocking=True)
                                 for name in ("text", "to_generate", "labels"))  # (B, T)
    loss, queries = qformer.itg_loss(image_features, to_generate, labels)
    # Differs: ITC and ITM weigh less than ITG, which teaches more on scenes this simple.
    # ITC and ITM run in one step of `contrast_every` and on a quarter of the batch, since ITM takes
    # three times as many pairs.
    if step % config.contrast_every == 0 and (config.itc_weight or config.itm_weight):
        n = max(2, len(text) // 4)
        similarity = qformer.similarity(queries[:n], text[:n])  # (n, n)
        if config.itc_weight:
            loss = loss + config.itc_weight * qformer.itc_loss(similarity)
        if config.itm_weight:
            itm_loss = qformer.itm_loss(image_features[:n], text[:n], similarity)
            loss = loss + config.itm_weight * itm_loss
    return loss


def augment(images):
    """Each image moved at random by up to an eighth of its sides, and half of them flipped."""
    N = len(images)
    change = torch.zeros(N, 2, 3)  # an affine map for each image
    change[:, 0, 0] = torch.randint(0, 2, (N,)) * 2.0 - 1  # -1 flips left and right
    change[:, 1, 1] = 1.0
    # Coordinates run from -1 to 1, so 0.25 is an eighth of a side.
    change[:, :, 2] = torch.rand(N, 2) / 2 - 0.25
    change = change.to(images.device, non_blocking=True)
    grid = nn.functional.affine_grid(change, images.shape, align_corners=False)
    return nn.functional.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def stage_loss(model, stage, batch, step, config):
    """The loss of a stage: of the answers, in nats per token; in `vision` BLIP-2's three."""
    # Own pictures only: in a flipped scene the answer "left" would be wrong.
    if config.augment and config.data and len(batch["images"]):
        batch = batch | {"images": augment(model.normalize(batch["images"]))}
    if stage == "vision":
        return vision_loss(model, batch, step, config)
    # `language` has no pictures: the decoder runs alone.
    images = None if stage == "language" else batch["images"]
    _, loss = model(batch["input_ids"], images, batch["labels"])
    return loss


# ---- Optimizers ------------------------------------------------------------------------------
ADAMW_SCALE = 0.5  # share of the rate for what AdamW trains in ViT and Q-Former
MAX_GRADIENT_NORM = 1.0


def make_optimizers(model, config, stage):
    """Muon for the trainable hidden matrices, AdamW for all else that is trainable."""
    muon_groups, adamw_groups = {}, {}  # learning rate -> its parameters
    scales = lr_scales(config, stage)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = part_of(name)
        rate = getattr(config, f"{stage}_lr") * scales[part]
        # At the full rate feed-forward nets memorize which pairs never occur (no red circle), and
        # then do not see one. Measured: tests/RESULTS.md.
        if part != "adapters" and re.search(r"_ffn\.|\.w[123]\.", name):
            rate *= config.ffn_lr_scale
        # Muon (below) learns far more here from as many samples. Not for embeddings and heads: most
        # of their rows are words that the batch does not have.
        groups = adamw_groups
        if config.muon and parameter.ndim == 2 and not re.search("embedding|head", name):
            groups = muon_groups
        elif part in ("vit", "connector"):
            rate *= ADAMW_SCALE
        group = groups.setdefault(rate, {"params": [], "lr": rate, "peak": rate})
        group["params"].append(parameter)
    optimizers = []
    if muon_groups:
        optimizers.append(Muon(muon_groups.values(), defaults={}))
    if adamw_groups:
        optimizers.append(torch.optim.AdamW(adamw_groups.values(), betas=(0.9, 0.95),
                                            weight_decay=0.0, fused=True))
    return optimizers


def schedule(step, steps, warmup=0.05):
    """Share of the peak learning rate at a step: linear warm-up, then half a cosine down to 2 %."""
    warmup_steps = max(1, int(warmup * steps))
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / (steps - warmup_steps)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))


# ---- The loop --------------------------------------------------------------------------------
def train_stage(model, stage, dataset, collate, config, out, state=None):
    """Run one stage, or the rest of it from a saved state. Returns (losses of the steps, seconds).
    Raises ValueError when a gradient is not finite."""
    state = state or {"seconds": 0.0, "losses": [], "optimizers": []}
    start = time.time() - state["seconds"]
    losses = state["losses"]
    steps = n_steps(config, stage)
    rank, world = rank_and_world()  # this process, and how many share each batch
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizers = make_optimizers(model, config, stage)
    for optimizer, saved in zip(optimizers, state["optimizers"]):
        optimizer.load_state_dict(saved)
    batches = iter(make_batches(config, stage, dataset, collate, first_step=len(losses)))
    bar = tqdm(range(len(losses), steps), stage, steps, initial=len(losses), disable=rank > 0)
    for step in bar:
        if step % config.save_every == 0 and rank == 0:
            save_file({"run": asdict(config), "stage": stage, "losses": losses,
                       "seconds": time.time() - start, "tokenizer": collate.tokenizer.state,
                       "model": model.state_dict(),
                       "optimizers": [optimizer.state_dict() for optimizer in optimizers]},
                      out / "resume.pt")
        # A seed for each step: a resumed run draws what an uninterrupted one draws.
        torch.manual_seed(hash((config.seed, STAGES.index(stage), step, rank)))
        scale = schedule(step, steps)
        rate = getattr(config, f"{stage}_lr") * scale
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * scale
        batch = next(batches)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=config.bf16):
            loss = stage_loss(model, stage, batch, step, config)
        loss.backward()
        if world > 1:
            average_gradients(trainable)
        norm = nn.utils.clip_grad_norm_(trainable, MAX_GRADIENT_NORM)
        check(norm.isfinite(), f"{stage}, step {step}: a gradient is not finite at the rate "
              f"{rate:.1e}; begin this stage again with --stage {stage} and a lower --{stage}-lr "
              f"(--resume goes on from step {step // config.save_every * config.save_every})")
        losses.append(loss.item())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        bar.set_postfix_str(f"loss {losses[-1]:.4f}, lr {rate:.1e}", refresh=False)
    return losses, time.time() - start


# ---- The chain of stages ---------------------------------------------------------------------
def run_stage(model, trained, stage, dataset, tokenizer, config, out, state):
    """Train one stage and write its weights. trained: the parts that were trained before."""
    scales = lr_scales(config, stage)
    model.train_only(scales)
    if config.half_frozen and stage not in PRETRAINING:
        cast_frozen(model)
    if state:
        model.load_state_dict(state["model"])
    print(f"\n{stage}: {getattr(config, f'{stage}_samples')} samples, recipe {config.recipe}, "
          f"connector {model.config.connector}, adapters on {model.config.lora_on} tokens")
    for part in PARTS:
        n = sum(p.numel() for name, p in model.named_parameters() if part_of(name) == part)
        rate = scales.get(part, 0) * getattr(config, f"{stage}_lr")
        print(f"  {part:10} {n:>12,} parameters  {f'rate {rate:.1e}' if rate else 'frozen':12}  "
              f"{'trained before' if part in trained else 'fresh'}")
    losses, seconds = train_stage(model, stage, dataset, collate_for(model, tokenizer), config,
                                  out, state)
    if rank_and_world()[0] == 0:
        save_file({"config": asdict(model.config), "model": model.state_dict(),
                   "run": asdict(config), "tokenizer": tokenizer.state, "losses": losses,
                   "seconds": seconds, "trained": sorted(trained | scales.keys())},
                  out / f"{stage}.pt")
    if distributed.is_initialized():
        distributed.barrier()  # the next stage starts from this file


def report(stages, tests, config, out, device):
    """Evaluate the model and write metrics.json, answers.json and pictures. stages: those of a
    training run, whose curves are drawn; none when a finished model is asked about other data."""
    start = time.time()
    model, checkpoint = load_model(out / "instruct.pt")
    collate = collate_for(model.to(device), tokenizer_from(checkpoint["tokenizer"]))
    with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
        metrics, answers, (pictures, texts) = evaluate(model, tests, collate, config.batch_size)
    seconds, losses, ends = {"evaluate": time.time() - start}, {}, {}
    for stage in stages:
        if (out / f"{stage}.pt").exists():
            checkpoint = load_file(out / f"{stage}.pt")
            seconds[stage] = checkpoint["seconds"]
            losses[stage] = checkpoint["losses"]
            ends[stage] = mean(losses[stage][-40:])
    metrics |= {"seconds": sum(seconds.values()), "seconds_by_stage": seconds, "loss_at_end": ends,
                "config": asdict(config)}
    # Numbers first: a picture that cannot be drawn does not cost them.
    names = RESULTS if stages else EVALUATION
    for name, content in zip(names, (metrics, answers)):
        (out / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
    if pictures:
        contact_sheet(pictures, texts).save(out / names[2])
    if losses:
        draw_curves(losses, out / "curves.png")
    print(f"\n{metrics['seconds']:.0f} s; {out}/ has {', '.join(names)}")
    if stages:
        hint = f"python sample.py --out {out}"
        for path in tests["qa_accuracy"][0].images if config.data else []:
            hint += f" --image '{path}'"
        print(f"Try: {hint}")


def main():
    arguments = parse_arguments()
    out = arguments.out
    device = join_processes(arguments.device)
    state = None
    if arguments.resume:
        check((out / "resume.pt").exists(),
              f"nothing to resume in {out}: its run is finished, or none was begun")
        state = load_file(out / "resume.pt")
    config, earlier = settings(arguments, state)
    stages = needed = needed_stages(config)
    if state:
        stages = needed[needed.index(state["stage"]):]
    elif arguments.stage:
        stages = [arguments.stage]
        check({*stages} <= {*needed, "evaluate"}, f"{stages} is not needed: weights are given")
    is_training = stages != ["evaluate"]
    own_train, own_test = own_samples(config, is_training)
    data, tests = scene_sets(config)
    if earlier:  # the tokenizer belongs to the weights
        tokenizer = tokenizer_from(earlier["tokenizer"])
    elif config.llm_folder:
        tokenizer = PublishedTokenizer.load(Path(config.llm_folder) / "tokenizer.json")
        check(tokenizer.pad_id <= config.decoder["vocab_size"], "tokenizer of another model")
    else:
        tokenizer = Tokenizer.train(texts_of(own_train or data["language"]), config.vocab_size)
    # Models without memory: better an error now than after hours.
    with torch.device("meta"):
        models = [MLLM(model_config(config, stage, tokenizer)) for stage in (*needed, "instruct")]
    check(models[-1].n_image_tokens + 64 < config.max_len, "--max-len leaves no room for text")
    if config.data:
        collate = collate_for(models[-1], tokenizer)
        data, tests = own_sets(config, stages, own_train, own_test, collate)
    for stage in stages if is_training else []:
        model, trained = init_model(config, stage, tokenizer, out)
        if stage == stages[0] and not state and rank_and_world()[0] == 0:  # nothing has failed
            set_aside(out, STAGES[STAGES.index(stage):] if arguments.stage else STAGES)
        run_stage(model.to(device), trained, stage, data[stage], tokenizer, config, out, state)
        state = None
    if rank_and_world()[0] == 0:
        if stages[-1] in ("instruct", "evaluate"):
            report(needed if is_training else [], tests, config, out, device)
        if is_training:
            (out / "resume.pt").unlink(missing_ok=True)  # nothing is left to resume


# You have read how training goes. What follows are the functions that it calls: how a stage gets
# its weights and its data, Muon, several processes, and flags.

# ---- What a stage starts from ----------------------------------------------------------------
def model_config(config, stage, tokenizer):
    """The `ModelConfig` of a stage."""
    connector = "qformer" if stage in PRETRAINING else connector_of(config)
    qformer = config.qformer | {"encoder_width": config.vit["dim"]}
    if stage in PRETRAINING and not config.qformer_folder:
        qformer |= {"vocab_size": tokenizer.vocab_size, "pad_id": tokenizer.pad_id,
                    "max_text_len": config.max_len}
    elif not config.qformer_folder:
        # After `vision` the text half and the last block are left out: qformer.py says why.
        qformer["n_layers"] -= 1
    image_token_dim = qformer["dim"]
    if connector != "qformer":
        image_token_dim = PATCHES_PER_TOKEN[connector] * config.vit["dim"]
    pixels = CLIP_PIXELS if config.vit_folder else {}
    return ModelConfig(
        vit=config.vit, qformer=qformer, connector=connector, max_len=config.max_len,
        projector=config.projector | {"in_dim": image_token_dim, "out_dim": config.decoder["dim"]},
        # A published decoder brings a vocab_size of its own, which wins.
        decoder={"vocab_size": tokenizer.vocab_size} | config.decoder,
        lora_on=RECIPES[config.recipe]["lora_on"], pad_id=tokenizer.pad_id,
        image_id=tokenizer.image_id, **pixels)


def published_parts(config):
    """{part: (arguments, weights)} of the parts that others have published."""
    parts = {}
    if config.vit_folder:
        parts["vit"] = published_vit(config.vit_folder, config.vit_drop_last)
    if config.qformer_folder:
        parts["connector"] = published_qformer(config.qformer_folder)
    if config.llm_folder:
        parts["decoder"] = published_gpt(config.llm_folder)
    return parts


# The field of `Config` with the sizes of a part.
SIZES_OF = {"vit": "vit", "connector": "qformer", "projector": "projector", "decoder": "decoder"}


def starting_weights(config, stage, out):
    """(weights, the parts that they belong to, the image size that they were trained with).
    Published weights in the first stage, later those of the stage before. Raises ValueError when
    that was run with other settings."""
    stages = needed_stages(config)
    if stage == stages[0]:
        parts = published_parts(config)
        weights, image_size = {}, config.vit["image_size"]
        for part, (arguments, tensors) in parts.items():
            image_size = arguments.get("image_size", image_size)
            weights |= {f"{part}.{name}": tensor for name, tensor in tensors.items()}
        return weights, set(parts), image_size
    path = out / f"{stages[stages.index(stage) - 1]}.pt"
    saved = load_file(path)
    trained = set(saved["trained"])
    for part, setting, new in (("projector", "connector", connector_of(config)),
                               ("adapters", "lora_on", RECIPES[config.recipe]["lora_on"])):
        old = saved["config"][setting]
        check(part not in trained or new == old,
              f"{path} was trained with {setting} {old!r}, not {new!r}: run 'align' again first")
    weights = {name: tensor for name, tensor in saved["model"].items() if part_of(name) in trained}
    return weights, trained, saved["config"]["vit"]["image_size"]


def init_model(config, stage, tokenizer, out):
    """(the model that a stage starts from, the parts of it that are already trained).
    Raises ValueError when weights do not fit, or a part would stay frozen with random numbers."""
    torch.manual_seed(config.seed)
    model = MLLM(model_config(config, stage, tokenizer))
    weights, trained, image_size = starting_weights(config, stage, out)
    # After `vision` the model has no text half and no last block of the Q-Former, or no Q-Former at
    # all. Their weights are dropped.
    names = model.state_dict().keys()
    weights = {name: tensor for name, tensor in weights.items()
               if name in names or part_of(name) != "connector"}
    if "vit.position_embedding" in weights:
        weights["vit.position_embedding"] = resize_positions(
            weights["vit.position_embedding"], model.vit.grid_of(*image_size), model.vit.grid)
    try:
        missing, unknown = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise ValueError(f"weights do not fit: {error}") from error
    # A published ViT may come without `ln_vision`.
    missing = [name for name in missing if part_of(name) in trained and "ln_vision" not in name]
    check(not missing + unknown, f"weights do not fit: missing {missing}, left over {unknown}")
    # A part that is used here must have been trained before or be trainable now: with `minigpt4`
    # the Q-Former must come from `vision`. (Untrained adapters add nothing, since B is zero.)
    used = set(PRETRAINING.get(stage, PARTS)) & {part_of(name) for name in names}
    used -= {"adapters"}
    random_parts = used - trained - lr_scales(config, stage).keys()
    check(not random_parts, f"{random_parts} would stay frozen with random numbers in {stage!r}: "
          "train it in an earlier stage")
    return model, trained


# What a training run leaves, and what `--stage evaluate` leaves.
RESULTS = ("metrics.json", "answers.json", "samples.png", "curves.png")
EVALUATION = ("evaluation.json", "evaluation_answers.json", "evaluation_samples.png")


def set_aside(out, stages):
    """Move what an earlier run left of these stages to out/previous, so that runs do not mix.
    What was in there is deleted: one step back. A run that did not come to its end is deleted
    itself, rather than a finished one in there."""
    names = [*(f"{stage}.pt" for stage in stages), "resume.pt", *RESULTS, *EVALUATION]
    old = [name for name in names if (out / name).exists()]
    previous = out / "previous"
    out.mkdir(parents=True, exist_ok=True)
    if not old:
        return
    if "instruct.pt" not in old and (previous / "instruct.pt").exists():
        for name in old:
            (out / name).unlink()
        return
    previous.mkdir(exist_ok=True)
    for name in (*(f"{stage}.pt" for stage in STAGES), *names):
        (previous / name).unlink(missing_ok=True)
    for name in old:
        (out / name).rename(previous / name)
    print(f"{out} holds an earlier run: what this one replaces is now in {previous}")


# ---- What a stage is trained on --------------------------------------------------------------
def scene_sets(config):
    """({stage: its scenes}, {metric: the scenes that the model is asked about in the end})."""
    spec = SceneSpec(config.vit["image_size"][0], **config.scenes)
    n, seed = config.eval_samples, config.seed
    train = {stage: Scenes(spec, stage, 2**40, "train", seed, config.instruct_turns)
             for stage in STAGES}
    train["language"].n_turns = config.language_turns
    half = (n + 1) // 2
    tests = {"qa_accuracy": Scenes(spec, "question", n, "test", seed),
             "qa_accuracy_unseen": Scenes(spec, "question", n, "unseen", seed),
             "description_exact": Scenes(spec, "describe", half, "test", seed),
             "reading_accuracy": Scenes(spec, "language", half, "test", seed, n_turns=1)}
    for scenes in tests.values():
        scenes.things(0)  # better an error now than after hours
    return train, tests


def own_samples(config, is_training):
    """(your samples to train on, to measure on). Empty for scenes."""
    train, test = [], []
    if config.data and (is_training or not config.val):
        train = read_own_data(config.data, config.images)
    if config.val:
        test = read_own_data(config.val, config.images)
    elif config.data:
        train, test = hold_out(train)
    return train, test


def own_sets(config, stages, train, test, collate):
    """({stage: your samples}, {metric: your questions}), without those that are too long."""
    def fits(sample):
        ids, _ = encode_turns(collate.tokenizer, sample.turns, collate.n_image_tokens)
        start = sample.turns[0][0][:40]
        check(len(ids) <= config.max_len, f"{len(ids)} tokens, over --max-len: {start!r}")
        return sample

    def opened(sample):  # better an error now than after training
        for path in sample.images:
            read_image(path)
        return sample

    sets = {}
    if train:  # none where a model is only evaluated
        train = keep_usable(train, fits, config.data, "sample")
        sets = {stage: for_stage(train, stage) for stage in stages}
    test = keep_usable(questions_of(test), fits, config.val or config.data, "question")
    known = {picture for sample in train for picture in sample.images}
    n_known = len({picture for sample in test for picture in sample.images} & known)
    if n_known:
        print(f"{n_known} pictures of --val are in --data, too: answers about them prove little")
    # Drawn from all of it: many files are sorted by their answers.
    n = min(config.eval_samples, len(test))
    asked = random.Random(config.seed).sample(test, n)
    return sets, {"qa_accuracy": keep_usable(asked, opened, config.val or config.data, "question")}


def make_batches(config, stage, dataset, collate, first_step=0):
    """The batches of a stage from a step on. Of each batch, the part of this process."""
    # The order depends on seed and stage alone: a resumed run sees what it would have seen.
    rank, world = rank_and_world()
    index = STAGES.index(stage)
    n = n_steps(config, stage) * config.batch_size
    if config.data:  # all samples in random order, then all in another, ...
        generator = torch.Generator().manual_seed(hash((config.seed, index)))
        order = list(RandomSampler(dataset, num_samples=n, generator=generator))
    else:  # no scene twice in a run
        first = sum(getattr(config, f"{earlier}_samples") for earlier in STAGES[:index])
        order = range(first, first + n)
    # With two processes and batches of four, the first one takes 0, 1, 4, 5, ...
    size = config.batch_size // world
    own_part = [number for i, number in enumerate(order) if i // size % world == rank]
    return DataLoader(dataset, size, sampler=own_part[first_step * size:],
                      collate_fn=collate.pairs if stage == "vision" else collate.conversations,
                      num_workers=config.workers, pin_memory=torch.cuda.is_initialized())


# ---- Muon ------------------------------------------------------------------------------------
def orthogonal(matrices):
    """(n, rows, columns) -> the same with singular vectors kept and all singular values near 1."""
    x = matrices.bfloat16()
    is_tall = x.shape[1] > x.shape[2]
    if is_tall:
        x = x.mT  # x x' is then the smaller product
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # no singular value above 1
    # A Newton-Schulz step, a x + (b x x' + c (x x')^2) x, turns each singular value s into
    # a s + b s^3 + c s^5. Five steps take all but the smallest of (0, 1] to between 0.7 and 1.2.
    a, b, c = 3.4445, -4.775, 2.0315
    for _ in range(5):
        gram = x @ x.mT
        step = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, step, x, beta=a)
    return x.mT if is_tall else x


class Muon(torch.optim.Optimizer):
    """Orthogonal momentum (arXiv 2502.16982): a step moves a matrix equally far in all directions.
    A plain gradient is dominated by few directions."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            # As `torch.optim.Muon` with `match_rms_adamw` and no weight decay. But matrices of one
            # shape share batched products, for the same bits in less time.
            by_shape = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    by_shape[matrix.shape].append(matrix)
                    if not self.state[matrix]:
                        self.state[matrix]["momentum"] = torch.zeros_like(matrix)
            for shape, matrices in by_shape.items():
                grads = [matrix.grad for matrix in matrices]
                momenta = [self.state[matrix]["momentum"] for matrix in matrices]
                torch._foreach_lerp_(momenta, grads, 0.05)
                ahead = torch._foreach_lerp(grads, momenta, 0.95)  # Nesterov's momentum
                updates = orthogonal(torch.stack(ahead)).float()
                # Entries of an update then are as large as AdamW's, whatever the shape.
                rate = 0.2 * max(shape) ** 0.5 * group["lr"]
                torch._foreach_add_(matrices, updates.unbind(), alpha=-rate)


# ---- Several processes -----------------------------------------------------------------------
def rank_and_world():
    """The number of this process and how many there are: 0 and 1 without `torchrun`."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def join_processes(device):
    """Meet the other processes. Only the first one prints. Returns the device of this one: with
    CUDA its own. Raises ValueError when there is none."""
    rank, world = rank_and_world()
    if world > 1:
        distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        if rank > 0:
            sys.stdout = open(os.devnull, "w", encoding="utf-8")
        if device.startswith("cuda"):
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
    return find_device(device)


def average_gradients(parameters):
    """Give all processes the mean of their gradients."""
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat_grads = torch.cat([grad.flatten() for grad in grads])
    distributed.all_reduce(flat_grads)
    flat_grads /= rank_and_world()[1]
    for grad, mean_grad in zip(grads, flat_grads.split([grad.numel() for grad in grads])):
        grad.copy_(mean_grad.view_as(grad))


# ---- Flags -----------------------------------------------------------------------------------
def flat(config):
    """All settings by name, the sizes of a part as "vit.dim"."""
    values = {}
    for name, value in asdict(config).items():
        if isinstance(value, dict):
            values |= {f"{name}.{key}": size for key, size in value.items()}
        else:
            values[name] = value
    return values


ZERO_IS_FINE = ("vit_drop_last", "projector.hidden_dim", "workers", "seed")


def parse_arguments(words=None):
    parser = argparse.ArgumentParser(description="Train a multimodal language model.",
                                     allow_abbrev=False)
    add = parser.add_argument
    add("--out", type=Path, default=Path("out"), help="folder for weights, metrics and pictures")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, ...")
    add("--preset", choices=PRESETS, help="all settings at once; default: the device's")
    add("--stage", choices=(*STAGES, "evaluate"), help="run this one alone")
    add("--resume", action="store_true",
        help="go on where a run was interrupted, with its settings, to the end of all stages")
    comments = dict(re.findall(r"^    (\w+): .*# (.+)$", inspect.getsource(Config), re.MULTILINE))
    for name, value in flat(CPU).items():
        options = {"dest": name, "default": argparse.SUPPRESS, "help": comments[name.split(".")[0]]}
        if isinstance(value, bool):
            options["action"] = argparse.BooleanOptionalAction
        elif isinstance(value, tuple):
            options |= {"type": at_least(1), "nargs": 2, "metavar": ("HEIGHT", "WIDTH")}
        elif isinstance(value, str):
            choices = {"recipe": RECIPES, "connector": CONNECTORS,
                       "projector.activation": ACTIVATIONS}
            options["choices"] = choices.get(name)
        else:
            least = 0 if isinstance(value, float) or name in ZERO_IS_FINE else 1
            options["type"] = at_least(least, type(value))
        add("--" + name.replace("_", "-"), **options)
    return parser.parse_args(words)


def is_fixed(name, stage, trained):
    """Whether a setting cannot change before this stage. trained: the parts that are trained."""
    if stage == "evaluate":
        return name not in ("data", "val", "images", "eval_samples", "batch_size", "bf16", "seed")
    if name.startswith(STAGES[:STAGES.index(stage)]):  # of a stage that is over
        return True
    field, _, key = name.partition(".")
    if key in ("r", "alpha"):
        return "adapters" in trained
    if key in ("image_size", "drop_path_rate", "use_grad_checkpoint", "dropout", "lora_dropout"):
        return False
    return (field in [SIZES_OF[part] for part in trained if part in SIZES_OF]
            or field in ("scenes", "vocab_size", "vit_drop_last") or field.endswith("_folder"))


def settings(arguments, state):
    """(the settings of a run, the checkpoint that it starts from or None).
    Start from the preset, or from the previous stage's checkpoint; then apply the flags."""
    config = PRESETS[arguments.preset or ("gpu" if "cuda" in arguments.device else "cpu")]
    earlier = state
    for stage in (*STAGES, "evaluate"):
        if not arguments.stage or stage == arguments.stage:
            break
        if (arguments.out / f"{stage}.pt").exists():
            earlier = load_file(arguments.out / f"{stage}.pt")
    if earlier:
        config = Config(**earlier["run"])
        check(not arguments.preset, "--preset is for a new run: leave it out")
        check(not state or not arguments.stage, "--resume goes on to the end: leave out --stage")
    flags = {name: value for name, value in vars(arguments).items() if name in flat(CPU)}
    if "vit.image_size" in flags:
        flags["vit.image_size"] = tuple(flags["vit.image_size"])
    if arguments.stage == "evaluate" and {"data", "val"} & flags.keys():  # asks about all of it
        flags = {"eval_samples": sys.maxsize} | flags
        flags["data"] = flags["val"] = flags.get("val") or flags["data"]
        if flags["val"] == config.data:
            print(f"{config.data} was trained on: answers about it prove little")
    if flags.get("data", config.data) not in (config.data, config.val):
        flags = {"val": "", "images": ""} | flags  # what is stored belongs to other data
    stored = config
    for name, value in flags.items():
        field, _, key = name.partition(".")
        if key:
            value = getattr(config, field) | {key: value}
        config = replace(config, **{field: value})
    if earlier:
        old, new = flat(stored), flat(config)
        changed = [name.replace("_", "-") for name in old if old[name] != new[name]
                   and (state or is_fixed(name, arguments.stage, earlier["trained"]))]
        check(not changed, f"the run in {arguments.out} was begun with other settings: leave out "
              f"{changed}, or begin a new run")
    else:
        config = with_published_sizes(config, flags)
    check_settings(config)
    return config, earlier


def with_published_sizes(config, flags):
    """The settings with the sizes of published parts. Raises ValueError for flags that differ."""
    for part, (sizes, _) in published_parts(config).items():
        field = SIZES_OF[part]
        if part == "vit":  # its positions can be interpolated
            sizes["image_size"] = flags.get("vit.image_size", sizes["image_size"])
        for key, value in sizes.items():
            given = flags.get(f"{field}.{key}", value)
            check(given == value, f"--{field}.{key} {given}: the published weights have {value}")
        config = replace(config, **{field: getattr(config, field) | sizes})
    return config


def check_settings(config):
    """Raise ValueError for settings that contradict each other."""
    world = rank_and_world()[1]
    check(config.batch_size % world == 0, "--batch-size must divide by the number of processes")
    check(config.batch_size > world or not config.itm_weight or "vision" not in
          needed_stages(config), "ITM needs two samples in each process: raise --batch-size")
    check(config.qformer["n_layers"] > 1 or bool(config.qformer_folder),
          "--qformer.n-layers must be at least 2: the last block is left out after 'vision'")
    check(bool(config.data) or not config.val + config.images, "--val and --images need --data")
    check(bool(config.vit_folder) or not config.qformer_folder,
          "BLIP-2's Q-Former needs the features of its own ViT: give --vit-folder, too")
    check(config.bf16 or not config.half_frozen, "--half-frozen needs --bf16")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        # An error in a worker brings its traceback along, which ends in our own sentence.
        sentence = str(error).split("\nValueError: ")[-1].strip()
        sys.exit(f"train.py: {sentence}")
    except KeyboardInterrupt:
        saved = parse_arguments().out / "resume.pt"
        hint = f"--resume goes on from {saved}" if saved.exists() else "there is nothing to resume"
        sys.exit(f"train.py: stopped; {hint}")
