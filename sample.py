"""Ask a trained model about a picture.

    python sample.py                                     draws a fresh scene, saves it and asks about it
    python sample.py --image FILE --prompt TEXT          asks about your picture, or several: --image FILE FILE
    python sample.py --image FILE FILE FILE --clip       the frames of one clip
    python sample.py --image FILE --chat                 a conversation about it; Ctrl-D ends it

Reads the weights and the tokenizer that train.py left in `out/`; the checkpoint holds all settings.
"""
import argparse
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image

from data import (DESCRIBE, Sample, SceneSpec, Tokenizer, draw, encode_turns, random_things, read_image, to_pixels)
from model import MLLM


def load(folder: Path, device: str) -> tuple[MLLM, Tokenizer]:
    """The model and tokenizer of a training run, ready to answer."""
    for name in ("instruct.pt", "tokenizer.json"):
        if not (folder / name).exists():
            raise FileNotFoundError(f"no {folder / name}: run `python train.py --out {folder}` first")
    return MLLM.load(folder / "instruct.pt", device).eval(), Tokenizer.load(folder / "tokenizer.json")


def stream(model: MLLM, tokenizer: Tokenizer, asked: Sample, max_new_tokens: int, **sampling) -> Iterator[str]:
    """The answer to the last turn of what is asked, piece by piece as text.

    Raises ValueError when the conversation and its answer would not fit in the model.
    """
    config, device = model.config, model.decoder.norm.weight.device
    ids, _ = encode_turns(tokenizer, asked.turns, config.n_rows, max_len=10**9, frames=asked.frames)
    pixels = torch.stack([to_pixels(image, config.image_size, config.fit, config.pixel_mean, config.pixel_std)
                          for image in asked.images]).to(device)
    answer, shown = [], ""
    for token in model.generate([torch.tensor(ids, device=device)], pixels, max_new_tokens, tokenizer.end, **sampling):
        if token.item() == tokenizer.end:
            return
        answer.append(token.item())
        text = tokenizer.decode(answer).lstrip()
        if not text.endswith("\ufffd"):                       # a character may span several tokens
            yield text[len(shown):]
            shown = text


def fresh_scene(size: tuple[int, int], seed: int | None, path: Path) -> Image.Image:
    """Draw a scene that no training run has drawn, and save it enlarged so that a person can see it."""
    rng = random.Random(seed)
    image = draw(random_things(SceneSpec(), rng), min(size), rng)
    image.resize((384, 384), Image.Resampling.NEAREST).save(path)
    return image


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Ask a trained model about a picture.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--image", type=Path, nargs="+", default=[], metavar="FILE",
                        help="a picture or several; without one a fresh scene is drawn")
    parser.add_argument("--clip", action="store_true", help="the pictures are the frames of one clip")
    parser.add_argument("--prompt", default=DESCRIBE[0], help="the question")
    parser.add_argument("--chat", action="store_true", help="ask several questions, one a line, until Ctrl-D")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest token")
    parser.add_argument("--top-k", type=int, default=0, help="draw from the k likeliest tokens only; 0: from all")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest that reach this probability")
    parser.add_argument("--max-new-tokens", type=int, default=100)
    parser.add_argument("--seed", type=int, help="for the scene and for drawing tokens")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("out"), help="the folder train.py wrote to")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    sys.stdout.reconfigure(errors="replace")                  # bytes that are no text, in the question or the answer
    model, tokenizer = load(args.out, args.device)
    asked = Sample([read_image(path) for path in args.image], [])
    if not asked.images:
        asked.images.append(fresh_scene(model.config.image_size, args.seed, args.out / "scene.png"))
        print(f"drew {args.out / 'scene.png'}")
    asked.frames = (len(asked.images),) if args.clip else (1,) * len(asked.images)
    sampling = dict(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)
    if args.temperature:
        generator = torch.Generator(args.device)
        sampling["generator"] = generator
        generator.manual_seed(args.seed) if args.seed is not None else generator.seed()

    while True:
        try:
            question = input("you: ") if args.chat else args.prompt
        except EOFError:
            return print()
        if not args.chat:
            print(f"you: {question}")
        question = question.replace("<image>", " ")
        asked.turns.append((question if asked.turns else "<image> " * len(asked.frames) + question, None))
        print("model: ", end="", flush=True)
        pieces = []
        for piece in stream(model, tokenizer, asked, args.max_new_tokens, **sampling):
            print(piece, end="", flush=True)
            pieces.append(piece)
        print()
        asked.turns[-1] = asked.turns[-1][0], "".join(pieces)
        if not args.chat:
            return


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"sample.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
