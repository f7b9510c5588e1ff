"""Adds the library's names to the search of a built site:  python tests/search_names.py _docs

Quarto's index goes down to the second level of headings; functions and classes stand at the third. An entry each: the name, what its
documentation says first, and the address of its heading. Run twice, it adds nothing twice.
"""
import json
import sys
from html.parser import HTMLParser
from pathlib import Path


class Names(HTMLParser):
    "Headings of the third level with an anchor: [anchor, name, first words below it], in the page's order."
    def __init__(self, text):
        super().__init__()
        self.title, self.found, self.inside = "", [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        anchor = dict(attributes).get("data-anchor-id")
        if tag == "h3" and anchor:
            self.found.append([anchor, "", ""])
        if tag in ("h3", "h1", "em", "h2"):
            self.inside = tag

    def handle_endtag(self, tag):
        if tag == self.inside:
            self.inside = None

    def handle_data(self, data):
        if self.inside == "h1":
            self.title += data
        elif self.inside == "h3" and self.found:
            self.found[-1][1] += data
        elif self.inside == "em" and self.found and len(self.found[-1][2]) < 400:      # a docstring is set in italics
            self.found[-1][2] += data


def with_names(folder, entries):
    "The entries of search.json, and those of the names that they lack."
    known = {entry["href"] for entry in entries}
    crumbs = {entry["href"].partition("#")[0]: entry.get("crumbs", []) for entry in entries}
    for page in crumbs:
        path = folder / page
        names = Names(path.read_text(encoding="utf-8")) if path.is_file() else None
        for anchor, name, text in names.found if names else ():
            href = f"{page}#{anchor}"
            if href not in known:
                entry = {"objectID": href, "href": href, "title": name.strip(), "section": names.title.strip(), "text": text.strip()}
                entries = [*entries, entry | ({"crumbs": crumbs[page]} if crumbs[page] else {})]
    return entries


def main():
    folder = Path(sys.argv[1])
    index = folder / "search.json"
    entries = json.loads(index.read_text(encoding="utf-8"))
    more = with_names(folder, entries)
    index.write_text(json.dumps(more, ensure_ascii=False, indent=2), encoding="utf-8")
    print(f"{len(more) - len(entries)} names added to {len(entries)} entries")


if __name__ == "__main__":
    main()
