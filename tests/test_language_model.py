"""The language model against transformers, against itself read in pieces, padded or step by step, and against slow loops."""
import math
import statistics
import time
from types import SimpleNamespace

from measures import lively, rms_error
import pytest
import safetensors.torch
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import pad_sequence

from vlmamba_lite.language import model as language_model
from vlmamba_lite.language.model import (MIXERS, Block, MambaConfig, MambaLM, clone_state, last_token, load_state,
                                         next_token_loss, read_stream, save_state, select_state)
from vlmamba_lite.language.sampling import GraphedStep, choose_token, kept_probabilities, penalise, seen_tokens
from vlmamba_lite.layers.attention import Attention, AttentionState, rotate

few = settings(deadline=None, max_examples=12, derandomize=True, database=None)
ARGS = {"mamba": dict(d_state=5), "mamba2": dict(d_state=6, headdim=8, chunk_size=8), "mamba3": dict(d_state=6, headdim=8, chunk_size=8), "attention": dict(headdim=8)}
# the second attention with all that the official one can have
HYBRID = ["mamba2", "attention", "mamba3"]
HYBRID_ARGS = {name: ARGS[name] for name in ("mamba2", "mamba3")} | {"attention": dict(headdim=6, nheads=4, nheads_kv=2, rope_dim=4, d_conv=3, bias=True, out_bias=False)}
every = pytest.mark.parametrize("mixer", [*sorted(MIXERS), "hybrid"])
peers = pytest.mark.parametrize("mixer", ["attention", "mamba", "mamba2"])     # what transformers has
both = pytest.mark.parametrize("mixer", ["mamba", "mamba2"])
V = 37


def make(mixer, /, dtype=torch.float64, **kwargs):
    torch.manual_seed(0)
    kind = dict(mixer=HYBRID, mixer_args=HYBRID_ARGS) if mixer == "hybrid" else dict(mixer=mixer, mixer_args=ARGS[mixer])
    config = dict(d_model=16, n_layer=3, vocab_size=V) | kind | kwargs
    return lively(MambaLM(MambaConfig(**config))).to(dtype)


def tokens(*shape, seed=1):
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


def row_of(state, i):
    "The state of one row; without the pads that attention keeps."
    row = [type(s)(*(part[i:i+1] for part in s)) for s in state]
    return [AttentionState(*(part[:, s.real[0]] for part in s[:3]), s.conv) if isinstance(s, AttentionState) else s for s in row]


def assert_states(got, want, limit):
    for g, w in zip(got, want, strict=True):
        assert type(g) is type(w)
        assert max(rms_error(a, b) for a, b in zip(g, w, strict=True) if b.numel()) < limit


def pad(rows, side, value=0):
    ids = pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)
    return ids, pad_sequence([torch.ones(len(r), dtype=torch.bool) for r in rows], batch_first=True, padding_side=side)


# --- transformers ----------------------------------------------------------------------------------------------------

def our_weights(w):
    return {name.replace("backbone.embeddings.", "backbone.embedding."): p for name, p in w.items()}


def our_weights_of_llama(w):
    new = {"backbone.embedding.weight": w["model.embed_tokens.weight"], "backbone.norm_f.weight": w["model.norm.weight"],
           "lm_head.weight": w["lm_head.weight"]}
    for i in range(3):
        old, our = f"model.layers.{i}.", f"backbone.layers.{i}."
        new[our + "norm.weight"] = w[old + "input_layernorm.weight"]
        new[our + "norm2.weight"] = w[old + "post_attention_layernorm.weight"]
        new[our + "mixer.in_proj.weight"] = torch.cat([w[f"{old}self_attn.{x}_proj.weight"] for x in "qkv"])
        new[our + "mixer.out_proj.weight"] = w[old + "self_attn.o_proj.weight"]
        new[our + "mlp.fc1.weight"] = torch.cat([w[f"{old}mlp.{x}_proj.weight"] for x in ("up", "gate")])
        new[our + "mlp.fc2.weight"] = w[old + "mlp.down_proj.weight"]
    return new


def peer(mixer, tied=True):
    "A random transformers model and ours with its weights: 40 = 37 padded to a multiple of 8."
    torch.manual_seed(0)
    shared = dict(vocab_size=40, hidden_size=16, num_hidden_layers=3, tie_word_embeddings=tied, bos_token_id=None,
                  eos_token_id=None, pad_token_id=None)
    weights = our_weights
    if mixer == "mamba":
        config = transformers.MambaConfig(**shared, state_size=5, time_step_rank=1, use_mambapy=False)
        theirs = transformers.MambaForCausalLM(config)
    elif mixer == "attention":
        config = transformers.LlamaConfig(**shared, intermediate_size=48, num_attention_heads=2, head_dim=8, rms_norm_eps=1e-5)
        theirs, weights = transformers.LlamaForCausalLM(config), our_weights_of_llama
    else:
        config = transformers.Mamba2Config(**shared, num_heads=4, head_dim=8, state_size=6, n_groups=1, chunk_size=8)
        theirs = transformers.Mamba2ForCausalLM(config)
    theirs = lively(theirs).eval()
    ours = MambaLM(MambaConfig(16, 3, V, mixer=mixer, mixer_args=ARGS[mixer], tie_embeddings=tied))
    ours.load_state_dict(weights(theirs.state_dict()), strict=True)
    with torch.no_grad():                               # transformers knows no padding: its three extra tokens must lose too
        theirs.lm_head.weight[V:] = 0.
    return theirs, ours


@peers
@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_transformers(mixer, tied):
    theirs, ours = peer(mixer, tied)
    for length in (1, 3, 8, 29):
        ids = tokens(2, length)
        with torch.no_grad():
            want = theirs(ids, use_cache=False).logits[..., :V]
            got = ours(ids).logits
        assert rms_error(got, want) < 1e-5, length


@peers
def test_loss_is_that_of_transformers(mixer):
    theirs, ours = peer(mixer)
    ids = tokens(3, 12)
    labels = ids.masked_fill(tokens(3, 12, seed=2) < 12, -100)
    logits = theirs(ids, use_cache=False).logits[..., :V]
    want = theirs.loss_function(logits, labels, vocab_size=V)
    assert 0 < (labels == -100).sum() < labels.numel()
    torch.testing.assert_close(ours(ids, labels=labels).loss, want, rtol=1e-5, atol=0)


@peers
def test_greedy_generation_is_that_of_transformers(mixer):
    theirs, ours = peer(mixer)
    ids = tokens(4, 7)
    want = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=25, do_sample=False)
    got = ours.generate(ids, 25)
    assert torch.equal(got, want) and got.shape == (4, 32)
    stop = got[0, 11].item()                            # now each row stops by itself, and is filled up with the stop id
    want = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=25, do_sample=False,
                           eos_token_id=stop, pad_token_id=stop)
    assert torch.equal(ours.generate(ids, 25, [stop]), want)


# --- state -----------------------------------------------------------------------------------------------------------

@every
def test_steps_are_the_forward_pass(mixer):
    lm, ids = make(mixer), tokens(2, 120)
    want, state, logits = lm(ids), None, []
    for token in ids.unbind(1):
        out, state = lm.step(token, state)
        logits.append(out)
    assert rms_error(torch.stack(logits, 1), want.logits) < 1e-11
    assert_states(state, want.state, 1e-11)
    after = tokens(2, 5, seed=3)                        # and the state serves a further reading
    assert rms_error(lm(after, state=state).logits, lm(torch.cat([ids, after], 1)).logits[:, 120:]) < 1e-11


@every
@given(cuts=st.lists(st.integers(1, 29), unique=True, min_size=1, max_size=4).map(sorted))
@few
def test_a_text_may_be_read_in_pieces(mixer, cuts):
    lm, ids = make(mixer), tokens(2, 30)
    want, state, logits = lm(ids), None, []
    for piece in ids.tensor_split(cuts, 1):
        out = lm(piece, state=state)
        logits.append(out.logits)
        state = out.state
    assert rms_error(torch.cat(logits, 1), want.logits) < 1e-11
    assert_states(state, want.state, 1e-11)


@every
def test_the_state_is_not_changed_in_place(mixer):
    lm, ids = make(mixer), tokens(2, 9)
    state = lm(ids).state
    before = [[part.clone() for part in s] for s in state]
    lm.step(ids[:, 0], state)
    lm.generate(ids, 3, state=state)
    assert all(torch.equal(a, b) for s, t in zip(state, before, strict=True) for a, b in zip(s, t, strict=True))


@every
def test_gradcheck_through_the_state(mixer):
    args = {"mamba": dict(d_state=2), "mamba2": dict(d_state=2, headdim=4, chunk_size=2), "mamba3": dict(d_state=4, headdim=4, chunk_size=2),
            "attention": dict(headdim=4)}
    kind = dict(mixer=["attention", "mamba2"], mixer_args=dict(attention=dict(headdim=2, d_conv=2), mamba2=args["mamba2"])) if mixer == "hybrid" else dict(mixer_args=args[mixer])
    lm = make(mixer, d_model=4, n_layer=2, vocab_size=5, **kind)
    a, b = (torch.randn(1, n, 4, dtype=torch.float64, requires_grad=True) for n in (3, 2))

    def logits_of_b(a, b):
        out = lm(inputs_embeds=b, state=lm.hidden(inputs_embeds=a)[1])
        return (out.logits, *(part for s in out.state for part in s if part.dtype != torch.bool and part.numel()))

    assert torch.autograd.gradcheck(logits_of_b, (a, b))


@every
def test_parameters_learn_the_same_from_pieces_and_from_steps(mixer):
    lm, ids = make(mixer), tokens(2, 14)

    def gradients(read):
        loss = next_token_loss(read(), ids)
        return torch.autograd.grad(loss, list(lm.parameters()))

    def pieces():
        first = lm(ids[:, :5])
        return torch.cat([first.logits, lm(ids[:, 5:], state=first.state).logits], 1)

    def steps():
        state, logits = None, []
        for token in ids.unbind(1):
            out, state = lm.step(token, state)
            logits.append(out)
        return torch.stack(logits, 1)

    want = gradients(lambda: lm(ids).logits)
    for read in (pieces, steps):
        assert max(map(rms_error, gradients(read), want)) < 1e-9, read


@every
def test_rows_of_a_state_may_be_taken_more_than_once(mixer):
    lm, prefix, rest = make(mixer), tokens(2, 11), tokens(6, 4, seed=2)
    state = lm(prefix).state
    wide = select_state(state, torch.arange(2).repeat_interleave(3))
    assert all(type(w) is type(s) for w, s in zip(wide, state, strict=True))
    got = lm(rest, state=wide).logits
    want = lm(torch.cat([prefix.repeat_interleave(3, 0), rest], 1)).logits[:, 11:]
    assert rms_error(got, want) < 1e-11
    weights = list(lm.parameters())
    grads = [torch.autograd.grad(x.square().sum(), weights) for x in (got, want)]
    assert max(map(rms_error, *grads)) < 1e-9


@every
def test_a_wrong_state_is_named(mixer):
    lm, ids = make(mixer), tokens(3, 4)
    state = lm(ids).state
    for call in (lambda s, r: lm(ids[:r], state=s), lambda s, r: lm.step(ids[:r, 0], s), lambda s, r: lm.generate(ids[:r], 1, state=s)):
        with pytest.raises(ValueError, match="state: got 2 layers, need 3"):
            call(state[:2], 3)
        with pytest.raises(ValueError, match="state: got 3 rows, need 1"):
            call(state, 1)


@every
def test_a_state_is_saved_loaded_and_cloned(mixer, tmp_path):
    lm, ids = make(mixer, torch.bfloat16), tokens(2, 9)
    state = lm(ids).state
    save_state(state, tmp_path / "deep" / "state.safetensors")
    loaded, cloned = load_state(tmp_path / "deep" / "state.safetensors"), clone_state(state)
    for other in (loaded, cloned):
        for s, o in zip(state, other, strict=True):
            assert type(s) is type(o) and not any(part.requires_grad for part in o)
            assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(s, o, strict=True))
    assert torch.equal(lm.generate(ids[:, :2], 9, state=loaded), lm.generate(ids[:, :2], 9, state=state))
    with torch.no_grad():
        cloned[0][0].zero_()
    assert state[0][0].any()
    assert [f.name for f in (tmp_path / "deep").iterdir()] == ["state.safetensors"]


def test_files_that_hold_no_state(tmp_path):
    path = tmp_path / "state.safetensors"
    with pytest.raises(FileNotFoundError):
        load_state(path)
    save_state(make("mamba")(tokens(1, 3)).state, path)
    whole = path.read_bytes()
    for wrong in (b"", b"{}", whole[:-8], whole[:20]):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match="state.safetensors"):
            load_state(path)
    safetensors.torch.save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"state.safetensors: got state None, need one of \['AttentionState', 'Mamba2State', 'Mamba3State', 'MambaState'\]"):
        load_state(path)


@every
def test_recomputation_changes_nothing_but_memory(mixer):
    lm, ids = make(mixer, torch.float32), tokens(2, 40)
    before = clone_state(lm(ids).state)

    def run(recompute):
        kept, lm.backbone.recompute = [], recompute
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            out = lm(ids, labels=ids, state=before)
        return sum(kept), out, torch.autograd.grad(out.loss, list(lm.parameters()))

    (much, plain, want), (little, again, got) = run(False), run(True)
    assert torch.equal(plain.loss, again.loss) and all(map(torch.equal, got, want))
    assert_states(again.state, plain.state, 1e-12)
    assert little + 3 * ids.numel() * 16 < much / 3      # with the inputs of the three layers, which are kept
    lm.backbone.recompute = True
    with torch.no_grad():
        again = lm(ids, state=before).logits
    lm.backbone.recompute = False
    assert torch.equal(lm(ids, state=before).logits, again)


# --- cost of a token -------------------------------------------------------------------------------------------------

@both
def test_a_token_costs_the_same_after_any_context(mixer):
    lm, token = make(mixer, torch.float32), tokens(1)
    with torch.no_grad():
        states = {length: lm.hidden(tokens(1, length))[1] for length in (128, 16384)}
        sizes = {length: [tuple(part.shape) for s in state for part in s] for length, state in states.items()}
        assert sizes[128] == sizes[16384]

        def ratio(blocks=15, steps=30):
            spent = {length: [] for length in states}
            for _ in range(blocks):                      # in turns, so that a busy machine is busy for both
                for length, state in states.items():
                    start = time.process_time()
                    for _ in range(steps):
                        _, state = lm.step(token, state)
                    spent[length].append(time.process_time() - start)
            return statistics.median(spent[16384]) / statistics.median(spent[128])

        assert any(ratio() <= 1.2 for _ in range(3))


def test_attention_keeps_every_token():
    lm = make("attention", torch.float32)
    with torch.no_grad():
        for length in (1, 20, 300):
            state = lm.hidden(tokens(2, length))[1]
            assert len(state) == 3 and all(s.key.shape == s.value.shape == (2, length, 2, 8) for s in state)


# --- attention -------------------------------------------------------------------------------------------------------

def test_attention_is_its_sum():
    torch.manual_seed(0)
    layer, x = Attention(12, headdim=4).double(), torch.randn(2, 7, 12, dtype=torch.float64)
    place = torch.arange(7).expand(2, 7)
    q, k, v = layer.in_proj(x).view(2, 7, 3, 3, 4).unbind(2)
    q, k = rotate(q, place), rotate(k, place)
    y = torch.zeros(2, 7, 3, 4, dtype=torch.float64)
    for b, t, h in ((b, t, h) for b in range(2) for t in range(7) for h in range(3)):
        p = torch.stack([q[b, t, h] @ k[b, s, h] / 2 for s in range(t + 1)]).softmax(0)
        y[b, t, h] = sum(p[s] * v[b, s, h] for s in range(t + 1))
    assert rms_error(layer(x), layer.out_proj(y.flatten(2))) < 1e-12


def test_rotation_is_a_complex_product():
    x = torch.randn(2, 5, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    place = torch.tensor([[0, 1, 2, 3, 4], [7, 8, 9, 1000, 16000]])
    z = torch.complex(x[..., :3], x[..., 3:])
    angle = place[..., None] * torch.tensor([1., 100. ** (-2 / 6), 100. ** (-4 / 6)], dtype=torch.float64)
    want = z * torch.polar(torch.ones_like(angle), angle)[:, :, None]
    assert rms_error(rotate(x, place, base=100.), torch.cat([want.real, want.imag], -1)) < 1e-12
    assert rotate(x.bfloat16(), place).dtype == torch.bfloat16


def test_bfloat16_attention():
    exact, lm, ids = make("attention"), make("attention", torch.bfloat16), tokens(2, 20)
    out = lm(ids)
    assert out.logits.dtype == out.state[0].key.dtype == torch.bfloat16 and lm.hidden(ids)[0].dtype == torch.float32
    assert rms_error(out.logits, exact(ids).logits) < 0.05
    with torch.autocast("cpu", torch.bfloat16):
        single = make("attention", torch.float32)
        logits, _ = single.step(ids[:, 0], single(ids).state)
        assert rms_error(logits, exact.step(ids[:, 0], exact(ids).state)[0]) < 0.05


@pytest.mark.parametrize("wrong", [dict(headdim=5), dict(headdim=3), dict(headdim=1), dict(headdim=0)])
def test_impossible_heads(wrong):
    with pytest.raises(ValueError, match="headdim: got"):
        MambaLM(MambaConfig(16, 1, V, mixer="attention", mixer_args=wrong))


def test_wrong_inputs_of_attention():
    layer = Attention(16, headdim=8)
    for x in (torch.zeros(2, 16), torch.zeros(2, 0, 16), torch.zeros(2, 3, 8)):
        with pytest.raises(ValueError, match="x: got"):
            layer(x)
    for mask in (torch.ones(2, 4, dtype=torch.bool), torch.ones(2, 3)):
        with pytest.raises(ValueError, match="mask: got"):
            layer(torch.zeros(2, 3, 16), mask=mask)


@every
def test_any_mixer_may_have_an_mlp_or_none(mixer):
    with_mlp, without = make(mixer, d_intermediate=20), make(mixer, d_intermediate=0)
    assert with_mlp.backbone.layers[0].mlp.fc1.weight.shape == (40, 16) and without.backbone.layers[0].mlp is None
    for lm in (with_mlp, without):
        ids = tokens(2, 6)
        logits, _ = lm.step(ids[:, 5], lm(ids[:, :5]).state)
        assert rms_error(logits, lm(ids).logits[:, 5]) < 1e-11
    block, x = with_mlp.backbone.layers[0], torch.randn(1, 3, 16, dtype=torch.float64)
    half = x + block.mixer(read_stream(block.norm, x))
    value, gate = (read_stream(block.norm2, half) @ block.mlp.fc1.weight.T).chunk(2, -1)
    assert rms_error(block(x)[0], half + (value * gate * torch.sigmoid(gate)) @ block.mlp.fc2.weight.T) < 1e-12


def test_initialisation_of_a_transformer():
    torch.manual_seed(0)
    for layer in MambaLM(MambaConfig(64, 8, 100, mixer="attention")).backbone.layers:
        assert layer.mlp.fc2.weight.shape == (64, 176)   # 8/3 of 64, a multiple of 8
        for projection, fan_in in ((layer.mixer.out_proj, 64), (layer.mlp.fc2, 176)):
            bound = 1 / math.sqrt(fan_in) / 4            # sqrt(2 * 8 layers)
            assert 0.98 * bound < projection.weight.abs().max() <= bound


def test_a_state_of_another_mixer_is_named():
    ids, kinds = tokens(2, 4), {"mamba": "MambaState", "mamba2": "Mamba2State", "attention": "AttentionState"}
    states = {mixer: make(mixer)(ids).state for mixer in kinds}
    for mixer, other in ((m, o) for m in kinds for o in kinds if m != o):
        for call in (lambda s: make(mixer)(ids, state=s), lambda s: make(mixer).step(ids[:, 0], s)):
            with pytest.raises(ValueError, match=f"state: got {kinds[other]} in layer 0, need {kinds[mixer]}"):
                call(states[other])
    with pytest.raises(ValueError, match="state: got Mamba2State in layer 1, need AttentionState"):
        make("hybrid")(ids, state=states["mamba2"])


# --- hybrids -------------------------------------------------------------------------------------------------------

def test_a_hybrid_has_the_layers_of_its_list():
    "And its logits are those of the layers called one after the other."
    lm, ids = make("hybrid"), tokens(2, 9)
    layers = lm.backbone.layers
    assert [type(layer.mixer) for layer in layers] == [MIXERS[name] for name in HYBRID] and not any(layer.mlp for layer in layers)
    x = lm.embed(ids)
    for layer in layers:
        x = x + layer.mixer(torch.nn.functional.rms_norm(x, (16,), layer.norm.weight, 1e-5))
    assert rms_error(lm(ids).logits, lm.head(x)) < 1e-12


@pytest.mark.parametrize("rope_dim", [0, 8])
def test_steps_of_a_hybrid_in_float32_after_512_tokens(rope_dim):
    args = HYBRID_ARGS | {"attention": dict(headdim=8, rope_dim=rope_dim, d_conv=4)}
    lm, ids = make("hybrid", torch.float32, mixer_args=args), tokens(2, 513)
    with torch.no_grad():
        whole, (logits, state) = lm(ids), lm.step(ids[:, 0], None)
        for token in ids[:, 1:].unbind(1):
            logits, state = lm.step(token, state)
    assert rms_error(logits, whole.logits[:, -1]) < 1e-5
    assert_states(state, whole.state, 1e-5)


def test_attention_without_positions_only_knows_what_was_before():
    "Exchanging earlier tokens changes nothing; with positions, or after a layer with a state, it does."
    ids, other = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[2, 3, 1, 4]])
    for mixer, rope_dim, same in (("attention", 0, True), ("attention", None, False), ("attention", 2, False)):
        lm = make(mixer, n_layer=1, mixer_args=dict(headdim=8, rope_dim=rope_dim))
        assert (rms_error(lm(ids).logits[:, -1], lm(other).logits[:, -1]) < 1e-12) == same
    lm = make("hybrid", n_layer=2, mixer=["mamba2", "attention"], mixer_args=dict(mamba2=ARGS["mamba2"], attention=dict(headdim=8, rope_dim=0)))
    assert rms_error(lm(ids).logits[:, -1], lm(other).logits[:, -1]) > 1e-3


@pytest.mark.parametrize("wrong, words", [
    (dict(mixer=["mamba", "attention"]), "mixer: got 2 names, need 3 as n_layer says"), (dict(mixer=["mamba", "gru", "mamba"]), "mixer: got 'gru', need one of"),
    (dict(mixer=["mamba", 3, "mamba"]), "mixer: got 3, need one of"), (dict(mixer=[]), "mixer: got 0 names"), (dict(mixer=3.5), "mixer: got 3.5"),
    (dict(mixer=["mamba"] * 3, mixer_args=dict(d_state=4)), "mixer_args: got {'d_state': 4}, need arguments by the names of mixers, as mamba:"),
    (dict(mixer=["mamba"] * 3, mixer_args=dict(mamba2={})), "mixer_args: got {'mamba2': {}}, need"),
    (dict(mixer=["mamba"] * 3, mixer_args=dict(mamba=dict(headdim=4))), "mixer_args: got 'headdim', need some of")])
def test_lists_that_name_no_hybrid(wrong, words):
    with pytest.raises(ValueError, match=words):
        MambaConfig(16, 3, V, **wrong)


@pytest.mark.parametrize("wrong, words", [(dict(rope_dim=3), "rope_dim: got 3"), (dict(rope_dim=10), "rope_dim: got 10"), (dict(nheads=4, nheads_kv=3), "nheads_kv: got 3"),
                                          (dict(nheads=0), "headdim, nheads: got 8, 0"), (dict(nheads_kv=0), "nheads_kv: got 0")])
def test_impossible_attention(wrong, words):
    with pytest.raises(ValueError, match=words):
        Attention(16, headdim=8, **wrong)


# --- prompts of unequal length ---------------------------------------------------------------------------------------

@every
@pytest.mark.parametrize("side", ["left", "right"])
@given(lengths=st.lists(st.integers(1, 13), min_size=1, max_size=4), started=st.booleans())
@few
def test_each_row_gets_what_it_would_get_alone(mixer, side, lengths, started):
    lm = make(mixer)
    rows = [tokens(n, seed=i) for i, n in enumerate(lengths)]
    ids, mask = pad(rows, side, value=5)
    state = lm(tokens(len(rows), 6, seed=9)).state if started else None
    out, written = lm(ids, mask=mask, state=state), lm.generate(ids, 6, mask=mask, state=state)
    assert torch.equal(written[:, :ids.shape[1]], ids)
    for i, row in enumerate(rows):
        own = row_of(state, i) if started else None
        alone = lm(row[None], state=own)
        assert rms_error(out.logits[i, mask[i]], alone.logits[0]) < 1e-11
        assert_states(row_of(out.state, i), alone.state, 1e-11)
        assert torch.equal(written[i, -6:], lm.generate(row[None], 6, state=own)[0, -6:])


def test_pads_in_between():
    lm, ids = make("mamba"), tokens(1, 5)
    mask = torch.tensor([[False, True, False, True, True, False, True, True, False]])
    spread = torch.full((1, 9), 7).masked_scatter(mask, ids)
    assert rms_error(lm(spread, mask=mask).logits[mask], lm(ids).logits[0]) < 1e-11
    assert torch.equal(lm.generate(spread, 5, mask=mask)[:, 9:], lm.generate(ids, 5)[:, 5:])


@every
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("at_pads", [-100, 3])
def test_a_row_teaches_what_it_would_teach_alone(mixer, side, at_pads):
    lm = make(mixer)
    rows = [tokens(3), tokens(7, seed=2), tokens(1)]
    ids, mask = pad(rows, side)
    x = lm.embed(ids).detach().requires_grad_()
    got = lm(inputs_embeds=x, mask=mask, labels=ids.masked_fill(~mask, at_pads)).loss
    want = (2 * lm(rows[0][None], labels=rows[0][None]).loss + 6 * lm(rows[1][None], labels=rows[1][None]).loss) / 8
    torch.testing.assert_close(got, want, rtol=1e-11, atol=0)
    grad, = torch.autograd.grad(got, x)
    learnt = grad.abs().amax(-1) > 1e-14 * grad.abs().max()    # Mamba-3 takes off again what a step got from the next one, up to rounding
    assert not grad[~mask].any() and learnt[:2][mask[:2]].sum() == 8          # all real tokens but each row's last


def test_last_token():
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [0, 1, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    assert last_token(mask).tolist() == [1, 3, 1, 3]
    mask[2] = False
    with pytest.raises(ValueError, match="mask: got a row without a real token"):
        last_token(mask)
    with pytest.raises(ValueError, match="mask"):
        make("mamba").generate(tokens(4, 4), 2, mask=mask)


# --- generation ------------------------------------------------------------------------------------------------------

def write_slowly(lm, ids, max_new_tokens, stop_ids):
    "One row, greedy, everything read again for each token."
    for _ in range(max_new_tokens):
        ids = torch.cat([ids, lm(ids).logits[:, -1:].argmax(-1)], 1)
        if ids[0, -1] in stop_ids:
            break
    return ids[0]


@every
def test_generation_is_reading_everything_again(mixer):
    lm, ids = make(mixer), tokens(5, 6)
    free = lm.generate(ids, 12)
    stops = [free[0, 8].item(), free[1, 11].item(), free[2, 6].item()]
    got = lm.generate(ids, 12, stops)
    lengths = set()
    for row, prompt in zip(got, ids, strict=True):
        want = write_slowly(lm, prompt[None], 12, stops)
        assert torch.equal(row[:len(want)], want)
        assert (row[len(want):] == want[-1]).all()      # what follows a stop id is that stop id again
        lengths.add(len(want))
    assert len(lengths) > 1                             # the rows did stop at different places
    assert got.shape[1] == max(lengths)                 # and the walk ended with the last of them


@every
def test_how_many_tokens(mixer):
    lm, ids = make(mixer), tokens(2, 4)
    assert torch.equal(lm.generate(ids, 0), ids)
    assert lm.generate(ids, 1).shape == (2, 5)
    assert lm.generate(ids, 9, range(V)).shape == (2, 5)             # every token is a stop id
    with pytest.raises(ValueError, match="max_new_tokens: got -1, need at least 0"):
        lm.generate(ids, -1)
    for wrong in (ids[0], ids[:, :0]):
        with pytest.raises(ValueError, match="input_ids: got shape"):
            lm.generate(wrong, 2)


@every
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_that_draw_write_what_they_would_alone(mixer, side):
    lm = make(mixer)
    rows = [tokens(n, seed=n) for n in (2, 7, 4)]
    ids, mask = pad(rows, side)
    how = dict(temperature=1.3, min_p=0.01, repetition_penalty=1.2, stop_ids=[3, 11, 20])
    seeds = [torch.Generator().manual_seed(i) for i in range(3)]
    together = lm.generate(ids, 12, mask=mask, generator=seeds, **how)[:, ids.shape[1]:]
    for i, row in enumerate(rows):
        alone = lm.generate(row[None], 12, generator=[torch.Generator().manual_seed(i)], **how)[0, len(row):]
        assert torch.equal(together[i, :len(alone)], alone)
        assert (together[i, len(alone):] == alone[-1]).all()
    with pytest.raises(ValueError, match="generator: got 3 for 1 rows"):
        lm.generate(ids[:1], 2, generator=seeds, **how)


def decode(ids):
    return "".join(chr(97 + i % 26) for i in ids)


@every
def test_stop_strings(mixer):
    lm, ids = make(mixer), tokens(4, 6)
    free = lm.generate(ids, 15)
    texts = [decode(row) for row in free[:, 6:].tolist()]
    strings = [texts[0][3:6], texts[1][7:9]]             # over three tokens, and over two
    got = lm.generate(ids, 15, stop_strings=strings, decode=decode, pad_id=1)
    lengths = []
    for row, full, text in zip(got[:, 6:], free[:, 6:], texts, strict=True):
        ends = [text.find(s) + len(s) for s in strings if s in text]
        n = min(ends, default=15)
        assert torch.equal(row[:n], full[:n]) and (row[n:] == 1).all()
        lengths.append(n)
    assert len(set(lengths)) > 1 and got.shape[1] == 6 + max(lengths)
    in_prompt = decode(ids[0].tolist())                  # what the prompt says stops nobody
    assert lm.generate(ids[:1], 3, stop_strings=in_prompt, decode=decode).shape == (1, 9)
    both_kinds = lm.generate(ids[:1], 15, stop_ids=free[0, 7].item(), stop_strings=strings, decode=decode)
    assert torch.equal(both_kinds, free[:1, :7 + (free[0, 6:] == free[0, 7]).nonzero()[0, 0]])


def test_what_fills_a_row_that_is_done():
    lm, ids = make("mamba"), tokens(3, 4)
    free = lm.generate(ids, 10)
    stop = free[0, 5].item()
    for fill in (None, 0, 7):
        row = lm.generate(ids, 10, stop, pad_id=fill)[0]
        n = (free[0, 4:] == stop).nonzero()[0].item() + 5
        assert torch.equal(row[:n], free[0, :n]) and (row[n:] == (stop if fill is None else fill)).all()


@pytest.mark.parametrize("wrong, name", [
    (dict(stop_ids=[V]), "stop_ids"), (dict(stop_ids=[None]), "stop_ids"), (dict(stop_ids=-1), "stop_ids"),
    (dict(stop_strings=["a"]), "stop_strings"), (dict(stop_strings=[""], decode=decode), "stop_strings"),
    (dict(pad_id=V), "pad_id"), (dict(repetition_penalty=0.), "repetition_penalty"), (dict(min_p=-0.1), "min_p"),
    (dict(temperature=-1.), "temperature, top_k, top_p"), (dict(max_new_tokens=-1), "max_new_tokens"),
    (dict(mask=torch.zeros(2, 5, dtype=torch.bool)), "mask"), (dict(mask=torch.ones(2, 4, dtype=torch.bool)), "mask"),
    (dict(mask=torch.ones(2, 5)), "mask"), (dict(input_ids=torch.zeros(2, 0, dtype=torch.long)), "input_ids"),
    (dict(input_ids=torch.zeros(0, 5, dtype=torch.long)), "input_ids"), (dict(input_ids=torch.zeros(2, 5)), "input_ids"),
    (dict(input_ids=torch.full((2, 5), V)), "input_ids"), (dict(input_ids=torch.full((2, 5), -1)), "input_ids"),
    (dict(graph=True), "graph")])
def test_what_cannot_be_generated(wrong, name):
    lm = make("mamba")
    with pytest.raises(ValueError, match=f"^{name}: got") as caught:
        lm.generate(**dict(input_ids=tokens(2, 5), max_new_tokens=2) | wrong)
    assert "\n" not in str(caught.value)
    if name != "graph":                                  # found when the call is made, not when the first token is asked for
        with pytest.raises(ValueError, match=f"^{name}: got"):
            lm.stream(**dict(input_ids=tokens(2, 5), max_new_tokens=2) | wrong)


def test_ids_out_of_range_are_found_everywhere():
    lm = make("mamba2")
    for call in (lambda ids: lm(ids), lambda ids: lm.hidden(ids), lambda ids: lm.step(ids[:, 0], lm(tokens(2, 3)).state)):
        for wrong in (-1, V, 39):                        # 39 is a row of the padding of the table
            with pytest.raises(ValueError, match=rf"ids: got numbers from {wrong} to {wrong}, need 0 to {V - 1}"):
                call(torch.full((2, 4), wrong))


@both
def test_what_surrounds_a_captured_step(mixer, monkeypatch):
    "All of `GraphedStep` but the capture, which needs CUDA and is played here by a function that runs again."
    def capture_on_cpu(run, device):
        result = run()
        return SimpleNamespace(replay=lambda: result.copy_(run())), result

    monkeypatch.setattr("vlmamba_lite.language.sampling.capture", capture_on_cpu)
    monkeypatch.setattr("vlmamba_lite.language.sampling.check_graph", lambda lm, device: None)
    lm, ids = make(mixer), tokens(3, 9)
    assert torch.equal(lm.generate(ids, 30, graph=True), lm.generate(ids, 30))
    before = lm(ids).state
    kept = clone_state(before)
    fast, other = GraphedStep(lm, before), lm(tokens(3, 4)).state
    for state in (before, other, before):               # a state may be handed in anew at any time
        token = ids[:, 0]
        got, after = fast(token, state)
        want, expected = lm.step(token, state)
        assert rms_error(got, want) < 1e-12
        assert_states(after, expected, 1e-12)
        got, _ = fast(ids[:, 1], after)
        assert rms_error(got, lm.step(ids[:, 1], expected)[0]) < 1e-12
    assert_states(before, kept, 1e-15)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a CUDA device, and there is none here")
@both
def test_captured_steps_are_the_steps(mixer):
    lm, ids = make(mixer, torch.float32).cuda(), tokens(3, 9).cuda()
    assert torch.equal(lm.generate(ids, 40, graph=True), lm.generate(ids, 40))
    state = lm(ids).state
    fast, kept, slow = GraphedStep(lm, state), state, state
    for token in tokens(5, 3).cuda():
        got, kept = fast(token, kept)
        want, slow = lm.step(token, slow)
        assert rms_error(got, want) < 1e-5
    assert_states(kept, slow, 1e-5)
    assert_states(state, lm(ids).state, 1e-6)            # the state it began with is not touched


def test_streaming_is_lazy_and_the_same():
    lm, ids = make("mamba2"), tokens(3, 5)
    calls, step = [], lm.step
    lm.step = lambda *args: calls.append(torch.is_grad_enabled()) or step(*args)
    seen = []
    for t, token in enumerate(lm.stream(ids, 6)):
        assert len(calls) == t and token.shape == (3,) and torch.is_grad_enabled()
        seen.append(token)
    assert not any(calls)                               # no graph is built inside, and the caller's setting is left alone
    assert torch.equal(torch.cat([ids, torch.stack(seen, 1)], 1), lm.generate(ids, 6))


def test_only_one_position_of_a_prompt_meets_the_vocabulary():
    lm, shapes = make("mamba"), []
    lm.lm_head.register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape)))
    lm.generate(tokens(2, 50), 3)
    assert shapes == [(2, 40)] * 3


def test_padding_of_the_vocabulary_is_never_chosen():
    lm, ids = make("mamba"), tokens(2, 6)
    labels = ids
    logits, loss = lm(ids).logits, lm(ids, labels=labels).loss
    with torch.no_grad():
        lm.backbone.embedding.weight[V:] = 1e3 * torch.randn(3, 16)
    assert lm.backbone.embedding.weight.shape == (40, 16) and logits.shape == (2, 6, V)
    assert torch.equal(lm(ids).logits, logits) and torch.equal(lm(ids, labels=labels).loss, loss)
    hot = dict(temperature=50., generator=torch.Generator().manual_seed(0))
    for new in (lm.generate(ids, 20), lm.generate(ids, 20, **hot)):
        assert new.max() < V


# --- sampling --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("temperature, top_k, top_p", [(1., None, 1.), (0.5, 4, 1.), (2., None, 0.7), (0.7, 6, 0.8), (1., 1, 1.),
                                                       (1., None, 1e-6), (1., 99, 1.)])
def test_sampling_draws_from_the_distribution_of_transformers(temperature, top_k, top_p):
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(3))
    filters = [transformers.TemperatureLogitsWarper(temperature)]
    filters += [] if top_k is None else [transformers.TopKLogitsWarper(top_k)]
    filters += [transformers.TopPLogitsWarper(top_p)]
    want = logits
    for f in filters:
        want = f(None, want)
    want = want.softmax(-1)[0]
    n = 20000
    got = choose_token(logits.expand(n, 12), temperature, top_k, top_p, torch.Generator().manual_seed(0))
    shares = got.bincount(minlength=12) / n
    assert torch.equal(shares > 0, want > 1e-4), (shares, want)
    assert (shares - want).abs().max() < 5 * math.sqrt(0.25 / n)     # five standard deviations of a share


@pytest.mark.parametrize("temperature, top_k, top_p, min_p", [(1., None, 1., 0.1), (1.7, None, 1., 0.3), (0.6, 8, 0.9, 0.05),
                                                              (1., None, 1., 1.), (2., 5, 0.95, 0.02)])
def test_drawn_tokens_pass_the_chi_square_test(temperature, top_k, top_p, min_p):
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(3)) - 4.     # all negative: a rule on logits would turn around
    warpers = [transformers.TemperatureLogitsWarper(temperature)]
    warpers += [] if top_k is None else [transformers.TopKLogitsWarper(top_k)]
    warpers += [transformers.TopPLogitsWarper(top_p), transformers.MinPLogitsWarper(min_p)]
    want = logits
    for warp in warpers:
        want = warp(None, want)
    want = want.softmax(-1)[0]
    p, ids = kept_probabilities(logits, temperature, top_k, top_p, min_p)
    torch.testing.assert_close(torch.zeros(12).scatter(0, ids[0, :p.shape[1]], p[0] / p.sum()), want)
    n = 20000
    count = choose_token(logits.expand(n, 12), temperature, top_k, top_p, torch.Generator().manual_seed(0), min_p).bincount(minlength=12)
    assert not count[want == 0].any()
    possible, expected = count[want > 0], n * want[want > 0]
    chi_square, freedom = ((possible - expected) ** 2 / expected).sum().item(), len(expected) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom) + 1e-9  # mean and four standard deviations of its distribution


def test_every_rule_by_its_definition():
    probabilities = [0.4, 0.3, 0.2, 0.06, 0.04]
    logits = torch.tensor([probabilities], dtype=torch.float64).log()[:, [3, 0, 4, 2, 1]]

    def kept(**rule):
        p, ids = kept_probabilities(logits, **rule)
        assert p[p > 0].tolist() == pytest.approx([x / sum(probabilities[:rule.get("top_k")]) for x in probabilities[:(p > 0).sum()]])
        return {probabilities[[3, 0, 4, 2, 1][i]] for i in ids[0, :p.shape[1]][p[0] > 0].tolist()}

    best = [set(probabilities[:n]) for n in range(6)]
    assert kept() == best[5]
    assert [kept(top_k=k) for k in (1, 2, 5, 9)] == [best[1], best[2], best[5], best[5]]
    assert [kept(top_p=p) for p in (0.01, 0.39, 0.41, 0.69, 0.71, 0.9 + 1e-9, 1.)] == [best[n] for n in (1, 1, 2, 2, 3, 4, 5)]
    assert [kept(min_p=m) for m in (0., 0.09, 0.11, 0.14, 0.16, 0.49, 0.51, 0.74, 0.76, 1.)] == [best[n] for n in (5, 5, 4, 4, 3, 3, 2, 2, 1, 1)]


@pytest.mark.parametrize("penalty", [0.7, 1.3, 3.])
def test_repetition_penalty_is_that_of_transformers(penalty):
    ids, logits = tokens(4, 6, seed=5), torch.randn(4, V, generator=torch.Generator().manual_seed(0))
    want = transformers.RepetitionPenaltyLogitsProcessor(penalty)(ids, logits)
    assert torch.equal(penalise(logits, seen_tokens(ids, None, V), penalty), want)
    mask = torch.tensor([True, True, False, False, True, True]).expand(4, 6)
    want = transformers.RepetitionPenaltyLogitsProcessor(penalty)(ids[:, [0, 1, 4, 5]], logits)
    assert torch.equal(penalise(logits, seen_tokens(ids, mask, V), penalty), want)


def test_repetition_penalty_while_writing():
    theirs, ours = peer("mamba2")
    ids = tokens(1, 7)
    want = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=25, do_sample=False, repetition_penalty=1.5)
    got = ours.generate(ids, 25, repetition_penalty=1.5)
    assert torch.equal(got, want) and not torch.equal(got, ours.generate(ids, 25))
    hardly = ours.generate(ids, 20, repetition_penalty=1e6)
    assert len(set(hardly[0, 7:].tolist()) - set(ids[0].tolist())) == 20


def test_sampling_is_repeatable_and_greedy_is_the_default():
    lm, ids = make("mamba2"), tokens(2, 5)
    drawn = [lm.generate(ids, 15, temperature=1.5, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert torch.equal(lm.generate(ids, 15, temperature=3., top_k=1), lm.generate(ids, 15))
    logits = torch.tensor([[0., 3., 1.], [2., 1., 0.]])
    assert choose_token(logits).tolist() == [1, 0]


@pytest.mark.parametrize("wrong", [dict(temperature=-1.), dict(top_k=0), dict(top_p=0.), dict(top_p=1.1)])
def test_impossible_sampling(wrong):
    with pytest.raises(ValueError, match="temperature, top_k, top_p: got"):
        choose_token(torch.zeros(1, 3), **wrong)


# --- loss ------------------------------------------------------------------------------------------------------------

def test_loss_by_hand():
    logits = torch.tensor([[[math.log(3), 0.], [math.log(3), 0.], [9., -9.]], [[0., 0.], [5., 5.], [1., 2.]]])
    labels = torch.tensor([[1, 0, 1], [0, -100, 1]])
    want = -(math.log(3 / 4) + math.log(1 / 4) + math.log(1 / 2)) / 3
    assert next_token_loss(logits, labels).item() == pytest.approx(want, rel=1e-6)


@given(rows=st.integers(1, 3), length=st.integers(2, 7), seed=st.integers(0, 99))
@few
def test_loss_is_the_loop(rows, length, seed):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, length, 5, generator=g).double().requires_grad_()
    labels = torch.randint(-2, 5, (rows, length), generator=g)
    labels[labels < 0] = -100
    labels[0, -1] = 3
    terms = [-logits[b, t - 1].log_softmax(-1)[labels[b, t]] for b in range(rows) for t in range(1, length) if labels[b, t] >= 0]
    want = sum(terms) / len(terms)
    got = next_token_loss(logits, labels)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, logits)[0], torch.autograd.grad(want, logits)[0])


def test_loss_of_bfloat16_logits_is_computed_in_float32():
    logits = torch.randn(2, 9, 200, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels = tokens(2, 9)
    got = next_token_loss(logits, labels)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, next_token_loss(logits.double(), labels).float())


@every
@pytest.mark.parametrize("at_once", [1, 5 * V, 10 ** 6])
def test_only_positions_that_learn_meet_the_head(mixer, at_once, monkeypatch):
    lm, ids, scored = make(mixer), tokens(3, 9), []
    labels, mask = ids.masked_fill(tokens(3, 9, seed=2) < 20, -100), torch.arange(9) < torch.tensor([[9], [4], [7]])
    want = next_token_loss(lm(ids, mask=mask).logits, labels, mask)
    gradients = torch.autograd.grad(want, list(lm.parameters()))
    monkeypatch.setattr(language_model, "LOGITS_AT_ONCE", at_once)
    lm.lm_head.register_forward_hook(lambda module, args, out: scored.append(len(out)))
    got = lm(ids, mask=mask, labels=labels).loss
    learned = (next_labels := labels[:, 1:].masked_fill(~mask[:, 1:], -100)).ne(-100).sum()
    assert sum(scored) == learned < next_labels.numel() / 2 and max(scored) == min(learned, -(-at_once // V))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    assert max(map(rms_error, torch.autograd.grad(got, list(lm.parameters())), gradients)) < 1e-11


@pytest.mark.parametrize("labels", [torch.full((2, 5), -100), torch.tensor([[4, -100, -100, -100, -100]]).repeat(2, 1)])
def test_nothing_to_learn_is_an_error(labels):
    with pytest.raises(ValueError, match="labels: got no label other than -100"):
        make("mamba")(tokens(2, 5), labels=labels)


def test_labels_of_another_shape():
    for mask in (None, torch.ones(2, 5, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"labels: got shape \(2, 4\), need \(2, 5\)"):
            make("mamba")(tokens(2, 5), labels=tokens(2, 4), mask=mask)
    for wrong in (-1, V, 39):
        with pytest.raises(ValueError, match=rf"labels: got numbers from {wrong} to {wrong}, need -100 or 0 to {V - 1}"):
            make("mamba")(tokens(2, 5), labels=torch.full((2, 5), wrong))


@pytest.mark.parametrize("call, name", [
    (lambda lm: lm.generate([[1]], 2), "input_ids"), (lambda lm: lm.step([1], None), "ids"), (lambda lm: lm(state=5, input_ids=tokens(1, 3)), "state"),
    (lambda lm: lm(inputs_embeds=torch.zeros(1, 3, 15)), "inputs_embeds"), (lambda lm: lm(inputs_embeds=torch.zeros(0, 3, 16)), "inputs_embeds"),
    (lambda lm: lm.generate(tokens(1, 3), 1.5), "max_new_tokens"), (lambda lm: lm(tokens(1, 3), mask=torch.ones(1, 3)), "mask")])
def test_wrong_arguments_are_named(call, name):
    with pytest.raises(ValueError, match=f"^{name}: got"):
        call(make("mamba"))


@both
@pytest.mark.parametrize("damage", [math.nan, math.inf])
def test_numbers_that_are_none_are_no_answer(mixer, damage):
    lm, ids = make(mixer), tokens(2, 5)
    state = lm(ids).state
    with torch.no_grad():
        state[1].ssm[1].fill_(damage)
    with pytest.raises(ValueError, match="^logits: got NaN or infinity for new token 1, need numbers"):
        lm.generate(ids, 3, state=state)
    with torch.no_grad():
        lm.backbone.norm_f.weight[3] = damage
    with pytest.raises(ValueError, match="^logits: got NaN or infinity for new token 1, need numbers"):
        lm.generate(ids, 3, temperature=1.)


# --- inputs, dtypes, initialisation ----------------------------------------------------------------------------------

@every
def test_ids_or_embeds(mixer):
    lm, ids = make(mixer), tokens(2, 5)
    got, want = lm(inputs_embeds=lm.embed(ids), labels=ids), lm(ids, labels=ids)
    assert torch.equal(got.loss, want.loss) and got.logits is None
    assert torch.equal(lm(inputs_embeds=lm.embed(ids)).logits, lm(ids).logits)
    for wrong in (dict(), dict(input_ids=ids, inputs_embeds=lm.embed(ids))):
        with pytest.raises(ValueError, match="input_ids, inputs_embeds: got both or neither"):
            lm(**wrong)
    quiet = lm(ids, return_state=False)
    assert quiet.state is None and quiet.loss is None
    torch.testing.assert_close(quiet.logits, lm(ids).logits, rtol=1e-12, atol=1e-12)


@every
def test_float64_throughout(mixer):
    lm, ids = make(mixer), tokens(2, 20)
    out = lm(ids)
    logits, state = lm.step(ids[:, 0], out.state)
    parts = [part for s in (*out.state, *state) for part in s if part.dtype != torch.bool]
    assert {x.dtype for x in (lm(ids, labels=ids).loss, out.logits, logits, *parts)} == {torch.float64}
    single = make(mixer, torch.float32)                 # the same weights: rounded once, so float64 differs by its own digits
    error = rms_error(single(ids).logits, out.logits)
    assert 1e-9 < error < 1e-5
    with torch.no_grad():                               # a change far below float32 is seen: nothing is rounded on the way
        for name, p in lm.named_parameters():
            p *= 1 + 1e-11
            changed = rms_error(lm(ids).logits, out.logits)
            p /= 1 + 1e-11
            assert changed > 0, name


@both
def test_bfloat16_layers_on_a_float32_stream(mixer):
    exact, lm, ids = make(mixer), make(mixer, torch.bfloat16), tokens(2, 20)
    x, state = lm.hidden(ids)
    assert x.dtype == torch.float32 and state[0].ssm.dtype == torch.float32
    assert lm(ids).logits.dtype == torch.bfloat16
    assert rms_error(lm(ids).logits, exact(ids).logits) < 0.05
    plain = make(mixer, torch.bfloat16, residual_in_fp32=False)
    assert plain.hidden(ids)[0].dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        single = make(mixer, torch.float32)
        assert single.hidden(ids)[0].dtype == torch.float32
        assert rms_error(single(ids).logits, exact(ids).logits) < 0.05


def test_the_norm_reads_the_stream_before_it_is_rounded():
    norm = torch.nn.RMSNorm(64, eps=0.).bfloat16()
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    want = (x / x.square().mean(-1, keepdim=True).sqrt()).bfloat16()
    assert (read_stream(norm, x) != want).float().mean() < 1e-3      # rounded once; rounding the stream first changes a quarter
    assert (read_stream(norm, x.bfloat16()) != want).float().mean() > 0.1
    block, plain = (Block(MambaConfig(d_model=64, residual_in_fp32=exact)) for exact in (True, False))
    assert block.add(x.bfloat16(), x.bfloat16()).dtype == torch.float32 and plain.add(x.bfloat16(), x.bfloat16()).dtype == torch.bfloat16
    assert block.add(x.double(), x).dtype == torch.float64
    assert block.add(torch.tensor(256.), torch.tensor(1.).bfloat16()).item() == 257


def test_block_is_its_equation():
    block = lively(Block(MambaConfig(d_model=8))).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    y, state = block(x)
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * block.norm.weight
    assert state is None and rms_error(y, x + block.mixer(normed)) < 1e-12


@both
def test_initialisation(mixer):
    torch.manual_seed(0)
    args = dict(bias=True) | ({"headdim": 16} if mixer == "mamba2" else {})
    backbone = MambaLM(MambaConfig(64, 25, 1000, mixer=mixer, mixer_args=args)).backbone
    assert backbone.embedding.weight.std().item() == pytest.approx(0.02, rel=0.02)
    for layer in backbone.layers:
        bound = 1 / math.sqrt(128) / 5                  # kaiming-uniform with a = sqrt(5) is U(+-1/sqrt(fan in)); sqrt(25) = 5
        assert 0.99 * bound < layer.mixer.out_proj.weight.abs().max() <= bound
        assert not layer.mixer.in_proj.bias.any() and not layer.mixer.out_proj.bias.any()
        dt = torch.nn.functional.softplus(layer.mixer.dt_proj.bias if mixer == "mamba" else layer.mixer.dt_bias)
        assert 1e-3 * 0.999 < dt.min() and dt.max() < 0.1 * 1.001


def test_names_and_ties():
    tied, free = make("mamba"), make("mamba", tie_embeddings=False)
    assert tied.lm_head.weight is tied.backbone.embedding.weight
    assert free.lm_head.weight is not free.backbone.embedding.weight
    mamba = {"A_log", "D", "in_proj.weight", "conv1d.weight", "conv1d.bias", "x_proj.weight", "dt_proj.weight", "dt_proj.bias",
             "out_proj.weight"}
    mamba2 = {"A_log", "D", "dt_bias", "in_proj.weight", "conv1d.weight", "conv1d.bias", "norm.weight", "out_proj.weight"}
    for mixer, names in (("mamba", mamba), ("mamba2", mamba2)):
        want = {"backbone.embedding.weight", "backbone.norm_f.weight", "lm_head.weight"}
        for i in range(3):
            want |= {f"backbone.layers.{i}.norm.weight"} | {f"backbone.layers.{i}.mixer.{name}" for name in names}
        assert set(make(mixer).state_dict()) == want


def test_configuration():
    assert [MambaConfig(pad_vocab_size_multiple=m).padded_vocab_size for m in (1, 8, 16)] == [50277, 50280, 50288]
    assert MambaConfig(vocab_size=48).padded_vocab_size == 48
    for wrong in (dict(mixer="transformer"), dict(d_intermediate=-1), dict(n_layer=0), dict(d_model=0), dict(vocab_size=0), dict(pad_vocab_size_multiple=0),
                  dict(d_model="a"), dict(d_model=1.5), dict(d_model=True), dict(d_model=10 ** 30), dict(n_layer=10 ** 9), dict(norm_eps=math.nan),
                  dict(norm_eps="x"), dict(norm_eps=-1.), dict(tie_embeddings=1), dict(mixer_args=[1]), dict(d_intermediate="x"), dict(mixer=3)):
        with pytest.raises(ValueError, match=f"^{next(iter(wrong))}: got") as caught:
            MambaConfig(**wrong)
        assert "\n" not in str(caught.value)
    for wrong in (dict(chunk_size="a"), dict(d_state=-1), dict(d_state=None), dict(bias=3), dict(headdim=10 ** 12), dict(dt_min=math.nan), dict(dt_limit=3)):
        with pytest.raises(ValueError, match=f"^{next(iter(wrong))}: got"):
            MambaConfig(mixer="mamba2", mixer_args=wrong)
    with pytest.raises(ValueError, match="^mixer_args: got 'headdim', need some of d_model, d_state, "):
        MambaConfig(mixer_args=dict(headdim=2))
    MambaConfig(mixer_args=dict(dt_rank=3, expand=1.5)), MambaConfig(mixer="mamba2", mixer_args=dict(dt_limit=[0., math.inf]))


@both
def test_the_model_is_one_graph(mixer):
    lm, ids = make(mixer, torch.float32, n_layer=1), tokens(2, 9)
    graph = torch.compile(lm, fullgraph=True, backend="eager")
    torch.testing.assert_close(graph(ids).logits, lm(ids).logits)
    labels = ids.masked_fill(ids < 9, -100)
    torch.testing.assert_close(graph(ids, labels=labels).loss, lm(ids, labels=labels).loss)
