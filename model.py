"""A multimodal language model: pictures and text in, text out. Four parts and the whole.

    image (N, 3, H, W) ─► ViT ─► (N, P, Dv) ─► Q-Former ─► (N, Q, Dq) ─► projector ─► (N, Q, D)
                                                                                         │ take the place of
    token ids (B, T) ─► token embedding ─► (B, T, D) ◄──────────────────────────────────┘ image placeholders
                                               │
                             GPT with Partial LoRA on the image rows ─► logits (B, T, V)

A batch holds B texts and N images, in the order in which their placeholders appear; a text may have none
or several. Each image stands in its text as Q placeholder ids in a row, so the length of a text is known
before the model runs, and every shape is static until logits are taken of the trained positions alone.

The parts follow BLIP-2 (arXiv 2301.12597), MiniGPT-4 (2304.10592) and InternLM-XComposer2 (2401.16420).

B texts, N images, T tokens, P patches, Q queries or other rows of an image, H heads,
Hkv key/value heads, Dh head width, D decoder width, Dv vision width, Dq Q-Former width,
V vocabulary, L longest cached sequence.
"""
import os
import types
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from plora import PLoRALinear
from qformer import QFormer, attend, fill, read_pretrained, sizes


# ---- ViT: an image as a sequence of patches -------------------------------------------------------

class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the approximation of GELU that OpenAI's CLIP was trained with."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"gelu": nn.GELU, "quick_gelu": QuickGELU, "relu": nn.ReLU, "silu": nn.SiLU}


class DropPath(nn.Module):
    """In training, drop a whole residual branch for a random share `rate` of the samples.

    What is kept is scaled by 1 / (1 - rate), so the expectation stays. Source: arXiv 1603.09382.
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        keep = torch.rand(x.shape[0], 1, 1, device=x.device) >= self.rate         # (B, 1, 1)
        return x * keep / (1 - self.rate)


class ViTBlock(nn.Module):
    """Pre-LN transformer block without a mask: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, dim: int, n_heads: int, mlp_dim: int, qkv_bias: bool, activation: str,
                 drop_path_rate: float, norm_eps: float = 1e-6):
        super().__init__()
        self.n_heads = n_heads
        self.norm1, self.norm2 = nn.LayerNorm(dim, norm_eps), nn.LayerNorm(dim, norm_eps)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.out_proj = nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_dim), ACTIVATIONS[activation](),
                                 nn.Linear(mlp_dim, dim))
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:
        N, P, D = x.shape
        shape = N, P, 3, self.n_heads, D // self.n_heads
        q, k, v = self.qkv(self.norm1(x)).view(shape).permute(2, 0, 3, 1, 4)      # (N, H, P, Dv/H)
        y = attend(q, k, v).transpose(1, 2).reshape(N, P, D)
        x = x + self.drop_path(self.out_proj(y))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """Vision transformer: a strided convolution cuts the image into patches, pre-LN blocks relate them.

    image_size: side, or (height, width), in pixels, of the images that the position embedding is laid
    out for; other sizes interpolate it. dim Dv, n_layers, n_heads; mlp_ratio: hidden width over dim.
    EVA-CLIP ViT-g/14 is ViT(224, 14, 1408, 39, 16, mlp_ratio=4.3637); CLIP ViT-L/14 is
    ViT(224, 14, 1024, 24, 16, pre_norm=True, activation="quick_gelu").

    Raises ValueError when sizes are no multiple of patch_size or dim does not divide into heads.
    Source: arXiv 2010.11929, section 3.1. Differs: no final norm unless post_norm, the model's `ln_vision` is that.
    """

    def __init__(self, image_size: int | tuple[int, int], patch_size: int, dim: int, n_layers: int,
                 n_heads: int, mlp_ratio: float = 4.0, class_token: bool = True, qkv_bias: bool = True,
                 pre_norm: bool = False, post_norm: bool = False, activation: str = "gelu", norm_eps: float = 1e-6,
                 drop_path_rate: float = 0.0, use_grad_checkpoint: bool = False):
        super().__init__()
        if dim % n_heads:
            raise ValueError(f"dim must be a multiple of n_heads, got dim {dim} and n_heads {n_heads}")
        self.patch_size, self.use_grad_checkpoint = patch_size, use_grad_checkpoint
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.grid = self._patch_grid(height, width)
        self.patch_embedding = nn.Conv2d(3, dim, patch_size, stride=patch_size, bias=not pre_norm)
        self.class_token = nn.Parameter(torch.empty(1, 1, dim)) if class_token else None
        n_positions = self.grid[0] * self.grid[1] + class_token
        self.position_embedding = nn.Parameter(torch.empty(1, n_positions, dim))
        self.pre_norm = nn.LayerNorm(dim, norm_eps) if pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(
            ViTBlock(dim, n_heads, round(dim * mlp_ratio), qkv_bias, activation,
                     drop_path_rate * i / max(n_layers - 1, 1), norm_eps) for i in range(n_layers))
        self.post_norm = nn.LayerNorm(dim, norm_eps) if post_norm else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Positions and class token N(0, 0.3), as loud as the patches; matrices N(0, 1 / fan-in), but zero
        where the MLPs write to the residual stream; biases zero."""
        for parameter in (self.position_embedding, self.class_token):
            if parameter is not None:
                nn.init.normal_(parameter, std=0.3)
        for name, module in self.named_modules():
            if isinstance(module, (nn.LayerNorm, nn.Conv2d)):
                module.reset_parameters()
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.0 if name.endswith("mlp.2") else module.in_features ** -0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def _patch_grid(self, height: int, width: int) -> tuple[int, int]:
        if height % self.patch_size or width % self.patch_size or not height or not width:
            raise ValueError(f"image height and width must be multiples of patch_size {self.patch_size}, "
                             f"got {height} x {width}")
        return height // self.patch_size, width // self.patch_size

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """The position embedding for a (rows, columns) grid of patches: (1, rows * columns [+ 1], Dv).

        Bicubic interpolation of the learned one; at the learned grid it is returned as it is. The class
        token's position, if there is one, comes first and stays.
        """
        if grid == self.grid:
            return self.position_embedding
        patches = self.position_embedding[:, -self.grid[0] * self.grid[1]:]       # (1, P, Dv)
        patches = patches.unflatten(1, self.grid).permute(0, 3, 1, 2)             # (1, Dv, rows, columns)
        patches = F.interpolate(patches.float(), size=grid, mode="bicubic", align_corners=False)
        patches = patches.flatten(2).transpose(1, 2).to(self.position_embedding.dtype)
        return torch.cat([self.position_embedding[:, :-self.grid[0] * self.grid[1]], patches], dim=1)

    def forward(self, images: Tensor) -> Tensor:
        """images (N, 3, height, width), pixels in [-1, 1], those of published weights normalised as they were trained
        -> (N, P [+ 1], Dv), the class token first."""
        grid = self._patch_grid(*images.shape[2:])
        x = self.patch_embedding(images).flatten(2).transpose(1, 2)               # (N, P, Dv)
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = self.pre_norm(x + self.positions(grid))
        for block in self.blocks:
            if self.use_grad_checkpoint and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.post_norm(x)

    @classmethod
    def from_pretrained(cls, folder: str | Path, drop_last: int = 0, **options) -> "ViT":
        """CLIP's vision tower (a folder like `openai/clip-vit-large-patch14`) or that of BLIP-2, EVA-CLIP's ViT-g/14
        (`Salesforce/blip2-opt-2.7b`). It expects pixels less the mean, over the standard deviation, of `PIXELS`.

        drop_last: how many of the last blocks are left out; LLaVA and XComposer2 leave one of CLIP's out. options: see
        the constructor. Raises FileNotFoundError, or ValueError naming what does not fit.
        """
        config, weights = read_pretrained(folder)
        model = cls(**vit_options(config) | options)
        is_clip = "clip" in config["model_type"]
        fill(model, weights, CLIP_NAMES if is_clip else EVA_NAMES, ignored=VIT_IGNORED + "|post_layernorm" * is_clip)
        if not 0 <= drop_last < len(model.blocks):
            raise ValueError(f"drop_last {drop_last} must leave at least one of {len(model.blocks)} blocks")
        model.blocks = model.blocks[:len(model.blocks) - drop_last]
        return model


# Published vision towers: what is built for them, and what theirs is called there.
PIXELS = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
VIT_IGNORED = r".*position_ids|text_|visual_projection|logit_scale|qformer\.|query_tokens|language_"
EVA_NAMES = {"class_token": "embeddings.class_embedding", "patch_embedding": "embeddings.patch_embedding",
             "position_embedding": "embeddings.position_embedding", "post_norm": "post_layernorm",
             "blocks.*.norm1": "encoder.layers.*.layer_norm1", "blocks.*.norm2": "encoder.layers.*.layer_norm2",
             "blocks.*.qkv": "encoder.layers.*.self_attn.qkv",
             "blocks.*.out_proj": "encoder.layers.*.self_attn.projection",
             "blocks.*.mlp.0": "encoder.layers.*.mlp.fc1", "blocks.*.mlp.2": "encoder.layers.*.mlp.fc2"}
CLIP_NAMES = EVA_NAMES | {
    "position_embedding": "embeddings.position_embedding.weight", "pre_norm": "pre_layrnorm",
    "blocks.*.qkv": " ".join(f"encoder.layers.*.self_attn.{part}_proj" for part in "qkv"),
    "blocks.*.out_proj": "encoder.layers.*.self_attn.out_proj"}


def vit_options(config: dict) -> dict:
    """What `ViT` must be built with to take the weights beside this config.json."""
    kind, inner = config.get("model_type"), config.get("vision_config") or config
    if kind in ("clip", "clip_vision_model"):
        default, options = (224, 32, 768, 12, 12, 3072, "quick_gelu", 1e-5), {"pre_norm": True}
    elif kind in ("blip-2", "blip_2_vision_model"):
        default, options = (224, 14, 1408, 39, 16, 6144, "gelu", 1e-6), {"post_norm": True}
        options |= sizes(inner, {"qkv_bias": ("qkv_bias", True)})
    else:
        raise ValueError(f"a ViT can take weights of the model types 'clip' and 'blip-2', not of {kind!r}")
    keys = {"image_size": "image_size", "patch_size": "patch_size", "dim": "hidden_size",
            "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads", "mlp_ratio": "intermediate_size",
            "activation": "hidden_act", "norm_eps": "layer_norm_eps"}
    options |= sizes(inner, dict(zip(keys, zip(keys.values(), default))))
    options["mlp_ratio"] /= options["dim"]
    if options["activation"] not in ACTIVATIONS:
        raise ValueError(f"config.json: unknown hidden_act {options['activation']!r}")
    return options


# ---- What stands in the Q-Former's place where there is none --------------------------------------

class PatchMerge(nn.Module):
    """n patches that follow each other, side by side in one row: (N, 1 + P, Dv) -> (N, P / n, n Dv).

    The class token is dropped. Patches follow each other from left to right and line by line, so where a line is
    no multiple of n long, some rows join the end of one to the start of the next. With n = 1 each patch is a
    row, as in LLaVA (arXiv 2304.08485, section 4.1).
    Raises ValueError when P is no multiple of n. Source: MiniGPT-v2, arXiv 2310.09478, section 2.1, with n = 4.
    """

    def __init__(self, n: int):
        super().__init__()
        self.n = n

    def forward(self, image_features: Tensor) -> Tensor:
        N, P, Dv = image_features[:, 1:].shape
        if P % self.n:
            raise ValueError(f"patch merging puts {self.n} patches in a row, but there are {P}")
        return image_features[:, 1:].reshape(N, P // self.n, self.n * Dv)         # (N, P / n, n Dv)


# ---- Projector: from the Q-Former's width to the decoder's ----------------------------------------

def make_projector(kind: str, in_dim: int, out_dim: int, hidden_dim: int = 0,
                   activation: str = "gelu", normalization: bool = False) -> nn.Module:
    """A module (..., in_dim) -> (..., out_dim).

    kind: "linear"; "mlpNx_gelu", N linears with GELU between them (LLaVA's is "mlp2x_gelu"); "mlp", two
    linears through hidden_dim (0: out_dim) with a chosen activation; "identity". normalization adds a LayerNorm of
    the output. Raises ValueError for an unknown kind or activation, or an identity between
    different widths.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}: use one of {', '.join(ACTIVATIONS)}")
    if kind == "linear":
        layers = [nn.Linear(in_dim, out_dim)]
    elif kind == "mlp":
        hidden_dim = hidden_dim or out_dim
        layers = [nn.Linear(in_dim, hidden_dim), ACTIVATIONS[activation](), nn.Linear(hidden_dim, out_dim)]
    elif kind.startswith("mlp") and kind.endswith("x_gelu") and kind[3:-6].isdigit() and int(kind[3:-6]):
        layers = [nn.Linear(in_dim, out_dim)]
        for _ in range(int(kind[3:-6]) - 1):
            layers += [nn.GELU(), nn.Linear(out_dim, out_dim)]
    elif kind == "identity":
        if in_dim != out_dim:
            raise ValueError(f"projector 'identity' cannot take width {in_dim} to {out_dim}")
        layers = []
    else:
        raise ValueError(f"unknown projector {kind!r}: use 'linear', 'mlp', 'mlpNx_gelu' (N = 1, 2, ...) "
                         "or 'identity'")
    return nn.Sequential(*layers, *([nn.LayerNorm(out_dim)] if normalization else []))


# ---- GPT: the decoder -----------------------------------------------------------------------------

def rotation(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angle by which each channel pair turns at each position.

    positions (B, T) -> two (B, T, 1, Dh/2) float32; the angle is positions * theta^(-2 i / Dh) radians.
    """
    frequency = theta ** (-torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim)
    angle = positions[..., None, None].float() * frequency
    return angle.cos(), angle.sin()


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding: (B, T, H, Dh) -> (B, T, H, Dh), channel i paired with channel i + Dh/2.

    The product of two rotated vectors depends on the difference of their positions alone.
    Source: arXiv 2104.09864, section 3.2.
    """
    cos, sin = (part.to(x.dtype) for part in rope)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class GPTAttention(nn.Module):
    """Causal grouped-query attention: n_heads query heads share n_kv_heads key/value heads.

    `wqkv` holds all query heads, then all key heads, then all value heads. Source: arXiv 2305.13245.
    """

    def __init__(self, dim: int, n_heads: int, n_kv_heads: int, qkv_bias: bool, wo_bias: bool = False, **lora):
        super().__init__()
        self.n_heads, self.n_kv_heads = n_heads, n_kv_heads
        self.head_dim = dim // n_heads
        self.wqkv = PLoRALinear(dim, (n_heads + 2 * n_kv_heads) * self.head_dim, bias=qkv_bias, **lora)
        self.wo = PLoRALinear(dim, dim, bias=wo_bias, **lora)

    @torch.no_grad()
    def match_alike(self) -> None:
        """Start each key projection as a copy of a query projection that reads it, so that from the first step
        on a token attends to tokens like itself. Source: the idea of mimetic initialisation, arXiv 2305.09828."""
        q = self.wqkv.weight[:self.n_heads * self.head_dim].unflatten(0, (self.n_kv_heads, -1, self.head_dim))
        self.wqkv.weight[self.n_heads * self.head_dim:].unflatten(0, (2, -1))[0] = q[:, 0].flatten(0, 1)

    @torch.no_grad()
    def look_back(self, rope_theta: float) -> None:
        """Start with head h attending to the token h + 1 places back, by its query and key biases alone.

        A constant query and key that RoPE has turned score the sum over channel pairs of
        amplitude^2 cos(theta_i (distance - h - 1)), which is largest at the distance h + 1.
        """
        distance = torch.arange(1, self.n_heads + 1)[None]                        # (1, H)
        cos, sin = (part[0, :, 0] for part in rotation(distance, self.head_dim, rope_theta))  # (H, Dh/2)
        fast = 4.0 * (rotation(torch.ones(1, 1), self.head_dim, rope_theta)[1][0, 0] > 0.3)   # (1, Dh/2)
        q_bias = torch.cat([fast * cos, -fast * sin], dim=-1)                     # (H, Dh)
        k_bias = torch.cat([fast, 0 * fast], dim=-1).expand(self.n_kv_heads, -1)  # (Hkv, Dh)
        self.wqkv.bias[:-self.n_kv_heads * self.head_dim] = torch.cat([q_bias, k_bias]).flatten()

    def forward(self, x: Tensor, positions: Tensor, rope: tuple[Tensor, Tensor], is_image: Tensor | None,
                cache: Tensor | None) -> Tensor:
        B, T, D = x.shape
        H, Hkv = self.n_heads, self.n_kv_heads
        heads = self.wqkv(x, is_image).view(B, T, H + 2 * Hkv, self.head_dim)
        q, k = rotate(heads[:, :, :-Hkv], rope).split([H, Hkv], dim=2)            # (B, T, H or Hkv, Dh)
        v = heads[:, :, -Hkv:]
        mask = None
        if cache is not None:                                 # the slot of a token is its position
            rows = torch.arange(B, device=x.device)[:, None]
            cache[0, rows, positions], cache[1, rows, positions] = k.to(cache), v.to(cache)
            k, v = cache.to(q.dtype)                                              # (B, L, Hkv, Dh)
            slots = torch.arange(k.shape[1], device=x.device)
            mask = (slots <= positions[..., None])[:, None]                       # (B, 1, T, L)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))                    # (B, H, T or L, Dh)
        y = attend(q, k, v, mask, is_causal=mask is None, enable_gqa=True)
        return self.wo(y.transpose(1, 2).reshape(B, T, D), is_image)


class GPTBlock(nn.Module):
    """x + attention(norm(x)), then x + w2(silu(w1 x) * w3 x) of norm(x) (SwiGLU, arXiv 2002.05202)."""

    def __init__(self, dim: int, ffn_dim: int, norm_eps: float, attention: dict, **lora):
        super().__init__()
        self.attention_norm, self.ffn_norm = nn.RMSNorm(dim, norm_eps), nn.RMSNorm(dim, norm_eps)
        self.attention = GPTAttention(dim, **attention, **lora)
        self.w1, self.w3 = PLoRALinear(dim, ffn_dim, **lora), PLoRALinear(dim, ffn_dim, **lora)
        self.w2 = PLoRALinear(ffn_dim, dim, **lora)

    def forward(self, x: Tensor, positions: Tensor, rope: tuple[Tensor, Tensor], is_image: Tensor | None,
                cache: Tensor | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), positions, rope, is_image, cache)
        h = self.ffn_norm(x)
        return x + self.w2(F.silu(self.w1(h, is_image)) * self.w3(h, is_image), is_image)


class GPT(nn.Module):
    """Decoder-only transformer of the LLaMA / InternLM2 family: RMSNorm, RoPE, grouped-query attention,
    SwiGLU, and Partial LoRA in all five linears of a block (wqkv, wo, w1, w2, w3).

    It reads embeddings, not ids, so that rows of any origin can stand among the tokens. dim D, ffn_dim:
    hidden width of SwiGLU, by default 8/3 dim; r, alpha, lora_dropout: see `PLoRALinear`.
    Raises ValueError when dim, n_heads and n_kv_heads do not divide. Source: arXiv 2302.13971, section 2.2.
    """

    def __init__(self, vocab_size: int, dim: int, n_layers: int, n_heads: int, n_kv_heads: int | None = None,
                 ffn_dim: int | None = None, rope_theta: float = 10_000.0, norm_eps: float = 1e-5,
                 qkv_bias: bool = False, wo_bias: bool = False, tied: bool = False, r: int = 256, alpha: float = 256,
                 lora_dropout: float = 0.05):
        super().__init__()
        n_kv_heads = n_kv_heads or n_heads
        if dim % n_heads or n_heads % n_kv_heads or dim // n_heads % 2:
            raise ValueError(f"dim {dim} must give n_heads {n_heads} an even width each, and n_heads must be "
                             f"a multiple of n_kv_heads {n_kv_heads}")
        attention = dict(n_heads=n_heads, n_kv_heads=n_kv_heads, qkv_bias=qkv_bias, wo_bias=wo_bias)
        lora = dict(r=r, alpha=alpha, dropout=lora_dropout)
        self.head_dim, self.rope_theta = dim // n_heads, rope_theta
        self.token_embedding = nn.Embedding(vocab_size, dim)
        self.blocks = nn.ModuleList(GPTBlock(dim, ffn_dim or 8 * dim // 3, norm_eps, attention, **lora)
                                    for _ in range(n_layers))
        self.norm = nn.RMSNorm(dim, norm_eps)
        self.lm_head = nn.Linear(dim, vocab_size, bias=False)
        if tied:
            self.lm_head.weight = self.token_embedding.weight
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Embeddings N(0, 1), so that blocks add to them rather than drown them; matrices N(0, 1 / fan-in),
        but zero where the feed-forward networks write to the residual stream.

        To answer from what was said before, a decoder must look back and must match, which small ones find
        late. `look_back` (in the first block, if it has biases) and `match_alike` let them start with it.
        """
        for name, module in self.named_modules():
            if isinstance(module, (nn.RMSNorm, nn.Embedding, PLoRALinear)):
                module.reset_parameters()
            if isinstance(module, nn.Linear):
                std = 0.0 if name.endswith("w2") else module.in_features ** -0.5
                nn.init.normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.lm_head.weight, std=0.02)
        for block in self.blocks:
            block.attention.match_alike()
        if self.blocks[0].attention.wqkv.bias is not None:
            self.blocks[0].attention.look_back(self.rope_theta)

    def new_cache(self, batch_size: int, length: int) -> list[Tensor]:
        """Room for the keys and values of `length` tokens: for each block (2, B, L, Hkv, Dh) of zeros."""
        return [torch.zeros(2, batch_size, length, block.attention.n_kv_heads, block.attention.head_dim,
                            device=self.norm.weight.device) for block in self.blocks]

    def forward(self, x: Tensor, is_image: Tensor | None = None, positions: Tensor | None = None,
                cache: list[Tensor] | None = None, at: tuple[Tensor, ...] = ()) -> Tensor:
        """x (B, T, D) embeddings, is_image (B, T) bool -> logits (B, T, V), or (N, V) where at, two index tensors (N,),
        picks the wanted of B and T. Adapters change the rows where is_image is True; plain LoRA passes True for all.

        positions (B or 1, T) count from 0, by default 0 .. T-1. With a cache, x may be the next few tokens only:
        their keys and values are kept at their positions, and they read all positions up to their own.
        """
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)[None]           # (1, T), the same for all
        rope = rotation(positions, self.head_dim, self.rope_theta)
        for i, block in enumerate(self.blocks):
            x = block(x, positions, rope, is_image, cache[i] if cache is not None else None)
        return self.lm_head(self.norm(x[at] if at else x))

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options) -> "GPT":
        """A language model of the LLaMA family (SmolLM2, TinyLlama, Vicuna), Qwen2 or InternLM2, with fresh adapters.

        options: those of the constructor, over the sizes of the file. Raises FileNotFoundError, or ValueError naming
        what does not fit.
        """
        config, weights = read_pretrained(folder)
        model = cls(**gpt_options(config) | options)
        names = LLAMA_NAMES
        if config["model_type"] == "internlm2":
            names, attention = INTERNLM2_NAMES, model.blocks[0].attention
            for name in weights:
                if ".wqkv." in name:
                    weights[name] = ungroup(weights[name], attention.n_kv_heads, attention.head_dim)
        tied = model.lm_head.weight is model.token_embedding.weight
        fill(model, weights, names, ignored=r".*rotary_emb" + "|lm_head|output" * tied, fresh=".*lora_")
        return model


# Published language models. InternLM2 puts each key/value head behind the query heads that share it.
LLAMA_NAMES = {"token_embedding": "embed_tokens", "norm": "norm", "lm_head": "lm_head",
               "blocks.*.attention_norm": "layers.*.input_layernorm",
               "blocks.*.ffn_norm": "layers.*.post_attention_layernorm",
               "blocks.*.attention.wqkv": " ".join(f"layers.*.self_attn.{part}_proj" for part in "qkv"),
               "blocks.*.attention.wo": "layers.*.self_attn.o_proj", "blocks.*.w1": "layers.*.mlp.gate_proj",
               "blocks.*.w2": "layers.*.mlp.down_proj", "blocks.*.w3": "layers.*.mlp.up_proj"}
INTERNLM2_NAMES = {"token_embedding": "tok_embeddings", "norm": "norm", "lm_head": "output",
                   "blocks.*.attention_norm": "layers.*.attention_norm", "blocks.*.ffn_norm": "layers.*.ffn_norm",
                   "blocks.*.attention.wqkv": "layers.*.attention.wqkv",
                   "blocks.*.attention.wo": "layers.*.attention.wo", "blocks.*.w1": "layers.*.feed_forward.w1",
                   "blocks.*.w2": "layers.*.feed_forward.w2", "blocks.*.w3": "layers.*.feed_forward.w3"}


def ungroup(wqkv: Tensor, n_kv_heads: int, head_dim: int) -> Tensor:
    """Rows in the order q q k v, q q k v, ... -> all query heads, all key heads, all value heads."""
    if len(wqkv) % (n_kv_heads * head_dim):
        return wqkv                                           # `fill` will say that it does not fit
    groups = wqkv.unflatten(0, (n_kv_heads, -1, head_dim))    # (Hkv, H / Hkv + 2, Dh, ...)
    return torch.cat([groups[:, :-2].flatten(0, 2), groups[:, -2].flatten(0, 1), groups[:, -1].flatten(0, 1)])


def gpt_options(config: dict) -> dict:
    """What `GPT` must be built with to take the weights beside this config.json."""
    kind = config.get("model_type")
    if kind not in ("llama", "qwen2", "internlm2"):
        raise ValueError(f"a GPT can take weights of the model types llama, qwen2 and internlm2, not of {kind!r}")
    options = sizes(config, {
        "vocab_size": ("vocab_size", {"llama": 32000, "qwen2": 151936, "internlm2": 103168}[kind]),
        "dim": ("hidden_size", 4096), "n_layers": ("num_hidden_layers", 32), "n_heads": ("num_attention_heads", 32),
        "n_kv_heads": ("num_key_value_heads", config.get("num_attention_heads") or 32),
        "ffn_dim": ("intermediate_size", 22016 if kind == "qwen2" else 11008), "norm_eps": ("rms_norm_eps", 1e-6),
        "tied": ("tie_word_embeddings", False),
        "wo_bias": ("bias", True) if kind == "internlm2" else ("attention_bias", False)})
    options["qkv_bias"] = options["wo_bias"] or kind == "qwen2"
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"config.json: expected an object for the rotary embedding, got {rope!r}")
    options |= sizes(config | rope, {"rope_theta": ("rope_theta", 10_000.0)})
    head_dim = options["dim"] // options["n_heads"]
    for key, value, known in (                                # "dynamic" is about texts longer than those of training
            ("rope_type", rope.get("rope_type", rope.get("type", "default")), ("default", "dynamic")),
            ("hidden_act", config.get("hidden_act", "silu"), ("silu",)),
            ("use_sliding_window", bool(config.get("use_sliding_window")), (False,)),
            ("head_dim", config.get("head_dim") or head_dim, (head_dim,))):
        if value not in known:
            raise ValueError(f"config.json: {key} {value!r} is not known here, only {known}")
    return options


# ---- The whole ------------------------------------------------------------------------------------

@dataclass(frozen=True)
class ModelConfig:
    """All that is needed to build an `MLLM`; a checkpoint stores it. Sizes in pixels, tokens, channels."""
    vocab_size: int
    image_size: tuple[int, int]          # height, width
    patch_size: int = 8
    vit_dim: int = 128
    vit_layers: int = 4
    vit_heads: int = 4
    drop_path_rate: float = 0.0
    use_grad_checkpoint: bool = False
    qformer_dim: int = 128
    qformer_layers: int = 3
    qformer_heads: int = 4
    n_queries: int = 16
    qformer_dropout: float = 0.0
    connector: str = "qformer"           # or one of `MERGED`, which stands in the Q-Former's place
    text_branch: bool = True             # the Q-Former's half that stage 0 alone uses
    qformer_drop_last: int = 1           # blocks that go with it, see `MLLM.drop_text_branch`
    projector: str = "linear"            # see `make_projector`
    projector_hidden_dim: int = 0        # of "mlp"; 0: as wide as the decoder
    projector_activation: str = "gelu"
    projector_norm: bool = False
    dim: int = 192
    n_layers: int = 3
    n_heads: int = 6
    n_kv_heads: int = 6
    rope_theta: float = 100.0            # texts are short here; 10,000 is usual
    qkv_bias: bool = True
    r: int = 32
    alpha: float = 128
    lora_dropout: float = 0.0
    lora_on: str = "image"               # the rows that adapters change, one of `ADAPTED`
    max_len: int = 512                   # longest prompt + answer, in tokens, image rows included
    pad_id: int = 0
    image_id: int = 1                    # the placeholder that image rows take the place of
    fit: str = "squash"                  # this and the next two: how a picture becomes pixels, see `data.to_pixels`
    pixel_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    pixel_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    vit_options: dict = field(default_factory=dict)           # what published parts need beside the above
    qformer_options: dict = field(default_factory=dict)
    decoder_options: dict = field(default_factory=dict)

    @property
    def n_patches(self) -> int:
        return self.image_size[0] // self.patch_size * (self.image_size[1] // self.patch_size)

    @property
    def n_rows(self) -> int:
        """How many rows an image becomes. Raises ValueError when its patches do not fill them."""
        if self.n_patches % MERGED.get(self.connector, 1):
            raise ValueError(f"{self.connector} puts {MERGED[self.connector]} patches in a row, but an image has "
                             f"{self.n_patches}")
        return self.n_queries if self.connector == "qformer" else self.n_patches // MERGED[self.connector]

    @property
    def row_dim(self) -> int:
        """The width of such a row before the projector."""
        return self.qformer_dim if self.connector == "qformer" else MERGED[self.connector] * self.vit_dim


# From is_image (B, T) bool and whether there are images, the rows that adapters change: those of images
# (Partial LoRA), or all (LoRA, arXiv 2106.09685). None spares a text the adapters altogether.
ADAPTED = {"image": lambda is_image, has_images: is_image if has_images else None,
           "all": lambda is_image, has_images: torch.ones_like(is_image, dtype=torch.bool)}

MERGED = {"patch-merge": 4, "patches": 1}                     # connectors without a Q-Former: patches in a row
CONNECTORS = ("qformer", *MERGED)
PARTS = ("vit", "qformer", "projector", "plora", "decoder")


def part_of(parameter_name: str) -> str:
    """Which of PARTS a parameter of `MLLM` belongs to, by its name."""
    if "lora_" in parameter_name:
        return "plora"
    module = parameter_name.split(".")[0]
    return "vit" if module == "ln_vision" else module


def write_whole(content: dict, path: str | Path) -> None:
    """`torch.save`, but the file appears whole or not at all, whenever the process or the machine stops. Raises OSError
    when it cannot be written; what was there before then stays."""
    part = Path(f"{path}.part")
    try:
        with open(part, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())                           # on the disk before it takes the old one's place
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        part.unlink(missing_ok=True)
        raise OSError(f"cannot write {path} ({error}); what was saved before is still there") from error


def read_whole(path: str | Path, device: str | torch.device, needed: tuple[str, ...]) -> dict:
    """What `write_whole` wrote. Runs no code from the file. Raises FileNotFoundError, or ValueError when it is none or
    lacks one of the keys needed."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no {path}")
    try:
        content = torch.load(path, map_location=device, weights_only=True, mmap=True)
    except Exception as error:                                # unpickling raises many kinds
        raise ValueError(f"{path} is damaged or not of this program ({str(error).splitlines()[:1]})") from error
    if not isinstance(content, dict) or not {*needed} <= content.keys():
        raise ValueError(f"{path} is not of this program: it needs {', '.join(needed)}")
    return content


def stay_in_eval(self: nn.Module, mode: bool = True) -> nn.Module:
    """What `.train()` becomes on a frozen module: nothing."""
    return self


def pick_token(logits: Tensor, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0,
               generator: torch.Generator | None = None) -> Tensor:
    """logits (B, V) -> ids (B,): the likeliest at temperature 0, else a draw from softmax(logits / temperature)
    cut to the top_k likeliest (0: all) and to the fewest that together reach probability top_p."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    ordered, ids = (logits.float() / temperature).sort(dim=-1, descending=True)   # (B, V)
    if top_k:
        ordered[:, top_k:] = float("-inf")
    probability = ordered.softmax(dim=-1)
    excess = probability.cumsum(dim=-1) - probability >= top_p                    # (B, V)
    excess[:, 0] = False                                      # the likeliest always stays
    probability[excess] = 0
    drawn = torch.multinomial(probability, 1, generator=generator)                # (B, 1)
    return ids.gather(1, drawn)[:, 0]


class MLLM(nn.Module):
    """ViT, Q-Former, projector and decoder in one. See the picture at the top of this file.

    parts: a ready `vit`, `qformer` or `decoder` to take in the place of a new one, see their `from_pretrained`.
    """

    def __init__(self, config: ModelConfig, **parts: nn.Module):
        super().__init__()
        self.config = c = config
        if c.text_branch and c.qformer_drop_last >= c.qformer_layers:
            raise ValueError(f"qformer_drop_last {c.qformer_drop_last} would leave none of {c.qformer_layers} blocks")
        if c.connector not in CONNECTORS:
            raise ValueError(f"unknown connector {c.connector!r}: use one of {', '.join(CONNECTORS)}")
        if c.lora_on not in ADAPTED:
            raise ValueError(f"unknown lora_on {c.lora_on!r}: use one of {', '.join(ADAPTED)}")
        if c.connector in MERGED:
            parts["qformer"] = PatchMerge(MERGED[c.connector])
        self.vit = parts.get("vit") or ViT(c.image_size, c.patch_size, c.vit_dim, c.vit_layers, c.vit_heads,
                                           drop_path_rate=c.drop_path_rate, use_grad_checkpoint=c.use_grad_checkpoint,
                                           **c.vit_options)
        self.ln_vision = nn.Identity() if c.vit_options.get("post_norm") else nn.LayerNorm(c.vit_dim)
        self.qformer = parts.get("qformer") or QFormer(
            c.qformer_dim, c.qformer_layers, c.qformer_heads, c.n_queries, c.vit_dim, dropout=c.qformer_dropout,
            vocab_size=c.vocab_size if c.text_branch else 0, pad_id=c.pad_id,
            **{"max_text_len": c.max_len} | c.qformer_options)
        self.projector = make_projector(c.projector, c.row_dim, c.dim, c.projector_hidden_dim,
                                        c.projector_activation, c.projector_norm)
        self.decoder = parts.get("decoder") or GPT(
            dim=c.dim, n_layers=c.n_layers, n_heads=c.n_heads, n_kv_heads=c.n_kv_heads, rope_theta=c.rope_theta,
            qkv_bias=c.qkv_bias, r=c.r, alpha=c.alpha, lora_dropout=c.lora_dropout,
            **{"vocab_size": c.vocab_size} | c.decoder_options)
        self.reset_parameters(keep=tuple(parts))

    def reset_parameters(self, keep: tuple[str, ...] = ()) -> None:
        """Initialise every parameter anew, but for those of the parts to keep."""
        for name in ("ln_vision", "vit", "qformer", "decoder"):
            if name not in keep and hasattr(part := getattr(self, name), "reset_parameters"):
                part.reset_parameters()
        for module in self.projector:
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()

    def drop_text_branch(self) -> None:
        """Take off the Q-Former what only its own training needs: its text half and its last blocks.

        Text reads the queries on their way into each block, so nothing but ITC and ITM, which care little for
        details, shapes what leaves the last one. LLaVA takes the last but one block of CLIP for a like reason.
        """
        self.qformer.drop_text_branch()
        kept = self.config.qformer_layers - self.config.qformer_drop_last
        self.qformer.blocks = self.qformer.blocks[:kept]
        self.config = replace(self.config, text_branch=False, qformer_layers=kept, qformer_drop_last=0)

    def renewed(self, config: ModelConfig) -> "MLLM":
        """This model with other settings. Parameters that keep name and shape keep their values, the position
        embedding of the ViT is interpolated to the image size, what is new starts anew."""
        if config == self.config:
            return self
        model, state = MLLM(config), self.state_dict()
        if config.patch_size == self.config.patch_size:
            state["vit.position_embedding"] = self.vit.positions(model.vit.grid)
        fits = {name: state[name] for name, value in model.state_dict().items()
                if name in state and state[name].shape == value.shape}
        model.load_state_dict(fits, strict=False)
        return model

    def train_only(self, parts: tuple[str, ...]) -> None:
        """Let these of PARTS learn and freeze the others.

        Frozen means: no gradient, and eval mode even when a parent's `.train()` is called, so that no
        dropout or drop path is ever active there (MiniGPT-4's code replaces `train` alike).
        """
        if unknown := set(parts) - set(PARTS):
            raise ValueError(f"unknown parts {sorted(unknown)}: use some of {PARTS}")
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(part_of(name) in parts)
        for module in self.modules():
            module.__dict__.pop("train", None)                # forget what froze it before
        self.train()
        for module in self.modules():
            learns = [parameter.requires_grad for parameter in module.parameters()]
            if learns and not any(learns):
                module.eval()
                module.train = types.MethodType(stay_in_eval, module)

    @torch.no_grad()
    def cast_frozen(self, dtype: torch.dtype) -> None:
        """Keep the weights and biases of frozen linear and convolution layers in another dtype, for half the
        memory; what learns and all norms and embeddings stay float32. Run the model under autocast then. What
        rounding takes is gone: a checkpoint saved then holds the rounded weights.
        Source: `convert_weights_to_fp16` in the code of BLIP-2 and MiniGPT-4.
        """
        for module in self.modules():
            if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear)):
                for parameter in (module.weight, module.bias):
                    if parameter is not None and not parameter.requires_grad:
                        parameter.data = parameter.data.to(dtype)

    def encode_images(self, images: Tensor) -> Tensor:
        """images (N, 3, height, width), pixels as `ModelConfig.pixel_mean` and `pixel_std` say, by default in [-1, 1],
        or what `see` has made of them -> rows for the decoder (N, Q, D)."""
        return self.projector(images if images.ndim == 3 else self.see(images))

    def see(self, images: Tensor) -> Tensor:
        """images (N, 3, height, width) -> (N, Q, Dq): all that comes before the projector, a constant where ViT and
        Q-Former are frozen."""
        return self.qformer(self.ln_vision(self.vit(images)))

    def embed(self, input_ids: Tensor, images: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Token embeddings, with the rows of the images in the place of their placeholders.

        input_ids (B, T) with Q times `image_id` for each image, images (N, 3, height, width) in the order
        of their placeholders, or None for text alone. Returns (B, T, D) and which rows the adapters change,
        (B, T) bool or None for none, see `ADAPTED`.
        Raises ValueError when the placeholders are not those of N images.
        """
        is_image = input_ids == self.config.image_id                              # (B, T)
        n_images = 0 if images is None else len(images)
        found, Q = int(is_image.sum()), self.config.n_rows
        if found != n_images * Q:
            raise ValueError(f"got {n_images} images, {n_images * Q} rows at {Q} each, but the text has {found} "
                             f"placeholders, room for {found / Q:g} images")
        known = self.decoder.token_embedding.num_embeddings - 1                   # nothing reads what is beyond:
        x = self.decoder.token_embedding(input_ids.clamp(max=known))              # (B, T, D) placeholders, padding
        is_adapted = ADAPTED[self.config.lora_on](is_image, images is not None)
        if images is None:
            return x, is_adapted
        rows = self.encode_images(images).flatten(0, 1).to(x.dtype)               # (N Q, D)
        rows = F.pad(rows, (0, 0, 0, 1))                      # row -1, for texts before any image
        index = is_image.flatten().cumsum(0).view_as(input_ids) - 1               # (B, T)
        return torch.where(is_image[..., None], rows[index], x), is_adapted

    def forward(self, input_ids: Tensor, images: Tensor | None, labels: Tensor | None = None):
        """input_ids (B, T) right-padded, images (N, 3, height, width), labels (B, T) or None.

        images None: text alone; with Partial LoRA nothing but the plain decoder runs. An empty tensor of images
        instead keeps the adapters in the graph with gradients of zero, as a mixed batch would.
        labels hold the id to predict *at* each position, -100 where nothing is learned (all but answers).
        Returns logits (B, T, V) and None; with labels the logits of the N trained positions alone (N, V), since a
        vocabulary is wide and answers are few, and the loss in nats per trained token.
        Padding needs no mask: it stands behind all that is read, and causal attention looks back only.
        """
        x, is_adapted = self.embed(input_ids, images)
        if labels is None:
            return self.decoder(x, is_adapted), None                              # (B, T, V)
        targets = labels[:, 1:]                                                   # (B, T - 1)
        trained = (targets != -100).nonzero(as_tuple=True)                        # rows and columns, (N,) each
        logits = self.decoder(x, is_adapted, at=trained)                          # (N, V)
        return logits, F.cross_entropy(logits.float(), targets[trained])

    @torch.no_grad()
    def generate(self, prompts: list[Tensor], images: Tensor | None, max_new_tokens: int, stop_id: int,
                 temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0,
                 generator: torch.Generator | None = None) -> Iterator[Tensor]:
        """Answer B prompts at once, yielding the next token of each, (B,) ids, as soon as it is known.

        prompts: B tensors of ids, lengths may differ; images (N, 3, height, width) for all of them in order, or
        None. A row that has yielded stop_id goes on yielding it until all rows have stopped. The rest: see
        `pick_token`. The model should be in eval mode. Raises ValueError when prompt and answer would not
        fit in max_len.
        """
        device = self.decoder.norm.weight.device
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        T, limit = int(lengths.max()), self.config.max_len
        if T + max_new_tokens > limit:
            raise ValueError(f"a prompt of {T} tokens and an answer of up to {max_new_tokens} do not fit in "
                             f"max_len {limit}")
        input_ids = nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=self.config.pad_id)
        x, is_adapted = self.embed(input_ids.to(device), images)
        cache = self.decoder.new_cache(len(prompts), T + max_new_tokens)
        last = torch.arange(len(prompts), device=device), lengths - 1
        logits = self.decoder(x, is_adapted, None, [slots[:, :, :T] for slots in cache], last)    # (B, V)
        stopped = torch.zeros_like(lengths, dtype=torch.bool)
        for step in range(max_new_tokens):
            tokens = pick_token(logits, temperature, top_k, top_p, generator)
            tokens = torch.where(stopped, stop_id, tokens)                        # (B,)
            yield tokens
            stopped |= tokens == stop_id
            if stopped.all() or step + 1 == max_new_tokens:
                return
            # A padded prompt left its padding in the slots from its length on; each new token overwrites
            # the slot of its own position before anything reads it.
            x = self.decoder.token_embedding(tokens)[:, None]                     # (B, 1, D)
            is_adapted = ADAPTED[self.config.lora_on](tokens[:, None], False)
            used = [slots[:, :, :T + step + 1] for slots in cache]                # nothing is in the others yet
            logits = self.decoder(x, is_adapted, (lengths + step)[:, None], used)[:, -1]

    def save(self, path: str | Path, **extra) -> None:
        """Write config and weights, and what `extra` names, to one file, whole or not at all. `model` in it takes the
        place of the weights, where those are split over processes."""
        write_whole({"config": asdict(self.config), "model": self.state_dict(), **extra}, path)

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> "MLLM":
        """The model that `save` wrote. Runs no code from the file. Raises FileNotFoundError, or ValueError when the
        file is none of a model or does not fit its own config."""
        state = read_whole(path, device, ("config", "model"))
        try:
            model = cls(ModelConfig(**state["config"])).to(device)
            model.load_state_dict(state["model"])
        except Exception as error:                            # whatever odd settings lead to
            raise ValueError(f"{path}: weights and settings do not fit this program ({error})") from error
        return model
