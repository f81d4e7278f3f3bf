"""Partial LoRA: a linear layer whose low-rank delta reaches the image tokens only.

    x (B, T, in_features) ──┬── W x + b ──────────────────────────────┐
                            └── dropout ── A ── × alpha / r ──┬── B ──┴──► y (B, T, out_features)
    is_image (B, T) ───────────────── 0 where it is False ────┘

LoRA (arXiv 2106.09685, section 4.1) trains a rank-r delta beside a frozen matrix.
InternLM-XComposer2 (arXiv 2401.16420, section 3) gives that delta to image tokens only: the
language model learns to take in pictures, while text rows pass the layer exactly as before.

Left out on purpose: merging the delta into W (it depends on the token, so it cannot be merged).

    python plora.py        four rows, two of them of an image: what changes, what has a gradient

B batch, T tokens, r rank.
"""
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PLoRALinear(nn.Linear):
    """`nn.Linear` plus a low-rank delta on the rows where `is_image` is True.

        y = W x + b                                             on text rows
        y = W x + b + alpha / r * lora_B(lora_A(dropout(x)))    on image rows

    r: rank of the delta; alpha: its scale before the division by r; dropout: probability in [0, 1)
    on the input of the delta. A fresh layer equals the plain linear everywhere, since lora_B
    starts at zero.

    The delta is computed for every row and set to zero on text rows between A and B, where a row
    is only r wide. All shapes stay static: boolean indexing would make the CPU wait for the device
    and break graph capture. Text rows are exactly those of the plain linear for any finite lora_B.
    And a batch without an image keeps the adapter in the autograd graph with a gradient of exactly
    zero, which data-parallel training needs.

    Raises ValueError when r is not positive or `is_image` does not fit x.
    Source: arXiv 2401.16420, section 3, where r = alpha = 256 and dropout = 0.05.
    """

    def __init__(self, in_features: int, out_features: int, r: int, alpha: float,
                 dropout: float = 0.0, bias: bool = False):
        if r < 1:
            raise ValueError(f"PLoRALinear needs a rank r of at least 1, got {r}")
        super().__init__(in_features, out_features, bias=bias)
        self.r, self.alpha, self.dropout = r, alpha, dropout
        self.lora_A = nn.Parameter(torch.empty(r, in_features))
        self.lora_B = nn.Parameter(torch.empty(out_features, r))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A random, B zero: the delta starts at zero.

        With A zero and B random it would, too. In the first step only the factor that is zero has
        a gradient. Here that is B: the layer reads x along A's r random directions and learns at
        once where to write. The other way round it would learn what to read, but could only write
        along B's r random directions. Both work; with A random larger learning rates are stable
        (arXiv 2406.08447).
        """
        super().reset_parameters()
        if hasattr(self, "lora_A"):  # nn.Linear calls this before they exist
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
            nn.init.zeros_(self.lora_B)

    def forward(self, x: Tensor, is_image: Tensor | None = None) -> Tensor:
        """x (..., in_features), is_image (...) bool -> (..., out_features).

        With `is_image=None` this is the plain linear and the adapter is not touched at all.
        """
        y = F.linear(x, self.weight, self.bias)  # (..., out_features)
        if is_image is None:
            return y
        if is_image.shape != x.shape[:-1]:
            raise ValueError(f"is_image must have shape {tuple(x.shape[:-1])}, one flag for each "
                             f"row of x, got {tuple(is_image.shape)}")
        # A frozen adapter must not drop anything, even while the base around it trains.
        drops = self.training and self.lora_A.requires_grad
        low_rank = F.linear(F.dropout(x, self.dropout, drops), self.lora_A)  # (..., r)
        low_rank = torch.where(is_image[..., None], low_rank * (self.alpha / self.r), 0.0)
        return y + F.linear(low_rank, self.lora_B)  # (..., out_features)


def main() -> None:
    torch.manual_seed(0)
    layer = PLoRALinear(6, 5, r=2, alpha=2)
    nn.init.normal_(layer.lora_B)  # as if it had been trained
    x, is_image = torch.randn(4, 6), torch.tensor([True, True, False, False])
    y, change = layer(x, is_image), (layer(x, is_image) - layer(x)).abs().amax(dim=1)
    print("row    adapter changes y by   a loss on this row: largest gradient of W, A, B")
    for i in range(4):
        weights = layer.weight, layer.lora_A, layer.lora_B
        grads = torch.autograd.grad(y[i].sum(), weights, retain_graph=True)
        sizes = " ".join(f"{grad.abs().max():8.3f}" for grad in grads)
        print(f"{'image' if is_image[i] else 'text':6} {change[i]:20.3f}  {sizes}")


if __name__ == "__main__":
    main()
