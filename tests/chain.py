"""What the chain loses against a plain classifier of the same ViT on the same samples, and where.

    python tests/chain.py --data cifar10/train --val cifar10/dev --vit.image-size 32 32

Trains ViT and Q-Former as `vision` does, with one thing changed in each line of the table, then
takes the class whose name the Q-Former writes most readily. Data: folders with a folder of pictures
for each class. Takes the flags of train.py, and --short for the first two lines.
"""
import sys
import tempfile
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parent.parent))
import train  # noqa: E402
from data import CLASS, Sample, Tokenizer, read_own_data, texts_of  # noqa: E402
from model import MLLM  # noqa: E402
from sample import collate_for  # noqa: E402

RUNS = [("plain classifier: mean of the patches, one linear layer", ""), ("the chain", ""),
        ("rate of scenes", "--own-lr-scale 1"), ("half the rate of scenes", "--own-lr-scale 0.5"),
        ("4 queries", "--qformer.n-queries 4"),
        ("2 blocks, cross-attention in the first", "--qformer.n-layers 2"),
        ("3 blocks, cross-attention in each", "--qformer.cross-attention-every 1"),
        ("without ITC and ITM", "--itc-weight 0 --itm-weight 0")]


def class_scores(model, images, classes):
    """The log-likelihood of each class's text, (B, classes), or a classifier's logits."""
    features = model.image_features(images)  # (B, P, Dv)
    if isinstance(model.connector, nn.Linear):
        return model.connector(features.mean(dim=1)).float()
    scores = []
    for text, labels in zip(classes["to_generate"], classes["labels"]):
        x = model.connector(features, text.expand(len(images), -1), "causal")  # (B, S, Dq)
        logits = model.connector.lm_head(x[:, -len(text):-1]).float()  # (B, T - 1, V)
        labels = labels[1:].expand(len(images), -1)
        losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")  # (B, T - 1)
        scores.append(-losses.sum(dim=1))
    return torch.stack(scores, dim=1)


def classifier_loss(classes, model, batch, *_):
    """Cross-entropy over the classes, each of which is known by its text."""
    T = batch["text"].shape[1]
    is_class = (batch["text"][:, None] == classes["text"][:, :T]).all(dim=-1)  # (B, classes)
    return F.cross_entropy(class_scores(model, batch["images"], classes), is_class.float())


def measure(config, is_plain):
    """(accuracy on the pictures of --val, seconds of training)."""
    own_train, own_test = read_own_data(config.data), read_own_data(config.val)
    names = sorted({sample.turns[0][1] for sample in own_train})
    tokenizer = Tokenizer.train(texts_of(own_train), config.vocab_size)
    torch.manual_seed(config.seed)
    model = MLLM(train.model_config(config, "vision", tokenizer))
    collate = collate_for(model, tokenizer)
    data, tests = train.own_sets(config, ["vision"], own_train, own_test, collate)
    classes = collate.pairs([Sample([], [(f"<image> {CLASS}", name)]) for name in names])
    loss = train.vision_loss
    if is_plain:
        model.connector = nn.Linear(config.vit["dim"], len(names))
        loss = partial(classifier_loss, classes)
    model.train_only(train.lr_scales(config, "vision"))
    with tempfile.TemporaryDirectory() as out, patch.object(train, "vision_loss", loss):
        _, seconds = train.train_stage(model, "vision", data["vision"], collate, config, Path(out))
    model.eval()
    right = []
    for samples in DataLoader(tests["qa_accuracy"], 200, collate_fn=list):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=config.bf16):
            best = class_scores(model, collate.images(samples), classes).argmax(dim=1).tolist()
        right += [names[i] == sample.turns[0][1] for i, sample in zip(best, samples)]
    return sum(right) / len(right), seconds


def main():
    flags = [flag for flag in sys.argv[1:] if flag != "--short"]
    print("| | accuracy | seconds |", "| --- | --- | --- |", sep="\n")
    for label, changes in RUNS[:2] if "--short" in sys.argv else RUNS:
        arguments = train.parse_arguments(["--device=cpu", *flags, *changes.split()])
        accuracy, seconds = measure(train.settings(arguments, None)[0], label.startswith("plain"))
        print(f"| {label} | {accuracy:.3f} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
