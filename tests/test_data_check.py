"""`check_data`, what a path holds, and `vlmamba data check`: counts, faults, the longest samples, as a table and as JSON."""
import json

import pytest
from PIL import Image

from vlmamba_lite import data as D

HUMAN = {"from": "human", "value": "what is it?"}


def record(i, answer="a circle", image="a.png", **more):
    return {"id": i, "image": image, "conversations": [HUMAN, {"from": "gpt", "value": answer}], **more}


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (6, 4), "teal").save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    records = [record(0), record(1, "a circle " * 9), record(1), record(3, image="b.png"), record(4, image="../a.png"), record(5, " "),
               record(6, image=None), {"id": 7, "conversations": [HUMAN]}, record(8, image=["a.png", "b.png"]), 9, record(10, "la" * 60_000)]
    (tmp_path / "chat.json").write_text(json.dumps(records))
    return tmp_path


def test_everything_is_counted(folder):
    report = D.check_data(D.open_data(folder / "chat.json"))
    want = {"samples": 11, "usable": 3, "turns": 5, "images": 5, "text_only": 1, "cut_tokens": 0, "broken_images": 3, "empty_answers": 1, "mask_failures": 0,
            "repeated_ids": 1, "faults": {"duplicate": 1, "empty": 1, "image": 3, "record": 1, "text": 1, "turns": 1}}
    assert {name: report[name] for name in want} == want and len(report["messages"]) == 8
    assert json.loads(json.dumps(report)) == report
    assert report["learned_tokens"] == 4 * 9 + len("a circle " * 9) + 1                    # bytes, and an end for each
    long = report["longest"]
    assert len(long) == 5 and long[0]["sample"] == "1 of chat.json (id 1)" and [e["tokens"] for e in long] == sorted((e["tokens"] for e in long), reverse=True)
    assert report["tokens"]["most"] == long[0]["tokens"] and report["tokens"]["least"] == long[-1]["tokens"]


def test_the_table_says_the_same(folder):
    report = D.check_data(D.open_data(folder / "chat.json"))
    table = D.report_table(report)
    rows = dict(line.rsplit("  ", 1) for line in table.splitlines() if not line.startswith("- "))
    rows = {name.strip(): value.strip() for name, value in rows.items()}
    assert rows["samples"] == "11" and rows["broken images"] == "3" and rows["faults of kind image"] == "3" and rows["long: 1 of chat.json (id 1)"].endswith("tokens")
    assert sum(line.startswith("- sample ") for line in table.splitlines()) == 8


def test_masks_lengths_and_cuts_depend_on_the_tokenizer(folder):
    data = D.open_data(folder / "chat.json")
    words = D.build_tokenizer(["what is it?", "a"])
    report = D.check_data(data, words, "lite")
    assert report["mask_failures"] == 5 and report["usable"] == 0 and "no tokens for all of" in report["messages"][0]
    cut = D.check_data(data, max_length=50)
    whole = D.check_data(data)
    assert cut["cut_tokens"] > 0 and cut["cut_tokens"] + cut["learned_tokens"] == whole["learned_tokens"] and cut["tokens"]["most"] == 50
    assert D.check_data(data, limit=2)["samples"] == 2 and D.check_data(data, limit=99)["samples"] == 11
    with pytest.raises(ValueError, match="template: got 'x'"):
        D.check_data(data, template="x")


def test_an_empty_set_and_one_of_faults_only():
    report = D.check_data(D.ConversationSet([], {}))
    assert report["samples"] == report["usable"] == 0 and report["longest"] == [] and "samples" in D.report_table(report)
    report = D.check_data(D.ConversationSet([1, 2], {}))
    assert report["faults"] == {"record": 2} and report["tokens"]["most"] == 0 and D.report_table(report)


def test_paths_of_every_kind(folder):
    from datasets import Dataset
    rows = Dataset.from_dict({"image": [Image.new("RGB", (4, 4), "teal")] * 3, "question": ["a?"] * 3, "answer": ["b"] * 3})
    rows.to_parquet(folder / "x.parquet")
    (folder / "many").mkdir()
    for i in range(2):
        rows.to_parquet(folder / "many" / f"{i}.parquet")
    rows.save_to_disk(folder / "disk")
    (folder / "lines.jsonl").write_text("\n".join(json.dumps(record(i)) for i in range(4)))
    for name, count in (("x.parquet", 3), ("many", 6), ("disk", 3), ("lines.jsonl", 4)):
        data = D.open_data(folder / name)
        assert len(data) == count and D.check_data(data)["usable"] == count, name
    assert len(D.open_data("easy-vqa")) == 3_600 and len(D.open_data("sort-of-clevr")) == 10_000
    with pytest.raises(FileNotFoundError, match="data: no file or folder no, and none of easy-vqa, sort-of-clevr"):
        D.open_data("no")
    (folder / "empty").mkdir()
    for bad in ("a.png", "empty"):
        with pytest.raises(ValueError, match="data: got .*, need .json, .jsonl, .parquet"):
            D.open_data(folder / bad)
    (folder / "bad.parquet").write_bytes(b"no")
    with pytest.raises(ValueError):
        D.open_data(folder / "bad.parquet")


def test_the_root_can_be_another_folder(folder):
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "chat.json").write_text(json.dumps([record(0)]))
    assert D.check_data(D.open_data(folder / "elsewhere" / "chat.json"))["broken_images"] == 1
    assert D.check_data(D.open_data(folder / "elsewhere" / "chat.json", root=folder))["usable"] == 1


def test_tokenizers_from_files(tmp_path):
    from transformers import PreTrainedTokenizerFast
    raw = D.byte_tokenizer(["what is it?"], 300)
    raw.save(str(tmp_path / "tokenizer.json"))
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|endoftext|>").save_pretrained(tmp_path / "neox")
    want = D.Codec(raw).words("what is it?", "7")
    for path in (tmp_path, tmp_path / "tokenizer.json", tmp_path / "neox"):
        assert D.Codec(D.open_tokenizer(path)).words("what is it?", "7") == want
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer: .*bad.json cannot be read"):
        D.open_tokenizer(tmp_path / "bad.json")
    with pytest.raises(FileNotFoundError, match="tokenizer: no file"):
        D.open_tokenizer(tmp_path / "none")
