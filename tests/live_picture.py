"""Writes nbs/live.png, the picture of the landing page that leads to the live one:  python tests/live_picture.py

The figure of nbs/live.ipynb in Chromium, half way through a picture.
"""
import shutil

from house import NBS, read
from PIL import Image

PAGE = '<!doctype html><html lang="en"><meta charset="utf-8"><body style="margin: 0; background: #fff; color: #222; width: 880px">'


def main():
    from playwright.sync_api import sync_playwright
    html, = ("".join(o.data["text/html"]) for c in read("live").cells for o in c.get("outputs", []) if "text/html" in o.get("data", {}))
    with sync_playwright() as driver:
        program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
        chromium = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": 880, "height": 900}, device_scale_factor=1.5, reduced_motion="reduce")
        page.set_content(PAGE + html)
        page.add_style_tag(content=".explorable { border: 0 !important; margin: 0 !important; }")
        page.get_by_role("button", name="what is in the image?").click()
        page.get_by_label("patches read").fill("36")
        page.evaluate("document.activeElement.blur()")
        bottom = page.locator(".l-states").bounding_box()
        page.screenshot(path=NBS / "live.png", clip={"x": 0, "y": 0, "width": 880, "height": bottom["y"] + bottom["height"] + 8})
        chromium.close()
    Image.open(NBS / "live.png").convert("RGB").quantize(200).save(NBS / "live.png", optimize=True)      # few colours: a third of the bytes


if __name__ == "__main__":
    main()
