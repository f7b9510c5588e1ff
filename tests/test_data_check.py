"""`check_data`, what a path holds, and `vlmamba data check`: counts, errors, the longest samples, as a table and as JSON."""
import json

import pytest
from PIL import Image

from vlmamba_lite.data.checks import check_data, open_data, open_tokenizer, report_table
from vlmamba_lite.data.conversations import Codec, build_tokenizer, byte_tokenizer
from vlmamba_lite.data.records import ConversationSet

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
    report = check_data(open_data(folder / "chat.json"))
    want = {"samples": 11, "usable": 3, "turns": 5, "images": 5, "text_only": 1, "cut_tokens": 0, 
            "errors": {"duplicate": 1, "empty": 1, "image": 3, "record": 1, "text": 1, "turns": 1}}
    assert {name: report[name] for name in want} == want and len(report["messages"]) == 8
    assert json.loads(json.dumps(report)) == report
    assert report["learned_tokens"] == 4 * 9 + len("a circle " * 9) + 1                    # bytes, and an end for each
    long = report["longest"]
    assert len(long) == 5 and long[0]["sample"] == "1 of chat.json (id 1)" and [e["tokens"] for e in long] == sorted((e["tokens"] for e in long), reverse=True)
    assert report["tokens"]["most"] == long[0]["tokens"] and report["tokens"]["least"] == long[-1]["tokens"]


def test_the_table_says_the_same(folder):
    report = check_data(open_data(folder / "chat.json"))
    table = report_table(report)
    rows = dict(line.rsplit("  ", 1) for line in table.splitlines() if not line.startswith("- "))
    rows = {name.strip(): value.strip() for name, value in rows.items()}
    assert rows["samples"] == "11" and rows["errors of kind image"] == "3" and rows["long: 1 of chat.json (id 1)"].endswith("tokens")
    assert sum(line.startswith("- sample ") for line in table.splitlines()) == 8


def test_masks_lengths_and_cuts_depend_on_the_tokenizer(folder):
    data = open_data(folder / "chat.json")
    words = build_tokenizer(["what is it?", "a"])
    report = check_data(data, words, "lite")
    assert report["errors"]["mask"] == 5 and report["usable"] == 0 and "no tokens for all of" in report["messages"][0]
    cut = check_data(data, max_length=50)
    whole = check_data(data)
    assert cut["cut_tokens"] > 0 and cut["cut_tokens"] + cut["learned_tokens"] == whole["learned_tokens"] and cut["tokens"]["most"] == 50
    assert check_data(data, limit=2)["samples"] == 2 and check_data(data, limit=99)["samples"] == 11
    with pytest.raises(ValueError, match="template: got 'x'"):
        check_data(data, template="x")


def test_an_empty_set_and_one_of_errors_only():
    report = check_data(ConversationSet([], {}))
    assert report["samples"] == report["usable"] == 0 and report["longest"] == [] and "samples" in report_table(report)
    report = check_data(ConversationSet([1, 2], {}))
    assert report["errors"] == {"record": 2} and report["tokens"]["most"] == 0 and report_table(report)


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
        data = open_data(folder / name)
        assert len(data) == count and check_data(data)["usable"] == count, name
    assert len(open_data("easy-vqa")) == 3_600 and len(open_data("sort-of-clevr")) == 10_000
    with pytest.raises(FileNotFoundError, match="data: no file or folder no, and none of easy-vqa, sort-of-clevr"):
        open_data("no")
    (folder / "empty").mkdir()
    for bad in ("a.png", "empty"):
        with pytest.raises(ValueError, match="data: got .*, need .json, .jsonl, .parquet"):
            open_data(folder / bad)
    (folder / "bad.parquet").write_bytes(b"no")
    with pytest.raises(ValueError):
        open_data(folder / "bad.parquet")


def test_the_root_can_be_another_folder(folder):
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "chat.json").write_text(json.dumps([record(0)]))
    assert check_data(open_data(folder / "elsewhere" / "chat.json"))["errors"]["image"] == 1
    assert check_data(open_data(folder / "elsewhere" / "chat.json", root=folder))["usable"] == 1
    for bad in (folder / "none", folder / "elsewhere" / "chat.json"):          # one line, not a fault for every sample
        with pytest.raises(FileNotFoundError, match=f"^root: no folder {bad}$"):
            open_data(folder / "chat.json", root=bad)
        said = vlmamba("data", "check", folder / "chat.json", "--root", bad)
        assert said.exit_code == 2 and said.stdout == "" and str(said.exception or said.stderr)


def test_tokenizers_from_files(tmp_path):
    from transformers import PreTrainedTokenizerFast
    raw = byte_tokenizer(["what is it?"], 300)
    raw.save(str(tmp_path / "tokenizer.json"))
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|endoftext|>").save_pretrained(tmp_path / "neox")
    want = Codec(raw).words("what is it?", "7")
    for path in (tmp_path, tmp_path / "tokenizer.json", tmp_path / "neox"):
        assert Codec(open_tokenizer(path)).words("what is it?", "7") == want
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match="bad.json: "):
        open_tokenizer(tmp_path / "bad.json")
    with pytest.raises(FileNotFoundError, match="tokenizer: no file"):
        open_tokenizer(tmp_path / "none")


# ---- the command ----

def vlmamba(*arguments):
    from typer.testing import CliRunner

    from vlmamba_lite.cli.commands import app
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_the_command_prints_a_table_and_fails_where_the_data_does(folder):
    said = vlmamba("data", "check", folder / "chat.json")
    assert said.exit_code == 1 and said.stdout == report_table(check_data(open_data(folder / "chat.json"))) + "\n"
    (folder / "good.json").write_text(json.dumps([record(i) for i in range(3)]))
    said = vlmamba("data", "check", folder / "good.json")
    assert said.exit_code == 0 and "usable" in said.stdout


def test_the_command_prints_json(folder):
    said = vlmamba("data", "check", folder / "chat.json", "--json", "--template", "llava", "--max-length", 150, "--limit", 6, "--root", folder)
    assert said.exit_code == 1 and said.stdout.count("\n") == 1
    assert json.loads(said.stdout) == check_data(open_data(folder / "chat.json"), template="llava", max_length=150, limit=6)
    build_tokenizer(["what is it?", "a circle"]).save(str(folder / "tokenizer.json"))
    said = vlmamba("data", "check", folder / "chat.json", "--json", "--tokenizer", folder, "--template", "lite", "--limit", 1)
    assert said.exit_code == 0 and json.loads(said.stdout)["tokens"]["most"] == 7


@pytest.mark.parametrize("arguments", [("no.json",), ("a.png",), ("chat.json", "--template", "x"), ("chat.json", "--tokenizer", "no"), ("bad.json",)])
def test_mistakes_are_one_line(folder, arguments, monkeypatch, capfd):
    monkeypatch.chdir(folder)
    (folder / "bad.json").write_bytes(b"[\xff]")
    said = vlmamba("data", "check", *arguments)
    assert said.exit_code == 2 and said.stdout == "" and (said.stderr + capfd.readouterr().err).startswith("vlmamba: ")
    assert vlmamba("data", "check", "chat.json", "--limit", 0).exit_code == 2 and vlmamba("data").exit_code in (0, 2)


def test_names_cannot_steer_a_terminal(folder):
    (folder / "x.json").write_text(json.dumps([{"id": "\x1b[2J\n9", "conversations": [HUMAN]}]))
    said = vlmamba("data", "check", folder / "x.json").stdout
    assert "\x1b" not in said and "(id ?[2J?9)" in said


def test_bench_loader_writes_a_result(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = vlmamba("bench", "loader", "--steps", 2)
    result = json.loads((tmp_path / "data" / "results" / "bench_loader.json").read_text())
    assert said.exit_code == 0 and f"{result['times_faster']}x faster than training" in said.stdout
    assert result["times_faster"] == pytest.approx(result["per_second"]["batches"] * result["step_cpu_seconds"], rel=0.1) and result["times_faster_by_cpu"] > 0
