"""Looks a built site over:  python tests/check_site.py _docs  prints what it finds, kind by kind, and exits with 1 if there is anything.

Links and anchors inside the site, the weight of each page, and in Chromium: errors in the console, files that fail to load, pages that scroll sideways
on a phone (400 px) and a desktop (1280 px), and what axe-core calls serious or critical, in the light and the dark theme. axe-core is taken from
--axe, from node_modules or from the global packages of npm; without it this part is left out and the last lines say so. Chromium likewise.
"""
import argparse
import functools
import gzip
import http.server
import shutil
import subprocess
import threading
from collections import defaultdict
from configparser import ConfigParser
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

ROOT = Path(__file__).resolve().parent.parent
WIDTHS, HEAVIEST = (400, 1280), 1_500_000          # pixels; bytes of a page with all of the site's files that it loads
TEXTS = {".html", ".css", ".js", ".json", ".svg"}  # servers send these compressed
LOADED = {"script": "src", "img": "src", "link": "href", "source": "src", "video": "src", "iframe": "src", "object": "data"}


class Finding(NamedTuple):
    "What is wrong: its kind, the page below the site's folder, and in words what it is."
    kind: str
    page: str
    text: str


class Page(HTMLParser):
    "A page's anchors, its links, and the files it loads."
    def __init__(self, text):
        super().__init__()
        self.anchors, self.links, self.files = {"", "top"}, [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.anchors |= {given.get("id"), given.get("name") if tag == "a" else None}
        if tag in ("a", "area") and given.get("href"):
            self.links.append(given["href"])
        elif tag in LOADED and given.get(LOADED[tag]) and (tag != "link" or given.get("rel") not in ("canonical", "alternate", "next", "prev")):
            self.files.append(given[LOADED[tag]])


def settings():
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


# Files

def read_pages(folder):
    "{name below the folder: Page} of all HTML files."
    return {path.relative_to(folder).as_posix(): Page(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.html"))}


def leads_to(page, target, address):
    "(file below the site's folder, anchor) of a link, or None where it leads out of the site."
    target = target.removeprefix(address) if target.startswith(address + "/") else target
    if target.startswith("/") and not target.startswith("//"):
        target = target.removeprefix(urlsplit(address).path)
        page = "index.html"
        target = target.lstrip("/") or "index.html"
    parts = urlsplit(target)
    if parts.scheme or parts.netloc:
        return None
    file, anchor = urldefrag(urljoin(f"http://site/{page}", target))
    file = unquote(urlsplit(file).path).lstrip("/")
    return (f"{file}index.html" if not file or file.endswith("/") else file), unquote(anchor)


def check_links(folder, pages, address):
    "Links and loaded files that lead nowhere inside the site, and anchors that are not there."
    for name, page in pages.items():
        for target in dict.fromkeys([*page.links, *page.files]):
            if target.startswith(("data:", "javascript:", "mailto:")) or (found := leads_to(name, target, address)) is None:
                continue
            file, anchor = found
            if not (folder / file).is_file():
                yield Finding("links", name, f"{target}: there is no {file}")
            elif anchor and file in pages and anchor not in pages[file].anchors:
                yield Finding("anchors", name, f"{target}: there is no #{anchor} in {file}")


def weight(path):
    "Bytes that a server sends for a file."
    data = path.read_bytes()
    return len(gzip.compress(data, 6, mtime=0)) if path.suffix in TEXTS else len(data)


def check_weights(folder, pages, address):
    "Pages that are heavier than HEAVIEST, with all files of the site that they load."
    known = functools.cache(weight)
    for name, page in pages.items():
        found = {leads_to(name, target, address) for target in page.files if not target.startswith("data:")} - {None}
        files = {file for file, _ in found if (folder / file).is_file()}
        parts = {file: known(folder / file) for file in {name, *files}}
        if (total := sum(parts.values())) > HEAVIEST:
            largest = max(parts, key=parts.get)
            yield Finding("weight", name, f"{total:,} bytes, at most {HEAVIEST:,}; the largest is {largest} with {parts[largest]:,}")


# In the browser

def find_axe():
    "The path of axe-core, or None."
    places = [ROOT / "node_modules"]
    if shutil.which("npm"):
        places.append(Path(subprocess.run(["npm", "root", "-g"], capture_output=True, text=True).stdout.strip()))
    return next((path for place in places if (path := place / "axe-core" / "axe.min.js").is_file()), None)


def find_chromium():
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


SIDEWAYS = """() => {
  if (document.documentElement.scrollWidth <= innerWidth) return null;
  const scrolls = e => { for (let p = e.parentElement; p && p !== document.body; p = p.parentElement) if (getComputedStyle(p).overflowX !== "visible") return true; return false; };
  const wide = [...document.body.querySelectorAll("*")].filter(e => e.getBoundingClientRect().right > innerWidth + 1 && !scrolls(e));
  const name = e => e.tagName.toLowerCase() + (e.id ? "#" + e.id : "") + [...e.classList].slice(0, 2).map(c => "." + c).join("") + " " + JSON.stringify(e.textContent.trim().slice(0, 40));
  return [document.documentElement.scrollWidth, wide.filter(e => !wide.some(o => o !== e && e.contains(o))).slice(0, 3).map(name)];
}"""
AXE = """() => axe.run(document, {resultTypes: ["violations"], preload: false}).then(r => r.violations.filter(v => ["serious", "critical"].includes(v.impact))
  .map(v => [v.impact, v.id, v.nodes.length, v.nodes[0].target.join(" ")]))"""


def serve(folder):
    "A server of the folder at an own port of this machine, in a thread."
    handler = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def look_at(page, name, start, axe):
    "The findings of one page that is open: sideways at every width, axe in both themes; what is said meanwhile others collect."
    page.goto(f"{start}/{name}", wait_until="load")
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 900})
        page.wait_for_timeout(150)
        if (found := page.evaluate(SIDEWAYS)) is not None:
            yield Finding("sideways", name, f"{found[0]} px wide at {width}: {', '.join(found[1])}")
    if axe is None:
        return
    page.add_script_tag(path=axe)
    toggle = page.locator("a.quarto-color-scheme-toggle:visible").first
    for theme in ("light", "dark")[:1 + (toggle.count() > 0)]:
        if theme == "dark":
            toggle.click()
            page.wait_for_timeout(300)
        for impact, rule, count, target in page.evaluate(AXE):
            yield Finding("axe", name, f"{impact}: {rule}, {count} times in the {theme} theme, as at {target}")


def check_in_browser(folder, pages, axe=None, online=False):
    "The findings of all pages in Chromium. Others' servers are asked only where `online`."
    from playwright.sync_api import sync_playwright
    server = serve(folder)
    start = f"http://127.0.0.1:{server.server_port}"
    try:
        with sync_playwright() as driver:
            chromium = driver.chromium.launch(executable_path=find_chromium(), args=["--no-sandbox"])
            for name in pages:
                context, said = chromium.new_context(viewport={"width": WIDTHS[-1], "height": 900}), []
                if not online:
                    context.route(lambda url: not url.startswith(start), lambda route: route.fulfill(status=200, body=""))
                page = context.new_page()
                page.on("console", lambda m: said.append(m.text) if m.type == "error" and m.location["url"].startswith((start, "about:")) else None)
                page.on("pageerror", lambda error: said.append(str(error)))
                page.on("response", lambda r: said.append(f"{r.status} {r.url.removeprefix(start)}") if r.status >= 400 and r.url.startswith(start) else None)
                yield from look_at(page, name, start, axe)
                yield from (Finding("console", name, text) for text in dict.fromkeys(said) if not text.startswith("Failed to load resource"))
                context.close()
            chromium.close()
    finally:
        server.shutdown()
        server.server_close()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the built site")
    parser.add_argument("--axe", type=Path, help="axe.min.js")
    parser.add_argument("--online", action="store_true", help="let pages ask others' servers, as for fonts and MathJax")
    parser.add_argument("--only", nargs="*", help="these pages, as index.html; all of them are read for links")
    parser.add_argument("--tell", nargs="*", default=[], help="kinds that are told and are no failure, as axe")
    given = parser.parse_args()
    pages, address = read_pages(given.folder), settings()["doc_host"] + settings()["doc_baseurl"]
    if not pages:
        raise SystemExit(f"folder: got {given.folder}, need one with HTML files")
    found, left_out = [*check_links(given.folder, pages, address), *check_weights(given.folder, pages, address)], []
    axe = given.axe or find_axe()
    if find_chromium() is None:
        left_out.append("Chromium is not installed: console, sideways and axe were not looked at")
    else:
        found += check_in_browser(given.folder, given.only or pages, axe, given.online)
        if axe is None:
            left_out.append("axe-core is not installed (npm install axe-core): axe was not looked at")
    kinds = defaultdict(list)
    for one in found:
        kinds[one.kind].append(one)
    for kind in ("links", "anchors", "weight", "console", "sideways", "axe"):
        print(f"{kind}: {len(kinds[kind])}", *(f"{one.page}: {one.text}" for one in kinds[kind]), sep="\n    ")
    print(f"\n{len(pages)} pages", *left_out, sep="\n")
    raise SystemExit(any(one.kind not in given.tell for one in found))


if __name__ == "__main__":
    main()
