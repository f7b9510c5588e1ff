"""Files and records as strangers send them: each gives a clear error or a counted skip, nothing outside the root is read."""
import json
import os
import re
import struct
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlmamba_lite.data.batches import Tally, load_picture
from vlmamba_lite.data.conversations import ERROR_KINDS, Conversation, SampleError
from vlmamba_lite.data.easy_vqa import easy_vqa_set, load_easy_vqa
from vlmamba_lite.data.pictures import open_image, process_images, to_rgb
from vlmamba_lite.data.records import ConversationSet, hub_set, llava_set, picture_list, safe_path

HUMAN, GPT = {"from": "human", "value": "what is it?"}, {"from": "gpt", "value": "a circle"}
GOOD = [HUMAN, GPT]


def write(folder, records, name="chat.json"):
    path = folder / name
    path.write_text("\n".join(map(json.dumps, records)) if name.endswith("l") else json.dumps(records))
    return path


def error_of(folder, record, root=None):
    data = llava_set(write(folder, [record]), root)
    with pytest.raises(SampleError, match="^sample 0 of chat.json") as error:
        conversation = data[0]
        for image in conversation.images:
            load_picture(image, conversation.name)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    return error.value


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "deep").mkdir(parents=True)
    Image.new("RGB", (6, 4), "teal").save(folder / "a.png")
    Image.new("RGB", (6, 4), "red").save(folder / "deep" / "b.jpg")
    Image.new("RGB", (6, 4), "black").save(tmp_path / "secret.png")
    return folder


# ---- paths ----

BAD_PATHS = ["../secret.png", "deep/../../secret.png", "deep/../a.png", "..", "..\\secret.png", "deep\\..\\..\\secret.png", "/etc/passwd",
             "C:\\secret.png", "C:secret.png", "\\\\host\\share\\x.png", "//host/x.png", "a.png\0", "", ".", "/", "~/../../secret.png"]


@pytest.mark.parametrize("name", BAD_PATHS)
def test_paths_that_leave_the_root_are_refused(tmp_path, root, name):
    error = error_of(tmp_path, {"image": name, "conversations": GOOD}, root)
    assert error.kind == "image" and re.search("need a relative one|is not a file", str(error))


def test_an_absolute_path_into_the_root_is_refused_too(tmp_path, root):
    assert "need a relative one" in str(error_of(tmp_path, {"image": str(root / "a.png"), "conversations": GOOD}, root))


def test_links_out_of_the_root_are_refused(tmp_path, root):
    os.symlink(tmp_path / "secret.png", root / "link.png")
    os.symlink(tmp_path, root / "folder")
    os.symlink("loop.png", root / "loop.png")
    os.symlink("a.png", root / "inside.png")
    for name in ("link.png", "folder/secret.png"):
        assert "leads out of the root folder" in str(error_of(tmp_path, {"image": name, "conversations": GOOD}, root))
    assert error_of(tmp_path, {"image": "loop.png", "conversations": GOOD}, root).kind == "image"
    inside = llava_set(write(tmp_path, [{"image": "inside.png", "conversations": GOOD}]), root)[0]
    assert load_picture(inside.images[0], "0").size == (6, 4)


def test_nothing_outside_the_root_is_opened(tmp_path, root, monkeypatch):
    import builtins
    import io
    opened, real = [], builtins.open
    def spy(file, *args, **kwargs):
        opened.append(str(file))
        return real(file, *args, **kwargs)
    os.symlink(tmp_path / "secret.png", root / "link.png")
    data = llava_set(write(tmp_path, [{"image": n, "conversations": GOOD} for n in [*BAD_PATHS, "link.png", "a.png", "deep/b.jpg"]]), root)
    monkeypatch.setattr(builtins, "open", spy)
    monkeypatch.setattr(io, "open", spy)
    tally, sizes = Tally(), []
    for i in range(len(data)):
        if conversation := tally.attempt(lambda: data[i], "skip"):                                   # noqa: B023
            sizes += [tally.attempt(lambda: load_picture(conversation.images[0], "n"), "skip")]     # noqa: B023
    monkeypatch.undo()
    assert sum(s is not None for s in sizes) == 2 and tally.skipped == {"image": len(BAD_PATHS) + 1}
    assert opened and all(Path(p).resolve().is_relative_to(root.resolve()) for p in opened)


@settings(deadline=None, max_examples=200, derandomize=True)
@given(st.text("ab./\\~:\0é ", max_size=12))
def test_any_path_stays_inside_or_is_refused(tmp_path_factory, name):
    root = tmp_path_factory.getbasetemp()
    try:
        path = safe_path(root, name, "7")
    except SampleError as error:
        assert error.kind == "image" and str(error).startswith("sample 7: image: ")
    else:
        assert path.is_relative_to(root.resolve()) and ".." not in path.parts


def test_a_path_needs_a_root(tmp_path):
    assert "no root folder; need one" in str(error_of(tmp_path, {"image": "a.png", "conversations": GOOD}))


def test_paths_in_a_hub_row_are_not_trusted(tmp_path, root):
    from datasets import Dataset, Features, List, Value
    from datasets import Image as Picture
    rows = {"image": [{"bytes": None, "path": str(tmp_path / "secret.png")}], "question": ["what?"], "answer": ["black"]}
    data = hub_set(Dataset.from_dict(rows, Features(image=Picture(decode=False), question=Value("string"), answer=Value("string"))), root=root)
    with pytest.raises(SampleError, match="leads out of the root folder"):
        data[0]
    lists = {"images": [[{"bytes": None, "path": "../secret.png"}]], "question": ["what?"], "answer": ["black"]}
    kinds = Features(images=List(Picture(decode=True)), question=Value("string"), answer=Value("string"))
    with pytest.raises(SampleError, match="need a relative one"):
        hub_set(Dataset.from_dict(lists, kinds), root=root)[0]


def test_folders_of_pictures_as_datasets_loads_them(tmp_path, root):
    from datasets import Dataset, Features, Value
    from datasets import Image as Picture
    rows = {"image": [str(root / "a.png"), str(root / "deep" / "b.jpg")], "question": ["what?"] * 2, "answer": ["a"] * 2}
    rows = Dataset.from_dict(rows, Features(image=Picture(), question=Value("string"), answer=Value("string")))
    inside, outside, trusted = hub_set(rows, root=root), hub_set(rows, root=root / "deep"), hub_set(rows, decode=True)
    assert [load_picture(inside[i].images[0], "0").size for i in (0, 1)] == [(6, 4)] * 2 == [trusted[i].images[0].size for i in (0, 1)]
    with pytest.raises(SampleError, match="leads out of the root folder"):
        outside[0]
    assert load_picture(outside[1].images[0], "1").size == (6, 4)
    with pytest.raises(SampleError, match="no root folder"):
        hub_set(rows)[0]


# ---- pictures ----

def png_header(width, height):
    chunk = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + chunk + struct.pack(">I", zlib.crc32(b"IHDR" + chunk))


def png(width, height):
    rows = zlib.compress(b"\0" * (width * 3 + 1) * 16)
    data = struct.pack(">I", len(rows)) + b"IDAT" + rows + struct.pack(">I", zlib.crc32(b"IDAT" + rows))
    return png_header(width, height) + data + b"\0\0\0\0IEND\xaeB`\x82"


@pytest.mark.parametrize("content, said", [
    (b"", "is not a picture"), (b"%PDF-1.4", "is not a picture"), (b"<svg/>", "is not a picture"), (b"\xff\xd8\xff", "is not a picture|cannot be read"),
    (png_header(4, 4), "is not a picture|cannot be read"), (png(64, 64)[:60], "cannot be read"), (b"\0" * 5000, "is not a picture"),
    (png(20_000, 20_000), "cannot be read: .*400000000 pixels"), (png(8_000, 8_000), "got 8000x8000 pixels, need at most 50,000,000"),
    (png(60_000, 1_000), "got 60000x1000 pixels"), (b"GIF89a" + b"\0" * 20, "is not a picture|cannot be read")], ids=range(11))
def test_broken_pictures_are_named(tmp_path, root, content, said):
    (root / "bad.png").write_bytes(content)
    error = error_of(tmp_path, {"image": "bad.png", "conversations": GOOD}, root)
    assert error.kind == "image" and re.search(r"bad\.png .*" + f"({said})", str(error))
    with pytest.raises(SampleError, match=f"in the record .*({said})"):
        load_picture({"bytes": content}, "7")


@pytest.mark.filterwarnings("ignore:Truncated File Read")
@pytest.mark.parametrize("kind", ["png", "jpg", "gif", "webp", "bmp", "tiff"])
def test_truncated_files_are_never_half_a_picture(root, kind):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    noise.save(root / f"whole.{kind}")
    whole = (root / f"whole.{kind}").read_bytes()
    for share in (0.02, 0.3, 0.6, 0.9):
        (root / f"half.{kind}").write_bytes(whole[:int(len(whole) * share)])
        with pytest.raises(ValueError, match=f"half.{kind} (is not a picture|cannot be read)"):
            open_image(root / f"half.{kind}")
    assert open_image(root / f"whole.{kind}").size == (40, 40)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_between_the_limits_of_pillow_and_ours(tmp_path, root):
    (root / "bad.png").write_bytes(png(10_000, 10_000))
    assert "got 10000x10000 pixels" in str(error_of(tmp_path, {"image": "bad.png", "conversations": GOOD}, root))


def test_missing_files_folders_and_pipes(tmp_path, root):
    os.mkfifo(root / "pipe.png")
    for name, said in (("no.png", "no file"), ("deep", "is not a file"), ("pipe.png", "is not a file"), ("https://x.org/a.png", "no file")):
        assert said in str(error_of(tmp_path, {"image": name, "conversations": GOOD}, root))


def test_animations_are_refused_and_single_frames_are_not(tmp_path, root):
    frames = [Image.new("P", (4, 4), i) for i in range(3)]
    for name in ("a.gif", "a.webp", "a.apng", "a.tiff"):
        frames = [f.convert("RGB") for f in frames]
        for i, frame in enumerate(frames):
            frame.paste((90 * i, 0, 0), (0, 0, 2, 2))
        frames[0].save(root / name, save_all=True, append_images=frames[1:], **({"format": "PNG"} if name == "a.apng" else {}))
        assert "got 3 frames, need a single picture" in str(error_of(tmp_path, {"image": name, "conversations": GOOD}, root))
        frames[0].save(root / name, **({"format": "PNG"} if name == "a.apng" else {}))
        assert open_image(root / name).size == (4, 4)
    frames[0].save(root / "phone.jpg", "MPO", save_all=True, append_images=frames[1:])        # a photo with its preview
    assert open_image(root / "phone.jpg").size == (4, 4)


def one_color(image):
    pixels = process_images([image], 8)[0].flatten(1)
    return pixels.float().mean(1).round().int().tolist()


def test_colors_of_unusual_pictures(root):
    Image.new("RGB", (8, 8), (200, 30, 60)).convert("CMYK").save(root / "cmyk.jpg", quality=100)
    Image.new("RGB", (8, 8), (200, 30, 60)).convert("CMYK").save(root / "cmyk.tiff")
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 200, 30, 60])
    palette.save(root / "palette.png")
    deep = np.full((8, 8), 200 << 8, np.uint16)
    Image.fromarray(deep).save(root / "deep.png")
    Image.fromarray(deep >> 8).save(root / "dark.png")                       # 16 bits, all of them low: nearly black
    for name, want in {"cmyk.jpg": [200, 30, 60], "cmyk.tiff": [200, 30, 60], "palette.png": [200, 30, 60], "deep.png": [200] * 3, "dark.png": [0] * 3}.items():
        assert np.abs(np.array(one_color(open_image(root / name))) - want).max() <= 3, name


@pytest.mark.parametrize("levels", [np.array([[-1, 5]], np.int32), np.array([[0, 70_000]], np.int32), np.array([[0, 300.0]], np.float32)])
def test_levels_that_do_not_fit_are_refused(levels):
    with pytest.raises(ValueError, match="image: got levels from .*, need 8 or 16 bits"):
        to_rgb(Image.fromarray(levels))


@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_turns_are_undone_once(root, turn):
    image = Image.new("RGB", (4, 2), "white")
    image.putpixel((0, 0), (0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = turn
    image.save(root / "photo.png", exif=exif)
    from PIL import ImageOps
    want = ImageOps.exif_transpose(Image.open(root / "photo.png"))
    for got in (load_picture(root / "photo.png", "7"), load_picture({"bytes": (root / "photo.png").read_bytes()}, "7"),
                load_picture(load_picture(Image.open(root / "photo.png"), "7"), "7")):
        assert got.size == want.size == ((2, 4) if turn > 4 else (4, 2)) and got.tobytes() == want.tobytes()


@pytest.mark.parametrize("value", [7, 0.5, {"a": 1}, [None], [["a.png"]], True, {"bytes": None, "path": None}, [{"bytes": b""}]])
def test_what_is_no_picture_value(value):
    with pytest.raises(SampleError, match="sample 7: image: got .*, need a path, PIL picture or bytes"):
        picture_list(value, "7", "root")


# ---- records ----

LONG = {"from": "gpt", "value": "la" * 5_000_000}


@pytest.mark.parametrize("record, kind, said", [
    (None, "record", "got NoneType"), ([], "record", "got list"), ("text", "record", "got str"), ({}, "turns", "need a list of messages"),
    ({"conversations": []}, "turns", "got 0 messages"), ({"conversations": "hi"}, "turns", "need a list"), ({"conversations": [1]}, "turns", "type int"),
    ({"conversations": [HUMAN]}, "turns", "need an answer after every question"), ({"conversations": [HUMAN, HUMAN]}, "turns", "message 2 is of role 'human'"),
    ({"conversations": [GPT, HUMAN]}, "turns", "message 1 is of role 'gpt'"), ({"conversations": [*GOOD, HUMAN]}, "turns", "got 3 messages"),
    ({"conversations": [{"from": "system", "value": "x"}, GPT]}, "turns", "role 'system'"), ({"conversations": [{"from": [1]}, GPT]}, "turns", "message 1 is of role"),
    ({"conversations": [{"value": "x"}, GPT]}, "turns", "message 1 is of role 'None'"), ({"conversations": [{"from": "human"}, GPT]}, "turns", "NoneType"),
    ({"conversations": [HUMAN, {"from": "gpt", "value": ""}]}, "empty", "assistant, turn 1"), ({"conversations": [{**HUMAN, "value": " \n"}, GPT]}, "empty", "user"),
    ({"conversations": [HUMAN, {"from": "gpt", "value": 7}]}, "turns", "got int"), ({"conversations": [HUMAN, LONG]}, "text", "10,000,000 characters"),
    ({"conversations": [HUMAN, {"from": "gpt", "value": "\ud83d"}]}, "text", "half a character"),
    ({"conversations": [{**HUMAN, "value": "<image>\nwhat?"}, GPT]}, "image", "got 1 marks <image> and 0 pictures"),
    ({"conversations": [{**HUMAN, "value": "<image>"}, GPT], "image": "a.png"}, "empty", "user, turn 1"),
    ({"conversations": [{**HUMAN, "value": "<image><image> differ?"}, GPT], "image": "a.png"}, "image", "2 marks <image> and 1 pictures")])
def test_broken_records(tmp_path, root, record, kind, said):
    error = error_of(tmp_path, record, root)
    assert error.kind == kind and said in str(error)


def test_marks_are_taken_out_wherever_they_stand(tmp_path, root):
    for text in ("<image>\nwhat is it?", "what is it?\n<image>", "<image> what is it?", "what is it?"):
        got = llava_set(write(tmp_path, [{"image": "a.png", "conversations": [{**HUMAN, "value": text}, GPT]}]), root)[0]
        assert got.turns == [("what is it?", "a circle")] and len(got.images) == 1
    two = {"image": ["a.png", "deep/b.jpg"], "conversations": [{**HUMAN, "value": "<image>\n<image>\nsame?"}, GPT]}
    assert len(llava_set(write(tmp_path, [two]), root)[0].images) == 2


def test_an_answer_keeps_its_mark(tmp_path):
    got = llava_set(write(tmp_path, [{"conversations": [HUMAN, {**GPT, "value": "write <image> there"}]}]))[0]
    assert got.turns[0][1] == "write <image> there"


def test_a_missing_image_is_a_text_only_turn(tmp_path):
    for record in ({"conversations": GOOD}, {"image": None, "conversations": GOOD}, {"image": [], "conversations": GOOD}):
        assert llava_set(write(tmp_path, [record]))[0].images == []


def test_repeated_ids(tmp_path):
    path = write(tmp_path, [{"id": x, "conversations": GOOD} for x in (1, "1", 2, None, None, 2)])
    data, tally = llava_set(path), Tally()
    assert sorted(data.repeated) == [1, 5]
    kept = [i for i in range(6) if tally.attempt(lambda: data[i], "skip")]                      # noqa: B023
    assert kept == [0, 2, 3, 4] and tally.skipped == {"duplicate": 2} and tally.read == 6
    assert "its id has come before" in tally.messages[0] and all(llava_set(path, unique=False)[i] for i in range(6))


@pytest.mark.parametrize("content, said", [
    (b"[{\"id\": \"\xff\"}]", "chat.json: byte 9 is not UTF-8"), (b"", "is not JSON"), (b"{]", "is not JSON"), (b"[" * 100_000, "is not JSON"),
    (b"[]", "got an empty list"), (b"{}", "got dict, need a list of records"), ("[1]".encode("utf-16"), "not UTF-8|is not JSON"), (b"7", "got int")])
def test_files_that_are_no_list_of_records(tmp_path, content, said):
    (tmp_path / "chat.json").write_bytes(content)
    with pytest.raises(ValueError, match=said):
        llava_set(tmp_path / "chat.json")


def test_a_bad_line_is_one_bad_sample(tmp_path):
    good = json.dumps({"conversations": GOOD}).encode()
    (tmp_path / "chat.jsonl").write_bytes(b"\n".join([good, b"\xff\xfe", b"{", b"", b"[" * 100_000, good]))
    data, tally = llava_set(tmp_path / "chat.jsonl"), Tally()
    assert len(data) == 5
    kept = [i for i in range(5) if tally.attempt(lambda: data[i], "skip")]                      # noqa: B023
    assert kept == [0, 4] and tally.skipped == {"record": 3} and "byte 0 is not UTF-8" in tally.messages[0]
    with pytest.raises(SampleError, match="1 of chat.jsonl"):
        tally.attempt(lambda: data[1], "raise")


def test_a_byte_order_mark_is_no_fault(tmp_path):
    (tmp_path / "chat.json").write_bytes(b"\xef\xbb\xbf" + json.dumps([{"conversations": GOOD}]).encode())
    assert llava_set(tmp_path / "chat.json")[0].turns == [("what is it?", "a circle")]


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.floats(allow_nan=False),
                    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.sampled_from(["from", "value", "role", "user", "assistant", "x"]), x, max_size=3), max_leaves=8)


@settings(deadline=None, max_examples=150, derandomize=True)
@given(st.dictionaries(st.sampled_from(["id", "image", "conversations"]), JSON))
def test_any_json_is_a_conversation_or_a_named_fault(record):
    data = ConversationSet([record], {"images": "image", "turns": "conversations", "name": "id"}, "x", "/nowhere")
    try:
        conversation = data[0]
    except SampleError as error:
        assert error.kind in ERROR_KINDS and str(error).startswith("sample 0 of x")
    else:
        assert all(isinstance(t, str) and t.strip() for turn in conversation.turns for t in turn)


# ---- columns and policy ----

def test_column_maps():
    from datasets import Dataset
    picture = Image.new("RGB", (4, 4), "teal")
    cauldron = Dataset.from_dict({"images": [[picture, picture]], "texts": [[{"user": "a?", "assistant": "b", "source": "s"}, {"user": "c?", "assistant": "d"}]]})
    got = hub_set(cauldron)[0]
    assert got.turns == [("a?", "b"), ("c?", "d")] and [load_picture(i, "0").size for i in got.images] == [(4, 4)] * 2
    plain = Dataset.from_dict({"img": [picture], "q": ["a?"], "a": ["b"]})
    got = hub_set(plain, {"images": "img", "questions": "q", "answers": "a"})[0]
    assert got.turns == [("a?", "b")] and isinstance(got.images[0], dict)
    chat = Dataset.from_dict({"messages": [[{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]]})
    assert hub_set(chat)[0] == Conversation("0 of data", [], [("a?", "b")])
    with pytest.raises(ValueError, match="columns: got \\['a', 'img', 'q'\\], need a map"):
        hub_set(plain)
    uneven = Dataset.from_dict({"questions": [["a?", "b?"]], "answers": [["x"]]})
    with pytest.raises(SampleError, match="got 2 questions and 1 answers"):
        hub_set(uneven)[0]


def test_easy_vqa_as_conversations():
    data, rows = easy_vqa_set("validation"), load_easy_vqa("validation")
    assert len(data) == 400
    for i in (0, 7, 399):
        got, row = data[i], rows[i]
        assert got.turns == list(zip(row["questions"], row["answers"])) and f"(id {row['image_id']})" in got.name
        assert load_picture(got.images[0], got.name).tobytes() == row["image"].tobytes()


def test_a_record_that_cannot_be_fetched_is_a_fault():
    class Broken:
        def __len__(self):
            return 1

        def __getitem__(self, i):
            raise OSError("disk on fire")
    with pytest.raises(SampleError, match="sample 0 of x: cannot be read: disk on fire"):
        ConversationSet(Broken(), {"turns": "t"}, "x")[0]
    for i in (-1, 1, 10**9):
        with pytest.raises(IndexError):
            ConversationSet(Broken(), {"turns": "t"}, "x")[i]


def test_the_policy_is_one_of_two():
    with pytest.raises(ValueError, match="on_error: got 'ignore', need 'raise' or 'skip'"):
        Tally().attempt(lambda: 1, "ignore")
    with pytest.raises(KeyError):                                             # only errors of samples are skipped, not mistakes in code
        Tally().attempt(lambda: {}["x"], "skip")
    total = Tally(2, Counter(mask=1), 3, ["a"])
    total.add(Tally(5, Counter(mask=1, image=2), 4, ["b"] * 30))
    assert (total.read, total.skipped, total.cut, len(total.messages)) == (7, Counter(mask=2, image=2), 7, 20)
