"""What the chain loses against a plain classifier of the same ViT on the same samples, and where.

    python tests/chain.py --data cifar10/train --val cifar10/dev --image-size 32 32

Data: a folder of pictures for each class. Trains ViT and Q-Former as `vision` does, changed in one
thing a row, then takes the class whose name the Q-Former writes most readily. Takes the flags of
train.py, and --short for the first two rows; prints a table.
"""
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import train  # noqa: E402
from data import CLASS, IGNORED, Sample  # noqa: E402
from model import MLLM  # noqa: E402

PLAIN = "plain classifier: mean of the patches, one linear layer"
ROWS = [(PLAIN, ""), ("the chain", ""), ("rate of scenes", "own_lr=1.0"),
        ("half the rate of scenes", "own_lr=0.5"), ("4 queries", "qformer.n_queries=4"),
        ("2 blocks, cross-attention in the first", "qformer.n_layers=2"),
        ("3 blocks, cross-attention in each", "qformer.cross_attention_every=1"),
        ("without ITC and ITM", "itc_weight=0.0 itm_weight=0.0")]


class Classifier(train.StageLoss):
    """Cross-entropy over classes, each known by the ids of its text. batch: as for `StageLoss`."""
    texts: Tensor

    def vision_loss(self, batch: dict[str, Tensor], step: int) -> Tensor:
        features = self.model.image_features(batch["images"])  # (B, P, Dv)
        T = batch["text"].shape[1]
        label = (batch["text"][:, None] == self.texts[:, :T]).all(dim=-1).int().argmax(dim=1)
        logits = self.model.qformer(features.mean(dim=1))
        return nn.functional.cross_entropy(logits.float(), label)


@torch.no_grad()
def class_scores(model: MLLM, images: Tensor, classes: dict[str, Tensor]) -> Tensor:
    """The log-likelihood of each class's text, (B, classes), or a classifier's logits."""
    features = model.image_features(images)
    if isinstance(model.qformer, nn.Linear):
        return model.qformer(features.mean(dim=1)).float()
    scores = []
    for text, labels in zip(classes["to_generate"], classes["labels"][:, 1:]):
        rows = model.qformer(features, text.expand(len(images), -1), "causal")
        logits = model.qformer.lm_head(rows[:, model.qformer.n_queries:-1]).float()
        likelihood = logits.log_softmax(dim=-1)[:, torch.arange(len(labels)), labels.clamp(min=0)]
        scores.append((likelihood * (labels != IGNORED)).sum(dim=1))
    return torch.stack(scores, dim=1)


def measure(config: train.Config, is_plain: bool) -> tuple[float, float]:
    """(accuracy on the pictures of --val, seconds of training)."""
    task = train.Task(config)
    names = sorted({record.turns[0][1] for record in task.own.records})
    tokenizer = train.make_tokenizer(config, task)
    torch.manual_seed(config.seed)
    model = MLLM(train.model_config(config, "vision", tokenizer))
    collate = train.collate_for(model, tokenizer, config)
    classes = collate.pairs([Sample([], [(f"<image> {CLASS}", name)]) for name in names])
    loss = train.StageLoss
    if is_plain:
        Classifier.texts, model.qformer = classes["text"], nn.Linear(config.vit["dim"], len(names))
        train.StageLoss = Classifier
    model.train_only(train.shares_of(config, "vision"))
    _, seconds = train.train_stage(model, "vision", task, collate, config, Path("."))
    train.StageLoss, right = loss, []
    model.eval()
    for start in range(0, len(task.test["qa"]), 200):
        some = [task.test["qa"][i] for i in range(start, min(start + 200, len(task.test["qa"])))]
        with train.autocast(torch.device("cpu"), config):
            best = class_scores(model, collate.images(some), classes).argmax(dim=1).tolist()
        right += [names[i] == sample.turns[0][1] for i, sample in zip(best, some)]
    return sum(right) / len(right), seconds


def main() -> None:
    flags = [flag for flag in sys.argv[1:] if flag != "--short"]
    config = train.settings(train.parse_arguments(["--device=cpu", *flags]))
    print("| | accuracy | seconds |", "| --- | --- | --- |", sep="\n")
    for label, changes in ROWS[:2] if "--short" in sys.argv else ROWS:
        changed = config
        for change in changes.split():
            changed = train.with_setting(changed, change)
        accuracy, seconds = measure(changed, label == PLAIN)
        print(f"| {label} | {accuracy:.3f} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
