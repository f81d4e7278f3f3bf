"""Train the model: `python train.py`, six minutes on two CPU cores, no downloads.

    stage      trained on                 what it stands for
    language   text                       a pretrained language model
    vision     pictures with their text   a pretrained BLIP-2 (losses ITC + ITM + ITG)
    align      short, noisy captions      stage 1 of the papers
    instruct   questions, descriptions    stage 2 of the papers

The papers start from downloaded parts; `language` and `vision` (stage 0) make small stand-ins for
those that are not given (`--vit`, `--qformer`, `--llm`). Each stage starts from the weights of the
one before and writes its own, `out/<stage>.pt`. In the end the model is questioned about held-out
pictures.

    python train.py --recipe minigpt4         another published choice of what is trainable when
    python train.py --stage instruct          one stage, from out/align.pt
    python train.py --resume                  go on where an interrupted run stopped
    python train.py --data my.json            your own pictures and conversations
    torchrun --nproc_per_node=4 train.py      four processes share each batch
"""
import argparse
import ast
import difflib
import json
import math
import os
import random
import re
import sys
import time
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from data import (IGNORED, Collate, Conversations, Sample, Scenes, SceneSpec, Tokenizer, check,
                  contact_sheet, corpus, draw_curves, encode_turns, published_gpt, published_pixels,
                  published_qformer, published_vit)
from model import (CONNECTORS, MERGED, MLLM, PARTS, ModelConfig, load_file, part_of,
                   resize_positions, save_file)

# ---- Recipes and settings --------------------------------------------------------------------

STAGES = ("language", "vision", "align", "instruct")

# What is trainable in each stage, and at which share of the stage's learning rate. A part that is
# not named is frozen. Stage 0 stands in for downloads and is the same for all.
STAGE_0 = {"language": {"decoder": 1.0}, "vision": {"vit": 1.0, "qformer": 1.0}}
BETWEEN = {"qformer": 1.0, "projector": 1.0, "adapters": 1.0}
RECIPES = {
    # All between ViT and decoder, as in BLIP-2 (arXiv 2301.12597, section 3.2), with Partial LoRA.
    "blip2_plora": {"connector": "qformer", "lora_on": "image",
                    "align": BETWEEN, "instruct": BETWEEN},
    # One linear layer: arXiv 2304.10592, section 3.
    "minigpt4": {"connector": "qformer", "lora_on": "image",
                 "align": {"projector": 1.0}, "instruct": {"projector": 1.0}},
    # Low-rank adapters (arXiv 2106.09685) in the second stage: on every token, or on image tokens.
    "lora": {"connector": "qformer", "lora_on": "all",
             "align": {"projector": 1.0}, "instruct": {"adapters": 1.0}},
    "plora": {"connector": "qformer", "lora_on": "image",
              "align": {"projector": 1.0}, "instruct": {"adapters": 1.0}},
    # arXiv 2401.16420, section 3. With full steps the decoder would forget its language.
    "xcomposer2": {"connector": "patches", "lora_on": "image",
                   "align": {"vit": 0.1, "projector": 1.0, "adapters": 1.0},
                   "instruct": {"vit": 0.1, "projector": 1.0, "adapters": 1.0, "decoder": 0.1}},
    # A fusion layer between a frozen ViT and a frozen language model.
    "frozen": {"connector": "patches", "lora_on": "image",
               "align": {"projector": 1.0}, "instruct": {"projector": 1.0}},
}


@dataclass(frozen=True)
class Config:
    """A whole run. `--set name=value` changes any of it, `--set vit.dim=256` the size of a part."""
    vit: dict                            # sizes: arguments of ViT, QFormer, make_projector, GPT
    qformer: dict
    projector: dict
    decoder: dict
    scenes: dict                         # and of SceneSpec
    recipe: str = "blip2_plora"
    connector: str = ""                  # empty: the recipe's
    vit_folder: str = ""                 # published weights to start from
    qformer_folder: str = ""
    llm_folder: str = ""
    vit_drop_last: int = 0               # blocks of the published ViT that are left out
    qformer_drop_last: int = 1           # blocks of our own Q-Former, left out after `vision`
    vocab_size: int = 1024               # at most; the tokenizer stops earlier when no pair repeats
    max_len: int = 512                   # longest prompt and answer together, in tokens
    data: str = ""                       # own data to train on; empty: built-in scenes
    val: str = ""                        # own data to be measured on; empty: every 20th picture
    images: str = ""                     # folder of their pictures
    skip_bad: bool = False
    augment: bool = False                # move and flip own pictures in training
    language_turns: int = 2              # questions about each description
    instruct_turns: int = 3              # questions about each picture
    language_samples: int = 36_000
    vision_samples: int = 32_000
    align_samples: int = 6_400
    instruct_samples: int = 28_800
    eval_samples: int = 1000
    batch_size: int = 64                 # samples for each step of the optimizer
    language_lr: float = 3.5e-3          # peak learning rates of the stages
    vision_lr: float = 6e-3
    align_lr: float = 6e-3
    instruct_lr: float = 4e-3
    ffn_lr: float = 0.1                  # share for feed-forward nets of Q-Former and decoder
    own_lr: float = 0.25                 # share for ViT and Q-Former on own pictures, see README
    muon: bool = True                    # for hidden matrices; without it AdamW trains them, too
    vision_adamw_lr: float = 0.5         # share for what AdamW trains in ViT and Q-Former
    itc_weight: float = 0.1              # of the losses beside ITG; 0 leaves one out
    itm_weight: float = 0.1
    contrast_every: int = 4              # ITC and ITM run in one step of so many
    weight_decay: float = 0.0
    warmup: float = 0.05                 # share of the steps until the peak
    clip: float = 1.0                    # largest norm of the gradient
    bf16: bool = True                    # matrix products in bfloat16 (autocast)
    half_frozen: bool = False            # keep frozen weights in bfloat16 after stage 0
    workers: int = 1                     # processes that prepare data
    save_every: int = 200                # steps between two states to resume from
    seed: int = 0


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
    CPU, vit=CPU.vit | dict(image_size=(96, 96), patch_size=12, dim=192, n_heads=6),
    qformer=CPU.qformer | dict(dim=192, n_heads=6, n_queries=32),
    decoder=CPU.decoder | dict(dim=256, n_layers=4, n_heads=8, n_kv_heads=4, r=64, alpha=256.0),
    scenes=dict(n_colors=6, n_shapes=4, n_places=9, max_things=5), language_turns=6,
    instruct_turns=6, workers=4, save_every=1000, language_samples=110_000,
    vision_samples=300_000, align_samples=16_000, instruct_samples=80_000,
    # Half the rates above, at which ViT and Q-Former of this width learn little until they fall.
    vision_lr=3e-3, align_lr=3e-3, instruct_lr=2e-3)
TINY = replace(  # all stages in forty seconds, for a first look and after a change
    CPU, vit=CPU.vit | dict(image_size=(32, 32), n_layers=2),
    qformer=CPU.qformer | dict(n_queries=8),
    decoder=CPU.decoder | dict(dim=128, n_heads=4, n_kv_heads=4),
    scenes=dict(n_colors=3, n_shapes=2, n_places=3, max_things=2), language_samples=8_000,
    vision_samples=5_000, align_samples=1_200, instruct_samples=5_000, eval_samples=200)
PRESETS = {"cpu": CPU, "gpu": GPU, "tiny": TINY}


def connector_of(config: Config) -> str:
    return config.connector or RECIPES[config.recipe]["connector"]


def stages_of(config: Config) -> list[str]:
    """The stages of a run: published parts need no stand-ins."""
    has_features = config.qformer_folder or connector_of(config) in MERGED
    given = {"language": config.llm_folder, "vision": config.vit_folder and has_features}
    return [stage for stage in STAGES if not given.get(stage)]


def shares_of(config: Config, stage: str) -> dict[str, float]:
    """The trainable parts of a stage, each with its share of the learning rate."""
    shares = dict(STAGE_0.get(stage) or RECIPES[config.recipe][stage])
    if stage == "vision" and config.vit_folder:  # a published ViT stays as it is
        del shares["vit"]
    for part in ("vit", "qformer"):
        if config.data and part in shares:
            shares[part] *= config.own_lr  # photographs want smaller steps than scenes
    return shares


def steps_of(config: Config, stage: str) -> int:
    return max(1, getattr(config, f"{stage}_samples") // config.batch_size)


# ---- What a stage starts from ----------------------------------------------------------------

def model_config(config: Config, stage: str, tokenizer: Tokenizer) -> ModelConfig:
    """The model of a stage. In stage 0 our own Q-Former has a text half and one more block, which
    go after `vision`; the docstring of qformer.py says why."""
    c, connector = config, "qformer" if stage in STAGE_0 else connector_of(config)
    qformer = c.qformer | {"encoder_width": c.vit["dim"]}
    if stage in STAGE_0 and not c.qformer_folder:
        qformer |= {"vocab_size": tokenizer.vocab_size, "pad_id": tokenizer.pad,
                    "max_text_len": c.max_len}
    elif not c.qformer_folder:
        qformer["n_layers"] -= c.qformer_drop_last
    row_dim = qformer["dim"] if connector == "qformer" else MERGED[connector] * c.vit["dim"]
    pixels = published_pixels(c.vit_folder) if c.vit_folder else {}
    return ModelConfig(
        vit=c.vit, qformer=qformer, connector=connector, max_len=c.max_len,
        projector=c.projector | {"in_dim": row_dim, "out_dim": c.decoder["dim"]},
        decoder={"vocab_size": tokenizer.vocab_size} | c.decoder, pad_id=tokenizer.pad,
        lora_on=RECIPES[c.recipe]["lora_on"], image_id=tokenizer.image, **pixels)


def published_parts(config: Config) -> dict[str, tuple[dict, dict[str, Tensor]]]:
    """(arguments, weights) of each part that others have published."""
    parts = {}
    if config.vit_folder:
        parts["vit"] = published_vit(config.vit_folder, config.vit_drop_last)
    if config.qformer_folder:
        parts["qformer"] = published_qformer(config.qformer_folder)
    if config.llm_folder:
        parts["decoder"] = published_gpt(config.llm_folder)
    return parts


# Settings of a part that may change after it was trained.
FREE = {"image_size", "drop_path_rate", "use_grad_checkpoint", "dropout", "lora_dropout", "r",
        "alpha"}


def start_of(config: Config, stage: str, tokenizer: Tokenizer, out: Path) -> tuple[MLLM, list[str]]:
    """The model that a stage starts from, and its parts that hold more than random numbers.

    It is built as the stage needs it, then takes published weights or those of the stage before.
    Raises ValueError when they do not fit, or when a part would stay frozen with random numbers.
    """
    torch.manual_seed(config.seed)
    model, stages = MLLM(model_config(config, stage, tokenizer)), stages_of(config)
    names, weights, image_size = model.state_dict().keys(), {}, config.vit["image_size"]
    if stage == stages[0]:
        trained = []
        for part, (arguments, tensors) in published_parts(config).items():
            trained.append(part)
            weights |= {f"{part}.{name}": tensor for name, tensor in tensors.items()}
            image_size = arguments.get("image_size", image_size)
    else:
        path = out / f"{stages[stages.index(stage) - 1]}.pt"
        checkpoint = load_file(path, ["run", "trained"])
        trained, image_size = checkpoint["trained"], checkpoint["config"]["vit"]["image_size"]
        for part in {"scenes", *trained} - {"adapters"}:
            old, new = checkpoint["run"][part], getattr(config, part)
            changed = [name for name in old if old[name] != new[name] and name not in FREE]
            check(not changed, f"{path} was trained with other {part} settings: {changed}")
        made_for = checkpoint["config"]["connector"]
        check("projector" not in trained or made_for == model.config.connector,
              f"{path} has a projector for the connector {made_for!r}: run 'align' again first")
        # The Q-Former's text half and last block, or all of it, have no place any more.
        weights = {name: tensor for name, tensor in checkpoint["model"].items()
                   if name in names and part_of(name) in trained}
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
    used = {*STAGE_0.get(stage, PARTS)}
    # Adapters may start anew while they are frozen: their B is zero.
    fresh = used & {part_of(name) for name in names} - {"adapters", *trained}
    check(fresh <= {*shares_of(config, stage)}, f"{fresh} would stay frozen with random numbers in "
          f"{stage!r}: train it in an earlier stage")
    return model, trained


# ---- What a stage is trained on --------------------------------------------------------------

class Task:
    """The data of a run: built-in scenes, or your own conversations. `train(stage)` is the dataset
    of a stage, `test` what the model is questioned about in the end."""

    def __init__(self, config: Config):
        self.config = c = config
        self.spec, n = SceneSpec(c.vit["image_size"][0], **c.scenes), c.eval_samples
        self.own = Conversations(c.data, c.images, c.skip_bad) if c.data else None
        if self.own:
            held_out = (Conversations(c.val, c.images, c.skip_bad) if c.val
                        else self.own.split(20)).for_task("test")
            # Drawn from all of it: many files are sorted by their answers.
            chosen = random.Random(c.seed).sample(range(len(held_out)), min(n, len(held_out)))
            self.test = {"qa": Subset(held_out, chosen)}
        else:
            few = (n + 1) // 2
            self.test = {"qa": Scenes(self.spec, "question", n, "test", c.seed),
                         "qa_unseen": Scenes(self.spec, "question", n, "unseen", c.seed),
                         "description": Scenes(self.spec, "describe", few, "test", c.seed),
                         "language": Scenes(self.spec, "language", few, "test", c.seed, n_turns=1)}

    def train(self, stage: str) -> Dataset:
        if self.own:
            return self.own.for_task(stage)
        n_turns = self.config.language_turns if stage == "language" else self.config.instruct_turns
        return Scenes(self.spec, stage, 2**40, "train", self.config.seed, n_turns)

    def order(self, stage: str, n: int) -> list[int]:
        """The numbers of the samples of a stage, from a dataset of n: a function of seed and stage
        alone, so that a resumed run goes on where the interrupted one was."""
        c, index, order = self.config, STAGES.index(stage), []
        total = steps_of(c, stage) * c.batch_size
        if not self.own:  # no scene twice in a run
            first = sum(getattr(c, f"{earlier}_samples") for earlier in STAGES[:index])
            return list(range(first, first + total))
        while len(order) < total:
            generator = torch.Generator().manual_seed(hash((c.seed, index, len(order))))
            order += torch.randperm(n, generator=generator).tolist()
        return order[:total]

    def batches(self, stage: str, collate: Collate, first_step: int = 0) -> DataLoader:
        """The batches from a step on; of each, the part of this process."""
        c, dataset, (rank, world) = self.config, self.train(stage), rank_and_world()
        size, order = c.batch_size // world, self.order(stage, len(dataset))
        own = [index for i, index in enumerate(order) if i // size % world == rank]
        collate_fn = collate.pairs if stage == "vision" else collate.conversations
        return DataLoader(dataset, size, sampler=own[first_step * size:], num_workers=c.workers,
                          collate_fn=collate_fn, pin_memory=torch.cuda.is_initialized())


def make_tokenizer(config: Config, task: Task) -> Tokenizer:
    """The language model's own, or one trained on the texts of the run."""
    if not config.llm_folder:
        return Tokenizer.train(corpus(task.train("language")), config.vocab_size)
    tokenizer = Tokenizer.load(Path(config.llm_folder) / "tokenizer.json")
    check(tokenizer.end is not None, f"{config.llm_folder}: no eos_token in tokenizer_config.json")
    check(tokenizer.pad <= config.decoder["vocab_size"], f"{config.llm_folder}: tokenizer.json has "
          f"{tokenizer.pad} ids, more than the {config.decoder['vocab_size']} of the model")
    return tokenizer


# ---- Several processes -----------------------------------------------------------------------

def rank_and_world() -> tuple[int, int]:
    """The number of this process and how many there are: 0 and 1 without `torchrun`."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def join_processes(device: torch.device) -> torch.device:
    """Meet the other processes of `torchrun`, of which only the first one prints and writes.
    Returns the device of this process."""
    rank, world = rank_and_world()
    if world > 1:
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        sys.stdout = sys.stdout if rank == 0 else open(os.devnull, "w")
    if world > 1 and device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return device


def wait_for_all() -> None:
    if distributed.is_initialized():
        distributed.barrier()


def sum_of_all(value: Tensor) -> Tensor:
    if distributed.is_initialized():
        distributed.all_reduce(value)
    return value


# ---- Losses and optimizers -------------------------------------------------------------------

def augment(images: Tensor) -> Tensor:
    """Each image moved by up to an eighth of its sides and flipped at random, (N, 3, H, W)."""
    N = len(images)
    change = torch.zeros(N, 2, 3)
    change[:, 0, 0] = torch.randint(0, 2, (N,)) * 2.0 - 1  # left to right, or as it is
    change[:, 1, 1] = 1.0
    change[:, :, 2] = torch.rand(N, 2) / 2 - 0.25  # in halves of a side
    change = change.to(images.device, non_blocking=True)
    grid = nn.functional.affine_grid(change, images.shape, align_corners=False)
    return nn.functional.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


class StageLoss(nn.Module):
    """The loss of a stage: next tokens of the answers; in `vision` BLIP-2's three losses (arXiv
    2301.12597, section 3.1).

    Differs: ITC and ITM run in one step of `contrast_every` and on a quarter of the batch, since
    ITM passes three times as many pairs. They weigh less, since on scenes this simple ITG teaches
    more.
    """

    def __init__(self, model: MLLM, stage: str, config: Config):
        super().__init__()
        self.model, self.stage, self.config = model, stage, config

    def forward(self, batch: dict[str, Tensor], step: int = 0) -> Tensor:
        """A batch of `Collate` -> nats per token (of ITC and ITM: per pair)."""
        # Own pictures only: in a flipped scene the answer "left" would be wrong.
        if self.config.augment and self.config.data and len(batch["images"]):
            batch = batch | {"images": augment(self.model.normalize(batch["images"]))}
        if self.stage == "vision":
            return self.vision_loss(batch, step)
        images = None if self.stage == "language" else batch["images"]
        return self.model(batch["input_ids"], images, batch["labels"])[1]

    def vision_loss(self, batch: dict[str, Tensor], step: int) -> Tensor:
        c, qformer = self.config, self.model.qformer
        image_features = self.model.image_features(batch["images"])  # (B, P, Dv)
        text, to_generate, labels = (batch[name].to(image_features.device, non_blocking=True)
                                     for name in ("text", "to_generate", "labels"))  # (B, T)
        loss, queries = qformer.itg_loss(image_features, to_generate, labels)
        if step % c.contrast_every or not (c.itc_weight or c.itm_weight):
            return loss
        n = max(2, len(text) // 4)
        similarity = qformer.similarity(queries[:n], text[:n])  # (n, n)
        if c.itc_weight:
            loss = loss + c.itc_weight * qformer.itc_loss(similarity)
        if c.itm_weight:
            loss = loss + c.itm_weight * qformer.itm_loss(image_features[:n], text[:n], similarity)
        return loss


def token_share(batch: dict[str, Tensor], device: torch.device) -> Tensor:
    """The factor for the loss of this process: its number of trained tokens over the mean number of
    a process. DistributedDataParallel averages over processes; with this factor over all tokens."""
    n = (batch["labels"][:, 1:] != IGNORED).sum().to(device, non_blocking=True)
    return n * rank_and_world()[1] / sum_of_all(n.clone())


def orthogonal(matrices: Tensor) -> Tensor:
    """(n, rows, columns) -> the same with singular vectors kept and all singular values near 1.

    A Newton-Schulz step, a x + (b x x' + c (x x')^2) x, turns each singular value s into a s +
    b s^3 + c s^5: five steps take all but the smallest of (0, 1] to between 0.7 and 1.2.
    """
    x, is_tall = matrices.bfloat16(), matrices.shape[1] > matrices.shape[2]
    x = x.mT if is_tall else x  # x x' is then the smaller product
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # no singular value above 1
    for _ in range(5):
        gram = x @ x.mT
        step = torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
        x = torch.baddbmm(x, step, x, beta=3.4445)
    return x.mT if is_tall else x


class Muon(torch.optim.Optimizer):
    """Orthogonal momentum: a step moves a matrix equally far in all directions, where a gradient
    is dominated by few. Equals `torch.optim.Muon` with `match_rms_adamw`, but matrices of one
    shape share batched products: a GPU starts fewer kernels. Source: arXiv 2502.16982."""

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            shapes = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    shapes[matrix.shape].append(matrix)
                    if not self.state[matrix]:
                        self.state[matrix]["momentum"] = torch.zeros_like(matrix)
            for shape, matrices in shapes.items():
                grads = [matrix.grad for matrix in matrices]
                means = [self.state[matrix]["momentum"] for matrix in matrices]
                torch._foreach_lerp_(means, grads, 0.05)
                ahead = torch._foreach_lerp(grads, means, 0.95)  # Nesterov's momentum
                updates = orthogonal(torch.stack(ahead)).float()
                torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
                # Entries of an update then are as large as AdamW's, whatever the shape.
                rate = 0.2 * max(shape) ** 0.5 * group["lr"]
                torch._foreach_add_(matrices, updates.unbind(), alpha=-rate)


def make_optimizers(model: MLLM, config: Config, stage: str) -> list[torch.optim.Optimizer]:
    """Muon for the trainable hidden matrices (of two dimensions, but no embedding and no head),
    AdamW for all else that is trainable. From as many samples Muon learns far more here."""
    hidden, others = {}, {}  # groups of parameters by rate and weight decay
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = part_of(name)
        by_muon = config.muon and parameter.ndim == 2 and not re.search("embedding|head", name)
        rate = getattr(config, f"{stage}_lr") * shares_of(config, stage)[part]
        # At the full rate feed-forward nets learn by heart which colours no circle has had.
        if part != "adapters" and re.search(r"_ffn\.|\.w[123]\.", name):
            rate *= config.ffn_lr
        if not by_muon and part in ("vit", "qformer"):
            rate *= config.vision_adamw_lr
        decay = config.weight_decay if parameter.ndim > 1 else 0.0
        group = dict(params=[], lr=rate, peak=rate, weight_decay=decay)
        groups = hidden if by_muon else others
        groups.setdefault((rate, decay), group)["params"].append(parameter)
    optimizers = []
    if hidden:
        optimizers.append(Muon(hidden.values(), {}))
    if others:
        optimizers.append(torch.optim.AdamW(others.values(), betas=(0.9, 0.95), fused=True))
    check(len(optimizers) > 0, f"nothing is trainable in {stage!r}")
    return optimizers


def schedule(step: int, steps: int, warmup: float) -> float:
    """Share of the peak learning rate at a step: linear warm-up, then half a cosine down to 2 %."""
    warm = max(1, int(warmup * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


def autocast(device: torch.device, config: Config):
    return torch.autocast(device.type, torch.bfloat16, enabled=config.bf16)


# ---- The loop --------------------------------------------------------------------------------

def train_stage(model: MLLM, stage: str, task: Task, collate: Collate, config: Config, out: Path,
                state: dict | None = None) -> tuple[list[float], float]:
    """Run one stage, or the rest of it from a saved state. Returns the loss of each step, NaN
    where loss or gradient was not finite and the step changed nothing, and the seconds it took."""
    (rank, world), steps = rank_and_world(), steps_of(config, stage)
    state = state or {"seconds": 0.0, "losses": [], "optimizers": []}
    start, losses = time.time() - state["seconds"], state["losses"]
    device, loss_of = next(model.parameters()).device, StageLoss(model, stage, config)
    if world > 1:  # not all losses use all heads
        loss_of = DistributedDataParallel(loss_of, find_unused_parameters=True)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizers = make_optimizers(model, config, stage)
    for optimizer, saved in zip(optimizers, state["optimizers"]):
        optimizer.load_state_dict(saved)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    batches = iter(task.batches(stage, collate, first_step=len(losses)))
    bar = tqdm(range(len(losses), steps), stage, steps, initial=len(losses), disable=rank > 0)
    for step in bar:
        # A seed for each step: a resumed run draws what an uninterrupted one draws.
        torch.manual_seed(hash((config.seed, STAGES.index(stage), step, rank)))
        for group in groups:
            group["lr"] = group["peak"] * schedule(step, steps, config.warmup)
        batch = next(batches)
        with autocast(device, config):
            loss = loss_of(batch, step)
        if world > 1:
            loss = loss * token_share(batch, device)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(trainable, config.clip)
        loss = sum_of_all(loss.detach()) / world
        value = (loss + 0 * norm).item()  # NaN, too, if a gradient is not finite; waits for the GPU
        losses.append(value if math.isfinite(value) else math.nan)
        for optimizer in optimizers:
            if not math.isnan(losses[-1]):
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        check(len(losses) < 10 or not all(map(math.isnan, losses[-10:])),
              f"{stage}: no loss was finite in ten steps up to step {step}; try a lower rate")
        bar.set_postfix_str(f"loss {value:.4f}, lr {groups[0]['lr']:.1e}", refresh=False)
        if (step + 1) % config.save_every == 0 and step + 1 < steps and rank == 0:
            save_file({"run": asdict(config), "stage": stage, "losses": losses,
                       "seconds": time.time() - start, "model": model.state_dict(),
                       "optimizers": [optimizer.state_dict() for optimizer in optimizers]},
                      out / "resume.pt")
    return losses, time.time() - start


# ---- The evaluation --------------------------------------------------------------------------

ANSWER_TOKENS = 64  # the longest answer
SHORT = 4  # answers of up to so many words must match exactly


def single_questions(samples: Dataset, collate: Collate):
    """Each turn as a question, one `Sample` after the other, with the true turns before it and its
    right answers as `references`. Long answers to your own questions are of the kind "text". What
    is too long to be answered is printed and left out."""
    for n in range(len(samples)):
        sample = samples[n]
        for i, (question, truth) in enumerate(sample.turns):
            turns = sample.turns[:i] + [(question, None)]
            n_tokens = len(encode_turns(collate.tokenizer, turns, collate.n_rows)[0])
            if n_tokens + ANSWER_TOKENS > collate.max_len:
                print(f"not asked: {sample.name}, {n_tokens} tokens leave no room for an answer")
                break
            images = sample.images[:sum(text.count("<image>") for text, _ in turns)]
            truths = tuple(text.strip() for text in sample.references or (truth,))
            is_long = sample.kind == "answer" and len(truths[0].split()) > SHORT
            kind = "text" if is_long else sample.kind
            yield Sample(images, turns, kind, sample.name, truths)


def bleu4(answers: list[str], references: list[tuple[str, ...]]) -> float:
    """Corpus BLEU-4 in [0, 1]: the geometric mean of how many of the answers' runs of 1, 2, 3 and
    4 words are in a reference, times a penalty for being shorter than the reference nearest in
    length. Case does not count; signs are words. Source: Papineni et al. 2002 (P02-1040)."""
    right, total, length, nearest = Counter(), Counter(), 0, 0
    for given, truths in zip(answers, references):
        words, *others = (re.findall(r"\w+|[^\w\s]", text.lower()) for text in (given, *truths))
        length += len(words)
        nearest += min((abs(len(other) - len(words)), len(other)) for other in others)[1]
        for n in range(1, 5):
            runs, *allowed = (Counter(zip(*(t[i:] for i in range(n)))) for t in (words, *others))
            for run, count in runs.items():  # at most as often as one reference has it
                right[n] += min(count, max(other[run] for other in allowed))
            total[n] += sum(runs.values())
    if not all(right[n] for n in range(1, 5)):
        return 0.0
    precision = math.exp(sum(math.log(right[n] / total[n]) for n in range(1, 5)) / 4)
    return precision * math.exp(min(0, 1 - nearest / length))


def answer(model: MLLM, questions: list[Sample], collate: Collate, config: Config,
           blind: bool = False) -> list[str]:
    """The model's likeliest answer to each question; blind: shown the pictures of others."""
    device, end = next(model.parameters()).device, collate.tokenizer.end
    images = collate.images(questions)
    images = images.roll(len(images) // 2, dims=0) if blind else images
    prompts = []
    for question in questions:
        ids, _ = encode_turns(collate.tokenizer, question.turns, collate.n_rows)
        prompts.append(torch.tensor(ids))
    model.eval()
    with autocast(device, config):
        tokens = list(model.generate(prompts, images, ANSWER_TOKENS, end))
    rows = torch.stack(tokens, dim=1).tolist()
    return [collate.tokenizer.decode(row[:[*row, end].index(end)]).strip() for row in rows]


def score(questions: list[Sample], answers: list[str]) -> dict[str, float]:
    """The share of exact matches, by kind of question and of "all"; for long answers "bleu4"."""
    right, texts = defaultdict(list), []
    for question, given in zip(questions, answers):
        if question.kind == "text":
            texts.append((given, question.references))
        else:
            for kind in (question.kind, "all"):
                right[kind].append(given in question.references)
    kinds = sorted(right, key=lambda kind: (kind == "all", kind))
    scores = {kind: sum(right[kind]) / len(right[kind]) for kind in kinds}
    return scores | ({"bleu4": bleu4(*zip(*texts))} if texts else {})


def examine(model: MLLM, samples: Dataset, collate: Collate, config: Config):
    """The questions (only the first hundred keep their pictures) and the answers to them: "right",
    the model's; "blind", those it gives when shown the picture of another question; "floor", the
    most frequent answer to each kind of question. Guessing gets half of all yes or no questions:
    only right - blind comes from the picture."""
    asked, counts, questions = single_questions(samples, collate), defaultdict(Counter), []
    given = {"right": [], "blind": []}
    while some := [question for _, question in zip(range(100), asked)]:  # the next hundred
        given["right"] += answer(model, some, collate, config)
        given["blind"] += answer(model, some, collate, config, blind=True)
        # Photographs are large: those of all questions would not fit in memory.
        questions += [replace(question, images=[]) for question in some] if questions else some
    for question in questions:
        counts[question.kind].update(question.references)
    given["floor"] = [counts[question.kind].most_common(1)[0][0] for question in questions]
    return questions, given


METRICS = {"qa": "qa_accuracy", "qa_unseen": "qa_accuracy_unseen",
           "description": "description_exact", "language": "reading_accuracy"}


def evaluate(model: MLLM, task: Task, collate: Collate, config: Config, out: Path) -> dict:
    """Question the model about held-out pictures: tables, samples.png, and the metrics."""
    metrics, pictures, texts = {}, [], []
    for name, samples in task.test.items():
        questions, given = examine(model, samples, collate, config)
        few = {question.references for question in questions if question.kind == "answer"}
        for question in questions:
            if question.kind == "answer" and len(few) <= 20:  # a line of the table for each class
                question.kind = question.references[0]
        n = Counter(question.kind for question in questions)
        n["bleu4"], n["all"] = n["text"], len(questions) - n["text"]
        scores = {column: score(questions, answers) for column, answers in given.items()}
        metrics[f"{METRICS[name]}_by_kind"] = scores
        print(f"\n{name:12} questions    right    blind    right - blind    floor")
        for kind in scores["right"]:
            right, blind, floor = (scores[column][kind] for column in ("right", "blind", "floor"))
            print(f"{kind:12} {n[kind]:9} {right:8.3f} {blind:8.3f} {right - blind:+16.3f} "
                  f"{floor:8.3f}")
            if kind in ("all", "bleu4"):
                metric = METRICS[name] if kind == "all" else kind
                metrics |= {metric: right, f"{metric}_blind": blind, f"{metric}_floor": floor}
        for question, mine in list(zip(questions, given["right"]))[:8]:
            if question.images and name.startswith("qa"):
                truth = f'it is "{question.references[0][:60]}"'
                verdict = "right" if mine in question.references else truth
                words = question.turns[-1][0].replace("<image>", "").strip()
                pictures.append(question.images[0])
                texts.append(f"{words[:100]}\n{mine[:60]}  ({verdict})")
    if pictures:
        contact_sheet(pictures, texts).save(out / "samples.png")
    return metrics


# ---- The program -----------------------------------------------------------------------------

FLAGS = {  # those that set a field of `Config`; --set changes all others
    "recipe": "what is trainable when: " + ", ".join(RECIPES),
    "connector": "between ViT and projector, instead of the recipe's: " + ", ".join(CONNECTORS),
    "data": "your own: LLaVA JSON or JSONL, or a folder of classes or captions; default: scenes",
    "val": "the same, to be measured on; default: every 20th picture of --data",
    "images": "folder of their pictures; default: images/ or image/ beside the file",
    "vit": "folder of a published CLIP or BLIP-2 to take the ViT from",
    "qformer": "folder of a published BLIP-2 to take the Q-Former from",
    "llm": "folder of a published language model of the LLaMA family or Qwen2",
    "batch-size": "samples for each step of the optimizer",
    "seed": "of weights, data and order",
    "eval-samples": "how many held-out samples the model is questioned about",
} | {f"{stage}-samples": f"length of the stage {stage!r}" for stage in STAGES}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a multimodal language model.")
    add = parser.add_argument
    add("--out", type=Path, default=Path("out"), help="folder for weights, metrics and pictures")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, ...")
    add("--preset", choices=PRESETS, help="all settings at once; default: the device's")
    add("--stage", choices=(*STAGES, "evaluate"), help="run this one alone")
    add("--resume", action="store_true",
        help="go on where a run was interrupted, with its settings, to the end of all stages")
    add("--set", action="append", default=[], metavar="NAME=VALUE",
        help="any other field of Config: --set align_lr=1e-3 --set vit.dim=256")
    add("--skip-bad", action="append_const", dest="set", const="skip_bad=true",
        help="leave unusable records out instead of stopping")
    add("--augment", action="append_const", dest="set", const="augment=true",
        help="move and flip your own pictures at random in training; not where \"left\" matters")
    add("--image-size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="in pixels")
    for name, text in FLAGS.items():
        field = name.replace("-", "_") + ("_folder" if name in ("vit", "qformer", "llm") else "")
        add(f"--{name}", action="append", dest="set", help=text, metavar="VALUE",
            type=lambda value, field=field: f"{field}={value}")
    return parser.parse_args(arguments)


def with_setting(config: Config, assignment: str) -> Config:
    """The config with "name=value" or "part.name=value". Raises ValueError for an unknown name,
    with the nearest known one, or for a value of another type."""
    name, _, value = assignment.partition("=")
    known = asdict(config)
    for part in ("vit", "qformer", "projector", "decoder", "scenes"):
        known |= {f"{part}.{key}": old for key, old in known.pop(part).items()}
    nearest = difflib.get_close_matches(name, known, 1, 0)[0]
    check(name in known, f"--set {assignment}: there is no {name!r}; the nearest is {nearest!r}")
    kind = type(known[name])
    if kind is not str:
        try:
            value = ast.literal_eval(value.capitalize() if value in ("true", "false") else value)
        except (ValueError, SyntaxError):
            pass
        value = float(value) if kind is float and type(value) is int else value
    check(type(value) is kind, f"{assignment}: expected {kind.__name__}, as {known[name]!r}")
    part, _, key = name.rpartition(".")
    return replace(config, **{part: getattr(config, part) | {key: value}} if part else {key: value})


def settings(arguments: argparse.Namespace) -> Config:
    """The preset, or what the stage before was run with, under what the command line says."""
    config = PRESETS[arguments.preset or ("gpu" if "cuda" in arguments.device else "cpu")]
    every, is_first = (*STAGES, "evaluate"), True
    for stage in every[:every.index(arguments.stage)] if arguments.stage else ():
        path = arguments.out / f"{stage}.pt"
        if path.exists() and not arguments.preset:
            config, is_first = Config(**load_file(path, ["run"])["run"]), False
    for assignment in arguments.set:
        config = with_setting(config, assignment)
    for part, (sizes, _) in published_parts(config).items() if is_first else ():
        config = replace(config, **{part: getattr(config, part) | sizes})
    if arguments.image_size:
        config = replace(config, vit=config.vit | {"image_size": tuple(arguments.image_size)})
    check_config(config)
    return config


def check_config(config: Config) -> None:
    """Raises ValueError for settings that cannot work."""
    counts = ["batch_size", "contrast_every", "save_every", "eval_samples", "language_turns",
              "instruct_turns", *(f"{stage}_samples" for stage in STAGES)]
    for name in counts:
        check(getattr(config, name) > 0, f"{name} must be at least 1, got {getattr(config, name)}")
    for name, value, known in (("recipe", config.recipe, RECIPES),
                               ("connector", config.connector or "qformer", CONNECTORS)):
        check(value in known, f"unknown {name} {value!r}: use one of {', '.join(known)}")
    check(0 <= config.qformer_drop_last < config.qformer["n_layers"],
          f"qformer_drop_last {config.qformer_drop_last} must leave a block of the Q-Former")
    check(bool(config.data) or not config.val + config.images, "--val and --images need --data")
    check(not config.qformer_folder or bool(config.vit_folder),
          "BLIP-2's Q-Former needs the features of its own ViT: give --vit, too")
    check(config.bf16 or not config.half_frozen, "half_frozen needs bf16: types would not match")
    world = rank_and_world()[1]
    check(config.batch_size % world == 0, f"batch_size must divide into {world} parts")


def run_stage(stage: str, task: Task, tokenizer: Tokenizer, config: Config, out: Path,
              device: torch.device, state: dict | None) -> None:
    """Train one stage and write its weights."""
    (model, trained), shares = start_of(config, stage, tokenizer, out), shares_of(config, stage)
    model.to(device).train_only(shares)
    if config.half_frozen and stage not in STAGE_0:
        model.cast_frozen()
    if state:
        model.load_state_dict(state["model"])
    print(f"\n{stage}: {getattr(config, f'{stage}_samples')} samples, recipe {config.recipe}, "
          f"connector {model.config.connector}, adapters on {model.config.lora_on} rows")
    for part in PARTS:
        n = sum(p.numel() for name, p in model.named_parameters() if part_of(name) == part)
        rate = shares.get(part, 0) * getattr(config, f"{stage}_lr")
        print(f"  {part:10} {n:>12,} parameters  {f'rate {rate:.1e}' if rate else 'frozen':12}  "
              f"{'trained before' if part in trained else 'fresh'}")
    collate = collate_for(model, tokenizer, config)
    losses, seconds = train_stage(model, stage, task, collate, config, out, state)
    if rank_and_world()[0] == 0:
        model.save(out / f"{stage}.pt", run=asdict(config), trained=sorted({*trained, *shares}),
                   losses=losses, seconds=seconds)
    wait_for_all()  # the next stage starts from this file


def collate_for(model: MLLM, tokenizer: Tokenizer, config: Config) -> Collate:
    size = config.vit["image_size"]
    return Collate(tokenizer, model.config.n_rows(size), size, model.config.max_len)


def rehearse(stages: list[str], task: Task, tokenizer: Tokenizer, config: Config) -> None:
    """Build each model without memory, find its data: better an error now than after hours."""
    for stage in stages:
        task.train(stage)
        with torch.device("meta"):
            model = MLLM(model_config(config, stage, tokenizer))
        model.train_only(shares_of(config, stage))
        make_optimizers(model, config, stage)
        rows = model.config.n_rows(config.vit["image_size"]) if stage != "language" else 0
        check(rows + ANSWER_TOKENS < config.max_len, f"an image of {rows} rows leaves no room for "
              f"text within max_len {config.max_len}")
        check(stage != "vision" or not config.itm_weight or config.batch_size > rank_and_world()[1],
              "ITM needs two samples in each process: raise batch_size or --set itm_weight=0.0")


def finish(stages: list[str], task: Task, tokenizer: Tokenizer, config: Config, out: Path,
           device: torch.device) -> None:
    """Evaluate the model, draw the curves of its stages, write metrics.json."""
    start, model = time.time(), MLLM.load(out / "instruct.pt").to(device)
    metrics = evaluate(model, task, collate_for(model, tokenizer, config), config, out)
    losses, seconds = {}, {"evaluate": time.time() - start}
    for stage in stages:
        if (out / f"{stage}.pt").exists():
            checkpoint = load_file(out / f"{stage}.pt")
            losses[stage], seconds[stage] = checkpoint["losses"], checkpoint["seconds"]
    draw_curves(losses, out / "curves.png")
    ends = {stage: torch.tensor(values[-40:]).nanmean().item() for stage, values in losses.items()}
    metrics |= {"seconds": sum(seconds.values()), "seconds_by_stage": seconds, "loss_at_end": ends}
    (out / "metrics.json").write_text(json.dumps(metrics | {"config": asdict(config)}, indent=2))
    (out / "resume.pt").unlink(missing_ok=True)  # there is nothing left to resume
    print(f"\n{sum(seconds.values()):.0f} s; {out}/ has metrics.json, curves.png and samples.png. "
          f"Try: python sample.py --out {out}")


def main() -> None:
    arguments = parse_arguments()
    out, device = arguments.out, join_processes(torch.device(arguments.device))
    is_first = rank_and_world()[0] == 0
    check(device.type != "cuda" or torch.cuda.is_available(), "there is no CUDA device")
    torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN's attention plans anew for each length
    out.mkdir(parents=True, exist_ok=True)
    state = load_file(out / "resume.pt", ["run"]) if arguments.resume else None
    config = Config(**state["run"]) if state else settings(arguments)
    check(device.type != "cuda" or not config.bf16 or torch.cuda.is_bf16_supported(False),
          "this GPU has no bfloat16 of its own, which would be slow: --set bf16=false")
    needed, task = stages_of(config), Task(config)
    stages = [arguments.stage] if arguments.stage else needed
    if state:
        stages = needed[needed.index(state["stage"]):]
    check({*stages} <= {*needed, "evaluate"}, f"{stages[0]!r} is not needed: weights are given")
    if stages[0] == needed[0] and not state and is_first:
        make_tokenizer(config, task).save(out / "tokenizer.json")
        (out / "resume.pt").unlink(missing_ok=True)  # of an earlier run
    wait_for_all()
    tokenizer = Tokenizer.load(out / "tokenizer.json")
    to_train = [stage for stage in stages if stage != "evaluate"]
    rehearse(to_train, task, tokenizer, config)
    for stage in to_train:
        run_stage(stage, task, tokenizer, config, out, device, state)
        state = None
    if is_first and stages[-1] in ("instruct", "evaluate"):
        finish(needed, task, tokenizer, config, out, device)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: {error}")
    except KeyboardInterrupt:
        sys.exit("train.py: stopped; --resume goes on from the last saved state")
