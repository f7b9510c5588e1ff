"""Files changed at random end in a result or in one line of error: see fuzz.py."""
import json
import random
import time

import fuzz
import pytest

from vlmamba_lite.cli.settings import read_settings, resolve_settings
from vlmamba_lite.connectors.msc import MVSS
from vlmamba_lite.language.model import MambaConfig
from vlmamba_lite.layers.mamba2 import Mamba2
from vlmamba_lite.model.presets import MODEL_PRESETS, VLMambaConfig, preset_config
from vlmamba_lite.training.results import check_run_config, plot_curves, read_metrics


def test_two_thousand_changes_end_in_a_result_or_one_line(tmp_path):
    before = time.process_time()
    done, finds = fuzz.fuzz(tmp_path, 2000)
    seconds = time.process_time() - before
    assert done == 2000 and not finds, "\n".join(f"{number}: {text}" for text, (number, _) in finds.items())
    assert seconds <= 60


def test_the_fuzzer_sees_what_is_wrong(tmp_path):
    def raising(error):
        def read(folder):
            raise error
        return read
    for error in (KeyError("a"), TypeError("a"), RecursionError(), RuntimeError("a: b"), MemoryError(), ValueError("no name at all"), ValueError("a: b\nc")):
        assert fuzz.fault(raising(error), tmp_path, "x.json"), error
    for error in (ValueError("a: got b"), FileNotFoundError("no x.json")):
        assert fuzz.fault(raising(error), tmp_path, "y/x.json") is None
    changes = {fuzz.change_json(b'{"a": [1, {"b": null}]}', random.Random(i)) for i in range(200)}
    assert len(changes) > 100 and {fuzz.change_json(b'{"a": [1]}', random.Random(3)) for _ in range(3)} == {fuzz.change_json(b'{"a": [1]}', random.Random(3))}


# what it found

@pytest.mark.parametrize("args, words", [({"d_state": 0}, "d_state: got 0"), ({"d_conv": 0}, "d_conv: got 0"), ({"expand": 0}, "^connector_args: "),
                                         ({"dt_rank": 0}, "^connector_args: ")])
def test_a_connector_that_cannot_be_built_is_refused_with_the_settings(args, words):
    with pytest.raises(ValueError, match=words):
        resolve_settings({"preset": "tiny", "model": {"connector_args": args}})


def test_layers_are_bounded_and_sizes_at_least_one():
    for wrong, words in (({"n_layer": 10 ** 9}, "n_layer: got 1000000000"), ({"mixer_args": {"d_state": 0}}, "d_state: got 0"), ({"norm_eps": "x"}, "norm_eps: got 'x'")):
        with pytest.raises(ValueError, match=words):
            MambaConfig(**wrong)
    with pytest.raises(ValueError, match="blocks: got 4194304, need .* from 0 to 1,024"):
        preset_config("tiny", 9, connector="msc_advanced", connector_args={"blocks": 2 ** 22})
    with pytest.raises(ValueError, match="depth: got 4194304"):
        VLMambaConfig({"kind": "vit", "dim": 8, "depth": 2 ** 22}, "mlp", {}, MODEL_PRESETS["tiny"](9).language)


@pytest.mark.parametrize("text", ["a: &a [*a]", f"a: {fuzz.BOMB}"])
def test_yaml_says_each_value_itself(tmp_path, text):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match="got an alias, need the value itself"):
        read_settings(tmp_path / "a.yaml")


@pytest.mark.parametrize("line", ["[" * 99_999, "[]", "3", '{"step": "1"}', '{"step": true}', '{"step": -1}', '{"step": 1e3}', f'{{"step": {"9" * 30}}}', '{"loss": 1}',
                                  '{"step": 2, "loss": "1"}', '{"step": 2, "loss": [1]}', f'{{"step": 2, "loss": {"9" * 400}}}', '{"step": 2, "validation": 3}',
                                  '{"step": 2, "validation": {"all": "x"}}', '{"step": 2, "validation": {"all": null}}'])
def test_a_line_of_metrics_that_holds_no_numbers(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1}) + "\n" + line + "\n")
    with pytest.raises(ValueError, match="line 2 holds no numbers"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_curves_of_odd_numbers_are_drawn(tmp_path):
    "What is no number, or none at all, is left out."
    lines = ['{"step": 1, "loss": NaN}', '{"step": 2, "loss": -1.0, "validation": {}}', '{"step": 3, "loss": Infinity}', '{"step": 2, "validation": {"$\\\\frac$": 0.5}}',
             '{"step": 4, "validation": {"all": -Infinity, "loss": NaN}}', '{"step": 9223372036854775807, "loss": 0}', '{"step": 7}']
    for n in range(len(lines) + 1):
        (tmp_path / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines[n:]))
        plot_curves(read_metrics(tmp_path / "metrics.jsonl"), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").exists()


def test_a_model_without_a_size_of_pictures_in_its_configuration_answers(tmp_path, make_model):
    make_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["vision"]["image_size"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    fuzz.open_model(tmp_path)


def test_a_tokenizer_without_the_word_for_unknown_ones(tmp_path, make_model):
    make_model().save_pretrained(tmp_path)
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    del tokenizer["model"]["vocab"]["<unk>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="tokenizer.json: .*UNK"):
        fuzz.open_model(tmp_path)


@pytest.mark.parametrize("name", ["", "prese{}", "st%ps"])
def test_a_setting_of_a_run_with_a_name_that_is_none(tmp_path, name):
    (tmp_path / "run_config.json").write_text(json.dumps({name: 1}))
    with pytest.raises(ValueError, match=f"^run_config.json, {name!r}: got None, need 1, "):
        check_run_config(tmp_path, {})


@pytest.mark.parametrize("limit", [[None, None], [0.1], [1, 0], "ab", None, [0, "x"]])
def test_limits_of_steps_are_two_numbers(limit):
    for make in (Mamba2, MVSS):
        with pytest.raises(ValueError, match="^dt_limit: got "):
            make(16, headdim=8, dt_limit=limit)
