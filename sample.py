"""Ask a trained model: one question, a conversation, or a thousand questions with known answers.

    python sample.py                                     draws a scene, saves it, asks about it
    python sample.py --image FILE --prompt TEXT          asks about your picture, or several
    python sample.py --image FILE --chat                 a conversation about it; Ctrl-D ends it
    python sample.py --image FILE --attention            draws what each query of the Q-Former reads

A checkpoint holds all that is needed: weights, settings, tokenizer. train.py ends with `evaluate`.

N images, H heads, Q queries, P patches and the class token, Dh head width.
"""
import argparse
import math
import random
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch.nn import functional as F

from data import (DESCRIBE, IGNORED, Collate, Sample, SceneSpec, check, contact_sheet, draw,
                  encode_turns, random_things, read_image, to_pixels, tokenizer_from)
from model import load_model


def collate_for(model, tokenizer):
    return Collate(tokenizer, model.n_image_tokens, model.vit.image_size)


# ---- One question ----------------------------------------------------------------------------
def stream(model, collate, sample, max_new_tokens, **sampling):
    """The answer to the last turn, piece by piece as text. sampling: see `pick_token` in model.py.
    Raises ValueError when the conversation and its answer would not fit in max_len."""
    tokenizer = collate.tokenizer
    ids, _ = encode_turns(tokenizer, sample.turns, collate.n_image_tokens)
    images = collate.images([sample])
    answer_ids, shown = [], ""
    for token in model.generate([torch.tensor(ids)], images, max_new_tokens, tokenizer.end_id,
                                **sampling):
        if token.item() == tokenizer.end_id:
            return
        answer_ids.append(token.item())
        text = tokenizer.decode(answer_ids).lstrip()
        if not text.endswith("\ufffd"):  # a character may span several tokens
            yield text[len(shown):]
            shown = text


# ---- A thousand questions --------------------------------------------------------------------
@torch.no_grad()
def answer(model, samples, collate):
    """The model's likeliest answer to the last question of each sample, as text.
    And its loss on the true answer, in nats per token. No answer is longer than the longest true
    one, or than max_len allows."""
    tokenizer = collate.tokenizer
    batch = collate.conversations(samples)
    prompts = []
    for sample, labels in zip(samples, batch["labels"]):
        *earlier, (question, _) = sample.turns
        ids, _ = encode_turns(tokenizer, [*earlier, (question, None)], collate.n_image_tokens)
        prompts.append(torch.tensor(ids))
        # This changes the batch: earlier answers in the conversation do not count.
        labels[:len(ids)] = IGNORED
    is_answer = batch["labels"][:, 1:] != IGNORED
    lengths = is_answer.sum(dim=1).tolist()
    longest_prompt = max(len(prompt) for prompt in prompts)
    if len(samples) > 1 and longest_prompt + max(lengths) > model.config.max_len:
        # A long prompt would cut the answer to another one short: one by one, then.
        return [answer(model, [sample], collate)[0] for sample in samples]
    logits, _ = model(**batch)  # those of all answers in one row: split again below
    targets = batch["labels"][:, 1:][is_answer]
    losses = F.cross_entropy(logits.float().cpu(), targets, reduction="none").split(lengths)
    n_tokens = max(1, min(max(lengths), model.config.max_len - longest_prompt))
    steps = list(model.generate(prompts, batch["images"], n_tokens, tokenizer.end_id))
    answers = []
    for ids, loss in zip(torch.stack(steps, dim=1).tolist(), losses):
        end = [*ids, tokenizer.end_id].index(tokenizer.end_id)
        answers.append((tokenizer.decode(ids[:end]).strip(), loss.mean().item()))
    return answers


def other_images(samples, i):
    """The pictures of another sample, none of which is in sample i. None if there are none."""
    own, n = samples[i].images, len(samples)
    for step in range(n if own else 0):  # from far away: neighbors may share a picture
        images = samples[(i + n // 2 + step) % n].images
        if len(images) == len(own) and not any(image in own for image in images):
            return images
    return None


def comparable(text, sample):
    """What an answer is compared by: without case and final full stop, as VQA's scorers do.
    The name of a class counts as it is."""
    if sample.question_type == "class":
        return text
    return text.lower().removesuffix(".")


def ask_all(model, samples, collate, batch_size):
    """Ask the last question of each sample about its own picture, then about another's.
    Returns a record for each sample. "blind" is the answer about the picture of another sample,
    None where there is no other picture."""
    records = []
    for start in range(0, len(samples), batch_size):
        numbers = range(start, min(start + batch_size, len(samples)))
        asked = [samples[i] for i in numbers]
        for sample, (text, loss) in zip(asked, answer(model, asked, collate)):
            references = sample.references or (sample.turns[-1][1],)
            accepted = [comparable(text, sample) for text in references]
            records.append({"type": sample.question_type, "references": references,
                            "question": sample.turns[-1][0].replace("<image>", "").strip(),
                            "answer": text, "loss": loss, "accepted": accepted,
                            "right": comparable(text, sample) in accepted,
                            "blind": None, "blind_loss": None, "blind_right": None})
        blind = {}
        for i, sample in zip(numbers, asked):
            images = other_images(samples, i)
            if images:
                blind[i] = replace(sample, images=images)
        if blind:
            for i, (text, loss) in zip(blind, answer(model, list(blind.values()), collate)):
                is_right = comparable(text, samples[i]) in records[i]["accepted"]
                records[i] |= {"blind": text, "blind_loss": loss, "blind_right": is_right}
    return records


def evaluate(model, tests, collate, batch_size):
    """Ask all questions of `tests`, which are named after their metric. Prints a table.
    Returns (metrics, each question with its answers, (pictures, texts) of the first ones).

    right: the share of answers that equal one of the right ones (see `comparable`). blind: the same
    when the model sees the picture of another question. floor: the same of the most frequent right
    answer to this type of question. Guessing gets half of all yes or no questions: only right -
    blind comes from the picture. Long answers are seldom right to the word: for them compare the
    losses.
    """
    model.eval()
    metrics, everything, pictures, texts = {}, [], [], []
    for name, samples in tests.items():
        records = ask_all(model, samples, collate, batch_size)
        groups = defaultdict(list)
        for record in records:
            groups[record["type"]].append(record)
        for group in groups.values():
            counts = Counter(text for record in group for text in {*record["accepted"]})
            floor = counts.most_common(1)[0][0]
            for record in group:
                record |= {"test": name, "floor_right": floor in record["accepted"]}
        table = metrics[f"{name}_by_type"] = {}
        print(f"\n{name:20} questions    right    blind    floor     loss  blind loss")
        for question_type, group in [*sorted(groups.items()), ("all", records)]:
            row = table[question_type] = {}
            for column in ("right", "blind_right", "floor_right", "loss", "blind_loss"):
                values = [record[column] for record in group if record[column] is not None]
                row[column] = sum(values) / len(values) if values else None
            cells = ["-" if value is None else f"{value:.3f}" for value in row.values()]
            print(f"{question_type:20} {len(group):9}", *(f"{cell:>8}" for cell in cells))
        names = (name, f"{name}_blind", f"{name}_floor", f"{name}_loss", f"{name}_blind_loss")
        metrics |= dict(zip(names, table["all"].values()))
        everything += records
        for i, record in enumerate(records[:8] if name.startswith("qa") else []):
            verdict = "right" if record["right"] else f"it is {record['references'][0][:60]}"
            pictures += samples[i].images[:1] or [Image.new("RGB", (8, 8))]
            texts.append(f"{record['question'][:100]}\n{record['answer'][:60]}  ({verdict})")
    return metrics, everything, (pictures, texts)


# ---- Your question ---------------------------------------------------------------------------
def latest(turns, images, collate, room):
    """A conversation about images, without its oldest turns if it would take over `room` tokens."""
    for start in range(len(turns)):
        (question, answer), *rest = turns[start:]
        # All pictures come with the first question.
        sample = Sample(images, [("<image> " * len(images) + question, answer), *rest])
        ids, _ = encode_turns(collate.tokenizer, sample.turns, collate.n_image_tokens)
        if len(ids) <= room:
            break
    return sample


def at_least(least, number=int):
    """A type for argparse: a finite number, not below `least`."""
    def parse(text):
        value = number(text)
        check(least <= value < math.inf, "argparse says what is wrong")
        return value

    parse.__name__ = f"{number.__name__} (at least {least})"  # what argparse says
    return parse


def find_device(name):
    """The device of this name. Raises ValueError when this machine has none."""
    try:
        torch.zeros(1, device=name).item()
    except Exception as error:
        raise ValueError(f"--device {name}: this machine has no such device") from error
    return torch.device(name)


def parse_arguments():
    parser = argparse.ArgumentParser(description="Ask a trained model about a picture.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--image", type=Path, nargs="+", default=[], metavar="FILE",
        help="a picture or several; without one a fresh scene is drawn")
    add("--prompt", default=DESCRIBE[0], help="the question")
    add("--chat", action="store_true", help="ask several questions, one a line, until Ctrl-D")
    add("--attention", action="store_true", help="draw what each query reads of the first picture")
    add("--temperature", type=at_least(0, float), default=0.0, help="0: always the likeliest token")
    add("--top-k", type=at_least(0), default=0, help="draw from the k likeliest; 0: from all")
    add("--max-new-tokens", type=at_least(1), default=100, help="longest answer")
    add("--seed", type=int, help="for the scene and for drawing tokens")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, ...")
    add("--out", type=Path, default=Path("out"), help="the folder train.py wrote to")
    return parser.parse_args()


def main():
    args = parse_arguments()
    device = find_device(args.device)
    model, checkpoint = load_model(args.out / "instruct.pt")
    model.to(device).eval()
    collate = collate_for(model, tokenizer_from(checkpoint["tokenizer"]))
    images = [read_image(path) for path in args.image]
    if not images:  # draw a scene of the kind that the model was trained on
        run = checkpoint["run"]
        check(not run["data"], "give --image: this model was trained on your own pictures")
        rng = random.Random(args.seed)
        spec = SceneSpec(run["vit"]["image_size"][0], **run["scenes"])
        images = [draw(random_things(spec, rng, "test"), spec.image_size, rng)]
        images[0].resize((384, 384), Image.Resampling.NEAREST).save(args.out / "scene.png")
        print(f"drew {args.out / 'scene.png'}")
    if args.attention:
        check(model.config.connector == "qformer", "this model has no Q-Former")
        draw_attention(model, images[0], args.out / "attention.png")
    generator = torch.Generator(device)
    generator.manual_seed(random.randrange(2**32) if args.seed is None else args.seed)
    turns = []
    questions = iter(lambda: input("you: "), None) if args.chat else [args.prompt]
    for question in questions:
        question = question.replace("<image>", " ")
        if not args.chat:
            print(f"you: {question}")
        print("model: ", end="")
        room = model.config.max_len - args.max_new_tokens
        sample = latest([*turns, (question, None)], images, collate, room)
        pieces = []
        for piece in stream(model, collate, sample, args.max_new_tokens, generator=generator,
                            temperature=args.temperature, top_k=args.top_k):
            print(piece, end="", flush=True)
            pieces.append(piece)
        print()
        turns.append((question, "".join(pieces)))


# You have read how a model is asked. What follows draws where its Q-Former looks.

# ---- Attention -------------------------------------------------------------------------------
@torch.no_grad()
def attention_maps(model, images):
    """How much each query attends to each patch in each cross-attention, the mean over heads.
    Pixels (N, 3, height, width) -> (N, cross-attentions, Q, P), the class token first."""
    calls, hooks, maps = [], [], []
    for block in model.connector.blocks:
        if block.cross_attention:
            hooks.append(block.cross_attention.register_forward_hook(
                lambda attention, inputs, _: calls.append((attention, *inputs))))
    model.encode_images(images)
    for hook in hooks:
        hook.remove()
    for attention, queries, features in calls:
        heads = (attention.n_heads, -1)
        q = attention.q_proj(queries).unflatten(-1, heads).transpose(1, 2)  # (N, H, Q, Dh)
        k = attention.k_proj(features).unflatten(-1, heads).transpose(1, 2)  # (N, H, P, Dh)
        scores = q @ k.mT / q.shape[-1] ** 0.5  # (N, H, Q, P)
        maps.append(scores.softmax(dim=-1).mean(dim=1))
    return torch.stack(maps, dim=1)


def draw_attention(model, image, path):
    """The picture, then for each query the patches that it reads: the less, the darker."""
    height, width = model.vit.image_size
    pixels = to_pixels(image, (height, width))[None]  # (1, 3, height, width)
    image = image.resize((width, height))
    black = Image.new("RGB", (width, height))
    pictures, texts = [image], ["the picture"]
    for i, queries in enumerate(attention_maps(model, pixels)[0].cpu()):
        for query, weights in enumerate(queries):
            patches = weights[1:].view(model.vit.grid)  # without the class token
            light = Image.fromarray((255 * patches / patches.max()).byte().numpy())
            light = light.resize((width, height), Image.Resampling.NEAREST)
            pictures.append(Image.composite(image, black, light))
            texts.append(f"cross-attention {i}, query {query}")
    contact_sheet(pictures, texts, columns=6, side=144).save(path)
    print(f"drew {path}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"sample.py: {error}")
    except (KeyboardInterrupt, EOFError):
        print()
