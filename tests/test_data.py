"""Text survives the tokenizer, scenes tell the truth, mistakes are named, labels sit on answers."""
import json
import random
import re
from collections import Counter
from itertools import product

import numpy as np
import pytest
from PIL import Image

from data import (CAPTION, COLORS, DESCRIBE, MARKS, QUESTION_TYPES, SHAPES, SIZES, Collate, Sample,
                  Scenes, SceneSpec, Thing, Tokenizer, ask_any, caption, clean_caption,
                  contact_sheet, describe, draw, encode_turns, for_stage, hold_out, is_reserved,
                  merge_pair, questions_of, random_things, read_image, read_own_data, texts_of,
                  to_pixels, tokenizer_from)

BYTES = Tokenizer()  # no merges: one id for each byte
FIRST = len(MARKS) + 256  # id of the first merge
TURNS = [("<image> <image> or?", " A "), ("<s>", "###")]
COLLATE = Collate(BYTES, n_image_tokens=2, image_size=(2, 4))
RED, BLUE = Image.new("RGB", (4, 2), "red"), Image.new("RGB", (4, 2), "blue")


def byte_ids(text):
    """The ids of text without merges: marks take 0 to 8, so byte b has id 9 + b."""
    return [9 + byte for byte in text.encode()]


def test_any_text_comes_back_exactly_and_broken_utf8_as_a_sign():
    rng, texts = random.Random(0), ["", " ", "\r\n\t \x00", "a  b\u3000_1__²Ⅳ "]
    for highest in [0x80, 0x700, 0xD800] * 100:  # of one script, of many, and emoji
        texts.append("".join(map(chr, rng.choices([*range(highest), 0x1F600, 0x10FFFF], k=20))))
    for tokenizer in (BYTES, Tokenizer.train(texts[:100], 600)):
        assert [tokenizer.decode(tokenizer.encode(text)) for text in texts] == texts
    assert BYTES.decode([*byte_ids("é")[:1], FIRST, 4]) == "\ufffd###"  # without unknown ids


def test_merges_equal_those_worked_by_hand():
    # Words "ab", " ab", " abc": (a, b) occurs 3 times, then (space, ab) twice, then nothing twice.
    tokenizer, (a, b, c, d, space) = Tokenizer.train(["ab ab abc"], 10_000), byte_ids("abcd ")
    assert tokenizer.merges == {(a, b): (0, FIRST), (space, FIRST): (1, FIRST + 1)}
    assert tokenizer.encode("ab abd ac") == [FIRST, FIRST + 1, d, space, a, c]
    assert Tokenizer([(b, c), (a, b), (a, FIRST)]).encode("abcab") == [FIRST + 2, FIRST + 1]
    assert tokenizer_from(json.loads(json.dumps(tokenizer.state))).merges == tokenizer.merges


def test_merges_equal_those_of_a_slow_reference_that_counts_all_pairs_each_time():
    text, merges = "".join(random.Random(0).choices("aab c", k=3000)), []  # "aaa" overlaps
    words = [BYTES.smallest_parts(word) for word in BYTES.split(text)]
    while True:
        pairs = Counter(pair for ids in words for pair in zip(ids, ids[1:]))
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        if pairs[best] < 2:
            break
        words = [merge_pair(ids, best, FIRST + len(merges)) for ids in words]
        merges.append(best)
    for n in (10, 10_000):  # at most so many
        assert [*Tokenizer.train([text], FIRST + n).merges] == merges[:n] and len(merges) > 100


def test_a_tokenizer_is_trained_on_samples_drawn_from_all_of_them():
    samples = [Sample([], [("<image>", str(i // 100))]) for i in range(1000)]  # sorted by class
    assert {*texts_of(samples, 200)} == {f" {i}" for i in range(10)}


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
        (thing,) = [thing for thing in things if {*what} - {"one"} <= {thing.color, thing.shape}]
        return thing

    match re.findall(r"\w+", question.lower()):
        case "what" | "how", fact, "is", "the", *what:
            return getattr(find(*what), fact.replace("big", "size"))
        case "where", "is", "the", *what:
            return (PLACES | CORNERS)[find(*what).row, find(*what).column]
        case "how", "many", *what, "are", "there":
            return str(count(*(word.removesuffix("s") for word in what)))
        case "is", "there", "a", *what:
            return "yes" if count(*what) else "no"
        case "is", "the", *names, color, shape:
            axis = "column" if "left" in names else "row"
            one, other = find(*names[:2]), find(color, shape)
            return "yes" if getattr(one, axis) < getattr(other, axis) else "no"


@pytest.mark.parametrize("spec, places", [(SPEC, PLACES), (WIDE, PLACES | CORNERS)])
@pytest.mark.parametrize("split, n", [("train", 0), ("test", 0), ("unseen", 1)])
def test_every_answer_is_right_and_only_unseen_scenes_hold_an_unseen_pair(spec, places, split, n):
    answers, scenes = {name: set() for name in QUESTION_TYPES}, Scenes(spec, "", 2000, split)
    for things, rng in map(scenes.things, range(2000)):
        names, cells = {thing.name for thing in things}, {thing.place for thing in things}
        assert len(names) == len(cells) == len(things) and len(names & UNSEEN) == n
        assert is_reserved(things) == (split != "train")
        question_type, question, answer = ask_any(things, spec, rng)
        assert slow_answer(things, question) == answer, (things, question, answer)
        assert not n or question_type not in ("size", "where") or any(map(question.count, UNSEEN))
        answers[question_type].add(answer)
    assert all(len(different) > 1 for different in answers.values())
    assert answers["count"] >= {"0", "1", "2", "3"} and answers["where"] == set(places.values())


@pytest.mark.parametrize("task", TASKS)
def test_no_training_text_names_an_unseen_pair(task):
    for split in ("train", "test"):
        texts = " ".join(texts_of(Scenes(SPEC, task, 400, split))).lower()
        assert not [name for name in (*UNSEEN, "<image>") if name in texts]
        assert all(" ".join(pair) in texts for pair in SPEC.training_pairs)


def test_one_arrangement_in_ten_is_kept_for_tests_on_every_machine():
    things = [Thing(*facts) for facts in product(COLORS, SHAPES, SIZES, range(3), range(3))]
    kept = [is_reserved(two) for two in product(things, things[::20])]
    assert np.mean(kept) == pytest.approx(0.1, abs=0.01)
    # CRC-32 of "At the top is a large red circle." is 49274970; small: 3920387337.
    assert [is_reserved([Thing("red", "circle", size, 0, 1)]) for size in SIZES] == [False, True]


@pytest.mark.parametrize("task", TASKS)
def test_the_same_number_gives_the_same_picture_and_text(task):
    scenes, again = Scenes(SPEC, task, 5), Scenes(SPEC, task, 5)
    others = scenes[4], Scenes(SPEC, task, 5, seed=1)[3], Scenes(SPEC, task, 5, split="test")[3]
    assert scenes[3] == again[3] and scenes[3] not in others


def test_the_picture_shows_each_thing_at_its_place_and_nothing_elsewhere():
    rng = random.Random(0)
    for _ in range(100):
        things = random_things(WIDE, rng, rng.choice(("train", "unseen")))
        pixels = np.asarray(draw(things, 96, rng), dtype=int)
        things = {(thing.row, thing.column): thing for thing in things}
        for row, column in np.ndindex(3, 3):
            pixel = pixels[32 * row + 16, 32 * column + 16]
            if (row, column) in things:
                nearest = min(COLORS, key=lambda color: abs(pixel - COLORS[color]).sum())
                assert nearest == things[row, column].color
            else:  # the ground is light and nearly gray
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
    assert 22 < widths["large"] == pytest.approx(widths["small"] * 0.46 / 0.30, rel=0.15)


def test_captions_are_those_written_by_hand():
    things = [Thing("red", "circle", "large", 0, 1), Thing("blue", "star", "small", 2, 0)]
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
                assert answer == (slow_answer(things, question) or describe(things))


def record(*texts, **fields):
    messages = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return {**fields, "conversations": messages}


def write(folder, *records):
    """A data file in folder with small pictures beside it; red.png is red, and so on."""
    RED.save(folder / "red.png")
    BLUE.save(folder / "blue.png")
    (folder / "my.json").write_text(json.dumps(records), encoding="utf-8")
    return folder / "my.json"


def read(path, *images):
    """The turns of each sample and the names of its pictures."""
    samples = read_own_data(path, *images)
    return [(sample.turns, [image.name for image in sample.images]) for sample in samples]


ODD = 'Häßlich: 猿\u2028\x85 "and" 😀,\nin two lines'  # no record ends within it
GOOD, PLAIN = record("<image> q", "a", image="red.png"), record(" no picture\n", ODD, image=None)
TWO = record("<image> or <image>?", "x", "again", "y", image=["blue.png", "red.png"])
READ = [([("<image> q", "a")], ["red.png"]), ([("no picture", ODD)], []),
        ([("<image> or <image>?", "x"), ("again", "y")], ["blue.png", "red.png"])]
MISTAKES = [
    (7, "'int'"), ({"image": "red.png"}, "'conversations'"), (record(), "pairs"),
    (record("q"), "pairs"), (record("q", None), "'NoneType'"), (record("q", " \n"), "is empty"),
    ({"conversations": [{"from": "robot", "value": "q"}] * 2}, "'robot'"),
    (record("q", "<image>"), "has <image>"), (record("<image> q", "a"), "1 <image> .* but 0"),
    *((record("<image>", "a", image=name), f".*{name}") for name in ("gone.png", "my.json"))]


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_records_with_one_image_several_or_none_are_read(tmp_path, suffix, capsys):
    path = write(tmp_path, GOOD, PLAIN, TWO).rename(tmp_path / f"list{suffix}")
    assert read(path) == READ
    lines = "\r\n\n".join(json.dumps(each, ensure_ascii=False) for each in (GOOD, PLAIN, TWO))
    path.write_text(lines + "\n{", encoding="utf-8-sig")
    assert read(path) == READ
    assert "record 3: JSONDecodeError" in capsys.readouterr().out


def test_roles_may_have_other_names_and_a_system_text_stands_before_the_first_question(tmp_path):
    talk = [("system", "Be brief."), ("user", "<image> q"), ("assistant", "a")]
    messages = [{"from": who, "value": text} for who, text in talk]
    path = write(tmp_path, {"image": 0, "conversations": messages})
    RED.save(tmp_path / "0", "PNG")  # files named by numbers begin with 0
    assert read(path) == [([("Be brief. <image> q", "a")], ["0"])]


def test_pictures_come_from_the_given_folder_or_images_or_beside_the_file(tmp_path):
    path = write(tmp_path, GOOD | {"image": "x/../red.png"})  # the same, however it is written
    for name, given in ((".", ""), ("images", ""), ("other", tmp_path / "other")):
        (tmp_path / name).mkdir(exist_ok=True)
        RED.save(tmp_path / name / "red.png")
        assert read_own_data(path, given)[0].images == [tmp_path / name / "red.png"]


def test_unusable_records_are_left_out_and_printed_and_unusable_files_refused(tmp_path, capsys):
    bad, reasons = zip(*MISTAKES)
    for i, reason in enumerate(reasons):  # each in turn is the first
        assert read(write(tmp_path, GOOD, *bad[i:], *bad[:i], PLAIN)) == READ[:2]
        first, second, *more = capsys.readouterr().out.splitlines()
        assert f"my.json: {len(bad)} of {len(bad) + 2} records" in first and len(more) == 4
        assert re.match(f"record 1: .*{reason}", second)
    for message, content in (("my.json", b"[{}]"), ("my.json", b"[{"), ("my.csv", b"red.png,red\n"),
                             ("my.csv, line 3: not UTF-8", b"image,caption\n\nred.png,\xe9")):
        path = tmp_path / message.split(",")[0]  # nothing to use, no JSON, no header, Latin-1
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read(path)


def test_a_folder_for_each_class_asks_what_is_in_the_picture_and_needs_two(tmp_path, capsys):
    files = ("images/b.JPG", "red wall/deep/er/a.webp", "red wall/notes.txt", "x.png", ".no/c.png",
             "images/.d.png", "empty/.e.png")  # "images" is a class here
    for path in map(tmp_path.joinpath, files):
        path.parent.mkdir(parents=True, exist_ok=True)
        RED.save(path, "PNG") if path.suffix != ".txt" else path.touch()
    assert read(tmp_path) == [([("<image> What is in the picture?", name)], [picture])
                              for name, picture in (("images", "b.JPG"), ("red wall", "a.webp"))]
    printed = capsys.readouterr().out
    assert "2 of 4 records" in printed and "x.png is in no class" in printed
    assert "notes.txt" in printed and "the class 'empty' has no picture" in printed
    (tmp_path / "images" / "b.JPG").unlink()
    with pytest.raises(ValueError, match="'red wall'"):  # the only class
        read(tmp_path)
    write(tmp_path, GOOD)
    with pytest.raises(ValueError, match="--data .*my.json"):  # there is more to read
        read(tmp_path)


def test_each_caption_of_a_table_is_a_short_answer_as_it_was_written(tmp_path):
    table, odd = write(tmp_path).with_name("captions.txt"), ODD.replace('"', '""')
    table.write_text(f'image,caption\nred.png,A red one .\nred.png,"{odd}"\nblue.png,blue\n',
                     encoding="utf-8")
    questions, *rest = zip(*((*turn, *images) for [turn], images in read(table)))
    assert rest == [("A red one .", ODD, "blue"), ("red.png", "red.png", "blue.png")]
    assert questions[0] == questions[1] and {*questions} <= {f"<image> {ask}" for ask in CAPTION}


def test_annotations_are_cleaned_and_answer_an_instruction(tmp_path, capsys):
    (tmp_path / "image").mkdir()
    for name in "ab":
        RED.save(tmp_path / "image" / f"{name}.jpg")
    text = json.dumps({"annotations": [
        {"caption": 7}, {"image_id": "a", "caption": "A wall."},
        {"image_id": "b", "caption": "A red wall. ## It is wide. It"}]})
    (tmp_path / "filter_cap.json").write_text(text, encoding="utf-8")
    [([(question, answer)], images)] = read(tmp_path)
    assert (answer, images) == ("A red wall. It is wide.", ["b.jpg"])
    assert question.removeprefix("<image> ") in DESCRIBE
    wrong, empty = capsys.readouterr().out.splitlines()[1:]  # nothing is left of the second
    assert "record 0: AttributeError" in wrong and "record 1" in empty and "image/a.jpg" in empty


@pytest.mark.parametrize("text, cleaned", [
    ("A dog ran on grass. a dog, ran on grass! It is brown.", "A dog ran on grass. It is brown."),
    ("A dog ### runs <unk>on gr\x00ass~~.  It is\nbrown!!!", "A dog runs on grass. It is brown!"),
    ('A man says "stop, you two." And it is bro', 'A man says "stop, you two."'),
    ("Mr. Fox ran 3.5 km. Mr. Hare slept.", "Mr. Fox ran 3.5 km. Mr. Hare slept."),
    ("A price <5 dollars and > 3, 3×4 m. <b>A cat</b> sat.", "A price <5 dollars and > 3, 3×4 m. "
     "A cat sat."), ("A dog runs.", ""), ("a dog runs on the green grass", ""), ("", ""),
    ("一只狗在草地上跑。一只狗在草地上跑。它是棕色的！狗", "一只狗在草地上跑。它是棕色的！"), ("犬。犬が走る公", ""),
    ("犬が「わん」と鳴く。犬", "犬が「わん」と鳴く。"), ("هل هذا كلب بني كبير؟ نعم", "هل هذا كلب بني كبير؟")])
def test_captions_are_cleaned_as_by_hand(text, cleaned):
    assert clean_caption(text) == clean_caption(cleaned) == cleaned


def test_hold_out_draws_a_twentieth_of_all_pictures_and_parts_no_samples_that_share_one():
    samples = [Sample([i // 2], [("<image>", str(i))]) for i in range(400)]  # two about each
    samples += [Sample([], [(f"q{i % 100}", "a")]) for i in range(200)]  # like 100 pictures
    train, held_out = hold_out(samples)
    assert hold_out(train[2:] + held_out)[1] == held_out  # also when a picture is gone
    seen, asked = ({str(each.images or each.turns) for each in side} for side in (train, held_out))
    assert len(asked) == 15 and len(seen) == 285 and not seen & asked
    assert len({each.images[0] // 40 for each in held_out if each.images}) > 2  # of all places
    chains = [Sample([i, i + 1], []) for i in range(100) if i % 10 < 9]  # 0 to 9, 10 to 19, ...
    train, held_out = ({each.images[0] // 10 for each in side} for side in hold_out(chains))
    assert len(train) + len(held_out) == 10  # no chain is torn
    with pytest.raises(ValueError, match="too few pictures"):
        hold_out(samples[:2])


def test_each_turn_is_a_question_after_the_true_turns_before_it_and_all_its_answers_are_right():
    turns = [("<image> q", "x"), ("why?", "y"), ("<image> and?", "z")]
    more = [("<image> q", "w"), ("why?", "y")]
    asked = questions_of([Sample([*"br"], turns), Sample([*"rb"], turns), Sample([*"br"], more)])
    assert [each.turns for each in asked] == [turns[:n] for n in (1, 2, 3)] * 2 + [more]
    assert ["".join(each.images) for each in asked] == ["b", "b", "br", "r", "r", "rb", "b"]
    assert ["".join(each.references) for each in asked] == ["xw", "y", "z", "x", "y", "z", "y"]


def test_language_leaves_pictures_out_and_vision_samples_without_one(tmp_path):
    samples = read_own_data(write(tmp_path, GOOD, PLAIN))
    vision, language = for_stage(samples, "vision"), for_stage(samples, "language")
    assert vision == samples[:1] and COLLATE.images(vision)[0, :, 0, 0].tolist() == [255, 0, 0]
    assert len(language) == 2 and language[0].images == [] and language[0].turns == [("  q", "a")]
    with pytest.raises(ValueError, match="'vision' needs"):
        for_stage(samples[1:], "vision")


def test_ids_and_labels_equal_those_worked_by_hand_and_no_text_fakes_a_mark():
    # pad 0, image 1, <s> 2, ### 4, Human: 5, Assistant: 6, <Img> 7, </Img> 8, byte b 9 + b
    ids, labels = encode_turns(BYTES, TURNS, n_image_tokens=2)
    picture, answers = [7, 1, 1, 8], ([41, 74, 4], [41, 44, 44, 44, 4])  # " A", " ###" and ends
    question = [2, 4, 5, *picture, *picture, 41, 120, 123, 72, 4, 6]  # " or?"
    second = [5, 41, 69, 124, 71, 4, 6]  # " <s>"; the ### before it is shared
    assert ids == question + answers[0] + second + answers[1]
    assert labels == [-100] * 17 + answers[0] + [-100] * 7 + answers[1]
    assert encode_turns(BYTES, [TURNS[0], ("<s>", None)], 2) == (ids[:-5], labels[:-5])  # to go on


def test_a_batch_pads_on_the_right_and_keeps_the_images_in_order():
    given = [Sample([RED, BLUE], TURNS), Sample([], TURNS[1:]), Sample([BLUE], [("<image>", "c")])]
    batch = COLLATE.conversations(given)
    for sample, *lines in zip(given, batch["input_ids"].tolist(), batch["labels"].tolist()):
        ids, labels = encode_turns(BYTES, sample.turns, 2)
        assert lines == [(ids + [0] * 32)[:32], (labels + [-100] * 32)[:32]]
    assert batch["images"][:, :, 0, 0].tolist() == [[255, 0, 0], [0, 0, 255], [0, 0, 255]]
    assert COLLATE.conversations(given[1:2])["images"].shape == (0, 3, 2, 4)


def test_pairs_hold_the_first_image_and_all_that_is_said_about_it():
    samples = [Sample([RED, BLUE], [("<image> <image>", "ab")]),
               Sample([BLUE], [("<image>q", "a"), ("b", "c")])]
    batch = COLLATE.pairs(samples)
    words = [[*byte_ids(" ab"), 4, 0, 0, 0, 0, 0], [*byte_ids(" q a b c"), 4]]
    assert batch["text"].tolist() == [[2, *ids] for ids in words]  # <s>
    assert batch["to_generate"].tolist() == [[3, *ids] for ids in words]  # <dec>
    asked = [-100, -100, *byte_ids(" a"), -100, -100, *byte_ids(" c"), 4]  # answers alone
    assert batch["labels"].tolist() == [[-100, *byte_ids(" ab"), 4, *[-100] * 5], [-100, *asked]]
    assert batch["images"][:, :, 0, 0].tolist() == [[255, 0, 0], [0, 0, 255]]


def test_pixels_are_bytes_by_channel_row_and_column():
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)  # 2 high, 3 wide
    result = to_pixels(Image.fromarray(pixels), (2, 3)).numpy()
    np.testing.assert_array_equal(result, pixels.transpose(2, 0, 1), strict=True)


GRAY = Image.fromarray(np.uint8([[0, 100, 255]]))
CLEAR = Image.new("L", (3, 1))  # black, ever clearer
CLEAR.putalpha(GRAY.point(lambda shade: 255 - shade))


@pytest.mark.parametrize("image", [
    GRAY, GRAY.convert("P"), GRAY.convert("RGB"), Image.fromarray(np.uint16([[0, 25700, 65535]])),
    Image.fromarray(np.int32([[0, 25700, 65535]])), Image.fromarray(np.float32([[0, 1, 2.55]])),
    CLEAR, CLEAR.convert("RGBA"), CLEAR.convert("RGBA").quantize()], ids=lambda image: image.mode)
def test_pictures_of_any_depth_are_turned_as_the_camera_was_held_and_lie_on_white(tmp_path, image):
    path, exif = tmp_path / ("x.tif" if image.mode in "IF" else "x.png"), Image.Exif()
    exif[0x0112] = 6  # to be shown turned to the right by 90 degrees
    image.save(path, exif=exif)
    assert np.asarray(read_image(path)).tolist() == [[[shade] * 3] for shade in (0, 100, 255)]


def test_a_picture_of_any_shape_is_in_the_contact_sheet():
    sheet = np.asarray(contact_sheet([Image.new("RGB", (3000, 1), "red"), BLUE], ["a", "b"]))
    for color in ((255, 0, 0), (0, 0, 255)):
        assert (sheet == color).all(axis=2).sum() >= 256  # a line of pixels at least
