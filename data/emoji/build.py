"""Builds emoji.parquet and the tables of README.md from eight npm packages: things as seven artists draw them.

    pip install "resvg-py==0.5.0" pillow pyarrow datasets && python data/emoji/build.py [--check] [FOLDER]

FOLDER: where the packages lie or are put by `npm pack`; by default a temporary one. The same packages give the same
bytes: the last line printed is their SHA-256, which README.md states. --check: writes nothing, fails where the bytes
differ from those of emoji.parquet.
"""
import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
from collections import Counter
from pathlib import Path

import resvg_py
from datasets import Dataset, Features, Image, Value
from PIL import Image as Picture
from PIL import features

HERE, SIZE = Path(__file__).parent, 64
NAMES = ("emojibase-data-17.0.0", "MIT", "Miles Johnson", "d01d0e2ca4e2")     # names, groups and subgroups, by Unicode's CLDR
ARTISTS = {           # artist: package, licence, who drew, the beginning of the SHA-256 of the package
    "noto": ("iconify-json-noto-1.2.9", "Apache-2.0", "Google, github.com/googlefonts/noto-emoji", "3e918d88fc94"),
    "noto-v1": ("iconify-json-noto-v1-1.2.5", "Apache-2.0", "Google, github.com/googlefonts/noto-emoji", "2bf62c26c2c2"),
    "twemoji": ("iconify-json-twemoji-1.2.5", "CC-BY-4.0", "Twitter, github.com/jdecked/twemoji", "19046dff7d87"),
    "fluent": ("iconify-json-fluent-emoji-1.2.7", "MIT", "Microsoft, github.com/microsoft/fluentui-emoji", "8044210dbf11"),
    "fluent-flat": ("iconify-json-fluent-emoji-flat-1.2.6", "MIT", "Microsoft, github.com/microsoft/fluentui-emoji", "7d064769dee6"),
    "emojione": ("iconify-json-emojione-1.2.3", "CC-BY-4.0", "EmojiOne, github.com/EmojiTwo/emojitwo", "26a14f442844"),
    "fxemoji": ("iconify-json-fxemoji-1.2.2", "Apache-2.0", "Mozilla, github.com/mozilla/fxemoji", "f3e72b3c59d0")}
GROUPS = ("animals-nature", "food-drink", "travel-places", "activities", "objects")       # of ten; the rest is left out
FEWEST = 5            # artists who drew a thing that is kept
FEATURES = Features({"image": Image(), "name": Value("string"), "group": Value("string"), "subgroup": Value("string"),
                     "artist": Value("string")})


def unpack(package, sha256, folder):
    "Reads a package, fetched if need be: {name of a file: its json}."
    file = folder / f"{package}.tgz"
    if not file.is_file():
        scoped = re.sub("^iconify-json-", "@iconify-json/", package)
        subprocess.run(["npm", "pack", "--silent", re.sub(r"-(?=[\d.]+$)", "@", scoped)], cwd=folder, check=True)
    got = hashlib.sha256(file.read_bytes()).hexdigest()
    if not got.startswith(sha256):
        raise SystemExit(f"{file.name}: got SHA-256 {got}, need {sha256}...")
    with tarfile.open(file) as tar:
        wanted = ("icons.json", "chars.json", "info.json", "en/data.json", "meta/groups.json")
        parts = {m.name.removeprefix("package/"): m for m in tar.getmembers()}
        return {name: json.load(tar.extractfile(parts[name])) for name in wanted if name in parts}


def slug(text):
    return re.sub("[^a-z0-9]+", "-", re.sub("[’']", "", text.lower())).strip("-")


def find(thing, joined, chars):
    "The key of a thing among an artist's icons: by its code, else by its name in CLDR or in Unicode; None without one."
    code, letters = thing["hexcode"].lower(), thing["emoji"].replace("\ufe0f", "")
    if key := chars.get(code) or chars.get(code.replace("-fe0f", "")):
        return key
    names = [slug(thing["label"]), slug(unicodedata.name(letters, "")) if len(letters) == 1 else ""]
    return next((key for key in map(joined.get, (name.replace("-", "") for name in names)) if key), None)


def draw(pack, key):
    "An icon as the bytes of a WebP picture without loss, SIZE x SIZE pixels, its ground transparent. (PNG takes twice as much.)"
    icon, flips = pack["icons"].get(key), set()
    while icon is None:                                                        # an alias, perhaps of an alias
        alias = pack["aliases"][key]
        if set(alias) - {"parent", "hFlip"}:
            raise ValueError(f"{key}: got an alias with {sorted(alias)}, need a parent and no change but a mirror")
        flips ^= {"mirror"} if alias.get("hFlip") else set()
        key = alias["parent"]
        icon = pack["icons"].get(key)
    left, top = icon.get("left", 0), icon.get("top", 0)
    width, height = (icon.get(side, pack.get(side, 16)) for side in ("width", "height"))
    side = max(width, height)                                                  # a square around the drawing
    box = f"{left - (side - width) / 2:g} {top - (side - height) / 2:g} {side:g} {side:g}"
    svg = (f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{box}" '
           f'width="{SIZE}" height="{SIZE}">{icon["body"]}</svg>')
    page = Picture.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True)))).convert("RGBA")
    page = page.transpose(Picture.Transpose.FLIP_LEFT_RIGHT) if flips else page
    if page.size != (SIZE, SIZE) or not page.getbbox():
        raise ValueError(f"{key}: got {page.size} and the box {page.getbbox()}, need a drawing of {SIZE} pixels")
    out = io.BytesIO()
    page.save(out, "WEBP", lossless=True, quality=100, method=4, exact=False)
    return out.getvalue()


def plain(label):
    "A name of letters, digits and single spaces, as a word-level tokenizer reads it."
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", label.lower()).replace("’", "").replace("'", "")))


def build(folder):
    base = unpack(NAMES[0], NAMES[3], folder)
    groups, subgroups = base["meta/groups.json"]["groups"], base["meta/groups.json"]["subgroups"]
    packs = {artist: unpack(row[0], row[3], folder) for artist, row in ARTISTS.items()}
    icons = {artist: pack["icons.json"] for artist, pack in packs.items()}
    joined = {artist: {key.replace("-", ""): key for key in [*pack["icons"], *pack.get("aliases", {})]} for artist, pack in icons.items()}
    rows, left_out, kept = [], Counter(), Counter()
    for thing in sorted(base["en/data.json"], key=lambda t: (t.get("order", 10**6), t["hexcode"])):
        group = groups.get(str(thing.get("group")), "regional-indicators")
        keys = {artist: find(thing, joined[artist], pack.get("chars.json", {})) for artist, pack in packs.items() if group in GROUPS}
        keys = {artist: key for artist, key in keys.items() if key}
        if len(keys) < FEWEST:
            left_out[group if group not in GROUPS else f"{group}, fewer than {FEWEST} artists"] += 1
            continue
        for artist, key in keys.items():
            rows.append({"image": {"bytes": draw(icons[artist], key), "path": None}, "name": plain(thing["label"]),
                         "group": group, "subgroup": subgroups[str(thing["subgroup"])], "artist": artist})
    times = Counter((row["artist"], row["image"]["bytes"]) for row in rows)     # one icon for two names: which one it is, is not said
    rows = [row for row in rows if times[row["artist"], row["image"]["bytes"]] == 1]
    drawn = Counter(row["name"] for row in rows)
    few = {row["name"]: row["group"] for row in rows if drawn[row["name"]] < FEWEST}
    left_out.update(f"{group}, fewer than {FEWEST} artists" for group in few.values())
    rows = [row for row in rows if row["name"] not in few]
    kept.update({row["name"]: row["group"] for row in rows}.values())
    return rows, kept, left_out


if __name__ == "__main__":
    check, folders = "--check" in sys.argv, [text for text in sys.argv[1:] if text != "--check"]
    with tempfile.TemporaryDirectory() as temporary:
        rows, kept, left_out = build(Path(folders[0] if folders else temporary))
    names = {}
    for row in rows:
        names.setdefault(row["name"], []).append(row["artist"])
    twice = [name for name, artists in names.items() if len(artists) != len(set(artists))]
    if twice:
        raise SystemExit(f"names: got {twice} twice")
    file = HERE / "emoji.parquet"
    stands = file.read_bytes() if check else None
    file = Path(tempfile.mkdtemp()) / file.name if check else file
    Dataset.from_list(rows, features=FEATURES).to_parquet(file)
    print("resvg", resvg_py.__resvg_version__, "webp", features.version("webp"))
    print(f"{len(rows):,} pictures of {len(names)} things, {file.stat().st_size:,} bytes")
    for title, counts in (("kept", kept), ("left out", left_out), ("pictures", Counter(row["artist"] for row in rows))):
        print(title, dict(counts))
    print(hashlib.sha256(file.read_bytes()).hexdigest())
    if check and file.read_bytes() != stands:
        raise SystemExit("emoji.parquet: got other bytes than those that stand here")
