"""Text survives the tokenizer, scenes tell the truth, mistakes are named, labels sit on answers."""
import json
import random
import re

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import (CAPTION, COLORS, DESCRIBE, GPT2, IGNORED, KINDS, SHAPES, SPECIALS, BadRecord,
                  Collate, Conversations, Sample, Scenes, SceneSpec, Thing, Tokenizer, ask_any,
                  caption, clean_caption, compile_pattern, corpus, describe, draw, draw_curves,
                  encode_turns, random_things, read_image, to_pixels)

BYTES = Tokenizer.train([], 0)  # no merges: one id for each byte
FIRST = len(SPECIALS) + 256  # id of the first merge
TURNS = [("<image> <image> or?", " A "), ("b", "no")]
COLLATE = Collate(BYTES, n_rows=2, image_size=(2, 4), max_len=99)
RED, BLUE = Image.new("RGB", (4, 2), "red"), Image.new("RGB", (4, 2), "blue")


def byte_ids(text):
    """The ids of text without merges: marks take 0 to 8, so byte b has id 9 + b."""
    return [9 + byte for byte in text.encode()]


def test_any_text_comes_back_exactly():
    rng, texts = random.Random(0), ["", " ", "\r\n\t \x00", "a  b\u3000_1__²Ⅳ "]
    for highest in [0x80, 0x700, 0xD800] * 100:  # of one script, of many, and emoji
        texts.append("".join(map(chr, rng.choices([*range(highest), 0x1F600, 0x10FFFF], k=20))))
    for tokenizer in (BYTES, Tokenizer.train(texts[:100], 600)):
        assert [tokenizer.decode(tokenizer.encode(text)) for text in texts] == texts


def test_words_are_letters_numbers_signs_or_spaces_to_unicode():
    words = ["\u00e9\u5b57", "\u0903", "\u0663\u2167\u00b2", "\x1c", "\x85", "\u2003", "a", "_"]
    assert compile_pattern(GPT2).findall("".join(words)) == words


def test_merges_equal_those_worked_by_hand():
    # Words "ab", " ab", " abc": (a, b) occurs 3 times, then (space, ab) twice, then nothing twice.
    tokenizer, (a, c, d, space) = Tokenizer.train(["ab ab abc"], 10_000), byte_ids("acd ")
    assert tokenizer.content["model"]["merges"] == [("a", "b"), ("Ġ", "ab")]
    assert tokenizer.encode("ab abd ac") == [FIRST, FIRST + 1, d, space, a, c]
    assert Tokenizer.train(["ab ab abc"], FIRST + 1).vocab_size == FIRST + 1


def test_decode_shows_marks_by_name_and_broken_utf8_as_a_sign():
    assert BYTES.decode([2, *byte_ids("ok"), 4, *byte_ids("é")[:1]]) == "<s>ok###\ufffd"


def test_a_saved_tokenizer_gives_the_same_ids(tmp_path):
    tokenizer = Tokenizer.train(["the cat and the hat"] * 3, 300)
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.encode("the hat") == tokenizer.encode("the hat") != BYTES.encode("the hat")


# ---- Scenes ----------------------------------------------------------------------------------

SPEC = SceneSpec(image_size=12)  # small pictures are drawn fast
WIDE = SceneSpec(image_size=12, n_places=9)
UNSEEN = {" ".join(pair) for pair in SPEC.unseen_pairs}
TASKS = ("language", "vision", "align", "instruct", "question", "describe")
PLACES = {(0, 1): "top", (1, 0): "left", (1, 1): "center", (1, 2): "right", (2, 1): "bottom"}
CORNERS = {(0, 0): "top left", (0, 2): "top right", (2, 0): "bottom left", (2, 2): "bottom right"}


def slow_answer(things, question):
    """The answer that the question asks for, found by reading the question."""
    def count(*what):
        return sum({*what} <= {thing.color, thing.shape, "shape"} for thing in things)

    def find(*what):  # a question with two answers would be unfair
        (thing,) = [thing for thing in things if {*what} <= {thing.color, thing.shape}]
        return thing

    match re.findall(r"\w+", question.lower()):
        case "what", fact, "is", "the", what, *_:
            return getattr(find(what), fact)
        case "how", "big", "is", "the", *what:
            return find(*what).size
        case "where", "is", "the", *what:
            return (PLACES | CORNERS)[find(*what).row, find(*what).column]
        case "how", "many", *what, "are", "there":
            return str(count(*(word.removesuffix("s") for word in what)))
        case "is", "there", "a", *what:
            return "yes" if count(*what) else "no"
        case "is", "the", *one, "left", "of", "the", color, shape:
            return "yes" if find(*one).column < find(color, shape).column else "no"
        case "is", "the", *one, "above", "the", color, shape:
            return "yes" if find(*one).row < find(color, shape).row else "no"


@pytest.mark.parametrize("spec, places", [(SPEC, PLACES), (WIDE, PLACES | CORNERS)])
@pytest.mark.parametrize("unseen", [False, True])
def test_every_answer_is_right(spec, places, unseen):
    rng, answers = random.Random(0), {kind: set() for kind in KINDS}
    for _ in range(2000):
        things = random_things(spec, rng, unseen)
        kind, question, answer = ask_any(things, spec, rng, unseen)
        assert slow_answer(things, question) == answer, (things, question, answer)
        if unseen and kind in ("size", "where"):  # it is asked about
            assert any(name in question for name in UNSEEN)
        answers[kind].add(answer)
    assert all(len(different) > 1 for different in answers.values())
    assert answers["count"] >= {"0", "1", "2", "3"} and answers["where"] == set(places.values())


@pytest.mark.parametrize("task", TASKS)
def test_no_training_text_names_an_unseen_pair(task):
    for split in ("train", "test"):
        texts = " ".join(corpus(Scenes(SPEC, task, 400, split))).lower()
        assert not [name for name in UNSEEN if name in texts]
        assert all(" ".join(pair) in texts for pair in SPEC.training_pairs)


@pytest.mark.parametrize("split, n", [("train", 0), ("test", 0), ("unseen", 1)])
def test_things_differ_in_pair_and_place_and_only_unseen_scenes_hold_an_unseen_pair(split, n):
    assert {shape for _, shape in SPEC.unseen_pairs} == set(SHAPES)
    for i in range(500):
        things, _ = Scenes(WIDE, "question", 500, split).things(i)
        names, places = {thing.name for thing in things}, {thing.place for thing in things}
        assert len(names) == len(places) == len(things) and len(names & UNSEEN) == n


@pytest.mark.parametrize("task", TASKS)
def test_the_same_number_gives_the_same_picture_and_text(task):
    def content(seed=0, split="train", i=3):
        sample = Scenes(SPEC, task, 5, split, seed)[i]
        return [image.tobytes() for image in sample.images], sample.turns, sample.kind

    assert content() == content() not in (content(seed=1), content(split="test"), content(i=4))


def test_the_picture_shows_each_thing_at_its_place_and_nothing_elsewhere():
    rng = random.Random(0)
    for _ in range(100):
        things = random_things(WIDE, rng, unseen=rng.random() < 0.5)
        pixels = np.asarray(draw(things, 96, rng), dtype=int)
        things = {(thing.row, thing.column): thing for thing in things}
        for row, column in np.ndindex(3, 3):
            pixel = pixels[32 * row + 16, 32 * column + 16]
            if (row, column) in things:
                nearest = min(COLORS, key=lambda color: abs(pixel - COLORS[color]).sum())
                assert nearest == things[row, column].color
            else:  # the ground is light and nearly grey
                assert np.ptp(pixel) <= 30 and pixel.min() >= 110


@pytest.mark.parametrize("shape, covered, middle", [
    ("circle", np.pi / 4, 0.5), ("square", 1, 0.5), ("triangle", 0.5, 0.67), ("star", 0.4, 0.5)])
def test_the_picture_shows_size_and_shape(shape, covered, middle):
    widths = {}
    for size in ("small", "large"):
        picture = draw([Thing("red", shape, size, 1, 1)], 96, random.Random(0))
        rows, columns = np.nonzero(np.ptp(np.asarray(picture, dtype=int), axis=2) > 90)
        height, widths[size] = np.ptp(rows) + 1, np.ptp(columns) + 1
    shown = len(rows) / (height * widths["large"]), (rows.mean() - rows.min()) / height
    assert shown == pytest.approx((covered, middle), abs=0.08)
    assert widths["large"] == pytest.approx(widths["small"] * 0.46 / 0.30, rel=0.15)


def test_descriptions_and_captions_are_those_written_by_hand():
    things = [Thing("red", "circle", "large", 0, 1), Thing("blue", "star", "small", 2, 0)]
    assert describe(things) == ("At the top is a large red circle. "
                                "At the bottom left is a small blue star.")
    reds = ("a red circle", "a large red circle", "a red circle at the top")
    blues = ("a blue star", "a small blue star", "a blue star at the bottom left")
    expected = {f"{one} and {two}.".capitalize() for red in reds for blue in blues
                for one, two in ((red, blue), (blue, red))}
    assert {caption(things, random.Random(i)) for i in range(300)} == expected


def test_each_task_puts_the_picture_where_it_says():
    for i in range(40):
        things, _ = Scenes(SPEC, "vision", 40).things(i)
        samples = {task: Scenes(SPEC, task, 40)[i] for task in TASKS}
        for task, sample in samples.items():
            assert len(sample.images) == str(sample.turns).count("<image>") == (task != "language")
        assert samples["language"].turns[0][0].startswith(describe(things))  # in place of a picture
        assert samples["vision"].turns == [("<image>", describe(things))]
        assert samples["describe"].turns == [(f"<image> {DESCRIBE[0]}", describe(things))]
        for turns in samples["instruct"].turns, samples["question"].turns:
            answers = {question.removeprefix("<image> "): answer for question, answer in turns}
            assert 1 <= len(answers) == len(turns) <= 6  # nothing is asked twice
            for question, answer in answers.items():
                whole = question in DESCRIBE
                assert answer == (describe(things) if whole else slow_answer(things, question))


@pytest.mark.parametrize("sizes", [{"n_colors": 7}, {"n_shapes": 0}, {"max_things": 6},
                                   {"max_things": 2, "n_colors": 2, "n_shapes": 1}])
def test_scenes_that_cannot_be_made_are_refused_by_name(sizes):
    with pytest.raises(ValueError, match=f"scenes.{[*sizes][0]} must be"):
        SceneSpec(**sizes)


# ---- Your own data ---------------------------------------------------------------------------

def record(*texts, **fields):
    messages = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return {**fields, "conversations": messages}


def write(folder, *records):
    """A data file in folder with small pictures beside it; red.png is red, and so on."""
    RED.save(folder / "red.png")
    BLUE.save(folder / "blue.png")
    (folder / "my.json").write_text(json.dumps(records))
    return folder / "my.json"


def turns_of(dataset):
    return [dataset[i].turns for i in range(len(dataset))]


GOOD, PLAIN = record("<image> q", "a", image="red.png"), record("no picture", "fine")
TWO = record("<image> or <image>?", "x", "again", "y", image=["blue.png", "red.png"])
MISTAKES = [
    ("q", "LLaVA's form"), ({"image": "red.png"}, "KeyError.'conversations'"), (record(), "pairs"),
    ({"conversations": [{"from": "robot", "value": "q"}]}, "'robot'"), (record(7), "'int'"),
    ({"conversations": [{"from": "gpt", "value": "q"}]}, "'gpt'"), (record("q"), "pairs"),
    (record("q", " \n"), "answer"), (record("q", "<image>"), "answer"),
    (record("<image> q", "a"), "1 <image> placeholders in the text, but 0"),
    (record("q", "a", image="red.png"), "0 <image> placeholders in the text, but 1"),
    (record("<image> q", "a", image="gone.png"), "no image file .*gone.png")]
TABBED = "red.png#0\tA red one.\r\n\r\nred.png#1\tRed, all over\u2028.\r\nblue.png#0\tblue"
COMMAS = 'image,caption\nred.png,A red one.\nred.png,"Red, all over\u2028."\nblue.png,blue\n'


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_records_with_one_image_several_or_none_are_read(tmp_path, suffix):
    path = write(tmp_path, GOOD, TWO, PLAIN)
    path.with_suffix(".jsonl").write_text("\n\n".join(map(json.dumps, (GOOD, TWO, PLAIN))))
    own = Conversations(path.with_suffix(suffix))
    assert turns_of(own) == [[("<image> q", "a")], [("<image> or <image>?", "x"), ("again", "y")],
                             [("no picture", "fine")]]
    assert [own[i].images for i in range(3)] == [[RED], [BLUE, RED], []]


def test_pictures_come_from_the_given_folder_or_images_or_beside_the_file(tmp_path):
    path = write(tmp_path, GOOD)
    assert Conversations(path)[0].images == [RED]
    for folder, side in (("images", 5), ("other", 6)):
        (tmp_path / folder).mkdir()
        RED.resize((side, side)).save(tmp_path / folder / "red.png")
    assert Conversations(path)[0].images[0].width == 5
    assert Conversations(path, tmp_path / "other")[0].images[0].width == 6


@pytest.mark.parametrize("bad, message", MISTAKES)
def test_a_mistake_in_a_record_is_named_with_its_file_and_record(tmp_path, bad, message):
    with pytest.raises(BadRecord, match=rf"my\.json record 1: .*{message}"):
        Conversations(write(tmp_path, GOOD, bad))


@pytest.mark.parametrize("name, text, message", [
    ("my.json", '[{"id": ', "my.json: not JSON"), ("my.json", "{}", "my.json: expected a list"),
    ("my.json", "[]", "my.json: there is no"), ("my.jsonl", '{}\n\n{"', "my.jsonl line 3: not"),
    ("captions.txt", "x.png\ta word\n", "captions.txt record 0 .id x.png.: no image .*x.png"),
    ("filter_cap.json", "[]", "cap.json: expected 'annotations'"),
    ("captions.txt", "", "captions.txt: there is no"), ("captions.txt", "red.png,", "0 .*answer")])
def test_a_mistake_in_a_file_is_named_with_the_file(tmp_path, name, text, message):
    write(tmp_path).unlink()
    for folder in (tmp_path, tmp_path / "gone"):
        with pytest.raises(FileNotFoundError, match=name):
            Conversations(folder / name)
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        Conversations(tmp_path / name)


def test_a_broken_picture_is_named_when_read_and_skipped_records_are_printed(tmp_path, capsys):
    path = write(tmp_path, broken := record("<image> q", "a", image="cut.png", id="x7"))
    (tmp_path / "cut.png").write_bytes((tmp_path / "red.png").read_bytes()[:40])
    message = r"record \d+ \(id x7\): cannot read image .*cut.png"
    with pytest.raises(BadRecord, match=rf"my\.json {message}"):
        Conversations(path)[0]
    mistakes = [*MISTAKES, (broken, message)]
    path = write(tmp_path, *(bad for bad, _ in mistakes), GOOD)
    assert turns_of(Conversations(path, skip_bad=True)) == [[("<image> q", "a")]]
    lines = capsys.readouterr().out.splitlines()
    assert all(re.search(message, line) for (_, message), line in zip(mistakes, lines, strict=True))


def test_a_folder_for_each_class_asks_what_is_in_the_picture(tmp_path):
    for name, image in (("red wall", RED), ("images", BLUE)):  # no folder beside a file
        (tmp_path / name).mkdir()
        image.save(tmp_path / name / "1.png")
        (tmp_path / name / "notes.txt").touch()
    own = Conversations(tmp_path)
    assert [own[i].images for i in range(len(own))] == [[BLUE], [RED]]
    assert turns_of(own) == [[("<image> What is in the picture?", name)]
                             for name in ("images", "red wall")]


def test_split_takes_each_record_to_one_side(tmp_path):
    train = Conversations(write(tmp_path, *(record(f"q{i}", "a") for i in range(7))))
    assert [question for ((question, _),) in turns_of(train.split(3))] == ["q0", "q3", "q6"]
    assert [question for ((question, _),) in turns_of(train)] == ["q1", "q2", "q4", "q5"]
    with pytest.raises(ValueError, match="one picture"):
        Conversations(write(tmp_path, PLAIN)).split(3)


def test_language_leaves_pictures_out_and_vision_records_without_one(tmp_path):
    both = Conversations(write(tmp_path, GOOD, PLAIN))
    language = both.for_task("language")
    assert [language[i].images for i in (0, 1)] == [[], []]
    assert turns_of(language)[0][0][0].strip() == "q"
    assert turns_of(both.for_task("vision")) == [[("<image> q", "a")]]


@pytest.mark.parametrize("text, cleaned", [
    ("A dog ran on grass. a dog, ran on grass! It is brown.", "A dog ran on grass. It is brown."),
    ("A dog ### runs <unk>on gr\x00ass~~.  It is\nbrown!!!", "A dog runs on grass. It is brown!"),
    ('A man says "stop, you two." And it is bro', 'A man says "stop, you two."'),
    ("Mr. Fox ran 3.5 km. Mr. Hare slept.", "Mr. Fox ran 3.5 km. Mr. Hare slept."),
    ("A price < 5 dollars and a big > 3 cat.", "A price 5 dollars and a big 3 cat."),
    ("A dog runs.", ""), ("a dog runs on the green grass", ""), ("", "")])
def test_captions_are_cleaned_as_by_hand(text, cleaned):
    assert clean_caption(text) == clean_caption(cleaned) == cleaned


def test_annotations_are_cleaned_and_answer_an_instruction(tmp_path):
    texts = ["A red wall. ## It is wide. It", "A wall."] + ["A red wall that is wide."] * 20
    (tmp_path / "image").mkdir()
    for i in range(22):
        RED.save(tmp_path / "image" / f"{i}.jpg")
    annotations = [{"image_id": f"{i}", "caption": text} for i, text in enumerate(texts)]
    (tmp_path / "filter_cap.json").write_text(json.dumps({"annotations": annotations}))
    questions, answers = zip(*(turns[0] for turns in turns_of(Conversations(tmp_path))))
    assert answers == ("A red wall. It is wide.", *texts[2:])
    assert {*questions} == {f"<image> {words}" for words in DESCRIBE}
    (tmp_path / "filter_cap.json").write_text(json.dumps({"annotations": annotations[1:2]}))
    with pytest.raises(ValueError, match="filter_cap.json: there is no usable record"):
        Conversations(tmp_path)


@pytest.mark.parametrize("text", [TABBED, COMMAS])
def test_each_caption_is_a_sample_and_all_of_a_picture_are_right_answers(tmp_path, text):
    write(tmp_path).unlink()
    (tmp_path / "captions.txt").write_bytes(text.encode())
    own, first = Conversations(tmp_path), ("A red one.", "Red, all over\u2028.")
    for task in ("vision", "align", "instruct"):  # human captions are not cleaned
        assert [turns[0][1] for turns in turns_of(own.for_task(task))] == [*first, "blue"]
    assert turns_of(own.for_task("instruct"))[0][0][0].removeprefix("<image> ") in CAPTION
    tested = own.for_task("test")
    assert [tested[i].references for i in (0, 1)] == [first, ("blue",)]
    assert [len(turns) for turns in turns_of(tested)] == [1, 1]
    assert len(own.split(2).for_task("align")) == 2  # no picture stands on both sides


def test_ids_and_labels_equal_those_worked_by_hand():
    # pad 0, image 1, <s> 2, ### 4, Human: 5, Assistant: 6, <Img> 7, </Img> 8, byte b 9 + b
    ids, labels = encode_turns(BYTES, TURNS, n_rows=2, max_len=99)
    picture, answers = [7, 1, 1, 8], ([41, 74, 4], [41, 119, 120, 4])  # " A###", " no###"
    question = [2, 4, 5, *picture, *picture, 41, 120, 123, 72, 4, 6]  # " or?"
    assert ids == question + answers[0] + [5, 41, 107, 4, 6] + answers[1]  # " b"; ### is shared
    assert labels == [-100] * 17 + answers[0] + [-100] * 5 + answers[1]
    prompt = encode_turns(BYTES, [TURNS[0], ("b", None)], 2, 99)
    assert prompt == (ids[:-4], labels[:-4])  # an answer of None: all but " no###"


def test_text_cannot_fake_an_image_or_an_end():
    ids, _ = encode_turns(BYTES, [("<ImageHere><Img>###Assistant: hi", "###")], 2, 99)
    assert [token for token in ids if token < 9] == [2, 4, 5, 4, 6, 4]


def test_what_is_too_long_is_cut_at_the_end_or_raises():
    ids, labels = encode_turns(BYTES, TURNS, 2, 99)  # 29; answers at 17 to 19 and 25 to 28
    for max_len in (18, 20, 26, 29):
        assert encode_turns(BYTES, TURNS, 2, max_len) == (ids[:max_len], labels[:max_len])
    with pytest.raises(ValueError, match="record 3: no answer .*max_len 17"):
        encode_turns(BYTES, TURNS, 2, 17, name="record 3")
    with pytest.raises(ValueError, match="max_len 9 in front of an image"):
        encode_turns(BYTES, TURNS, 2, 9)  # takes the last row of the second image


def test_a_batch_pads_on_the_right_and_keeps_the_images_in_order():
    samples = [Sample([RED, BLUE], TURNS), Sample([], [("hi", "you")]),
               Sample([BLUE], [("<image>", "c")])]
    batch = COLLATE.conversations(samples)
    for sample, *rows in zip(samples, batch["input_ids"].tolist(), batch["labels"].tolist()):
        ids, labels = encode_turns(BYTES, sample.turns, 2, 99)
        padding = 29 - len(ids)
        assert rows == [ids + [0] * padding, labels + [IGNORED] * padding]
    assert batch["images"][:, :, 0, 0].tolist() == [[255, 0, 0], [0, 0, 255], [0, 0, 255]]
    assert COLLATE.conversations(samples[1:2])["images"].shape == (0, 3, 2, 4)


def test_pairs_hold_the_first_image_and_all_that_is_said_about_it():
    samples = [Sample([RED, BLUE], [("<image> <image>", "ab")]),
               Sample([BLUE], [("<image>q", "a"), ("b", "c")])]
    batch = COLLATE.pairs(samples)
    rest = [[*byte_ids(" ab"), 4, 0, 0, 0, 0, 0], [*byte_ids(" q a b c"), 4]]
    assert batch["text"].tolist() == [[2, *row] for row in rest]  # <s>
    assert batch["to_generate"].tolist() == [[3, *row] for row in rest]  # <dec>
    asked = [-100, -100, *byte_ids(" a"), -100, -100, *byte_ids(" c"), 4]  # answers alone
    assert batch["labels"].tolist() == [[-100, *byte_ids(" ab"), 4, *[-100] * 5], [-100, *asked]]
    assert batch["images"][:, :, 0, 0].tolist() == [[255, 0, 0], [0, 0, 255]]
    short = Collate(BYTES, 2, (2, 4), max_len=5).pairs(samples[1:])["text"]
    assert short.tolist() == [[2, *byte_ids(" q "), 4]]  # the end is never cut off


def test_pixels_are_bytes_by_channel_row_and_column():
    image = Image.new("RGB", (3, 2))  # 3 wide, 2 high
    image.putpixel((2, 0), (255, 51, 204))
    pixels = to_pixels(image, (2, 3))
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, 2, 3)
    assert pixels[:, 0, 2].tolist() == [255, 51, 204]
    assert (pixels[:, 1] == 0).all() and (pixels[:, 0, :2] == 0).all()


@pytest.mark.parametrize("mode", ["P", "L", "1", "RGBA"])
def test_pictures_are_read_as_rgb_and_turned_as_the_camera_was_held(tmp_path, mode):
    image = Image.new("RGB", (6, 2), "white")
    image.paste("black", (0, 0, 3, 2))  # black on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned to the right by 90 degrees: black on top
    image.convert(mode).save(tmp_path / "x.png", exif=exif)
    read = read_image(tmp_path / "x.png")
    assert read.size == (2, 6) and read.mode == "RGB"
    assert [read.getpixel((0, y))[0] for y in (0, 5)] == [0, 255]


def test_curves_are_drawn_even_of_losses_that_are_no_numbers(tmp_path):
    draw_curves({"align": [2.0, 1.0, float("nan")] * 99, "instruct": []}, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as sheet:
        assert sheet.size == (720, 240) and len(sheet.getcolors()) > 9


def test_running_the_file_draws_a_sheet_and_prints_two_turns(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data.main()
    with Image.open(tmp_path / "scenes.png") as sheet:
        assert sheet.width > 1000 and len(sheet.getcolors(1 << 24)) > 500
    uses = [line.split()[-1] for line in capsys.readouterr().out.splitlines()[1:]]
    assert uses[0] == "context" and uses[-1] == "trained" and uses.count("image") == 4
