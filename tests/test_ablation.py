"""The grid: its statistics, its rows, its tasks, that it skips, prices and refuses as it says; and that every number in a table comes from a file."""
import ast
import json
import math
import re
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
import torch
from torch.testing import assert_close

from vlmamba_lite.data.batches import Batch, pad_rows
from vlmamba_lite.data.conversations import EOS, UNK, Codec, Conversation, build_tokenizer, encode_conversation
from vlmamba_lite.data.easy_vqa import VQABatches, VQASet
from vlmamba_lite.data.pictures import normalize, process_images
from vlmamba_lite.data.sort_of_clevr import CLEVR_COLORS, NON_RELATIONAL, RELATIONAL, SortOfClevr, random_scene, scene_answer
from vlmamba_lite.evaluation import grid as A
from vlmamba_lite.evaluation.answers import answer_all
from vlmamba_lite.training.recipes import RECIPES

ROOT = Path(__file__).resolve().parent.parent


def definitions(name):
    "What a chapter defines: its module's names, and the functions and constants of its own cells."
    cells = [c.source for c in nbformat.read(ROOT / "nbs" / f"{name}.ipynb", as_version=4).cells if c.cell_type == "code"]
    module = next(m[1] for source in cells if (m := re.search(r"#\| *default_exp ([\w.]+)", source)))
    space = dict(vars(__import__(f"vlmamba_lite.{module}", fromlist=["x"])))
    for node in (node for source in cells if "#| export" not in source for node in ast.parse(source).body):
        constant = isinstance(node, ast.Assign) and not any(isinstance(inner, ast.Call) for inner in ast.walk(node))
        if isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef) or constant and re.match("[A-Z]", ast.unparse(node)):
            exec(compile(ast.Module([node], []), name, "exec"), space)
    return SimpleNamespace(**space)


T = definitions("evaluation/21_ablations")


# ---- statistics ----

@pytest.mark.parametrize("df, level, t", [(1, 0.95, 12.706), (2, 0.95, 4.303), (4, 0.95, 2.776), (9, 0.99, 3.250), (100, 0.90, 1.660)])
def test_intervals_have_the_quantiles_of_student_as_printed_in_tables(df, level, t):
    values = np.arange(df + 1.0)
    assert T.interval(values, level)[1] == pytest.approx(t * values.std(ddof=1) / math.sqrt(df + 1), rel=2e-4)


def test_interval_by_hand():
    middle, half = T.interval([1.0, 2.0, 3.0])                          # s = 1
    assert (middle, half) == (2.0, pytest.approx(4.3027 / math.sqrt(3), abs=1e-3))
    assert T.interval([5.0]) == (5.0, math.inf)
    assert T.interval([7.0, 7.0]) == (7.0, 0.0)


@pytest.mark.parametrize("values", [[], [math.nan], [1.0, math.nan, 3.0], [1.0, math.inf]])
def test_no_interval_without_numbers(values):
    with pytest.raises(ValueError, match="^values: got .*, need at least one, and no NaN"):
        T.interval(values)
    with pytest.raises(ValueError, match="^values: got"):
        T.verdict(dict(enumerate(values or [math.nan])), {0: 1.0, 1: 2.0, 2: 3.0})


def test_pairs_are_those_of_equal_seeds():
    a, b = {0: 3.0, 1: 5.0, 7: 100.0}, {1: 4.0, 0: 1.0, 2: -50.0}
    assert T.paired(a, b) == T.interval([2.0, 1.0])
    assert T.paired(a, {3: 1.0}) is None


def test_verdicts():
    "One claim that holds, and every word that more doubt makes of it. Differences 2.0 ± 1.24, 2.0 ± 3.4 for 30 comparisons."
    above, below = {0: 80, 1: 82, 2: 81, 3: 80, 4: 81}, {0: 78, 1: 81, 2: 79, 3: 79, 4: 77}
    assert T.verdict(above, below) == "**holds**" and T.verdict(below, above) == "**contradicted**"
    assert T.verdict(above, below, comparisons=30) == "speaks for it" and T.verdict(below, above, comparisons=30) == "speaks against it"
    assert T.verdict(above, {**below, 0: 90}) == "cannot be said" and T.verdict(above, below, guesser=81) == "both may guess"
    assert T.verdict(above, {}) == T.verdict({0: 1}, {0: 2}) == "not run yet"
    half = T.paired(above, below)[1]
    assert T.paired(above, below, 1 - 0.05 / 30)[1] > 2 > half


def test_a_table_about_nothing_seldom_says_holds():
    "Twenty comparisons of equal rows: in 400 tables at most one in twenty has a bold word, while most have a weaker one."
    draws, bold, weak = np.random.default_rng(2).normal(size=(400, 20, 2, 5)), 0, 0
    for table in draws:
        words = [T.verdict(dict(enumerate(a)), dict(enumerate(b)), comparisons=20) for a, b in table]
        bold += any("**" in word for word in words)
        weak += any(word.startswith("speaks") for word in words)
    assert bold <= 0.05 * 400 + 10 and weak > 0.4 * 400


def test_intervals_cover_as_often_as_they_say():
    draws = np.random.default_rng(1).normal(3.0, 2.0, (4000, 5))
    held = np.mean([abs(middle - 3.0) <= half for middle, half in map(T.interval, draws)])
    assert abs(held - 0.95) < 0.012


# ---- rows ----

WORDS = build_tokenizer(["is it red?", "yes no"])


def encode_turn(tokenizer, question, answer):
    "One question and its answer as (input_ids, labels) of a row of the template `lite`."
    row, = encode_conversation(Conversation(repr(question), [], [(question, answer)]), Codec(tokenizer), "lite")
    return row.input_ids, row.labels


def batch(pictures=2, questions=2):
    g = torch.Generator().manual_seed(0)
    ids = torch.tensor([WORDS.encode("is it red? yes").ids + [1]] * (pictures * questions))
    labels = ids.clone()
    labels[:, :4] = -100
    return torch.rand(pictures, 3, 64, 64, generator=g) * 2 - 1, ids, labels


@pytest.mark.parametrize("name", A.ROWS)
def test_every_row_learns_in_every_part(name):
    model = A.build_row(name, WORDS, seed=1)
    model(Batch.from_rows(*batch())).loss.backward()
    for part, module in model.named_children():
        assert any(p.grad is not None and p.grad.any() for p in module.parameters()), part


def test_a_row_changes_one_part():
    base = asdict(A.row_config("lite", 30))
    for name, row in A.ROWS.items():
        changed = {part for part, value in asdict(A.row_config(name, 30)).items() if value != base[part]}
        changed = {"connector" if part == "connector_args" else part for part in changed}
        changed |= ({"connector"} if row.one_way else set()) | ({"order"} if row.question_first else set())
        assert not row.star or len(changed) == (name != "lite"), (name, changed)


def test_rows_do_not_repeat():
    seen = [json.dumps([asdict(A.row_config(name, 30)), row.one_way, row.question_first], sort_keys=True) for name, row in A.ROWS.items()]
    assert len(set(seen)) == len(seen) and len({row.label for row in A.ROWS.values()}) == len(seen)


def test_same_seed_same_weights_and_the_lite_row_is_the_lite_model():
    from vlmamba_lite.model.presets import lite_config
    from vlmamba_lite.model.vlmamba import VLMamba
    torch.manual_seed(4)
    plain = VLMamba(lite_config(WORDS.get_vocab_size()), WORDS).state_dict()
    mine, other = A.build_row("lite", WORDS, 4).state_dict(), A.build_row("lite", WORDS, 5).state_dict()
    assert all(torch.equal(plain[k], mine[k]) for k in plain) and any(not torch.equal(plain[k], other[k]) for k in plain)


@pytest.mark.parametrize("name", ["lite-one_way", "vss_mlp-one_way"])
def test_one_way_reads_in_raster_order_and_knows_nothing_of_later_patches(name):
    scan = A.build_row(name, WORDS).connector.vss
    x = torch.randn(1, 12, 96, generator=torch.Generator().manual_seed(0))
    y = scan(x, (3, 4))
    later = x.clone()
    later[:, 7:] += 1
    changed = (scan(later, (3, 4)) - y).abs().amax(-1)[0]
    assert not changed[:7].any() and changed[7:].all()


def test_one_way_is_the_first_direction():
    from vlmamba_lite.connectors.vss import VSS
    vss, x = VSS(8, "csm", d_state=4), torch.randn(2, 20, 8)
    assert_close(A.OneWay(vss)(x, (4, 5)), vss.directions(x, (4, 5))[:, 0])
    with pytest.raises(ValueError, match="vss: got VSS, need a VSS with shared weights"):
        A.OneWay(VSS(8, "bsm", shared=False, d_state=4))


def test_both_eyes_side_by_side():
    model, images = A.build_row("conv+vit", WORDS).eval(), batch()[0]
    tokens, grid = model.vision(images)
    assert grid == (8, 8) and tokens.shape == (2, 64, 192)
    assert_close(tokens, torch.cat([tower(images)[0] for tower in model.vision.towers], -1))


# ---- question first ----

def naive_question_first(model, image, ids, prompt):
    "Logits from the last token of one question on, by one pass over [question; picture; rest] without states or pads."
    seen = model.see(image)
    x = torch.cat([model.language.embed(ids[None, :prompt - 1]), seen, model.language.embed(ids[None, prompt - 1:])], 1)
    return model.language(inputs_embeds=x).logits[0, prompt - 1 + seen.shape[1]:]


@pytest.mark.parametrize("mixer", ["mamba2", "mamba", "attention"])
def test_question_first_is_one_sequence(mixer, monkeypatch):
    language = dict(d_model=96, n_layer=2, mixer=mixer, mixer_args=dict(headdim=32) if mixer == "attention" else {} if mixer == "mamba" else dict(d_state=8, headdim=32))
    monkeypatch.setitem(A.ROWS, "mine", A.GridRow("mine", language=language, question_first=True))
    model = A.build_row("mine", WORDS).double().eval()
    images = batch()[0].double()
    turns = [("is red?", "yes"), ("is it red is it?", "no no"), ("red?", "yes"), ("is it?", "yes yes yes")]
    ids, labels = zip(*(encode_turn(WORDS, *turn) for turn in turns))
    prompt = [row.count(-100) for row in labels]
    batch_of_four, forward, losses = Batch.from_rows(images, pad_rows(ids, 0), pad_rows(labels, -100)), model.language.forward, []
    loss = model(batch_of_four).loss
    monkeypatch.setattr(model.language, "forward", lambda *args, labels=None, **options: forward(*args, **options))     # with labels there are no logits
    logits = model(batch_of_four).logits
    for i, own in enumerate(ids):
        want = naive_question_first(model, images[i // 2:i // 2 + 1], torch.tensor(own), prompt[i])
        assert_close(logits[i, :len(want)], want, rtol=1e-5, atol=1e-6)
        losses.append(torch.nn.functional.cross_entropy(want[:-1], torch.tensor(own[prompt[i]:]), reduction="sum"))
    assert_close(loss, sum(losses) / sum(len(own) - p for own, p in zip(ids, prompt)), rtol=1e-5, atol=1e-6, check_dtype=False)


def test_question_first_answers_are_its_own_greedy_words():
    data = VQASet(torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8), *[None] * 8)
    turns = [("is it red?", "yes"), ("red?", "no"), ("is it?", "yes")]
    ids, labels = zip(*(encode_turn(WORDS, *turn) for turn in turns))
    data = replace(data, input_ids=pad_rows(ids, 0), labels=pad_rows(labels, -100), prompt=torch.tensor([4, 2, 3]), types=np.zeros(3, int),
                   table=np.array([[0, 1], [2, -1]]), questions=[q for q, _ in turns], answers=[a for _, a in turns], image_of=np.array([0, 0, 1]))
    model = A.build_row("question_first", WORDS, 3)
    got = answer_all(model, data, batch_size=2, start=A.after_question)
    for row, text in enumerate(got):
        words, image = list(ids[row][:data.prompt[row]]), normalize(data.images[data.image_of[row]][None])
        for _ in range(3):
            words.append(int(naive_question_first(model.eval(), image, torch.tensor(words), int(data.prompt[row]))[-1].argmax()))
        new = words[data.prompt[row]:]
        stop = new.index(WORDS.token_to_id(EOS)) if WORDS.token_to_id(EOS) in new else None
        assert text == WORDS.decode(new[:stop], skip_special_tokens=False) + ("" if stop is not None else " ...")


def test_tail():
    assert A.tail(torch.arange(8).view(2, 4), torch.tensor([3, 1]), -1).tolist() == [[3, -1, -1], [5, 6, 7]]


# ---- Sort-of-CLEVR ----

@pytest.fixture(scope="module")
def clevr():
    return A.clevr_set(12, seed=3, lists=True)


def test_the_set_is_the_one_of_the_course(clevr):
    records = SortOfClevr(12, seed=3)
    for i in range(12):
        own = [(clevr.questions[r], clevr.answers[r]) for r in clevr.table[i] if r >= 0 and clevr.types[r] < 3]
        assert own == list(zip(records[i]["questions"], records[i]["answers"]))
        assert torch.equal(clevr.images[i], process_images([records[i]["image"]], 64)[0])
    assert set(A.clevr_set(12, seed=3).questions) <= set(A.CLEVR_QUESTIONS)


def test_rows_decode_to_their_turns(clevr):
    words = A.clevr_tokenizer()
    for row in range(len(clevr.questions)):
        ids, prompt = clevr.input_ids[row], int(clevr.prompt[row])
        assert words.decode(ids[:prompt].tolist()) == re.sub(r"\?", " ?", clevr.questions[row])
        assert words.decode(clevr.labels[row][clevr.labels[row] != -100].tolist()) == clevr.answers[row]
    assert words.token_to_id(UNK) not in clevr.input_ids


@pytest.mark.parametrize("first", range(6))
def test_lists_say_what_the_questions_say(first):
    colors = "|".join(CLEVR_COLORS)
    for seed in range(12):
        scene = random_scene(np.random.default_rng((seed, first)))
        said, turns = {}, A.scene_lists(scene, first)
        assert [q.split()[0] for q, _ in turns] == ["describe"] * 2 + ["list"] * 3
        assert turns[4][0] == "list " + RELATIONAL["count"].format(list(CLEVR_COLORS)[first])        # numbers have no ties
        for question, text in turns:
            kinds = list(NON_RELATIONAL) if question == "describe" else [A.CLEVR_QUESTIONS[question.removeprefix("list ")]]
            begin = [] if question == "describe" else [re.search(colors, question)[0]]
            parts = [*begin, *(part.strip() for part in re.split(rf"\b({colors})\b", text) if part.strip())]
            for color, words in zip(parts[::2], parts[1::2], strict=True):
                said |= {(kind, color): word for kind, word in zip(kinds, words.split(), strict=True)}
        for i, color in enumerate(CLEVR_COLORS):
            for kind in (*NON_RELATIONAL, *RELATIONAL):
                assert said.get((kind, color)) == scene_answer(scene, kind, i)


def test_scores_by_hand(clevr):
    plain = A.clevr_set(12, seed=3)
    kinds = [A.CLEVR_QUESTIONS[q] for q in plain.questions]
    guesses = [a if kind in ("shape", "count") else "?" for a, kind in zip(plain.answers, kinds)]
    scores = A.clevr_score(guesses, plain)
    assert {k: v for k, v in scores.items() if k in ("shape", "left", "top", "closest", "furthest", "count")} == dict(shape=1, left=0, top=0, closest=0, furthest=0, count=1)
    assert scores["non-relational"] == pytest.approx(kinds.count("shape") / 120) and scores["relational"] == pytest.approx(kinds.count("count") / 120)
    assert A.clevr_score(plain.answers, plain)["all"] == 1


def test_batches_follow_the_phases_and_mirror_nothing(clevr):
    batches = VQABatches(clevr, 10, 4, questions=6, phases=A.CLEVR_PHASES, shift=None)
    for step in (0, 9):
        batch, again = batches[step], batches[step]
        assert all(torch.equal(getattr(batch, name), getattr(again, name)) for name in ("images", "input_ids", "labels"))
        assert batch.images.shape == (4, 3, 64, 64) and len(batch.input_ids) == 24 and (batch.labels != -100).any(1).all()
        assert all((clevr.images == image).flatten(1).all(1).any() for image in batch.images)
        begun = [A.clevr_tokenizer().id_to_token(row[0]) for row in batch.input_ids.tolist()]
        assert begun.count("describe") == 8 and begun.count("list") == (0 if step == 0 else 12)


def test_test_pictures_are_not_training_pictures():
    train, test = ({bytes(image.numpy().tobytes()) for image in A.clevr_set(400, seed).images} for seed in (0, 2))
    assert len(train) == len(test) == 400 and not train & test


def test_positions():
    grid = A.grid_positions(8, 96)
    assert grid.shape == (64, 96) and grid.abs().max() <= 0.5
    assert_close(grid @ grid.T, (grid @ grid.T).T)
    distances = torch.cdist(grid, grid)
    assert (distances + torch.eye(64) * 9).min() > 0.1                   # no two places alike
    with pytest.raises(ValueError, match="dim: got 6, need a multiple of 4"):
        A.grid_positions(4, 6)
    for name in ("lite", "vit", "conv+vit"):
        model = A.place_positions(A.build_row(name, WORDS))
        placed = [p for n, p in model.vision.named_parameters() if n.endswith("position")]
        assert len(placed) == (2 if name == "conv+vit" else 1) and all(torch.equal(p, grid) for p in placed)


# ---- a run, and the grid ----

@pytest.fixture
def quick(monkeypatch):
    "Two rows and two tasks that take no time."
    tiny = dict(d_model=16, n_layer=1, mixer_args=dict(d_state=8, headdim=8, chunk_size=32))
    eye = dict(dim=16, width=8, image_size=64)
    rows = {"a": A.GridRow("A", dict(vision=eye), tiny), "b": A.GridRow("B", dict(vision=eye, connector="mlp"), tiny)}
    recipe = A.BUDGET | dict(steps=3, batch_size=4, questions=6, phases=A.CLEVR_PHASES, evaluations=2)
    task = A.Task(A.load_clevr, A.clevr_score, (8, 2, 3), recipe, positions=True, augmented=False)
    monkeypatch.setattr(A, "ROWS", rows)
    monkeypatch.setattr(A, "TASKS", {"one": task, "two": replace(task, positions=False), "hidden": replace(task, default=False)})
    return rows


def test_a_result_says_everything(quick, tmp_path):
    [result] = A.run_grid(["a"], ["one"], 1, tmp_path)
    assert json.loads((tmp_path / "one.a.seed0.json").read_text()) == result
    assert {"commit", "command", "hardware", "versions", "date"} <= set(result)
    assert (result["task"], result["row"], result["seed"], result["steps"]) == ("one", "a", 0, 3)
    assert result["test_accuracy"] == result["test"]["all"] and {"relational", "non-relational", "closest"} <= set(result["test"])
    assert [point["step"] for point in result["curve"]] == [2, 3] and result["curve"][-1]["validation"] == result["validation"]
    assert result["test_questions"] == 60 and result["parameters"]["total"] > 0
    assert all(result[f"{what}_cpu_seconds"] >= 0 for what in ("train", "exam"))
    assert result["settings"] == A.row_settings("one", "a")


def test_runs_that_are_done_are_skipped_and_new_ones_announced(quick, tmp_path):
    told = []
    first = A.run_grid(["a"], ["one"], 1, tmp_path, on_row=told.append)
    stamp = (tmp_path / "one.a.seed0.json").stat().st_mtime_ns
    both = A.run_grid(["a", "b"], ["one"], 1, tmp_path, on_row=told.append)
    assert (tmp_path / "one.a.seed0.json").stat().st_mtime_ns == stamp
    assert [r["row"] for r in told] == ["a", "b"] and both[0] == first[0]
    assert not list(tmp_path.glob(".*"))


def test_what_another_process_has_run_meanwhile_is_not_run_again(quick, tmp_path):
    told = []

    def other(result):
        "Finishes the second run while the first is announced."
        told.append(result["row"])
        A.run_grid(["b"], ["one"], 1, tmp_path)
    results = A.run_grid(["a", "b"], ["one"], 1, tmp_path, on_row=other)
    assert told == ["a"] and [r["row"] for r in results] == ["a", "b"]


def test_same_seed_same_result(quick, tmp_path):
    one, two = (A.run_grid(["a"], ["one"], 1, tmp_path / name)[0] for name in "xy")
    assert all(one[k] == two[k] for k in ("test", "curve", "parameters"))


def test_a_run_is_the_slow_loop(quick):
    "The training loop against a plain one: the same batches, learning rates and optimizers, therefore the same curve."
    from vlmamba_lite.training.optimizers import build_optimizers
    from vlmamba_lite.training.recipes import learning_rate
    task = A.TASKS["one"]
    model, data = A.start_row("one", "a", 1)
    curve, spent = A.train_row(model, task, data, 1)
    slow, _ = A.start_row("one", "a", 1)
    optimizers, losses = build_optimizers(slow, task.stage()), []
    batches = VQABatches(data["train"], 3, 4, 1, 6, A.CLEVR_PHASES, None)
    for step in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step / 3, task.stage())
        loss = slow.train()(batches[step]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(slow.parameters(), task.recipe["clip"])
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
    assert [point["loss"] for point in curve] == pytest.approx([np.mean(losses[:2]), losses[2]], rel=1e-4)
    assert spent["cpu"] > 0 and curve[-1]["validation"] == pytest.approx(A.examine(slow, task, data["validation"]), abs=0.06)


def test_question_first_trains(quick, monkeypatch):
    monkeypatch.setitem(A.ROWS, "q", replace(A.ROWS["a"], question_first=True))
    result = A.run_row("one", "q")
    assert len(result["curve"]) == 2 and all(math.isfinite(point["loss"]) for point in result["curve"])


def test_other_settings_are_refused(quick, tmp_path, monkeypatch):
    A.run_grid(["a"], ["one"], 1, tmp_path)
    task = A.TASKS["one"]
    monkeypatch.setitem(A.TASKS, "one", replace(task, recipe=task.recipe | dict(steps=4)))
    with pytest.raises(ValueError, match=r"one\.a\.seed0\.json: training\.steps: got 3, need 4; .* move it away"):
        A.run_grid(["a"], ["one"], 1, tmp_path)
    with pytest.raises(ValueError, match="training.steps"):
        A.run_grid(["a"], ["one"], 1, tmp_path, dry_run=True)


def test_a_broken_file_is_named(quick, tmp_path):
    (tmp_path / "one.a.seed0.json").write_text('{"task": ')
    with pytest.raises(ValueError, match="one.a.seed0.json"):
        A.run_grid(["a"], ["one"], 1, tmp_path)


@pytest.mark.parametrize("arguments, text", [
    (dict(rows=["c"]), "rows: got 'c', need some of a, b"), (dict(tasks=["x"]), "tasks: got 'x', need some of one, two, hidden"),
    (dict(seeds=0), "seeds: got 0, need at least 1"), (dict(threads=0), "threads: got 0, need at least 1"), (dict(device="tpu"), "device: got 'tpu', need 'auto' or 'cpu'")])
def test_bad_arguments(quick, tmp_path, arguments, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        A.run_grid(**{"output": tmp_path, **arguments})


@pytest.mark.parametrize("dry_run", [True, False])
def test_results_that_could_not_be_written_are_refused_before_the_work(quick, tmp_path, monkeypatch, dry_run):
    monkeypatch.setattr(A, "start_row", lambda *_, **__: pytest.fail("a model was built"))
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nothing/x")):
        with pytest.raises(ValueError, match="^output: got .*, need a (folder|place to write to)"):
            A.run_grid(["a"], ["one"], 1, output, dry_run=dry_run)

    def read_only(**_):
        raise OSError(30, "Read-only file system")
    monkeypatch.setattr("vlmamba_lite.files.TemporaryFile", read_only)
    with pytest.raises(ValueError, match="^output: got"):
        A.run_grid(["a"], ["one"], 1, tmp_path / "new", dry_run=dry_run)
    assert (tmp_path / "file").read_text() == "mine" and sorted(p.name for p in tmp_path.iterdir()) == ["file"]


def test_no_time_no_run(quick, tmp_path):
    assert A.run_grid(["a"], ["one"], 2, tmp_path, minutes=0) == [] and not list(tmp_path.iterdir())


def test_a_dry_run_prices_and_trains_nothing(quick, tmp_path):
    A.run_grid(["a"], ["one"], 1, tmp_path)
    before = sorted(tmp_path.iterdir())
    plan = A.run_grid(None, None, 2, tmp_path, dry_run=True)
    assert sorted(tmp_path.iterdir()) == before
    assert [(run["task"], run["row"], run["seed"]) for run in plan] == [(t, r, s) for t in ("one", "two") for r in "ab" for s in range(2)]
    assert [run["done"] for run in plan] == [True] + [False] * 7
    assert [run["source"] for run in plan[:4]] == ["recorded"] * 2 + ["timed"] * 2 and all(run["cpu_seconds"] >= 0 for run in plan)


def test_cost_table_adds_up():
    plan = [dict(task="t", row=row, seed=seed, done=done, cpu_seconds=1800.0, source=source)
            for row, seed, done, source in (("a", 0, True, "recorded"), ("a", 1, False, "recorded"), ("b", 0, False, "timed"))]
    lines = A.cost_table(plan).split("\n")
    assert lines[1].split()[:6] == ["t", "a", "2", "1", "1", "1800"] and lines[1].endswith("runs of this row")
    assert lines[2].split()[:6] == ["t", "b", "1", "0", "1", "1800"] and lines[2].endswith("timed now")
    assert lines[3] == "3 runs, 1 done, 2 left: 1.0 of 1.5 CPU hours"


def test_threads_are_put_back(quick, tmp_path, monkeypatch):
    before, seen = torch.get_num_threads(), []
    monkeypatch.setattr(A, "run_row", lambda *_: seen.append(torch.get_num_threads()) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        A.run_grid(["a"], ["one"], 1, tmp_path, threads=before + 1)
    assert seen == [before + 1] and torch.get_num_threads() == before


def test_easy_task_is_the_recipe_of_the_course():
    stage, (lite,) = A.TASKS["easy-vqa"].stage(), RECIPES["lite"]
    own = {name: getattr(lite, name) for name in ("steps", "batch_size", "evaluations", "source")}
    assert replace(stage, **own) == lite and A.TASKS["easy-vqa"].augmented
    mine, usual = A.BUDGET, VQABatches(None)
    assert (mine["questions"], mine["shift"], [w for _, w in mine["phases"]]) == (usual.questions, usual.shift, [w for _, w in usual.phases])


# ---- tables ----

def made(task, row, seed, **test):
    return dict(task=task, row=row, seed=seed, test=test, parameters={"total": 1000}, train_cpu_seconds=60.0)


RESULTS = [made("easy-vqa", row, seed, all=(score + seed * step) / 100)
           for row, score, step in (("mlp", 70, 1), ("lite", 75, 1), ("vss_mlp", 70, 2)) for seed in range(5)]


def test_table_by_hand():
    lines = T.ablation_table(RESULTS, "easy-vqa", ["mlp", "lite", "vss_mlp", "wide"]).split("\n")
    assert len(lines) == 5                                               # a row that was not run is not there
    assert lines[2] == "| MLP | 1,000 | 5 | 1.0 | 72.0 ± 2.0 | – |"     # 2.776 * 1.5811 / sqrt 5
    assert lines[3] == "| VSS-L2, BSM | 1,000 | 5 | 1.0 | 77.0 ± 2.0 | +5.0 ± 0.0 |"
    assert lines[4] == "| VSS-MLP, BSM | 1,000 | 5 | 1.0 | 74.0 ± 3.9 | +2.0 ± 2.0 |"


def cells(results, floors):
    return [line.strip("| ").split(" | ")[2:] for line in T.claims_table(results, floors).split("\n")[2:]]


def test_claims_by_hand():
    "Two claims can be judged; their intervals are those of 95 %, the bold words those of two comparisons (t 3.50 for 2.78)."
    found = cells(RESULTS, {("easy-vqa", "all"): 0})
    assert found[0] == ["**holds**: +5.0 ± 0.0"] and found[1] == ["speaks against it: -2.0 ± 2.0"]              # 2.776 * 1.5811 / sqrt 5 = 1.96
    assert found[2:] == [["not run yet"]] * (len(T.CLAIMS) - 2)
    assert cells(RESULTS[:1] + RESULTS[5:6], {("easy-vqa", "all"): 0})[0] == ["not run yet"]                       # one seed


def test_rows_that_may_guess_are_not_compared():
    "MLP 72.0 ± 2.0, VSS-L2 77.0 ± 2.0: a verdict needs one of them above the guesser, interval and all."
    assert not T.may_guess({0: 71, 1: 72, 2: 73}, 69.5) and T.may_guess({0: 71, 1: 72, 2: 73}, 69.6)                # 4.303 / sqrt 3 = 2.48
    low, high = cells(RESULTS, {("easy-vqa", "all"): 74.9}), cells(RESULTS, {("easy-vqa", "all"): 75.1})
    assert low[0] == ["**holds**: +5.0 ± 0.0"] and high[0] == ["both may guess: +5.0 ± 0.0"] and high[1][0].startswith("both may guess")
    table = T.claims_table(RESULTS, {("easy-vqa", "all"): 0, ("easy-vqa-short", "all"): 0}).split("\n")
    assert len(table) == 2 + len(T.CLAIMS) and table[0] == "| claim | whose | easy-vqa, all | easy-vqa-short, all |"


def test_claims_name_rows():
    assert {row for _, *rows in T.CLAIMS.values() for row in rows} <= set(A.ROWS)


@pytest.mark.parametrize("name", T.PAPER_TABLES)
def test_papers_tables_are_whole(name):
    columns, rows = T.PAPER_TABLES[name]
    assert all(len(values.split()) == len(columns.split()) for values in rows.values())
    assert "the paper's" in T.paper_table(name) and len(T.paper_table(name).split("\n")) == 2 + len(rows)


def test_claims_count_the_papers_columns():
    "'in 5 of 8 columns' is counted from the tables."
    def above(table, a, b):
        rows = {k: [float(v) for v in values.split()] for k, values in T.PAPER_TABLES[table][1].items()}
        return sum(x > y for x, y in zip(rows[a], rows[b])), len(rows[a])
    counted = [above("VL-Mamba, Table 4: connector", "VSS-L2", "MLP"), above("VL-Mamba, Table 4: connector", "MLP", "VSS-MLP"),
               above("VL-Mamba, Table 5: scan", "BSM", "CSM"), above("ML-Mamba, Table 6: connector", "MSC-MLP Basic", "MLP"),
               above("ML-Mamba, Table 6: connector", "MSC-MLP Advanced", "MSC-MLP Basic"), above("ML-Mamba, Table 7: scan", "BSM", "CSM"),
               min(above("ML-Mamba, Table 5: vision encoder", "DINOv2+SigLIP", one) for one in ("DINOv2", "SigLIP"))]
    said = [tuple(map(int, m.groups())) for claim in T.CLAIMS if (m := re.search(r"in (\d) of (\d) columns", claim))]
    assert said == counted


# ---- every number comes from a file ----

FILES = sorted((ROOT / "data" / "results").rglob("*.json"))
HARDWARE = {"cpu", "cores", "threads", "gpu"}


def missing(path):
    "What a result file does not say of where it comes from."
    result = json.loads(path.read_text(encoding="utf-8"))
    need = {"commit", "command", "hardware", "versions", "date"} | ({"seed"} if path.name not in SEEDLESS else set())
    wrong = sorted(name for name in need if result.get(name) in (None, "", {}))
    return wrong + sorted(HARDWARE - set(result.get("hardware") or {})) + ["torch"] * ("torch" not in (result.get("versions") or {}))


SEEDLESS = {"test_command.json": "counts tests and seconds", "kernels_static.json": "counts instructions"}      # nothing is drawn in these


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_result_file_says_where_it_comes_from(path):
    assert not missing(path)


def test_a_file_that_does_not_say_is_found(tmp_path):
    bad = json.loads(FILES[0].read_text(encoding="utf-8"))
    for name in ("commit", "hardware", "seed"):
        path = tmp_path / "bad.json"
        path.write_text(json.dumps({k: v for k, v in bad.items() if k != name}))
        assert missing(path)


ABLATIONS = sorted((ROOT / "data" / "results" / "ablations").glob("*.json"))


@pytest.mark.parametrize("path", ABLATIONS, ids=lambda p: p.stem)
def test_ablation_files(path):
    "Named after what they hold, made from clean code, by today's settings."
    result = json.loads(path.read_text(encoding="utf-8"))
    assert path.name == f"{result['task']}.{result['row']}.seed{result['seed']}.json"
    assert not result["commit"].endswith("-dirty")
    assert A.kept_result(path, A.row_settings(result["task"], result["row"])) == result
    assert result["test_accuracy"] == result["test"]["all"] and 0 <= result["test_accuracy"] <= 1


TABLES = ("index", "evaluation/20_cost", "evaluation/21_ablations")
READS = re.compile(r"read_result\(|read_grid\(|Markdown\(|data/results|^def |^[A-Z_]+ = ", re.M)


def outputs(cell):
    "The Markdown a cell has stored."
    found = [o["data"]["text/markdown"] for o in cell.get("outputs", []) if "text/markdown" in o.get("data", {})]
    return "".join(found[0]) if found else None


def recompute(path, monkeypatch):
    "[(source, stored, computed)] of all cells with Markdown: imports, what reads the files, and tables are run, and nothing else."
    import matplotlib
    matplotlib.use("Agg")
    monkeypatch.chdir(path.parent)
    cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    module = next((m[1] for c in cells if (m := re.search(r"#\| *default_exp ([\w.]+)", c.source))), None)
    space, found = {}, []
    if module:
        space.update(vars(__import__(f"vlmamba_lite.{module}", fromlist=["x"])))
    for cell in cells:
        source = "\n".join(line for line in cell.source.splitlines() if not line.startswith("#|"))
        imports = re.match(r"\s*(from|import) ", source) and "#| exports" not in cell.source
        if "#| exports" not in cell.source and (imports or READS.search(source)) and "torch.randn" not in source:
            value = run(source, space)
            if outputs(cell) is not None:
                found.append((source, outputs(cell), getattr(value, "data", None)))
    return found


def run(source, space):
    "Runs a cell; what its last expression is."
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), space)
    return None if last is None else eval(compile(ast.Expression(last.value), "cell", "eval"), space)


def typed_in(source, table):
    "Decimals of a table, other than the papers' and published ones, that stand in the code that made it."
    lines = [line for line in table.split("\n") if line.startswith("|") and "published" not in line]
    numbers = set(re.findall(r"\d+\.\d+", "\n".join(lines)))
    return sorted(n for n in numbers if re.search(rf"(?<![\d.]){re.escape(n)}(?![\d.])", source))


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_what_the_files_say(name, monkeypatch):
    found = recompute(ROOT / "nbs" / f"{name}.ipynb", monkeypatch)
    assert any("|---|" in stored for _, stored, _ in found)
    for source, stored, computed in found:
        assert stored == computed, f"{name}: the stored table is not what the files say now; run tests/refresh_notebooks.py\n{source}"
        assert not typed_in(source, stored), source


def test_a_number_that_was_typed_in_is_found():
    assert typed_in('Markdown("| a | 12.34 |")', "| a | 12.34 |") == ["12.34"]
    assert not typed_in("Markdown(table(result))", "| a | 12.34 |")


def test_the_last_chapter_shows_the_run_on_file():
    "Chapter 22 shows the recorded run of seed 3; what it prints is what the file of that seed says."
    cells = nbformat.read(ROOT / "nbs" / "22_train_vlmamba.ipynb", as_version=4).cells
    printed = "".join("".join(o.get("text", "")) for c in cells for o in c.get("outputs", []) if o.output_type == "stream")
    result = json.loads((ROOT / "data" / "results" / "train_lite_seed3.json").read_text(encoding="utf-8"))
    for name, share in {**result["accuracy_by_type"], **{f"baseline: {k}": v for k, v in result["floors"].items()}}.items():
        assert f"{100 * share:6.2f} %  {name}" in printed
