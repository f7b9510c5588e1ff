"""`check_site.py` finds nothing on a sound site, and on a broken page exactly what is broken."""
import os
import subprocess
import sys

import check_site
import pytest
from check_site import check_in_browser, check_links, check_weights, leads_to, read_pages
from search_names import with_names

ADDRESS = "https://someone.github.io/vlmamba_lite"
HEAD = '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>A page</title><link rel="stylesheet" href="{up}styles.css"></head>'
GOOD = {"index.html": HEAD.format(up="") + f"""<body><main><h1 id="top-of-all">A page</h1><p><a href="ops/scan.html#scan">the scan</a> and <a href="{ADDRESS}/ops/scan.html#scan">again</a>,
<a href="#top-of-all">above</a>, <a href="https://arxiv.org/abs/2312.00752">outside</a>, <a href="/vlmamba_lite/ops/scan.html">from the root</a>, <a href="ops/a%20b.html">a space</a></p>
<img src="picture.svg" alt="a square"><pre style="overflow: auto" tabindex="0"><code>{"wide " * 300}</code></pre></main></body></html>""",
        "ops/scan.html": HEAD.format(up="../") + """<body><main><h1 id="scan">Scan</h1><p><a href="../index.html">back</a></p></main><script src="../own.js"></script></body></html>""",
        "ops/a b.html": HEAD.format(up="../") + "<body><main><h1>Space</h1></main></body></html>",
        "styles.css": "body { margin: 8px; color: #222; } img { max-width: 100%; }", "own.js": "console.log('fine');",
        "picture.svg": '<svg xmlns="http://www.w3.org/2000/svg" width="20" height="20"><rect width="20" height="20"/></svg>'}
BROKEN = HEAD.format(up="") + """<body><main><h1>Broken</h1><p><a href="nowhere.html">a page</a>, <a href="ops/scan.html#gone">an anchor</a>, <a href="#absent">one here</a></p>
<img src="missing.png" alt="not there"><div id="wide" style="width: 700px">far too wide for a phone</div>
<p style="color: #bbb; background: #fff">grey on white</p><button></button></main>
<script>console.error("said so"); nothing();</script><script src="heavy.js"></script></body></html>"""

needs_browser = pytest.mark.skipif(check_site.find_chromium() is None, reason="needs Chromium")
needs_axe = pytest.mark.skipif(check_site.find_axe() is None, reason="needs axe-core")


@pytest.fixture
def site(tmp_path):
    for name, text in GOOD.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


@pytest.fixture
def broken(site):
    (site / "broken.html").write_text(BROKEN, encoding="utf-8")
    (site / "heavy.js").write_bytes(b"// " + os.urandom(1_600_000).hex().encode())
    return site


def of(found, kind):
    return [one.text for one in found if one.kind == kind]


def test_a_sound_site_has_no_findings(site):
    pages = read_pages(site)
    assert len(pages) == 3
    assert not [*check_links(site, pages, ADDRESS), *check_weights(site, pages, ADDRESS)]


def test_links_anchors_and_weight_of_a_broken_page(broken):
    pages = read_pages(broken)
    found = [*check_links(broken, pages, ADDRESS), *check_weights(broken, pages, ADDRESS)]
    assert {one.page for one in found} == {"broken.html"}
    assert of(found, "links") == ["nowhere.html: there is no nowhere.html", "missing.png: there is no missing.png"]
    assert of(found, "anchors") == ["ops/scan.html#gone: there is no #gone in ops/scan.html", "#absent: there is no #absent in broken.html"]
    heavy, = of(found, "weight")
    assert "at most 1,500,000; the largest is heavy.js" in heavy


@pytest.mark.parametrize("page, target, expected", [
    ("ops/scan.html", "../index.html#a", ("index.html", "a")), ("index.html", f"{ADDRESS}/ops/scan.html", ("ops/scan.html", "")), ("ops/scan.html", "#x", ("ops/scan.html", "x")),
    ("index.html", "https://arxiv.org", None), ("index.html", "//cdn.org/x.js", None), ("ops/scan.html", "/vlmamba_lite/", ("index.html", "")), ("index.html", "ops/", ("ops/index.html", ""))])
def test_where_links_lead(page, target, expected):
    assert leads_to(page, target, ADDRESS) == expected


@needs_browser
def test_a_sound_site_in_the_browser(site):
    assert not list(check_in_browser(site, read_pages(site), check_site.find_axe()))


@needs_browser
def test_a_broken_page_in_the_browser(broken):
    found = list(check_in_browser(broken, ["broken.html", "index.html"]))
    assert {one.page for one in found} == {"broken.html"}
    sideways, = of(found, "sideways")
    assert "at 400: div#wide" in sideways and "far too wide" in sideways                # 700 pixels fit a desktop
    console = " ".join(of(found, "console"))
    assert "said so" in console and "nothing is not defined" in console and "404 /missing.png" in console


@needs_browser
@needs_axe
def test_axe_names_what_is_serious(broken):
    found = of(check_in_browser(broken, ["broken.html"], check_site.find_axe()), "axe")
    assert [text for text in found if text.startswith("critical: button-name, 1 times")] and [text for text in found if "color-contrast" in text]


def test_the_command(broken):
    run = subprocess.run([sys.executable, check_site.__file__, str(broken), "--only", "broken.html"], capture_output=True, text=True, timeout=120)
    assert run.returncode == 1 and "links: 2\n    broken.html: nowhere.html" in run.stdout and "4 pages" in run.stdout, run.stdout + run.stderr
    told = [sys.executable, check_site.__file__, str(broken), "--only", "index.html", "--tell", "links", "anchors", "weight"]
    assert subprocess.run(told, capture_output=True, timeout=120).returncode == 0
    empty = subprocess.run([sys.executable, check_site.__file__, str(broken / "ops" / "none")], capture_output=True, text=True, timeout=60)
    assert empty.returncode and "need one with HTML files" in empty.stderr


def test_names_are_added_to_the_search(tmp_path):
    page = """<h1 class="title">Scans</h1><section id="a"><h2 data-anchor-id="a">A</h2><p><em>not this</em></p></section>
<section id="selective_scan"><h3 class="anchored" data-anchor-id="selective_scan">selective_scan</h3><blockquote><pre>def selective_scan(u)</pre></blockquote>
<p><em>A scan: <code>u</code> of shape (b, D, L).</em></p><p>more</p></section><section id="x"><h3 data-anchor-id="x">x</h3></section>"""
    (tmp_path / "ops").mkdir()
    (tmp_path / "ops" / "scan.html").write_text(page, encoding="utf-8")
    entries = [{"objectID": "ops/scan.html#a", "href": "ops/scan.html#a", "title": "Scans", "section": "A", "text": "...", "crumbs": ["Course"]},
               {"objectID": "gone.html", "href": "gone.html", "title": "-", "section": "", "text": ""}]
    more = with_names(tmp_path, entries)
    assert [one["href"] for one in more] == ["ops/scan.html#a", "gone.html", "ops/scan.html#selective_scan", "ops/scan.html#x"]
    assert more[2] == {"objectID": "ops/scan.html#selective_scan", "href": "ops/scan.html#selective_scan", "title": "selective_scan", "section": "Scans",
                       "text": "A scan: u of shape (b, D, L).", "crumbs": ["Course"]}
    assert with_names(tmp_path, more) == more
