// VL-Mamba in plain JavaScript: the lite model as `vlmamba export web` writes it, step by step, with no library.
// Runs in a page and in Node. Vectors are Float32Array; sums are made in double precision.
globalThis.vlmamba = (() => {
  "use strict";
  const sigmoid = x => 1 / (1 + Math.exp(-x)), silu = x => x * sigmoid(x);
  const softplus = x => x > 20 ? x : Math.log1p(Math.exp(x));
  // The error function to 1.2e-7 (Numerical Recipes, Chebyshev fit), as float32 has it.
  function erf(x) {
    const t = 1 / (1 + 0.5 * Math.abs(x));
    const fit = [0.17087277, -0.82215223, 1.48851587, -1.13520398, 0.27886807, -0.18628806, 0.09678418, 0.37409196, 1.00002368, -1.26551223];
    const rest = t * Math.exp(-x * x + fit.reduce((sum, c) => sum * t + c, 0));
    return x < 0 ? rest - 1 : 1 - rest;
  }
  const gelu = x => 0.5 * x * (1 + erf(x * Math.SQRT1_2));

  // Multiplications of all matrix products, convolutions and state updates so far: the page shows differences of it.
  const work = {multiplications: 0};

  // x (n, columns) times W (rows, columns) transposed, plus a bias -> (n, rows). Four rows at a time: each x is fetched once for them.
  function linear(W, x, columns, bias = null) {
    const rows = W.length / columns, n = x.length / columns, y = new Float32Array(n * rows), whole = rows - rows % 4;
    for (let i = 0, from = 0; i < n; i++, from += columns) {
      for (let r = 0; r < rows; r += r < whole ? 4 : 1) {
        const w = r * columns, at = i * rows + r;
        let a = 0, b = 0, c = 0, d = 0;
        if (r < whole) for (let k = 0, v = w, v2 = w + 2 * columns; k < columns; k++, v++, v2++) {
          const value = x[from + k];
          a += W[v] * value;
          b += W[v + columns] * value;
          c += W[v2] * value;
          d += W[v2 + columns] * value;
        } else for (let k = 0; k < columns; k++) a += W[w + k] * x[from + k];
        y[at] = a;
        if (r < whole) { y[at + 1] = b; y[at + 2] = c; y[at + 3] = d; }
      }
      if (bias) for (let r = 0; r < rows; r++) y[i * rows + r] += bias[r];
    }
    work.multiplications += n * W.length;
    return y;
  }
  function rmsNorm(x, weight, eps) {                                       // over each row of weight.length numbers
    const d = weight.length, y = new Float32Array(x.length);
    for (let at = 0; at < x.length; at += d) {
      let sum = 0;
      for (let c = 0; c < d; c++) sum += x[at + c] ** 2;
      const scale = 1 / Math.sqrt(sum / d + eps);
      for (let c = 0; c < d; c++) y[at + c] = x[at + c] * scale * weight[c];
    }
    return y;
  }

  // The vision encoder. A picture is held with its channels last: x (side, side, channels).
  function conv3x3(W, x, side, channels, stride, bias = null) {            // padding 1 -> (side / stride, side / stride, outputs)
    const out = side / stride, width = 9 * channels, patches = new Float32Array(out * out * width);
    for (let row = 0, at = 0; row < out; row++) for (let column = 0; column < out; column++, at += width) for (let k = 0; k < 9; k++) {
      const i = row * stride + Math.floor(k / 3) - 1, j = column * stride + k % 3 - 1;
      if (i < 0 || j < 0 || i >= side || j >= side) continue;
      for (let c = 0, from = (i * side + j) * channels; c < channels; c++) patches[at + c * 9 + k] = x[from + c];      // W is (outputs, channels, 3, 3)
    }
    return linear(W, patches, width, bias);
  }
  function encode(model, bytes) {                                          // bytes (side, side, 3) -> tokens (L, dim)
    const {tensors: p, config} = model;
    let x = new Float32Array(bytes).map(v => v / 127.5 - 1), side = config.image_size, channels = 3;
    for (let stage = 0; stage < 3; stage++) {
      const [weight, bias, mean, variance] = ["weight", "bias", "running_mean", "running_var"].map(name => p[`vision.stages.${stage}.1.${name}`]);
      x = conv3x3(p[`vision.stages.${stage}.0.weight`], x, side, channels, 2);
      [side, channels] = [side / 2, weight.length];
      const scale = weight.map((w, c) => w / Math.sqrt(variance[c] + 1e-5)), shift = bias.map((b, c) => b - mean[c] * scale[c]);
      for (let i = 0; i < x.length; i++) x[i] = Math.max(0, x[i] * scale[i % channels] + shift[i % channels]);
    }
    x = conv3x3(p["vision.refine.weight"], x, side, channels, 1, p["vision.refine.bias"]);
    return rmsNorm(x.map((v, i) => v + p["vision.position"][i]), p["vision.norm.weight"], 1e-5);
  }

  // The connector, VSS-L2: V' = Linear(V); out = Linear(Norm(VSS(GELU(V')) + V')).
  function connect(model, tokens) {
    const {tensors: p, config} = model;
    const v = linear(p["connector.linear1.weight"], tokens, config.vision_dim, p["connector.linear1.bias"]), d = p["connector.linear1.bias"].length;
    const scanned = vss(model, v.map(gelu), d).map((s, i) => s + v[i]);
    return linear(p["connector.linear2.weight"], rmsNorm(scanned, p["connector.norm.weight"], 1e-5), d, p["connector.linear2.bias"]);
  }
  // One Mamba layer along every path over the picture, x (L, d); what the scans say of a patch is added up.
  function vss(model, x, d) {
    const L = x.length / d, sum = [], mixers = model.config.mixers;
    const inner = m => m.D.length, of = k => mixers[k % mixers.length];
    const projected = mixers.map(m => linear(m.in_proj, x, d));            // (L, 2 inner): u, then the gate z
    const added = mixers.map(m => new Float32Array(L * inner(m)));
    model.config.orders.forEach((path, k) => selectiveScan(of(k), projected[k % mixers.length], path, added[k % mixers.length]));
    mixers.forEach((m, s) => {
      const D = inner(m), y = added[s].map((v, i) => v * silu(projected[s][Math.floor(i / D) * 2 * D + D + i % D]));
      sum.push(linear(m.out_proj, y, D));
    });
    return sum.reduce((a, b) => a.map((v, i) => v + b[i]));
  }
  // Mamba's selective scan along a path: adds y of every patch to `added` (L, D).
  function selectiveScan(m, projected, path, added) {
    const D = m.D.length, N = m.A_log.length / D, K = m.conv.length / D, rank = m.x_proj.length / D - 2 * N;
    const h = new Float32Array(D * N), u = new Float32Array(D), A = m.A_log.map(a => -Math.exp(a));
    path.forEach((patch, t) => {
      for (let c = 0; c < D; c++) {
        let v = m.conv_bias[c];
        for (let k = 0; k < K; k++) if (t - K + 1 + k >= 0) v += m.conv[c * K + k] * projected[path[t - K + 1 + k] * 2 * D + c];
        u[c] = silu(v);
      }
      const selected = linear(m.x_proj, u, D), B = selected.subarray(rank, rank + N), C = selected.subarray(rank + N);
      const delta = linear(m.dt_proj, selected.subarray(0, rank), rank, m.dt_bias).map(softplus);
      for (let c = 0; c < D; c++) {
        let y = m.D[c] * u[c];
        for (let n = 0; n < N; n++) {
          const i = c * N + n;
          h[i] = Math.exp(delta[c] * A[i]) * h[i] + delta[c] * u[c] * B[n];
          y += C[n] * h[i];
        }
        added[patch * D + c] += y;
      }
    });
    work.multiplications += path.length * D * (K + 3 * N);
  }

  // The language model: Mamba-2 layers. A state holds for each layer `conv`, the last inputs (channels, K), and `ssm` (H, P, N).
  function emptyState(model) {
    return model.layers.map(l => ({conv: new Float32Array(l.conv.length), ssm: new Float32Array(l.inner * l.N)}));
  }
  const copyState = state => state.map(s => ({conv: s.conv.slice(), ssm: s.ssm.slice()}));
  const stateBytes = state => state.reduce((sum, s) => sum + s.conv.byteLength + s.ssm.byteLength, 0);

  // One token x (d_model) through all layers; the state is changed. `seen(layer, {dt, decay, B, C})` may look on.
  function step(model, x, state, seen = null) {
    model.layers.forEach((l, layer) => {
      const {conv, ssm} = state[layer], {inner, N, H, P, K, channels} = l;
      const projected = linear(l.in_proj, rmsNorm(x, l.norm, model.config.norm_eps), x.length);      // z, xBC, dt
      const v = new Float32Array(channels);
      for (let c = 0; c < channels; c++) {
        let sum = l.conv_bias[c];
        for (let k = 0; k < K; k++) {
          conv[c * K + k] = k < K - 1 ? conv[c * K + k + 1] : projected[inner + c];
          sum += conv[c * K + k] * l.conv[c * K + k];
        }
        v[c] = silu(sum);
      }
      const B = v.subarray(inner, inner + N), C = v.subarray(inner + N), y = new Float32Array(inner);
      const dt = l.dt_bias.map((b, h) => softplus(projected[inner + channels + h] + b)), decay = dt.map((t, h) => Math.exp(-t * Math.exp(l.A_log[h])));
      for (let c = 0; c < inner; c++) {
        const h = Math.floor(c / P), input = dt[h] * v[c];
        let sum = l.D[h] * v[c];
        for (let n = 0, i = c * N; n < N; n++, i++) {
          ssm[i] = decay[h] * ssm[i] + input * B[n];
          sum += C[n] * ssm[i];
        }
        y[c] = sum * silu(projected[c]);
      }
      work.multiplications += channels * K + 3 * inner * N;
      const out = linear(l.out_proj, rmsNorm(y, l.gated_norm, model.config.norm_eps), inner);
      x = x.map((value, c) => value + out[c]);
      if (seen) seen(layer, {dt, decay, B: B.slice(), C: C.slice()});
    });
    return x;
  }
  const head = (model, x) => linear(model.tensors["language.lm_head.weight"], rmsNorm(x, model.tensors["language.backbone.norm_f.weight"], model.config.norm_eps), x.length);

  // A picture, bytes (side, side, 3) -> what is kept of it. `states[t]`: the states of the layers after t patches.
  function read(model, bytes) {
    const before = work.multiplications, start = performance.now();
    const tokens = connect(model, encode(model, bytes)), d = model.config.d_model, state = emptyState(model);
    const states = [copyState(state)], trace = model.layers.map(() => []);
    for (let t = 0; t * d < tokens.length; t++) {
      step(model, tokens.slice(t * d, (t + 1) * d), state, (layer, s) => trace[layer].push(s));
      states.push(copyState(state));
    }
    return {state, states, trace, length: states.length - 1, multiplications: work.multiplications - before, milliseconds: performance.now() - start};
  }

  // Hidden attention of the newest token: how much of each token before it, the mean over heads of |C·B decay dt|, each layer.
  function hiddenAttention(model, trace) {
    return model.layers.map((l, layer) => {
      const steps = trace[layer], {C} = steps.at(-1), kept = new Float64Array(l.H).fill(1), row = new Float32Array(steps.length);
      for (let t = steps.length - 1; t >= 0; t--) {
        const {B, dt, decay} = steps[t], product = B.reduce((sum, b, n) => sum + b * C[n], 0);
        for (let h = 0; h < l.H; h++) row[t] += Math.abs(product * kept[h] * dt[h]) / l.H;
        for (let h = 0; h < l.H; h++) kept[h] *= decay[h];
      }
      return row;
    });
  }

  // A question about what was read, greedy, up to <eos>: the reading stays as it is and can be asked again.
  function ask(model, reading, question, longest = 8) {
    const before = work.multiplications, start = performance.now(), {ids, unknown} = tokenize(model, question);
    if (unknown.length || !ids.length) return {ids, unknown, answer: null, words: []};
    const state = copyState(reading.state), trace = reading.trace.map(t => [...t]), words = [];
    let logits;
    const feed = id => { logits = head(model, step(model, embedding(model, id), state, (layer, s) => trace[layer].push(s))); };
    ids.forEach(feed);
    const first = logits;
    for (let n = 0; n < longest; n++) {
      const most = logits.indexOf(Math.max(...logits)), total = logits.reduce((sum, v) => sum + Math.exp(v - logits[most]), 0);
      const probabilities = Array.from(logits, v => Math.exp(v - logits[most]) / total);
      words.push({id: most, word: model.words[most], probabilities, attention: hiddenAttention(model, trace)});
      if (most === model.eos || n === longest - 1) break;
      feed(most);
    }
    return {ids, unknown, words, logits: first, answer: words.filter(w => !model.special.has(w.id)).map(w => w.word).join(" "), state,
      tokens: trace[0].length, multiplications: work.multiplications - before, milliseconds: performance.now() - start};
  }
  function embedding(model, id) {
    const d = model.config.d_model;
    return model.tensors["language.backbone.embedding.weight"].slice(id * d, (id + 1) * d);
  }

  // The tokenizer: the same rules in the same order, then words and runs of signs. Words it does not have are named.
  function tokenize(model, question) {
    let text = question.normalize("NFKC").toLowerCase();
    for (const [pattern, put] of model.rules) text = text.replace(pattern, put);
    const pieces = text.match(/[\p{L}\p{M}\p{N}\p{Pc}]+|[^\p{L}\p{M}\p{N}\p{Pc}\s]+/gu) || [];
    const unknown = pieces.filter(piece => !model.ids.has(piece) || model.special.has(model.ids.get(piece)));
    return {ids: pieces.map(piece => model.ids.get(piece) ?? model.ids.get("<unk>")), unknown: [...new Set(unknown)]};
  }

  // What `vlmamba export web` wrote -> a model. Matrices lie there as bytes with one scale a row.
  function load(file) {
    const text = atob(file.data), raw = new Uint8Array(text.length), tensors = {};
    for (let i = 0; i < raw.length; i++) raw[i] = text.charCodeAt(i);
    for (const {name, shape, at, scales} of file.tensors) {
      const size = shape.reduce((a, b) => a * b, 1);
      if (scales === undefined) { tensors[name] = new Float32Array(raw.buffer, at, size); continue; }
      const scale = new Float32Array(raw.buffer, scales, shape[0]), whole = new Int8Array(raw.buffer, at, size), row = size / shape[0];
      const w = tensors[name] = new Float32Array(size);
      for (let r = 0, i = 0; r < shape[0]; r++) for (let end = i + row; i < end; i++) w[i] = whole[i] * scale[r];
    }
    tensors["language.lm_head.weight"] ??= tensors["language.backbone.embedding.weight"];
    const under = (prefix, names) => Object.fromEntries(Object.entries(names).map(([key, name]) => [key, tensors[prefix + name]]));
    const config = {...file.config, mixers: []}, layers = [];
    for (let s = 0; s < file.config.mixers; s++) config.mixers.push(under(`connector.vss.mixers.${s}.`, {in_proj: "in_proj.weight", conv: "conv1d.weight",
      conv_bias: "conv1d.bias", x_proj: "x_proj.weight", dt_proj: "dt_proj.weight", dt_bias: "dt_proj.bias", A_log: "A_log", D: "D", out_proj: "out_proj.weight"}));
    for (let i = 0; i < file.config.n_layer; i++) {
      const layer = under(`language.backbone.layers.${i}.`, {norm: "norm.weight", in_proj: "mixer.in_proj.weight", conv: "mixer.conv1d.weight", conv_bias: "mixer.conv1d.bias",
        dt_bias: "mixer.dt_bias", A_log: "mixer.A_log", D: "mixer.D", gated_norm: "mixer.norm.weight", out_proj: "mixer.out_proj.weight"});
      const inner = layer.gated_norm.length, channels = layer.conv_bias.length, H = layer.D.length;
      layers.push({...layer, inner, channels, H, P: inner / H, N: (channels - inner) / 2, K: layer.conv.length / channels});
    }
    const words = [];
    for (const [word, id] of Object.entries(file.vocab)) words[id] = word;
    return {config, layers, tensors, words, ids: new Map(Object.entries(file.vocab)), special: new Set(["<pad>", "<eos>", "<unk>"].map(word => file.vocab[word])), eos: file.vocab["<eos>"], parameters: file.parameters, rules: file.rules.map(([pattern, flags, put]) => [new RegExp(pattern, flags), put]), source: file.source};
  }
  return {load, read, ask, tokenize, stateBytes};
})();
