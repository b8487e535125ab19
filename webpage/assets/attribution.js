// Which splines made a prediction. The gradient of its log-probability finds candidates among all splines; what each one
// contributed is then measured, by running the model without it at that place. No DOM.

const CANDIDATES = 48;

// What a spline gives on average where activations are: (I, O). `use` of its knots, or null if it was not recorded.
function splineMeans({ I, G, O, points }, use) {
  const means = new Float64Array(I * O);
  for (let i = 0; i < I; i++) for (let g = 0; g < G; g++) {
    const weight = use ? use[i * G + g] : 1 / G;
    for (let o = 0, at = (i * G + g) * O; o < O; o++, at++) means[i * O + o] += weight * points[at];
  }
  return means;
}

// The splines whose difference from their mean the log-probability of `target` depends on most, to first order.
function routeCandidates(reading, place, target, means) {
  const { splines } = reading, trace = reading.again(place), gradients = outputGradients(reading, place, trace, target);
  const found = [];
  let least = 0;
  splines.forEach((layer, number) => {
    const { G, O, points } = layer, gradient = gradients[number];
    trace.inputs[number].forEach((x, i) => {
      const [cell, share] = cellOf(layer, x);
      for (let o = 0, at = (i * G + cell) * O; o < O; o++, at++) {
        const value = points[at] + share * (points[at + O] - points[at]) - means[number][i * O + o];
        const size = Math.abs(value * gradient[o]);
        if (size <= least) continue;
        found.push({ layer: number, input: i, output: o, x, value, size });
        if (found.length >= 8 * CANDIDATES) least = keepLargest(found);
      }
    });
  });
  keepLargest(found);
  return found;
}

function keepLargest(found) {
  found.sort((a, b) => b.size - a.size);
  found.length = Math.min(found.length, CANDIDATES);
  return found.length === CANDIDATES ? found[CANDIDATES - 1].size : 0;
}

// How much the log-probability of `target` falls where the spline gives its mean, at this place alone.
function contribution(reading, place, target, route) {
  const without = reading.again(place, { layer: route.layer, output: route.output, value: route.value });
  reading.places[place].losses ??= logProbabilities(reading.places[place].logits);
  return reading.places[place].losses[target] - logProbabilities(without.logits)[target];
}

// The gradient of the log-probability of `target` with respect to the outputs of every spline layer at this place.
function outputGradients(reading, place, trace, target) {
  const { model, splines } = reading, context = reading.context(place), t = place - context.start;
  const back = { splines, inputs: trace.inputs, gradients: new Array(splines.length) };
  const logits = new Float64Array(model.head.weight ? model.head.weight.length / model.width : splines[model.head.spline].O);
  softmaxInPlace(trace.logits.slice()).forEach((share, token) => { logits[token] = (token === target) - share; });
  let gradient = normalizeBack(model.norm, trace.x, projectBack(back, model.head, trace.normalized, logits));
  for (let b = model.blocks.length - 1; b >= 0; b--) {
    const block = model.blocks[b], at = trace.blocks[b];
    let [h, mixed] = feedForwardBack(back, model.spec, block.ffn, at, gradient);
    if (block.share) mixed = mixed.map((value, c) => value * (1 - block.share[c]));
    gradient = sum(gradient, normalizeBack(block.norm2, at.middle, sum(h, mixed)));
    gradient = sum(gradient, normalizeBack(block.norm1, at.x, attendBack(back, model, block, context.cache[b], t, at, gradient)));
  }
  return back.gradients;
}

function projectBack(back, part, x, gradient) {
  const result = new Float64Array(x.length);
  if (part.spline === undefined) {
    for (let r = 0, at = 0; r < gradient.length; r++) for (let c = 0; c < x.length; c++, at++) result[c] += part.weight[at] * gradient[r];
    return result;
  }
  const layer = back.splines[part.spline], { G, O, width, points } = layer;
  back.gradients[part.spline] = gradient;
  for (let i = 0; i < x.length; i++) {
    const [cell] = cellOf(layer, x[i]);
    for (let o = 0, at = (i * G + cell) * O; o < O; o++, at++) result[i] += gradient[o] * (points[at + O] - points[at]);
    result[i] *= (G - 1) / width;
  }
  return result;
}

function normalizeBack({ centred, weight }, x, gradient, epsilon = NORM_EPSILON) {
  const n = x.length, scaled = weight ? gradient.map((value, c) => value * weight[c]) : gradient;
  const mean = centred ? x.reduce((total, value) => total + value, 0) / n : 0;
  let squares = 0, along = 0, level = 0;
  for (let c = 0; c < n; c++) { squares += (x[c] - mean) ** 2; along += scaled[c] * (x[c] - mean); level += scaled[c]; }
  const variance = squares / n + epsilon, scale = 1 / Math.sqrt(variance);
  return x.map((value, c) => scale * (scaled[c] - (centred ? level / n : 0) - (value - mean) * along / (n * variance)));
}

// Gradients of the two inputs: features, and the mixed ones that gates (or plain layers) see.
function feedForwardBack(back, spec, part, { h2, mixed, ffn }, gradient) {
  const none = new Float64Array(h2.length);
  if (part.plain) return [none, projectBack(back, part.plain, mixed, gradient)];
  let hidden = projectBack(back, part.out, ffn.normalized, gradient);
  if (spec.ffn_norm) hidden = normalizeBack(PLAIN_NORM, ffn.hidden, hidden);
  if (part.splines) return [projectBack(back, part.splines, h2, times(hidden, ffn.gate)), projectBack(back, part.gate, mixed, times(hidden, ffn.first))];
  if (part.gate) return [
    projectBack(back, part.first, h2, times(hidden, ffn.gate.map(ACTIVATIONS.swiglu))),
    projectBack(back, part.gate, mixed, hidden.map((value, k) => value * ffn.first[k] * SLOPES.swiglu(ffn.gate[k]))),
  ];
  return [none, projectBack(back, part.first, mixed, hidden.map((value, k) => value * SLOPES[spec.ffn](ffn.first[k])))];
}

const SLOPES = {
  mlp: (x) => (1 + erf(x / Math.SQRT2)) / 2 + x * Math.exp(-x * x / 2) / Math.sqrt(2 * Math.PI),
  mlp_tanh: (x) => {
    const tanh = Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3));
    return (1 + tanh + x * (1 - tanh ** 2) * Math.sqrt(2 / Math.PI) * (1 + 3 * 0.044715 * x * x)) / 2;
  },
  relu2: (x) => 2 * Math.max(x, 0),
  swiglu: (x) => sigmoid(x) * (1 + x * (1 - sigmoid(x))),
};

function attendBack(back, model, block, cache, t, { h, attention }, gradient) {
  const { n_head, qk_norm } = model.spec, C = model.width, D = C / n_head, scale = 1 / Math.sqrt(D), { raw, k, v, mixed, shares, gate } = attention;
  const gated = projectBack(back, block.out, attention.gated, gradient), ofMixed = gate ? times(gated, gate) : gated;
  const q = attention.q, dq = new Float64Array(C), dk = new Float64Array(C), dv = new Float64Array(C);
  for (let head = 0; head < n_head; head++) {
    const from = head * D, weights = shares.subarray(head * (t + 1), (head + 1) * (t + 1)), slopes = new Float64Array(t + 1);
    let mean = 0;
    for (let s = 0; s <= t; s++) {
      const values = s < t ? cache.values : v, at = s < t ? s * C + from : from;
      for (let d = 0; d < D; d++) slopes[s] += ofMixed[from + d] * values[at + d];
      mean += weights[s] * slopes[s];
    }
    for (let s = 0; s <= t; s++) {
      const keys = s < t ? cache.keys : k, at = s < t ? s * C + from : from, slope = weights[s] * (slopes[s] - mean) * scale;
      for (let d = 0; d < D; d++) dq[from + d] += slope * keys[at + d];
      if (s === t) for (let d = 0; d < D; d++) { dk[from + d] += slope * q[from + d]; dv[from + d] += weights[s] * ofMixed[from + d]; }
    }
  }
  for (const [part, before] of [[dq, raw.q], [dk, raw.k]]) {
    if (qk_norm) for (let at = 0; at < C; at += D)
      part.set(normalizeBack(PLAIN_NORM, before.subarray(at, at + D), part.subarray(at, at + D), QK_EPSILON), at);
    if (model.rotation) rotate(model.rotation, part, t, -1);
  }
  const all = new Float64Array(3 * C);
  all.set(dq); all.set(dk, C); all.set(dv, 2 * C);
  let result = projectBack(back, block.attention, h, all);
  if (block.splineGate) result = sum(result, projectBack(back, block.splineGate, h, times(gated, mixed)));
  if (block.linearGate) {
    const slope = gate.map((value, c) => gated[c] * mixed[c] * value * (1 - value / 2));  // of 2 sigmoid
    result = sum(result, projectBack(back, block.linearGate, h, slope));
  }
  return result;
}
