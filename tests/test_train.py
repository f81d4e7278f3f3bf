"""What is trained when, to which loss; that a run can be interrupted; what it leaves behind."""
import json
import re
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from PIL import Image

import train
from data import COLORS, Sample, Tokenizer, read_safetensors, texts_of, tokenizer_from
from model import MLLM, PARTS, part_of, resize_positions
from sample import answer, collate_for
from train import RECIPES, PRETRAINING, STAGES

GOLDEN = Path(__file__).parent / "golden"
# Flags: a model of a few thousand parameters, three steps in each stage, and dropout.
DROPOUT = ["--vit.drop-path-rate", "--qformer.dropout", "--decoder.lora-dropout"]
TINY = ["--vit.dim=16", "--vit.n-layers=1", "--vit.n-heads=2", "--qformer.dim=16",
        "--qformer.n-layers=2", "--qformer.n-heads=2", "--qformer.n-queries=2", "--decoder.dim=24",
        "--decoder.n-layers=2", "--decoder.n-heads=2", "--decoder.n-kv-heads=1", "--decoder.r=2",
        "--no-bf16", "--batch-size=4", "--eval-samples=6",
        *(f"--{stage}-samples=12" for stage in STAGES), *(f"{flag}=0.1" for flag in DROPOUT)]


def words(out, *more):
    return ["train.py", "--device=cpu", f"--out={out}", *TINY, *more]


def run(out, *more):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", words(out, *more))
        patch.setattr(train, "texts_of", lambda samples: texts_of(samples, 200))
        train.main()


def config_of(*more):
    return train.settings(train.parse_arguments(words("nowhere", *more)[1:]), None)[0]


def model_of(config, stage):
    """The model of a stage with no parameter at zero, what batches it, and the sets of scenes."""
    data, tests = train.scene_sets(config)
    tokenizer = Tokenizer.train(texts_of(data["language"], 50), 400)
    torch.manual_seed(0)
    model = MLLM(train.model_config(config, stage, tokenizer))
    for parameter in model.parameters():
        if parameter.ndim:  # all but the temperature
            torch.nn.init.normal_(parameter, std=0.1)
    model.train_only(train.lr_scales(config, stage))
    return model, collate_for(model, tokenizer), data | tests


def checkpoint(out, stage="instruct"):
    return torch.load(out / f"{stage}.pt", weights_only=True)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a whole run; `out` is a copy."""
    out = tmp_path_factory.mktemp("run")
    run(out, "--save-every=2")
    return out


@pytest.fixture
def out(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "out")


@pytest.mark.parametrize("recipe, stage", [("minigpt4", stage) for stage in PRETRAINING] + [
    (recipe, stage) for recipe in RECIPES for stage in ("align", "instruct")])
def test_a_stage_changes_exactly_the_parts_that_its_recipe_lists(recipe, stage, tmp_path):
    config = config_of(f"--recipe={recipe}", f"--{stage}-samples=4")
    model, collate, data = model_of(config, stage)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    train.train_stage(model, stage, data[stage], collate, config, tmp_path)
    parts, after = PRETRAINING.get(stage) or RECIPES[recipe][stage], model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    listed = {name for name in before if part_of(name) in parts}
    # These have gradients of zero: softmax does not see key biases (but for rounding), and nothing
    # reads image tokens after the last keys and values.
    zero = {name for name in listed if name.endswith("k_proj.bias")
            or "lora_" in name and "blocks.1." in name and "wqkv" not in name}
    assert changed - zero == listed - zero


def test_a_recipe_a_connector_and_adapters_may_change_after_stage_0(out):
    for stage in ("align", "instruct"):
        run(out, f"--stage={stage}", "--recipe=lora", "--connector=patch-merge", "--decoder.r=3")
    config, weights = map(checkpoint(out).get, ("config", "model"))
    assert config["lora_on"] == "all" and config["connector"] == "patch-merge"
    assert len(weights["decoder.blocks.0.w1.lora_A"]) == 3
    frozen = {name: weights[name] for name in weights if part_of(name) in ("vit", "decoder")}
    before = checkpoint(out, "vision")["model"]
    assert frozen and same(frozen, {name: before[name] for name in frozen})


def test_text_half_and_last_block_of_the_qformer_go_after_vision(finished):
    for gone in ("text_ffn", "connector.blocks.1"):
        has = [gone in " ".join(checkpoint(finished, stage)["model"]) for stage in STAGES]
        assert has == [True, True, False, False]


def test_pictures_may_grow_in_a_later_stage_and_positions_are_interpolated(out):
    config, before = config_of("--vit.image-size", "64", "64"), checkpoint(out, "align")
    model, _ = train.init_model(config, "instruct", tokenizer_from(before["tokenizer"]), out)
    old = before["model"]["vit.position_embedding"]
    assert torch.equal(model.vit.position_embedding, resize_positions(old, (6, 6), (8, 8)))


@pytest.mark.parametrize("stage, flag, content, message", [
    ("align", "--scenes.n-colors=4", {}, "vision.pt .* other scenes settings: .'n_colors'"),
    ("align", "--qformer.n-heads=1", {}, "vision.pt .* other qformer settings: .'n_heads'"),
    ("instruct", "--connector=patches", {}, "align.pt has a projector for another connector"),
    ("align", "--muon", {"trained": ["connector", "vit"]}, "decoder.* would stay frozen with ran"),
    ("align", "--muon", {"model": {}}, "weights do not fit: missing .'vit.class_token'"),
    ("align", "--muon", {"model": {"decoder.norm.weight": torch.ones(3)}}, "size mismatch")])
def test_a_stage_refuses_settings_and_weights_that_do_not_fit(stage, flag, content, message, out):
    torch.save(checkpoint(out, "vision") | content, out / "vision.pt")
    with pytest.raises(ValueError, match=message):
        run(out, f"--stage={stage}", flag)


def test_frozen_parts_may_be_kept_in_half_precision(out):
    run(out, "--stage=instruct", "--bf16", "--half-frozen")
    weights, trained = checkpoint(out)["model"], RECIPES["blip2_plora"]["instruct"]
    assert weights["vit.patch_embedding.weight"].dtype == torch.bfloat16
    assert {weights[name].dtype for name in weights if part_of(name) in trained} == {torch.float32}


@pytest.mark.parametrize("vit", [
    [f"--vit-folder={GOLDEN / 'clip'}", "--connector=patches"],
    [f"--vit-folder={GOLDEN / 'blip2'}", f"--qformer-folder={GOLDEN / 'blip2'}"]])
def test_a_run_on_published_parts_needs_no_stage_0_and_keeps_frozen_weights(vit, tmp_path):
    llm = shutil.copytree(GOLDEN / "tokenizers" / "llama", tmp_path / "llm")
    sizes = json.loads((GOLDEN / "llama" / "config.json").read_text()) | {"vocab_size": 540}
    (llm / "config.json").write_text(json.dumps(sizes))
    wide = dict.fromkeys(["model.embed_tokens.weight", "lm_head.weight"], torch.randn(540, 16))
    weights = read_safetensors(GOLDEN / "llama" / "model.safetensors") | wide
    torch.save(weights, llm / "pytorch_model.bin")
    given = [*vit, f"--llm-folder={llm}", "--recipe=plora"]
    run(tmp_path, *given)
    assert {path.stem for path in tmp_path.glob("*.pt")} == {"align", "instruct"}
    weights = checkpoint(tmp_path)["model"]
    for part, (_, published) in train.published_parts(config_of(*given)).items():
        assert published and all(torch.equal(weights[f"{part}.{name}"], value.float())
                                 for name, value in published.items()), part
    larger = config_of(*given, "--vit.image-size", "84", "56").vit
    assert larger == config_of(*given).vit | {"image_size": (84, 56)}
    older = {key: value for key, value in sizes.items() if not re.search("rope|key_value", key)}
    (llm / "config.json").write_text(json.dumps(older))
    assert config_of(*given).decoder.items() >= {"rope_theta": 1e4, "n_kv_heads": None}.items()


def test_every_setting_is_a_flag_with_dashes_and_help_says_its_comment(monkeypatch, capsys):
    monkeypatch.setattr(train, "published_parts", lambda config: {})
    monkeypatch.setenv("COLUMNS", "999")
    with pytest.raises(SystemExit):
        train.parse_arguments(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    comments = dict(re.findall(r"\n    (\w+): .*# (.*)", Path(train.__file__).read_text()))
    expected = {"recipe": "lora", "connector": "patches", "vit.image_size": (64, 80), "bf16": True}
    given = ["--device=cpu"]
    for i, (name, old) in enumerate(train.flat(train.CPU).items(), 1):
        flag, comment = name.replace("_", "-"), re.escape(comments[name.split(".")[0]])
        if isinstance(old, bool):
            expected.setdefault(name, not old)
            given.append(f"--{'' if expected[name] else 'no-'}{flag}")
        else:
            new = expected[name] = expected.get(name) or type(old)(i)
            given += [f"--{flag}", *map(str, new if isinstance(new, tuple) else [new])]
        assert re.search(rf"--(no-)?{flag}\b((?! --).)* {comment}( --|$)", text), name
    assert train.flat(train.settings(train.parse_arguments(given), None)[0]) == expected


@pytest.mark.parametrize("more, message", [
    (["--batch-size=0"], "batch_size must be at least 1, got 0"), (["--val=x"], "need --data"),
    ([f"--qformer-folder={GOLDEN / 'blip2'}"], "give --vit-folder"),
    (["--half-frozen"], "--half-frozen needs --bf16"), (["--stage=align"], "vision.pt"),
    (["--qformer.n-layers=1"], "must be at least 2"), (["--batch-size=1"], "ITM needs two samples"),
    (["--scenes.n-colors=9"], "n_colors must be 1 to 6"),
    (["--connector=patch-merge", "--vit.image-size", "40", "40"], "does not divide by 4"),
    (["--qformer.n-heads=3"], "must be a multiple of n_heads 3"), (["--resume"], "resume.pt"),
    (["--stage=language", f"--llm-folder={GOLDEN / 'llama'}"], "'language'. is not needed"),
    (["--align=1"], "unrecognized arguments: --align=1"), (["--recipe=blip3"], "'blip3' .choose"),
    (["--vit.dim=wide"], "--vit.dim: invalid int value: 'wide'")])
def test_what_cannot_work_is_refused_before_anything_is_trained(more, message, tmp_path, capsys):
    with pytest.raises((ValueError, FileNotFoundError, SystemExit)) as error:
        run(tmp_path, *more)
    assert re.search(message, f"{error.value} {capsys.readouterr().err}")
    assert not list(tmp_path.glob("*.pt"))


def test_a_stage_alone_takes_settings_and_tokenizer_from_before(out, finished, monkeypatch):
    (out / "instruct.pt").unlink()
    monkeypatch.setitem(globals(), "TINY", [])
    monkeypatch.setattr(train.Tokenizer, "train", Mock(side_effect=AssertionError))
    run(out, "--stage=instruct", "--save-every=9")
    alone, whole = checkpoint(out), checkpoint(finished)
    assert alone["run"] == whole["run"] | {"save_every": 9} and same(alone["model"], whole["model"])


@pytest.mark.parametrize("itc, itm, step, expected", [
    (1, 1, 0, [1, 1]), (1, 0, 0, [1, 0]), (0, 1, 3, [0, 1]), (0, 0, 3, [0, 0]), (1, 1, 2, [0, 0])])
def test_itc_and_itm_train_in_one_step_of_so_many_unless_without_weight(itc, itm, step, expected):
    config = config_of(f"--itc-weight={itc}", f"--itm-weight={itm}", "--contrast-every=3")
    model, collate, data = model_of(config, "vision")
    batch = next(iter(train.make_batches(config, "vision", data["vision"], collate)))
    train.stage_loss(model, "vision", batch, step, config).backward()
    heads = model.connector.itc_text, model.connector.itm_head, model.connector.lm_head[0]
    assert [head.weight.grad is not None for head in heads] == [*expected, 1]


@pytest.mark.parametrize("stage", STAGES)
def test_optimizers_have_no_frozen_parameter_and_one_group_for_each_rate(stage):
    config, listed = config_of("--recipe=xcomposer2"), []
    model, *_ = model_of(config, stage)
    parts = PRETRAINING.get(stage) or RECIPES["xcomposer2"][stage]
    for optimizer in train.make_optimizers(model, config, stage):
        groups = optimizer.param_groups
        listed += [id(parameter) for group in groups for parameter in group["params"]]
        assert len({group["peak"] for group in groups}) == len(groups)
    trainable = [id(p) for name, p in model.named_parameters() if part_of(name) in parts]
    assert sorted(listed) == sorted(trainable)


def test_muon_steps_as_torch_s_own_does_bit_by_bit():
    torch.manual_seed(0)
    shapes = [(8, 4), (4, 8), (8, 4), (6, 6), (8, 4)]
    ours, theirs = ([torch.nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
    groups = [[dict(params=matrices[:2], lr=0.1), dict(params=matrices[2:], lr=0.3)]
              for matrices in (ours, theirs)]
    optimizers = [train.Muon(groups[0], {}), torch.optim.Muon(
        groups[1], weight_decay=0.0, adjust_lr_fn="match_rms_adamw")]
    for step in range(4):
        for i, (own, other) in enumerate(zip(ours, theirs)):  # each is left out once
            own.grad = other.grad = torch.randn(shapes[i]) if step != i else None
        for optimizer in optimizers:
            optimizer.step()
        assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("stage, flag, expected", [
    ("instruct", "--muon", {
        "decoder.blocks.0.attention.wqkv.weight": 0.1, "decoder.blocks.0.w1.weight": 0.05,
        "decoder.blocks.0.w1.lora_A": 1.0, "projector.0.weight": 1.0,
        "vit.blocks.0.qkv.weight": 0.1, "vit.blocks.0.norm1.weight": 0.03}),
    ("vision", "--muon", {"connector.itc_text.weight": 1, "connector.itm_head.weight": 0.3,
                          "connector.blocks.0.text_ffn.0.weight": 0.5}),
    ("vision", "--no-muon", {"connector.itc_text.weight": 0.3}),
    ("vision", "--data=x", {"connector.itc_text.weight": 0.7, "vit.class_token": 0.21}),
    ("instruct", "--data=x", {"vit.blocks.0.qkv.weight": 0.07, "projector.0.weight": 1.0})])
def test_each_parameter_is_trained_at_its_share_of_the_rate(stage, flag, expected, monkeypatch):
    monkeypatch.setattr(train, "ADAMW_SCALE", 0.3)
    config = config_of("--recipe=xcomposer2", f"--{stage}-lr=1.0", "--ffn-lr-scale=0.5",
                       "--own-lr-scale=0.7", flag)
    model, *_ = model_of(config, stage)
    groups = sum((each.param_groups for each in train.make_optimizers(model, config, stage)), [])
    peak = {id(parameter): group["peak"] for group in groups for parameter in group["params"]}
    assert expected == pytest.approx({n: peak[id(model.get_parameter(n))] for n in expected})


def test_the_rate_warms_up_to_its_peak_and_then_falls():
    rates = [train.schedule(step, 100, 0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10] == 1 and rates[55] == pytest.approx(0.51) and 0.02 < rates[99] < 0.021


def test_a_gradient_that_is_not_finite_stops_the_run_and_changes_nothing(tmp_path, monkeypatch):
    config = config_of("--align-samples=24", "--align-lr=1e-2", "--save-every=2")
    (model, collate, data), intact, before = model_of(config, "align"), train.stage_loss, {}

    def spoil(model, stage, batch, step, config):
        before.update({name: weight.clone() for name, weight in model.state_dict().items()})
        loss = intact(model, stage, batch, step, config)
        nothing = (loss - loss.detach()).sqrt()  # 0, but its gradient is infinite
        return loss + nothing if step == 3 else loss

    monkeypatch.setattr(train, "stage_loss", spoil)
    # The rate is 1e-2 (0.02 + 0.49 (1 + cos(0.4 pi))).
    with pytest.raises(ValueError, match="align, step 3.* 6.6e-03.*--resume .* step 2"):
        train.train_stage(model, "align", data["align"], collate, config, tmp_path)
    assert same(model.state_dict(), before)
    assert len(checkpoint(tmp_path, "resume")["losses"]) == 2


def test_six_pictures_are_learned_by_heart(tmp_path, monkeypatch):
    monkeypatch.setitem(RECIPES["blip2_plora"], "instruct", dict.fromkeys(PARTS, 1.0))
    config = config_of("--vit.dim=32", "--qformer.dim=32", "--decoder.dim=48", "--batch-size=6",
                       "--instruct-samples=480", "--instruct-lr=.01", *(f"{x}=0" for x in DROPOUT))
    model, collate, _ = model_of(config, "instruct")
    model = MLLM(model.config)  # as a fresh one starts
    samples = [Sample([Image.new("RGB", (48, 48), color)], [("<image> What color is it?", color)])
               for color in COLORS]
    train.train_stage(model, "instruct", samples * 90, collate, config, tmp_path)
    assert [text for text, _ in answer(model.eval(), samples, collate)] == [*COLORS]


def test_own_pictures_are_moved_and_flipped_if_asked_and_scenes_never(monkeypatch):
    images = torch.randn(2, 3, 8, 16)
    model = Mock(return_value=(None, 0.0), normalize=lambda images: images)

    def shown(config):
        train.stage_loss(model, "align", dict(images=images, input_ids=0, labels=0), 0, config)
        return model.call_args.args[1]

    assert shown(config_of("--augment")) is shown(config_of("--data=x")) is images
    monkeypatch.setattr(torch, "rand", lambda *size: torch.ones(size))  # an eighth of a side
    monkeypatch.setattr(torch, "randint", lambda *rest: torch.tensor([0, 1]))  # the first flips
    flipped, plain = shown(config_of("--data=x", "--augment"))[:, :, :-1]
    expected = [images[0, :, 1:].flip(2)[..., :-2], images[1, :, 1:, 2:]]
    torch.testing.assert_close([flipped[..., 2:], plain[..., :-2]], expected, rtol=1e-4, atol=1e-5)


def own_data(folder, n=6):
    """A file of LLaVA records about wide pictures: a short answer about each, and a long one."""
    records = []
    for i, color in enumerate(("red", "blue") * (n // 2)):
        Image.new("RGB", (64, 32), color).save(folder / f"{i}.png")
        texts = "<image>\nWhat color?", color, "And?", f"It is a large {color} wall, all of it."
        records.append({"image": f"{i}.png", "conversations": [
            {"from": who, "value": text} for who, text in zip(("human", "gpt") * 2, texts)]})
    (folder / "data.json").write_text(json.dumps(records))
    return folder / "data.json"


def sets_of(out, *more):
    """What a run trains each stage on, by its name, and what it asks in the end, by metric."""
    sets = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "run_stage", lambda stage, data, *_: sets.update({stage: data}))
        patch.setattr(train, "report", lambda stages, tests, *_: sets.update(tests))
        run(out, *more)
    return sets


@pytest.mark.parametrize("stop_after", [2, 8])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
        stop_after, finished, tmp_path, monkeypatch):
    save_file, saved = train.save_file, []

    def save_then_stop(*rest):
        saved.append(save_file(*rest))
        if len(saved) == stop_after:  # at the third step of the first stage, or of the third
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "save_file", save_then_stop)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "--save-every=2")
    monkeypatch.setattr(train.Tokenizer, "train", Mock(side_effect=AssertionError))
    run(tmp_path, "--resume")
    for stage in STAGES:
        resumed, whole = checkpoint(tmp_path, stage), checkpoint(finished, stage)
        assert same(resumed["model"], whole["model"]) and resumed["losses"] == whole["losses"]
    assert not (tmp_path / "resume.pt").exists()  # nothing is left to resume


def test_batches_depend_neither_on_the_workers_nor_on_where_a_run_went_on(tmp_path):
    dataset = sets_of(tmp_path, f"--data={own_data(tmp_path)}")["align"]
    _, collate, _ = model_of(config_of(), "align")
    whole, later = (list(train.make_batches(config_of("--data=x", f"--workers={n}"), "align",
                                            dataset, collate, first_step=n)) for n in (0, 1))
    assert len(later) == 2 and all(map(same, later, whole[1:]))


def test_no_scene_comes_twice_in_a_run_and_own_records_once_in_each_pass():
    orders = [[*train.make_batches(config_of(), stage, [], Mock()).sampler] for stage in STAGES]
    assert sorted(sum(orders, [])) == [*range(48)]
    order = [*train.make_batches(config_of("--data=x"), "instruct", [*range(5)], Mock()).sampler]
    assert sorted(order[:5]) == sorted(order[5:10]) == [*range(5)] and order[:5] != order[5:10]


def test_questions_are_drawn_from_all_pictures_that_are_held_out_of_training(tmp_path):
    sets = sets_of(tmp_path, f"--data={own_data(tmp_path, 160)}", "--eval-samples=4")
    asked, *trained = ({str(sample.images) for sample in conversations.samples} for conversations
                       in (sets["qa_accuracy"].dataset, *map(sets.get, STAGES[1:])))
    assert len(asked) == 8 and all(len(each) == 152 and not each & asked for each in trained)
    assert len(sets["qa_accuracy"]) == 4 and max(sets["qa_accuracy"].indices) >= 8  # of 16


@pytest.mark.parametrize("flags, n", [(["--connector=patches", "--max-len=106"], 6), (
    ["--connector=patches", "--max-len=105"], 3), (["--max-len=105"], 6)])
def test_records_too_long_with_the_tokens_of_their_images_are_left_out(flags, n, tmp_path, capsys):
    # With 36 patches and a token for each byte, those about red have 104 tokens, about blue 106.
    sets = sets_of(tmp_path, f"--data={own_data(tmp_path)}", f"--val={tmp_path / 'data.json'}",
                   "--vocab-size=265", "--eval-samples=12", *flags)
    assert [len(sets[name]) for name in (*STAGES, "qa_accuracy")] == [n, n, n, n, 6 + n]
    assert ("106 tokens, over --max-len" in capsys.readouterr().out) == (n == 3)


def test_metrics_hold_every_promised_number_and_answers_and_pictures_exist(finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    qa = [f"qa_accuracy{which}" for which in ("", "_blind", "_floor", "_unseen")]
    assert all(0 <= metrics[name] <= 1 for name in (*qa, "description_exact", "reading_accuracy"))
    assert metrics["seconds"] == pytest.approx(sum(metrics["seconds_by_stage"].values()))
    assert metrics["seconds_by_stage"].keys() - {"evaluate"} == metrics["loss_at_end"].keys()
    assert len(json.loads((finished / "answers.json").read_text())) == 6 + 6 + 3 + 3
    assert all(Image.open(finished / name).width > 300 for name in ("curves.png", "samples.png"))


def test_own_wide_pictures_go_through_all_stages(tmp_path):
    run(tmp_path, f"--data={own_data(tmp_path)}", f"--val={tmp_path / 'data.json'}", "--augment",
        "--eval-samples=12", "--vit.image-size", "48", "96")
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["qa_accuracy_floor"] == 3 / 12  # four answers, each to three questions
