"""Can the tests fail? Single lines of the library are broken, one at a time, and the tests that should see it are run.

    python tests/mutations.py            every mutation: caught, survived, or stale where its line is not there once
    python tests/mutations.py scan ssd   those whose tests or texts hold one of these words
    python tests/mutations.py --check    only whether each line is there once

A mutation is known by its text, not by its file: it moves with the code. The generated module is changed and put back.
"""
import argparse
import subprocess
import sys
import time

from house import LIBRARY, ROOT

MUTATIONS = (                                                        # (old text, new text, test files)
    # the scan
    ("h = torch.exp(delta_t[..., None] * A) * h + (delta_t * u_t)", "h = torch.exp(delta_t[..., None] * A) * h + (u_t * u_t)", "scan"),
    ("return h, (C_t * h).sum(-1)", "return h, (C_t * h).mean(-1)", "scan"),
    ("return torch.float64 if dtype == torch.float64 else torch.float32", "return torch.float32", "scan"),
    ("delta = delta + delta_bias.to(dtype)[:, None]", "delta = delta - delta_bias.to(dtype)[:, None]", "scan"),
    ("y = y * F.silu(z.to(y.dtype))", "y = y * torch.sigmoid(z.to(y.dtype))", "scan"),
    ("B_t = B_t.repeat_interleave(x.shape[1] // B_t.shape[1], 1)", "B_t = B_t.repeat(1, x.shape[1] // B_t.shape[1], 1)", "scan"),
    ("require(not top > 0, \"A\"", "require(not top > 1, \"A\"", "scan scan_inputs"),
    ("return a2 * a1, a2 * x1 + x2", "return a2 * a1, a1 * x1 + x2", "scan"),
    ("h = torch.stack([h, right], 1).flatten(0, 1)[:len(a)]", "h = torch.stack([right, h], 1).flatten(0, 1)[:len(a)]", "scan"),
    ("merged = [torch.cat([new, old[-1:]]) for new, old", "merged = [torch.cat([new, old[:1]]) for new, old", "scan"),
    ("h = bound.copy_(h) ", "bound.copy_(h); ", "scan"),
    ("for s in range(t - 2, -1, -1):", "for s in range(t - 2, 0, -1):", "scan"),
    ("g_t = g_steps[s].addcmul_(a_steps[s + 1], g_t)", "g_t = g_steps[s].addcmul_(a_steps[s], g_t)", "scan"),
    ("q = a.mul_(g).mul_(h[:-1])", "q = a.mul_(g).mul_(h[1:])", "scan"),
    ("gA += q.mul_(dt[now].unsqueeze(3)).sum((0, 1))", "gA += q.sum((0, 1))", "scan"),
    ("G = math.lcm(*(g.shape[1] for X, g in ((B, Bg), (C, Cg))", "G = max(*(g.shape[1] for X, g in ((B, Bg), (C, Cg))", "scan"),
    # SSD
    ("return sums.masked_fill(future.triu(1), -math.inf)", "return sums.masked_fill(future, -math.inf)", "ssd"),
    ("return B.repeat_interleave(H // B.shape[2], 2)", "return B.repeat(1, 1, H // B.shape[2], 1)", "ssd"),
    ("S.add_(low.unsqueeze(-1)).sub_(low.unsqueeze(-2))", "S.add_(low.unsqueeze(-2)).sub_(low.unsqueeze(-1))", "ssd"),
    ("left.add_(rest[..., -1:]).sub_(rest)", "left.sub_(rest[..., -1:]).add_(rest)", "ssd"),
    ("h = torch.addcmul(written_k, kept_k, h)", "h = torch.addcmul(kept_k, written_k, h)", "ssd"),
    ("return dt if tuple(dt_limit) == (0., math.inf) else dt.clamp(*dt_limit)", "return dt", "ssd"),
    ("y, h = form(X * dt[..., None], dt * A, B, C, h)", "y, h = form(X, dt * A, B, C, h)", "ssd"),
    ("future = high.new_full(S.shape[-2:], -math.inf).triu(1)", "future = high.new_full(S.shape[-2:], -math.inf).triu(0)", "ssd"),
    # the blocks
    ("y = sum(seen[:, k + 1:k + 1 + L] * taps[k]", "y = sum(seen[:, k:k + L] * taps[k]", "mamba blocks"),
    ("return gseen, gtaps.sum(0), None if bias is None", "return gseen, gtaps.mean(0), None if bias is None", "mamba blocks"),
    ("window = torch.cat([window[..., 1:], x_t[..., None]", "window = torch.cat([window[..., :-1], x_t[..., None]", "mamba blocks"),
    ("at = lengths[:, None] + torch.arange(K, device=seen.device)", "at = lengths[:, None] - 1 + torch.arange(K, device=seen.device)", "blocks"),
    ("no_weight_decay(self.A_log, self.D)", "no_weight_decay(self.A_log)", "mamba training"),
    # two dimensions
    ("return torch.cat([paths, paths.flip(1)])", "return torch.cat([paths, paths.flip(0)])", "vss"),
    ("back = order.to(y.device).argsort(1) + L", "back = order.to(y.device) + L", "vss"),
    ("source = order.mT * S + torch.arange(K, device=order.device) % S", "source = order.mT * S", "vss"),
    ("return y if bias is None else y + (K // S - 1) * bias", "return y", "vss"),
    ("y = y.unflatten(2, (S, K // S)).sum(3) * F.silu(z)", "y = y.unflatten(2, (S, K // S)).mean(3) * F.silu(z)", "vss"),
    # connectors
    ("return self.mlp(self.norm(self.vss(tokens, size) + tokens))", "return self.mlp(self.norm(self.vss(tokens, size)))", "connector"),
    ("return self.linear2(self.norm(self.vss(F.gelu(v), size) + v))", "return self.linear2(self.norm(self.vss(v, size) + v))", "connector"),
    ("return self.w3(F.silu(self.w1(x)) * self.w2(x))", "return self.w3(F.silu(self.w2(x)) * self.w1(x))", "msc"),
    ("return self.swiglu(x + self.mvss(self.norm(x), size))", "return self.swiglu(x + self.mvss(x, size))", "msc"),
    ("return self.out_proj(y / self.K if self.merge == \"mean\" else y)", "return self.out_proj(y)", "msc"),
    ("y = y.sum(1) * F.silu(z) if self.norm is None", "y = y.sum(1) if self.norm is None", "msc"),
    # masks, loss, sampling
    ("labels = labels.masked_fill(~(mask & before), -100)", "labels = labels.masked_fill(~mask, -100)", "language_model"),
    ("F.pad(labels[:, 1:], (0, 1), value=-100)", "F.pad(labels[:, :-1], (1, 0), value=-100)", "language_model"),
    ("projection.weight /= math.sqrt(len(last) * config.n_layer)", "projection.weight /= math.sqrt(config.n_layer)", "language_model"),
    ("p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)", "p = p.masked_fill(p.cumsum(-1) >= top_p, 0)", "language_model"),
    ("return [type(s)(*(part[rows] for part in s)) for s in state]", "return [type(s)(*(part[rows[:1]] for part in s)) for s in state]", "language_model model"),
    ("ids = input_ids if mask is None else input_ids.masked_fill(~mask, vocab_size)", "ids = input_ids", "language_model"),
    # batches
    ("starts = [[n if t == 0 else -1 for n in line", "starts = [[n for n in line", "data_batches"),
    ("at = next((k for k, left in enumerate(free) if left >= lengths[i]), len(lines))",
     "at = next((k for k, left in enumerate(free) if left > lengths[i]), len(lines))", "data_batches"),
    ("count = int(self.before[block][k] + (drawn[:at] == k).sum())", "count = int((drawn[:at] == k).sum())", "data_batches"),
    ("permutation(len(self.sets[k]), self.seed, 1 + k, this_pass)", "permutation(len(self.sets[k]), self.seed, 1 + k)", "data_batches"),
    ("keys = np.where(table >= 0, log_weights[types[table]] + rng.gumbel(", "keys = np.where(table >= 0, log_weights[types[table]] - rng.gumbel(",
     "data data_batches"),
    # the loop
    ("fall = 0.5 * (1 + math.cos(", "fall = 0.5 * (1 - math.cos(", "training"),
    ("part.train(name in trains)", "part.train(True)", "training engine"),
    ("freeze(self.model, stage.trains)", "freeze(self.model, (\"vision\", \"connector\", \"language\"))", "training engine"),
    ("moved = [name for name in before if before[name] != after[name]]", "moved = [name for name in before if before[name] == after[name]]",
     "training engine"),
    ("norm = nn.utils.clip_grad_norm_(learner.parameters(), clip)", "norm = nn.utils.clip_grad_norm_(learner.parameters(), 1e9)", "training engine"),
    ("group[\"lr\"] = lr", "group[\"lr\"] = group[\"lr\"]", "training engine"),
    ("loss += part.detach() / processes.count", "loss += part.detach()", "distributed"),
    # stop and resume
    ("done = min(run.step - run.began, stage.steps)", "done = 0", "engine"),
    ("elif file_sha256(file) != sha256:", "elif False:", "training engine kill"),
    ("kept = {*paths[-keep:],", "kept = {*paths[:keep],", "training engine"),
    ("return max(scored, key=lambda pair: pair[0])[1]", "return min(scored, key=lambda pair: pair[0])[1]", "training engine"),
    ("kept = [line for line in read_metrics(path) if line[\"step\"] <= start]", "kept = [line for line in read_metrics(path)]", "training engine"),
    ("states.setdefault(params[name], {})[key] = share_of(", "states.setdefault(params[name], {})[name] = share_of(", "training engine"),
    # settings
    ("new = given | own[stage.name]", "new = own[stage.name] | given", "cli"),
    ("raise typer.Exit(1 if isinstance(error, FloatingPointError) else 2) from None", "raise typer.Exit(2) from None", "cli"),
)


def place(old):
    "The file and text that hold a text exactly once in the whole library; None otherwise."
    files = [path for path in sorted(LIBRARY.rglob("*.py")) if path.name not in ("_modidx.py", "__init__.py")]
    found = [(path, text) for path in files if old in (text := path.read_text(encoding="utf-8"))]
    return found[0] if len(found) == 1 and found[0][1].count(old) == 1 else None


def caught(old, new, tests):
    "Whether a test fails while `new` stands in the place of `old`."
    path, text = place(old)
    files = [f"tests/test_{name}.py" for name in tests.split() if (ROOT / "tests" / f"test_{name}.py").exists()]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n0", "-p", "no:cacheprovider", *files]
    try:
        path.write_text(text.replace(old, new), encoding="utf-8")
        return subprocess.run(command, cwd=ROOT, capture_output=True).returncode != 0
    finally:
        path.write_text(text, encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="only mutations whose tests or texts hold one of these")
    parser.add_argument("--check", action="store_true", help="only whether each line is there once")
    given = parser.parse_args()
    counts = dict(caught=0, survived=0, stale=0)
    for old, new, tests in MUTATIONS:
        if given.words and not any(word in old or word in tests.split() for word in given.words):
            continue
        began = time.monotonic()
        if place(old) is None:
            verdict = "stale"
        elif given.check:
            continue
        else:
            verdict = "caught" if caught(old, new, tests) else "survived"
        counts[verdict] += 1
        print(f"{verdict:9} {time.monotonic() - began:6.1f} s  {old}", flush=True)
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    raise SystemExit(bool(counts["survived"] or counts["stale"]))


if __name__ == "__main__":
    main()
