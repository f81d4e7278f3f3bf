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
import json
import math
import mmap
import re
import zipfile
from pathlib import Path

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

    def __init__(self, dim: int, n_heads: int, ffn_dim: int, dropout: float, encoder_width: int | None,
                 norm_eps: float = 1e-5):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.self_attention = Attention(dim, n_heads, dim, dropout)
        self.self_attention_norm = nn.LayerNorm(dim, norm_eps)
        self.cross_attention = None
        if encoder_width is not None:
            self.cross_attention = Attention(dim, n_heads, encoder_width, dropout)
            self.cross_attention_norm = nn.LayerNorm(dim, norm_eps)
        self.query_ffn, self.query_ffn_norm = FeedForward(dim, ffn_dim), nn.LayerNorm(dim, norm_eps)
        self.text_ffn, self.text_ffn_norm = FeedForward(dim, ffn_dim), nn.LayerNorm(dim, norm_eps)

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
                 vocab_size: int = 0, max_text_len: int = 512, itc_dim: int = 256, pad_id: int = 0,
                 norm_eps: float = 1e-5):
        super().__init__()
        if dim % n_heads:
            raise ValueError(f"dim must be a multiple of n_heads, got dim {dim} and n_heads {n_heads}")
        self.n_queries, self.pad_id = n_queries, pad_id
        self.query_tokens = nn.Parameter(torch.empty(1, n_queries, dim))
        self.embedding_norm, self.dropout = nn.LayerNorm(dim, norm_eps), nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            QFormerBlock(dim, n_heads, ffn_dim or 4 * dim, dropout,
                         encoder_width if i % cross_attention_every == 0 else None, norm_eps)
            for i in range(n_layers))

        self.has_text_branch = vocab_size > 0
        if self.has_text_branch:
            self.word_embedding = nn.Embedding(vocab_size, dim)
            self.position_embedding = nn.Embedding(max_text_len, dim)
            self.itc_image = nn.Linear(dim, itc_dim)
            self.itc_text = nn.Linear(dim, itc_dim)
            self.temperature = nn.Parameter(torch.empty(1))   # not (): torch's FSDP2 splits no scalars
            self.itm_head = nn.Linear(dim, 2)
            self.lm_head = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.LayerNorm(dim, norm_eps),
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

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options) -> "QFormer":
        """The queries of BLIP-2 (a folder like `Salesforce/blip2-opt-2.7b`, no text branch), or a start from BERT
        (`bert-base-uncased`) with both feed-forward networks its own and fresh queries and cross-attention.

        options: those of the constructor, over the sizes of the file. A vocab_size other than BERT's leaves the words
        fresh, 0 leaves the text branch out. Raises FileNotFoundError, or ValueError naming what does not fit.
        """
        config, weights = read_pretrained(folder)
        model = cls(**qformer_options(config) | options)
        if config["model_type"] == "bert":
            fill_from_bert(model, weights)
        else:
            fill(model, weights, BLIP2_NAMES, ignored="embeddings|encoder|post_layernorm|language_")
        return model

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


# ---- Weights published by others: not needed to understand the model ------------------------------

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
          "BOOL": torch.bool}


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file: eight bytes that hold the length of a JSON header; the header, which holds
    dtype, shape and place of each tensor; their bytes, which are mapped into memory, so that only what is used is read.

    Raises ValueError when header and file do not fit each other to the byte.
    """
    with open(path, "rb") as file:
        size, length = path.stat().st_size, int.from_bytes(file.read(8), "little")
        if 8 + length > size:
            raise ValueError(f"{path}: a header of {length} bytes in a file of {size}")
        try:
            header, tensors, end = json.loads(file.read(length)), {}, 8 + length
            header.pop("__metadata__", None)
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
                dtype, shape, (start, stop) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
                count = math.prod(shape)
                start, stop = 8 + length + start, 8 + length + stop
                if start != end or stop - start != count * dtype.itemsize:
                    raise ValueError(f"{name!r}, {entry['dtype']} {shape}, cannot lie in bytes {start} to {stop}")
                flat = torch.frombuffer(data, dtype=dtype, count=count, offset=start) if count else torch.empty(0)
                tensors[name], end = flat.to(dtype).view(shape), stop
            if end != size:
                raise ValueError(f"{size - end} bytes belong to no tensor")
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
            raise ValueError(f"{path}: not a whole .safetensors file ({type(error).__name__}: {error})") from error
    return tensors


def read_json(path: Path) -> dict:
    """A JSON object. Raises ValueError naming the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def read_bin(path: Path) -> dict[str, Tensor]:
    """The tensors that `torch.save` wrote. Runs no code from the file."""
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:                                # unpickling raises many kinds
        raise ValueError(f"{path}: not weights that can be read safely ({str(error).splitlines()[:1]})") from error
    if not isinstance(weights, dict) or not all(isinstance(name, str) and isinstance(value, Tensor) and
                                                value.layout == torch.strided for name, value in weights.items()):
        raise ValueError(f"{path}: expected a dictionary of names and dense tensors")
    return weights


def read_pretrained(folder: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """config.json and the tensors of a downloaded Hugging Face model folder, from one file or several.

    Of their names, "model.", "bert." and "vision_model." are dropped, with which only some files begin them.
    Raises FileNotFoundError, or ValueError naming the file.
    """
    folder = Path(folder)
    kinds = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
    found = [kind for kind in kinds if (folder / kind).is_file()]
    if not found or not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: expected config.json and one of {', '.join(kinds)}")
    files, place, tensors = found[:1], {}, {}
    if found[0].endswith(".json"):
        place = read_json(folder / found[0]).get("weight_map")
        if not isinstance(place, dict) or not all(isinstance(file, str) and Path(file).name == file
                                                  for file in place.values()):
            raise ValueError(f"{folder / found[0]}: 'weight_map' must name a file beside it for each tensor")
        files = sorted(set(place.values()))
        if lost := [file for file in files if not (folder / file).is_file()]:
            raise FileNotFoundError(f"{folder}: {lost[0]}, which {found[0]} lists, is not there")
    for file in files:
        tensors |= (read_safetensors if file.endswith(".safetensors") else read_bin)(folder / file)
    if lost := set(place) - set(tensors):
        raise ValueError(f"{folder}: {min(lost)!r}, which {found[0]} lists, is in none of its files")
    weights = {re.sub(r"^(model|bert|vision_model)\.", "", name): value for name, value in tensors.items()}
    if len(weights) < len(tensors):
        raise ValueError(f"{folder}: two tensors have the same name but for its beginning")
    return read_json(folder / "config.json"), weights


def sizes(config: dict, wanted: dict[str, tuple]) -> dict:
    """Constructor options from a config.json. wanted: for each its name in the file, and what it is if not there.
    Raises ValueError naming what is not of that kind."""
    if not isinstance(config, dict):
        raise ValueError(f"config.json: expected an object of sizes, got {config!r}")
    options = {}
    for name, (key, default) in wanted.items():
        options[name] = value = default if config.get(key) is None else config[key]
        kinds = (int, float) if isinstance(default, float) else (type(default),)
        if type(value) not in kinds or type(value) in (int, float) and not 0 < value < 1e9:
            raise ValueError(f"config.json: {key} must be of type {kinds[-1].__name__} and positive, got {value!r}")
    return options


@torch.no_grad()
def fill(module: nn.Module, weights: dict[str, Tensor], names: dict[str, str], ignored: str = "-",
         fresh: str = "-") -> None:
    """Copy published weights into a module.

    names: our names -> theirs, "*" for the number of a block, without the last part where it is the same ("weight",
    "bias"); several of theirs, with a space between, go on top of each other. ignored, fresh: regular expressions for
    the beginning of names, theirs and ours, that stay out.
    Raises ValueError naming a parameter that is not filled or of another shape, or a tensor that is left over.
    """
    used = set()
    for name, parameter in module.named_parameters():
        if re.match(fresh, name):
            continue
        number = re.findall(r"blocks\.(\d+)", name)
        general = re.sub(r"blocks\.\d+", "blocks.*", name)
        stem, _, last = general.rpartition(".")
        theirs = [f"{key}.{last}" for key in names.get(stem, "?").split()]
        theirs = names[general].split() if general in names else theirs
        theirs = [key.replace("*", *number) if number else key for key in theirs]
        if missing := [key for key in theirs if key not in weights]:
            raise ValueError(f"{name} of {type(module).__name__} is not filled: there is no {missing[0]!r}")
        parts = [weights[key] for key in theirs]
        shapes = [tuple(part.shape) for part in parts]
        if not all(part.is_floating_point() for part in parts):
            raise ValueError(f"{' + '.join(theirs)} holds {parts[0].dtype}, not floating-point numbers")
        fits = all(part.shape[1:] == parts[0].shape[1:] for part in parts[1:])
        value = torch.cat(parts) if len(parts) > 1 and fits else parts[0]
        while value.ndim < parameter.ndim:
            value = value[None]
        if not fits or value.shape != parameter.shape:
            raise ValueError(f"{name} of {type(module).__name__} has shape {tuple(parameter.shape)}, but "
                             f"{' + '.join(theirs)} has {' + '.join(map(str, shapes))}")
        parameter.copy_(value)
        used.update(theirs)
    if left := [key for key in weights if key not in used and not re.match(ignored, key)]:
        raise ValueError(f"{type(module).__name__} has no place for {left[0]!r} and {len(left) - 1} other tensors")


def qformer_options(config: dict) -> dict:
    """What `QFormer` must be built with to take the weights beside this config.json."""
    kind = config.get("model_type")
    if kind not in ("bert", "blip-2"):
        raise ValueError(f"a Q-Former can start from the model types 'blip-2' and 'bert', not {kind!r}")
    inner = config if kind == "bert" else config.get("qformer_config") or {}
    wanted = {"dim": ("hidden_size", 768), "n_layers": ("num_hidden_layers", 12),
              "n_heads": ("num_attention_heads", 12), "ffn_dim": ("intermediate_size", 3072),
              "norm_eps": ("layer_norm_eps", 1e-12), "activation": ("hidden_act", "gelu")}
    if kind == "bert":
        options = sizes(inner, wanted | {"vocab_size": ("vocab_size", 30522),
                                         "max_text_len": ("max_position_embeddings", 512)})
        options |= {"n_queries": 32, "encoder_width": 1408}
    else:
        options = sizes(inner, wanted | {"encoder_width": ("encoder_hidden_size", 1408),
                                         "cross_attention_every": ("cross_attention_frequency", 2)})
        options |= sizes(config, {"n_queries": ("num_query_tokens", 32)})
    if (activation := options.pop("activation")) != "gelu":
        raise ValueError(f"config.json: hidden_act {activation!r} is not known here, only 'gelu'")
    return options


def qformer_names(layer: str, attention: str, query_ffn: str) -> dict[str, str]:
    """The names in a block of BLIP-2 or BERT, which call self-attention and a feed-forward network differently."""
    names = {"blocks.*.query_ffn.0": f"{layer}.intermediate{query_ffn}.dense",
             "blocks.*.query_ffn.2": f"{layer}.output{query_ffn}.dense",
             "blocks.*.query_ffn_norm": f"{layer}.output{query_ffn}.LayerNorm"}
    for ours, theirs, inner in (("self_attention", "attention", attention),
                                ("cross_attention", "crossattention", "attention")):
        for mine, its in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")):
            names[f"blocks.*.{ours}.{mine}"] = f"{layer}.{theirs}.{inner}.{its}"
        names[f"blocks.*.{ours}.out_proj"] = f"{layer}.{theirs}.output.dense"
        names[f"blocks.*.{ours}_norm"] = f"{layer}.{theirs}.output.LayerNorm"
    return names


BLIP2_NAMES = {"query_tokens": "query_tokens", "embedding_norm": "qformer.layernorm",
               **qformer_names("qformer.encoder.layer.*", "attention", "_query")}
BERT_NAMES = {"embedding_norm": "embeddings.LayerNorm", "word_embedding": "embeddings.word_embeddings",
              "position_embedding": "embeddings.position_embeddings", "lm_head.3.bias": "cls.predictions.bias",
              "lm_head.0": "cls.predictions.transform.dense", "lm_head.2": "cls.predictions.transform.LayerNorm",
              **qformer_names("encoder.layer.*", "self", "")}
BERT_NAMES |= {name.replace("query", "text"): theirs for name, theirs in BERT_NAMES.items() if "query_ffn" in name}


def fill_from_bert(model: QFormer, weights: dict[str, Tensor]) -> None:
    """What BERT knows of text, in both feed-forward networks. The vector of segment 0 is added to the positions."""
    weights = {re.sub("gamma$", "weight", re.sub("beta$", "bias", name)): value for name, value in weights.items()}
    positions, segments = "embeddings.position_embeddings.weight", "embeddings.token_type_embeddings.weight"
    if positions in weights and segments in weights:
        weights[positions] = weights[positions].float() + weights.pop(segments)[0].float()
    fresh = "query_tokens|.*cross_attention|itc_|itm_|temperature"
    ignored = "pooler|.*position_ids|cls.seq|cls.*decoder"
    if not model.has_text_branch:
        ignored += "|cls|embeddings.(word|position)"
    elif len(model.word_embedding.weight) != len(weights.get("embeddings.word_embeddings.weight", ())):
        fresh, ignored = fresh + "|word_embedding|lm_head.3", ignored + "|embeddings.word|cls.predictions.bias"
    if not any(name.startswith("cls.predictions") for name in weights):
        fresh += "|lm_head"
    fill(model, weights, BERT_NAMES, ignored, fresh)
