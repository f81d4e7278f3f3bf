"""A multimodal language model: pictures and text in, text out. Four parts and the whole.

    image (N, 3, H, W) ─► ViT ─► (N, P, Dv) ─► Q-Former ─► (N, Q, Dq) ─► projector ─► (N, Q, D)
                                                                                         │
    token ids (B, T) ─► token embedding ─► (B, T, D) ◄── take the place of placeholders ─┘
                                               │
                           GPT with Partial LoRA on the image tokens ─► logits (B, T, V)

What makes it multimodal is the line in the middle, `MLLM.embed`. In short:

    x = token_embedding(input_ids)  # (B, T, D)
    image_tokens = projector(qformer(ln_vision(vit(images))))  # (N, Q, D)
    x[input_ids == image_id] = image_tokens.flatten(0, 1)  # among the word embeddings
    x = decoder(x, is_image=input_ids == image_id)  # adapters act on image tokens alone
    logits = lm_head(x)  # (B, T, V)

A batch holds B texts and N images, in the order of their placeholders. A text may have no image or
several. In the ids of a text each image is Q placeholders, which keep its place until `embed`.
The parts follow BLIP-2 (arXiv 2301.12597), MiniGPT-4 (2304.10592) and InternLM-XComposer2
(2401.16420).

    python model.py        a sample on its way from pixels to loss

B texts, N images, T tokens, P patches and the class token, Q image tokens of one image,
H heads, Hkv key/value heads, Dh head width, D decoder width, Dv vision width, Dq Q-Former width,
V vocabulary, L longest cached sequence.
"""
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from plora import PLoRALinear
from qformer import QFormer, attend, init_linears

# cuDNN's attention makes a new plan for each length of text, which is slow.
torch.backends.cuda.enable_cudnn_sdp(False)

# ---- ViT: an image as a sequence of patches --------------------------------------------------
class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the approximation of GELU that OpenAI's CLIP was trained with."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"gelu": nn.GELU, "quick_gelu": QuickGELU, "relu": nn.ReLU, "silu": nn.SiLU}


def drop_path(x, rate, training):
    """In training, let a random share of samples skip this branch of a block (arXiv 1603.09382)."""
    if not training or rate == 0:
        return x
    is_kept = torch.rand(x.shape[0], 1, 1, device=x.device) >= rate  # (N, 1, 1)
    # Scaled up, so that the expected value stays.
    return x * is_kept / (1 - rate)


class ViTBlock(nn.Module):
    """Pre-LN transformer block without a mask: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, dim, n_heads, mlp_dim, activation, drop_path_rate, norm_eps=1e-6):
        super().__init__()
        self.n_heads, self.drop_path_rate = n_heads, drop_path_rate
        self.norm1 = nn.LayerNorm(dim, norm_eps)
        self.norm2 = nn.LayerNorm(dim, norm_eps)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out_proj = nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_dim), ACTIVATIONS[activation](),
                                 nn.Linear(mlp_dim, dim))

    def forward(self, x):
        N, P, D = x.shape
        qkv = self.qkv(self.norm1(x)).view(N, P, 3, self.n_heads, D // self.n_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (N, H, P, Dv/H) each
        y = attend(q, k, v).transpose(1, 2).reshape(N, P, D)
        x = x + drop_path(self.out_proj(y), self.drop_path_rate, self.training)
        return x + drop_path(self.mlp(self.norm2(x)), self.drop_path_rate, self.training)


class ViT(nn.Module):
    """Vision transformer: a strided convolution cuts an image into patches, blocks relate them.

    image_size: side, or (height, width), in pixels. The position embedding is laid out for it, and
    interpolated for images of other sizes. pre_norm: a norm before the first block, as in CLIP.
    post_norm: one after the last. Raises ValueError when sizes do not divide.
    EVA-CLIP ViT-g/14 is ViT(224, 14, 1408, 39, 16, mlp_ratio=4.3637). CLIP ViT-L/14 is
    ViT(224, 14, 1024, 24, 16, pre_norm=True, activation="quick_gelu").
    Source: arXiv 2010.11929, section 3.1.
    """

    def __init__(self, image_size, patch_size, dim, n_layers, n_heads, mlp_ratio=4.0,
                 pre_norm=False, post_norm=False, activation="gelu", norm_eps=1e-6,
                 drop_path_rate=0.0, use_grad_checkpoint=False):
        super().__init__()
        if dim % n_heads:
            raise ValueError(f"dim {dim} must be a multiple of n_heads {n_heads}")
        self.patch_size, self.use_grad_checkpoint = patch_size, use_grad_checkpoint
        if isinstance(image_size, int):
            image_size = (image_size, image_size)
        self.image_size = tuple(image_size)
        self.grid = self.grid_of(*image_size)
        # CLIP has no bias here: the position embedding can take its part.
        self.patch_embedding = nn.Conv2d(3, dim, patch_size, stride=patch_size, bias=not pre_norm)
        self.class_token = nn.Parameter(torch.empty(1, 1, dim))
        n_positions = 1 + self.grid[0] * self.grid[1]
        self.position_embedding = nn.Parameter(torch.empty(1, n_positions, dim))
        self.pre_norm = nn.LayerNorm(dim, norm_eps) if pre_norm else nn.Identity()
        self.blocks = nn.ModuleList()
        for i in range(n_layers):
            rate = drop_path_rate * i / max(n_layers - 1, 1)  # deeper blocks are dropped more often
            self.blocks.append(ViTBlock(dim, n_heads, round(dim * mlp_ratio), activation, rate,
                                        norm_eps))
        self.post_norm = nn.LayerNorm(dim, norm_eps) if post_norm else nn.Identity()
        for parameter in (self.class_token, self.position_embedding):
            nn.init.normal_(parameter, std=0.3)  # about as large as an embedded patch
        init_linears(self)
        # At first the MLPs add nothing to what attention gives.
        for block in self.blocks:
            nn.init.zeros_(block.mlp[2].weight)

    def grid_of(self, height, width):
        """The rows and columns of patches in an image: (100, 400) pixels, patches of 10: (10, 40).
        """
        if height % self.patch_size or width % self.patch_size or not height or not width:
            raise ValueError("image height and width must be multiples of patch_size "
                             f"{self.patch_size}, got {height} x {width}")
        return height // self.patch_size, width // self.patch_size

    def forward(self, images):
        """images (N, 3, height, width), pixels in [-1, 1] or as published weights want them ->
        (N, P, Dv), the class token first."""
        grid = self.grid_of(*images.shape[2:])
        # A convolution whose stride is its kernel: one linear layer for each patch.
        x = self.patch_embedding(images).flatten(2).transpose(1, 2)  # (N, P - 1, Dv)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], dim=1)  # (N, P, Dv)
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
    """n neighboring patches side by side in one image token, without the class token.
    n = 1 is LLaVA's way (arXiv 2304.08485), n = 4 MiniGPT-v2's (arXiv 2310.09478, section 2.1)."""

    def __init__(self, n):
        super().__init__()
        self.n = n

    def forward(self, image_features):
        """(N, P, Dv) -> (N, Q, n Dv), where Q = (P - 1) / n."""
        # Patches count line by line. Where n does not divide a line, a token joins the end of one
        # line and the start of the next.
        return image_features[:, 1:].unflatten(1, (-1, self.n)).flatten(2)


def make_projector(in_dim, out_dim, kind="linear", hidden_dim=0, activation="gelu",
                   normalization=False):
    """A module (..., in_dim) -> (..., out_dim), from the connector's width to the decoder's.

    "linear"       one linear layer
    "mlp"          two, with a width of hidden_dim (0: out_dim) and the activation between them
    "mlpNx_gelu"   N of them with GELU between them; LLaVA's is "mlp2x_gelu"
    "identity"     nothing, where both widths are the same

    normalization adds a LayerNorm at the end. Raises ValueError for another kind.
    """
    depth = re.fullmatch(r"mlp([1-9]\d*)x_gelu", kind)
    if kind == "linear":
        widths = [in_dim, out_dim]
    elif kind == "mlp":
        widths = [in_dim, hidden_dim or out_dim, out_dim]
    elif depth:
        widths = [in_dim] + [out_dim] * int(depth[1])
        activation = "gelu"
    elif kind == "identity" and in_dim == out_dim:
        widths = []
    else:
        raise ValueError(f"no projector {kind!r} from width {in_dim} to {out_dim}: use 'linear', "
                         "'mlp', 'mlpNx_gelu' (N = 1, 2, ...) or, within one width, 'identity'")
    layers = []
    for width, next_width in zip(widths, widths[1:]):
        layers += [nn.Linear(width, next_width), ACTIVATIONS[activation]()]
    layers = layers[:-1]  # no activation after the last linear
    if normalization:
        layers.append(nn.LayerNorm(out_dim))
    return nn.Sequential(*layers)


# ---- GPT: the decoder ------------------------------------------------------------------------
def rotation(positions, head_dim, theta):
    """Cosine and sine of the angles of RoPE: positions (B, T) -> two (B, T, 1, Dh/2) float32.
    At position t channel pair i turns by t * theta^(-2 i / Dh) radians."""
    twice_i = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    angle = positions[..., None, None].float() * theta ** (-twice_i / head_dim)
    return angle.cos(), angle.sin()


def rotate(x, rope):
    """Rotary position embedding (arXiv 2104.09864): (B, T, H, Dh) -> (B, T, H, Dh)."""
    # Why turn? A query at t and a key at s are turned by t and s steps. So their product depends on
    # t - s alone: on how far apart they are. Channel i is paired with i + Dh/2.
    cos, sin = (part.to(x.dtype) for part in rope)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class GPTAttention(nn.Module):
    """Causal grouped-query attention (arXiv 2305.13245): n_heads query heads share n_kv_heads
    key/value heads."""

    def __init__(self, dim, n_heads, n_kv_heads, qkv_bias, **lora):
        super().__init__()
        self.n_heads, self.n_kv_heads = n_heads, n_kv_heads
        self.head_dim = dim // n_heads
        # One matrix: all query heads, then all keys', then all values'.
        qkv_dim = (n_heads + 2 * n_kv_heads) * self.head_dim
        self.wqkv = PLoRALinear(dim, qkv_dim, bias=qkv_bias, **lora)
        self.wo = PLoRALinear(dim, dim, bias=False, **lora)

    def forward(self, x, positions, rope, is_image, cache):
        """x (B, T, D) at positions (B or 1, T) -> (B, T, D). rope: the `rotation` of positions.
        is_image: (B, T) or None. cache: the keys and values so far, (2, B, L, Hkv, Dh), or None."""
        B, T, D = x.shape
        H, Hkv = self.n_heads, self.n_kv_heads
        qkv = self.wqkv(x, is_image).view(B, T, H + 2 * Hkv, self.head_dim)
        q, k, v = qkv.split([H, Hkv, Hkv], dim=2)  # (B, T, H or Hkv, Dh)
        q = rotate(q, rope)
        k = rotate(k, rope)
        mask = None
        if cache is not None:
            # A token at position p is written to slot p. The prompts are at 0 to T - 1. Later each
            # text has its own p, since texts differ in length.
            texts = torch.arange(B, device=x.device)[:, None]
            cache[0, texts, positions] = k.to(cache)
            cache[1, texts, positions] = v.to(cache)
            k, v = cache.to(q.dtype)  # all so far, (B, L, Hkv, Dh) each
            slots = torch.arange(k.shape[1], device=x.device)
            mask = (slots <= positions[..., None])[:, None]  # (B, 1, T, L)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # (B, H or Hkv, T or L, Dh)
        y = attend(q, k, v, mask, is_causal=mask is None, enable_gqa=True)
        return self.wo(y.transpose(1, 2).reshape(B, T, D), is_image)


class GPTBlock(nn.Module):
    """x + attention(norm(x)), then x + w2(silu(w1 x) * w3 x) of norm(x).
    The second is SwiGLU (arXiv 2002.05202)."""

    def __init__(self, dim, ffn_dim, norm_eps, attention, **lora):
        super().__init__()
        self.attention_norm = nn.RMSNorm(dim, norm_eps)
        self.ffn_norm = nn.RMSNorm(dim, norm_eps)
        self.attention = GPTAttention(dim, **attention, **lora)
        self.w1 = PLoRALinear(dim, ffn_dim, bias=False, **lora)
        self.w3 = PLoRALinear(dim, ffn_dim, bias=False, **lora)
        self.w2 = PLoRALinear(ffn_dim, dim, bias=False, **lora)

    def forward(self, x, positions, rope, is_image, cache):
        x = x + self.attention(self.attention_norm(x), positions, rope, is_image, cache)
        h = self.ffn_norm(x)
        return x + self.w2(F.silu(self.w1(h, is_image)) * self.w3(h, is_image), is_image)


class GPT(nn.Module):
    """Decoder-only transformer of the LLaMA / InternLM2 family: RMSNorm, RoPE, grouped-query
    attention, SwiGLU, and Partial LoRA in all five linears of a block (wqkv, wo, w1, w2, w3).
    It takes embeddings, not ids, so that an image can stand among the tokens.
    Raises ValueError when sizes do not divide."""

    def __init__(self, vocab_size, dim, n_layers, n_heads, n_kv_heads=None, ffn_dim=None,
                 rope_theta=10_000.0, norm_eps=1e-5, qkv_bias=False, tied=False, r=256, alpha=256,
                 lora_dropout=0.05):
        super().__init__()
        n_kv_heads = n_kv_heads or n_heads
        ffn_dim = ffn_dim or 8 * dim // 3
        if dim % n_heads or n_heads % n_kv_heads or dim // n_heads % 2:
            raise ValueError(f"dim {dim} must give n_heads {n_heads} an even width each, and "
                             f"n_kv_heads {n_kv_heads} divide n_heads")
        attention = dict(n_heads=n_heads, n_kv_heads=n_kv_heads, qkv_bias=qkv_bias)
        lora = dict(r=r, alpha=alpha, dropout=lora_dropout)
        self.head_dim, self.rope_theta = dim // n_heads, rope_theta
        self.token_embedding = nn.Embedding(vocab_size, dim)
        self.blocks = nn.ModuleList()
        for _ in range(n_layers):
            self.blocks.append(GPTBlock(dim, ffn_dim, norm_eps, attention, **lora))
        self.norm = nn.RMSNorm(dim, norm_eps)
        self.lm_head = nn.Linear(dim, vocab_size, bias=False)
        if tied:
            self.lm_head.weight = self.token_embedding.weight
        # Untied embeddings stay N(0, 1), torch's default, so that they are not lost among what the
        # blocks add. Tied ones share the small matrix of the head.
        init_linears(self)
        for block in self.blocks:
            nn.init.zeros_(block.w2.weight)
        nn.init.normal_(self.lm_head.weight, std=0.02)
        # An answer often stands earlier in the text. Small decoders find late where to look, so
        # they start with it, in the biases of block 0: see `look_back`.
        if qkv_bias:
            look_back(self.blocks[0].attention, rope_theta)

    def forward(self, x, is_image=None, positions=None, cache=None):
        """x (B, T, D) embeddings -> (B, T, D), which `lm_head` turns into logits.
        is_image (B, T): where adapters act (LoRA: everywhere), None for nowhere. positions (B or 1,
        T): 0, 1, ... if None. cache: a tensor for each block, into which the keys and values of x
        are written. A token then attends to all positions up to its own."""
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)[None]  # (1, T)
        rope = rotation(positions, self.head_dim, self.rope_theta)
        for block, block_cache in zip(self.blocks, cache or [None] * len(self.blocks)):
            x = block(x, positions, rope, is_image, block_cache)
        return self.norm(x)


# ---- The whole -------------------------------------------------------------------------------
PATCHES_PER_TOKEN = {"patch-merge": 4, "patches": 1}  # the connectors without a Q-Former
CONNECTORS = ("qformer", *PATCHES_PER_TOKEN)
PARTS = ("vit", "connector", "projector", "adapters", "decoder")


def part_of(parameter_name):
    """Which of PARTS a parameter of `MLLM` belongs to, by its name."""
    if "lora_" in parameter_name:
        return "adapters"
    module = parameter_name.split(".")[0]
    return "vit" if module == "ln_vision" else module


@dataclass(frozen=True)
class ModelConfig:
    """All that is needed to build an `MLLM` and to feed it. A checkpoint stores it."""
    vit: dict                            # arguments of ViT
    projector: dict                      # of make_projector
    decoder: dict                        # of GPT
    qformer: dict                        # of QFormer
    connector: str = "qformer"           # one of CONNECTORS
    lora_on: str = "image"               # tokens that adapters change; "all" makes it plain LoRA
    max_len: int = 512                   # longest prompt + answer, in tokens, those of images too
    pad_id: int = 0
    image_id: int = 1                    # the placeholder that keeps the place of an image token
    pixel_mean: tuple[float, ...] = (0.5, 0.5, 0.5)       # pixels in [0, 1] become
    pixel_std: tuple[float, ...] = (0.5, 0.5, 0.5)        # (pixel - mean) / std, here in [-1, 1]


def pick_token(logits, temperature=0.0, top_k=0, generator=None):
    """The next token of each text: logits (B, V) -> ids (B,).
    temperature 0: the likeliest token. Otherwise a draw from softmax(logits / temperature), among
    the top_k likeliest tokens (0: among all)."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    if top_k:
        top_k = min(top_k, logits.shape[-1])
        least = logits.topk(top_k, dim=-1).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < least, float("-inf"))
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]


class MLLM(nn.Module):
    """ViT, connector, projector and decoder in one. See the picture at the top of this file.
    Raises ValueError for a config that names what is not there."""

    def __init__(self, config):
        super().__init__()
        if config.connector not in CONNECTORS or config.lora_on not in ("image", "all"):
            raise ValueError(f"no connector {config.connector!r} or lora_on {config.lora_on!r}")
        self.config = config
        self.vit = ViT(**config.vit)
        # The last norm of the image features, as in BLIP-2, unless the ViT has one.
        self.ln_vision = nn.Identity()
        if not config.vit.get("post_norm"):
            self.ln_vision = nn.LayerNorm(config.vit["dim"])
        # How many tokens one image becomes, Q.
        if config.connector == "qformer":
            self.connector = QFormer(**config.qformer)
            self.n_image_tokens = self.connector.n_queries
        else:
            n = PATCHES_PER_TOKEN[config.connector]
            self.connector = PatchMerge(n)
            self.n_image_tokens = math.prod(self.vit.grid) // n
            if math.prod(self.vit.grid) % n:
                raise ValueError(f"a grid of {self.vit.grid} patches does not divide by {n}")
        self.projector = make_projector(**config.projector)
        self.decoder = GPT(**config.decoder)
        # Buffers move to the GPU with the model. They are in no checkpoint, which has the config.
        for name in ("pixel_mean", "pixel_std"):
            values = torch.tensor(getattr(config, name)).view(3, 1, 1)
            self.register_buffer(name, values, persistent=False)

    @property
    def device(self):
        return self.pixel_mean.device

    def train_only(self, parts):
        """Make these of PARTS trainable, freeze the others."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(part_of(name) in parts)
        self.train()

    def train(self, mode=True):
        """As in torch, but frozen modules stay in eval mode, without dropout and drop path.
        MiniGPT-4 replaces the method `train` of its frozen parts for the same reason."""
        super().train(mode)
        if mode:
            for module in self.modules():
                # eval() reaches all modules inside, also Dropout, which has no parameters.
                trainable = [parameter.requires_grad for parameter in module.parameters()]
                if trainable and not any(trainable):
                    module.eval()
        return self

    def normalize(self, images):
        """Pixels (N, 3, height, width) uint8 as the ViT wants them, float32. Floats stay."""
        images = images.to(self.device, non_blocking=True)
        if images.is_floating_point():
            return images
        return (images / 255 - self.pixel_mean) / self.pixel_std

    def image_features(self, images):
        """Pixels (N, 3, height, width), uint8 or normalized -> (N, P, Dv)."""
        return self.ln_vision(self.vit(self.normalize(images)))

    def encode_images(self, images):
        """Pixels (N, 3, height, width), uint8 or normalized -> image tokens (N, Q, D)."""
        return self.projector(self.connector(self.image_features(images)))

    def adapter_mask(self, is_image, has_images):
        """Where adapters act, (B, T): with Partial LoRA on image tokens, with LoRA on all.
        None (Partial LoRA, text alone): nowhere. The plain decoder runs, at no extra cost."""
        if self.config.lora_on == "all":
            return torch.ones_like(is_image)
        return is_image if has_images else None

    def embed(self, input_ids, images):
        """Token embeddings, with image tokens in the place of their placeholders.
        input_ids (B, T) with Q times `image_id` for each image. images (N, 3, height, width) in
        order, or None for text alone. Returns (B, T, D), and the (B, T) of `adapter_mask`. Raises
        ValueError when placeholders and images do not match."""
        # Counted before the ids move to the GPU, so that the CPU need not wait for it.
        n_found = int((input_ids == self.config.image_id).sum())
        input_ids = input_ids.to(self.device, non_blocking=True)
        is_image = input_ids == self.config.image_id  # (B, T)
        # With a published vocabulary, placeholders and padding have ids beyond its end. Any
        # embedding will do for them: nothing reads it.
        last_id = self.decoder.token_embedding.num_embeddings - 1
        x = self.decoder.token_embedding(input_ids.clamp(max=last_id))  # (B, T, D)
        if images is None and n_found == 0:
            return x, self.adapter_mask(is_image, has_images=False)
        if images is None:
            raise ValueError(f"the text has {n_found} placeholders, but there is no image")
        image_tokens = self.encode_images(images)  # (N, Q, D)
        N, Q, _ = image_tokens.shape
        if n_found != N * Q:
            raise ValueError(f"the text has {n_found} placeholders, but {N} images make {N * Q}")
        # The i-th placeholder takes the i-th image token. x[is_image] = image_tokens would count
        # them again, for which the CPU would wait.
        x = x.masked_scatter(is_image[..., None], image_tokens.to(x.dtype))
        return x, self.adapter_mask(is_image, has_images=True)

    def forward(self, input_ids, images, labels=None):
        """input_ids (B, T) and images as for `embed` -> logits (B, T, V) and None.
        labels (B, T): the id itself where it is to be predicted, -100 elsewhere. With them: logits
        (M, V) for the M labels, and the loss in nats per token. images None: text alone. An empty
        tensor of images (as `Collate` makes) gives the adapters a gradient of zeros: several
        processes average gradients, so all must have the same ones."""
        # Padding needs no mask: it is on the right, and attention looks to the left only.
        x = self.decoder(*self.embed(input_ids, images))  # (B, T, D)
        if labels is None:
            return self.decoder.lm_head(x), None
        # Position t predicts token t + 1. A vocabulary is wide and answers are few: logits are
        # computed only where there is a label.
        targets = labels[:, 1:]  # (B, T - 1)
        where = (targets != -100).nonzero(as_tuple=True)  # on the CPU, which need not wait
        targets = targets[where].to(x.device, non_blocking=True)  # (M,)
        texts, positions = (index.to(x.device, non_blocking=True) for index in where)
        logits = self.decoder.lm_head(x[texts, positions])  # (M, V)
        return logits, F.cross_entropy(logits.float(), targets)

    @torch.no_grad()
    def generate(self, prompts, images, max_new_tokens, stop_id, **sampling):
        """Answer B prompts at once. Yields the next token of each, (B,) ids, when it is known.
        prompts: B tensors of ids, of any lengths. images (N, 3, height, width): those of all
        prompts, or None. A text that has yielded stop_id repeats it until all have. sampling: see
        `pick_token`. Call it in eval mode. Raises ValueError when max_len is too short."""
        B = len(prompts)
        lengths = [len(prompt) for prompt in prompts]
        T = max(lengths)
        if T + max_new_tokens > self.config.max_len:
            raise ValueError(f"a prompt of {T} tokens and an answer of up to {max_new_tokens} do "
                             f"not fit in max_len {self.config.max_len}")
        lengths = torch.tensor(lengths, device=self.device)
        input_ids = nn.utils.rnn.pad_sequence(prompts, batch_first=True,
                                              padding_value=self.config.pad_id)
        x, is_adapted = self.embed(input_ids, images)
        # Room for the keys and values of all tokens: (2, B, L, Hkv, Dh) for each block.
        attention = self.decoder.blocks[0].attention
        shape = (2, B, T + max_new_tokens, attention.n_kv_heads, attention.head_dim)
        cache = [torch.zeros(shape, device=self.device) for _ in self.decoder.blocks]
        # Attention to empty slots would cost time. Slices are views: what a block writes to them is
        # in `cache`.
        used = [block_cache[:, :, :T] for block_cache in cache]
        x = self.decoder(x, is_adapted, cache=used)  # (B, T, D)
        x = x[torch.arange(B, device=self.device), lengths - 1]  # (B, D), at the last token of each
        is_stopped = torch.zeros_like(lengths, dtype=torch.bool)
        for step in range(max_new_tokens):
            tokens = pick_token(self.decoder.lm_head(x), **sampling)  # (B,)
            tokens = torch.where(is_stopped, stop_id, tokens)
            yield tokens
            is_stopped |= tokens == stop_id
            if step + 1 == max_new_tokens or is_stopped.all():
                return
            # A short prompt left its padding in the slots behind it. That does no harm: each new
            # token overwrites the slot of its own position before anything attends to it.
            x = self.decoder.token_embedding(tokens)[:, None]  # (B, 1, D)
            # An answer has no image tokens: only the adapters of plain LoRA act on it.
            is_adapted = self.adapter_mask(tokens[:, None] == self.config.image_id, False)
            positions = (lengths + step)[:, None]  # (B, 1)
            used = [block_cache[:, :, :T + step + 1] for block_cache in cache]
            x = self.decoder(x, is_adapted, positions, used)[:, -1]  # (B, D)


# You have read all that the model is. What follows are two tricks, half precision, and files.

# ---- Positions for other sizes, and a start for small decoders -------------------------------
def resize_positions(positions, grid, new_grid):
    """Fit a position embedding to another (rows, columns) grid of patches: (1, P, Dv) -> same."""
    if new_grid == grid:
        return positions
    # The class token belongs to no place and stays as it is.
    class_token = positions[:, :1]
    patches = positions[:, 1:].unflatten(1, grid).permute(0, 3, 1, 2).float()
    patches = F.interpolate(patches, new_grid, mode="bicubic")  # (1, Dv, rows, columns)
    patches = patches.flatten(2).transpose(1, 2).to(positions.dtype)  # (1, rows * columns, Dv)
    return torch.cat([class_token, patches], dim=1)


@torch.no_grad()
def look_back(attention, rope_theta):
    """Let head h of a `GPTAttention` start by attending to the token h + 1 places back."""
    # With biases alone every query and every key is the same vector. But RoPE turns them, so their
    # product depends on t - s. The query bias of head h begins h + 1 steps behind the key bias. At
    # position t it has turned to t - (h + 1), as far as the key at s = t - (h + 1). The two match
    # there, and softmax chooses that token.
    distances = torch.arange(1, attention.n_heads + 1)[None]
    cos, sin = rotation(distances, attention.head_dim, rope_theta)  # (1, H, 1, Dh/2)
    # Channel pairs that hardly turn in one step cannot tell distances apart: they stay zero.
    amplitude = 4.0 * (sin[0, 0] > 0.3)  # (1, Dh/2), large enough for softmax to choose
    q_bias = torch.cat([amplitude * cos[0, :, 0], -amplitude * sin[0, :, 0]], dim=-1)  # (H, Dh)
    k_bias = torch.cat([amplitude, 0 * amplitude], dim=-1)  # (1, Dh)
    bias = torch.cat([q_bias, k_bias.expand(attention.n_kv_heads, -1)]).flatten()
    attention.wqkv.bias[:len(bias)] = bias


# ---- Half precision and files ----------------------------------------------------------------
@torch.no_grad()
def cast_frozen(model):
    """Keep frozen linear and convolution layers in bfloat16, for half the memory, as BLIP-2 does.
    All else stays float32 (adapters, norms, untied embeddings): use autocast then."""
    for module in model.modules():
        if not isinstance(module, (nn.Conv2d, nn.Linear)):
            continue
        for parameter in (module.weight, module.bias):
            if parameter is not None and not parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()


def save_file(content, path):
    """`torch.save`, but the file appears whole or not at all, whenever the program is stopped."""
    part = Path(f"{path}.part")
    try:
        torch.save(content, part)
        os.replace(part, path)
    except RuntimeError as error:  # torch's for a full disk
        raise OSError(f"cannot write {path}: is the disk full?") from error
    finally:
        part.unlink(missing_ok=True)


def load_file(path):
    """What `save_file` wrote. Runs no code from the file. Raises FileNotFoundError, ValueError."""
    with open(path, "rb") as file:
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch would advise to run code from the file
            raise ValueError(f"{path} is not a checkpoint, or not a whole one") from error


def load_model(path):
    """(the model of a checkpoint, all that it holds): {"config", "model", ...}."""
    content = load_file(path)
    if "config" not in content:
        raise ValueError(f"{path} is not a checkpoint of a finished stage")
    model = MLLM(ModelConfig(**content["config"]))
    model.load_state_dict(content["model"])
    return model, content


def main():
    model = MLLM(ModelConfig(
        vit=dict(image_size=48, patch_size=8, dim=128, n_layers=4, n_heads=4),
        qformer=dict(dim=128, n_layers=2, n_heads=4, n_queries=16, encoder_width=128),
        projector=dict(in_dim=128, out_dim=192),
        decoder=dict(vocab_size=1024, dim=192, n_layers=3, n_heads=6, r=32)))
    parts = [("words", model.decoder.token_embedding), *model.named_children(),
             ("logits", model.decoder.lm_head)]
    for name, part in parts:
        part.register_forward_hook(lambda part, inputs, y, name=name: print(
            f"{name:10} {tuple(inputs[0].shape)} -> {tuple(y.shape)}"))
    ids = torch.tensor([[5, 6, *[1] * 16, 7, 8]])  # 16 placeholders among words; 8 is the answer
    labels = torch.where(ids == 8, ids, -100)
    _, loss = model(ids, torch.zeros(1, 3, 48, 48), labels)
    print(f"loss of the answer {loss:.2f}, ln V = {math.log(1024):.2f}")


if __name__ == "__main__":
    main()
