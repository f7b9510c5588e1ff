"""The three explorable figures in a real browser: what they show is what Python computes, by keyboard, twice on a page, without a network."""
import json
import math
import re
from html import unescape
from pathlib import Path

import nbformat
import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="needs the [dev] extra")
ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = {"memory": "ops/01_reference", "scan_orders": "connectors/11_vss", "cost": "evaluation/20_cost"}
THEMES = {"light": "background: #fff; color: #222", "dark": "background: #181a1f; color: #dde"}


def outputs_of(name):
    cells = nbformat.read(ROOT / "nbs" / f"{NOTEBOOK[name]}.ipynb", as_version=4).cells
    html = ["".join(o.data["text/html"]) for c in cells for o in c.get("outputs", []) if "text/html" in o.get("data", {})]
    return [text for text in html if f'data-name="{name}"' in text]


def stored(name):
    "The figure as its notebook holds it."
    found, = outputs_of(name)
    return found


def values_of(name):
    return json.loads(unescape(re.search(r'data-values="([^"]*)"', stored(name))[1]))


@pytest.fixture
def load(browser):
    "A function that opens pages: no request leaves them, and at the end none has tried to, or has written to the console."
    said, context = [], browser.new_context()
    context.set_default_timeout(5000)
    context.route("**/*", lambda route: (said.append(f"asks for {route.request.url}"), route.abort()))

    def load(*names, width=800, theme="light"):
        page = context.new_page()
        page.set_viewport_size({"width": width, "height": 900})
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        body = "".join(map(stored, names))
        page.set_content(f'<!doctype html><html lang="en"><meta charset="utf-8"><body style="margin: 8px; {THEMES[theme]}">{body}')
        return page

    yield load
    context.close()
    assert not said


def fact(page, key, nth=0):
    return page.locator(f'[data-fact="{key}"]').nth(nth).inner_text()


def digits(x):
    "As the figures write a number: three digits."
    return f"{round(x):,}" if abs(x) >= 100 else f"{float(f'{x:.3g}'):g}"


def press(page, label, *keys):
    page.get_by_label(label, exact=True).first.focus()
    for key in keys:
        page.keyboard.press(key)


@pytest.mark.parametrize("name", NOTEBOOK)
def test_stored_output_is_current(name):
    "The output in the notebook is made of the files in nbs/explorables as they stand."
    kit, page = ((ROOT / "nbs" / "explorables" / f"{part}.html").read_text(encoding="utf-8") for part in ("kit", name))
    before, after = page.split("{values}")
    assert stored(name).startswith(kit + before) and stored(name).endswith(after)
    assert not re.search(r"https?://(?!www\.w3\.org/)", stored(name))


@pytest.mark.parametrize("name", NOTEBOOK)
def test_without_scripts_something_is_said(browser, name):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.set_content(stored(name))
    assert "picture" in page.locator(".explorable").inner_text()
    context.close()


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("width", (360, 900))
def test_every_page_and_theme(load, width, theme):
    "All three on one page: built, as wide as the page, in the colour of its text, every control and drawing with a name."
    page = load(*NOTEBOOK, width=width, theme=theme)
    assert page.locator(".explorable[data-ready]").count() == 3
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate("[...document.querySelectorAll('.explorable .x-title')].every(e => getComputedStyle(e).color === getComputedStyle(document.body).color)")
    assert page.evaluate("[...document.querySelectorAll('.explorable svg[role]')].every(e => e.getAttribute('aria-label').length > 20)")
    assert page.evaluate("[...document.querySelectorAll('.explorable input')].every(e => e.labels.length === 1)")
    assert page.evaluate("new Set([...document.querySelectorAll('[id]')].map(e => e.id)).size === document.querySelectorAll('[id]').length")


def test_all_controls_are_reached_by_the_keyboard(load):
    page = load("memory")
    reached = []
    for _ in range(7):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.tagName.toLowerCase()"))
        assert page.evaluate("document.activeElement.hasAttribute('data-lm-suppress-shortcuts')")        # or JupyterLab takes its keys
    assert reached[:3] == ["input", "input", "svg"] and "button" in reached


def states(inputs, marked, delta, rate, opened):
    "The chapter's recurrence."
    h, out = 0.0, []
    for x, m in zip(inputs, marked):
        kept = math.exp(-(opened if m else delta) * rate)
        h = kept * h + (1 - kept) * x
        out.append(h)
    return out


def test_memory_half_life(load):
    page = load("memory")
    assert fact(page, "half-life") == digits(math.log(2) / 0.1) == "6.93"                   # by hand: 0.693 / 0.1
    press(page, "step size Δ", *["ArrowRight"] * 4)                                         # 4 steps of a twentieth of a decade
    press(page, "decay rate −A", "ArrowRight", "ArrowRight")
    delta = 10 ** (-1 + 4 * 0.05)
    assert fact(page, "half-life") == digits(math.log(2) / (delta * 3))
    assert fact(page, "kept") == digits(100 * math.exp(-delta * 3)) + " %"
    press(page, "step size Δ", "Home")
    assert fact(page, "half-life") == digits(math.log(2) / (0.001 * 3)) == "231"
    press(page, "decay rate −A", "End")
    press(page, "step size Δ", "End")
    assert fact(page, "half-life") == digits(math.log(2) / (10 ** 0.6 * 16))


def test_memory_states(load):
    page, given = load("memory"), values_of("memory")
    at, inputs, marked = given["marked"].index(True), list(given["inputs"]), list(given["marked"])
    assert fact(page, "state") == f"{states(inputs, marked, 0.1, 1, 5)[at]:.3f}"
    page.locator("svg[role=slider]").focus()
    for key in ["ArrowRight"] * 3 + ["ArrowUp", " "]:                                       # three on, its input up by 0.1, marked
        page.keyboard.press(key)
    at += 3
    inputs[at], marked[at] = round((inputs[at] + 0.1) * 20) / 20, True
    assert fact(page, "state") == f"{states(inputs, marked, 0.1, 1, 5)[at]:.3f}"
    assert f"token {at}, input {inputs[at]:.2f}, marked" in page.locator("svg[role=slider]").get_attribute("aria-valuetext")


def test_memory_drag_and_presets(load):
    page = load("memory")
    page.get_by_role("button", name="one pulse").click()
    box = page.locator("svg[role=slider]").bounding_box()
    gap = (box["width"] - 46) / 30
    x = box["x"] + 34 + 5.5 * gap
    page.mouse.move(x, box["y"] + 84)
    page.mouse.down()
    page.mouse.move(x, box["y"] + 84 - 36)                                                  # up to 1
    page.mouse.up()
    pulse = [float(t in (3, 5)) for t in range(30)]
    assert fact(page, "state") == f"{states(pulse, [False] * 30, 0.1, 1, 5)[5]:.3f}"
    page.mouse.click(x, box["y"] + 170)                                                     # below the bar: marked
    assert fact(page, "state") == f"{states(pulse, [t == 5 for t in range(30)], 0.1, 1, 5)[5]:.3f}"


def seen_of(order, patch, steps):
    "By definition: what the scans (lists of patches) have brought to a patch after so many steps."
    found = [path[:path.index(patch) + 1] if patch in path[:steps] else [] for path in order]
    return " + ".join(str(len(f)) for f in found), len(set().union(*found))


def test_scan_orders_are_those_of_the_chapter():
    from vlmamba_lite.connectors.vss import SCANS, scan_order
    given = values_of("scan_orders")
    one_way, *kinds = given["kinds"]
    assert [kind["name"] for kind in kinds] == ["bsm", "csm"] and one_way["order"] == kinds[0]["order"][:1]
    for kind in kinds:
        assert kind["order"] == scan_order(given["height"], given["width"], kind["name"]).tolist()
        assert kind["names"][:len(SCANS[kind["name"]])] == SCANS[kind["name"]]


@pytest.mark.parametrize("steps", (0, 28, 29))
def test_scan_orders_seen(load, steps):
    page, given = load("scan_orders"), values_of("scan_orders")
    length, patch = given["height"] * given["width"], given["patch"]
    press(page, "steps walked", "Home", *["ArrowRight"] * steps)
    for kind in given["kinds"]:
        page.get_by_label(kind["label"], exact=True).check()
        each, together = seen_of(kind["order"], patch, steps)
        assert (fact(page, "each"), fact(page, "together")) == (each, f"{together} of {length}")
    page.locator(".x-panels svg").first.focus()
    page.keyboard.press("ArrowDown")
    each, together = seen_of(kind["order"], patch + given["width"], steps)
    assert (fact(page, "each"), fact(page, "together")) == (each, f"{together} of {length}")


def test_scan_orders_play_and_pause(load):
    page = load("scan_orders")
    press(page, "steps walked", "Home")
    page.clock.install()
    page.get_by_role("button", name="Play").click()
    page.clock.run_for(950)
    page.get_by_role("button", name="Pause").click()
    walked = page.locator(".x-slider output").inner_text()
    page.clock.run_for(950)
    assert walked == page.locator(".x-slider output").inner_text() and 10 <= int(walked.split()[0]) < 20    # a step each 90 ms
    page.get_by_role("button", name="Start again").click()
    page.get_by_role("button", name="Step").click()
    assert page.locator(".x-slider output").inner_text() == "1 of 64"


def test_cost_is_what_was_measured(load):
    "At every length: the value of the result file where there is one, the fitted line elsewhere, and the figure says which."
    page, given = load("cost"), values_of("cost")
    result = json.loads((ROOT / "data" / "results" / "bench_scaling.json").read_text(encoding="utf-8"))
    rows = {(row["model"], row["length"]): row["prefill"]["cpu_seconds"] for row in result["lengths"]}
    press(page, "tokens read", "Home")
    for length in given["lengths"]:
        for model in given["models"]:
            fit = given["fits"]["prefill"][model]
            expected = rows.get((model, length), fit["c"] * length ** fit["p"])
            assert fact(page, model) == digits(expected) + " s"
            under = page.locator(f'[data-fact="{model}"] + small').inner_text()
            assert ("not measured" in under) == ((model, length) not in rows)
        page.keyboard.press("ArrowRight")


def test_cost_of_every_kind(load):
    page, given = load("cost"), values_of("cost")
    for cost in given["costs"]:
        page.get_by_label(cost["label"], exact=True).check()
        for model in given["models"]:
            expected = dict(given["points"][cost["key"]][model])[given["start"]]
            assert fact(page, model) == f"{digits(expected)} {cost['unit']}"


def test_colab_link(browser):
    "What colab.html adds to a page of the site: the address of the same notebook, made from the link to its source."
    page = browser.new_page()
    url = "github.com/someone/vlmamba_lite/blob/main/nbs/ops/01_reference.ipynb"
    page.set_content(f'<ul><li><a href="https://{url}" class="toc-action"><i></i>View source</a></li></ul>' + (ROOT / "nbs" / "colab.html").read_text())
    link = page.get_by_text("Open in Colab")
    assert link.get_attribute("href") == "https://colab.research.google.com/" + url.replace("github.com", "github")
    assert "git clone -q https://github.com/someone/vlmamba_lite" in link.get_attribute("title")
    assert link.get_attribute("title").endswith("%cd vlmamba_lite/nbs/ops")
    page.close()


@pytest.mark.parametrize("notebook, folded", [("ops/01_reference", [True, False, False]), ("ops/triton", [True, True, False])])
def test_what_is_folded_on_the_site(browser, notebook, folded):
    "Imports everywhere, exported source in the workshop; other code stays open. What scrolls can be reached by keyboard, the search has a name."
    page = browser.new_page(viewport={"width": 400, "height": 600})
    url = f"https://github.com/someone/vlmamba_lite/blob/main/nbs/{notebook}.ipynb"
    cells = [("Exported source", "import torch\nfrom x import (a,\n   b)\n\n# a remark"), ("Exported source", "def f():\n    return 1"), ("Code", "x = f()  # " + "long " * 60)]
    page.set_content(f'<ul><li><a href="{url}" class="toc-action"><i></i>View source</a></li></ul><div id="quarto-search"><button></button></div><main>' + "".join(
        f'<details class="code-fold" open><summary>{summary}</summary><pre style="overflow: auto"><code>{code}</code></pre></details>' for summary, code in cells)
        + "</main>" + (ROOT / "nbs" / "colab.html").read_text())
    assert page.evaluate("[...document.querySelectorAll('details')].map(d => !d.open)") == folded
    assert page.evaluate("[...document.querySelectorAll('pre')].map(p => p.tabIndex)")[2] == 0
    assert page.locator("#quarto-search button").get_attribute("aria-label") == "Search"
    page.close()


@pytest.mark.parametrize("name", NOTEBOOK)
def test_twice_on_a_page(load, name):
    "Two of a kind have each their own state, and running the script again builds none twice."
    page = load(name, name)
    assert page.locator(".explorable[data-ready]").count() == 2
    before = page.locator(".explorable").nth(1).inner_text()
    page.locator(".explorable").nth(0).get_by_role("slider").first.focus()
    page.keyboard.press("ArrowLeft")
    assert page.locator(".explorable").nth(1).inner_text() == before != page.locator(".explorable").nth(0).inner_text()
