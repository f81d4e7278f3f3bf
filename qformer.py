"""Q-Former: a few learned queries that read an image and hand a language model a summary of it.

    image features (B, P, Dv) ──────────────┐ keys and values
                                            ▼
    queries (1, Q, Dq) ─► self-attention ─► cross-attention ─► query FFN ─► (B, Q, Dq)
                           │  one set of weights, one mask
    text (B, T) ids ─────► self-attention ───────────────────► text FFN  ─► (B, T, Dq)

A BERT encoder (arXiv 1810.04805: post-LN, GELU) with two changes from BLIP-2 (arXiv 2301.12597,
section 3.1): every `cross_attention_every`-th block has a cross-attention that query rows alone
pass through, and each block has one feed-forward network for queries and one for text. Queries and
text meet in self-attention only, so one small mask decides what the model can be trained for:

    a row attends to column j where 1        Q = 2 queries, T = 3 text tokens

    "separate": contrast,  "joint": matching,     "causal": generation,
    ITC                    ITM                    ITG
    1 1 . . .              1 1 1 1 1              1 1 . . .
    1 1 . . .              1 1 1 1 1              1 1 . . .
    . . 1 1 1              1 1 1 1 1              1 1 1 . .
    . . 1 1 1              1 1 1 1 1              1 1 1 1 .
    . . 1 1 1              1 1 1 1 1              1 1 1 1 1

(`similarity` runs each side alone, which equals "separate".) Under "causal" queries must not attend
to text: they could hand a token on to the rows that are to predict it.

In a block self-attention comes first, so text reads the queries as they come out of the block
before. With the three blocks of train.py's default:

    block 0   queries read the image                   text reads queries that have read nothing
    block 1   (no cross-attention)                     text reads what block 0 has made of them
    block 2   queries read the image again             text reads what block 1 has made of them
    losses    ITC and ITM of block 2's query rows      ITG of block 2's text rows

ITG, which teaches the details, shapes the query rows up to block 1. The last block's are shaped by
ITC and ITM alone, so train.py leaves that block out when the losses have done their work: the
decoder gets the rows of block 1, which have read the image **once**.

The text half is needed for these losses alone. `vocab_size=0` builds what MiniGPT-4 uses, the
queries and the layers that they pass through; a trained Q-Former fits it with `strict=False`.

Left out on purpose: momentum queues, ITC negatives from other devices, BERT's segment embeddings.

    python qformer.py        the three masks, and who reads what in each block

B batch, P patches, Q queries, T text tokens, S = Q + T, H heads, Dv vision width, Dq width.
"""
import torch
from torch import Tensor, nn
from torch.nn import functional as F


def attention_mask(kind: str, n_queries: int, n_text: int, device=None) -> Tensor:
    """The (S, S) bool matrix of the picture above, True where a row attends to a column. kind:
    "separate", "joint" or "causal". Source: arXiv 2301.12597, figure 2."""
    n = n_queries + n_text
    mask = torch.zeros(n, n, dtype=torch.bool, device=device)
    mask[:n_queries, :n_queries] = True  # queries attend to queries
    if kind == "separate":
        mask[n_queries:, n_queries:] = True  # text attends to text
    elif kind == "joint":
        mask[:] = True
    elif kind == "causal":
        mask[n_queries:, :n_queries] = True  # text attends to every query
        mask[n_queries:, n_queries:].fill_(True).tril_()  # text attends to the text before it
    else:
        raise ValueError(f"unknown mask {kind!r}: use 'separate', 'joint' or 'causal'")
    return mask


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **options) -> Tensor:
    """softmax(q k' / sqrt(Dh)) v for each head, of width Dh: q (B, H, S, Dh), k and v (B, H, K,
    Dh), mask (B or 1, 1, S, K) True where a row attends to a column -> (B, H, S, Dh)."""
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, mask, **options)
    # On a CPU in float32 even under autocast: torch's bfloat16 backward is 3 to 20 times slower.
    with torch.autocast("cpu", enabled=False):
        y = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask, **options)
    return y.to(q.dtype)


def init_linears(module: nn.Module, zero: str = "-") -> None:
    """Matrices N(0, 1 / fan-in), but 0 where the name of a linear ends in `zero`; biases 0."""
    for name, linear in module.named_modules():
        if isinstance(linear, nn.Linear):
            std = 0.0 if name.endswith(zero) else linear.in_features ** -0.5
            nn.init.normal_(linear.weight, std=std)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)


class Attention(nn.Module):
    """Multi-head attention with biases; keys and values may come from another source and width."""

    def __init__(self, dim: int, n_heads: int, kv_dim: int, dropout: float):
        super().__init__()
        self.n_heads, self.dropout = n_heads, dropout
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(kv_dim, dim)
        self.v_proj = nn.Linear(kv_dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, source: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, S, Dq) attends to source (B, K, kv_dim) where mask is True -> (B, S, Dq)."""
        B, S, D = x.shape
        heads = self.n_heads, D // self.n_heads
        q = self.q_proj(x).unflatten(-1, heads).transpose(1, 2)  # (B, H, S, Dq/H)
        k = self.k_proj(source).unflatten(-1, heads).transpose(1, 2)  # (B, H, K, Dq/H)
        v = self.v_proj(source).unflatten(-1, heads).transpose(1, 2)
        y = attend(q, k, v, mask, dropout_p=self.dropout if self.training else 0.0)
        return self.out_proj(y.transpose(1, 2).reshape(B, S, D))


def feed_forward(dim: int, ffn_dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU(), nn.Linear(ffn_dim, dim))


class QFormerBlock(nn.Module):
    """Self-attention for all, cross-attention for queries (if there is an encoder_width), then a
    FFN for queries and one for text (if has_text). They share self-attention to read each other. A
    FFN treats each row alone, and a query (what is in the picture?) needs other treatment than a
    word (what comes next?). Post-LN: sublayers end in `norm(x + dropout(sublayer(x)))`."""

    def __init__(self, dim: int, n_heads: int, ffn_dim: int, dropout: float,
                 encoder_width: int | None, has_text: bool, norm_eps: float = 1e-5):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.self_attention = Attention(dim, n_heads, dim, dropout)
        self.self_attention_norm = nn.LayerNorm(dim, norm_eps)
        self.cross_attention = None
        if encoder_width is not None:
            self.cross_attention = Attention(dim, n_heads, encoder_width, dropout)
            self.cross_attention_norm = nn.LayerNorm(dim, norm_eps)
        self.query_ffn = feed_forward(dim, ffn_dim)
        self.query_ffn_norm = nn.LayerNorm(dim, norm_eps)
        if has_text:
            self.text_ffn = feed_forward(dim, ffn_dim)
            self.text_ffn_norm = nn.LayerNorm(dim, norm_eps)

    def forward(self, x: Tensor, n_queries: int, image_features: Tensor | None,
                mask: Tensor | None) -> Tensor:
        """x (B, S, Dq), its first n_queries rows queries -> (B, S, Dq)."""
        x = self.self_attention_norm(x + self.dropout(self.self_attention(x, x, mask)))
        queries, text = x[:, :n_queries], x[:, n_queries:]
        if n_queries:
            if self.cross_attention is not None:
                from_image = self.cross_attention(queries, image_features)
                queries = self.cross_attention_norm(queries + self.dropout(from_image))
            queries = self.query_ffn_norm(queries + self.dropout(self.query_ffn(queries)))
        if text.shape[1]:
            text = self.text_ffn_norm(text + self.dropout(self.text_ffn(text)))
        return torch.cat([queries, text], dim=1)  # (B, S, Dq)


class QFormer(nn.Module):
    """Learned queries that turn (B, P, Dv) image features into (B, Q, Dq), whatever P is.

    dim Dq, n_queries Q, encoder_width Dv. vocab_size 0 leaves out the text half, and with it the
    losses. Published: dim 768, 12 layers, 12 heads, 32 queries, dropout 0.1. Raises ValueError when
    dim does not divide into heads. Source: arXiv 2301.12597, section 3.1.
    """

    def __init__(self, dim: int, n_layers: int, n_heads: int, n_queries: int, encoder_width: int,
                 cross_attention_every: int = 2, ffn_dim: int | None = None, dropout: float = 0.1,
                 vocab_size: int = 0, max_text_len: int = 512, itc_dim: int = 256, pad_id: int = 0,
                 norm_eps: float = 1e-5):
        super().__init__()
        if dim % n_heads:
            raise ValueError(f"dim {dim} must be a multiple of n_heads {n_heads}")
        self.n_queries, self.pad_id, self.has_text = n_queries, pad_id, vocab_size > 0
        self.query_tokens = nn.Parameter(torch.empty(1, n_queries, dim))
        self.embedding_norm, self.dropout = nn.LayerNorm(dim, norm_eps), nn.Dropout(dropout)
        self.blocks = nn.ModuleList()
        for i in range(n_layers):
            width = encoder_width if i % cross_attention_every == 0 else None
            self.blocks.append(QFormerBlock(dim, n_heads, ffn_dim or 4 * dim, dropout, width,
                                            self.has_text, norm_eps))
        if self.has_text:
            self.word_embedding = nn.Embedding(vocab_size, dim)
            self.position_embedding = nn.Embedding(max_text_len, dim)
            self.itc_image = nn.Linear(dim, itc_dim)
            self.itc_text = nn.Linear(dim, itc_dim)
            self.temperature = nn.Parameter(torch.full((), 0.07))
            self.itm_head = nn.Linear(dim, 2)
            self.lm_head = nn.Sequential(nn.Linear(dim, dim), nn.GELU(),
                                         nn.LayerNorm(dim, norm_eps), nn.Linear(dim, vocab_size))
            self.lm_head[-1].weight = self.word_embedding.weight  # tied, as in BERT
        nn.init.normal_(self.query_tokens, std=0.02)
        # Differs: BERT draws matrices from N(0, 0.02), too, which is far too small at width 128.
        init_linears(self)
        if self.has_text:  # after the linears, since the head shares the weight of the words
            nn.init.normal_(self.word_embedding.weight, std=0.02)
            nn.init.normal_(self.position_embedding.weight, std=0.02)

    def forward(self, image_features: Tensor | None = None, text: Tensor | None = None,
                kind: str = "joint") -> Tensor:
        """image_features (B, P, Dv) -> (B, Q, Dq), the queries after they have read the image.

        With text, ids (B, T), -> (B, S, Dq), the query rows and then the text rows, under the mask
        `kind`; without image_features the text rows alone. No row attends to padding.
        """
        rows, n_queries = [], 0
        if image_features is not None:
            n_queries = self.n_queries
            rows.append(self.query_tokens.expand(image_features.shape[0], -1, -1))  # (B, Q, Dq)
        mask = None  # queries alone all attend to each other
        if text is not None:
            rows.append(self.embed_text(text))  # (B, T, Dq)
            is_token = F.pad(text != self.pad_id, (n_queries, 0), value=True)  # (B, S)
            mask = attention_mask(kind, n_queries, text.shape[1], text.device)  # (S, S)
            mask = (mask & is_token[:, None])[:, None]  # (B, 1, S, S)
        x = self.dropout(self.embedding_norm(torch.cat(rows, dim=1)))  # (B, S, Dq)
        for block in self.blocks:
            x = block(x, n_queries, image_features, mask)
        return x

    def embed_text(self, text: Tensor) -> Tensor:
        """(B, T) ids -> (B, T, Dq): words plus positions, from 0 at the first text token, whether
        or not queries stand before it. Raises ValueError without a text half."""
        if not self.has_text:
            raise ValueError("this Q-Former has no text half: build it with vocab_size > 0")
        T, longest = text.shape[1], self.position_embedding.num_embeddings
        if T > longest:
            raise ValueError(f"text of {T} tokens is longer than max_text_len {longest}")
        return self.word_embedding(text) + self.position_embedding.weight[:T]

    def similarity(self, query_rows: Tensor, text: Tensor) -> Tensor:
        """How well each image fits each text: (B, B) cosines divided by the temperature, [i, j] of
        image i and text j. query_rows (B, Q, Dq) from `forward`; text (B, T) ids that begin with
        <s>, whose output stands for the whole text. An image is scored by its best query."""
        image = F.normalize(self.itc_image(query_rows), dim=-1)  # (B, Q, itc_dim)
        summary = self(text=text, kind="separate")[:, 0]  # (B, Dq)
        words = F.normalize(self.itc_text(summary), dim=-1)  # (B, itc_dim)
        cosine = torch.einsum("iqd,td->itq", image, words).amax(dim=-1)  # (B, B)
        # In float32, also under autocast: softmax will take differences of large numbers.
        return cosine.float() / self.temperature.clamp(min=0.001)

    def itc_loss(self, similarity: Tensor) -> Tensor:
        """Image-text contrastive loss in nats: pick the text of each image and the image of each
        text. similarity (B, B), true pairs on the diagonal. Differs: no label smoothing."""
        target = torch.arange(similarity.shape[0], device=similarity.device)
        return (F.cross_entropy(similarity, target) + F.cross_entropy(similarity.T, target)) / 2

    def itm_loss(self, image_features: Tensor, text: Tensor, similarity: Tensor) -> Tensor:
        """Image-text matching loss in nats over 3B pairs, two thirds of them deliberately wrong.

        image_features (B, P, Dv), text (B, T), similarity (B, B). Each text also gets a wrong
        image, and each image a wrong text, drawn more often the more similar they are. A 2-way
        head looks at every query; its logits are averaged. Raises ValueError if B < 2.
        """
        B = text.shape[0]
        if B < 2:
            raise ValueError(f"image-text matching needs wrong pairs: at least 2 samples, got {B}")
        itself = torch.eye(B, dtype=torch.bool, device=text.device)
        # multinomial would raise at NaN; this way the loss is NaN, and the loop skips the step.
        odds = similarity.detach().nan_to_num().masked_fill(itself, float("-inf"))  # (B, B)
        wrong_text = torch.multinomial(odds.softmax(dim=1), 1)[:, 0]  # (B,)
        wrong_image = torch.multinomial(odds.T.softmax(dim=1), 1)[:, 0]  # (B,)
        images = torch.cat([image_features, image_features[wrong_image], image_features])
        texts = torch.cat([text, text, text[wrong_text]])  # (3B, T)
        queries = self(images, texts, "joint")[:, :self.n_queries]  # (3B, Q, Dq)
        logits = self.itm_head(queries).mean(dim=1)  # (3B, 2)
        is_pair = torch.arange(3 * B, device=text.device) < B
        return F.cross_entropy(logits.float(), is_pair.long())

    def itg_loss(self, image_features: Tensor, text: Tensor,
                 labels: Tensor) -> tuple[Tensor, Tensor]:
        """Image-grounded generation: predict each text token from queries and the tokens before.

        image_features (B, P, Dv); text (B, T), which begins with <dec>, the sign to write; labels
        (B, T): the tokens of text to predict, -100 for the others. Returns the loss in nats per
        token and the query rows (B, Q, Dq), which text never moves.
        """
        x = self(image_features, text, "causal")  # (B, S, Dq)
        logits = self.lm_head(x[:, self.n_queries:-1])  # (B, T - 1, V)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), labels[:, 1:].flatten())
        return loss, x[:, :self.n_queries]


def main() -> None:
    for kind in ("separate", "joint", "causal"):
        print(f"{kind}:")
        for i, row in enumerate(attention_mask(kind, n_queries=2, n_text=3).int().tolist()):
            print("   ", "query" if i < 2 else "text ", *row)
    qformer = QFormer(128, n_layers=3, n_heads=4, n_queries=16, encoder_width=128, vocab_size=1024)
    for i, block in enumerate(qformer.blocks):
        reads = "read the image" if block.cross_attention is not None else "do not read the image"
        size = sum(parameter.numel() for parameter in block.parameters())
        print(f"block {i}: {size:,} parameters; queries {reads}; text reads the queries "
              f"{f'of block {i - 1}' if i else 'that have read nothing'}")
    rows = qformer(torch.randn(2, 37, 128))
    print(f"image features (2, 37, 128) -> rows {tuple(rows.shape)}")


if __name__ == "__main__":
    main()
