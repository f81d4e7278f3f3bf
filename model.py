"""A multimodal language model: pictures and text in, text out. Four parts and the whole.

    image (N, 3, H, W) ─► ViT ─► (N, P, Dv) ─► Q-Former ─► (N, Q, Dq) ─► projector ─► (N, Q, D)
                                                                                         │
    token ids (B, T) ─► token embedding ─► (B, T, D) ◄── take the place of placeholders ─┘
                                               │
                             GPT with Partial LoRA on the image rows ─► logits (B, T, V)

What makes it multimodal is the line in the middle, `MLLM.embed`. In short:

    x = token_embedding(input_ids)  # (B, T, D)
    rows = projector(qformer(ln_vision(vit(images))))  # (N, Q, D)
    x[input_ids == image_id] = rows.flatten(0, 1)  # image rows among word embeddings
    logits = decoder(x, is_image=input_ids == image_id)  # adapters act on image rows alone

A batch holds B texts and N images, in the order of their placeholders; a text may have none or
several. An image stands in its text as Q placeholder ids, so every length is known beforehand.
The parts follow BLIP-2 (arXiv 2301.12597), MiniGPT-4 (2304.10592), InternLM-XComposer2
(2401.16420).

    python model.py        a sample on its way from pixels to loss, and the sizes of the papers

B texts, N images, T tokens, P patches, Q queries or other rows of an image, H heads,
Hkv key/value heads, Dh head width, D decoder width, Dv vision width, Dq Q-Former width,
V vocabulary, L longest cached sequence.
"""
import math
import os
import pickle
import re
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from plora import PLoRALinear
from qformer import QFormer, attend, init_linears

# ---- ViT: an image as a sequence of patches --------------------------------------------------

class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the approximation of GELU that OpenAI's CLIP was trained with."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"gelu": nn.GELU, "quick_gelu": QuickGELU, "relu": nn.ReLU, "silu": nn.SiLU}


def drop_path(x: Tensor, rate: float, training: bool) -> Tensor:
    """In training, drop a residual branch for a random share `rate` of the samples and scale the
    others by 1 / (1 - rate), so that the expected value stays. Source: arXiv 1603.09382."""
    if not training or rate == 0:
        return x
    is_kept = torch.rand(x.shape[0], 1, 1, device=x.device) >= rate  # (B, 1, 1)
    return x * is_kept / (1 - rate)


class ViTBlock(nn.Module):
    """Pre-LN transformer block without a mask: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, dim: int, n_heads: int, mlp_dim: int, activation: str,
                 drop_path_rate: float, norm_eps: float = 1e-6):
        super().__init__()
        self.n_heads, self.drop_path_rate = n_heads, drop_path_rate
        self.norm1, self.norm2 = nn.LayerNorm(dim, norm_eps), nn.LayerNorm(dim, norm_eps)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out_proj = nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_dim), ACTIVATIONS[activation](),
                                 nn.Linear(mlp_dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        N, P, D = x.shape
        shape = N, P, 3, self.n_heads, D // self.n_heads
        q, k, v = self.qkv(self.norm1(x)).view(shape).permute(2, 0, 3, 1, 4)  # (N, H, P, Dv/H)
        y = attend(q, k, v).transpose(1, 2).reshape(N, P, D)
        x = x + drop_path(self.out_proj(y), self.drop_path_rate, self.training)
        return x + drop_path(self.mlp(self.norm2(x)), self.drop_path_rate, self.training)


def resize_positions(positions: Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """A position embedding for another (rows, columns) grid of patches, by bicubic interpolation:
    (1, 1 + P, Dv) -> (1, 1 + P', Dv). The class token's position, the first, stays."""
    if new_grid == grid:
        return positions
    patches = positions[:, 1:].unflatten(1, grid).permute(0, 3, 1, 2).float()
    patches = F.interpolate(patches, new_grid, mode="bicubic")  # (1, Dv, rows, columns)
    patches = patches.flatten(2).transpose(1, 2).to(positions.dtype)  # (1, P', Dv)
    return torch.cat([positions[:, :1], patches], dim=1)


class ViT(nn.Module):
    """Vision transformer: a strided convolution cuts an image into patches, blocks relate them.

    image_size: side, or (height, width), in pixels, that the position embedding is laid out for;
    for other sizes it is interpolated. EVA-CLIP ViT-g/14 is ViT(224, 14, 1408, 39, 16,
    mlp_ratio=4.3637); CLIP ViT-L/14 is ViT(224, 14, 1024, 24, 16, pre_norm=True,
    activation="quick_gelu"). The final norm is `MLLM.ln_vision`, unless post_norm. Raises
    ValueError when sizes do not divide. Source: arXiv 2010.11929, section 3.1.
    """

    def __init__(self, image_size: int | tuple[int, int], patch_size: int, dim: int, n_layers: int,
                 n_heads: int, mlp_ratio: float = 4.0, pre_norm: bool = False,
                 post_norm: bool = False, activation: str = "gelu", norm_eps: float = 1e-6,
                 drop_path_rate: float = 0.0, use_grad_checkpoint: bool = False):
        super().__init__()
        if dim % n_heads:
            raise ValueError(f"dim {dim} must be a multiple of n_heads {n_heads}")
        self.patch_size, self.use_grad_checkpoint = patch_size, use_grad_checkpoint
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.grid = self.grid_of(height, width)
        # CLIP has no bias here, since its norm comes next.
        self.patch_embedding = nn.Conv2d(3, dim, patch_size, stride=patch_size, bias=not pre_norm)
        self.class_token = nn.Parameter(torch.empty(1, 1, dim))
        n_positions = 1 + self.grid[0] * self.grid[1]
        self.position_embedding = nn.Parameter(torch.empty(1, n_positions, dim))
        self.pre_norm = nn.LayerNorm(dim, norm_eps) if pre_norm else nn.Identity()
        self.blocks = nn.ModuleList()
        for i in range(n_layers):  # deeper blocks are dropped more often
            rate = drop_path_rate * i / max(n_layers - 1, 1)
            self.blocks.append(ViTBlock(dim, n_heads, round(dim * mlp_ratio), activation, rate,
                                        norm_eps))
        self.post_norm = nn.LayerNorm(dim, norm_eps) if post_norm else nn.Identity()
        for parameter in (self.class_token, self.position_embedding):
            nn.init.normal_(parameter, std=0.3)  # as large as the patches
        init_linears(self, zero="mlp.2")  # 0 where MLPs write to the residual stream

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """The rows and columns of patches in an image of this size: (10, 40) for a height of 100
        and a width of 400 in patches of 10, to which learned positions are then interpolated."""
        if height % self.patch_size or width % self.patch_size or not height or not width:
            raise ValueError("image height and width must be multiples of patch_size "
                             f"{self.patch_size}, got {height} x {width}")
        return height // self.patch_size, width // self.patch_size

    def forward(self, images: Tensor) -> Tensor:
        """images (N, 3, height, width), pixels in [-1, 1] or as published weights want them ->
        (N, 1 + P, Dv), the class token first."""
        grid = self.grid_of(*images.shape[2:])
        x = self.patch_embedding(images).flatten(2).transpose(1, 2)  # (N, P, Dv)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = self.pre_norm(x + resize_positions(self.position_embedding, self.grid, grid))
        for block in self.blocks:
            if self.use_grad_checkpoint:
                # Activations inside the block are not kept; the backward pass computes them again.
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.post_norm(x)


# ---- Connectors without a Q-Former, and the projector ----------------------------------------

class PatchMerge(nn.Module):
    """n consecutive patches side by side in one row: (N, 1 + P, Dv) -> (N, P / n, n Dv), without
    the class token. n = 1 is LLaVA's way (arXiv 2304.08485), n = 4 MiniGPT-v2's (2310.09478,
    section 2.1). Patches count line by line: a row may join two lines at the edge of the image."""

    def __init__(self, n: int):
        super().__init__()
        self.n = n

    def forward(self, image_features: Tensor) -> Tensor:
        return image_features[:, 1:].unflatten(1, (-1, self.n)).flatten(2)  # (N, P / n, n Dv)


def make_projector(in_dim: int, out_dim: int, kind: str = "linear", hidden_dim: int = 0,
                   activation: str = "gelu", normalization: bool = False) -> nn.Sequential:
    """From the connector's width to the decoder's: a module (..., in_dim) -> (..., out_dim).

    kind: "linear"; "mlpNx_gelu", N linears with GELU between them (LLaVA's is "mlp2x_gelu");
    "mlp", two linears through hidden_dim (0: out_dim) with a chosen activation; "identity", for
    one width. ValueError for another kind. normalization adds a LayerNorm of the output.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}: use one of {', '.join(ACTIVATIONS)}")
    depth = re.fullmatch(r"mlp([1-9]\d*)x_gelu", kind)
    if kind == "linear":
        widths = [in_dim, out_dim]
    elif kind == "mlp":
        widths = [in_dim, hidden_dim or out_dim, out_dim]
    elif depth:
        widths, activation = [in_dim] + [out_dim] * int(depth[1]), "gelu"
    elif kind == "identity" and in_dim == out_dim:
        widths = []
    else:
        raise ValueError(f"no projector {kind!r} from width {in_dim} to {out_dim}: use 'linear', "
                         "'mlp', 'mlpNx_gelu' (N = 1, 2, ...) or, within one width, 'identity'")
    layers = []
    for width, next_width in zip(widths, widths[1:]):
        layers += [nn.Linear(width, next_width), ACTIVATIONS[activation]()]
    layers = layers[:-1]  # none after the last linear
    if normalization:
        layers.append(nn.LayerNorm(out_dim))
    return nn.Sequential(*layers)


# ---- GPT: the decoder ------------------------------------------------------------------------

def rotation(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angle by which channel pair i turns at each position, which is
    position * theta^(-2 i / Dh) radians: positions (B, T) -> two (B, T, 1, Dh/2) float32."""
    pairs = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    angle = positions[..., None, None].float() * theta ** (-pairs / head_dim)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding (arXiv 2104.09864): (B, T, H, Dh) -> (B, T, H, Dh), channel i
    paired with i + Dh/2. The product of two rotated vectors depends on their distance alone."""
    cos, sin = (part.to(x.dtype) for part in rope)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class GPTAttention(nn.Module):
    """Causal grouped-query attention: n_heads query heads share n_kv_heads key/value heads.

    `wqkv` holds all query heads, then all keys', then all values'. Source: arXiv 2305.13245.
    """

    def __init__(self, dim: int, n_heads: int, n_kv_heads: int, qkv_bias: bool, **lora):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = n_heads, n_kv_heads, dim // n_heads
        qkv_dim = (n_heads + 2 * n_kv_heads) * self.head_dim
        self.wqkv = PLoRALinear(dim, qkv_dim, bias=qkv_bias, **lora)
        self.wo = PLoRALinear(dim, dim, **lora)

    @torch.no_grad()
    def look_back(self, rope_theta: float) -> None:
        """Start with head h attending to the token h + 1 places back, by query and key biases.

        RoPE turns the biases with the position. Head h then gives a token d places back the sum
        over channel pairs of amplitude^2 cos(angle (d - h - 1)), where angle is by how much a pair
        turns in one step. It is largest at d = h + 1.
        """
        distances = torch.arange(1, self.n_heads + 1)[None]
        cos, sin = rotation(distances, self.head_dim, rope_theta)  # (1, H, 1, Dh/2)
        # Pairs that hardly turn in one step cannot tell one distance from another: they get no
        # amplitude. The others get enough for softmax to choose one token.
        amplitude = 4.0 * (sin[0, 0] > 0.3)  # (1, Dh/2)
        cos, sin = amplitude * cos[0, :, 0], amplitude * sin[0, :, 0]  # (H, Dh/2)
        q_bias = torch.cat([cos, -sin], dim=-1)  # (H, Dh)
        k_bias = torch.cat([amplitude, 0 * amplitude], dim=-1).expand(self.n_kv_heads, -1)
        bias = torch.cat([q_bias, k_bias]).flatten()
        self.wqkv.bias[:len(bias)] = bias

    def forward(self, x: Tensor, positions: Tensor, rope: tuple[Tensor, Tensor],
                is_image: Tensor | None, cache: Tensor | None) -> Tensor:
        B, T, D = x.shape
        H, Hkv = self.n_heads, self.n_kv_heads
        heads = self.wqkv(x, is_image).view(B, T, H + 2 * Hkv, self.head_dim)
        q, k = rotate(heads[:, :, :-Hkv], rope).split([H, Hkv], dim=2)  # (B, T, H or Hkv, Dh)
        v, mask = heads[:, :, -Hkv:], None
        if cache is not None:
            # The slot of a token is its position, so each row of the batch may be at another one.
            rows = torch.arange(B, device=x.device)[:, None]
            cache[0, rows, positions], cache[1, rows, positions] = k.to(cache), v.to(cache)
            k, v = cache.to(q.dtype)  # (B, L, Hkv, Dh)
            slots = torch.arange(k.shape[1], device=x.device)
            mask = (slots <= positions[..., None])[:, None]  # (B, 1, T, L)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # (B, H, T or L, Dh)
        y = attend(q, k, v, mask, is_causal=mask is None, enable_gqa=True)
        return self.wo(y.transpose(1, 2).reshape(B, T, D), is_image)


class GPTBlock(nn.Module):
    """x + attention(norm(x)), then x + w2(silu(w1 x) * w3 x) of norm(x): SwiGLU (2002.05202)."""

    def __init__(self, dim: int, ffn_dim: int, norm_eps: float, attention: dict, **lora):
        super().__init__()
        self.attention_norm, self.ffn_norm = nn.RMSNorm(dim, norm_eps), nn.RMSNorm(dim, norm_eps)
        self.attention = GPTAttention(dim, **attention, **lora)
        self.w1, self.w3 = PLoRALinear(dim, ffn_dim, **lora), PLoRALinear(dim, ffn_dim, **lora)
        self.w2 = PLoRALinear(ffn_dim, dim, **lora)

    def forward(self, x: Tensor, positions: Tensor, rope: tuple[Tensor, Tensor],
                is_image: Tensor | None, cache: Tensor | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), positions, rope, is_image, cache)
        h = self.ffn_norm(x)
        return x + self.w2(F.silu(self.w1(h, is_image)) * self.w3(h, is_image), is_image)


class GPT(nn.Module):
    """Decoder-only transformer of the LLaMA / InternLM2 family: RMSNorm, RoPE, grouped-query
    attention, SwiGLU, and Partial LoRA in all five linears of a block (wqkv, wo, w1, w2, w3).

    It takes embeddings, not ids, so that rows of any origin can stand among the tokens. ffn_dim:
    hidden width of SwiGLU, by default 8/3 dim; r, alpha, lora_dropout: see `PLoRALinear`. Raises
    ValueError when dim and heads do not divide. Source: arXiv 2302.13971, section 2.2.
    """

    def __init__(self, vocab_size: int, dim: int, n_layers: int, n_heads: int,
                 n_kv_heads: int | None = None, ffn_dim: int | None = None,
                 rope_theta: float = 10_000.0, norm_eps: float = 1e-5, qkv_bias: bool = False,
                 tied: bool = False, r: int = 256, alpha: float = 256, lora_dropout: float = 0.05):
        super().__init__()
        n_kv_heads, ffn_dim = n_kv_heads or n_heads, ffn_dim or 8 * dim // 3
        if dim % n_heads or n_heads % n_kv_heads or dim // n_heads % 2:
            raise ValueError(f"dim {dim} must give n_heads {n_heads} an even width each, and "
                             f"n_kv_heads {n_kv_heads} divide n_heads")
        attention = dict(n_heads=n_heads, n_kv_heads=n_kv_heads, qkv_bias=qkv_bias)
        lora = dict(r=r, alpha=alpha, dropout=lora_dropout)
        self.head_dim, self.rope_theta = dim // n_heads, rope_theta
        self.token_embedding = nn.Embedding(vocab_size, dim)
        self.blocks = nn.ModuleList(GPTBlock(dim, ffn_dim, norm_eps, attention, **lora)
                                    for _ in range(n_layers))
        self.norm = nn.RMSNorm(dim, norm_eps)
        self.lm_head = nn.Linear(dim, vocab_size, bias=False)
        if tied:
            self.lm_head.weight = self.token_embedding.weight
        # Embeddings stay N(0, 1), so that blocks add to them rather than drown them.
        init_linears(self, zero="w2")  # 0 where w2 writes to the residual stream
        nn.init.normal_(self.lm_head.weight, std=0.02)
        # To answer from what was said before, a decoder must look back. Small ones find that late,
        # so the first block starts with it, if it has biases.
        if qkv_bias:
            self.blocks[0].attention.look_back(rope_theta)

    def new_cache(self, batch_size: int, length: int) -> list[Tensor]:
        """Room for the keys and values of L tokens: for each block (2, B, L, Hkv, Dh) of zeros."""
        shape = 2, batch_size, length, self.blocks[0].attention.n_kv_heads, self.head_dim
        return [torch.zeros(shape, device=self.norm.weight.device) for _ in self.blocks]

    def forward(self, x: Tensor, is_image: Tensor | None = None, positions: Tensor | None = None,
                cache: list[Tensor] | None = None, at: tuple[Tensor, ...] = ()) -> Tensor:
        """x (B, T, D), is_image (B, T) bool, True where adapters act -> logits (B, T, V).

        positions (B or 1, T), by default 0 .. T-1. With a cache, x may be the next few tokens
        only: their keys and values are kept at their positions, and they attend to all up to their
        own. at: two index tensors (N,) into B and T, for logits (N, V) of these positions alone.
        """
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)[None]  # (1, T)
        rope = rotation(positions, self.head_dim, self.rope_theta)
        for block, slots in zip(self.blocks, cache or [None] * len(self.blocks)):
            x = block(x, positions, rope, is_image, slots)
        return self.lm_head(self.norm(x[at] if at else x))


# ---- The whole -------------------------------------------------------------------------------

MERGED = {"patch-merge": 4, "patches": 1}  # patches in a row, without a Q-Former
CONNECTORS = ("qformer", *MERGED)
PARTS = ("vit", "qformer", "projector", "adapters", "decoder")


def part_of(parameter_name: str) -> str:
    """Which of PARTS a parameter of `MLLM` belongs to, by its name."""
    if "lora_" in parameter_name:
        return "adapters"
    module = parameter_name.split(".")[0]
    return "vit" if module == "ln_vision" else module


@dataclass(frozen=True)
class ModelConfig:
    """All that is needed to build an `MLLM` and to feed it; a checkpoint stores it. vit, qformer,
    projector, decoder: the arguments of `ViT`, `QFormer`, `make_projector` and `GPT`."""
    vit: dict
    projector: dict
    decoder: dict
    qformer: dict
    connector: str = "qformer"
    lora_on: str = "image"               # rows that adapters change; "all" makes it plain LoRA
    max_len: int = 512                   # longest prompt + answer, in tokens, image rows included
    pad_id: int = 0
    image_id: int = 1                    # the placeholder that image rows take the place of
    pixel_mean: tuple[float, ...] = (0.5, 0.5, 0.5)       # pixels in [0, 1] become
    pixel_std: tuple[float, ...] = (0.5, 0.5, 0.5)        # (pixel - mean) / std, here in [-1, 1]

    def n_rows(self, image_size: tuple[int, int]) -> int:
        """How many rows an image of (height, width) becomes. ValueError if they do not divide."""
        if self.connector == "qformer":
            return self.qformer["n_queries"]
        rows, columns = (side // self.vit["patch_size"] for side in image_size)
        merged = MERGED[self.connector]
        if rows * columns % merged:
            raise ValueError(f"{self.connector} puts {merged} patches in a row, but an image has "
                             f"{rows * columns}")
        return rows * columns // merged


def pick_token(logits: Tensor, temperature: float = 0.0, top_k: int = 0,
               generator: torch.Generator | None = None) -> Tensor:
    """logits (B, V) -> ids (B,): the likeliest at temperature 0, else a draw from softmax(logits /
    temperature), cut to the top_k likeliest (0: all)."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    if top_k:
        least = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < least, float("-inf"))
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]


class MLLM(nn.Module):
    """ViT, Q-Former, projector and decoder in one. See the picture at the top of this file."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        if config.connector not in CONNECTORS or config.lora_on not in ("image", "all"):
            raise ValueError(f"no connector {config.connector!r} or lora_on {config.lora_on!r}")
        self.config = c = config
        self.vit = ViT(**c.vit)
        # BLIP-2's norm between a ViT, published without it, and the Q-Former.
        self.ln_vision = nn.Identity() if c.vit.get("post_norm") else nn.LayerNorm(c.vit["dim"])
        is_merged = c.connector in MERGED
        self.qformer = PatchMerge(MERGED[c.connector]) if is_merged else QFormer(**c.qformer)
        self.projector = make_projector(**c.projector)
        self.decoder = GPT(**c.decoder)

    def train_only(self, parts: Collection[str]) -> None:
        """Make these of PARTS trainable, freeze the others."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(part_of(name) in parts)
        self.train()

    def train(self, mode: bool = True) -> "MLLM":
        """As in torch, but frozen modules stay in eval mode, without dropout and drop path.
        MiniGPT-4 replaces the method `train` of its frozen parts for the same reason."""
        super().train(mode)
        for module in self.modules() if mode else ():
            is_trainable = [parameter.requires_grad for parameter in module.parameters()]
            if is_trainable and not any(is_trainable):
                module.eval()
        return self

    @torch.no_grad()
    def cast_frozen(self) -> None:
        """Keep frozen linear and convolution layers in bfloat16, for half the memory; an embedding
        tied to one goes with it, all else stays float32. Run it under autocast then.
        Source: `convert_weights_to_fp16` in the code of BLIP-2 and MiniGPT-4."""
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                for parameter in (module.weight, module.bias):
                    if parameter is not None and not parameter.requires_grad:
                        parameter.data = parameter.data.bfloat16()

    def normalize(self, images: Tensor) -> Tensor:
        """Pixels (N, 3, height, width) uint8 as the ViT wants them, float32, on the device of the
        model; floats are only moved there."""
        images = images.to(self.decoder.norm.weight.device, non_blocking=True)
        if images.is_floating_point():
            return images
        channels = []
        for i, (mean, std) in enumerate(zip(self.config.pixel_mean, self.config.pixel_std)):
            channels.append((images[:, i] / 255 - mean) / std)
        return torch.stack(channels, dim=1)

    def image_features(self, images: Tensor) -> Tensor:
        """Pixels (N, 3, height, width), uint8 or normalised -> (N, P, Dv)."""
        return self.ln_vision(self.vit(self.normalize(images)))

    def encode_images(self, images: Tensor) -> Tensor:
        """Pixels (N, 3, height, width), uint8 or normalised -> decoder rows (N, Q, D)."""
        return self.projector(self.qformer(self.image_features(images)))

    def adapted(self, is_image: Tensor, has_images: bool) -> Tensor | None:
        """The rows (B, T) that adapters change: with Partial LoRA those of images, with LoRA all.
        None (Partial LoRA without images): the plain decoder runs, which costs nothing extra.

        In the last block text reads image rows as keys and values; after it nobody reads them,
        since labels are on text. So with Partial LoRA only wqkv's adapter has a gradient there, and
        of its lora_B only the rows of keys and values."""
        if self.config.lora_on == "all":
            return torch.ones_like(is_image)
        return is_image if has_images else None

    def embed(self, input_ids: Tensor, images: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Token embeddings, with the rows of the images in the place of their placeholders.

        input_ids (B, T) with Q times `image_id` for each image, images (N, 3, height, width) in
        order, or None for text alone -> (B, T, D) and the (B, T) of `adapted`. Raises ValueError
        when the placeholders do not fit the images.
        """
        # Counted where the ids are: while they are on the CPU, it need not wait for a GPU.
        n_found = int((input_ids == self.config.image_id).sum())
        input_ids = input_ids.to(self.decoder.norm.weight.device, non_blocking=True)
        is_image = input_ids == self.config.image_id  # (B, T)
        # Ids of placeholders and padding may lie beyond a published vocabulary; any row will do.
        known = self.decoder.token_embedding.num_embeddings - 1
        x = self.decoder.token_embedding(input_ids.clamp(max=known))  # (B, T, D)
        if images is None and not n_found:
            return x, self.adapted(is_image, has_images=False)
        rows = x[:0] if images is None else self.encode_images(images)  # (N, Q, D)
        N, Q, D = rows.shape
        if n_found != N * Q:
            raise ValueError(f"the text has {n_found} placeholders, but {N} images make {N * Q}")
        # The i-th placeholder takes row i of all images. A row of zeros at the end, index -1, is
        # for the text in front of the first image.
        rows = F.pad(rows.flatten(0, 1).to(x.dtype), (0, 0, 0, 1))  # (N Q + 1, D)
        index = is_image.flatten().cumsum(0).view_as(input_ids) - 1  # (B, T)
        x = torch.where(is_image[..., None], rows[index], x)  # (B, T, D)
        return x, self.adapted(is_image, has_images=True)

    def forward(self, input_ids: Tensor, images: Tensor | None, labels: Tensor | None = None):
        """input_ids (B, T) right-padded, images (N, 3, height, width), labels (B, T) or None.

        All may be on the CPU; ids and labels should be, so that counting them waits for no GPU.
        images None: text alone. An empty tensor of images instead keeps the adapters in the graph,
        with gradients of zero. labels hold the id at each position, -100 where there is no loss.
        Returns logits (B, T, V) and None; with labels the logits (N, V) of the trained positions
        alone, since a vocabulary is wide and answers are few, and the loss in nats per token.
        Padding needs no mask: it comes after all tokens, and attention looks back only.
        """
        x, is_adapted = self.embed(input_ids, images)
        if labels is None:
            return self.decoder(x, is_adapted), None  # (B, T, V)
        targets = labels[:, 1:]  # (B, T - 1)
        trained = (targets != -100).nonzero().T  # (2, N)
        targets = targets[tuple(trained)].to(x.device, non_blocking=True)  # (N,)
        trained = trained.to(x.device, non_blocking=True)
        logits = self.decoder(x, is_adapted, at=tuple(trained))  # (N, V)
        return logits, F.cross_entropy(logits.float(), targets)

    @torch.no_grad()
    def generate(self, prompts: list[Tensor], images: Tensor | None, max_new_tokens: int,
                 stop_id: int, **sampling) -> Iterator[Tensor]:
        """Answer B prompts at once, yielding the next token of each, (B,) ids, when it is known.

        prompts: B tensors of ids, of any lengths; images (N, 3, height, width) for all of them, or
        None. A row that has yielded stop_id repeats it until all have, which is looked up after
        every eighth token. sampling: see `pick_token`. Call it in eval mode. Raises ValueError when
        max_len is too short.
        """
        c, device = self.config, self.decoder.norm.weight.device
        lengths = [len(prompt) for prompt in prompts]
        T, lengths = max(lengths), torch.tensor(lengths, device=device)
        if T + max_new_tokens > c.max_len:
            raise ValueError(f"a prompt of {T} tokens and an answer of up to {max_new_tokens} do "
                             f"not fit in max_len {c.max_len}")
        input_ids = nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=c.pad_id)
        x, is_adapted = self.embed(input_ids, images)
        cache = self.decoder.new_cache(len(prompts), T + max_new_tokens)
        last = torch.arange(len(prompts), device=device), lengths - 1
        used = [slots[:, :, :T] for slots in cache]  # attention to empty slots would cost time
        logits = self.decoder(x, is_adapted, None, used, at=last)  # (B, V)
        is_stopped = torch.zeros_like(lengths, dtype=torch.bool)
        for step in range(max_new_tokens):
            tokens = torch.where(is_stopped, stop_id, pick_token(logits, **sampling))  # (B,)
            yield tokens
            is_stopped |= tokens == stop_id
            # To look whether all have stopped makes the CPU wait for a GPU: every eighth time only.
            if step + 1 == max_new_tokens or step % 8 == 7 and is_stopped.all():
                return
            # A padded prompt left its padding in the slots from its length on; each new token
            # overwrites the slot of its own position before anything attends to it.
            x = self.decoder.token_embedding(tokens)[:, None]  # (B, 1, D)
            is_adapted = self.adapted(tokens[:, None] == c.image_id, has_images=False)
            used = [slots[:, :, :T + step + 1] for slots in cache]
            logits = self.decoder(x, is_adapted, (lengths + step)[:, None], used)[:, -1]

    def save(self, path: str | Path, **extra) -> None:
        """Write config and weights, and what `extra` names, to one file."""
        save_file({"config": asdict(self.config), "model": self.state_dict(), **extra}, path)

    @classmethod
    def load(cls, path: str | Path) -> "MLLM":
        """The model that `save` wrote. Raises as `load_file` does."""
        state = load_file(path, ["config", "model"])
        model = cls(ModelConfig(**state["config"]))
        model.load_state_dict(state["model"])
        return model


def save_file(content: dict, path: str | Path) -> None:
    """`torch.save`, but the file appears whole or not at all, whenever the program is stopped."""
    torch.save(content, f"{path}.part")
    os.replace(f"{path}.part", path)


def load_file(path: str | Path, needed: Collection[str] = ()) -> dict:
    """What `save_file` wrote. Runs no code from the file. Raises FileNotFoundError, or ValueError
    for another file, or one without the keys needed."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path}: not a whole checkpoint ({str(error)[:200]})") from error
    if missing := set(needed) - set(content):
        raise ValueError(f"{path}: not a checkpoint of this program, which has {missing}")
    return content


def main() -> None:
    model = MLLM(ModelConfig(
        vit=dict(image_size=48, patch_size=8, dim=128, n_layers=4, n_heads=4),
        qformer=dict(dim=128, n_layers=2, n_heads=4, n_queries=16, encoder_width=128),
        projector=dict(in_dim=128, out_dim=192),
        decoder=dict(vocab_size=1024, dim=192, n_layers=3, n_heads=6, r=32)))
    for name, part in [("words", model.decoder.token_embedding), *model.named_children()]:
        part.register_forward_hook(lambda part, inputs, y, name=name: print(
            f"{name:10} {tuple(inputs[0].shape)} -> {tuple(y.shape)}"))
    ids = torch.tensor([[5, 6, *[1] * 16, 7, 8]])  # 16 placeholders among words; 8 is the answer
    _, loss = model(ids, torch.zeros(1, 3, 48, 48), torch.where(ids == 8, ids, -100))
    print(f"loss of the answer {loss:.2f}, ln V = {math.log(1024):.2f}\nParameters of the papers:")
    with torch.device("meta"):  # shapes without memory
        papers = {"EVA-CLIP ViT-g/14 (1.0 billion)": ViT(224, 14, 1408, 39, 16, mlp_ratio=4.3637),
                  "BLIP-2's Q-Former (188 million)": QFormer(768, 12, 12, 32, 1408,
                                                             vocab_size=30523),
                  "Vicuna-7B (6.7 billion)": GPT(32000, 4096, 32, 32, ffn_dim=11008)}
    for name, part in papers.items():
        adapters = sum(p.numel() for key, p in part.named_parameters() if "lora_" in key)
        own = sum(p.numel() for p in part.parameters()) - adapters
        print(f"{name:32} {own:13,}, adapters {adapters:,}")


if __name__ == "__main__":
    main()
