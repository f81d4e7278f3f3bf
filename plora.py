"""Partial LoRA: a linear layer with a low-rank delta that reaches image tokens only.

    x (B, T, in_features) ──┬── W x + b ──────────────────────────────┐
                            └── dropout ── A ── × alpha / r ──┬── B ──┴──► y (B, T, out_features)
    is_image (B, T) ───────────────── 0 where it is False ────┘

LoRA (arXiv 2106.09685, section 4.1) trains a rank-r delta B A beside a frozen matrix W.
InternLM-XComposer2 (arXiv 2401.16420, section 3) applies the delta to image tokens only. The
language model learns to take in pictures. Text tokens pass each linear layer exactly as before. (In
attention they still read the image tokens before them, which is how a picture reaches the text.)

Left out on purpose: merging the delta into W. It acts on some tokens only, so it must stay apart.

    python plora.py        four tokens, two of them of an image: what changes, what gets a gradient

B batch, T tokens, r rank.
"""
import math

import torch
from torch import nn
from torch.nn import functional as F


class PLoRALinear(nn.Linear):
    """`nn.Linear` plus a low-rank delta on the tokens where `is_image` is True.

        y = W x + b                                             on text tokens
        y = W x + b + alpha / r * lora_B(lora_A(dropout(x)))    on image tokens

    r: rank of the delta. alpha: its scale, before the division by r. dropout: on the input of the
    delta. Raises ValueError when r is less than 1.
    Source: arXiv 2401.16420, section 3, where r = alpha = 256 and dropout = 0.05.
    """

    def __init__(self, in_features, out_features, r, alpha, dropout=0.0, bias=True):
        if r < 1:
            raise ValueError(f"PLoRALinear needs a rank r of at least 1, got {r}")
        super().__init__(in_features, out_features, bias=bias)
        self.r, self.alpha = r, alpha
        self.dropout = dropout
        self.lora_A = nn.Parameter(torch.empty(r, in_features))
        self.lora_B = nn.Parameter(torch.empty(out_features, r))
        self.reset_parameters()

    def reset_parameters(self):
        """A random, B zero: a fresh layer computes what the plain linear does."""
        super().reset_parameters()
        if hasattr(self, "lora_A"):  # nn.Linear calls this before they exist
            # Both zero would never learn: each factor's gradient is a multiple of the other. B
            # random and A zero would do, but A random allows larger rates (arXiv 2406.08447).
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
            nn.init.zeros_(self.lora_B)

    def forward(self, x, is_image=None):
        """x (..., in_features), is_image (...) bool -> (..., out_features).
        is_image None: no token is of an image, and the adapter is not touched. Raises ValueError
        when is_image does not fit x."""
        y = F.linear(x, self.weight, self.bias)  # (..., out_features)
        if is_image is None:
            return y
        if is_image.shape != x.shape[:-1]:
            raise ValueError(f"is_image must have shape {tuple(x.shape[:-1])}, one flag for each "
                             f"token of x, got {tuple(is_image.shape)}")
        # A frozen adapter must not drop anything: what trains around it would learn from noise.
        drops = self.training and self.lora_A.requires_grad
        low_rank = F.linear(F.dropout(x, self.dropout, drops), self.lora_A)  # (..., r)
        low_rank = low_rank * (self.alpha / self.r)
        # Why not index, x[is_image]? The CPU would wait for the GPU to count the image tokens.
        low_rank = torch.where(is_image[..., None], low_rank, 0.0)
        return y + F.linear(low_rank, self.lora_B)  # (..., out_features)


def main():
    torch.manual_seed(0)
    layer = PLoRALinear(6, 5, r=2, alpha=2)
    nn.init.normal_(layer.lora_B)  # as if it had been trained
    x = torch.randn(4, 6)
    is_image = torch.tensor([True, True, False, False])
    y = layer(x, is_image)
    change = (y - layer(x)).abs().amax(dim=1)
    print("token  adapter changes y by   a loss on this token: largest gradient of W, A, B")
    for i in range(4):
        weights = [layer.weight, layer.lora_A, layer.lora_B]
        grads = torch.autograd.grad(y[i].sum(), weights, retain_graph=True)
        sizes = " ".join(f"{grad.abs().max():8.3f}" for grad in grads)
        print(f"{'image' if is_image[i] else 'text':6} {change[i]:20.3f}  {sizes}")


if __name__ == "__main__":
    main()
