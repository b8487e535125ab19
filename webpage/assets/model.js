// The model: its weights, unpacked, and its forward pass, a token at a time. The same arithmetic as model.py, in float64
// on weights rounded to 24 bits. Vectors are Float64Arrays; every step returns what attribution.js needs to go back.

const NORM_EPSILON = 1e-5, QK_EPSILON = 1.1920929e-7;  // the latter is float32's, PyTorch's default

// `spec`: DATA.model. Parts of the result that a matrix may be swapped for splines in are { spline: number }.
function loadModel(spec) {
  const bytes = blockBytes(spec.block), tensors = {};
  for (const [name, { offset, count, scale }] of Object.entries(spec.tensors)) tensors[name] = fixedPoint(bytes, offset, count, scale);
  const splines = spec.splines.map((layer, k) => ({
    ...layer, points: layer.shared ? recordedLayers()[k].points : tensors[`${layer.path}.points`], bias: tensors[`${layer.path}.bias`] ?? null,
  }));
  const vector = (name) => tensors[name] ?? null;
  const projection = (path) => {
    const spline = splines.findIndex((layer) => layer.path === path);
    if (spline >= 0) return { spline };
    const weight = vector(`${path}.weight`);
    return weight && { weight, bias: vector(`${path}.bias`) };
  };
  const normalization = (path) => ({ centred: spec.norm === "layernorm", weight: vector(`${path}.weight`), bias: vector(`${path}.bias`) });
  const blocks = Array.from({ length: spec.n_layer }, (_, b) => {
    const at = `blocks.${b}`;
    return {
      norm1: normalization(`${at}.norm_1`), norm2: normalization(`${at}.norm_2`),
      attention: projection(`${at}.attn.c_attn`), out: projection(`${at}.attn.c_proj`),
      splineGate: projection(`${at}.attn.gate.splines`), linearGate: projection(`${at}.attn.gate.c_gate`),
      share: vector(`${at}.token_shift.share`),
      ffn: {
        plain: projection(`${at}.ffn`), splines: projection(`${at}.ffn.splines`), gate: projection(`${at}.ffn.c_gate`),
        first: projection(`${at}.ffn.c_fc`), out: projection(`${at}.ffn.c_proj`),
      },
    };
  });
  const embedding = vector("token_embedding.weight");
  const head = projection("head") ?? { weight: embedding, bias: null };
  return {
    spec, splines, blocks, embedding, head, norm: normalization("norm"), positions: vector("position_embedding.weight"),
    pairs: vector("pair_embedding.table.weight"), rotation: spec.position === "rope" ? rotationOf(spec) : null, width: spec.n_embd,
  };
}

const recordedLayers = () => layersAt(DATA.splines.steps.length - 1);

// Cosines and sines of all positions, (block_size, head_dim / 2).
function rotationOf({ n_embd, n_head, block_size }) {
  const half = n_embd / n_head / 2, cos = new Float64Array(block_size * half), sin = new Float64Array(block_size * half);
  for (let t = 0, at = 0; t < block_size; t++) for (let d = 0; d < half; d++, at++) {
    const angle = t * 10000 ** (-d / half);
    cos[at] = Math.cos(angle);
    sin[at] = Math.sin(angle);
  }
  return { cos, sin, half };
}

// What is kept of the tokens of one context, up to block_size: keys, values, and the features that token shift mixes in.
function newCache({ spec }) {
  const size = spec.block_size * spec.n_embd, layer = () => new Float32Array(size);
  return Array.from({ length: spec.n_layer }, () => ({ keys: layer(), values: layer(), shifted: spec.token_shift ? layer() : null }));
}

// The token at place t of a context whose earlier ones are in `cache`; `before`: the one at t - 1, -1 for none.
// `splines`: the layers to use, as model.splines. `keep`: add the token to the cache. `removed`: a spline whose value is
// taken from its layer's output, { layer, output, value }. Returns logits and a trace of everything on the way.
function forward(model, splines, cache, t, token, before, { keep = true, removed = null } = {}) {
  const run = { model, splines, removed, inputs: new Array(splines.length), outputs: new Array(splines.length) };
  let x = embed(model, t, token, before);
  const blocks = model.blocks.map((block, b) => {
    const trace = { x };
    trace.h = normalize(block.norm1, x);
    trace.attention = attend(run, block, cache[b], t, trace.h, keep);
    trace.middle = sum(x, trace.attention.y);
    trace.h2 = normalize(block.norm2, trace.middle);
    trace.mixed = block.share ? mix(trace.h2, cache[b].shifted, t, block.share) : trace.h2;
    if (keep && block.share) cache[b].shifted.set(trace.h2, t * model.width);
    trace.ffn = feedForward(run, block.ffn, trace.h2, trace.mixed);
    x = sum(trace.middle, trace.ffn.y);
    return trace;
  });
  const normalized = normalize(model.norm, x);
  const logits = project(run, model.head, normalized).subarray(0, model.spec.vocabulary.length);
  return { logits, inputs: run.inputs, outputs: run.outputs, blocks, x, normalized };
}

function embed({ spec, width, embedding, positions, pairs }, t, token, before) {
  const x = new Float64Array(width), row = pairs && before >= 0 ? pairRow(spec, before, token) : -1;
  for (let c = 0; c < width; c++) {
    x[c] = embedding[token * width + c];
    if (positions) x[c] += positions[t * width + c];
    if (row >= 0) x[c] += pairs[row * width + c];
  }
  return x;
}

// The row of a pair's embedding: its own, or by the hash of embeddings.py, SplitMix64's last stage.
function pairRow({ pair_rows, pair_base }, before, token) {
  const pair = before * pair_base + token;
  if (pair_rows === pair_base ** 2) return pair;
  const rows = BigInt(pair_rows);
  let hash = BigInt(pair);
  for (const [shift, factor] of [[30n, 0xBF58476D1CE4E5B9n], [27n, 0x94D049BB133111EBn], [31n, 1n]])
    hash = BigInt.asUintN(64, (hash ^ hash >> shift) * factor);
  return Number((BigInt.asIntN(64, hash) % rows + rows) % rows);
}

function project(run, part, x) {
  if (part.spline === undefined) return product(part, x);
  const layer = run.splines[part.spline], y = splineSum(layer, x), { removed } = run;
  run.inputs[part.spline] = Float32Array.from(x);
  if (removed && removed.layer === part.spline) y[removed.output] -= removed.value;
  return run.outputs[part.spline] = y;
}

// Weight (rows, columns) times x, four rows at a time: their sums do not wait for one another.
function product({ weight, bias }, x) {
  const columns = x.length, rows = weight.length / columns, y = new Float64Array(rows);
  if (bias) y.set(bias);
  let r = 0;
  for (; r + 3 < rows; r += 4) {
    let a = 0, b = 0, c = 0, d = 0;
    for (let k = 0, at = r * columns; k < columns; k++, at++) {
      const value = x[k];
      a += weight[at] * value;
      b += weight[at + columns] * value;
      c += weight[at + 2 * columns] * value;
      d += weight[at + 3 * columns] * value;
    }
    y[r] += a; y[r + 1] += b; y[r + 2] += c; y[r + 3] += d;
  }
  for (; r < rows; r++) for (let k = 0; k < columns; k++) y[r] += weight[r * columns + k] * x[k];
  return y;
}

// The cell of the grid that x lies in, and how far into it: below 0 or above 1 beyond the grid's ends.
function cellOf({ G, width }, x) {
  const u = (x + width / 2) * (G - 1) / width, cell = Math.min(Math.max(Math.floor(u), 0), G - 2);
  return [cell, u - cell];
}

// Two inputs at a time, so that sums are stored half as often.
function splineSum(layer, x) {
  const { I, G, O, points, bias } = layer, y = new Float64Array(O);
  if (bias) y.set(bias);
  for (let i = 0; i < I; i += 2) {
    const second = i + 1 < I, [p, right] = cellOf(layer, x[i]), [q, far] = second ? cellOf(layer, x[i + 1]) : [0, 0];
    const a = (i * G + p) * O, b = second ? ((i + 1) * G + q) * O : a, left = 1 - right, near = second ? 1 - far : 0;
    for (let o = 0; o < O; o++)
      y[o] += left * points[a + o] + right * points[a + O + o] + (near * points[b + o] + far * points[b + O + o]);
  }
  return y;
}

function normalize({ centred, weight, bias }, x, epsilon = NORM_EPSILON) {
  const y = new Float64Array(x.length);
  let mean = 0, squares = 0;
  if (centred) { for (const value of x) mean += value; mean /= x.length; }
  for (const value of x) squares += (value - mean) ** 2;
  const scale = 1 / Math.sqrt(squares / x.length + epsilon);
  for (let c = 0; c < x.length; c++) y[c] = (x[c] - mean) * scale * (weight ? weight[c] : 1) + (bias ? bias[c] : 0);
  return y;
}
const PLAIN_NORM = { centred: false, weight: null, bias: null };

function attend(run, block, cache, t, h, keep) {
  const { model } = run, { n_head, qk_norm } = model.spec, C = model.width, D = C / n_head;
  const all = project(run, block.attention, h), q = all.slice(0, C), k = all.slice(C, 2 * C), v = all.slice(2 * C);
  if (model.rotation) for (const part of [q, k]) rotate(model.rotation, part, t);
  const raw = { q: q.slice(), k: k.slice() };
  if (qk_norm) for (const part of [q, k])
    for (let at = 0; at < C; at += D) part.set(normalize(PLAIN_NORM, part.subarray(at, at + D), QK_EPSILON), at);
  const mixed = new Float64Array(C), shares = new Float64Array(n_head * (t + 1)), scale = 1 / Math.sqrt(D);
  for (let head = 0; head < n_head; head++) {
    const from = head * D, weights = shares.subarray(head * (t + 1), (head + 1) * (t + 1));
    for (let s = 0; s <= t; s++) {
      const keys = s < t ? cache.keys : k, at = s < t ? s * C + from : from;
      let dot = 0;
      for (let d = 0; d < D; d++) dot += q[from + d] * keys[at + d];
      weights[s] = dot * scale;
    }
    softmaxInPlace(weights);
    for (let s = 0; s <= t; s++) {
      const values = s < t ? cache.values : v, at = s < t ? s * C + from : from, weight = weights[s];
      for (let d = 0; d < D; d++) mixed[from + d] += weight * values[at + d];
    }
  }
  if (keep) { cache.keys.set(k, t * C); cache.values.set(v, t * C); }
  let gate = null;
  if (block.splineGate) gate = project(run, block.splineGate, h).map((value) => 1 + value);
  else if (block.linearGate) gate = project(run, block.linearGate, h).map((value) => 2 * sigmoid(value));
  const gated = gate ? times(mixed, gate) : mixed;
  return { raw, q, k, v, mixed, shares, gate, gated, y: project(run, block.out, gated) };
}

// Pairs of features d and d + half of every head, by the angles of position t.
function rotate({ cos, sin, half }, x, t, direction = 1) {
  for (let from = 0; from < x.length; from += 2 * half) for (let d = 0; d < half; d++) {
    const a = x[from + d], b = x[from + half + d], c = cos[t * half + d], s = direction * sin[t * half + d];
    x[from + d] = a * c - b * s;
    x[from + half + d] = a * s + b * c;
  }
}

function softmaxInPlace(values) {
  let most = -Infinity, total = 0;
  for (const value of values) most = Math.max(most, value);
  for (let k = 0; k < values.length; k++) total += values[k] = Math.exp(values[k] - most);
  for (let k = 0; k < values.length; k++) values[k] /= total;
  return values;
}

function mix(h, shifted, t, share) {
  return h.map((value, c) => value + share[c] * ((t > 0 ? shifted[(t - 1) * h.length + c] : 0) - value));
}

const ACTIVATIONS = {
  mlp: (x) => x * (1 + erf(x / Math.SQRT2)) / 2,
  mlp_tanh: (x) => x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3))) / 2,
  relu2: (x) => Math.max(x, 0) ** 2,
  swiglu: (x) => x * sigmoid(x),
};

// `mixed` is what gates see, or plain layers, where the token before is mixed in.
function feedForward(run, part, h, mixed) {
  const { spec } = run.model;
  if (part.plain) return { y: project(run, part.plain, mixed) };
  let first, gate = null, hidden;
  if (part.splines) {
    first = project(run, part.splines, h);
    gate = project(run, part.gate, mixed);
    hidden = times(first, gate);
  } else if (part.gate) {
    gate = project(run, part.gate, mixed);
    first = project(run, part.first, h);
    hidden = times(gate.map(ACTIVATIONS.swiglu), first);
  } else {
    first = project(run, part.first, mixed);
    hidden = first.map(ACTIVATIONS[spec.ffn]);
  }
  const normalized = spec.ffn_norm ? normalize(PLAIN_NORM, hidden) : hidden;
  return { first, gate, hidden, normalized, y: project(run, part.out, normalized) };
}

const sum = (a, b) => a.map((value, k) => value + b[k]);
const times = (a, b) => a.map((value, k) => value * b[k]);
const sigmoid = (x) => 1 / (1 + Math.exp(-x));

// To 1.5e-7: Abramowitz and Stegun, 7.1.26.
function erf(x) {
  const t = 1 / (1 + 0.3275911 * Math.abs(x));
  const tail = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429)))) * Math.exp(-x * x);
  return Math.sign(x) * (1 - tail);
}

// The natural logarithms of the probabilities that logits stand for.
function logProbabilities(logits) {
  let most = -Infinity, total = 0;
  for (const value of logits) most = Math.max(most, value);
  for (const value of logits) total += Math.exp(value - most);
  const level = most + Math.log(total);
  return Float64Array.from(logits, (value) => value - level);
}
