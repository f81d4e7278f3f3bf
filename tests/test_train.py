"""What is trained when, to which loss; that a run can be interrupted; how a model is examined."""
import copy
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import train
from data import Collate, Sample, Tokenizer, corpus, read_safetensors
from model import MLLM, part_of, resize_positions
from train import RECIPES, STAGE_0, STAGES

GOLDEN = Path(__file__).parent / "golden"
# What --set changes: a model of a few thousand parameters, three steps in each stage, and dropout.
DROPOUT = ["vit.drop_path_rate", "qformer.dropout", "decoder.lora_dropout"]
TINY = ["vit.dim=16", "vit.n_layers=1", "vit.n_heads=2", "qformer.dim=16", "qformer.n_layers=2",
        "qformer.n_heads=2", "qformer.n_queries=2", "decoder.dim=24", "decoder.n_layers=2",
        "decoder.n_heads=2", "decoder.n_kv_heads=1", "decoder.r=2", "bf16=false", "batch_size=4",
        "eval_samples=6", "workers=0", *(f"{stage}_samples=12" for stage in STAGES),
        *(f"{name}=0.1" for name in DROPOUT)]


def words(out, *more):
    """The command line of a tiny run; what does not begin with -- is for --set."""
    settings = [word if word.startswith("--") else f"--set={word}" for word in (*TINY, *more)]
    return ["train.py", "--device=cpu", f"--out={out}", *settings]


def run(out, *more):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", words(out, *more))
        train.main()


def config_of(*more):
    return train.settings(train.parse_arguments(words("nowhere", *more)[1:]))


def model_of(config, stage):
    """The model of a stage with no parameter at zero, what batches it, and the task."""
    task = train.Task(config)
    tokenizer = Tokenizer.train(corpus(task.train("language"), 50), 400)
    torch.manual_seed(0)
    model = MLLM(train.model_config(config, stage, tokenizer))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    if stage in STAGE_0:
        torch.nn.init.constant_(model.qformer.temperature, 0.07)
    model.train_only(train.shares_of(config, stage))
    return model, train.collate_for(model, tokenizer, config), task


def checkpoint(out, stage="instruct"):
    return torch.load(out / f"{stage}.pt", weights_only=True)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a whole run; `out` is a copy."""
    out = tmp_path_factory.mktemp("run")
    run(out, "save_every=2")
    return out


@pytest.fixture
def out(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "out")


# ---- Stages and recipes ----------------------------------------------------------------------

@pytest.mark.parametrize("recipe, stage", [("minigpt4", stage) for stage in STAGE_0] + [
    (recipe, stage) for recipe in RECIPES for stage in ("align", "instruct")])
def test_a_stage_changes_exactly_the_parts_that_its_recipe_lists(recipe, stage, tmp_path):
    config = config_of(f"recipe={recipe}", f"{stage}_samples=4")
    model, collate, task = model_of(config, stage)
    before = copy.deepcopy(model.state_dict())
    train.train_stage(model, stage, task, collate, config, tmp_path)
    names, parts = dict(model.named_parameters()), STAGE_0.get(stage) or RECIPES[recipe][stage]
    changed = {name for name in names if not torch.equal(names[name], before[name])}
    listed = {name for name in names if part_of(name) in parts}
    # These have gradients of zero: softmax does not see key biases (but for rounding), and nothing
    # reads image rows after the last keys and values.
    zero = {name for name in listed if name.endswith("k_proj.bias")
            or "lora_" in name and "blocks.1." in name and "wqkv" not in name}
    assert changed - zero == listed - zero


def test_a_recipe_a_connector_and_adapters_may_change_after_stage_0(out):
    asked = ("--recipe=lora", "--connector=patch-merge", "decoder.r=3")
    for stage in ("align", "instruct"):
        run(out, f"--stage={stage}", *asked)
    config, weights, before = (checkpoint(out)["config"], checkpoint(out)["model"],
                               checkpoint(out, "vision")["model"])
    assert (config["lora_on"], config["connector"]) == ("all", "patch-merge")
    assert weights["decoder.blocks.0.w1.lora_A"].shape[0] == 3
    frozen = [name for name in weights if part_of(name) in ("vit", "decoder")]
    assert frozen and all(torch.equal(weights[name], before[name]) for name in frozen)


def test_text_half_and_last_block_of_the_qformer_go_after_vision(finished):
    for gone in ("text_ffn", "qformer.blocks.1"):
        has = [gone in " ".join(checkpoint(finished, stage)["model"]) for stage in STAGES]
        assert has == [True, True, False, False]


def test_pictures_may_grow_in_a_later_stage_and_positions_are_interpolated(out):
    config = config_of("vit.image_size=(64, 64)")
    model, _ = train.start_of(config, "instruct", Tokenizer.load(out / "tokenizer.json"), out)
    old = checkpoint(out, "align")["model"]["vit.position_embedding"]
    assert torch.equal(model.vit.position_embedding, resize_positions(old, (6, 6), (8, 8)))


@pytest.mark.parametrize("setting, message", [
    ("scenes.n_colors=4", "scenes settings: .'n_colors'"),
    ("qformer.n_queries=3", "qformer settings: .'n_queries'"),
    ("decoder.n_layers=1", "decoder settings: .'n_layers'")])
def test_a_stage_refuses_other_settings_than_its_weights_have(setting, message, out):
    with pytest.raises(ValueError, match=f"vision.pt was trained with other {message}"):
        run(out, "--stage=align", setting)


def test_a_projector_stays_with_its_connector(out):
    with pytest.raises(ValueError, match="align.pt has a projector for the connector 'qformer'"):
        run(out, "--stage=instruct", "--connector=patches")


def test_data_without_pictures_are_refused_before_anything_is_trained(tmp_path):
    messages = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    (tmp_path / "my.json").write_text(json.dumps([{"conversations": messages}] * 4))
    with pytest.raises(ValueError, match="nothing to use for 'vision'"):
        run(tmp_path, f"--data={tmp_path / 'my.json'}")
    assert not list(tmp_path.glob("*.pt"))


@pytest.mark.parametrize("name, change, message", [
    ("trained", lambda parts: parts[1:], "decoder.* would stay frozen with random numbers"),
    ("model", lambda weights: dict([*weights.items()][1:]), "weights do not fit: missing"),
    ("model", lambda weights: weights | {"decoder.norm.weight": torch.ones(3)}, "size mismatch")])
def test_a_part_whose_weights_do_not_fit_or_are_missing_is_refused(name, change, message, out):
    content = checkpoint(out, "vision")
    torch.save(content | {name: change(content[name])}, out / "vision.pt")
    with pytest.raises(ValueError, match=message):
        run(out, "--stage=align")


def test_frozen_parts_may_be_kept_in_half_precision(out):
    run(out, "--stage=instruct", "bf16=true", "half_frozen=true")
    weights, trained = checkpoint(out)["model"], RECIPES["blip2_plora"]["instruct"]
    assert weights["vit.patch_embedding.weight"].dtype == torch.bfloat16
    assert {weights[name].dtype for name in weights if part_of(name) in trained} == {torch.float32}


@pytest.fixture
def language_model(tmp_path):
    """The golden LLaMA with as many words as the golden tokenizer."""
    folder = tmp_path / "llm"
    shutil.copytree(GOLDEN / "tokenizers" / "llama", folder)
    config = json.loads((GOLDEN / "llama" / "config.json").read_text()) | {"vocab_size": 540}
    (folder / "config.json").write_text(json.dumps(config))
    wide = dict.fromkeys(["model.embed_tokens.weight", "lm_head.weight"], torch.randn(540, 16))
    weights = read_safetensors(GOLDEN / "llama" / "model.safetensors") | wide
    torch.save(weights, folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize("vit", [
    [f"--vit={GOLDEN / 'clip'}", "--connector=patches"],
    [f"--vit={GOLDEN / 'blip2'}", f"--qformer={GOLDEN / 'blip2'}"]])
def test_a_run_on_published_parts_needs_no_stage_0_and_keeps_frozen_weights(
        vit, language_model, tmp_path, monkeypatch):
    own = [word for word in TINY if word.split(".")[0] not in ("vit", "qformer", "decoder")]
    monkeypatch.setitem(globals(), "TINY", [*own, f"--llm={language_model}", *vit, "recipe=plora"])
    run(tmp_path)
    assert {path.stem for path in tmp_path.glob("*.pt")} == {"align", "instruct"}
    weights = checkpoint(tmp_path)["model"]
    for part, (_, published) in train.published_parts(config_of()).items():
        assert published and all(torch.equal(weights[f"{part}.{name}"], value.float())
                                 for name, value in published.items()), part
    with pytest.raises(ValueError, match="'language' is not needed: weights are given"):
        run(tmp_path, "--stage=language")


# ---- Settings --------------------------------------------------------------------------------

@pytest.mark.parametrize("more, message", [
    (["--batch-size=0"], "batch_size must be at least 1, got 0"),
    (["--align-samples=-1"], "align_samples must be at least 1, got -1"),
    (["--batch-size=1"], "ITM needs two samples in each process"),
    (["scenes.n_colors=7"], "scenes.n_colors must be 2 to 6, not 7"),
    (["--recipe=blip3"], "unknown recipe 'blip3': use one of blip2_plora"),
    (["--connector=patch-merge", "vit.image_size=(40, 40)"], "an image has 25"),
    (["recipe=minigpt4", "projector.kind=identity", "qformer.dim=24"], "nothing is trainable"),
    ([f"--qformer={GOLDEN / 'blip2'}"], "give --vit"), (["--val=my.json"], "need --data"),
    (["qformer.n_queries=448"], "448 rows leaves no room for text within max_len 512"),
    (["half_frozen=true"], "half_frozen needs bf16"),
    (["align_lrr=1"], "there is no 'align_lrr'; the nearest is 'align_lr'"),
    (["vit.dimm=16"], "there is no 'vit.dimm'; the nearest is 'vit.dim'"),
    (["vit.dim=wide"], "vit.dim=wide: expected int"), (["bf16=1"], "bf16=1: expected bool")])
def test_settings_that_cannot_work_are_refused_before_anything_is_trained(more, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, *more)
    assert not list(tmp_path.glob("*.pt"))


@pytest.mark.parametrize("flag, missing", [("--resume", "resume"), ("--stage=align", "tokenizer")])
def test_starting_in_the_middle_without_weights_says_what_is_missing(flag, missing, tmp_path):
    with pytest.raises(FileNotFoundError, match=missing):
        run(tmp_path, flag)


def test_one_stage_alone_equals_that_of_a_whole_run(out, finished, monkeypatch):
    (out / "instruct.pt").unlink()
    monkeypatch.setitem(globals(), "TINY", [])  # the settings are stored
    run(out, "--stage=instruct")
    assert same(checkpoint(out)["model"], checkpoint(finished)["model"])


def test_flags_stand_over_the_stored_settings(finished):
    flags = ["--device=cpu", f"--out={finished}", "--stage=instruct", "--seed=1"]
    stored = train.Config(**checkpoint(finished, "align")["run"])
    asked = train.settings(train.parse_arguments([*flags, "--set=decoder.alpha=1"]))
    assert asked == replace(stored, seed=1, decoder=stored.decoder | {"alpha": 1.0})


# ---- Losses and optimizers -------------------------------------------------------------------

@pytest.mark.parametrize("itc, itm, step, expected", [
    (1.0, 1.0, 0, (True, True)), (1.0, 0.0, 0, (True, False)), (0.0, 1.0, 3, (False, True)),
    (0.0, 0.0, 3, (False, False)), (1.0, 1.0, 1, (False, False)), (1.0, 1.0, 2, (False, False))])
def test_itc_and_itm_train_their_heads_in_one_step_of_so_many_unless_without_weight(
        itc, itm, step, expected):
    config = config_of(f"itc_weight={itc}", f"itm_weight={itm}", "contrast_every=3",
                       "vision_samples=4")
    model, collate, task = model_of(config, "vision")
    train.StageLoss(model, "vision", config)(*task.batches("vision", collate), step).backward()
    heads = model.qformer.itc_text, model.qformer.itm_head, model.qformer.lm_head[0]
    assert tuple(head.weight.grad is not None for head in heads) == (*expected, True)


@pytest.mark.parametrize("stage", STAGES)
def test_optimizers_have_no_frozen_parameter_and_one_group_for_each_rate_and_decay(stage):
    config, listed = config_of("weight_decay=0.1"), []
    model, collate, task = model_of(config, stage)
    for optimizer in train.make_optimizers(model, config, stage):
        groups = optimizer.param_groups
        listed += [id(parameter) for group in groups for parameter in group["params"]]
        assert len({(group["peak"], group["weight_decay"]) for group in groups}) == len(groups)
    assert sorted(listed) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    train.StageLoss(model, stage, config)(next(iter(task.batches(stage, collate)))).backward()
    assert {id(p) for p in model.parameters() if p.grad is not None} <= {*listed}


def test_muon_steps_as_torch_s_own_does_bit_by_bit():
    torch.manual_seed(0)
    shapes = [(8, 4), (4, 8), (8, 4), (6, 6), (8, 4)]
    ours, theirs = ([torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
                    for _ in range(2))
    groups = [[dict(params=matrices[:2], lr=0.1, weight_decay=0.1),
               dict(params=matrices[2:], lr=0.3, weight_decay=0.0)] for matrices in (ours, theirs)]
    optimizers = [train.Muon(groups[0], {}),
                  torch.optim.Muon(groups[1], adjust_lr_fn="match_rms_adamw")]
    for step in range(4):
        for i, (own, other) in enumerate(zip(ours, theirs)):  # each is left out once
            own.grad = torch.randn(shapes[i]) if step != i else None
            other.grad = own.grad
        for optimizer in optimizers:
            optimizer.step()
        assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("stage, muon, expected", [
    ("instruct", "true", {
        "decoder.blocks.0.attention.wqkv.weight": 0.1, "decoder.blocks.0.w1.weight": 0.05,
        "decoder.blocks.0.w1.lora_A": 1.0, "projector.0.weight": 1.0,
        "vit.blocks.0.qkv.weight": 0.1, "vit.blocks.0.norm1.weight": 0.03}),
    ("vision", "true", {"qformer.itc_text.weight": 1.0, "qformer.blocks.0.text_ffn.0.weight": 0.5}),
    ("vision", "false", {"qformer.itc_text.weight": 0.3})])
def test_each_parameter_is_trained_at_its_share_of_the_rate(stage, muon, expected):
    config = config_of("recipe=xcomposer2", f"{stage}_lr=1.0", "ffn_lr=0.5", "vision_adamw_lr=0.3",
                       f"muon={muon}")
    model, *_ = model_of(config, stage)
    groups = sum((each.param_groups for each in train.make_optimizers(model, config, stage)), [])
    peak = {id(parameter): group["peak"] for group in groups for parameter in group["params"]}
    for name, share in expected.items():
        assert peak[id(model.get_parameter(name))] == pytest.approx(share), name


def test_the_rate_warms_up_to_its_peak_and_then_falls():
    rates = [train.schedule(step, 100, 0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10] == 1 and rates[55] == pytest.approx(0.51) and 0.02 < rates[99] < 0.021


@pytest.mark.parametrize("stage, where, name, spoil", [
    ("instruct", train.StageLoss, "forward", lambda loss: loss * math.inf),
    ("instruct", train.StageLoss, "forward", lambda loss: loss + (loss - loss.detach()).sqrt()),
    ("vision", Collate, "images", lambda pixels: pixels * math.nan)])  # with ITC and ITM
def test_a_step_whose_loss_or_gradient_is_not_finite_changes_nothing(
        stage, where, name, spoil, tmp_path, monkeypatch):
    config, intact = config_of(f"{stage}_samples=4"), getattr(where, name)
    model, collate, task = model_of(config, stage)
    before = copy.deepcopy(model.state_dict())
    monkeypatch.setattr(where, name, lambda *rest: spoil(intact(*rest)))
    losses, _ = train.train_stage(model, stage, task, collate, config, tmp_path)
    assert len(losses) == 1 and math.isnan(losses[0]) and same(model.state_dict(), before)


def test_ten_such_steps_in_a_row_stop_the_run(tmp_path, monkeypatch):
    config, forward = config_of("align_samples=80"), train.StageLoss.forward
    model, collate, task = model_of(config, "align")
    monkeypatch.setattr(train.StageLoss, "forward", lambda self, batch, step: (
        forward(self, batch, step) * (1.0 if step == 5 else math.nan)))
    with pytest.raises(ValueError, match="align: no loss was finite in ten steps up to step 15"):
        train.train_stage(model, "align", task, collate, config, tmp_path)


def test_six_samples_are_learned_by_heart():
    config = config_of(*(f"{name}=0.0" for name in DROPOUT))
    model, collate, task = model_of(config, "instruct")
    model = MLLM(model.config)
    samples = [task.test["qa"][i] for i in range(6)]  # the same question about two of the pictures
    batch = collate.conversations(samples)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(200):
        optimizer.zero_grad()
        train.StageLoss(model, "instruct", config)(batch).backward()
        optimizer.step()
    answers = train.answer(model, list(train.single_questions(samples, collate)), collate, config)
    assert answers == [sample.turns[0][1] for sample in samples]


def test_augmented_images_are_moved_and_flipped(monkeypatch):
    images = torch.randn(2, 3, 8, 16)
    monkeypatch.setattr(torch, "rand", lambda *size: torch.ones(size))  # an eighth of a side
    for drawn, expected in ((1, images[..., 2:]), (0, images.flip(3)[..., :-2])):
        monkeypatch.setattr(torch, "randint", lambda low, high, size: torch.full(size, drawn))
        moved = train.augment(images)[..., 2:] if drawn == 0 else train.augment(images)[..., :-2]
        torch.testing.assert_close(moved[:, :, :-1], expected[:, :, 1:], rtol=1e-4, atol=1e-5)


# ---- Data and interruptions ------------------------------------------------------------------

def own_data(folder, n=6):
    """LLaVA JSON about wide pictures: a short answer about each, and a long one."""
    records = []
    for i, color in enumerate(("red", "blue") * (n // 2)):
        Image.new("RGB", (64, 32), color).save(folder / f"{i}.png")
        texts = "<image>\nWhat color?", color, "And?", f"It is a large {color} wall, all of it."
        records.append({"image": f"{i}.png", "conversations": [
            {"from": who, "value": text} for who, text in zip(("human", "gpt") * 2, texts)]})
    (folder / "data.json").write_text(json.dumps(records))
    return f"--data={folder / 'data.json'}"


@pytest.mark.parametrize("stop_after, device", [(1, "cpu"), (3, "cpu"), pytest.param(
    3, "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
        stop_after, device, finished, tmp_path, monkeypatch):
    save_file, states = train.save_file, []

    def save_then_stop(*rest):
        states.append(save_file(*rest))
        if len(states) == stop_after:  # in the first stage, or in the third
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "save_file", save_then_stop)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "save_every=2", f"--device={device}")
    run(tmp_path, "--resume", f"--device={device}")
    for stage in STAGES if device == "cpu" else ():  # on a GPU sums are taken in any order
        resumed, whole = checkpoint(tmp_path, stage), checkpoint(finished, stage)
        assert same(resumed["model"], whole["model"]) and resumed["losses"] == whole["losses"]
    assert not (tmp_path / "resume.pt").exists()  # nothing is left to resume


def test_batches_depend_neither_on_the_workers_nor_on_where_a_run_went_on(tmp_path):
    config = config_of(own_data(tmp_path))
    _, collate, task = model_of(config, "align")
    whole = list(task.batches("align", collate))
    task.config = replace(config, workers=1)
    later = list(task.batches("align", collate, first_step=1))
    assert len(later) == 2 and all(map(same, later, whole[1:]))


def test_no_scene_comes_twice_in_a_run_and_own_records_once_in_each_pass(tmp_path):
    task, own = train.Task(config_of()), train.Task(config_of(own_data(tmp_path)))
    orders = [task.order(stage, 2**40) for stage in STAGES]
    assert sorted(sum(orders, [])) == [*range(48)]
    order = own.order("instruct", 5)
    assert sorted(order[:5]) == sorted(order[5:10]) == [*range(5)] and order[:5] != order[5:10]


def test_pictures_to_measure_on_are_not_trained_on(tmp_path):
    task = train.Task(config_of(own_data(tmp_path, 40)))
    measured, trained = ({samples[i].name for i in range(len(samples))}
                         for samples in (task.test["qa"], task.train("instruct")))
    assert (len(measured), len(trained)) == (2, 38) and not measured & trained


# ---- The evaluation --------------------------------------------------------------------------

def test_metrics_hold_every_promised_number_and_the_pictures_exist(finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    assert metrics.keys() >= {"qa_accuracy", "qa_accuracy_blind", "qa_accuracy_floor", "seconds",
                              "qa_accuracy_unseen", "description_exact", "reading_accuracy"}
    assert metrics["seconds_by_stage"].keys() == {*STAGES, "evaluate"}
    assert metrics["loss_at_end"].keys() == {*STAGES}
    assert all(Image.open(finished / name).width > 300 for name in ("curves.png", "samples.png"))


def test_own_wide_pictures_go_through_all_stages_and_their_long_answers_are_in_bleu(tmp_path):
    data = own_data(tmp_path)
    run(tmp_path, data, data.replace("data=", "val=", 1), "vit.image_size=(48, 96)")
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["qa_accuracy_floor"] == 0.5 and metrics["bleu4_floor"] > 0.5 > metrics["bleu4"]


def test_questions_are_drawn_from_the_whole_file_and_a_table_has_a_line_for_each_class(
        tmp_path, capsys):
    for name in ("ant", "bee", "cow"):
        (tmp_path / name).mkdir()
        for i in range(20):
            Image.new("RGB", (8, 8)).save(tmp_path / name / f"{i}.png")
    config = config_of(f"--data={tmp_path}", f"--val={tmp_path}", "eval_samples=30")
    model, collate, task = model_of(config, "instruct")
    train.evaluate(model, task, collate, config, tmp_path)
    kinds = [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:]]
    assert kinds == ["ant", "bee", "cow", "all"]


def test_each_turn_is_a_question_after_the_true_turns_before_it_if_it_fits(capsys):
    a, b = Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8))
    sample = Sample([a, b], [("<image> q1", " a1 "), ("q2", "a2"), ("<image> q3", "a b c d e")])
    _, collate, _ = model_of(config_of(), "align")
    first, second, third = train.single_questions([sample], collate)
    assert first.turns == [("<image> q1", None)]
    assert second.turns == [("<image> q1", " a1 "), ("q2", None)]
    assert (first.images, second.images, third.images) == ([a], [a], [a, b])
    assert (first.references, first.kind, third.kind) == (("a1",), "answer", "text")
    short = replace(collate, max_len=train.ANSWER_TOKENS + 12)  # room for the first question
    assert len(list(train.single_questions([sample], short))) == 1
    assert "not asked: sample, " in capsys.readouterr().out


def test_blind_shows_each_question_the_picture_of_another(monkeypatch):
    config, shown = config_of(), []
    model, collate, _ = model_of(config, "align")
    end = torch.full((3,), collate.tokenizer.end)
    monkeypatch.setattr(model, "generate", lambda _, images, *rest: shown.append(images) or [end])
    questions = [Sample([Image.new("RGB", (48, 48), color)], [("<image>", None)])
                 for color in ("red", "blue", "lime")]
    for blind in (False, True):
        train.answer(model, questions, collate, config, blind)
    assert torch.equal(shown[1], shown[0][[2, 0, 1]])


def test_the_floor_is_the_most_frequent_answer_to_each_kind_of_question(monkeypatch):
    monkeypatch.setattr(train, "answer", lambda model, questions, *rest, **more: questions)
    samples = [Sample([], [("q", answer)], kind) for kind, answer in zip("aaabb", "yxxzz")]
    _, collate, _ = model_of(config_of(), "align")
    assert train.examine(None, samples, collate, None)[1]["floor"] == ["x", "x", "x", "z", "z"]


def test_short_answers_are_right_to_the_letter_and_long_ones_in_bleu():
    truths = ("yes",), ("no", "none"), ("red",), ("a dog on a field", "the dog runs on a field")
    questions = [Sample([], [], kind, references=truth)
                 for kind, truth in zip(("is", "is", "color", "text"), truths)]
    answers = "yes", "none", "blue", "the dog runs on a field"
    assert train.score(questions, answers) == {"is": 1, "color": 0, "all": 2 / 3, "bleu4": 1}


def test_bleu_equals_that_of_other_libraries():
    """`sacrebleu` 2.6.0 (lower case, no smoothing) and `nltk` 3.10.4 give the same figure."""
    cases = {
        "a brown dog runs across the green grass .": (
            "a brown dog is running across the grass.",
            "the brown dog runs over the green grass ."),
        "the man in a red hat rides a horse": (
            "a man in a red hat is riding a horse", "A man rides a horse"),
        "Two children play with a ball on the beach": (
            "two kids play with a ball on the sand",
            "children are playing with a ball on the beach today")}
    assert train.bleu4([*cases], [*cases.values()]) == pytest.approx(0.6307255194006104, abs=1e-12)


@pytest.mark.parametrize("given, expected", [
    ("a b c d e f g h", 1), ("a b c d", math.exp(1 - 8 / 4)), ("a b c", 0), ("", 0),
    ("a b c d a b c d", (4 / 8 * 3 / 7 * 2 / 6 * 1 / 5) ** (1 / 4))])
def test_bleu_equals_what_is_worked_out_by_hand(given, expected):
    assert train.bleu4([given], [("a b c d e f g h",) * 2]) == pytest.approx(expected)
