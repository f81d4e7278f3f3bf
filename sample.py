"""Ask a trained model about a picture.

    python sample.py                                     draws a scene, saves it, asks about it
    python sample.py --image FILE --prompt TEXT          asks about your picture, or several
    python sample.py --image FILE --chat                 a conversation about it; Ctrl-D ends it
    python sample.py --image FILE --attention            draws what each query of the Q-Former reads

Reads the weights and the tokenizer that train.py left in `out/`; the checkpoint holds all settings.
"""
import argparse
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from data import (DESCRIBE, Sample, SceneSpec, Tokenizer, check, contact_sheet, draw, encode_turns,
                  random_things, read_image, to_pixels)
from model import MLLM, load_file


def stream(model: MLLM, tokenizer: Tokenizer, asked: Sample, max_new_tokens: int,
           **sampling) -> Iterator[str]:
    """The answer to the last turn of what is asked, piece by piece as text. Raises ValueError when
    the conversation and its answer would not fit in the model."""
    size, answer, shown = model.config.vit["image_size"], [], ""
    ids, _ = encode_turns(tokenizer, asked.turns, model.config.n_rows(size))
    images = torch.stack([to_pixels(image, size) for image in asked.images])
    for token in model.generate([torch.tensor(ids)], images, max_new_tokens, tokenizer.end,
                                **sampling):
        if token.item() == tokenizer.end:
            return
        answer.append(token.item())
        text = tokenizer.decode(answer).lstrip()
        if not text.endswith("\ufffd"):  # a character may span several tokens
            yield text[len(shown):]
            shown = text


def fresh_scene(run: dict, seed: int | None, path: Path) -> Image.Image:
    """Draw a scene of the kind that the run was trained on, and save it enlarged."""
    rng, size = random.Random(seed), run["vit"]["image_size"][0]
    image = draw(random_things(SceneSpec(size, **run["scenes"]), rng), size, rng)
    image.resize((384, 384), Image.Resampling.NEAREST).save(path)
    print(f"drew {path}")
    return image


@torch.no_grad()
def attention_maps(model: MLLM, images: Tensor) -> Tensor:
    """How much each query attends to each patch in each cross-attention, the mean over heads:
    pixels (N, 3, height, width) -> (N, cross-attentions, Q, 1 + P), the class token first."""
    maps = []

    def keep(attention, inputs, _) -> None:
        queries, features = inputs
        heads = attention.n_heads, -1
        q = attention.q_proj(queries).unflatten(-1, heads).transpose(1, 2)  # (N, H, Q, Dh)
        k = attention.k_proj(features).unflatten(-1, heads).transpose(1, 2)  # (N, H, P, Dh)
        scores = q @ k.mT / q.shape[-1] ** 0.5  # (N, H, Q, P)
        maps.append(scores.softmax(dim=-1).mean(dim=1))

    blocks = [block for block in model.qformer.blocks if block.cross_attention is not None]
    hooks = [block.cross_attention.register_forward_hook(keep) for block in blocks]
    model.encode_images(images)
    for hook in hooks:
        hook.remove()
    return torch.stack(maps, dim=1)


def draw_attention(model: MLLM, image: Image.Image, path: Path) -> None:
    """The picture, then for each cross-attention and query the patches that it reads: the less, the
    darker."""
    height, width = model.config.vit["image_size"]
    pixels = to_pixels(image, (height, width))[None]  # (1, 3, height, width)
    pictures, texts = [image.resize((width, height))], ["the picture"]
    for i, of_queries in enumerate(attention_maps(model, pixels)[0].cpu()):
        for query, weights in enumerate(of_queries):
            patches = weights[1:].view(model.vit.grid)  # without the class token
            light = Image.fromarray((255 * patches / patches.max()).byte().numpy())
            light = light.resize((width, height), Image.Resampling.NEAREST)
            pictures.append(Image.composite(pictures[0], Image.new("RGB", (width, height)), light))
            texts.append(f"cross-attention {i}, query {query}")
    contact_sheet(pictures, texts, columns=6, side=144).save(path)
    print(f"drew {path}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Ask a trained model about a picture.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--image", type=Path, nargs="+", default=[], metavar="FILE",
        help="a picture or several; without one a fresh scene is drawn")
    add("--prompt", default=DESCRIBE[0], help="the question")
    add("--chat", action="store_true", help="ask several questions, one a line, until Ctrl-D")
    add("--attention", action="store_true", help="draw what each query reads of the first picture")
    add("--temperature", type=float, default=0.0, help="0: always the likeliest token")
    add("--top-k", type=int, default=0, help="draw from the k likeliest tokens only; 0: from all")
    add("--max-new-tokens", type=int, default=100, help="longest answer")
    add("--seed", type=int, help="for the scene and for drawing tokens")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, ...")
    add("--out", type=Path, default=Path("out"), help="the folder train.py wrote to")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN's attention plans anew for each length
    model = MLLM.load(args.out / "instruct.pt").to(args.device).eval()
    tokenizer = Tokenizer.load(args.out / "tokenizer.json")
    asked = Sample([read_image(path) for path in args.image], [])
    if not asked.images:
        run = load_file(args.out / "instruct.pt")["run"]
        check(not run["data"], "give --image: this model was trained on your own pictures")
        asked.images.append(fresh_scene(run, args.seed, args.out / "scene.png"))
    if args.attention:
        check(model.config.connector == "qformer", "this model has no Q-Former")
        draw_attention(model, asked.images[0], args.out / "attention.png")
    generator = torch.Generator(args.device)
    generator.manual_seed(random.randrange(2**32) if args.seed is None else args.seed)
    for question in iter(lambda: input("you: "), None) if args.chat else [args.prompt]:
        pictures = "" if asked.turns else "<image> " * len(asked.images)
        asked.turns.append((pictures + question.replace("<image>", " "), None))
        print("model: " if args.chat else f"you: {question}\nmodel: ", end="")
        pieces = []
        for piece in stream(model, tokenizer, asked, args.max_new_tokens, generator=generator,
                            temperature=args.temperature, top_k=args.top_k):
            print(piece, end="", flush=True)
            pieces.append(piece)
        print()
        asked.turns[-1] = asked.turns[-1][0], "".join(pieces)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"sample.py: {error}")
    except (KeyboardInterrupt, EOFError):
        print()
