"""What the tests of the whole model share: a small part of easy-VQA, and models small enough to run in no time."""
import os
import shutil
import signal
import time
from types import SimpleNamespace

import pytest

BEGAN = time.time()
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")     # before torch is loaded: the tests share the cores, one thread each


def pytest_sessionfinish(session, exitstatus):
    "With $TEST_TIME_FILE set, a whole and passing run says there how long it took: the figure of the README."
    path = os.environ.get("TEST_TIME_FILE")
    if path and exitstatus == 0 and not hasattr(session.config, "workerinput"):
        from vlmamba_lite.training.results import write_result
        write_result(path, tests=session.testscollected, wall_seconds=round(time.time() - BEGAN, 1))


@pytest.fixture(scope="session", autouse=True)
def interruptible():
    "Ctrl-C means something, also where the shell that began the tests ignores it, as it does for what runs in its background."
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def small():
    "40 pictures of easy-VQA's training split: `.rows` as on disk, their `.tokenizer`, `.data` and, with captions, `.train` as `VQASet`s."
    from vlmamba_lite.data.conversations import build_tokenizer
    from vlmamba_lite.data.easy_vqa import build_set, load_easy_vqa
    rows = load_easy_vqa("train").select(range(0, 3600, 90))
    tokenizer = build_tokenizer(text for name in ("questions", "answers") for texts in rows[name] for text in texts)
    return SimpleNamespace(rows=rows, tokenizer=tokenizer, data=build_set(rows, tokenizer), train=build_set(rows, tokenizer, captions=True))


@pytest.fixture(scope="session")
def make_model(small):
    "A function: a new tiny `VLMamba` with random weights, of any connector, mixer, and field of `MambaConfig`."
    from inspect import signature

    import torch

    from model_cases import HYBRID
    from vlmamba_lite.connectors.connectors import CONNECTORS
    from vlmamba_lite.model.presets import tiny_config
    from vlmamba_lite.model.vlmamba import VLMamba

    def make(connector="vss_l2", mixer="mamba2", seed=0, **language):
        config = tiny_config(small.tokenizer.get_vocab_size())
        config.connector = connector
        if "scan" not in signature(CONNECTORS[connector]).parameters:
            config.connector_args = {}
        args = {"mamba": dict(d_state=4), "mamba2": dict(d_state=8, headdim=8, chunk_size=32)}
        for name, value in (HYBRID if mixer == "hybrid" else dict(mixer=mixer, mixer_args=args[mixer])).items():
            setattr(config.language, name, value)
        for name, value in language.items():
            setattr(config.language, name, value)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return VLMamba(config, small.tokenizer)

    return make


@pytest.fixture(scope="module")
def browser():
    "Chromium, for the tests of pages; they are skipped where it or playwright is missing."
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the [dev] extra")
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("needs Chromium")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield chromium
        chromium.close()
