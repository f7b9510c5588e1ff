"""How long the way through the house is:  python tests/trace_ask.py [--list]  asks a tiny model one question and follows the calls.

Counted are the functions and methods of the library that have a name, each once however often it is called, and how often a call enters
another module than the call before. A generator counts whenever it goes on, as it does for the reader who follows it.
"""
import inspect
import sys
import tempfile
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import torch
from PIL import Image

FUNCTIONS, CHANGES = 90, 100            # bars: fewer may be called, not more
ROOT = Path(__file__).resolve().parent.parent
LIBRARY = str(ROOT / "vlmamba_lite")


def calls_of(run):
    "The calls of named functions of the library that `run()` makes, in order: (module, name)."
    calls = []

    def note(frame, event, _):
        code = frame.f_code
        named = code.co_flags & inspect.CO_OPTIMIZED and not code.co_name.startswith("<")         # no bodies of classes and modules
        if event == "call" and code.co_filename.startswith(LIBRARY) and named:
            module = code.co_filename[len(LIBRARY) + 1:].removesuffix(".py").replace("/", ".")
            calls.append((module, getattr(code, "co_qualname", code.co_name).replace(".<locals>", "")))
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return calls


def trace(folder):
    "The calls of `vlmamba ask` about a picture, with a tiny model that is saved in `folder`."
    from vlmamba_lite.cli.commands import app
    from vlmamba_lite.data.conversations import build_tokenizer
    from vlmamba_lite.model.vlmamba import VLMamba
    question = "what color is the shape ?"
    torch.manual_seed(0)
    VLMamba.from_preset("tiny", build_tokenizer([question, "red"])).save_pretrained(Path(folder) / "model")
    Image.new("RGB", (80, 60), "red").save(Path(folder) / "picture.png")
    words = ["ask", f"{folder}/model", f"{folder}/picture.png", question]
    with redirect_stdout(StringIO()):
        return calls_of(lambda: app(words, standalone_mode=False))


def changes(calls):
    "How often a call enters another module than the one before."
    return sum(a[0] != b[0] for a, b in zip(calls, calls[1:]))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as folder:
        calls = trace(folder)
    if "--list" in sys.argv:
        for module, name in dict.fromkeys(calls):
            print(f"{calls.count((module, name)):>5}  {module}.{name}")
    if "--all" in sys.argv:
        print(*(f"{module}.{name}" for module, name in calls), sep="\n")
    print(f"{len(set(calls))} functions (at most {FUNCTIONS}), {changes(calls)} changes of module (at most {CHANGES}), {len(calls)} calls")
    raise SystemExit(len(set(calls)) > FUNCTIONS or changes(calls) > CHANGES)
