"""Who learns, in which order, to which loss, and whether a run can be interrupted without a trace."""
import json
import math
import os
import re
from dataclasses import replace

import pytest
import torch
from PIL import Image

import train
from data import END, Collate, Sample, Scenes, Tokenizer, corpus
from model import MLLM, PARTS, PatchMerge, part_of

TINY = dict(vit_dim=16, vit_layers=1, vit_heads=2, qformer_dim=16, qformer_layers=2, qformer_heads=2, n_queries=2,
            dim=24, n_layers=2, n_heads=2, n_kv_heads=1, r=2, batch_size=4, read_samples=12, see_samples=12,
            align_samples=12, instruct_samples=12, eval_samples=6, workers=0, bf16=False, qformer_dropout=0.1,
            lora_dropout=0.1, save_every=2)


def flags(**values) -> list[str]:
    values = TINY | values
    words = [f"--{'no-' if value is False else ''}{name.replace('_', '-')}" if isinstance(value, bool)
             else f"--{name.replace('_', '-')}={value}" for name, value in values.items()]
    return ["train.py", "--device=cpu", *words]


def run(monkeypatch, out, *more, **values):
    monkeypatch.setattr("sys.argv", [*flags(**values), f"--out={out}", *more])
    train.main()


def forked(work, **environment):
    """Start work() in a process of its own, which ends with 0 unless work raises. Returns its number."""
    process = os.fork()
    if process:
        return process
    os.environ.update(environment)
    torch.set_num_threads(1)                                  # the parent's threads do not live on in a fork
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1), os.dup2(quiet, 2)
    try:
        work()
    except BaseException:
        os._exit(1)
    os._exit(0)


def weights(out, stage="instruct"):
    return torch.load(out / f"{stage}.pt", weights_only=True)["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run on a model of a few thousand parameters."""
    out = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        run(patch, out)
    return out


@pytest.fixture
def parts():
    """A tiny model whose parameters are all away from zero, with data for it."""
    config = train.Config(**TINY)
    task = train.Task(config)
    tokenizer = Tokenizer.train(corpus(task.train("read"), 50), 400)
    torch.manual_seed(0)
    model = MLLM(train.model_config(config, tokenizer))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    torch.nn.init.constant_(model.qformer.temperature, 0.07)
    return config, task, model, Collate(tokenizer, config.n_rows, config.image_size, config.max_len)


@pytest.mark.parametrize("recipe", train.WHO_LEARNS)
@pytest.mark.parametrize("stage", train.STAGES)
def test_each_stage_changes_exactly_the_parts_its_table_lists(stage, recipe, parts, tmp_path):
    config, task, model, collate = parts
    config = train.replace(config, recipe=recipe, **{f"{stage}_samples": config.batch_size})
    if stage in ("align", "instruct"):
        model.drop_text_branch()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    train.train_stage(model, stage, train.Task(config), collate, config, tmp_path, 0.0, torch.device("cpu"))
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    learns = train.WHO_LEARNS[config.recipe][stage]
    listed = {name for name in before if part_of(name) in learns}
    # Nothing reads the image rows after the last attention has read their keys and values, so all later
    # adapters of the last block have a gradient of zero.
    unread = {name for name in listed if "lora_" in name and "blocks.1." in name and "wqkv" not in name}
    # A key bias adds the same to all scores of a row, which softmax does not see: zero but for rounding.
    rounding = {name for name in listed if name.endswith("k_proj.bias")}
    assert changed - rounding == listed - unread - rounding


@pytest.mark.parametrize("recipe", train.WHO_LEARNS)
def test_the_table_names_every_stage_and_only_real_parts(recipe):
    assert tuple(train.WHO_LEARNS[recipe]) == train.STAGES
    assert all(set(learns) <= set(PARTS) for learns in train.WHO_LEARNS[recipe].values())


def test_a_run_may_merge_patches_from_the_first_stage_on(tmp_path, monkeypatch):
    run(monkeypatch, tmp_path, connector="patch-merge")
    assert isinstance(MLLM.load(tmp_path / "align.pt").qformer, PatchMerge)
    run(monkeypatch, tmp_path, "--stage=align", recipe="minigpt4")                # and `align` may go back
    before, after = (MLLM.load(tmp_path / name).state_dict() for name in ("see.pt", "align.pt"))
    kept = [name for name in after if part_of(name) == "qformer"]
    assert kept and all(torch.equal(after[name], before[name]) for name in kept)


@pytest.mark.parametrize("recipe", ["lora", "minigpt4"])
def test_a_recipe_and_a_connector_may_change_after_stage_0(recipe, finished, tmp_path, monkeypatch):
    for name in ("read.pt", "see.pt", "tokenizer.json"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    asked = dict(recipe=recipe, r=3, connector="patch-merge")
    for stage in ("align", "instruct"):
        run(monkeypatch, tmp_path, f"--stage={stage}", **asked)
    before, after = (MLLM.load(folder / name) for folder, name in ((finished, "see.pt"), (tmp_path, "instruct.pt")))
    assert after.config.lora_on == ("all" if recipe == "lora" else "image")
    assert after.config.r == 3 and after.config.connector == "patch-merge"
    adapters = [parameter for name, parameter in after.named_parameters() if "lora_B" in name]
    assert any(parameter.any() for parameter in adapters) == (recipe == "lora")
    with pytest.raises(ValueError, match="trained with connector 'patch-merge', but 'qformer' is asked for"):
        run(monkeypatch, tmp_path, "--stage=instruct", recipe=recipe, r=3)
    for part in ("vit", "decoder"):                           # frozen in both recipes
        assert all(torch.equal(parameter, before.get_parameter(name))
                   for name, parameter in after.named_parameters() if part_of(name) == part)


def test_each_stage_may_change_what_starts_anew_in_it_and_nothing_else(finished, tmp_path, monkeypatch):
    for name in ("read.pt", "tokenizer.json"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    run(monkeypatch, tmp_path, "--stage=see", n_queries=3, vit_dim=32)
    read, see = (MLLM.load(folder / name) for folder, name in ((finished, "read.pt"), (tmp_path, "see.pt")))
    assert see.qformer.query_tokens.shape[1] == 3 and see.config.vit_dim == 32
    assert same(see.decoder.state_dict(), read.decoder.state_dict())
    with pytest.raises(ValueError, match="see.pt was trained with vit_dim 32, but 16 is asked for"):
        run(monkeypatch, tmp_path, "--stage=align", n_queries=3)
    with pytest.raises(ValueError, match="see.pt was trained with qformer_layers 2, but 3 is asked for"):
        run(monkeypatch, tmp_path, "--stage=align", n_queries=3, vit_dim=32, qformer_layers=3)
    run(monkeypatch, tmp_path, "--stage=align", n_queries=3, vit_dim=32, qformer_drop_last=0, recipe="minigpt4")
    last = "qformer.blocks.1.query_ffn.0.weight"              # frozen in this recipe
    assert torch.equal(weights(tmp_path, "align")[last], weights(tmp_path, "see")[last])


def test_images_may_grow_from_one_stage_to_the_next(finished, tmp_path, monkeypatch):
    for name in ("read.pt", "see.pt", "align.pt", "tokenizer.json"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    monkeypatch.setattr("sys.argv", [*flags(), f"--out={tmp_path}", "--stage=instruct", "--image-size", "64", "64"])
    train.main()
    assert MLLM.load(tmp_path / "instruct.pt").vit.grid == (8, 8)
    monkeypatch.setattr("sys.argv", [*flags(), f"--out={tmp_path}", "--stage=evaluate", "--image-size", "72", "72"])
    train.main()
    assert MLLM.load(tmp_path / "instruct.pt").vit.grid == (8, 8)                 # measuring changes no weights
    with pytest.raises(ValueError, match="do not fit in max_len 70"):
        run(monkeypatch, tmp_path, "--stage=evaluate", max_len=70)
    run(monkeypatch, tmp_path, "--stage=evaluate")            # without a size: that of the weights
    assert json.loads((tmp_path / "metrics.json").read_text())["config"]["image_size"] == [64, 64]


def test_frozen_parameters_are_in_no_optimizer(parts):
    config, _, model, _ = parts
    model.train_only(("vit", "projector", "plora"))
    groups = [group for optimizer in train.make_optimizers(model, config, "align") for group in optimizer.param_groups]
    listed = {id(parameter) for group in groups for parameter in group["params"]}
    assert listed == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}


def test_feed_forward_nets_of_the_decoder_learn_slower_than_its_attention(parts):
    config, _, model, _ = parts
    model.train_only(("decoder",))
    groups = [group for optimizer in train.make_optimizers(model, config, "read") for group in optimizer.param_groups]
    lr = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    block = model.decoder.blocks[0]
    assert lr[id(model.decoder.lm_head.weight)] == pytest.approx(config.read_lr)
    for layer in (block.w1, block.w2, block.w3):
        assert lr[id(layer.weight)] == pytest.approx(config.ffn_lr * lr[id(block.attention.wo.weight)])


def test_each_part_learns_at_its_share_of_the_rate_and_not_at_all_at_0(parts, capsys, tmp_path):
    config, task, model, collate = parts
    config = train.replace(config, vit_lr=0.0, plora_lr=0.5, decoder_lr=0.25, recipe="xcomposer2", instruct_samples=4,
                           instruct_lr=6e-3)
    assert train.who_learns(config, "instruct") == ("projector", "plora", "decoder")
    model.drop_text_branch()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    train.report(model, config, "instruct")
    train.train_stage(model, "instruct", task, collate, config, tmp_path, 0.0, torch.device("cpu"))
    moved = {part_of(name) for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {"projector", "plora", "decoder"}
    groups = [group for optimizer in train.make_optimizers(model, config, "instruct")
              for group in optimizer.param_groups]
    peak = {id(parameter): group["peak"] / config.instruct_lr for group in groups for parameter in group["params"]}
    wqkv = model.decoder.blocks[0].attention.wqkv
    assert [peak[id(parameter)] for parameter in (wqkv.weight, wqkv.lora_A, model.projector[0].weight)] == [.25, .5, 1]
    printed = capsys.readouterr().out
    assert re.search("vit .*frozen, since its rate is 0", printed) and re.search("qformer .*frozen\n", printed)
    assert re.search("decoder .*learns, rate 1.5e-03", printed)
    with pytest.raises(ValueError, match="nothing would learn in 'align'"):
        train.who_learns(train.replace(config, recipe="frozen", projector_lr=0.0), "align")
    assert train.who_learns(config, "see") == ("vit", "qformer")                  # stage 0 is the same for all


def test_patches_that_cannot_be_merged_are_an_error_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", [*flags(connector="patch-merge"), f"--out={tmp_path}", "--image-size", "40", "40"])
    with pytest.raises(ValueError, match="an image has 25"):
        train.main()
    assert not (tmp_path / "read.pt").exists()


def test_a_projector_without_parameters_cannot_be_all_that_learns(finished, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="nothing would learn in 'align': projector has no parameters"):
        run(monkeypatch, tmp_path, recipe="minigpt4", projector="identity", qformer_dim=24, dim=24)


def test_a_question_that_leaves_no_room_for_an_answer_is_named(parts):
    config, _, model, collate = parts
    long = Sample([], [("word " * 300, None)], name="record 7")
    with pytest.raises(ValueError, match="record 7: .* do not fit in max_len 512"):
        train.answer(model, [long], collate, config)


def test_a_held_out_question_that_is_too_long_stops_the_run_before_it_starts(tmp_path, monkeypatch):
    records = [{"id": i, "conversations": [{"from": "human", "value": "word " * (400 if i == 0 else 1)},
                                           {"from": "gpt", "value": "yes"}]} for i in range(40)]
    (tmp_path / "my.json").write_text(json.dumps(records))
    with pytest.raises(ValueError, match="record 0 .*do not fit in max_len 300"):
        run(monkeypatch, tmp_path / "out", "--image-size", "48", "48", data=tmp_path / "my.json", max_len=300)
    assert not list((tmp_path / "out").glob("*.pt"))


def test_a_loss_without_weight_leaves_its_head_without_a_gradient(parts):
    config, task, model, collate = parts
    batch = next(iter(task.batches("see", collate, 0)))
    for itc, itm in ((1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0)):
        model.zero_grad()
        train.stage_loss(model, "see", batch, train.replace(config, itc_weight=itc, itm_weight=itm)).backward()
        assert (model.qformer.itm_head.weight.grad is not None) == bool(itm)
        assert (model.qformer.itc_text.weight.grad is not None) == bool(itc)
        assert model.qformer.lm_head[0].weight.grad is not None


def test_contrast_is_learned_in_one_step_of_so_many(parts):
    config, task, model, collate = parts
    batch, learned = next(iter(task.batches("see", collate, 0))), []
    for step in range(7):
        model.zero_grad()
        train.stage_loss(model, "see", batch, train.replace(config, contrast_every=3), step).backward()
        learned += [step] * (model.qformer.itm_head.weight.grad is not None)
    assert learned == [0, 3, 6]


def test_frozen_parts_may_be_kept_in_half_precision(finished, tmp_path, monkeypatch):
    for name in ("read.pt", "see.pt", "align.pt", "tokenizer.json"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    run(monkeypatch, tmp_path, "--stage=instruct", "--half-frozen", bf16=True)
    for name, value in weights(tmp_path).items():
        learned = part_of(name) in train.WHO_LEARNS["blip2_plora"]["instruct"]
        assert value.dtype == torch.float32 or not learned, name
    assert weights(tmp_path)["vit.patch_embedding.weight"].dtype == torch.bfloat16
    with pytest.raises(ValueError, match="half_frozen needs bf16"):
        run(monkeypatch, tmp_path, "--stage=instruct", "--half-frozen")


def test_schedule_warms_up_to_the_peak_then_falls():
    rates = [train.schedule(step, 100, 0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10] == 1 and rates[55] == pytest.approx(0.51) and 0.02 < rates[99] < 0.021
    assert all(a > b for a, b in zip(rates[10:], rates[11:]))


def test_eight_samples_are_learned_by_heart(parts):
    config, task, model, collate = parts
    model.reset_parameters()
    model.train_only(("projector", "plora", "decoder"))
    samples = Scenes(task.spec, "question", 8)
    batch = collate.conversations([samples[i] for i in range(8)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        loss = train.stage_loss(model.eval(), "instruct", batch, config)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.01
    answers = train.answer(model, [prompt for prompt, _ in train.single_questions(samples)], collate, config)
    assert answers == [samples[i].turns[0][1] for i in range(8)]


@pytest.mark.parametrize("stop_after", [1, 3])
def test_a_resumed_run_ends_bit_for_bit_like_an_uninterrupted_one(stop_after, finished, tmp_path, monkeypatch):
    save_state, saved = train.save_state, []

    def save_then_stop(path, **state):
        save_state(path, **state)
        saved.append(path)
        if len(saved) == stop_after:                          # in the first stage, or two stages later
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "save_state", save_then_stop)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, tmp_path)
    run(monkeypatch, tmp_path, "--resume")
    for stage in train.STAGES:
        assert same(weights(tmp_path, stage), weights(finished, stage)), stage
        assert torch.load(tmp_path / f"{stage}.pt")["losses"] == torch.load(finished / f"{stage}.pt")["losses"]


def test_one_stage_alone_equals_that_stage_of_a_whole_run(finished, tmp_path, monkeypatch):
    for name in ("tokenizer.json", "align.pt", "see.pt", "read.pt"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    run(monkeypatch, tmp_path, "--stage=instruct")
    assert same(weights(tmp_path), weights(finished))


def test_a_later_batch_is_the_same_whether_or_not_the_earlier_ones_were_drawn(parts):
    config, task, _, collate = parts
    late = next(iter(task.batches("instruct", collate, 2)))
    assert all(torch.equal(late[name], list(task.batches("instruct", collate, 0))[2][name]) for name in late)


def test_reading_puts_texts_of_like_length_in_a_batch_each_once_and_goes_on_anywhere(parts):
    _, task, _, _ = parts
    task.config = replace(task.config, read_samples=160, align_samples=160)
    order, texts = [*task.order("read", 0)], task.train("read")

    def padding(order):
        batches = ([texts.length(i) for i in order[start:start + 4]] for start in range(0, 160, 4))
        return sum(4 * max(batch) - sum(batch) for batch in batches)

    assert sorted(order) == [*range(160)] and padding(order) < padding(range(160)) / 4
    first = [texts.length(i) for i in order[:4 * train.GROUP]]
    assert first != sorted(first)                             # batches come in any order
    for step in (1, 15, 16, 39):
        assert [*task.order("read", step)] == order[4 * step:]
    assert [*task.order("align", 0)] == [*range(160 + 12, 320 + 12)]              # others take what comes


def test_few_records_of_ones_own_do_not_fill_a_batch_with_one(tmp_path):
    records = [{"conversations": [{"from": "human", "value": "x" * (5 * i % 9)}, {"from": "gpt", "value": "yes"}]}
               for i in range(9)]                             # the first is kept for measuring
    (tmp_path / "my.json").write_text(json.dumps(records))
    task = train.Task(train.Config(**TINY | dict(data=str(tmp_path / "my.json"), read_samples=80)))
    lengths = [task.train("read").length(i) for i in task.order("read", 0)]
    for start in range(0, 80, 8):                             # a pass of two batches, of the shorter and of the longer
        one, other = sorted([sorted(lengths[start:start + 4]), sorted(lengths[start + 4:start + 8])])
        assert one + other == [4, 5, 6, 7, 8, 9, 10, 11]


def test_metrics_hold_every_promised_number_and_the_pictures_exist(finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    for key in ("qa_accuracy", "qa_accuracy_blind", "qa_accuracy_floor", "qa_accuracy_unseen", "description_exact",
                "reading_accuracy", "seconds"):
        assert isinstance(metrics[key], (int, float)), key
    assert set(metrics["seconds_by_stage"]) == {*train.STAGES, "evaluate"}
    for name in ("curves.png", "samples.png"):
        assert Image.open(finished / name).width > 300


def test_the_text_branch_is_gone_after_see(finished):
    has = {stage: any("text_ffn" in name for name in weights(finished, stage)) for stage in train.STAGES}
    assert has == {"read": True, "see": True, "align": False, "instruct": False}


def own_data(folder, n=6):
    """LLaVA JSON about wide pictures: red ones and blue ones."""
    (folder / "images").mkdir()
    records = []
    for i in range(n):
        color = ("red", "blue")[i % 2]
        Image.new("RGB", (64, 32), color).save(folder / "images" / f"{i}.png")
        records.append({"id": i, "image": f"{i}.png", "conversations": [
            {"from": "human", "value": "<image>\nWhat color?"}, {"from": "gpt", "value": color}]})
    (folder / "data.json").write_text(json.dumps(records))
    return folder / "data.json"


def test_own_wide_pictures_train_through_all_stages(tmp_path, monkeypatch):
    data = own_data(tmp_path)
    run(monkeypatch, tmp_path / "out", data=data, val=data)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["config"]["image_size"] == [48, 96]
    assert metrics["qa_accuracy_floor"] == 0.5 and "qa_accuracy" in metrics


def test_without_a_second_file_the_pictures_to_measure_on_are_not_trained_on(tmp_path):
    task = train.Task(train.Config(**TINY, data=str(own_data(tmp_path, 40))))
    measured = {sample.name for sample in (task.test["qa"][i] for i in range(len(task.test["qa"])))}
    trained = {task.train("instruct")[i].name for i in range(len(task.train("instruct")))}
    assert len(measured) == 2 and len(trained) == 38 and not measured & trained


def test_captions_are_measured_with_an_instruction_and_what_cleaning_did_is_printed(tmp_path, capsys):
    (tmp_path / "image").mkdir()
    texts = ["It is a red wall. It is", "A red wall, all of it.", "Red."] * 20
    for i in range(len(texts)):
        Image.new("RGB", (48, 48), "red").save(tmp_path / "image" / f"{i}.jpg")
    annotations = [{"image_id": i, "caption": text} for i, text in enumerate(texts)]
    (tmp_path / "filter_cap.json").write_text(json.dumps({"annotations": annotations}))
    task = train.Task(train.Config(**TINY, data=str(tmp_path)))
    assert {sample.turns[0][1] for sample in map(task.test["qa"].__getitem__, range(2))} <= {
        "It is a red wall.", "A red wall, all of it."}
    assert len(task.train("instruct")) == 38 and len(task.train("align")) == 57
    assert re.search("captions: 19 kept, 19 mended, 19 dropped", capsys.readouterr().out)


def test_each_turn_is_asked_with_the_true_turns_before_it():
    a, b = Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8))
    sample = Sample([a, b], [("<image> q1", " a1 "), ("q2", "a2"), ("<image> q3", "a3")], "kind")
    (first, truth1), (second, truth2), (third, truth3) = train.single_questions([sample])
    assert (truth1, truth2, truth3) == (("a1",), ("a2",), ("a3",))
    assert first.turns == [("<image> q1", None)] and first.images == [a]
    assert second.turns == [("<image> q1", " a1 "), ("q2", None)] and second.images == [a]
    assert third.images == [a, b]
    clip = Sample([a, b, a], [("<image> q1", "a1"), ("<image> q2", "a2")], frames=(2, 1))
    (first, _), (second, _) = train.single_questions([clip])
    assert first.images == [a, b] and first.frames == (2,) and second.images == [a, b, a]


def test_blind_shows_each_question_the_picture_of_another(parts, monkeypatch):
    config, _, model, collate = parts
    seen = []

    def generate(ids, images, *rest):
        seen.append(images)
        yield torch.full((len(ids),), END)

    monkeypatch.setattr(model, "generate", generate)
    prompts = [Sample([Image.new("RGB", (48, 48), color)], [("<image>", None)]) for color in ("red", "blue", "lime")]
    for blind in (False, True):
        train.answer(model, prompts, collate, config, blind)
    assert torch.equal(seen[1], seen[0][[2, 0, 1]])


def test_the_floor_is_the_most_frequent_answer_of_each_kind():
    prompts = [Sample([], [], kind) for kind in "aaabb"]
    truths = [("y",), ("x", "w"), ("x",), ("z",), ("z",)]
    assert train.most_frequent(prompts, truths) == ["x", "x", "x", "z", "z"]


def test_bleu_equals_the_worked_example():
    """The expected figure is that of both `sacrebleu` 2.6.0 (lower case, no smoothing) and `nltk` 3.10.4."""
    answers = ["a brown dog runs across the green grass .", "Two children play with a ball on the beach",
               "the man in a red hat rides a horse"]
    references = [("a brown dog is running across the grass.", "the brown dog runs over the green grass ."),
                  ("two kids play with a ball on the sand", "children are playing with a ball on the beach today"),
                  ("a man in a red hat is riding a horse", "A man rides a horse")]
    assert train.bleu4(answers, references) == pytest.approx(0.6307255194006104, abs=1e-12)
    assert train.bleu4(["a b c d"], [("a b c d",)]) == 1 and train.bleu4(["", "a b c"], [("a b c d",)] * 2) == 0
    short = ["a b c d e"], [("a b c d e f g h i j",)]         # all right, half as long: e^(1 - 10 / 5)
    assert train.bleu4(*short) == pytest.approx(math.exp(-1))


def test_long_answers_are_measured_by_bleu_and_short_ones_to_the_letter(parts, monkeypatch):
    config, _, model, collate = parts
    picture = Image.new("RGB", (48, 48))
    samples = [Sample([picture], [("<image> what?", "a dog on a green field")],
                      references=("a dog on a green field", "the dog runs on a field")),
               Sample([picture], [("<image> red?", "yes")]), Sample([picture], [("<image> blue?", "no")])]
    given = {False: ["the dog runs on a field", "yes", "yes"], True: ["nothing", "no", "no"]}
    monkeypatch.setattr(train, "answer", lambda model, prompts, collate, config, blind=False: given[blind])
    results, answered = train.examine(model, samples, collate, config)
    assert (results["all"], results["blind"], results["floor"]) == (0.5, 0.5, 0.5)
    assert results["bleu4"] == {"all": 1.0, "blind": 0.0, "floor": 1.0}
    assert results["kinds"]["all"] == {"answer": 0.5, "text, BLEU-4": 1.0} and len(answered) == 3


def test_batches_are_the_same_whatever_the_number_of_workers(tmp_path):
    config = train.Config(**TINY)
    for own in ("", str(captions_folder(tmp_path))):
        batches = []
        for workers in (0, 1, 2):
            task = train.Task(replace(config, workers=workers, data=own))
            tokenizer = Tokenizer.train(corpus(task.train("read"), 50), 300)
            batches.append(list(task.batches("align", train.make_collate(tokenizer, config), 0)))
        for other in batches[1:]:
            assert all(torch.equal(a[name], b[name]) for a, b in zip(batches[0], other) for name in a)


def test_pictures_are_seen_once_where_that_is_frozen_and_what_is_stale_is_not_used(tmp_path, monkeypatch):
    own = dict(data=captions_folder(tmp_path), recipe="minigpt4", instruct_samples=24)
    seen, see = [], MLLM.see
    monkeypatch.setattr(MLLM, "see", lambda model, images: seen.append(len(images)) or see(model, images))
    losses, seeing = {}, {}
    for name, more in (("anew", dict(seen_gb=0.0)), ("once", {}), ("kept", dict(keep_seen=True))):
        seen.clear()
        run(monkeypatch, tmp_path / name, **own, **more)
        losses[name] = torch.load(tmp_path / name / "instruct.pt", weights_only=True)["losses"]
        seeing[name] = sum(seen)
    assert losses["once"] == pytest.approx(losses["anew"], rel=1e-5) and losses["kept"] == losses["once"]
    # 5 captions to learn from in two stages of 12 and 24 samples, 1 to be asked about, with its picture and blind
    assert seeing == {"anew": 12 + 24 + 2, "once": 5 + 5 + 2, "kept": 5 + 2}
    for more, n in (({}, 0), (dict(fit="pad"), 5)):
        seen.clear()
        run(monkeypatch, tmp_path / "kept", "--stage=align", **own | dict(keep_seen=True) | more)
        assert sum(seen) == n
    again = tmp_path / "images" / "3.png"
    Image.new("RGB", (9, 8), "blue").save(again)              # another picture under the same name
    seen.clear()
    run(monkeypatch, tmp_path / "kept", "--stage=align", **own, keep_seen=True)
    assert sum(seen) == 5


def captions_folder(folder):
    (folder / "images").mkdir()
    for i in range(6):
        Image.new("RGB", (9, 9), (40 * i, 0, 0)).save(folder / "images" / f"{i}.png")
    (folder / "captions.txt").write_text("".join(f"{i}.png\tpicture number {i}\n" for i in range(6)))
    return folder


def test_attributes_are_counted_thing_by_thing():
    truth = "At the top is a large red circle. At the left is a small blue star."
    mine = "At the top is a small red circle."
    right = train.attributes_right([(mine, truth), (truth, truth)])
    assert right == {"where": 3 / 4, "size": 2 / 4, "color": 3 / 4, "shape": 3 / 4, "how many": 1 / 2}


def test_starting_in_the_middle_without_weights_says_what_is_missing(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        run(monkeypatch, tmp_path, "--resume")
    with pytest.raises(FileNotFoundError, match="tokenizer.json"):
        run(monkeypatch, tmp_path, "--stage=align")
