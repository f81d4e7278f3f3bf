"""Train the model: `python train.py`, six minutes on two CPU cores, no downloads.

    stage      what it sees               what it stands for
    read       text                       a pretrained language model
    see        pictures and their text    a pretrained BLIP-2 (losses ITC + ITM + ITG)
    align      short, noisy captions      stage 1 of the papers
    instruct   questions, descriptions    stage 2 of the papers

The papers start from downloaded parts; `read` and `see` (stage 0) make small stand-ins for those that are not given
(`--vit`, `--qformer`, `--llm`). Each stage starts from the weight file of the one before and writes its own,
`out/<stage>.pt`. At the end the model is questioned about pictures it never saw: `metrics.json`, `curves.png` and
`samples.png` in `out/`.

    python train.py                           everything, with the preset of your device
    python train.py --recipe minigpt4         another published choice of who learns when
    python train.py --stage instruct          one stage, from out/align.pt
    python train.py --resume                  go on where an interrupted run stopped
    python train.py --data my.json            your own pictures and conversations, or a folder of captions
    python train.py --download NAME           fetch a published model; then --vit, --qformer or --llm NAME
    torchrun --nproc_per_node=4 train.py      on four GPUs, or in four processes: batches are shared out

Left out on purpose: exponential averages of weights, early stopping.
"""
import argparse
import hashlib
import json
import math
import os
import random
import re
import signal
import sys
import threading
import time
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from http.client import HTTPException
from itertools import islice
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from data import (NOT_LEARNED, Collate, Conversations, Sample, SceneSpec, Scenes, Tokenizer, contact_sheet, corpus,
                  encode_turns, read_image)
from model import (CONNECTORS, GPT, MERGED, MLLM, PARTS, PIXELS, ModelConfig, ViT, gpt_options, part_of, read_whole,
                   vit_options, write_whole)
from qformer import QFormer, qformer_options, read_json

STAGES = ("read", "see", "align", "instruct")

# Which parts learn in each stage; all others are frozen. This table decides it, the report prints it.
# Stage 0 stands in for downloads and is the same for all.
STAGE_0 = {"read": ("decoder",), "see": ("vit", "qformer")}
WHO_LEARNS = {
    # All between ViT and decoder learns, as in BLIP-2 (arXiv 2301.12597, section 3.2), with Partial LoRA.
    "blip2_plora": STAGE_0 | {"align": ("qformer", "projector", "plora"),
                              "instruct": ("qformer", "projector", "plora")},
    # arXiv 2304.10592, section 3: one linear layer.
    "minigpt4": STAGE_0 | {"align": ("projector",), "instruct": ("projector",)},
    # The two-stage recipe of low-rank adapters (arXiv 2106.09685), on every token or on those of images.
    "lora": STAGE_0 | {"align": ("projector",), "instruct": ("plora",)},
    "plora": STAGE_0 | {"align": ("projector",), "instruct": ("plora",)},
    # arXiv 2401.16420, section 3.
    "xcomposer2": STAGE_0 | {"align": ("vit", "projector", "plora"),
                             "instruct": ("vit", "projector", "plora", "decoder")},
    # A fusion layer between two frozen models.
    "frozen": STAGE_0 | {"align": ("projector",), "instruct": ("projector",)},
}
LORA_ON = {"lora": "all"}                # recipes whose adapters change other rows than those of images
# Settings of the model that a stage may change; all others stay those of the weights it starts from.
MAY_CHANGE = {
    "see": ("patch_size", "vit_dim", "vit_layers", "vit_heads", "qformer_dim", "qformer_layers", "qformer_heads",
            "n_queries", "qformer_drop_last"),
    "align": ("qformer_drop_last", "connector", "projector", "projector_hidden_dim", "projector_activation",
              "projector_norm", "r", "alpha", "lora_on"),
    "instruct": (),
}
# Settings that follow from others and are no flags.
DERIVED = ("lora_on", "text_branch", "pad_id", "image_id", "pixel_mean", "pixel_std", "vit_options", "qformer_options",
           "decoder_options")
ANY_TIME = ("image_size", "fit", "drop_path_rate", "use_grad_checkpoint", "qformer_dropout", "lora_dropout", "max_len")


@dataclass(frozen=True)
class Config(ModelConfig):
    """A whole run: the model's sizes, how much of what it sees, how it learns, how it is measured."""
    vocab_size: int = 1024               # at most; the tokenizer stops earlier when no pair repeats
    image_size: tuple[int, int] = (48, 48)
    vit: str = ""                        # published weights to start from, a folder or a downloaded name, see README
    vit_drop_last: int = 0               # how many of its last blocks are left out
    qformer: str = ""
    llm: str = ""
    data: str = ""                       # LLaVA JSON(L) or folder of captions to learn from; empty: built-in scenes
    val: str = ""                        # the same to be measured on; empty: every 20th record of data
    images: str = ""                     # folder of their pictures; empty: images/ or image/ beside the JSON
    skip_bad: bool = False               # leave unusable records out instead of stopping
    min_words: int = 5                   # fewest in a caption that `instruct` imitates
    recipe: str = "blip2_plora"
    n_colors: int = 5
    n_shapes: int = 4
    n_places: int = 5
    max_things: int = 3
    read_turns: int = 2                  # questions about each description; with more, earlier turns
                                         # offer their words for matching in the description's place
    instruct_turns: int = 3              # questions about each picture
    read_samples: int = 46_000
    see_samples: int = 32_000
    align_samples: int = 6_400
    instruct_samples: int = 34_000
    batch_size: int = 64                 # samples for each step of the optimizer
    accumulate: int = 1                  # micro-batches that make up a batch
    read_lr: float = 3.5e-3              # peak learning rates of each stage, for Muon
    see_lr: float = 6e-3
    align_lr: float = 6e-3
    instruct_lr: float = 8e-3
    vit_lr: float = 1.0                  # share of the rate that a part gets in align and instruct; 0: frozen
    qformer_lr: float = 1.0
    projector_lr: float = 1.0
    plora_lr: float = 1.0
    decoder_lr: float = 1.0
    ffn_lr: float = 0.1                  # of that, the decoder's feed-forward nets get so much: they learn what words
                                         # go together, attention learns to look it up
    vision_adamw_lr: float = 0.5         # of that, all but hidden matrices of ViT and Q-Former get so much
    itc_weight: float = 0.1              # of the losses beside ITG; 0 leaves one out
    itm_weight: float = 0.1
    contrast_every: int = 4              # ITC and ITM take a quarter of the samples, in one step of so many; 0: in none
    weight_decay: float = 0.0
    warmup: float = 0.05                 # share of the steps until the peak
    clip: float = 1.0                    # largest norm of the gradient
    bf16: bool = True                    # matrix products in bfloat16 (autocast)
    half_frozen: bool = False            # after stage 0, what is frozen is kept (and saved) in bfloat16
    workers: int = 1                     # processes that prepare data
    eval_samples: int = 1000
    save_every: int = 200                # steps between two states to resume from
    shard: bool = False                  # split the model over the processes of torchrun, where it is too large for one
    seen_gb: float = 4.0                 # memory for what frozen ViT and Q-Former make of own pictures, see `see_once`
    keep_seen: bool = False              # and keep it in `out` for the next run
    seed: int = 0


PRESETS = {
    "cpu": Config(),
    "gpu": Config(image_size=(112, 112), patch_size=14, vit_dim=384, vit_layers=6, vit_heads=6,
                  qformer_dim=384, qformer_layers=6, qformer_heads=6, n_queries=32,
                  dim=512, n_layers=8, n_heads=8, n_kv_heads=4, r=64, alpha=256,
                  n_colors=6, n_places=9, max_things=5, read_turns=3, instruct_turns=6,
                  batch_size=256, workers=12, read_samples=400_000, see_samples=400_000,
                  align_samples=100_000, instruct_samples=300_000),
}


def model_config(config: Config, tokenizer: Tokenizer) -> ModelConfig:
    """The model's part of the settings, with the vocabulary that the tokenizer really has."""
    values = {field.name: getattr(config, field.name) for field in fields(ModelConfig)}
    return ModelConfig(**values | {"vocab_size": tokenizer.vocab_size, "pad_id": tokenizer.pad,
                                   "image_id": tokenizer.image})


# ---- Published parts ------------------------------------------------------------------------------

def cache_folder(name: str) -> Path:
    """Where `download` puts a published model."""
    return Path(torch.hub.get_dir()) / "published" / name


def find_folder(name: str) -> Path:
    """The folder of a published model, given as a path or by the name that it was downloaded under."""
    if Path(name).is_dir():
        return Path(name)
    if not cache_folder(name).is_dir():
        raise FileNotFoundError(f"there is no folder {name} and no {cache_folder(name)}: "
                                f"run `python train.py --download {name}` first")
    return cache_folder(name)


def download(name: str) -> Path:
    """Fetch what is needed of a public Hugging Face repository; files that are there already stay. Sizes are checked,
    and SHA-256 of what is published with one (the weights). Raises ValueError, offline one that says what to do."""
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        raise ValueError(f"{name!r} is no name of a repository, like HuggingFaceTB/SmolLM2-135M")
    source, folder = os.environ.get("HF_ENDPOINT", "https://huggingface.co"), cache_folder(name)
    texts = ("config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json")
    try:
        with urllib.request.urlopen(f"{source}/api/models/{name}/tree/main", timeout=30) as answer:
            files = {entry["path"]: entry for entry in json.load(answer) if entry["type"] == "file"}
        weights = [path for kind in (r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?",
                                     r"pytorch_model(-\d+-of-\d+)?\.bin(\.index\.json)?")
                   for path in files if re.fullmatch(kind, path)]
        if not weights:
            raise ValueError("it has no weights in a form that is known here")
        is_safe = any(path.startswith("model") for path in weights)
        folder.mkdir(parents=True, exist_ok=True)
        for path in [text for text in texts if text in files] + [path for path in weights
                                                                 if path.startswith("model") == is_safe]:
            size, lfs = files[path]["size"], files[path].get("lfs") or {}
            if (folder / path).is_file() and (folder / path).stat().st_size == size:
                continue
            print(f"{folder / path}: {size / 1e6:.1f} MB")
            torch.hub.download_url_to_file(f"{source}/{name}/resolve/main/{path}", str(folder / path),
                                           lfs.get("oid", "").removeprefix("sha256:") or None)
            if (folder / path).stat().st_size != size:
                (folder / path).unlink()
                raise OSError(f"{path} has not the {size} bytes that are published")
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, HTTPException) as error:
        raise ValueError(f"cannot download {name} from {source} ({error}). Or put its {', '.join(texts)} and weights "
                         f"(model*.safetensors or pytorch_model*.bin, with the .index.json if there is one) into "
                         f"{folder}") from error
    return folder


def normalisation(folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the pixels that a published ViT was trained with."""
    path = folder / "preprocessor_config.json"
    content = read_json(path) if path.is_file() else {}
    mean, std = (content.get(f"image_{name}") or PIXELS[name] for name in ("mean", "std"))
    if not all(isinstance(values, (list, tuple)) and len(values) == 3 and
               all(isinstance(value, (int, float)) and value > 0 for value in values) for values in (mean, std)):
        raise ValueError(f"{path}: image_mean and image_std must be three positive numbers, got {mean} and {std}")
    return tuple(mean), tuple(std)


def with_published(config: Config, given: set[str]) -> Config:
    """The settings, with the sizes of the published parts in the place of ours. given: names of the settings that were
    asked for; raises ValueError when a part has another size."""
    asked = {name: getattr(config, name) for name in given - {"image_size"}}
    if config.vit:
        folder = find_folder(config.vit)
        sizes, (mean, std) = vit_options(read_json(folder / "config.json")), normalisation(folder)
        side, depth = sizes.pop("image_size"), sizes.pop("n_layers")
        if not 0 <= config.vit_drop_last < depth:
            raise ValueError(f"vit_drop_last {config.vit_drop_last} must leave at least one of {depth} blocks")
        config = replace(config, patch_size=sizes.pop("patch_size"), vit_dim=sizes.pop("dim"),
                         vit_layers=depth - config.vit_drop_last, vit_heads=sizes.pop("n_heads"), vit_options=sizes,
                         image_size=config.image_size if "image_size" in given else (side, side),
                         pixel_mean=mean, pixel_std=std)
    if config.qformer:
        sizes = qformer_options(read_json(find_folder(config.qformer) / "config.json"))
        from_bert, n_queries = bool(sizes.pop("vocab_size", 0)), sizes.pop("n_queries")
        sizes.pop("encoder_width")
        if not from_bert and not config.vit:
            raise ValueError("BLIP-2's Q-Former reads what its own ViT sees: give --vit, too")
        config = replace(config, qformer_dim=sizes.pop("dim"), qformer_layers=sizes.pop("n_layers"),
                         qformer_heads=sizes.pop("n_heads"), n_queries=config.n_queries if from_bert else n_queries,
                         text_branch=from_bert, qformer_options=sizes)
    if config.llm:
        content = read_json(find_folder(config.llm) / "config.json")
        sizes, longest = gpt_options(content), content.get("max_position_embeddings")
        if isinstance(longest, int) and config.max_len > longest:
            raise ValueError(f"max_len {config.max_len} is more than the {longest} tokens that {config.llm} can read")
        names = ("dim", "n_layers", "n_heads", "n_kv_heads", "rope_theta", "qkv_bias")
        config = replace(config, **{name: sizes.pop(name) for name in names}, decoder_options=sizes)
    for name, value in asked.items():
        if getattr(config, name) != value:
            raise ValueError(f"{name} is {getattr(config, name)!r} in the published part, but {value!r} is asked for")
    return config if config.text_branch else replace(config, qformer_drop_last=0)


def published_parts(config: Config, asked: ModelConfig) -> dict[str, nn.Module]:
    """The parts that start from published weights."""
    parts = {}
    if config.vit:
        parts["vit"] = ViT.from_pretrained(find_folder(config.vit), config.vit_drop_last,
                                           drop_path_rate=asked.drop_path_rate,
                                           use_grad_checkpoint=asked.use_grad_checkpoint)
    if config.qformer:
        parts["qformer"] = QFormer.from_pretrained(
            find_folder(config.qformer), encoder_width=asked.vit_dim, n_queries=asked.n_queries, pad_id=asked.pad_id,
            dropout=asked.qformer_dropout, vocab_size=asked.vocab_size if asked.text_branch else 0)
    if config.llm:
        parts["decoder"] = GPT.from_pretrained(find_folder(config.llm), r=asked.r, alpha=asked.alpha,
                                               lora_dropout=asked.lora_dropout)
    return parts


def stages_of(config: Config) -> tuple[str, ...]:
    """The stages of a run: published parts need no stand-ins. BERT is no Q-Former yet, `see` makes it one."""
    can_see = config.vit and (config.connector in MERGED or config.qformer and not config.text_branch)
    return tuple(stage for stage in STAGES if not (stage == "read" and config.llm or stage == "see" and can_see))


def make_tokenizer(config: Config, task: "Task") -> Tokenizer:
    """The language model's own, or one trained on the texts of the run."""
    if not config.llm:
        return Tokenizer.train(corpus(task.train("read")), config.vocab_size)
    path = find_folder(config.llm) / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: put one there that has the same ids (for Vicuna, TinyLlama's)")
    tokenizer = Tokenizer.load(path)
    if tokenizer.end is None:
        raise ValueError(f"{path}: no end symbol is known; tokenizer_config.json beside it names it as 'eos_token'")
    if tokenizer.pad > config.decoder_options["vocab_size"]:
        raise ValueError(f"{path} has {tokenizer.pad} ids, but the model knows {config.decoder_options['vocab_size']}")
    return tokenizer


# ---- What a stage trains on -----------------------------------------------------------------------

GROUP = 16                               # batches among which samples are exchanged for those of like length
                                         # (by the training process, which makes the text of a scene for that)


class Task:
    """The data of a run: built-in scenes, or your own conversations.

    `train(stage)` is the dataset of a stage, `test` what the model is questioned about in the end.
    """

    def __init__(self, config: Config):
        self.config, self.own, self.stages = config, None, {}
        self.spec = SceneSpec(config.image_size[0], config.n_colors, config.n_shapes, config.n_places,
                              config.max_things)
        n = config.eval_samples
        if config.data:
            self.own = self.conversations(config.data)
            held_out = self.conversations(config.val) if config.val else self.own.split(20)
            held_out = held_out.for_task("test")
            self.test = {"qa": Subset(held_out, range(min(n, len(held_out))))}
        else:
            self.test = {"qa": Scenes(self.spec, "question", n, "test", config.seed),
                         "qa_unseen": Scenes(self.spec, "question", n, "unseen", config.seed),
                         "description": Scenes(self.spec, "describe", n // 2, "test", config.seed),
                         "read": Scenes(self.spec, "read", n // 2, "test", config.seed, n_turns=1)}

    def conversations(self, path: str) -> Conversations:
        c = self.config
        records = Conversations(path, c.images, c.skip_bad, c.min_words)
        for reason in records.skipped:
            print(f"skipped {reason}")
        return records

    def train(self, stage: str) -> Scenes | Conversations:
        c = self.config
        if stage in self.stages:
            return self.stages[stage]
        if self.own:
            dataset = self.own.for_task(stage)
            if dataset.cleaned:
                print("captions: " + ", ".join(f"{count} {what}" for what, count in dataset.cleaned.items()))
        else:
            n_turns = c.read_turns if stage == "read" else c.instruct_turns
            dataset = Scenes(self.spec, stage, 2**40, "train", c.seed, n_turns)
        return self.stages.setdefault(stage, dataset)

    def order(self, stage: str, step: int) -> Iterator[int]:
        """Which samples the steps from `step` on see: a function of seed and stage alone, so that a resumed run sees
        just what an uninterrupted one would have seen.

        A batch is as long as its longest sample. So in `read` the samples of `GROUP` batches at a time are sorted by
        length, and these batches shuffled. In the other stages lengths differ less, and batches of all lengths teach
        more.
        """
        c, dataset, size = self.config, self.train(stage), self.config.batch_size
        n, stop = len(dataset), steps_of(c, stage) * size
        if self.own:
            order = []
            for epoch in range(stop // n + 1):
                generator = torch.Generator().manual_seed(c.seed + 1000 * STAGES.index(stage) + epoch)
                order += torch.randperm(n, generator=generator).tolist()
        else:                                                 # no scene twice
            order = range(sum(stage_samples(c, earlier) for earlier in STAGES[:STAGES.index(stage)]), n)
        if stage != "read":
            yield from order[step * size:stop]
            return
        group = min(GROUP, max(1, n // size)) * size          # few records do not fill a batch with one
        parts = c.accumulate * rank_and_world()[1]
        for start in range(step * size // group * group, stop, group):
            samples = sorted(order[start:min(start + group, stop)], key=dataset.length)
            batches = [samples[i:i + size] for i in range(0, len(samples), size)]
            random.Random(f"{c.seed} {start}").shuffle(batches)
            for batch in batches[max(0, step - start // size):]:
                for part in range(parts):                     # each micro-batch gets texts of all lengths in it
                    yield from batch[part::parts]

    def names(self, stage: str, step: int) -> list[str]:
        """The names of the samples of a step."""
        return [self.train(stage)[i].name for i in islice(self.order(stage, step), self.config.batch_size)]

    def batches(self, stage: str, collate: Collate, step: int) -> DataLoader:
        """Micro-batches from `step` on, of each the part of this process."""
        c, (rank, world) = self.config, rank_and_world()
        sampler, n = self.order(stage, step), c.batch_size // c.accumulate // world
        if world > 1:
            sampler = (index for i, index in enumerate(sampler) if i // n % world == rank)
        if stage == "see":                                    # published Q-Formers know so many positions
            longest = min(c.max_len, c.qformer_options.get("max_text_len", c.max_len))
            collate_fn = replace(collate, max_len=longest).pairs
        else:
            collate_fn = collate.conversations
        return DataLoader(self.train(stage), n, sampler=sampler, num_workers=c.workers, collate_fn=collate_fn,
                          worker_init_fn=leave_ctrl_c)


def leave_ctrl_c(worker: int) -> None:
    """A worker goes on at Ctrl-C, which is for the process that trains."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def make_collate(tokenizer: Tokenizer, config: ModelConfig) -> Collate:
    return Collate(tokenizer, config.n_rows, config.image_size, config.max_len, config.fit, config.pixel_mean,
                   config.pixel_std)


def stage_samples(config: Config, stage: str) -> int:
    return getattr(config, f"{stage}_samples")


def steps_of(config: Config, stage: str) -> int:
    return max(1, stage_samples(config, stage) // config.batch_size)


def peak_rate(config: Config, stage: str, part: str) -> float:
    """The highest learning rate of a part: the stage's, after stage 0 times the part's share."""
    return getattr(config, f"{stage}_lr") * (1.0 if stage in STAGE_0 else getattr(config, f"{part}_lr"))


def who_learns(config: Config, stage: str) -> tuple[str, ...]:
    """The recipe's parts for a stage, but for those whose rate is 0 and, in `see`, a published ViT. Raises ValueError
    when none is left."""
    learns = tuple(part for part in WHO_LEARNS[config.recipe][stage] if peak_rate(config, stage, part)
                   and not (stage == "see" and part == "vit" and config.vit))
    if not learns:
        raise ValueError(f"nothing would learn in {stage!r}: recipe {config.recipe!r} trains "
                         f"{', '.join(WHO_LEARNS[config.recipe][stage])} there, at a rate of 0")
    return learns


# ---- Several processes ----------------------------------------------------------------------------

def rank_and_world() -> tuple[int, int]:
    """The number of this process and how many there are: 0 and 1 without `torchrun`."""
    return (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)


def join_processes(device: torch.device) -> torch.device:
    """Meet the other processes of `torchrun`, if it started this one. Returns the device of this process; only the
    first one prints and writes."""
    if "RANK" not in os.environ:
        return device
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if rank_and_world()[0]:
        sys.stdout = open(os.devnull, "w")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return device


def wait_for_all() -> None:
    if distributed.is_initialized():
        distributed.barrier()


def mean_of_all(values: Tensor) -> Tensor:
    """The mean over all processes."""
    if distributed.is_initialized():
        distributed.all_reduce(values)
        values = values / rank_and_world()[1]
    return values


def over_processes(loss_of: "StageLoss", shard: bool, device: torch.device) -> nn.Module:
    """The loss as all processes compute it together, each with its part of the batch.

    shard: each parameter is split over them (torch's FSDP2, arXiv 2304.11277); a block of the decoder is put together
    when it computes and let go after it, all else while the loss is computed.
    """
    if not shard:                                             # not all losses use all heads
        return DistributedDataParallel(loss_of, find_unused_parameters=True) if rank_and_world()[1] > 1 else loss_of
    mesh = init_device_mesh(device.type, (rank_and_world()[1],))
    for module in (*loss_of.model.decoder.blocks, loss_of):
        fully_shard(module, mesh=mesh)
    return loss_of


def put_together(state):
    """A state, dicts and lists of tensors, without its split tensors: whole ones on the CPU of the first process, which
    alone saves them."""
    if isinstance(state, dict):
        return {key: put_together(value) for key, value in state.items()}
    if isinstance(state, list):
        return [put_together(value) for value in state]
    if not isinstance(state, DTensor):
        return state
    whole = state.full_tensor()                               # all processes must take part
    return None if rank_and_world()[0] else whole.cpu()


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """`load_state_dict` of what `put_together` gave; where parameters are split, one tensor after the other is, too."""
    for i, group in enumerate(optimizer.param_groups):
        [parameter], state = group["params"], saved["state"].get(i, {})
        for key, value in state.items() if isinstance(parameter, DTensor) else ():
            if value.ndim:
                state[key] = distribute_tensor(value, parameter.device_mesh, parameter.placements)
    optimizer.load_state_dict(saved)


def share_of_tokens(batch: dict[str, Tensor], pad_id: int) -> Tensor | float:
    """The trained tokens of this process over the mean of all: a factor for its loss, with which the mean over
    processes is the mean over tokens."""
    if not distributed.is_initialized():
        return 1.0
    trained = batch["labels"][:, 1:] != NOT_LEARNED if "labels" in batch else batch["text"][:, 1:] != pad_id
    return trained.sum() / mean_of_all(trained.sum().float())


# ---- How a stage learns ---------------------------------------------------------------------------

def stage_loss(model: MLLM, stage: str, batch: dict[str, Tensor], config: Config, step: int = 0) -> Tensor:
    """nats: answers only, in `see` BLIP-2's three losses (arXiv 2301.12597, section 3.1).

    Differs: ITC and ITM run now and then and on a part of the batch, since ITM alone costs three passes, and with less
    weight, since on scenes this simple generation teaches more.
    """
    if stage == "read":
        return model(batch["input_ids"], None, batch["labels"])[1]
    if stage != "see":
        return model(**batch)[1]
    images, text = batch["images"], batch["text"]
    features = model.ln_vision(model.vit(images))                                 # (B, P, Dv)
    loss, queries = model.qformer.itg_loss(features, batch["to_generate"])
    if not config.contrast_every or step % config.contrast_every:
        return loss
    n = max(2, len(text) // 4)
    features, queries, text = features[:n], queries[:n], text[:n]
    if config.itc_weight or config.itm_weight:
        similarity = model.qformer.similarity(queries, text)                      # (n, n)
    if config.itc_weight:
        loss = loss + config.itc_weight * model.qformer.itc_loss(similarity)
    if config.itm_weight:
        loss = loss + config.itm_weight * model.qformer.itm_loss(features, text, similarity)
    return loss


class StageLoss(nn.Module):
    """`stage_loss` as a module, which is what several processes need, weighted by the trained tokens of each."""

    def __init__(self, model: MLLM, stage: str, config: Config):
        super().__init__()
        self.model, self.stage, self.config = model, stage, config

    def forward(self, batch: dict[str, Tensor], step: int) -> Tensor:
        loss = stage_loss(self.model, self.stage, batch, self.config, step)
        return loss * share_of_tokens(batch, self.model.config.pad_id)


def make_optimizers(model: MLLM, config: Config, stage: str) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices that learn, AdamW for all else that learns; frozen parameters are in neither.

    Muon (torch's own) makes each update orthogonal, which on these small models reaches in one pass what
    AdamW does not in many; `match_rms_adamw` scales it so that one learning rate fits all shapes.
    """
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = part_of(name)
        lr = peak_rate(config, stage, part)
        if part == "decoder" and name.split(".")[-2] in ("w1", "w2", "w3"):
            lr *= config.ffn_lr
        if parameter.ndim == 2 and not any(word in name for word in ("embedding", "head")):
            matrices.append(dict(params=[parameter], lr=lr))
        else:
            if part in ("vit", "qformer"):
                lr *= config.vision_adamw_lr
            decay = config.weight_decay if parameter.ndim > 1 else 0.0
            others.append(dict(params=[parameter], lr=lr, weight_decay=decay))
    optimizers = []
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, weight_decay=config.weight_decay,
                                           adjust_lr_fn="match_rms_adamw"))
    if others:
        optimizers.append(torch.optim.AdamW(others, betas=(0.9, 0.95)))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def schedule(step: int, steps: int, warmup: float) -> float:
    """Share of the peak learning rate at a step: linear warm-up, then half a cosine down to 2 %."""
    warm = max(1, int(warmup * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def autocast(device: torch.device, config: Config):
    return torch.autocast(device.type, torch.bfloat16, enabled=config.bf16)


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def read_pictures(collate: Collate, paths: list[Path]) -> Tensor:
    """(N, 3, height, width)"""
    return collate.images([Sample([read_image(path) for path in paths], [])])


@torch.no_grad()
def see_once(model: MLLM, dataset: Conversations, collate: Collate, config: Config, out: Path) -> dict[Path, Tensor]:
    """What a frozen ViT and Q-Former make of each picture of a dataset, (Q, Dq) float32 each, so that it is done once
    and not in each pass; {} where that would take more than `seen_gb`.

    With `keep_seen` it is also kept in a file, whose name is a digest of weights, preprocessing and pictures: what has
    become stale is not found.
    """
    paths = sorted({path for clips, *_ in dataset.records for clip in clips for path in clip})
    size = 4e-9 * len(paths) * model.config.n_rows * model.config.row_dim
    if size > config.seen_gb:
        print(f"what is seen in {len(paths)} pictures would take {size:.1f} GB: they are seen anew in each pass")
        return {}
    digest = hashlib.sha256(repr((collate.image_size, collate.fit, collate.mean, collate.std, config.bf16, [
        (str(path), os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in paths])).encode())
    for name, value in model.state_dict().items():
        if part_of(name) in ("vit", "qformer"):
            digest.update(name.encode() + value.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    file, device = out / f"seen_{digest.hexdigest()[:16]}.pt", next(model.parameters()).device
    if file.exists():
        return dict(zip(paths, read_whole(file, "cpu", ("rows",))["rows"]))
    model.eval()
    pictures, rows = DataLoader(paths, 64, num_workers=config.workers, collate_fn=partial(read_pictures, collate),
                                worker_init_fn=leave_ctrl_c), []
    for images in tqdm(pictures, "seeing each picture once", unit="batch", disable=rank_and_world()[0] > 0):
        with autocast(device, config):
            rows.append(model.see(images.to(device)).float().cpu())
    rows = torch.cat(rows) if rows else torch.empty(0)
    if config.keep_seen and rank_and_world()[0] == 0:
        write_whole({"rows": rows}, file)
    return dict(zip(paths, rows))


def save_state(out: Path, **state) -> None:
    """Write all that a run needs to go on as if it had never stopped; the state before stays beside it."""
    rank, world = rank_and_world()
    rng = [(torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None)] * world
    if world > 1:
        distributed.all_gather_object(rng, rng[0])
    if rank:
        return
    write_whole(state | {"rng": rng}, out / "resume_new.pt")
    for old, new in (("resume.pt", "resume_before.pt"), ("resume_new.pt", "resume.pt")):
        if (out / old).exists():
            os.replace(out / old, out / new)


def load_state(out: Path) -> dict:
    """The last state that is whole. Raises FileNotFoundError when there is none."""
    for name in STATES:
        try:
            return read_whole(out / name, "cpu", ("config", "stage", "losses", "seconds", "model", "optimizers",
                                                  "rng"))
        except FileNotFoundError:
            continue
        except ValueError as error:
            print(f"{error}: taking the state before")
    raise FileNotFoundError(f"nothing to resume: there is no whole {out / STATES[0]}")


STATES = ("resume.pt", "resume_before.pt")
SKIPPED = 10                             # so many steps in a row that had to be skipped stop a run


class CtrlC:
    """In a with-block, the first Ctrl-C sets `asked`, the second stops at once."""
    asked = False

    def __enter__(self) -> "CtrlC":
        if threading.current_thread() is threading.main_thread():                # no other may
            self.before = signal.signal(signal.SIGINT, self)
        return self

    def __call__(self, *_) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("\nCtrl-C: finishing this step; once more stops at once", file=sys.stderr)

    def __exit__(self, *_) -> None:
        if hasattr(self, "before"):
            signal.signal(signal.SIGINT, self.before)


def train_stage(model: MLLM, stage: str, task: Task, collate: Collate, config: Config, out: Path, start: float,
                device: torch.device, state: dict | None = None, ctrl_c: CtrlC = CtrlC()) -> list[float]:
    """Run one stage, or the rest of it from `state`, and return the loss of each step, NaN for those whose loss or
    gradient was not finite and which changed nothing.

    Raises ValueError naming the records when many steps in a row were such, KeyboardInterrupt after Ctrl-C.
    """
    (rank, world), steps = rank_and_world(), steps_of(config, stage)
    model.train_only(who_learns(config, stage))
    if config.half_frozen and stage not in STAGE_0:
        model.cast_frozen(torch.bfloat16)
    if task.own and stage not in STAGE_0 and not {"vit", "qformer"} & {*who_learns(config, stage)} and not config.shard:
        for other in task.stages.values():
            other.seen = {}                                   # room for this stage's
        task.train(stage).seen = see_once(model, task.train(stage), collate, config, out)
        model.train()
    if state and len(state["rng"]) != world:
        raise ValueError(f"{len(state['rng'])} processes were stopped, {world} cannot go on in their place")
    if state:
        model.load_state_dict(state["model"])
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"nothing would learn in {stage!r}: {', '.join(who_learns(config, stage))} has no parameters")
    loss_of = over_processes(StageLoss(model, stage, config), config.shard, device)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizers, losses = make_optimizers(model, config, stage), state["losses"] if state else []
    torch.manual_seed(config.seed + STAGES.index(stage) + 10_000 * rank)
    batches = iter(task.batches(stage, collate, len(losses)))  # draws from the generator
    if state:
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            load_optimizer(optimizer, saved)
        torch.set_rng_state(state["rng"][rank][0])
        if device.type == "cuda" and state["rng"][rank][1] is not None:
            torch.cuda.set_rng_state(state["rng"][rank][1])
    bar = tqdm(range(len(losses), steps), stage, steps, initial=len(losses), unit="step", dynamic_ncols=True,
               disable=rank > 0)
    for step in bar:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * schedule(step, steps, config.warmup)
        total = torch.zeros((), device=device)
        for micro in range(config.accumulate):
            waits = world > 1 and not config.shard and micro + 1 < config.accumulate
            with loss_of.no_sync() if waits else nullcontext():                  # gradients meet after the last one
                with autocast(device, config):
                    loss = loss_of(to_device(next(batches), device), step) / config.accumulate
                loss.backward()
            total += loss.detach()
        norm = nn.utils.clip_grad_norm_(learning, config.clip)
        norm = norm.full_tensor() if config.shard else norm
        total, stop = mean_of_all(torch.stack([total, total.new_tensor(ctrl_c.asked)]))
        losses.append(total.item() if (total + norm).isfinite() else math.nan)
        for optimizer in optimizers:
            if not math.isnan(losses[-1]):
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if len(losses) >= SKIPPED and all(map(math.isnan, losses[-SKIPPED:])):
            raise ValueError(f"{stage}: loss or gradient was not finite in {SKIPPED} steps in a row; the last saw "
                             + ", ".join(task.names(stage, step)))
        if step % 8 == 0 or math.isnan(losses[-1]):
            rate = config.batch_size * (bar.format_dict["rate"] or 0)
            lr = getattr(config, f"{stage}_lr") * schedule(step, steps, config.warmup)
            skipped = f", {sum(map(math.isnan, losses))} skipped" if any(map(math.isnan, losses)) else ""
            bar.set_postfix_str(f"loss {losses[-1]:.4f}, lr {lr:.1e}, {rate:.0f} samples/s{skipped}")
        if stop or (step + 1) % config.save_every == 0 and step + 1 < steps:
            save_state(out, config=asdict(config), stage=stage, losses=losses, seconds=time.time() - start,
                       model=put_together(model.state_dict()),
                       optimizers=[put_together(optimizer.state_dict()) for optimizer in optimizers])
        if stop:
            raise KeyboardInterrupt(f"stopped after step {step + 1} of {stage!r} and saved: go on with --resume")
    return losses


# ---- What came of it ------------------------------------------------------------------------------

ANSWER_TOKENS = 64                       # the longest answer in an evaluation
SHORT = 4                                # words, up to which an answer must be right to the letter


def single_questions(samples) -> Iterator[tuple[Sample, tuple[str, ...]]]:
    """Each turn of each sample as a question with the true turns before it, and its right answers. The kind "answer",
    which is that of records of one's own, becomes "text" where the first right answer is long."""
    for sample in samples:
        for i, (question, truth) in enumerate(sample.turns):
            turns = sample.turns[:i] + [(question, None)]
            n = sum(text.count("<image>") for text, _ in turns)
            n_images = sum(sample.frames[:n]) if sample.frames else n
            kind = "text" if sample.kind == "answer" and len(truth.split()) > SHORT else sample.kind
            prompt = replace(sample, images=sample.images[:n_images], turns=turns, frames=sample.frames[:n], kind=kind)
            yield prompt, tuple(text.strip() for text in sample.references or (truth,))


def bleu4(answers: list[str], references: list[tuple[str, ...]]) -> float:
    """Corpus BLEU-4 in [0, 1]: the geometric mean of how many of the answers' runs of 1, 2, 3 and 4 words are in a
    reference, times a penalty for being shorter than the reference that is nearest in length. Words are in lower
    case, signs are words of their own. Source: Papineni et al. 2002 (ACL anthology P02-1040), section 2.3."""
    right, runs, length, nearest = Counter(), Counter(), 0, 0
    for mine, others in zip(answers, references):
        words, *others = (re.findall(r"\w+|[^\w\s]", text.lower()) for text in (mine, *others))
        length += len(words)
        nearest += min((abs(len(other) - len(words)), len(other)) for other in others)[1]
        for n in range(1, 5):
            counts, *most = (Counter(zip(*(text[i:] for i in range(n)))) for text in (words, *others))
            right[n] += sum(min(count, max(other[run] for other in most)) for run, count in counts.items())
            runs[n] += sum(counts.values())
    if not all(right[n] for n in range(1, 5)):
        return 0.0
    precision = math.exp(sum(math.log(right[n] / runs[n]) for n in range(1, 5)) / 4)
    return precision * math.exp(min(0, 1 - nearest / length))


def prompt_ids(prompts: Iterable[Sample], collate: Collate) -> list[Tensor]:
    """The ids of prompts. Raises ValueError naming one that leaves no room for an answer."""
    ids = []
    for prompt in prompts:
        turns = encode_turns(collate.tokenizer, prompt.turns, collate.n_rows, 10**9, prompt.name, prompt.frames)
        ids.append(torch.tensor(turns[0]))
        if len(ids[-1]) + ANSWER_TOKENS > collate.max_len:
            raise ValueError(f"{prompt.name}: {len(ids[-1])} tokens and an answer of up to {ANSWER_TOKENS} do not "
                             f"fit in max_len {collate.max_len}")
    return ids


def answer(model: MLLM, prompts: list[Sample], collate: Collate, config: Config, blind: bool = False) -> list[str]:
    """The model's likeliest answer to each prompt. blind: all are shown the pictures of others, where there are any."""
    device, end = next(model.parameters()).device, collate.tokenizer.end
    model.eval()
    images = collate.images(prompts)
    images = images.roll(len(images) // 2 * blind, dims=0).to(device)
    with autocast(device, config):
        tokens = torch.stack([*model.generate(prompt_ids(prompts, collate), images, ANSWER_TOKENS, end)], dim=1)
    return [collate.tokenizer.decode(row[:row.index(end)] if end in row else row).strip() for row in tokens.tolist()]


def by_kind(prompts: list[Sample], right: list[bool]) -> dict[str, float]:
    groups = defaultdict(list)
    for prompt, is_right in zip(prompts, right):
        groups[prompt.kind].append(is_right)
    return {kind: sum(group) / len(group) for kind, group in sorted(groups.items())}


def most_frequent(prompts: list[Sample], truths: list[tuple[str, ...]]) -> list[str]:
    """The best that can be done from the kind of question alone: always its most frequent answer."""
    counts = defaultdict(Counter)
    for prompt, truth in zip(prompts, truths):
        counts[prompt.kind].update(truth)
    return [counts[prompt.kind].most_common(1)[0][0] for prompt in prompts]


def examine(model: MLLM, samples, collate: Collate, config: Config) -> tuple[dict, list]:
    """Exact match on every question of samples, but BLEU-4 on those of kind "text": {"all", "blind", "floor": share
    right, "bleu4": {...} or {}, "kinds": {...}}, and each (prompt, answer, truths); pictures of the first few only."""
    prompts, truths, given = [], [], {"all": [], "blind": [], "floor": []}
    questions = single_questions(samples)
    while some := list(islice(questions, 100)):
        asked = [prompt for prompt, _ in some]
        given["all"] += answer(model, asked, collate, config)
        given["blind"] += answer(model, asked, collate, config, blind=True)
        prompts += asked if not prompts else [replace(prompt, images=[]) for prompt in asked]
        truths += [truth for _, truth in some]
    given["floor"] = most_frequent(prompts, truths)
    results, kinds, bleu = {}, {}, {}
    long = [i for i, prompt in enumerate(prompts) if prompt.kind == "text"]
    short = [i for i, prompt in enumerate(prompts) if prompt.kind != "text"]
    for name, answers in given.items():
        right = [answers[i] in truths[i] for i in short]
        kinds[name] = by_kind([prompts[i] for i in short], right)
        if short:
            results[name] = sum(right) / len(right)
        if long:
            bleu[name] = kinds[name]["text, BLEU-4"] = bleu4([answers[i] for i in long], [truths[i] for i in long])
    return results | {"bleu4": bleu, "kinds": kinds}, list(zip(prompts, given["all"], truths))


def attributes_right(described: list[tuple[str, str]]) -> dict[str, float]:
    """For (description, truth) pairs, how often each attribute of each thing is right, compared in order."""
    names, pattern = ("where", "size", "color", "shape"), re.compile(r"At the (.+?) is a (\S+) (\S+) (\S+)\.")
    right, total = Counter(), 0
    for mine, truth in described:
        found, things = pattern.findall(mine), pattern.findall(truth)
        total += len(things)
        right["things"] += len(found) == len(things)
        for guess, thing in zip(found, things):
            right.update(name for name, a, b in zip(names, guess, thing) if a == b)
    return {name: right[name] / total for name in names} | {"how many": right["things"] / len(described)}


def evaluate(model: MLLM, task: Task, collate: Collate, config: Config) -> tuple[dict, list]:
    """Question the model about what it never saw, print a table, return the metrics and some (prompt, answer,
    truths) to look at."""
    metrics, shown = {}, []
    for name, samples in task.test.items():
        results, answered = examine(model, samples, collate, config)
        if name == "description":
            described = [(mine, truths[0]) for _, mine, truths in answered]
            metrics |= {"description_exact": results["all"], "description_exact_blind": results["blind"],
                        "description_attributes": attributes_right(described)}
        elif name == "read":
            metrics["reading_accuracy"] = results["all"]
        else:
            columns, key, kinds = ("all", "blind", "floor"), name.replace("qa", "qa_accuracy"), results["kinds"]
            names = dict(zip(columns, ("", "_blind", "_floor")))
            metrics |= {f"{key}{names[column]}": results[column] for column in columns if column in results}
            metrics |= {f"bleu4{names[column]}": value for column, value in results["bleu4"].items()}
            metrics[f"{key}_by_kind"] = kinds
            shown += answered[:8]
            print(f"\n{name:12} {'right':>8} {'blind':>8} {'floor':>8}")
            for kind in kinds["all"]:
                print(f"{kind:12} " + " ".join(f"{kinds[column][kind]:8.3f}" for column in columns))
            if "all" in results:
                print(f"{'all':12} " + " ".join(f"{results[column]:8.3f}" for column in columns))
    print("\n" + "\n".join(f"{key}: {value}" for key, value in metrics.items() if isinstance(value, float)))
    return metrics, shown


def draw_curves(losses: dict[str, list[float]], path: Path, width: int = 360, height: int = 240) -> None:
    """One panel a stage: loss in nats (logarithmic) against steps, smoothed over about a fiftieth of the stage."""
    font, margin = ImageFont.load_default(13), 60
    sheet = Image.new("RGB", (width * len(losses), height), "white")
    canvas = ImageDraw.Draw(sheet)
    for panel, (stage, values) in enumerate(losses.items()):
        values = [value for value in values if math.isfinite(value)] or [1.0]
        window = min(len(values), 4 * max(1, len(values) // 200))                # as many steps with ITC in each
        smooth = [max(1e-6, sum(part) / len(part)) for part in
                  (values[i:i + window] for i in range(0, len(values) - window + 1, window))]
        low, high = math.log(min(smooth)), math.log(max(smooth))
        left, right, top, bottom = panel * width + margin, (panel + 1) * width - 12, 30, height - 28
        canvas.rectangle((left, top, right, bottom), outline="gray")
        points = [(left + (right - left) * i / max(1, len(smooth) - 1),
                   bottom - (bottom - top) * (math.log(value) - low) / ((high - low) or 1))
                  for i, value in enumerate(smooth)]
        canvas.line(points, (45, 85, 215), 2)
        canvas.text((left, 8), f"{stage}: loss", "black", font)
        canvas.text((left - 6, top), f"{math.exp(high):.3g}", "black", font, anchor="rt")
        canvas.text((left - 6, bottom), f"{math.exp(low):.3g}", "black", font, anchor="rb")
        canvas.text((right, bottom + 6), f"{len(values)} steps", "black", font, anchor="rt")
    sheet.save(path)


def draw_samples(shown: list, path: Path) -> None:
    """Held-out pictures with question, answer and truth."""
    shown = [entry for entry in shown if entry[0].images]
    texts = []
    for prompt, mine, truths in shown:
        question = prompt.turns[-1][0].replace("<image>", "").strip()
        verdict = "right" if mine in truths else f'{"" if prompt.kind == "text" else "WRONG, "}it is "{truths[0][:60]}"'
        texts.append(f"{question[:100]}\n{mine[:60]}  ({verdict})")
    if shown:
        contact_sheet([prompt.images[0] for prompt, _, _ in shown], texts).save(path)


# ---- The program ----------------------------------------------------------------------------------

def report(model: MLLM, config: Config, stage: str) -> None:
    """Print who learns in this stage, and at which peak rate."""
    print(f"\n{stage}: {stage_samples(config, stage)} samples, recipe {config.recipe}, adapters on "
          f"{config.lora_on} rows")
    for part in PARTS:
        word, rate = "frozen", peak_rate(config, stage, part)
        if part in WHO_LEARNS[config.recipe][stage]:
            reason = "since its rate is 0" if not rate else "as published"
            word = f"learns, rate {rate:.1e}" if part in who_learns(config, stage) else f"frozen, {reason}"
        print(f"  {part:10} {count_parameters(model, (part,)):>12,} parameters  {word}")


def count_parameters(model: MLLM, parts: tuple[str, ...]) -> int:
    return sum(parameter.numel() for name, parameter in model.named_parameters() if part_of(name) in parts)


def peak_memory(device: torch.device) -> float:
    """The most memory held since the start, in GB: on a GPU by tensors, on a CPU by this process, where it says so."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource                                       # not on Windows
    except ImportError:
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6               # Linux counts in kilobytes


def model_for(stage: str, config: Config, tokenizer: Tokenizer, out: Path, device: torch.device) -> MLLM:
    """The model that a stage starts from: a fresh one, or the weight file of the stage before.

    Raises ValueError when a setting differs from that of the weights and this stage may not change it.
    """
    asked, stages = model_config(config, tokenizer), stages_of(config)
    torch.manual_seed(config.seed)
    if stage in STAGE_0:                                      # what only `align` makes use of
        later = set(MAY_CHANGE["align"]) - set(MAY_CHANGE["see"])
        asked = replace(asked, **{name: getattr(ModelConfig, name) for name in later})
    dropped = replace(asked, text_branch=False, qformer_layers=asked.qformer_layers - asked.qformer_drop_last,
                      qformer_drop_last=0)
    if stage == stages[0]:
        asked = dropped if stage == "align" else asked
        parts = published_parts(config, asked)
        grid = parts["vit"].grid if "vit" in parts else None
        first = replace(asked, image_size=tuple(side * asked.patch_size for side in grid)) if grid else asked
        return MLLM(first, **parts).renewed(asked).to(device)
    before = out / f"{stages[stages.index(stage) - 1]}.pt"
    if not before.exists():
        raise FileNotFoundError(f"stage {stage!r} starts from {before}, which is not there: run the stages before it")
    model = MLLM.load(before, device)
    asked = dropped if stage == "instruct" else asked
    for name, value in asdict(asked).items():
        was = getattr(model.config, name)
        if was != value and name not in (*MAY_CHANGE[stage], *ANY_TIME):
            raise ValueError(f"{before} was trained with {name} {was!r}, but {value!r} is asked for: run an earlier "
                             "stage with it first")
    if stage == "align":
        if model.config.text_branch:                          # only `see` needs it
            model.config = replace(model.config, qformer_drop_last=asked.qformer_drop_last)
            model.drop_text_branch()
        asked = dropped
    if asked.image_size != model.config.image_size:
        print(f"images of {asked.image_size} instead of {model.config.image_size}: positions are interpolated")
    return model.renewed(asked).to(device)


def fit_image_size(config: Config, conversations: Conversations) -> tuple[int, int]:
    """(height, width) for own pictures: the preset's size is the shorter side, the longer one follows the shape
    of the first picture, in whole patches."""
    pictures = (sample.images[0] for sample in conversations.for_task("see"))
    width, height = next(pictures).size
    side, patch = min(config.image_size), config.patch_size
    return tuple(max(1, round(side * length / min(width, height) / patch)) * patch for length in (height, width))


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line: a flag for each field of `Config`, and a few of this program's own."""
    parser = argparse.ArgumentParser(description="Train a multimodal language model.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for weights, metrics and pictures")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--preset", choices=PRESETS, help="default: the device's")
    parser.add_argument("--stage", choices=(*STAGES, "evaluate"), help="run this one alone")
    parser.add_argument("--resume", action="store_true", help="go on where an interrupted run stopped")
    parser.add_argument("--download", nargs="+", metavar="NAME", help="fetch these published models and stop")
    for field in fields(Config):
        if field.name in DERIVED:
            continue
        flag = "--" + field.name.replace("_", "-")
        if field.type is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS)
        elif field.name in ("recipe", "connector", "fit"):
            choices = {"recipe": WHO_LEARNS, "connector": CONNECTORS, "fit": ("squash", "pad")}[field.name]
            parser.add_argument(flag, choices=choices, default=argparse.SUPPRESS)
        elif field.name == "image_size":
            parser.add_argument(flag, type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), default=argparse.SUPPRESS)
        else:
            parser.add_argument(flag, type=field.type, metavar=field.type.__name__.upper(),
                                default=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def settings(arguments: argparse.Namespace) -> Config:
    """The preset, with what the command line says over it."""
    given = {name: value for name, value in vars(arguments).items() if name in Config.__dataclass_fields__}
    config = replace(PRESETS[arguments.preset or ("gpu" if "cuda" in arguments.device else "cpu")], **given)
    config = with_published(config, {*given})
    if config.data and "image_size" not in given and not config.vit:
        records = Conversations(config.data, config.images, config.skip_bad)
        config = replace(config, image_size=fit_image_size(config, records))
    if config.half_frozen and not config.bf16:
        raise ValueError("half_frozen needs bf16: float32 activations cannot meet bfloat16 weights without autocast")
    if config.shard and "RANK" not in os.environ:
        raise ValueError("shard splits the model over several processes: start them with torchrun")
    if config.batch_size % (config.accumulate * (processes := int(os.environ.get("WORLD_SIZE", 1)))):
        raise ValueError(f"batch_size {config.batch_size} does not divide into {config.accumulate} micro-batches for "
                         f"{processes} processes")
    return replace(config, image_size=tuple(config.image_size),
                   lora_on=LORA_ON.get(config.recipe, "image"))


def main() -> None:
    arguments = parse_arguments()
    if arguments.download:
        return print("\n".join(str(download(name)) for name in arguments.download))
    out, device = arguments.out, join_processes(torch.device(arguments.device))
    is_first = rank_and_world()[0] == 0
    out.mkdir(parents=True, exist_ok=True)
    state = load_state(out) if arguments.resume else None
    try:
        config = Config(**state["config"]) if state else settings(arguments)
    except TypeError as error:
        raise ValueError(f"{out / STATES[0]} is of another version of this program ({error})") from error
    needed = stages_of(config)
    first = state["stage"] if state else arguments.stage or needed[0]
    if first not in (*needed, "evaluate"):
        raise ValueError(f"stage {first!r} makes a stand-in for what is given")
    stages = () if first == "evaluate" else (first,) if arguments.stage else needed[needed.index(first):]
    for stage in stages:
        who_learns(config, stage)                             # better an error now than hours later
    if not stages:                                            # as the weights saw it, unless told otherwise
        stored = read_whole(out / f"{STAGES[-1]}.pt", "cpu", ("config",))["config"]
        names = ("image_size", "fit", "max_len", "pixel_mean", "pixel_std")
        config = replace(config, **{name: stored[name] for name in names if name not in arguments and name in stored})
    task = Task(config)
    if first == needed[0] and not state and is_first:
        make_tokenizer(config, task).save(out / "tokenizer.json")
    wait_for_all()
    tokenizer = Tokenizer.load(out / "tokenizer.json")
    collate = make_collate(tokenizer, config)

    if task.own and stages and stages[-1] == STAGES[-1]:      # better an error now than at the very end
        prompt_ids((prompt for prompt, _ in single_questions(task.test["qa"])), collate)

    for name in STATES if stages and not state and is_first else ():             # of another run
        (out / name).unlink(missing_ok=True)
    for stage in stages:
        start = time.time() - (state["seconds"] if state else 0)
        model = model_for(stage, config, tokenizer, out, torch.device("cpu") if config.shard else device)
        report(model, config, stage)
        with CtrlC() as ctrl_c:
            losses = train_stage(model, stage, task, collate, config, out, start, device, state, ctrl_c)
        weights = put_together(model.state_dict())
        if is_first:
            model.save(out / f"{stage}.pt", model=weights, losses=losses, seconds=time.time() - start,
                       memory=peak_memory(device), learning=count_parameters(model, who_learns(config, stage)))
        wait_for_all()
        state = None
    if stages and stages[-1] != STAGES[-1] or not is_first:
        return

    start, device = time.time(), torch.device("cpu") if config.shard else device
    model = MLLM.load(out / f"{STAGES[-1]}.pt", device)
    model = model.renewed(replace(model.config, image_size=config.image_size, max_len=config.max_len,
                                  fit=config.fit)).to(device)
    collate = make_collate(tokenizer, model.config)           # that of the weights, whatever the flags say
    metrics, shown = evaluate(model, task, collate, config)
    history = {stage: read_whole(out / f"{stage}.pt", "cpu", ("losses", "seconds", "memory", "learning"))
               for stage in STAGES if (out / f"{stage}.pt").exists()}
    seconds = {stage: history[stage]["seconds"] for stage in history} | {"evaluate": time.time() - start}
    metrics |= {"seconds": sum(seconds.values()), "seconds_by_stage": seconds,
                "memory_gb": max(stage["memory"] for stage in history.values()),
                "learning_parameters": {stage: history[stage]["learning"] for stage in history},
                "device": str(device), "config": asdict(config)}
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2))
    draw_curves({stage: history[stage]["losses"] for stage in history}, out / "curves.png")
    draw_samples(shown, out / "samples.png")
    for name in STATES:                                       # there is nothing left to resume
        (out / name).unlink(missing_ok=True)
    print(f"\nafter {metrics['seconds']:.0f} s: {out}/metrics.json, curves.png, samples.png. "
          f"Try: python sample.py --out {out}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: {error}")
    except KeyboardInterrupt as stop:
        print(f"train.py: {stop or 'stopped'}", file=sys.stderr)
        sys.exit(130)
