"""Packaging: every value comes from settings.ini (the nbdev 2 configuration)."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(HERE / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]

LICENSES = {"apache2": "Apache-2.0"}
LIB = cfg["lib_path"]
# The embedded data sets: in a wheel they lie inside the package, in a checkout they stay in data/.
DATA = {f"{LIB}.easy_vqa": "data/easy_vqa", f"{LIB}.emoji": "data/emoji"}


def words(key):
    return cfg.get(key, "").split()


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license=LICENSES[cfg["license"]],
    keywords=cfg["keywords"],
    packages=find_packages(include=[LIB, f"{LIB}.*"]) + list(DATA),
    package_dir=DATA,
    package_data={**{package: ["*.parquet", "README.md"] for package in DATA}, LIB: ["*.json"], f"{LIB}.ops": ["*.cpp"]},
    python_requires=f">={cfg['min_python']}",
    install_requires=words("requirements"),
    extras_require={extra: words(f"{extra}_requirements") for extra in ("dev", "demo", "export", "hf", "llama", "lmms", "cuda")},
    entry_points={"console_scripts": words("console_scripts"), "nbdev": [f"{LIB}={LIB}._modidx:d"],
                  "lmms_eval.models": [f"vlmamba={LIB}.evaluation.lmms:manifest"]},
    zip_safe=False,
)
