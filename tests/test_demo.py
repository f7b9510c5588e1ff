"""The demo: its maps by hand, its page in a real browser, which may fetch nothing from elsewhere."""
import atexit
import os
import shutil
import socket
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest
import torch
from PIL import Image
from test_cli import is_a_mistake, vlmamba

from vlmamba_lite.cli.chat import Session
from vlmamba_lite.cli.demo import QUESTIONS, AttentionMap, answers, demo_page, known_words, launch_demo, new_picture, open_demo, paint_map
from vlmamba_lite.connectors.attention_maps import connector_maps
from vlmamba_lite.model.chat import PromptFormat
from vlmamba_lite.model.vlmamba import picture_tokens

QUESTION = "what color is the shape?"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def picture(small):
    return small.rows[0]["image"]


@pytest.fixture
def model(make_model):
    return make_model().eval()


def test_the_map_is_that_of_the_connector(model, picture):
    sight = AttentionMap(model, picture)
    maps = connector_maps(model.connector, *picture_tokens(model, picture), (2, 5))
    assert sight.size == (8, 8) and sight.attention.shape == (64, 64)
    torch.testing.assert_close(sight.attention.sum(0).view(8, 8), maps["attention, all"])
    torch.testing.assert_close(sight.attention[2 * 8 + 5].view(8, 8), maps["attention"])
    assert sight.paint().size == sight.paint((2, 5)).size == (448, 448)
    assert sight.paint((2, 5)).tobytes() == paint_map(sight.picture, maps["attention"], (2, 5)).tobytes() != sight.paint((5, 2)).tobytes()


def test_a_click_finds_its_patch(model, picture):
    sight = AttentionMap(model, picture)                       # 56 pixels a patch
    assert [sight.patch(*xy) for xy in ((0, 0), (55, 56), (300, 100), (447, 447), (448, -3))] == [(0, 0), (1, 0), (1, 5), (7, 7), (0, 7)]


def test_bright_is_what_is_taken_in():
    values = torch.zeros(2, 4)
    values[1, 3] = 7.0
    painted = paint_map(-torch.ones(3, 8, 16), values, (0, 1), side=80)         # a black picture, wide: a patch is 40 pixels
    assert painted.size == (160, 80) and painted.mode == "RGB"
    assert sum(painted.getpixel((140, 60))) > 400 > 30 > sum(painted.getpixel((20, 20)))
    assert painted.getpixel((40, 0)) == painted.getpixel((80, 40)) == (0, 191, 255) != painted.getpixel((60, 20))         # the frame
    assert paint_map(torch.ones(3, 4, 4), torch.zeros(2, 2)).getpixel((9, 9))[0] < 255                  # no division by zero


REFUSED = {"text.png": "text.png is not a picture", "empty.png": "empty.png is not a picture", "moving.gif": "got 2 frames", "bomb.png": "got 9000x9000 pixels",
           "gone.png": "gone.png"}


def write_refused(folder):
    "Pictures that cannot be used, in a folder."
    (folder / "text.png").write_text("hello")
    (folder / "empty.png").write_bytes(b"")
    Image.new("RGB", (9, 9)).save(folder / "moving.gif", save_all=True, append_images=[Image.new("RGB", (9, 9), "red")])
    Image.new("1", (9000, 9000)).save(folder / "bomb.png")


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_picture_leaves_no_conversation_about_the_one_before(model, picture, tmp_path, name):
    write_refused(tmp_path)
    picture.save(tmp_path / "good.png")
    new_session = partial(Session, model, max_new_tokens=3)
    session, attention_map, said, error = new_picture(new_session, tmp_path / "good.png")
    assert session.chat.kept is not None and attention_map and not said and error is None
    session, attention_map, said, error = new_picture(new_session, tmp_path / name)
    assert session.chat.kept is None and attention_map is None and error and len(said) == 1
    assert said[0]["content"].startswith("This picture cannot be used: ") and REFUSED[name] in said[0]["content"] and str(tmp_path) not in said[0]["content"]
    *_, (_, conversation, _) = answers(new_session, QUESTION, said, session)
    assert conversation[-1]["content"].startswith("(I see no picture.) ") and len(conversation) == 3


def test_questions_that_are_offered_can_be_answered(model):
    "What stands in the empty field, the examples below it, and what it was: the model has read all their words."
    for question in (*QUESTIONS, "what is in the picture?"):
        assert len(PromptFormat(model.tokenizer).encode(question)) > 3


def test_what_a_model_has_read_is_told(small):
    assert known_words(small.tokenizer).startswith("It knows only these words: a, black, ") and "?" not in known_words(small.tokenizer)


def test_the_demo_without_gradio(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    is_a_mistake(vlmamba("demo", "no/model"), r"^vlmamba: demo: needs gradio, which is not installed: pip install 'vlmamba_lite\[demo\]'$")


needs_gradio = pytest.mark.skipif(not find_spec("gradio"), reason="needs gradio")


@needs_gradio
def test_mistakes_before_the_demo(make_model, tmp_path):
    make_model().save_pretrained(tmp_path)
    is_a_mistake(vlmamba("demo", "no/model"), "model: no folder no/model")
    is_a_mistake(vlmamba("demo", tmp_path, "--top-p", 0), "top_p: got")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        is_a_mistake(vlmamba("demo", tmp_path, "--port", port), f"{port}")


@pytest.fixture
def browser():
    if CHROMIUM is None or not find_spec("playwright"):
        pytest.skip("needs chromium and playwright")
    from playwright.sync_api import sync_playwright
    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, make_model):
    "The page of the demo in a browser, and all that it asked for in `.asked`."
    model = make_model().eval()
    blocks = demo_page(lambda: Session(model, max_new_tokens=5), "a <tiny> model")
    address = launch_demo(blocks, "127.0.0.1", None, False)
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.asked, page.faults, page.address, page.model = [], [], address, model
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.goto(address)
    yield page
    blocks.close()


@needs_gradio
def test_the_demo_in_a_browser(page, picture, tmp_path):
    from playwright.sync_api import expect
    picture.save(tmp_path / "picture.png")
    want, answers = AttentionMap(page.model, picture), page.model.chat(picture)
    page.set_input_files("input[type=file]", tmp_path / "picture.png")
    sight = page.locator("#attention img")
    sight.wait_for(timeout=30_000)
    assert fetched(page, sight, tmp_path).tobytes() == want.paint().tobytes()
    question = page.get_by_label("question")
    question.fill(QUESTION)
    question.press("Enter")
    answer = answers.say(QUESTION, 5)
    expect(page.locator(".bot .message-content, .bot.message").last).to_contain_text(answer, timeout=30_000)
    before, box = sight.get_attribute("src"), sight.bounding_box()
    sight.click(position={"x": box["width"] * 5.5 / 8, "y": box["height"] * 2.5 / 8})
    expect(sight).not_to_have_attribute("src", before, timeout=30_000)
    assert fetched(page, sight, tmp_path).tobytes() == want.paint((2, 5)).tobytes()
    question.fill("is <b>it</b> blue?")
    question.press("Enter")
    expect(page.locator(".user").last).to_contain_text("is <b>it</b> blue?", timeout=30_000)
    expect(page.get_by_text("has never read: <, b, >, it")).to_be_visible(timeout=30_000)
    write_refused(tmp_path)
    for name in ("text.png", "bomb.png"):                      # over the picture that is there
        page.set_input_files("input[type=file]", tmp_path / name)
        expect(page.get_by_text(REFUSED[name])).to_be_visible(timeout=30_000)
        expect(page.locator(".user")).to_have_count(0)
        expect(page.locator("#picture img, #attention img")).to_have_count(0)
    question.fill(QUESTION)
    question.press("Enter")
    expect(page.get_by_text("(I see no picture.)")).to_be_visible(timeout=30_000)
    page.set_viewport_size({"width": 390, "height": 844})      # on a phone the question, and where a picture goes, are in sight
    assert page.locator("#talk").bounding_box()["y"] < question.bounding_box()["y"] < page.locator("#picture").bounding_box()["y"] < 844
    here = page.address.split("/")[2]
    assert {url.split("/")[2] for url in page.asked if url.startswith(("http", "ws"))} == {here} and not page.faults


@needs_gradio
def test_uploads_go_with_the_program(model, picture, tmp_path, monkeypatch):
    ends = []
    monkeypatch.setattr(atexit, "register", lambda end, *_, **__: ends.append(end))
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")                  # both are put back
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "")
    model.save_pretrained(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    page, address = open_demo(tmp_path, port=port)
    folder = Path(os.environ["GRADIO_TEMP_DIR"])
    picture.save(tmp_path / "mine.png")
    with httpx.Client() as client, open(tmp_path / "mine.png", "rb") as file:
        sent, = client.post(f"{address}gradio_api/upload", files={"files": file}).json()
    assert Path(sent).is_relative_to(folder) and len(list(folder.glob("example*.png"))) == 5
    page.close()
    for end in ends:
        end()
    assert not folder.exists()


@needs_gradio
def test_a_connector_that_does_not_scan_has_no_map(make_model):
    page = demo_page(lambda: Session(make_model("mlp").eval(), max_new_tokens=3), "mlp")
    hidden = [block for block in page.blocks.values() if getattr(block, "visible", True) is False]
    assert {getattr(block, "elem_id", None) for block in hidden} >= {"attention"}


def fetched(page, image, folder):
    "The PIL picture that an <img> of the page shows."
    (folder / "shown.png").write_bytes(page.request.get(image.get_attribute("src")).body())
    return Image.open(folder / "shown.png").convert("RGB")
