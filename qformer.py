"""Q-Former: a few learned queries read an image and hand the language model a summary of it.

    image features (B, P, Dv) ──────────────┐ keys and values
                                            ▼
    queries (1, Q, Dq) ─► self-attention ─► cross-attention ─► query FFN ─► (B, Q, Dq)
                           │  one set of weights, one mask
    text (B, T) ids ─────► self-attention ───────────────────► text FFN  ─► (B, T, Dq)

A BERT encoder (arXiv 1810.04805) that BLIP-2 changed in two ways (arXiv 2301.12597, section 3.1).
In blocks 0, 2, 4, ... (`cross_attention_every` = 2) the queries also attend to the image. And each
block has two feed-forward networks (FFN): one for queries, one for text.

BLIP-2 trains it with three losses. Queries and text meet in self-attention only, so a mask decides
what each loss may see:

    1: this token (line) may attend to that one (column)        Q = 2 queries, T = 3 text tokens

    "separate"             "joint"                "causal"
    1 1 . . .              1 1 1 1 1              1 1 . . .
    1 1 . . .              1 1 1 1 1              1 1 . . .
    . . 1 1 1              1 1 1 1 1              1 1 1 . .
    . . 1 1 1              1 1 1 1 1              1 1 1 1 .
    . . 1 1 1              1 1 1 1 1              1 1 1 1 1

    ITC, image-text contrast, compares two summaries: neither side may peek at the other.
    ITM, image-text matching, judges a pair: both sides see all.
    ITG, image-grounded generation, writes: a word sees the picture and the words before it. Queries
    do not see text, or they would leak the next word.

The text half is needed for the losses only. `vocab_size=0` builds the Q-Former without it, as
MiniGPT-4 uses it. To drop it after training: `half.load_state_dict(whole.state_dict(),
strict=False)`.

A text begins with a mark: <s> where it is to be summed up (BERT's [CLS]), <dec> where it is to be
written.

    python qformer.py        prints the three masks

B batch, P patches and the class token, Q queries, T text tokens, S = Q + T, H heads,
Dv vision width, Dq width.
"""
import torch
from torch import nn
from torch.nn import functional as F


def attention_mask(mask_kind, n_queries, n_text, device=None):
    """One of the three masks drawn above: (S, S) bool, True where line may attend to column.
    Source: arXiv 2301.12597, figure 2."""
    n = n_queries + n_text
    mask = torch.zeros(n, n, dtype=torch.bool, device=device)
    mask[:n_queries, :n_queries] = True  # queries attend to queries
    if mask_kind == "separate":
        mask[n_queries:, n_queries:] = True  # text attends to text
    elif mask_kind == "joint":
        mask[:] = True
    elif mask_kind == "causal":
        mask[n_queries:, :n_queries] = True  # text attends to every query
        mask[n_queries:, n_queries:].fill_(True).tril_()  # and to the text before it
    else:
        raise ValueError(f"unknown mask {mask_kind!r}: use 'separate', 'joint' or 'causal'")
    return mask


def attend(q, k, v, mask=None, **options):
    """softmax(q k^T / sqrt(Dh)) v, for each head of width Dh: S tokens attend to K others.
    q (B, H, S, Dh), k and v (B, H, K, Dh), mask (B or 1, 1, S, K) True where a token may attend to
    another -> (B, H, S, Dh)."""
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, mask, **options)
    # On a CPU in float32, even under autocast: torch's bfloat16 backward is 3 to 20 times slower.
    with torch.autocast("cpu", enabled=False):
        y = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask, **options)
    return y.to(q.dtype)


def init_linears(module):
    """Matrices get a standard deviation of fan-in^(-1/2), biases 0."""
    for linear in module.modules():
        if isinstance(linear, nn.Linear):
            nn.init.normal_(linear.weight, std=linear.in_features ** -0.5)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)


class Attention(nn.Module):
    """Multi-head attention with biases. Keys and values may come from another source and width."""

    def __init__(self, dim, n_heads, kv_dim, dropout):
        super().__init__()
        self.n_heads, self.dropout = n_heads, dropout
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(kv_dim, dim)
        self.v_proj = nn.Linear(kv_dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x, source, mask=None):
        """x (B, S, Dq) attends to source (B, K, kv_dim) where mask is True -> (B, S, Dq)."""
        B, S, D = x.shape
        heads = (self.n_heads, D // self.n_heads)
        q = self.q_proj(x).unflatten(-1, heads).transpose(1, 2)  # (B, H, S, Dq/H)
        k = self.k_proj(source).unflatten(-1, heads).transpose(1, 2)  # (B, H, K, Dq/H)
        v = self.v_proj(source).unflatten(-1, heads).transpose(1, 2)  # (B, H, K, Dq/H)
        y = attend(q, k, v, mask, dropout_p=self.dropout if self.training else 0.0)
        return self.out_proj(y.transpose(1, 2).reshape(B, S, D))


class QFormerBlock(nn.Module):
    """Self-attention for all tokens, cross-attention for queries, then the feed-forward networks.
    encoder_width None: no cross-attention."""

    def __init__(self, dim, n_heads, ffn_dim, dropout, encoder_width, has_text, norm_eps=1e-5):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.self_attention = Attention(dim, n_heads, dim, dropout)
        self.self_attention_norm = nn.LayerNorm(dim, norm_eps)
        self.cross_attention = None
        if encoder_width is not None:
            self.cross_attention = Attention(dim, n_heads, encoder_width, dropout)
            self.cross_attention_norm = nn.LayerNorm(dim, norm_eps)
        # Attention is shared, so that queries and text can read each other. A feed-forward network
        # treats each token alone. A query (what is in the picture?) needs other treatment than a
        # word (what comes next?).
        self.query_ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU(), nn.Linear(ffn_dim, dim))
        self.query_ffn_norm = nn.LayerNorm(dim, norm_eps)
        if has_text:
            self.text_ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU(),
                                          nn.Linear(ffn_dim, dim))
            self.text_ffn_norm = nn.LayerNorm(dim, norm_eps)

    def forward(self, x, n_queries, image_features, mask):
        """x (B, S, Dq), of which the first n_queries tokens are queries -> (B, S, Dq)."""
        # Post-LN as in BERT: each sublayer ends in norm(x + dropout(sublayer(x))).
        x = self.self_attention_norm(x + self.dropout(self.self_attention(x, x, mask)))
        queries = x[:, :n_queries]  # (B, Q, Dq)
        text = x[:, n_queries:]  # (B, T, Dq)
        if n_queries:  # none in `similarity`, where text runs alone
            if self.cross_attention is not None:
                from_image = self.cross_attention(queries, image_features)
                queries = self.cross_attention_norm(queries + self.dropout(from_image))
            queries = self.query_ffn_norm(queries + self.dropout(self.query_ffn(queries)))
        if text.shape[1]:
            text = self.text_ffn_norm(text + self.dropout(self.text_ffn(text)))
        return torch.cat([queries, text], dim=1)  # (B, S, Dq)


class QFormer(nn.Module):
    """Learned queries that turn (B, P, Dv) image features into (B, Q, Dq), whatever P is.
    dim: Dq. n_queries: Q. encoder_width: Dv. vocab_size 0: no text half, so no losses either.
    BLIP-2's is QFormer(768, n_layers=12, n_heads=12, n_queries=32, encoder_width=1408).
    Raises ValueError when dim does not divide into heads. Source: arXiv 2301.12597, section 3.1."""

    def __init__(self, dim, n_layers, n_heads, n_queries, encoder_width, cross_attention_every=2,
                 ffn_dim=None, dropout=0.1, vocab_size=0, max_text_len=512, itc_dim=256, pad_id=0,
                 norm_eps=1e-5):
        super().__init__()
        if dim % n_heads:
            raise ValueError(f"dim {dim} must be a multiple of n_heads {n_heads}")
        has_text = vocab_size > 0
        self.n_queries, self.pad_id = n_queries, pad_id
        self.query_tokens = nn.Parameter(torch.empty(1, n_queries, dim))
        self.embedding_norm = nn.LayerNorm(dim, norm_eps)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList()
        for i in range(n_layers):
            image_width = encoder_width if i % cross_attention_every == 0 else None
            self.blocks.append(QFormerBlock(dim, n_heads, ffn_dim or 4 * dim, dropout, image_width,
                                            has_text, norm_eps))
        if has_text:
            self.word_embedding = nn.Embedding(vocab_size, dim)
            self.position_embedding = nn.Embedding(max_text_len, dim)
            self.itc_image = nn.Linear(dim, itc_dim)
            self.itc_text = nn.Linear(dim, itc_dim)
            self.temperature = nn.Parameter(torch.full((), 0.07))  # as in CLIP
            self.itm_head = nn.Linear(dim, 2)
            self.lm_head = nn.Sequential(nn.Linear(dim, dim), nn.GELU(),
                                         nn.LayerNorm(dim, norm_eps), nn.Linear(dim, vocab_size))
            self.lm_head[-1].weight = self.word_embedding.weight  # tied, as in BERT
        nn.init.normal_(self.query_tokens, std=0.02)
        # Differs from BERT, whose matrices have 0.02, too: far too small at width 128.
        init_linears(self)
        if has_text:  # after the linears, since the head shares the weight of the words
            nn.init.normal_(self.word_embedding.weight, std=0.02)
            nn.init.normal_(self.position_embedding.weight, std=0.02)

    def forward(self, image_features=None, text=None, mask_kind="joint"):
        """image_features (B, P, Dv) -> (B, Q, Dq), the queries after they have read the image.
        With text, ids (B, T): (B, S, Dq), queries first. With text alone: (B, T, Dq)."""
        tokens = []
        n_queries = 0
        if image_features is not None:
            n_queries = self.n_queries
            tokens.append(self.query_tokens.expand(image_features.shape[0], -1, -1))  # (B, Q, Dq)
        mask = None  # queries alone all attend to each other
        if text is not None:
            # Positions start at 0, also where queries stand before the text. Queries have none.
            positions = self.position_embedding.weight[:text.shape[1]]  # (T, Dq)
            tokens.append(self.word_embedding(text) + positions)  # (B, T, Dq)
            # Whatever the mask, nothing attends to padding.
            is_token = F.pad(text != self.pad_id, (n_queries, 0), value=True)  # (B, S)
            mask = attention_mask(mask_kind, n_queries, text.shape[1], text.device)  # (S, S)
            mask = (mask & is_token[:, None])[:, None]  # (B, 1, S, S)
        x = torch.cat(tokens, dim=1)  # (B, S, Dq)
        x = self.dropout(self.embedding_norm(x))
        for block in self.blocks:
            x = block(x, n_queries, image_features, mask)
        return x

    # The three losses: `vision_loss` in train.py adds them up, `Collate.pairs` makes the batch.

    def similarity(self, queries, text):
        """How well image i fits text j: (B, B) cosines divided by the temperature.
        queries (B, Q, Dq) from `forward`. text (B, T) ids that begin with <s>."""
        # What comes out at <s>, BERT's [CLS], sums the text up. Under "separate" text never sees
        # queries, so it runs without them.
        cls = self(text=text, mask_kind="separate")[:, 0]  # (B, Dq)
        images, texts = self.itc_image(queries), self.itc_text(cls)
        # In float32, also under autocast: the temperature magnifies each rounding error.
        with torch.autocast(queries.device.type, enabled=False):
            images = F.normalize(images.float(), dim=-1)  # (B, Q, itc_dim)
            texts = F.normalize(texts.float(), dim=-1)  # (B, itc_dim)
            cosines = torch.einsum("iqd,td->itq", images, texts)  # (B images, B texts, Q)
        # An image is scored by its best query.
        return cosines.amax(dim=-1) / self.temperature.clamp(min=0.001)

    def itc_loss(self, similarity):
        """Image-text contrast in nats: pick the text of each image and the image of each text.
        similarity (B, B), the true pairs on the diagonal."""
        # Differs: BLIP-2 smooths the labels by 0.1.
        target = torch.arange(similarity.shape[0], device=similarity.device)
        text_of_image = F.cross_entropy(similarity, target)
        image_of_text = F.cross_entropy(similarity.T, target)
        return (text_of_image + image_of_text) / 2

    def itm_loss(self, image_features, text, similarity):
        """Image-text matching in nats: which of 3B pairs belong together?
        image_features (B, P, Dv), text (B, T), similarity (B, B). Raises ValueError if B < 2."""
        B = text.shape[0]
        if B < 2:
            raise ValueError(f"image-text matching needs wrong pairs: at least 2 samples, got {B}")
        # Hard negatives: each image gets a wrong text, and each text a wrong image. The more
        # similar the two are, the more often they are drawn.
        is_true_pair = torch.eye(B, dtype=torch.bool, device=text.device)
        # multinomial crashes at NaN. With zeros instead the loss is NaN all the same.
        odds = similarity.detach().nan_to_num()
        odds = odds.masked_fill(is_true_pair, float("-inf"))  # (B, B)
        wrong_text = torch.multinomial(odds.softmax(dim=1), 1)[:, 0]  # (B,)
        wrong_image = torch.multinomial(odds.T.softmax(dim=1), 1)[:, 0]  # (B,)
        # B pairs each:       true            wrong image                  wrong text
        images = torch.cat([image_features, image_features[wrong_image], image_features])
        texts = torch.cat([text, text, text[wrong_text]])  # (3B, T)
        queries = self(images, texts, "joint")[:, :self.n_queries]  # (3B, Q, Dq)
        # Each query votes: does the text belong to the picture?
        logits = self.itm_head(queries).mean(dim=1)  # (3B, 2)
        is_pair = torch.arange(3 * B, device=text.device) < B
        return F.cross_entropy(logits.float(), is_pair.long())

    def itg_loss(self, image_features, text, labels):
        """Image-grounded generation: predict each token from the queries and the text before it.
        image_features (B, P, Dv). text (B, T) ids that begin with <dec>. labels (B, T): the ids to
        predict, -100 elsewhere. Returns the loss in nats per token and the queries (B, Q, Dq)."""
        # <dec> instead of <s> tells the text half that it is to write this text, not to sum it up.
        x = self(image_features, text, "causal")  # (B, S, Dq)
        # The output at token t predicts token t + 1.
        logits = self.lm_head(x[:, self.n_queries:-1])  # (B, T - 1, V)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), labels[:, 1:].flatten())
        # Queries do not see text under this mask. So ITC can use them, as from `forward` alone.
        return loss, x[:, :self.n_queries]

    # Why train.py leaves out the last block once these losses have done their work: a block begins
    # with self-attention, where text reads the queries as the block *before* left them.
    #
    #     block 0   queries read the image          text reads queries that have read nothing
    #     block 1   (no cross-attention)            text reads what block 0 made of the queries
    #     block 2   queries read the image again    text reads what block 1 made of the queries
    #
    # ITG, which teaches details, needs the text half of block 2, but never trains what the queries
    # become there. ITC and ITM do, and they need few details. So the decoder gets the queries as
    # they leave block 1. They have then read the image once, in block 0.


def main():
    for mask_kind in ("separate", "joint", "causal"):
        print(f"{mask_kind}:")
        for i, line in enumerate(attention_mask(mask_kind, n_queries=2, n_text=3).int().tolist()):
            print("   ", "query" if i < 2 else "text ", *line)


if __name__ == "__main__":
    main()
