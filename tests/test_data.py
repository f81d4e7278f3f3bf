"""Data: text survives the tokenizer, scenes tell the truth, bad records are named, labels sit on answers."""
import json
import random
import re

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import (COLORS, END, KINDS, NOT_LEARNED, PAD, SHAPES, SPECIALS, BadRecord, Collate, Conversations,
                  DESCRIBE, IMAGE, Sample, Scenes, SceneSpec, Thing, Tokenizer, ask_any, caption, clean_caption, corpus,
                  describe, draw, encode_turns, random_things, read_image, to_pixels)

BYTES = Tokenizer([])                                         # no merges: one id for each byte
FIRST = len(SPECIALS) + 256                                   # id of the first merge


def byte_ids(text):
    """The ids of text without merges: specials take 0 to 8, so byte b has id 9 + b."""
    return [9 + byte for byte in text.encode()]


# ---- Tokenizer ------------------------------------------------------------------------------------

def random_text(rng):
    """Characters of many scripts, emoji, controls, spaces, lone surrogates, and any code point at all."""
    ranges = [(0, 0x7F), (0x80, 0x24F), (0x370, 0x5FF), (0x600, 0x6FF), (0x900, 0xDFF), (0x2000, 0x206F),
              (0x3040, 0x30FF), (0x4E00, 0x9FFF), (0xD800, 0xDFFF), (0x1F300, 0x1FAFF), (0, 0x10FFFF)]
    return "".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(0, 30)))


def test_any_text_comes_back_exactly():
    rng = random.Random(0)
    texts = [random_text(rng) for _ in range(300)] + ["", " ", "\r\n\t \x00", "\ud83d", "a  b\u3000c_1__²Ⅳ५ "]
    for tokenizer in (BYTES, Tokenizer.train(texts[:100], 600)):
        assert [tokenizer.decode(tokenizer.encode(text)) for text in texts] == texts


def test_every_character_falls_in_exactly_one_piece():
    # One text of all code points; categories differ from neighbour to neighbour often enough.
    text = "".join(map(chr, range(0x110000)))
    assert "".join(data.PIECES.findall(text)) == text
    pieces = ["It", "'", "s", " 4", "2", "  ", "cats", "_", "x", ",", "\n ", "ok", "!"]
    assert data.PIECES.findall("It's 42  cats_x,\n ok!") == pieces


def test_merges_equal_those_worked_by_hand():
    # Pieces "ab", " ab", " abc". Pair (a, b) occurs 3 times, then (space, ab) twice, then nothing twice.
    tokenizer = Tokenizer.train(["ab ab abc"], 10_000)
    a, b, c, space = byte_ids("abc ")
    assert tokenizer.merges == [(a, b), (space, FIRST)]
    assert tokenizer.vocab_size == FIRST + 2
    assert tokenizer.encode("ab abd ac") == [FIRST, FIRST + 1, *byte_ids("d"), space, a, c]
    assert Tokenizer.train(["ab ab abc"], FIRST + 1).merges == [(a, b)]


def test_the_earliest_learned_merge_goes_first():
    a, b, c = byte_ids("abc")
    assert Tokenizer([(b, c), (a, b)]).encode("abc") == [a, FIRST]
    assert Tokenizer([(a, b), (b, c)]).encode("abc") == [FIRST, c]
    assert Tokenizer([(a, a)]).encode("aaa") == [FIRST, a]


def replace_pair(ids, pair, new_id):
    for i in range(len(ids)):
        if tuple(ids[i:i + 2]) == pair:
            return ids[:i] + [new_id] + replace_pair(ids[i + 2:], pair, new_id)
    return ids


def test_training_equals_a_slow_reference_that_counts_anew_each_time():
    rng = random.Random(0)
    texts = ["".join(rng.choices("aab bc", k=60)) for _ in range(10)]
    words = [byte_ids(piece) for text in texts for piece in data.PIECES.findall(text)]
    merges = []
    while True:
        pairs = [pair for word in words for pair in zip(word, word[1:])]
        if not pairs or pairs.count(best := max(set(pairs), key=lambda pair: (pairs.count(pair), pair))) < 2:
            break
        words = [replace_pair(word, best, FIRST + len(merges)) for word in words]
        merges.append(best)
    assert len(merges) > 20
    assert Tokenizer.train(texts, 10_000).merges == merges


def test_encode_never_yields_a_special_id():
    fakes = "".join(SPECIALS) + " " + " ".join(SPECIALS) + "a###b"
    tokenizer = Tokenizer.train([fakes] * 5, 400)
    assert tokenizer.vocab_size > FIRST and min(tokenizer.encode(fakes)) >= len(SPECIALS)
    assert tokenizer.decode(tokenizer.encode(fakes)) == fakes


def test_decode_shows_special_tokens_by_name_and_broken_utf8_as_a_mark():
    assert BYTES.decode([2, *byte_ids("ok"), END]) == "<s>ok###"
    assert BYTES.decode(byte_ids("é")[:1]) == "\ufffd"


def test_a_saved_tokenizer_gives_the_same_ids(tmp_path):
    text = "the cat and the hat"
    tokenizer = Tokenizer.train([text] * 3, 300)
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.merges == tokenizer.merges and loaded.vocab_size == tokenizer.vocab_size
    assert loaded.encode(text) == tokenizer.encode(text) != BYTES.encode(text)


@pytest.mark.parametrize("content", [
    b"", b"\xff\xfe", b"[]", b"{}", b'"text"', json.dumps({"specials": SPECIALS}).encode(),
    json.dumps({"specials": ["<pad>"], "merges": []}).encode(),
    json.dumps({"specials": SPECIALS, "merges": [[1, 9999]]}).encode(),
    json.dumps({"specials": SPECIALS, "merges": [[10, 11, 12]]}).encode()])
def test_a_bad_tokenizer_file_raises_and_is_named(tmp_path, content):
    (tmp_path / "words.json").write_bytes(content)
    with pytest.raises(ValueError, match="words.json: not a tokenizer"):
        Tokenizer.load(tmp_path / "words.json")


# ---- Scenes ---------------------------------------------------------------------------------------

SPEC = SceneSpec(image_size=12)                               # small pictures are drawn fast
WIDE = SceneSpec(image_size=12, n_places=9)
PLACES = {(0, 1): "top", (1, 0): "left", (1, 1): "center", (1, 2): "right", (2, 1): "bottom"}
CORNERS = {(0, 0): "top left", (0, 2): "top right", (2, 0): "bottom left", (2, 2): "bottom right"}


def place_of(thing):
    return (PLACES | CORNERS)[thing.row, thing.column]


def pair_of(thing):
    return thing.color, thing.shape


def find(things, color=None, shape=None, place=None):
    """The one thing that fits; a question with two answers would be unfair."""
    found = [thing for thing in things if color in (None, thing.color) and shape in (None, thing.shape)
             and place in (None, place_of(thing))]
    assert len(found) == 1, (things, color, shape, place)
    return found[0]


def slow_answer(things, question):
    """The answer that the question asks for, found by reading the question."""
    words = re.findall(r"\w+", question.lower())
    match words:
        case "what", "color", "is", "the", shape:
            return find(things, shape=shape).color
        case "what", "shape", "is", "the", color, "one":
            return find(things, color=color).shape
        case "how", "big", "is", "the", color, shape:
            return find(things, color, shape).size
        case "where", "is", "the", color, shape:
            return place_of(find(things, color, shape))
        case "what", "is", "at", "the", *place:
            thing = find(things, place=" ".join(place))
            return f"a {thing.size} {thing.color} {thing.shape}"
        case "how", "many", *what, "are", "there":
            fits = [{thing.color, thing.shape, "shape"} for thing in things]
            return str(sum({word.removesuffix("s") for word in what} <= facts for facts in fits))
        case "is", "there", "a", *what:
            return "yes" if any(set(what) <= {thing.color, thing.shape, "shape"} for thing in things) else "no"
        case "is", "the", color, shape, *side, other_color, other_shape:
            one, other = find(things, color, shape), find(things, other_color, other_shape)
            holds = {("left", "of", "the"): one.column < other.column, ("above", "the"): one.row < other.row}
            return "yes" if holds[tuple(side)] else "no"
    raise AssertionError(f"no such question: {question}")


@pytest.mark.parametrize("spec, places", [(SPEC, PLACES), (WIDE, PLACES | CORNERS)])
@pytest.mark.parametrize("unseen", [False, True])
def test_every_answer_is_right(spec, places, unseen):
    rng, answers = random.Random(0), {kind: set() for kind in KINDS}
    for _ in range(3000):
        things = random_things(spec, rng, unseen)
        kind, question, answer = ask_any(things, spec, rng, unseen)
        assert slow_answer(things, question) == answer, (things, question, answer)
        answers[kind].add(answer)
    assert answers["exists"] == answers["relation"] == {"yes", "no"}
    assert answers["count"] >= {"0", "1", "2", "3"} and answers["where"] == set(places.values())
    assert all(len(different) > 1 for different in answers.values())


def test_a_question_about_an_unseen_scene_is_about_the_held_out_pair():
    rng = random.Random(0)
    for _ in range(500):
        things = random_things(SPEC, rng, unseen=True)
        (held_out,) = [thing for thing in things if pair_of(thing) in SPEC.held_out]
        kind, question, answer = ask_any(things, SPEC, rng, unseen=True)
        if kind in ("size", "where"):
            assert held_out.name in question
        if kind in ("color", "shape", "what"):
            assert {"color": held_out.color, "shape": held_out.shape, "what": held_out.name}[kind] in answer


@pytest.mark.parametrize("task", Scenes.TASKS)
def test_no_training_text_names_a_held_out_pair(task):
    held_out = [" ".join(pair) for pair in SPEC.held_out]
    for split in ("train", "test"):
        scenes = Scenes(SPEC, task, 400, split)
        texts = " ".join(corpus(scenes)).lower()
        assert not [name for name in held_out if name in texts]
        assert all(" ".join(pair) in texts for pair in SPEC.seen)


def test_training_things_hold_no_held_out_pair_and_unseen_things_exactly_one():
    assert len(SPEC.held_out) == len(SHAPES) and {shape for _, shape in SPEC.held_out} == set(SHAPES)
    for split, expected in (("train", 0), ("test", 0), ("unseen", 1)):
        for i in range(500):
            things, _ = Scenes(SPEC, "question", 500, split).things(i)
            assert sum(pair_of(thing) in SPEC.held_out for thing in things) == expected


def test_things_of_a_scene_differ_in_pair_and_in_place():
    rng = random.Random(0)
    for _ in range(500):
        things = random_things(WIDE, rng, unseen=rng.random() < 0.5)
        assert len(set(map(pair_of, things))) == len({thing.place for thing in things}) == len(things)
        assert 1 <= len(things) <= 3


@pytest.mark.parametrize("task", Scenes.TASKS)
def test_the_same_index_gives_the_same_picture_and_text(task):
    def content(seed=0, split="train", i=3):
        sample = Scenes(SPEC, task, 5, split, seed)[i]
        return [image.tobytes() for image in sample.images], sample.turns, sample.kind

    assert content() == content()
    assert all(content() != other for other in (content(seed=1), content(split="test"), content(i=4)))


def test_the_picture_shows_each_thing_at_its_place_and_nothing_elsewhere():
    rng = random.Random(0)
    for _ in range(100):
        things = random_things(WIDE, rng, unseen=rng.random() < 0.5)
        pixels = np.asarray(draw(things, 96, rng), dtype=int)
        assert pixels.shape == (96, 96, 3)
        things = {(thing.row, thing.column): thing for thing in things}
        for row, column in [(row, column) for row in range(3) for column in range(3)]:
            pixel = pixels[32 * row + 16, 32 * column + 16]
            nearest = min(COLORS, key=lambda color: abs(pixel - COLORS[color]).sum())
            if (row, column) in things:
                assert nearest == things[row, column].color
            else:                                             # the ground is light and nearly grey
                assert np.ptp(pixel) <= 30 and pixel.min() >= 110


@pytest.mark.parametrize("shape", SHAPES)
def test_the_picture_shows_size_and_shape(shape):
    def share(size):
        """Share of its bounding box that a thing covers, and the width of that box over that of a cell."""
        pixels = np.asarray(draw([Thing("red", shape, size, 1, 1)], 96, random.Random(0)), dtype=int)
        rows, columns = np.nonzero(np.ptp(pixels, axis=2) > 90)
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        return len(rows) / (height * width), width / 32

    covered = {"circle": np.pi / 4, "square": 1.0, "triangle": 0.5, "star": 0.4}[shape]
    assert share("large")[0] == pytest.approx(covered, abs=0.08)
    assert share("large")[1] == pytest.approx(share("small")[1] * 0.43 / 0.25, rel=0.15)


def test_description_equals_the_one_written_by_hand_and_captions_name_every_thing():
    things = [Thing("red", "circle", "large", 0, 1), Thing("blue", "star", "small", 1, 1)]
    assert describe(things) == "At the top is a large red circle. At the center is a small blue star."
    assert Thing("red", "star", "small", 2, 0).place == "bottom left"
    captions = {caption(things, random.Random(i)).lower() for i in range(50)}
    assert all("red circle" in text and "blue star" in text for text in captions)
    assert len(captions) > 10
    assert not [text for text in captions if "small red" in text or "blue star at the top" in text]


def test_each_task_puts_the_picture_where_it_says():
    for i in range(40):
        things, _ = Scenes(SPEC, "see", 40).things(i)
        samples = {task: Scenes(SPEC, task, 40)[i] for task in Scenes.TASKS}
        for task, sample in samples.items():
            placeholders = sum(question.count("<image>") for question, _ in sample.turns)
            assert len(sample.images) == placeholders == (task != "read")
        assert samples["read"].turns[0][0].startswith(describe(things))  # the words stand for the picture
        assert samples["see"].turns == [("<image>", describe(things))]
        assert samples["describe"].turns[0][1] == describe(things)
        for question, answer in samples["instruct"].turns + samples["question"].turns:
            question = question.removeprefix("<image> ")
            whole = question in data.DESCRIBE
            assert answer == (describe(things) if whole else slow_answer(things, question))


def test_scenes_end_where_their_length_says():
    scenes = Scenes(SPEC, "question", 3)
    assert len(list(scenes)) == len(scenes) == 3
    for i in (-1, 3):
        with pytest.raises(IndexError, match=f"scene {i} of 3"):
            scenes[i]


def test_no_conversation_asks_the_same_question_twice():
    scenes = Scenes(SPEC, "instruct", 200)
    for i in range(200):
        questions = [question.removeprefix("<image> ") for question, _ in scenes[i].turns]
        assert 1 <= len(questions) <= 6 and len(set(questions)) == len(questions)


# ---- Conversations --------------------------------------------------------------------------------

def record(*texts, **fields):
    speakers = ("human", "gpt") * len(texts)
    messages = [{"from": speaker, "value": text} for speaker, text in zip(speakers, texts)]
    return {**fields, "conversations": messages}


def write(folder, *records, images=("red.png", "blue.png")):
    """A data file in folder with small pictures beside it; red.png is red, and so on."""
    for name in images:
        (folder / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 2), (folder / name).stem).save(folder / name)
    (folder / "my.json").write_text(json.dumps(records))
    return folder / "my.json"


def color_of(image):
    return {(255, 0, 0): "red", (0, 0, 255): "blue", (0, 128, 0): "green"}[image.getpixel((0, 0))]


def test_records_with_one_image_several_or_none_are_read(tmp_path):
    two = record("<image> or <image>?", "x", "again", "y", image=["blue.png", "red.png"])
    samples = Conversations(write(tmp_path, GOOD, two, record("no picture", "fine")))
    assert [samples[i].turns for i in range(len(samples))] == [
        [("<image> q", "a")], [("<image> or <image>?", "x"), ("again", "y")], [("no picture", "fine")]]
    assert [list(map(color_of, samples[i].images)) for i in range(3)] == [["red"], ["blue", "red"], []]


def test_pictures_come_from_images_beside_the_file_or_from_the_given_folder(tmp_path):
    path = write(tmp_path, record("<image> q", "a", image="p.png"), images=())
    for folder, color in (("images", "red"), ("other", "blue"), (".", "green")):
        (tmp_path / folder).mkdir(exist_ok=True)
        Image.new("RGB", (2, 2), color).save(tmp_path / folder / "p.png")
    assert color_of(Conversations(path)[0].images[0]) == "red"
    assert color_of(Conversations(path, tmp_path / "other")[0].images[0]) == "blue"
    (tmp_path / "images").rename(tmp_path / "moved")
    assert color_of(Conversations(path)[0].images[0]) == "green"


GOOD = record("<image> q", "a", image="red.png")
BAD = {
    "no image file": record("<image> q", "a", image="gone.png"),
    "'image' must be": record("<image> q", "a", image=[7]),
    "a clip a list": record("<image> q", "a", image=[["red.png", 7]]),
    "must be a file name": record("<image> q", "a", image=[[]]),
    "unknown speaker 'robot'": {"conversations": [{"from": "robot", "value": "q"}]},
    "expected 'gpt'": {"conversations": [{"from": "human", "value": "q"}, {"from": "human", "value": "a"}]},
    "expected 'human'": {"conversations": [{"from": "gpt", "value": "q"}, {"from": "human", "value": "a"}]},
    "3 messages": record("q", "a", "and?"),
    "0 messages": record(),
    "answer is empty": record("q", "a", "and?", " \n"),
    "<image> may stand": record("q", "<image>"),
    "1 <image> placeholders in the text, but 0": record("<image> q", "a"),
    "0 <image> placeholders in the text, but 1": record("q", "a", image="red.png"),
    "text 'value'": {"conversations": [{"from": "human", "value": 7}]},
    "a list 'conversations'": {"conversations": "q"},
    "expected an object": "q",
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_record_raises_with_the_file_the_record_and_the_reason(tmp_path, message):
    with pytest.raises(BadRecord, match=rf"my\.json record 1\b.*{re.escape(message)}"):
        Conversations(write(tmp_path, GOOD, BAD[message]))


def test_skipping_bad_records_keeps_the_good_ones_and_lists_the_others(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n no more")
    broken = record("<image> q", "a", image="broken.png", id="x7")
    samples = Conversations(write(tmp_path, GOOD, *BAD.values(), broken, GOOD), skip_bad=True)
    assert len(samples) == 2 and len(samples.skipped) == len(BAD) + 1
    for number, (message, reason) in enumerate(zip(BAD, samples.skipped), start=1):
        assert f"record {number}" in reason and message in reason
    assert f"record {len(BAD) + 1} (id x7)" in samples.skipped[-1] and "broken.png" in samples.skipped[-1]
    assert [samples[i].turns for i in range(2)] == [[("<image> q", "a")]] * 2


def test_a_broken_picture_raises_with_file_record_and_picture_when_it_is_read(tmp_path):
    whole = write(tmp_path, record("<image> q", "a", image="cut.png"), images=("red.png",))
    content = (tmp_path / "red.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[:len(content) // 2])
    with pytest.raises(BadRecord, match=r"my\.json record 0: cannot read image .*cut\.png"):
        Conversations(whole)[0]
    with pytest.raises(BadRecord, match="cannot read image .*gone.png"):
        read_image(tmp_path / "gone.png")


@pytest.mark.parametrize("content", ["", "{", "[" * 100_000, '{"a": 1}', "[]", "7"],
                         ids=["empty", "cut", "deep", "object", "no record", "number"])
def test_a_file_that_is_no_list_of_records_raises_and_is_named(tmp_path, content):
    (tmp_path / "my.json").write_text(content)
    with pytest.raises(ValueError, match="my.json: (not JSON|expected a list)"):
        Conversations(tmp_path / "my.json")


def test_a_missing_file_and_a_file_of_bad_records_only_raise_and_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="my.json"):
        Conversations(tmp_path / "my.json")
    with pytest.raises(ValueError, match=r"my\.json: all 1 records were skipped.*3 messages"):
        Conversations(write(tmp_path, BAD["3 messages"]), skip_bad=True)


def test_split_takes_each_record_to_one_side(tmp_path):
    train = Conversations(write(tmp_path, *(record(f"q{i}", "a") for i in range(7))))
    held_out = train.split(3)
    names = [[samples[i].turns[0][0] for i in range(len(samples))] for samples in (held_out, train)]
    assert names == [["q0", "q3", "q6"], ["q1", "q2", "q4", "q5"]]
    alone = Conversations(write(tmp_path, record("q", "a")))
    with pytest.raises(ValueError, match="one record"):
        alone.split(3)


def test_reading_leaves_pictures_out_and_seeing_leaves_records_without_one_out(tmp_path):
    both = Conversations(write(tmp_path, GOOD, record("no picture", "fine")))
    read, see = both.for_task("read"), both.for_task("see")
    assert [read[i].images for i in range(len(read))] == [[], []]
    assert "<image>" not in read[0].turns[0][0] and read[0].turns[0][0].strip() == "q"
    assert [see[i].turns for i in range(len(see))] == [[("<image> q", "a")]]
    assert len(both) == 2 and len(both[0].images) == 1        # the original is as it was


def test_a_clip_is_one_image_of_several_frames(tmp_path):
    clip = record("<image> then <image>", "x", image=["blue.png", ["red.png", "blue.png", "red.png"]])
    sample = Conversations(write(tmp_path, clip))[0]
    assert list(map(color_of, sample.images)) == ["blue", "red", "blue", "red"] and sample.frames == (1, 3)
    batch = COLLATE.conversations([sample])                   # two rows for each frame
    ids, N = batch["input_ids"][0], len(batch["images"])
    assert N == 4 and (ids == IMAGE).sum() == N * 2
    runs = re.findall("i+", "".join("i" if token == IMAGE else "." for token in ids.tolist()))
    assert [len(run) for run in runs] == [2, 6]


# ---- Captions -------------------------------------------------------------------------------------

@pytest.mark.parametrize("caption, cleaned", [
    ("A dog runs on grass. It is brown.", "A dog runs on grass. It is brown."),
    ("A dog runs on grass. a dog, runs on grass! It is brown.", "A dog runs on grass. It is brown."),
    ("A dog ### runs <unk>on\ufffd gr\x00ass~~.  It is\nbrown!!!", "A dog runs on grass. It is brown!"),
    ("A dog runs on grass. It is bro", "A dog runs on grass."),
    ('A man says "stop, you two." And then...', 'A man says "stop, you two."'),
    ("Mr. Fox ran 3.5 km. Mr. Hare slept.", "Mr. Fox ran 3.5 km. Mr. Hare slept."),
    ("The dog—brown and small—runs.<br>It is <unk>here.", "The dog—brown and small—runs. It is here."),
    ("A price < 5 dollars and a big > 3 cat.", "A price 5 dollars and a big 3 cat."),
    ("A cat. A cat. A cat.", ""), ("कुत्ता हरी घास पर है. कु", "कुत्ता हरी घास पर है."), ("A dog runs on the grass…", ""),
    ("A dog runs.", ""), ("a dog runs on the green grass", ""), ("# @ ~", ""), ("", ""),
    ("一只狗在草地上。一只狗在草地上。 It is brown and it runs fast.", "一只狗在草地上。 It is brown and it runs fast."),
])
def test_captions_are_cleaned_as_by_hand(caption, cleaned):
    assert clean_caption(caption, min_words=4) == cleaned
    assert not cleaned or clean_caption(cleaned, min_words=4) == cleaned          # clean already


def write_captions(folder, *captions):
    """MiniGPT-4's layout."""
    (folder / "image").mkdir()
    for i in range(len(captions)):
        Image.new("RGB", (4, 2), "red").save(folder / "image" / f"{i}.jpg")
    annotations = [{"image_id": str(i), "caption": caption} for i, caption in enumerate(captions)]
    (folder / "filter_cap.json").write_text(json.dumps({"annotations": annotations}))
    return folder


def test_captions_answer_an_instruction_and_are_cleaned_in_the_second_stage_only(tmp_path):
    texts = ["A red wall that is wide.", "A red wall. ## It is wide. It", "A wall."]
    own = Conversations(write_captions(tmp_path, *texts), min_words=5)
    align, instruct = own.for_task("align"), own.for_task("instruct")
    assert [align[i].turns for i in range(len(align))] == [[("<image>", text)] for text in texts]
    assert [instruct[i].turns[0][1] for i in range(len(instruct))] == [texts[0], "A red wall. It is wide."]
    assert instruct.cleaned == {"kept": 1, "mended": 1, "dropped": 1} and not align.cleaned
    assert all(instruct[i].turns[0][0].removeprefix("<image> ") in DESCRIBE for i in range(len(instruct)))
    assert instruct[0].images[0].size == (4, 2)
    assert own.for_task("see")[2].turns == align[2].turns and own.for_task("read")[0].images == []
    with pytest.raises(ValueError, match="at least 50 words"):
        Conversations(tmp_path, min_words=50).for_task("instruct")


def test_instructions_vary_from_record_to_record_and_stay_from_time_to_time(tmp_path):
    own = Conversations(write_captions(tmp_path, *["A red wall that is wide."] * 20))
    asked = [[sample.turns[0][0] for sample in map(own.for_task("instruct").__getitem__, range(20))] for _ in "ab"]
    assert asked[0] == asked[1] and len(set(asked[0])) == len(DESCRIBE)


def test_json_lines_read_as_the_same_list_and_a_broken_line_is_named(tmp_path):
    path = write(tmp_path, GOOD, record("no picture", "fine"))
    lines = "\n\n".join(json.dumps(entry) for entry in json.loads(path.read_text())) + "\n"
    (tmp_path / "my.jsonl").write_text(lines)
    assert [sample.turns for sample in Conversations(tmp_path / "my.jsonl")] == [
        sample.turns for sample in Conversations(path)]
    (tmp_path / "my.jsonl").write_text(lines + '{"id": ')
    with pytest.raises(ValueError, match="my.jsonl line 4: not JSON"):
        Conversations(tmp_path / "my.jsonl")


TAB = "a.png#0\tA red one.\na.png#1\tRed, all over .\nb.png#0\ta blue one\nc.png#0\tgreen\n"
COMMA = 'image,caption\na.png,A red one.\na.png,"Red, all over ."\nb.png,a blue one\nc.png,green\n'


@pytest.mark.parametrize("name, text, images", [("captions.txt", TAB, "Images"), ("captions.tsv", TAB, "images"),
                                                ("captions.txt", COMMA, ".")])
def test_a_folder_of_captions_gives_each_as_a_sample_and_all_as_right_answers(tmp_path, name, text, images):
    (tmp_path / name).write_text(text)
    (tmp_path / images).mkdir(exist_ok=True)
    for file, color in (("a.png", "red"), ("b.png", "blue"), ("c.png", "green")):
        Image.new("RGB", (4, 2), color).save(tmp_path / images / file)
    pairs = [("red", "A red one."), ("red", "Red, all over ."), ("blue", "a blue one"), ("green", "green")]
    records = Conversations(tmp_path)
    for task in ("see", "align", "instruct"):                 # human captions are not cleaned
        samples = [*records.for_task(task)]
        assert [(color_of(sample.images[0]), sample.turns[0][1]) for sample in samples] == pairs
        assert all((sample.turns[0][0] == "<image>") == (task != "instruct") for sample in samples)
    assert [sample.images for sample in records.for_task("read")] == [[]] * 4
    asked = [*records.for_task("test")]
    assert [sample.references for sample in asked] == [("A red one.", "Red, all over ."), ("a blue one",), ("green",)]
    assert all(len(sample.turns) == 1 and sample.turns[0][0].startswith("<image> ") for sample in asked)
    held_out = records.split(2)
    assert [len(part.for_task("align")) for part in (held_out, records)] == [3, 1]     # no picture on both sides


def test_a_line_of_captions_ends_where_its_line_ends_and_commas_belong_to_it(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 2)).save(tmp_path / name)
    for text in ("a.png\tA dog, brown\u2028runs\r\n\nb.png\tx\n", "a.png,A dog, brown\u2028runs\r\n\nb.png,x\n"):
        (tmp_path / "captions.txt").write_bytes(text.encode())
        turns = [sample.turns[0][1] for sample in Conversations(tmp_path).for_task("align")]
        assert turns == ["A dog, brown\u2028runs", "x"]
    (tmp_path / "captions.txt").write_text('a.png,"never closed\nb.png,x\n')
    with pytest.raises(ValueError, match="captions.txt"):
        Conversations(tmp_path)


@pytest.mark.parametrize("text, message", [("", "at least one"), ("x.png\ta word\n", "no image file .*x.png"),
                                           ("a.png\t \n", "not empty"), ("a.png\n", "not empty"),
                                           ("a.png\t<image> of red\n", "no <image>")])
def test_a_bad_line_of_captions_raises_and_is_named(tmp_path, text, message):
    Image.new("RGB", (4, 2)).save(tmp_path / "a.png")
    (tmp_path / "captions.txt").write_text(text)
    with pytest.raises(ValueError, match=f"(?s)captions.txt.*{message}"):
        Conversations(tmp_path)


@pytest.mark.parametrize("annotation", [{"image_id": "9", "caption": "x"}, {"caption": "x"}, {"image_id": "0"}, "x",
                                        {"image_id": "0", "caption": " "}, {"image_id": "0", "caption": "<image>"}])
def test_a_bad_annotation_raises_with_the_file_and_the_record(tmp_path, annotation):
    path = write_captions(tmp_path, "fine") / "filter_cap.json"
    path.write_text(json.dumps({"annotations": [{"image_id": "0", "caption": "fine"}, annotation]}))
    with pytest.raises(BadRecord, match=r"filter_cap\.json record 1\b"):
        Conversations(tmp_path)
    assert len(Conversations(tmp_path, skip_bad=True)) == 1


# ---- Ids and labels -------------------------------------------------------------------------------

# pad 0, image 1, start 2, ### 4, Human: 5, Assistant: 6, <Img> 7, </Img> 8, byte b 9 + b
TURNS = [("<image> or <image>?", " A "), ("b", "no")]


def test_ids_and_labels_equal_those_worked_by_hand():
    ids, labels = encode_turns(BYTES, TURNS, n_rows=2, max_len=99)
    question = [2, 4, 5, 7, 1, 1, 8, 41, 120, 123, 7, 1, 1, 8, 41, 72, 4, 6]  # space 41, o 120, r 123, ? 72
    assert ids == question + [41, 74, 4] + [5, 41, 107, 4, 6] + [41, 119, 120, 4]  # A 74, b 107, n 119, o 120
    assert labels == [-100] * 18 + [41, 74, 4] + [-100] * 5 + [41, 119, 120, 4]


def test_an_answer_of_none_gives_the_same_prompt_without_labels_of_its_own():
    ids, labels = encode_turns(BYTES, TURNS, 2, 99)
    prompt, prompt_labels = encode_turns(BYTES, [TURNS[0], ("b", None)], 2, 99)
    assert prompt == ids[:-4]                                 # all but " no###"
    assert prompt_labels == labels[:-4]
    assert set(encode_turns(BYTES, [("b", None)], 2, 99)[1]) == {NOT_LEARNED}


def test_text_cannot_fake_an_image_or_an_end():
    ids, _ = encode_turns(BYTES, [("<ImageHere><Img>###Assistant: hi", "###")], 2, 99)
    assert [token for token in ids if token < 9] == [2, 4, 5, 4, 6, 4]


def test_what_is_too_long_is_cut_at_the_end_or_raises():
    whole = encode_turns(BYTES, TURNS, 2, 99)                 # 30 tokens; answers at 18 to 20 and 26 to 29
    for max_len in (19, 21, 27, 30):
        assert encode_turns(BYTES, TURNS, 2, max_len) == (whole[0][:max_len], whole[1][:max_len])
    for max_len in (1, 18):
        with pytest.raises(ValueError, match=f"record 3.*max_len {max_len}"):
            encode_turns(BYTES, TURNS, 2, max_len, name="record 3")
    with pytest.raises(ValueError, match="in front of an image"):
        encode_turns(BYTES, TURNS, 2, 12)                     # takes the last row of the second image
    late = [("a", "b"), ("<image>", "c")]
    with pytest.raises(ValueError, match="in front of an image"):
        encode_turns(BYTES, late, 2, 12)


# ---- Batches --------------------------------------------------------------------------------------

COLLATE = Collate(BYTES, n_rows=2, image_size=(2, 4), max_len=99)


def test_a_batch_pads_on_the_right_and_keeps_the_images_in_order():
    red, blue, white = (Image.new("RGB", (4, 2), color) for color in ("red", "blue", "white"))
    samples = [Sample([red, blue], TURNS), Sample([], [("hi", "you")]), Sample([white], [("<image>", "c")])]
    batch = COLLATE.conversations(samples)
    assert batch["input_ids"].shape == batch["labels"].shape == (3, 30)
    for sample, ids, labels in zip(samples, batch["input_ids"].tolist(), batch["labels"].tolist()):
        alone = encode_turns(BYTES, sample.turns, 2, 99)
        assert ids == alone[0] + [PAD] * (30 - len(alone[0]))
        assert labels == alone[1] + [NOT_LEARNED] * (30 - len(alone[1]))
    assert batch["images"][:, :, 0, 0].tolist() == [[1, -1, -1], [-1, -1, 1], [1, 1, 1]]


def test_a_batch_without_images_has_zero_of_them_at_the_right_size():
    images = COLLATE.conversations([Sample([], [("hi", "you")])])["images"]
    assert images.shape == (0, 3, 2, 4) and images.dtype == torch.float32


def test_a_sample_that_is_too_long_is_named():
    with pytest.raises(ValueError, match="scene 7"):
        Collate(BYTES, 2, (2, 4), max_len=5).conversations([Sample([], [("hi", "you")], name="scene 7")])


def test_pairs_hold_the_first_image_and_all_that_is_said_about_it():
    red, blue = Image.new("RGB", (4, 2), "red"), Image.new("RGB", (4, 2), "blue")
    samples = [Sample([red, blue], [("<image> <image>", "ab")]),
               Sample([blue], [("<image>q", "a"), ("b", "c")])]
    batch = COLLATE.pairs(samples)
    assert batch["text"].tolist() == [[2, *byte_ids(" ab"), 4, PAD, PAD, PAD, PAD, PAD],
                                      [2, *byte_ids(" q a b c"), 4]]
    assert batch["images"][:, :, 0, 0].tolist() == [[1, -1, -1], [-1, -1, 1]]
    short = Collate(BYTES, 2, (2, 4), max_len=5).pairs(samples)["text"]
    assert short.tolist() == [[2, *byte_ids(" ab"), 4], [2, *byte_ids(" q "), 4]]  # the end is never cut off


# ---- Pictures -------------------------------------------------------------------------------------

def test_pixels_go_from_minus_one_to_one_in_rows_and_columns():
    image = Image.new("RGB", (3, 2))                          # 3 wide, 2 high
    image.putpixel((2, 0), (255, 51, 204))
    pixels = to_pixels(image, (2, 3))
    assert pixels.dtype == torch.float32 and pixels.shape == (3, 2, 3)
    assert pixels[:, 0, 2].tolist() == pytest.approx([1, -0.6, 0.6])
    assert (pixels[:, 1] == -1).all() and (pixels[:, 0, :2] == -1).all()


@pytest.mark.parametrize("mode", ["RGB", "P", "L", "1", "RGBA", "LA", "CMYK"])
def test_pictures_of_any_mode_and_size_become_the_same_pixels(mode):
    image = Image.new("RGB", (40, 20), "white")
    image.paste("black", (0, 0, 20, 20))                      # left half black, right half white
    pixels = to_pixels(image.convert(mode), (6, 8))
    assert pixels.shape == (3, 6, 8) and pixels.min() == -1 and pixels.max() == 1
    assert (pixels[:, :, :3] < -0.9).all() and (pixels[:, :, 5:] > 0.9).all()


@pytest.mark.parametrize("mode, low, high", [("I;16", 0, 65535), ("I", 0, 65535), ("I", 0, 255), ("F", 0.0, 1.0),
                                             ("F", 0.0, 255.0), ("L", 0, 255), ("1", 0, 1), ("CMYK", 0, 255)])
def test_files_of_any_depth_keep_their_brightness(mode, low, high, tmp_path):
    values = np.repeat([low, high, high // 4], 3)[None].repeat(4, axis=0)  # three stripes
    kinds = {"I;16": np.uint16, "I": np.int32, "F": np.float32}
    image = Image.fromarray(values.astype(kinds.get(mode, np.uint8)) * (255 if mode == "1" else 1))
    (image if mode in kinds else image.convert(mode)).save(tmp_path / "x.tiff")
    read = read_image(tmp_path / "x.tiff")
    assert read.mode == "RGB" and read.getpixel((0, 0)) == (0, 0, 0) and read.getpixel((4, 0)) == (255, 255, 255)
    if mode != "1" and high != 1.0:
        assert read.getpixel((7, 0))[0] in (63, 64)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(mode, tmp_path):
    image = Image.new("RGBA", (4, 2), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (2, 0, 4, 2))
    image.convert(mode).save(tmp_path / "x.png")
    assert [read_image(tmp_path / "x.png").getpixel((x, 0))[0] for x in (0, 3)] == [255, 0]


def test_pictures_are_turned_as_the_camera_was_held(tmp_path):
    image = Image.new("RGB", (6, 2), "red")
    image.paste("blue", (0, 0, 3, 2))                         # blue on the left
    exif = Image.Exif()
    exif[0x0112] = 6                                          # shown turned to the right by 90 degrees
    image.save(tmp_path / "x.png", exif=exif)
    read = read_image(tmp_path / "x.png")
    assert read.size == (2, 6) and color_of(read) == "blue" and read.getpixel((0, 5)) == (255, 0, 0)


@pytest.mark.filterwarnings("ignore")                         # Pillow warns of what is then refused
def test_bombs_and_broken_files_are_refused_by_name(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    for kind in ("png", "jpeg", "tiff", "gif"):
        path = tmp_path / f"x.{kind}"
        Image.fromarray(noise).save(path)
        whole = path.read_bytes()
        for length in (0, 10, len(whole) // 2):
            path.write_bytes(whole[:length])
            with pytest.raises(BadRecord, match=f"record 7: cannot read image .*x.{kind}"):
                read_image(path, "record 7")
        path.write_bytes(whole)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1599)
        with pytest.raises(BadRecord, match="40 x 40 pixels are too many"):
            read_image(path)
        monkeypatch.undo()


def test_padding_keeps_the_shape_between_bars_of_the_mean_and_pixels_are_normalised():
    image = Image.new("RGB", (40, 20), (255, 0, 102))
    mean, std = (0.5, 0.25, 0.4), (0.5, 0.25, 0.2)
    pixels = to_pixels(image, (8, 8), "pad", mean, std)
    assert pixels[:, 4, 4].tolist() == pytest.approx([1, -1, 0], abs=1e-6)       # (value - mean) / std
    assert pixels[:, [0, 1, 6, 7]].abs().max() < 0.02 and (pixels[0, 2:6] == 1).all()
    squashed = to_pixels(image, (8, 8), "squash", mean, std)
    assert squashed[:, 0, 0].tolist() == pytest.approx([1, -1, 0], abs=1e-6)


def test_running_the_file_draws_a_sheet_and_prints_one_sample(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data.main()
    with Image.open(tmp_path / "scenes.png") as sheet:
        assert sheet.width > 800 and len(sheet.getcolors(1 << 24)) > 1000
    uses = [line.split()[-1] for line in capsys.readouterr().out.splitlines()[1:]]
    assert uses[0] == "context" and uses[-1] == "trained" and uses.count("image") == 4
    assert set(uses) == {"context", "image", "trained"}
