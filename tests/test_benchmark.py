"""The measures of chapter 20, and that each benchmark compares programs that compute the same."""
import json
from dataclasses import replace

from measures import lively
import pytest
import torch
from torch.testing import assert_close

from vlmamba_lite.evaluation import benchmarks, cost, gpu, llama
from vlmamba_lite.evaluation.benchmarks import (CARDS, bench_block, bench_directions, bench_generation, bench_scaling, bench_scan, bench_ssd, bench_training, block_parts,
                                                exponents, mamba_peer, most_held, random_model, runnable_blocks, scaling_models,
                                                scan_inputs_of, scan_peers, ssd_inputs_of, ssd_peer, step_operations, training_form, use_blocks)
from vlmamba_lite.evaluation.cost import (compared, comparison_table, fit_power, peak_bytes, read_result, side_by_side, state_bytes,
                                          training_step)
from vlmamba_lite.language.model import MambaConfig, MambaLM
from vlmamba_lite.layers.mamba import Mamba
from vlmamba_lite.model.memory import count_parameters
from vlmamba_lite.ops.selective_scan import backends, resolve, selective_scan
from vlmamba_lite.ops.ssd import ssd_chunked
from vlmamba_lite.training.recipes import RECIPES


class Clock:
    "A clock that stands in for the `time` of the benchmarks and moves when it is told to: nothing else that runs can disturb it."
    def __init__(self, monkeypatch):
        self.wall = self.cpu = 0.0
        self.perf_counter, self.process_time = lambda: self.wall, lambda: self.cpu
        monkeypatch.setattr(cost, "time", self)

    def passes(self, wall, cpu=0.0):
        self.wall, self.cpu = self.wall + wall, self.cpu + cpu


def test_forms_take_turns_and_fast_ones_run_often(monkeypatch):
    calls, clock = [], Clock(monkeypatch)

    def fast():
        calls.append("f")
        clock.passes(0.125, 0.0625)

    def slow():
        calls.append("s")
        clock.passes(2.5)
    times = side_by_side({"fast": fast, "slow": slow}, repeats=3, turn=1)
    assert "".join(calls) == "fs" + 3 * ("ffffffff" + "s")
    assert times == {"fast": dict(wall_seconds=0.125, cpu_seconds=0.0625), "slow": dict(wall_seconds=2.5, cpu_seconds=0)}


def test_ratio_says_how_much_faster_the_first_is(monkeypatch):
    clock = Clock(monkeypatch)
    times = compared({"ours": lambda: clock.passes(0.25, 0.5), "theirs": lambda: clock.passes(2, 1)}, repeats=3)
    assert (times["ratio"], times["cpu_ratio"]) == (8, 2)
    assert times["ours"] == dict(wall_seconds=0.25, cpu_seconds=0.5)


def test_training_step_gives_every_gradient():
    x, y = torch.tensor([2.0]), torch.tensor([3.0])
    assert [g.item() for g in training_step(lambda a, b: a * a * b, [x, y])()] == [12.0, 4.0]
    layer = torch.nn.Linear(2, 2)
    step = training_step(layer, [torch.ones(1, 2)], layer)
    step()
    x_grad, weight, bias = step()
    assert_close(weight, torch.ones(2, 2))                          # not the sum of two steps
    assert_close(bias, torch.ones(2))
    assert_close(x_grad, layer.weight.sum(0, keepdim=True))


def test_memory_of_a_step_is_that_of_its_tensors():
    x = torch.zeros(1000)
    assert 4000 <= peak_bytes(lambda: x + 1) < 4200
    assert peak_bytes(lambda: x.view(10, 100)) == 0


@pytest.fixture
def traced(monkeypatch):
    "torch.compile without its slow second half: the program is traced, and with it transformers' choice of another scan."
    monkeypatch.setattr(benchmarks, "compiled", lambda form: torch.compile(form, backend="eager", dynamic=False))


@pytest.mark.parametrize("peer", ["transformers", "transformers, compiled", "mambapy"])
def test_scan_peers_compute_our_scan(peer, traced):
    pytest.importorskip(peer.split(",")[0])
    inputs = scan_inputs_of((2, 8, 21, 4))
    for got, want in zip(training_step(scan_peers()[peer], inputs)(), training_step(selective_scan, inputs)()):
        assert_close(got, want, rtol=1e-3, atol=1e-4)


def test_ssd_and_block_peers_compute_ours():
    pytest.importorskip("transformers")
    x, dt, A, B, C, D = ssd_inputs_of((2, 70, 4, 8, 16))
    assert_close(ssd_peer()(x, dt, A, B, C, 32, D=D), ssd_chunked(x, dt, A, B, C, D=D), rtol=1e-4, atol=1e-4)
    torch.manual_seed(0)
    block, x = Mamba(16), torch.randn(2, 9, 16)
    assert_close(mamba_peer(block)(x), block(x), rtol=1e-4, atol=1e-5)


def test_block_parts_run_and_are_named():
    torch.manual_seed(0)
    parts = block_parts(Mamba(8), 1, 5)
    assert list(parts)[0] == "whole block" and len(parts) == 5
    block = torch.nn.ModuleList([Mamba(8)])[0]
    used = [sum(g is not None for g in step()) for step in block_parts(block, 1, 5).values()]
    assert used[0] == 1 + len(list(block.parameters())) and min(used) >= 2        # each part has a gradient, the block all of them


def test_what_auto_takes_is_raced_first_and_names_are_taken(monkeypatch, traced):
    pytest.importorskip("mambapy")
    for module in (benchmarks, cost):
        monkeypatch.setattr(module, "side_by_side", lambda forms, repeats=1: side_by_side(forms, repeats, turn=1e-4))
    monkeypatch.setattr(benchmarks, "SCAN_SHAPES", tuple((peer, (1, 4, 5, 2)) for peer in ("transformers, compiled", "mambapy")))
    monkeypatch.setattr(benchmarks, "LONGEST", {"chunked": 16})
    monkeypatch.setattr(benchmarks, "SSD_SHAPES", ((1, 8, 2, 4, 4),))
    rows = bench_scan(repeats=1)["peers"]
    usual = [name for name in dict.fromkeys((resolve("auto", torch.ones(1, 1, 1), torch.ones(1, 1)), "chunked", "cpp")) if backends()[name] is None]
    assert [row["backend"] for row in rows[:len(usual)]] == usual and {row["peer"] for row in rows} == {"transformers, compiled", "mambapy"}
    assert {row["backend"] for row in bench_scan(repeats=1, backend=["reference"])["peers"]} == {"reference"}
    rows = bench_ssd(repeats=1)["peers"]
    assert [(row["peer"], row["peer_chunk"]) for row in rows] == [(peer, chunk) for chunk in (256, 64) for peer in ("transformers", "transformers, compiled")]


def test_small_benchmarks_hold_what_the_chapter_reads(monkeypatch, traced):
    for module in (benchmarks, cost):
        monkeypatch.setattr(module, "side_by_side", lambda forms, repeats=1: side_by_side(forms, repeats, turn=1e-4))
    pytest.importorskip("transformers")
    result = bench_block(d_model=16, batch=1, length=8, repeats=1)
    assert [row["peer"] for row in result["peers"]] == ["transformers", "transformers, compiled"]
    assert result["peers"][0]["ratio"] > 0 and [p["part"] for p in result["parts"]][0] == "whole block"
    rows = bench_directions(dim=8, grids=((2, 3),), repeats=1)["directions"]
    assert [(row["grid"], row["shared"]) for row in rows] == [((2, 3), True), ((2, 3), False)]
    assert all(row["cost"] == 1 / row["ratio"] for row in rows)


def test_table_and_missing_results(tmp_path, monkeypatch):
    assert comparison_table([{"a": 1}, {"a": 2}], {"twice": lambda r: 2 * r["a"]}) == "| twice |\n|---|\n| 2 |\n| 4 |"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="data/results/none.json: not found here or in a folder above"):
        read_result("none.json")
    (tmp_path / "data" / "results").mkdir(parents=True)
    (tmp_path / "deep").mkdir()
    (tmp_path / "data" / "results" / "some.json").write_text(json.dumps({"x": 1}))
    monkeypatch.chdir(tmp_path / "deep")
    assert read_result("some.json") == {"x": 1}


# --- models against the length --------------------------------------------------------------------------------------------

def test_the_three_models_are_of_one_size():
    sizes = [sum(p.numel() for p in model.parameters()) for model in scaling_models().values()]
    assert max(sizes) / min(sizes) < 1.02


def test_state_bytes_count_every_tensor():
    assert state_bytes([torch.zeros(3), (torch.zeros(2, dtype=torch.float64), [torch.zeros(1, dtype=torch.int8)])]) == 12 + 16 + 1


def test_slope_is_the_power():
    lengths = [1, 2, 4, 8]
    for p in (0, 0.5, 1, 2):
        fit = fit_power([(n, 3 * n**p) for n in lengths], start=1)
        assert abs(fit["p"] - p) < 1e-12 and abs(fit["c"] - 3) < 1e-12
    rows = [dict(model=m, length=n, prefill={"cpu_seconds": n**p}, decode={"cpu_seconds": 5.0}, state_bytes=7) for m, p in (("a", 1), ("b", 2)) for n in lengths]
    rows += [dict(model="a", length=0.1, prefill={"cpu_seconds": 99.0}, decode={"cpu_seconds": 99.0}, state_bytes=1)]        # below the start
    assert abs(exponents(rows, "a", start=1)["prefill"] - 1) < 1e-12 and abs(exponents(rows, "b", start=1)["prefill"] - 2) < 1e-12
    assert abs(exponents(rows, "a", start=1)["decode"]) < 1e-12


def test_scaling_measures_each_model_at_each_length(monkeypatch):
    small = scaling_models(32)
    monkeypatch.setattr(benchmarks, "scaling_models", lambda seed: small)
    for module in (benchmarks, cost):
        monkeypatch.setattr(module, "side_by_side", lambda forms, repeats=1: side_by_side(forms, repeats, turn=1e-4))
    result = bench_scaling(512, longest=1024, longest_attention=512, repeats=1)
    lengths = {name: [row["length"] for row in result["lengths"] if row["model"] == name] for name in small}
    assert lengths == {"mamba": [49, 512, 729, 1024, 2916], "mamba2": [49, 512, 729, 1024, 2916], "attention": [49, 512, 729, 2916]}
    for name in ("mamba", "mamba2"):
        assert len({row["state_bytes"] for row in result["lengths"] if row["model"] == name}) == 1        # fixed size
    assert set(result["exponents"]) == set(result["parameters"]) == set(small)
    grown = {row["length"]: row["state_bytes"] for row in result["lengths"] if row["model"] == "attention"}
    assert abs(grown[2916] / grown[729] - 2916 / 729) < 0.01


# --- the whole model ------------------------------------------------------------------------------------------------------

def test_operations_of_a_step_by_hand():
    model = random_model("tiny")
    sizes = count_parameters(model)
    head = model.config.language.d_model * model.language.lm_head.out_features
    assert step_operations(model, 0, 1) == 6 * sizes["language"]
    assert step_operations(model, 1, 0) == 2 * sizes["vision"] + 6 * sizes["connector"] + 6 * (sizes["language"] - head)


def test_limits_of_cards():
    assert CARDS["NVIDIA A100 80GB PCIe"] == (312e12, 1.935e12) and CARDS["NVIDIA H200"][1] == 4.8e12
    assert "NVIDIA H100 PCIe" not in CARDS and "NVIDIA H200 NVL" not in CARDS and None not in CARDS


def test_blocks_are_switched_in_every_layer():
    model = use_blocks(random_model("tiny"), "mamba_ssm")
    layers = [m for m in model.modules() if hasattr(m, "conv_backend")]
    assert len(layers) >= 2 and all((m.backend, m.conv_backend) == ("mamba_ssm", "causal_conv1d") for m in layers)
    use_blocks(model, "ours")
    assert all((m.backend, m.conv_backend) == ("auto", "auto") for m in layers)


def test_training_and_generation_are_measured(monkeypatch):
    monkeypatch.setattr(benchmarks, "gpu_name", lambda: "NVIDIA A100 80GB PCIe")
    for module in (benchmarks, cost):
        monkeypatch.setattr(module, "side_by_side", lambda forms, repeats=1: side_by_side(forms, repeats, turn=1e-4))
    result = bench_training("tiny", rows=2, length=6, batch_size=4, repeats=1)
    assert result["text_tokens"] == 24 and result["visual_tokens"] == 4 * 64 and list(result["blocks"]) == runnable_blocks()
    ours = result["blocks"]["ours"]
    assert ours["tokens_per_second"] == pytest.approx(280 / ours["wall_seconds"]) and ours["peak_bytes"] > 0
    assert ours["operations_per_second"] == pytest.approx(result["operations"] / ours["wall_seconds"])
    assert ours["mfu"] == pytest.approx(ours["operations_per_second"] / 312e12)
    result = bench_generation("tiny", tokens=5, repeats=1)
    steps = result["forms"]["steps"]
    assert steps["tokens_per_second"] == pytest.approx(5 / steps["wall_seconds"])
    assert result["limit_tokens_per_second"] == pytest.approx(1.935e12 / result["weight_bytes"])
    assert result["weight_bytes"] == 4 * count_parameters(random_model("tiny"))["language"]


def test_a_step_trains_what_its_stage_trains():
    model = random_model("tiny")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    stage = replace(RECIPES["vl-mamba"][1], batch_size=4, precision="fp32", lr=1e-2)
    training_form(model, stage, 2, 6)("ours")
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and not any(name.startswith("vision") for name in moved) and {name.split(".")[0] for name in moved} == {"connector", "language"}


def test_memory_counts_what_the_first_step_leaves():
    "The peak is that of a later step: the one that makes the optimizer's state must not be the one that is measured."
    kept = []

    def form():
        kept.append(torch.zeros(100_000 if not kept else 10))
    assert most_held(form) < 10_000 and len(kept) >= 2


def test_what_cannot_be_measured_is_said():
    with pytest.raises(ValueError, match="batch_size: got 5, need a multiple of the 2 rows"):
        bench_training("tiny", rows=2, batch_size=5)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="preset: got 'vl-mamba-2.8b' on a machine without a CUDA GPU"):
            bench_generation()


# --- the first hour on a GPU ----------------------------------------------------------------------------------------------

def test_a_part_that_fails_does_not_stop_the_rest(tmp_path):
    "On the CPU with the smallest stand-in, a part that fails and one that never ends, which takes no time from those after it."
    parts = {"fails": gpu.Part(0.05, "", "no_such_module"), "stuck": gpu.Part(0.05, "", "http.server --bind 127.0.0.1 0"),
             "generation": gpu.GPU_PARTS["generation"], "left out": gpu.Part(1, "", "this")}
    seen = []
    result = gpu.bench_gpu(tmp_path / "new", 4, ["fails", "stuck", "generation"], "cpu", parts, seen.append)
    rows = json.loads((tmp_path / "new" / "gpu.json").read_text())["parts"]
    assert rows == result["parts"] == seen and [row["part"] for row in rows] == ["fails", "stuck", "generation"]
    assert [row["code"] for row in rows] == [1, 124, 0] and rows[0]["why"] == "exit code 1" and rows[1]["why"].startswith("no end after ")
    assert "no_such_module" in rows[0]["said"][-1] and rows[2]["why"] is None, rows
    written = json.loads((tmp_path / "new" / "generation.json").read_text())
    assert written["benchmark"] == "generation" and written["forms"]["steps"]["tokens_per_second"] > 0 and written["hardware"]["gpu"] is None


def test_a_number_that_is_too_low_fails_on_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "run_words", lambda *_: (0, "fine"))
    monkeypatch.setattr(gpu, "write_result", lambda *_, **__: None)
    for score, why in ((0.98, "test_accuracy: got 0.98, need at least 0.99"), (0.995, None)):
        (tmp_path / "lite.json").write_text(json.dumps({"test_accuracy": score}))
        [row] = gpu.bench_gpu(tmp_path, only=["lite"], device="cuda", on_part=lambda row: None)["parts"]
        assert row["why"] == why and bool(row["code"]) == bool(why)


def test_parts_and_devices_it_does_not_know():
    with pytest.raises(ValueError, match="^only: got 'nope', need some of tests, kernels, lite, training, generation"):
        gpu.bench_gpu(only=["nope"])
    with pytest.raises(ValueError, match="^device: got 'tpu', need 'cuda' or 'cpu'"):
        gpu.bench_gpu(device="tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="^device: got 'cuda' on a machine without a CUDA GPU, need 'cpu', a rehearsal"):
            gpu.bench_gpu()


def test_the_command_says_what_failed(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from vlmamba_lite.cli.bench import bench
    for code in (0, 1):
        def bench_gpu(output, minutes, only, device, on_part, code=code):
            row = dict(part="lite", seconds=2.5, code=code, why="exit code 1" if code else None, given=(output, minutes, only, device))
            on_part(row)
            return {"parts": [row]}
        monkeypatch.setattr(gpu, "bench_gpu", bench_gpu)
        said = CliRunner().invoke(bench, ["gpu", "--only", "lite", "--minutes", "3", "--output", str(tmp_path), "--device", "cpu"])
        assert said.exit_code == code and f"lite: {'exit code 1' if code else 'passed'}, 2.5 s" in said.output, said.output


# --- beside llama.cpp -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mixer, args", [("mamba", {"d_state": 16}), ("mamba2", {"d_state": 64, "headdim": 64})])
def test_llama_cpp_writes_our_tokens(mixer, args, monkeypatch):
    "The same weights in both, read from a GGUF file; every number of the weights has been moved, so that none is missed."
    for package in ("gguf", "xllamacpp"):
        pytest.importorskip(package)
    model = lively(MambaLM(MambaConfig(128, 2, 304, mixer=mixer, mixer_args=args))).eval()
    monkeypatch.setattr(llama, "MambaLM", lambda config: model)
    [row] = llama.bench_llama(9, 12, 1, models={"small": model.config}, threads=(1,))["llama"]
    assert row["ours"]["tokens_per_second"] > 0 and row["llama.cpp"]["prompt_tokens_per_second"] > 0 and row["limit_tokens_per_second"] > 0
    other = lively(MambaLM(model.config), seed=1).eval()
    monkeypatch.setattr(llama, "our_writer", lambda _, write=llama.our_writer: write(other))
    with pytest.raises(RuntimeError, match="^small: llama.cpp wrote "):
        llama.bench_llama(9, 12, 1, models={"small": model.config}, threads=(1,))


def test_llama_without_its_packages(monkeypatch):
    monkeypatch.setattr(llama.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="bench llama needs gguf, which is not installed: pip install gguf xllamacpp"):
        llama.bench_llama()
