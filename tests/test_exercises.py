"""Exercises check themselves: every chapter has two, solutions are right, plausible mistakes are refused and named, and no right value is told."""
import json
import math
import re

import pytest
import torch
import torch.nn.functional as F
from exercises import PATH, expected, solved
from house import chapters, page_code, read

from vlmamba_lite.exercises import NOT_BEGUN, RIGHT, _decode, _numbers, _pattern, check, review

TASKS = json.loads(PATH.read_text(encoding="utf-8"))
NAMES = solved()
ANSWERS = {name: answer for name, (answer, *_) in NAMES["SOLUTIONS"].items()} | NAMES["VALUES"]
SHIFTED = "one place too (late|early)"




# Plausible mistakes, and what the message must say. `S` are the solutions, whose results are spoiled where that is shorter.
S = ANSWERS
WRONG = [
    ("backward_scan", lambda keep, write: S["backward_scan"](keep.flip(0), write.flip(0)), "differ"),                   # forwards
    ("backward_scan", lambda keep, write: S["backward_scan"](keep, write).flip(0), "order is reversed"),               # not turned back
    ("backward_scan", lambda keep, write: S["backward_scan"](keep.detach(), write), "gradient of argument 1 is wrong"),
    ("smaller_state", 10752, "too small"),                                                                              # half of everything
    ("one_step", lambda h, u, delta, A, B, C, D: (S["one_step"](h, u, delta, A, B, C, 0 * D)[0], S["one_step"](h, u, delta, A, B, C, D)[1]), "result 1"),
    ("one_step", lambda h, u, delta, A, B, C, D: S["one_step"](h, u, delta, -A, B, C, D), "result 1: 4 of 4 values differ"),
    ("one_step", lambda h, u, delta, A, B, C, D: S["one_step"](h, u, delta, A, B, C, D)[::-1], "shape"),
    ("one_step", lambda h, u, delta, A, B, C: h, "TypeError: .* takes 6 positional arguments but 7 were given"),
    ("one_step", lambda h, u, delta, A, B, C, D: (h @ C + D * u, S["one_step"](h, u, delta, A, B, C, D)[1]), "result 1"),     # read before written
    ("one_step", lambda h, u, delta, A, B, C, D: (S["one_step"](h, u, delta, A, B, C, D)[0], S["one_step"](h, u, delta, A, B, C, D)[1].detach()), "gradient"),
    ("a_tenth_left", math.log(2) / 0.1, "too small"),                                                                   # the half-life
    ("a_tenth_left", -math.log(10) / 0.1, "sign"),
    ("inverse_step", lambda a, x: (1 / a, -x), "result 2"),
    ("inverse_step", lambda a, x: (1 / a, x / a), "result 2: .*sign is turned round"),
    ("inverse_step", lambda a, x: 1 / a, "need 2 results|results: got"),
    ("states_before", lambda a, x, h: a * h + x, SHIFTED),                                                              # the state after
    ("states_before", lambda a, x, h: torch.cat([h[None], x[:-1]]), "differ"),                                          # a zero start
    ("state_gradients", lambda a, y, c: (S["state_gradients"](a.roll(-1, 0), y, c)[0], c), "differ|result"),            # the decay of the wrong token
    ("state_gradients", lambda a, y, c: S["state_gradients"](a, y, 0 * c), "result 1"),                                 # no carry
    ("chunk_starts", lambda a, x, h, c: S["chunk_starts"](a.detach(), x.detach(), h, c), "gradient of argument 1 is wrong"),
    ("chunk_starts", lambda a, x, h, c: S["chunk_starts"](a, x, h, c).detach(), "no gradient leaves"),
    ("chunk_starts", lambda a, x, h, c: S["chunk_starts"](a, x, a[0] * h + x[0], c), "differ"),                         # ends, not starts
    ("decay_mask", lambda a: S["decay_mask"](a).T, "rows and columns are exchanged"),
    ("decay_mask", lambda a: (a.cumsum(0)[:, None] - a.cumsum(0)).exp(), "differ"),                                     # no mask
    ("decay_mask", lambda a: S["decay_mask"](a) * a.exp()[None], "differ"),                                             # a_j too
    ("chunk_writes", lambda X, a, B: X.T @ B, "differ"),                                                                # no decay
    ("chunk_writes", lambda X, a, B: S["chunk_writes"](X, a, B).T, "shape: .*the other way round"),
    ("bias_for", lambda tau: -torch.log(tau), "differ"),                                                                # the exponential, not softplus
    ("bias_for", lambda tau: -S["bias_for"](tau), "sign"),
    ("bias_for", lambda tau: S["bias_for"](tau).float(), "dtype: got torch.float32"),
    ("block_parameters", lambda d: S["block_parameters"](d) - 2 * d, "too small"),                                      # a forgotten bias
    ("for_each_head", lambda B, heads: B.repeat(1, heads // B.shape[1], 1), "differ"),
    ("norm_after_gate", lambda y, z, groups: S["norm_after_gate"](y, z, 1), "differ"),                                  # one mean over all
    ("norm_after_gate", lambda y, z, groups: S["norm_after_gate"](y, torch.full_like(z, 50.), groups) * F.silu(z), "differ"),
    ("count_modulo", lambda bits, m: S["count_modulo"](bits, 2 * m), "differ"),                                         # half a circle is no circle
    ("count_modulo", lambda bits, m: S["count_modulo"](bits, m).flip(1), "differ"),
    ("written_in_all", lambda dt, lam: lam * dt + (1 - lam) * dt, "differ"),                                            # its own step twice
    ("written_in_all", lambda dt, lam: lam * dt, "too small"),
    ("answer_loss", lambda logits, labels: F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "too"),             # not shifted
    ("answer_loss", lambda logits, labels: S["answer_loss"](logits, labels) * (labels[:, 1:] != -100).sum(), "too large"),
    ("as_much_as_a_state", 20, "too small"),                                                                            # as many layers
    ("in_nucleus", lambda p, top_p: torch.zeros_like(p).bool().scatter(
        0, p.argsort(descending=True), p.sort(descending=True)[0].cumsum(0) <= top_p), "differ"),                       # without the one that fills it
    ("in_nucleus", lambda p, top_p: p.sort(descending=True)[0].cumsum(0) - p.sort(descending=True)[0] < top_p, "differ"),
    ("in_nucleus", lambda p, top_p: S["in_nucleus"](p, top_p).double(), "dtype"),
    ("penalised", lambda logits, ids, r: torch.where(F.one_hot(ids, len(logits)).sum(0) > 0, logits / r, logits), "differ"),
    ("penalised", lambda logits, ids, r: logits.where(F.one_hot(ids, len(logits)).sum(0) == 0,
                                                      torch.where(logits > 0, logits / r ** F.one_hot(ids, len(logits)).sum(0), logits * r)), "differ"),
    ("penalised", lambda logits, ids, r: logits.copy_(S["penalised"](logits, ids, r)), "argument 1 was changed in place"),
    ("to_patches", lambda image, size: S["to_patches"](image.mT, size), "differ"),                                      # columns first
    ("to_patches", lambda image, size: S["to_patches"](image, size).unflatten(1, (3, -1)).mT.flatten(1), "differ"),     # channels last
    ("pixels_seen", lambda i: (8 * i - 15, 8 * i + 15), "result 1: got -15, too small"),                                                      # beyond the edge
    ("pixels_seen", lambda i: (max(0, 8 * i - 11), min(63, 8 * i + 19)), "result 2: .*too large"),                                     # the middle of the cell
    ("cross_paths", lambda h, w: S["cross_paths"](h, w)[:2], "shape"),
    ("cross_paths", lambda h, w: S["cross_paths"](h, w)[[0, 2, 1, 3]], "differ"),
    ("cross_paths", lambda h, w: S["cross_paths"](h, w).double(), "dtype"),
    ("visited_at", lambda order: order, "differ"),
    ("vss_l2_parameters", lambda v, d, block: v * d + d + block + d * d + d, "too small"),                              # the norm's weights
    ("before_the_second_layer", lambda v: S["before_the_second_layer"](F.gelu(v)), "differ"),
    ("before_the_second_layer", lambda v: 4 * F.gelu(v) + v, "differ"),                                                 # no norm
    ("place_of_head", lambda k, h, H, G: (h * 4 + k, k * G + h // (H // G)), "result 1: got"),
    ("place_of_head", lambda k, h, H, G: (k * H + h, k * G + h % G), "result 2: got"),
    ("merge_and_gate", lambda y, order, z: sum(y_k[path] for y_k, path in zip(y, order)) * F.silu(z), "differ"),
    ("merge_and_gate", lambda y, order, z: S["merge_and_gate"](y, order, z) / len(y), "too (small|large).*same factor"),      # the mean
    ("merge_and_gate", lambda y, order, z: S["merge_and_gate"](y, order, z.detach()), "gradient of argument 3 is wrong"),
    ("ids_and_labels", lambda turns, eos: (lambda ids, labels: (ids, labels[1:] + [-100]))(*S["ids_and_labels"](turns, eos)), "result 2: .*one place too early"),
    ("ids_and_labels", lambda turns, eos: (lambda ids, labels: (ids, [-100 if i == eos else i for i in labels]))(*S["ids_and_labels"](turns, eos)), "result 2"),
    ("taught_by", lambda labels, eos: [a + [eos] for a in S["taught_by"](labels, eos)], "shape|result 1: shape"),       # with its end
    ("taught_by", lambda labels, eos: [[i for i in labels if i not in (-100, eos)]], "results: got 1, need 2"),
    ("pad_left", lambda rows, pad: (S["pad_left"](rows, pad)[0], S["pad_left"](rows, pad)[0] != pad), "result 2"),      # by token ids
    ("pad_left", lambda rows, pad: tuple(x.flip(1) for x in S["pad_left"]([row[::-1] for row in rows], pad)), "result 1"),
    ("pad_left", lambda rows, pad: tuple(x.tolist() for x in S["pad_left"](rows, pad)), "need a tensor"),
    ("packed_by_hand", [[3, 5, 4], [9, 2], [7]], "result 1|shape|got"),                                                 # as they come
    ("packed_by_hand", [[9, 2], [7, 5], [4, 3]], "differ"),
    ("picture_bytes", 24 * (4 * 1536 + 1536 * 128) * 4, "too small"),                                                   # B and C have no window
    ("picture_bytes", 24 * (4 * (1536 + 256) + 1536 * 128), "too small"),                                               # numbers, not bytes
    ("read_every_time", lambda v, t, of: torch.cat([t, v[of]], 1), "differ"),                                           # the question first
    ("read_every_time", lambda v, t, of: torch.cat([v.repeat_interleave(len(t) // len(v), 0), t], 1), "differ|Error"),
    ("read_every_time", lambda v, t, of: torch.cat([v[of].detach(), t], 1), "gradient of argument 1 is wrong"),
    ("trapezoid_rate", lambda p, lr, w, d: lr * min(p / w, 1), "too large"),                                            # never falls
    ("trapezoid_rate", lambda p, lr, w, d: lr * min(p / w, (1 - p) / (1 - w)), "too small"),                            # falls at once
    ("half_the_rate", 665_000 / 128 / 2, "too small"),                                                                  # without the warm-up
    ("shares_of", lambda counts: counts / counts.sum(), "too small.*same factor"),                                      # without P
    ("shares_of", lambda counts: torch.full_like(counts, 1 / counts.shape[1]), "differ"),                               # the mean of means
    ("clipped", lambda gradients, limit: [g * min(1, limit / g.norm()) for g in gradients], "result 1"),                # each by itself
    ("clipped", lambda gradients, limit: [g * limit / sum(i.square().sum() for i in gradients).sqrt() for g in gradients], "case 2.*|too"),
    ("clipped", lambda gradients, limit: [g.clamp(-limit, limit) for g in gradients], "differ"),
    ("pope_scores", lambda said, labels: (sum(s == t for s, t in zip(said, labels)) / len(said), S["pope_scores"](said, labels)[1]), "result 1"),
    ("pope_scores", lambda said, labels: (S["pope_scores"](said, labels)[0], labels.count("yes") / len(labels)), "result 2"),
    ("parts_by_picture", lambda right, of: [[a / b, 1] for a, b in S["parts_by_picture"](right, of)], "differ"),        # shares
    ("parts_by_picture", lambda right, of: [row[::-1] for row in S["parts_by_picture"](right, of)], "differ"),
    ("exponent_of", 3, "too large"),                                                                                    # eight is two to the third
    ("exponent_of", 8, "too large"),
    ("peak_of", lambda events: sum(e for e in events if e > 0), "too large"),                                           # as if nothing were freed
    ("peak_of", lambda events: sum(events), "too small"),
    ("peak_of", lambda events: max(sum(events[:i + 1]) for i in range(len(events))), "too small|ValueError"),
    ("half_width", lambda scores, t: t * torch.tensor(scores).std(unbiased=False).item() / len(scores) ** 0.5, "too small"),
    ("half_width", lambda scores, t: t * torch.tensor(scores).std().item(), "too large"),
    ("differences", lambda scores, others: [a - b for a, b in zip(scores.values(), others.values())], "differ"),        # as they stand
    ("differences", lambda scores, others: [-d for d in S["differences"](scores, others)], "sign is turned round"),
    ("pair_loss", lambda logits, together: F.binary_cross_entropy_with_logits(logits, together.double()), "too small"), # a mean over all
    ("pair_loss", lambda logits, together: -S["pair_loss"](logits, together), "sign is turned round"),
    ("pair_loss", lambda logits, together: S["pair_loss"](logits, ~together), "too"),
    ("one_way_first_row", (64 - 3.5) / 64, "too small"),                                                                # nobody guesses
]


def exercise_cells(page):
    "{name: (text before it, code)} of the exercises of a chapter, and the code of its section before the first one."
    cells = read(page).cells
    start = next((i for i, cell in enumerate(cells) if cell.cell_type == "markdown" and cell.source.startswith("## Exercises\n")), len(cells))
    found, first = {}, cells[start + 1].source if start < len(cells) else ""
    for text, code in zip(cells[start:], cells[start + 1:]):
        name = re.search(r'^check\("(\w+)", \1\)$', code.source, re.MULTILINE)
        if name and code.cell_type == "code":
            found[name[1]] = text.source, code.source
    return found, first


EXERCISES = {page: exercise_cells(page) for page in chapters()}


@pytest.mark.parametrize("page", chapters())
def test_every_chapter_has_two(page, capsys):
    "With a task, a folded hint, a link to the solution; and untouched they run, and say that they are not begun."
    found, first = EXERCISES[page]
    assert len(found) >= 2 and first == "from vlmamba_lite.exercises import check"
    for name, (text, code) in found.items():
        assert name in TASKS and re.match(r"\*\*\d\. .+?\*\* \S", text)
        assert "<details><summary>Hint</summary>" in text and re.search(rf"\]\((\.\./)?solutions\.ipynb#{name}\)", text)
        exec(code, {"check": check})
        assert capsys.readouterr().out == f"{name}: {NOT_BEGUN}\n"


def test_every_exercise_stands_in_one_chapter_and_has_a_solution():
    placed = [name for found, _ in EXERCISES.values() for name in found]
    headings = re.findall(r"^### `(\w+)`$", "\n".join(cell.source for cell in read("solutions").cells), re.MULTILINE)
    assert sorted(placed) == sorted(TASKS) == sorted(ANSWERS) and placed == headings


@pytest.mark.parametrize("page", chapters())
def test_the_stub_takes_what_the_check_gives(page):
    "As many arguments, with the names of the solution."
    import inspect
    for name, (_, code) in EXERCISES[page][0].items():
        if callable(ANSWERS[name]):
            stub = re.search(rf"def {name}\((.*)\):", code)[1].split(", ")
            assert stub == list(inspect.signature(ANSWERS[name]).parameters), name


@pytest.mark.parametrize("name", sorted(ANSWERS))
def test_solution_is_right(name):
    assert review(name, ANSWERS[name]) == RIGHT


def shown(value):
    "The numbers of a right result as a message would show them; those that any message may hold are left out."
    array = _numbers(value)
    if isinstance(value, tuple) or array is None:
        return set().union(*map(shown, value)) if isinstance(value, (list, tuple)) else set()
    return {f"{x:.4g}" for x in array.astype(float).flatten() if abs(x) not in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 100)}


@pytest.mark.parametrize("name, answer, pattern", WRONG, ids=[name for name, *_ in WRONG])
def test_mistake_is_named_and_the_right_value_is_not(name, answer, pattern):
    text = review(name, answer)
    assert text not in (RIGHT, NOT_BEGUN) and re.search(pattern, text), text
    assert "\n" not in text and len(text) < 400
    told = re.sub(r" \(case .*", "", text)                                   # but for the inputs
    right = set().union(*(shown(_decode(case["result"])) for case in TASKS[name].get("cases", [TASKS[name]])))
    got = re.findall(r"got (-?[\d.]+(?:e[-+]\d+)?)", told)
    numbers = {f"{float(x):.4g}" for x in re.findall(r"-?\d+\.?\d*(?:e[-+]\d+)?", told)} - {f"{float(x):.4g}" for x in got}
    assert not numbers & right, (text, numbers & right)
    assert "cases" in TASKS[name] or "difference" not in text                # got and the difference would be the answer


def test_every_exercise_refuses_a_mistake():
    assert {name for name, *_ in WRONG} == set(TASKS)


def test_not_begun_and_not_an_answer():
    for name in TASKS:
        assert review(name, ...) == review(name, None) == NOT_BEGUN
        for nonsense in (lambda *_: ..., "seven", {}, [], torch.zeros(0), float("nan")):
            assert review(name, nonsense) != RIGHT
    assert review("one_step", 7) == "got int, need a function" and review("exponent_of", print).endswith("need a value")
    with pytest.raises(ValueError, match="name: got 'one_stop', need one of a_tenth_left"):
        review("one_stop", 7)


def test_what_a_function_does_wrong():
    "It raises, returns NaN, another dtype, or nothing."
    assert review("count_modulo", lambda bits, m: ANSWERS["count_modulo"](bits.double(), m)) == RIGHT          # more digits than it needs
    assert "dtype: got torch.float16, need torch.float32" in review("count_modulo", lambda bits, m: ANSWERS["count_modulo"](bits, m).half())
    assert "need a tensor" in review("count_modulo", lambda bits, m: ANSWERS["count_modulo"](bits, m).bfloat16())
    assert "ZeroDivisionError: " in review("place_of_head", lambda k, h, H, G: 1 // 0)
    assert "NaN at (0,)" in review("bias_for", lambda tau: tau * math.nan)
    assert review("bias_for", lambda tau: None) == NOT_BEGUN
    assert "TypeError: " in review("bias_for", lambda a, b: a)


def test_patterns():
    "The usual mistakes, each on numbers that fit no other."
    import numpy as np
    need = np.array([[1., 2.5, 4.], [7., -3., 0.5], [2., 8., 5.]])
    made = {"sign": -need, "reversed": need[::-1], "exchanged": need.T, "late": np.roll(need, 1, 0), "early": np.roll(need, -1, 0),
            "factor": 3 * need, "amount": need + 2, "zero": 0 * need}
    for word, got in made.items():
        assert word in _pattern(got, need), word
    assert _pattern(need ** 2, need) == ""


def test_the_file_is_that_of_the_solutions():
    "vlmamba_lite/exercises.json is what tests/exercises.py writes; numbers up to rounding."
    def compare(a, b):
        assert type(a) is type(b)
        if isinstance(a, (list, dict)):
            assert len(a) == len(b) and (not isinstance(a, dict) or a.keys() == b.keys())
            for x, y in zip(a.values() if isinstance(a, dict) else a, b.values() if isinstance(b, dict) else b):
                compare(x, y)
        else:
            assert math.isclose(a, b, rel_tol=1e-8, abs_tol=1e-10) if isinstance(a, float) else a == b
    compare(expected(NAMES), TASKS)


def test_solutions_judge_themselves():
    "The notebook ends with a line that asks `review` about each of its answers."
    assert "assert all(review(name, answer) == RIGHT for name, answer in answers.items())" in page_code("solutions")
