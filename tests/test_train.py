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
from test_data import record
from train import RECIPES, PRETRAINING, STAGES

GOLDEN = Path(__file__).parent / "golden"
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


def files_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


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
    part = {name: "adapters" if "lora_" in name else name.split(".")[0] for name in before}
    listed = {name for name in before if part[name].replace("ln_vision", "vit") in parts}
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


@pytest.mark.parametrize("more, content, message", [
    ("--stage=align --scenes.n-colors=4", {}, r"\['scenes.n-colors'\]"),
    ("--stage=align --llm-folder=x", {}, r"\['llm-folder'\]"), ("--vit.n-heads=3", {}, "n_heads 3"),
    ("--stage=instruct --decoder.alpha=1", {}, r"\['decoder.alpha'\]"), ("--val=x", {}, "--data"),
    ("--stage=instruct --projector.kind=mlp --align-lr=1", {}, "'projector.kind', 'align-lr'"),
    ("--stage=evaluate --recipe=lora --align-lr=1", {}, r"\['recipe', 'align-lr'\]"),
    ("--stage=align --preset=cpu", {}, "--preset is for a new"), ("--recipe=b", {}, "choose"),
    ("--stage=instruct --connector=patches", {}, "connector 'qformer', not 'patches'"),
    ("--stage=instruct --recipe=lora", {}, "lora_on 'image', not 'all'"),
    ("--stage=align", {"trained": ["connector", "vit"]}, "decoder.* would stay frozen with ran"),
    ("--stage=align", {"model": {}}, "weights do not fit: missing .'vit.class_token'"),
    ("--stage=align", {"model": {"decoder.norm.weight": torch.ones(3)}}, "size mismatch"),
    ("--resume --seed=1 --align-lr=1", {"stage": "align"}, r"\['align-lr', 'seed'\]"),
    ("--resume --stage=align", {"stage": "align"}, "out --stage"), ("--resume", {}, "finished"),
    (f"--llm-folder={GOLDEN / 'llama'}", {}, "--decoder.*: the published weights have"),
    (f"--llm-folder={GOLDEN / 'llama'} --stage=language", None, "'language'. is not needed"),
    (f"--qformer-folder={GOLDEN / 'blip2'}", None, "give --vit-folder"),
    ("--connector=patch-merge --vit.image-size 40 40", {}, "does not divide by 4"),
    ("--scenes.n-colors=9", {}, "n_colors must be 1 to 6"), ("--align-lr=inf", {}, "--align-lr: "),
    ("--align=1", {}, "unrecognized arguments: --align=1"), ("--half-frozen", {}, "needs --bf16"),
    ("--batch-size=0", {}, "--batch-size: .*at least 1"), ("--vit.dim=x", {}, "--vit.dim: .*'x'"),
    ("--qformer.n-layers=1", {}, "must be at least 2"), ("--batch-size=1", {}, "two samples"),
    ("--device=cuda:77", {}, "has no such device"), ("--stage=align", None, "vision.pt")])
def test_a_refused_command_changes_no_file(more, content, message, out, capsys, monkeypatch):
    if content is None:  # nothing is there, and no sizes are given
        shutil.rmtree(out)
        out.mkdir()
        monkeypatch.setitem(globals(), "TINY", [])
    else:
        name = "resume.pt" if "stage" in content else "vision.pt"
        torch.save(checkpoint(out, "vision") | content, out / name)
    before = files_in(out)
    with pytest.raises((ValueError, FileNotFoundError, SystemExit)) as error:
        run(out, *more.split())
    assert re.search(message, f"{error.value} {capsys.readouterr().err}")
    assert files_in(out) == before and len([*out.iterdir()]) == len(before)


@pytest.mark.parametrize("more, n_kept", [("--seed=0", 0), ("--stage=align", 2)])
def test_what_a_run_replaces_is_moved_to_previous(more, n_kept, out, monkeypatch):
    for name in ("resume.pt", "evaluation.json", "notes.txt"):
        (out / name).touch()
    before, kept = files_in(out), {"notes.txt", *(f"{stage}.pt" for stage in STAGES[:n_kept])}
    monkeypatch.setattr(train, "run_stage", Mock(side_effect=KeyboardInterrupt))
    for _ in range(2):  # the second one replaces what the first had not finished
        with pytest.raises(KeyboardInterrupt):
            run(out, more)
        assert files_in(out).keys() == kept
        (out / "resume.pt").touch()
    assert files_in(out / "previous") == {name: before[name] for name in before.keys() - kept}


@pytest.mark.parametrize("flag", ["--data", "--val"])
def test_a_finished_model_is_asked_about_all_of_other_data(flag, out, tmp_path):
    before = files_in(out)
    run(out, "--stage=evaluate", f"{flag}={own_data(tmp_path)}", "--eval-samples=99")
    names = {"evaluation.json", "evaluation_answers.json", "evaluation_samples.png"}
    assert files_in(out).keys() - before.keys() == names and files_in(out).items() >= before.items()
    assert len(json.loads((out / "evaluation_answers.json").read_text(encoding="utf-8"))) == 12


@pytest.mark.parametrize("stage, dtype", [("vision", torch.float32), ("instruct", torch.bfloat16)])
def test_frozen_parts_may_be_kept_in_half_precision_after_stage_0(stage, dtype, out):
    run(out, f"--stage={stage}", "--bf16", "--half-frozen")
    weights, parts = checkpoint(out, stage)["model"], (PRETRAINING | RECIPES["blip2_plora"])[stage]
    assert weights["decoder.blocks.0.w1.weight"].dtype == dtype  # frozen in both
    assert {weights[name].dtype for name in weights if part_of(name) in parts} == {torch.float32}


@pytest.mark.parametrize("vit", [
    [f"--vit-folder={GOLDEN / 'clip'}", "--connector=patches"],
    [f"--vit-folder={GOLDEN / 'blip2'}", f"--qformer-folder={GOLDEN / 'blip2'}"]])
def test_a_run_on_published_parts_keeps_their_weights(vit, tmp_path, monkeypatch):
    llm = shutil.copytree(GOLDEN / "tokenizers" / "llama", tmp_path / "llm")
    sizes = json.loads((GOLDEN / "llama/config.json").read_text(encoding="utf-8"))
    sizes["vocab_size"] = 540
    (llm / "config.json").write_text(json.dumps(sizes), encoding="utf-8")
    wide = dict.fromkeys(["model.embed_tokens.weight", "lm_head.weight"], torch.randn(540, 16))
    weights = read_safetensors(GOLDEN / "llama" / "model.safetensors") | wide
    torch.save(weights, llm / "pytorch_model.bin")
    given = [*vit, f"--llm-folder={llm}", "--recipe=plora"]
    free = [flag for flag in TINY if not re.match(r"--\w+\.(dim|n-)", flag)]  # no size is given
    monkeypatch.setitem(globals(), "TINY", free)
    run(tmp_path, *given)
    assert {path.stem for path in tmp_path.glob("*.pt")} == {"align", "instruct"}
    config, weights = map(checkpoint(tmp_path).get, ("config", "model"))
    assert config["pixel_mean"] == pytest.approx([0.481, 0.458, 0.408], abs=1e-3)  # those of CLIP
    assert config["pixel_std"] == pytest.approx([0.269, 0.261, 0.276], abs=1e-3)
    for part, (_, published) in train.published_parts(config_of(*given)).items():
        assert published and all(torch.equal(weights[f"{part}.{name}"], value.float())
                                 for name, value in published.items()), part
    larger = config_of(*given, "--vit.image-size", "84", "56").vit
    assert larger == config_of(*given).vit | {"image_size": (84, 56)}
    older = {key: value for key, value in sizes.items() if not re.search("rope|key_value", key)}
    (llm / "config.json").write_text(json.dumps(older), encoding="utf-8")
    assert config_of(*given).decoder.items() >= {"rope_theta": 1e4, "n_kv_heads": None}.items()


def test_every_setting_is_a_flag_with_dashes(monkeypatch):
    monkeypatch.setattr(train, "published_parts", lambda config: {})
    expected = {"recipe": "lora", "connector": "patches", "vit.image_size": (64, 80), "bf16": True,
                "projector.activation": "silu"}
    given = ["--device=cpu"]
    for i, (name, old) in enumerate(train.flat(train.CPU).items(), 1):
        flag = name.replace("_", "-")
        if isinstance(old, bool):
            expected.setdefault(name, not old)
            given.append(f"--{'' if expected[name] else 'no-'}{flag}")
        else:
            new = expected[name] = expected.get(name) or type(old)(i)
            given += [f"--{flag}", *map(str, new if isinstance(new, tuple) else [new])]
    assert train.flat(train.settings(train.parse_arguments(given), None)[0]) == expected


def test_a_stage_alone_takes_settings_and_tokenizer_from_before(out, finished, monkeypatch):
    (out / "instruct.pt").unlink()
    monkeypatch.setitem(globals(), "TINY", [])
    monkeypatch.setattr(train.Tokenizer, "train", Mock(side_effect=AssertionError))
    run(out, "--stage=instruct", "--save-every=9")
    alone, whole = checkpoint(out), checkpoint(finished)
    assert alone["run"] == whole["run"] | {"save_every": 9} and same(alone["model"], whole["model"])


@pytest.mark.parametrize("itc, itm, step", [(0.3, 0.5, 0), (0.3, 0, 3), (0, 0.5, 3), (1, 1, 2)])
def test_itc_and_itm_of_a_quarter_count_by_their_weights_in_one_step_of_so_many(itc, itm, step):
    config = config_of(f"--itc-weight={itc}", f"--itm-weight={itm}", "--contrast-every=3",
                       "--batch-size=12")
    model, collate, data = model_of(config, "vision")
    model = MLLM(model.config).eval()  # as a fresh one starts: <s> differs from <dec>
    batch = next(iter(train.make_batches(config, "vision", data["vision"], collate)))
    torch.manual_seed(1)
    loss = train.stage_loss(model, "vision", batch, step, config)
    qformer, images, text = model.connector, model.image_features(batch["images"]), batch["text"]
    expected, queries = qformer.itg_loss(images, batch["to_generate"], batch["labels"])
    if step % 3 == 0:
        similarity = qformer.similarity(queries[:3], text[:3])
        torch.manual_seed(1)
        expected = expected + itc * qformer.itc_loss(similarity)
        expected = expected + itm * qformer.itm_loss(images[:3], text[:3], similarity)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("stage", STAGES)
def test_optimizers_have_no_frozen_parameter_no_decay_and_one_group_for_each_rate(stage):
    config, listed = config_of("--recipe=xcomposer2"), []
    model, *_ = model_of(config, stage)
    parts = PRETRAINING.get(stage) or RECIPES["xcomposer2"][stage]
    for optimizer in train.make_optimizers(model, config, stage):
        groups = optimizer.param_groups
        listed += [id(parameter) for group in groups for parameter in group["params"]]
        assert len({group["peak"] for group in groups}) == len(groups)
        assert not any(group.get("weight_decay") for group in groups)
    trainable = [id(p) for name, p in model.named_parameters() if part_of(name) in parts]
    assert sorted(listed) == sorted(trainable)


def test_muon_steps_as_torch_s_own_does_bit_by_bit():
    torch.manual_seed(0)
    shapes = [(8, 4), (4, 8), (8, 4), (6, 6), (8, 4)]
    ours, theirs = ([torch.nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
    optimizers = [train.Muon([dict(params=ours, lr=0.1)], {}), torch.optim.Muon(
        theirs, lr=0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")]
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


def test_a_step_is_as_long_as_the_schedule_says_however_steep_the_loss(tmp_path, monkeypatch):
    model, places = torch.nn.Linear(2, 1, bias=False), []
    model.device = torch.device("cpu")

    def steep_loss(*_):  # its gradient has a norm of 50
        places.append(model.weight.detach().clone())
        return model.weight @ torch.tensor([30.0, -40.0])

    groups = [{"params": model.parameters(), "peak": 2.0}]
    monkeypatch.setattr(train, "make_optimizers", lambda *_: [torch.optim.SGD(groups)])
    monkeypatch.setattr(train, "make_batches", lambda *_, **__: [None] * 200)
    monkeypatch.setattr(train, "stage_loss", steep_loss)
    collate = Mock(**{"tokenizer.state": {}})
    train.train_stage(model, "align", None, collate, config_of("--align-samples=800"), tmp_path)
    rates = torch.cat(places).diff(dim=0).norm(dim=1) / 2.0
    assert rates[:10].tolist() == pytest.approx([0.1 * (i + 1) for i in range(10)], rel=1e-4)
    assert rates[[10, 105, 198]].tolist() == pytest.approx([1, 0.51, 0.02], abs=1e-3)


def test_a_gradient_that_is_not_finite_stops_the_run_and_changes_nothing(tmp_path, monkeypatch):
    config = config_of("--align-samples=24", "--align-lr=1e-2", "--save-every=2")
    (model, collate, data), intact, before = model_of(config, "align"), train.stage_loss, {}

    def spoil(model, stage, batch, step, config):
        before.update({name: weight.clone() for name, weight in model.state_dict().items()})
        loss = intact(model, stage, batch, step, config)
        return loss * torch.inf if step == 3 else loss

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
        records.append(record("<image>\nWhat color?", color, "And?",
                              f"It is a large {color} wall, all of it.", image=f"{i}.png"))
    (folder / "data.json").write_text(json.dumps(records), encoding="utf-8")
    return folder / "data.json"


def sets_of(out, *more):
    """What a run trains each stage on, by its name, and what it asks in the end, by metric."""
    sets = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "init_model", lambda *_: (Mock(), set()))
        patch.setattr(train, "run_stage", lambda *given: sets.update({given[2]: given[3]}))
        patch.setattr(train, "report", lambda stages, tests, *_: sets.update(tests))
        run(out, *more)
    return sets


@pytest.mark.parametrize("stop_after", [2, 8])
def test_a_resumed_run_equals_a_whole_one_to_the_bit(stop_after, finished, tmp_path, monkeypatch):
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


def test_batches_depend_neither_on_the_workers_nor_on_where_a_run_went_on(tmp_path, monkeypatch):
    dataset = sets_of(tmp_path, f"--data={own_data(tmp_path)}")["align"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    _, collate, _ = model_of(config_of(), "align")
    whole, later = (list(train.make_batches(config_of("--data=x", f"--workers={n}"), "align",
                                            dataset, collate, first_step=n)) for n in (0, 1))
    assert len(later) == 2 and all(map(same, later, whole[1:]))


def test_scenes_to_ask_about_are_none_to_train_on_and_one_metric_is_of_unseen_pairs():
    data, tests = train.scene_sets(config_of())
    assert {scenes.split for scenes in data.values()} == {"train"}  # test_data.py: what these are
    assert [scenes.split for scenes in tests.values()] == ["test", "unseen", "test", "test"]


def test_no_scene_comes_twice_in_a_run_and_own_samples_once_in_each_pass():
    orders = [[*train.make_batches(config_of(), stage, [], Mock()).sampler] for stage in STAGES]
    assert sorted(sum(orders, [])) == [*range(48)]
    order = [*train.make_batches(config_of("--data=x"), "instruct", [*range(5)], Mock()).sampler]
    assert sorted(order[:5]) == sorted(order[5:10]) == [*range(5)] and order[:5] != order[5:10]


def test_questions_are_drawn_from_all_pictures_that_are_held_out_of_training(tmp_path):
    data = own_data(tmp_path, 160)
    sets, few = (sets_of(tmp_path, f"--data={data}", f"--eval-samples={n}") for n in (99, 4))
    asked, *trained = ({str(sample.images) for sample in sets[name]}
                       for name in ("qa_accuracy", *STAGES[1:]))
    assert len(asked) == 8 and all(len(each) == 152 and not each & asked for each in trained)
    assert max(int(sample.images[0].stem) for sample in few["qa_accuracy"]) > 80


@pytest.mark.parametrize("flags, n", [(["--connector=patches", "--max-len=106"], 6), (
    ["--connector=patches", "--max-len=105"], 3), (["--max-len=105"], 6)])
def test_records_too_long_with_the_tokens_of_their_images_are_left_out(flags, n, tmp_path, capsys):
    # With 36 patches and a token for each byte, those about red have 104 tokens, about blue 106.
    sets = sets_of(tmp_path, f"--data={own_data(tmp_path)}", f"--val={tmp_path / 'data.json'}",
                   "--vocab-size=265", "--eval-samples=12", *flags)
    assert [len(sets[name]) for name in (*STAGES, "qa_accuracy")] == [n, n, n, n, 6 + n]
    assert ("106 tokens, over --max-len" in capsys.readouterr().out) == (n == 3)


def test_metrics_hold_every_promised_number_and_answers_and_pictures_exist(finished):
    metrics, answers = (json.loads((finished / f"{name}.json").read_text(encoding="utf-8"))
                        for name in ("metrics", "answers"))
    qa = [f"qa_accuracy{which}" for which in ("", "_blind", "_floor", "_unseen")]
    assert all(0 <= metrics[name] <= 1 for name in (*qa, "description_exact", "reading_accuracy"))
    assert metrics["seconds"] == pytest.approx(sum(metrics["seconds_by_stage"].values()))
    assert len(answers) == 6 + 6 + 3 + 3 and metrics["loss_at_end"].keys() == {*STAGES}
    assert all(Image.open(finished / name).width > 300 for name in ("curves.png", "samples.png"))
