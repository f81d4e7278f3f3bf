"""Q-Former: a few learned queries that read an image and hand a language model a short summary of it.

    image features (B, P, Dv) ──────────────┐ keys and values
                                            ▼
    queries (1, Q, Dq) ─► self-attention ─► cross-attention ─► query FFN ─► (B, Q, Dq)
                           │  one set of weights, one mask
    text (B, T) ids ─────► self-attention ───────────────────► text FFN  ─► (B, T, Dq)

A BERT encoder (arXiv 1810.04805: post-LN, GELU) with two changes from BLIP-2 (arXiv 2301.12597,
section 3.1): every `cross_attention_every`-th block has a cross-attention that query rows alone pass
through, and each block has one feed-forward network for queries and one for text. Queries and text
meet in self-attention only, so one small mask decides what the model is:

    a row reads column j where 1        Q = 2 queries, T = 3 text tokens

    "separate" (ITC)       "joint" (ITM)          "causal" (ITG)
    1 1 . . .              1 1 1 1 1              1 1 . . .
    1 1 . . .              1 1 1 1 1              1 1 . . .
    . . 1 1 1              1 1 1 1 1              1 1 1 . .
    . . 1 1 1              1 1 1 1 1              1 1 1 1 .
    . . 1 1 1              1 1 1 1 1              1 1 1 1 1

Once trained, `drop_text_branch()` leaves what MiniGPT-4 uses: the queries and what they pass through.

Left out on purpose: momentum queues, gathering ITC negatives across devices, BERT's segment embeddings.

B batch, P patches, Q queries, T text tokens, S = Q + T, H heads, Dv vision width, Dq width, V vocabulary.
"""
import torch
from torch import Tensor, nn
from torch.nn import functional as F


def attention_mask(kind: str, n_queries: int, n_text: int) -> Tensor:
    """The (S, S) bool matrix of the picture above: True where the row's token may read the column's.

    kind: "separate", "joint" or "causal". Source: arXiv 2301.12597, figure 2.
    """
    mask = torch.zeros(n_queries + n_text, n_queries + n_text, dtype=torch.bool)
    mask[:n_queries, :n_queries] = True                       # queries read queries
    if kind == "separate":
        mask[n_queries:, n_queries:] = True                   # text reads text
    elif kind == "joint":
        mask[:] = True
    elif kind == "causal":
        mask[n_queries:, :n_queries] = True                   # text reads every query
        mask[n_queries:, n_queries:] = torch.ones(n_text, n_text).tril().bool()
    else:
        raise ValueError(f"unknown mask {kind!r}: use 'separate', 'joint' or 'causal'")
    return mask


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **options) -> Tensor:
    """softmax(q k' / sqrt(Dq/H)) v over heads: q (B, H, S, Dq/H), k and v (B, H, K, Dq/H), mask (B or 1, 1, S, K)
    True where a row may read a column -> (B, H, S, Dq/H). options: see torch's scaled_dot_product_attention.

    On a CPU it runs in float32 even under autocast: torch's bfloat16 backward is 3 to 20 times slower there.
    """
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, mask, **options)
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask, **options).to(q.dtype)


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
        """x (B, S, Dq) reads source (B, K, kv_dim) where mask (B or 1, 1, S, K) is True -> (B, S, Dq)."""
        B, S, D = x.shape
        heads = self.n_heads, D // self.n_heads
        q = self.q_proj(x).unflatten(-1, heads).transpose(1, 2)                   # (B, H, S, Dq/H)
        k = self.k_proj(source).unflatten(-1, heads).transpose(1, 2)              # (B, H, K, Dq/H)
        v = self.v_proj(source).unflatten(-1, heads).transpose(1, 2)
        y = attend(q, k, v, mask, dropout_p=self.dropout if self.training else 0.0)
        return self.out_proj(y.transpose(1, 2).reshape(B, S, D))


class FeedForward(nn.Sequential):
    """Dq -> ffn_dim -> GELU -> Dq, for each token alone."""

    def __init__(self, dim: int, ffn_dim: int):
        super().__init__(nn.Linear(dim, ffn_dim), nn.GELU(), nn.Linear(ffn_dim, dim))


class QFormerBlock(nn.Module):
    """Self-attention for all, cross-attention (in some blocks) for queries, then one FFN for each kind.

    Post-LN as in BERT: every sublayer ends in `norm(x + dropout(sublayer(x)))`.
    """

    def __init__(self, dim: int, n_heads: int, ffn_dim: int, dropout: float, encoder_width: int | None):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.self_attention = Attention(dim, n_heads, dim, dropout)
        self.self_attention_norm = nn.LayerNorm(dim)
        self.cross_attention = None
        if encoder_width is not None:
            self.cross_attention = Attention(dim, n_heads, encoder_width, dropout)
            self.cross_attention_norm = nn.LayerNorm(dim)
        self.query_ffn, self.query_ffn_norm = FeedForward(dim, ffn_dim), nn.LayerNorm(dim)
        self.text_ffn, self.text_ffn_norm = FeedForward(dim, ffn_dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor, n_queries: int, image_features: Tensor | None,
                mask: Tensor | None) -> Tensor:
        """x (B, S, Dq), its first n_queries rows queries -> (B, S, Dq)."""
        x = self.self_attention_norm(x + self.dropout(self.self_attention(x, x, mask)))
        queries, text = x[:, :n_queries], x[:, n_queries:]
        if n_queries:
            if self.cross_attention is not None:
                read = self.cross_attention(queries, image_features)
                queries = self.cross_attention_norm(queries + self.dropout(read))
            queries = self.query_ffn_norm(queries + self.dropout(self.query_ffn(queries)))
        if text.shape[1]:
            text = self.text_ffn_norm(text + self.dropout(self.text_ffn(text)))
        return torch.cat([queries, text], dim=1)                                  # (B, S, Dq)


class QFormer(nn.Module):
    """Learned queries that turn (B, P, Dv) image features into (B, Q, Dq), whatever P is.

    dim Dq, n_layers, n_heads, n_queries Q, encoder_width Dv. vocab_size 0 builds it without the text
    branch; otherwise `itc_loss`, `itm_loss` and `itg_loss` train it together with the image encoder.
    The published size is dim 768, 12 layers, 12 heads, 32 queries, ffn_dim 3072, dropout 0.1.

    Raises ValueError when dim does not divide into heads, or text is used without a text branch.
    Source: arXiv 2301.12597, section 3.1.
    """

    def __init__(self, dim: int, n_layers: int, n_heads: int, n_queries: int, encoder_width: int,
                 cross_attention_every: int = 2, ffn_dim: int | None = None, dropout: float = 0.1,
                 vocab_size: int = 0, max_text_len: int = 512, itc_dim: int = 256, pad_id: int = 0):
        super().__init__()
        if dim % n_heads:
            raise ValueError(f"dim must be a multiple of n_heads, got dim {dim} and n_heads {n_heads}")
        self.n_queries, self.pad_id = n_queries, pad_id
        self.query_tokens = nn.Parameter(torch.empty(1, n_queries, dim))
        self.embedding_norm, self.dropout = nn.LayerNorm(dim), nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            QFormerBlock(dim, n_heads, ffn_dim or 4 * dim, dropout,
                         encoder_width if i % cross_attention_every == 0 else None)
            for i in range(n_layers))

        self.has_text_branch = vocab_size > 0
        if self.has_text_branch:
            self.word_embedding = nn.Embedding(vocab_size, dim)
            self.position_embedding = nn.Embedding(max_text_len, dim)
            self.itc_image = nn.Linear(dim, itc_dim)
            self.itc_text = nn.Linear(dim, itc_dim)
            self.temperature = nn.Parameter(torch.empty(()))
            self.itm_head = nn.Linear(dim, 2)
            self.lm_head = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.LayerNorm(dim),
                                         nn.Linear(dim, vocab_size))
            self.lm_head[-1].weight = self.word_embedding.weight                  # tied, as in BERT
        else:
            self.drop_text_branch()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Queries and embeddings N(0, 0.02), matrices N(0, 1 / fan-in), biases 0, temperature 0.07.

        Differs: BERT draws its matrices from N(0, 0.02) too, which is 1 / fan-in at width 2500 and far too
        quiet at width 128.
        """
        nn.init.normal_(self.query_tokens, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features ** -0.5)
                nn.init.zeros_(module.bias)
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        if self.has_text_branch:
            for embedding in (self.word_embedding, self.position_embedding):    # the head shares the words'
                nn.init.normal_(embedding.weight, std=0.02)
            nn.init.constant_(self.temperature, 0.07)

    def drop_text_branch(self) -> None:
        """Remove all that image queries do not pass through (arXiv 2304.10592 uses the rest, frozen)."""
        for name in ("word_embedding", "position_embedding", "itc_image", "itc_text", "temperature",
                     "itm_head", "lm_head"):
            if hasattr(self, name):
                delattr(self, name)
        for block in self.blocks:
            del block.text_ffn, block.text_ffn_norm
        self.has_text_branch = False

    def forward(self, image_features: Tensor) -> Tensor:
        """image_features (B, P, Dv) -> (B, Q, Dq)."""
        return self.encode(image_features)

    def encode(self, image_features: Tensor | None = None, text: Tensor | None = None,
               kind: str = "joint") -> Tensor:
        """Run queries, text, or both under the mask `kind`.

        image_features (B, P, Dv) or None for no queries; text (B, T) token ids or None.
        Returns (B, S, Dq): the query rows, then the text rows. No row reads padding.
        """
        rows = []
        if image_features is not None:
            rows.append(self.query_tokens.expand(image_features.shape[0], -1, -1))  # (B, Q, Dq)
        n_queries, n_text = (self.n_queries if rows else 0), 0
        mask = None                                           # queries alone all read each other
        if text is not None:
            n_text = text.shape[1]
            rows.append(self._embed_text(text))                                   # (B, T, Dq)
            readable = F.pad(text != self.pad_id, (n_queries, 0), value=True)     # (B, S)
            mask = attention_mask(kind, n_queries, n_text).to(text.device)        # (S, S)
            mask = (mask & readable[:, None])[:, None]                            # (B, 1, S, S)
        x = self.dropout(self.embedding_norm(torch.cat(rows, dim=1)))             # (B, S, Dq)
        for block in self.blocks:
            x = block(x, n_queries, image_features, mask)
        return x

    def _embed_text(self, text: Tensor) -> Tensor:
        """Words plus positions, which count from 0 at the first text token whether or not queries stand
        before it. (B, T) ids -> (B, T, Dq)."""
        if not self.has_text_branch:
            raise ValueError("this Q-Former has no text branch: build it with vocab_size > 0")
        T, longest = text.shape[1], self.position_embedding.num_embeddings
        if T > longest:
            raise ValueError(f"text of {T} tokens is longer than max_text_len {longest}")
        return self.word_embedding(text) + self.position_embedding.weight[:T]

    def similarity(self, query_rows: Tensor, text: Tensor) -> Tensor:
        """How well each image fits each text, in units of the temperature: (B_images, B_texts).

        query_rows (B_images, Q, Dq) from `forward`; text (B_texts, T) ids, its first token a summary
        token. Cosine of the best-fitting query, divided by the temperature.
        """
        image = F.normalize(self.itc_image(query_rows), dim=-1)                   # (B, Q, itc_dim)
        words = F.normalize(self.itc_text(self.encode(text=text)[:, 0]), dim=-1)  # (B, itc_dim)
        cosine = torch.einsum("iqd,td->itq", image, words).amax(dim=-1)           # (B, B)
        return cosine / self.temperature.clamp(min=0.001)

    def itc_loss(self, similarity: Tensor) -> Tensor:
        """Image-text contrastive loss in nats: pick the text of each image and the image of each text.

        similarity (B, B) with the true pairs on the diagonal. Source: arXiv 2301.12597, section 3.1.
        Differs: no label smoothing.
        """
        target = torch.arange(similarity.shape[0], device=similarity.device)
        return (F.cross_entropy(similarity, target) + F.cross_entropy(similarity.T, target)) / 2

    def itm_loss(self, image_features: Tensor, text: Tensor, similarity: Tensor) -> Tensor:
        """Image-text matching loss in nats over 3B pairs, two thirds of them deliberately wrong.

        image_features (B, P, Dv), text (B, T), similarity (B, B). Each text also gets a wrong image, and
        each image a wrong text, drawn more often the more similar they are. A 2-way head reads every
        query; its logits are averaged. Source: arXiv 2301.12597, section 3.1.
        """
        B = text.shape[0]
        if B < 2:
            raise ValueError(f"image-text matching draws wrong pairs from the batch: it needs at least "
                             f"2 samples, got {B}")
        itself = torch.eye(B, dtype=torch.bool, device=text.device)
        odds = similarity.detach().float().masked_fill(itself, float("-inf"))     # (B, B)
        wrong_text = torch.multinomial(odds.softmax(dim=1), 1)[:, 0]              # (B,)
        wrong_image = torch.multinomial(odds.T.softmax(dim=1), 1)[:, 0]           # (B,)
        images = torch.cat([image_features, image_features[wrong_image], image_features])
        texts = torch.cat([text, text, text[wrong_text]])                         # (3B, T)
        queries = self.encode(images, texts, "joint")[:, :self.n_queries]         # (3B, Q, Dq)
        logits = self.itm_head(queries).mean(dim=1)                               # (3B, 2)
        is_pair = torch.arange(3 * B, device=text.device) < B
        return F.cross_entropy(logits.float(), is_pair.long())

    def itg_loss(self, image_features: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Image-grounded generation: predict each text token from the queries and the tokens before it.

        image_features (B, P, Dv); text (B, T), its first token the start of decoding. Returns the loss in
        nats per token and the query rows (B, Q, Dq), which text never moves and which therefore equal
        `forward(image_features)`. Source: arXiv 2301.12597, section 3.1.
        """
        x = self.encode(image_features, text, "causal")                           # (B, S, Dq)
        logits = self.lm_head(x[:, self.n_queries:-1])                            # (B, T - 1, V)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), text[:, 1:].flatten(),
                               ignore_index=self.pad_id)
        return loss, x[:, :self.n_queries]
