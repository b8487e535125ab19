// The splines: unpacked from the page's data blocks, one step at a time, and the measures that the explorer sorts by.
// The same definitions as splines/views.py and splines/statistics.py.

const LINEAR_SHARE = 0.05, DEAD_SHARE = 0.05;
const unpackedSteps = new Map();

function blockBytes(id) {
  const text = document.getElementById(id).textContent.trim();
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
  const raw = atob(text), bytes = new Uint8Array(raw.length);
  for (let k = 0; k < raw.length; k++) bytes[k] = raw.charCodeAt(k);
  return bytes;
}

// The layers at the k-th recorded step. Points are (I, G, O) in one array, as in the layer itself.
function layersAt(k) {
  if (!unpackedSteps.has(k)) {
    const { block, layers } = DATA.splines.steps[k];
    const bytes = blockBytes(block);
    unpackedSteps.set(k, layers.map((at, number) => unpackLayer(bytes, at, DATA.splines.layers[number])));
  }
  return unpackedSteps.get(k);
}

function unpackLayer(bytes, at, layer) {
  const I = layer.inputs.length, O = layer.outputs.length, G = at.G, B = DATA.splines.bins;
  const floats = (offset, count) => new Float32Array(bytes.slice(offset, offset + 4 * count).buffer);
  const points = at.scale === null ? floats(at.points, I * G * O) : fixedPoint(bytes, at.points, I * G * O, at.scale);
  const histogram = new Uint16Array(bytes.slice(at.histogram, at.histogram + 2 * I * B).buffer);
  const knots = Array.from({ length: G }, (_, g) => -at.width / 2 + at.width * g / (G - 1));
  return { I, O, G, width: at.width, knots, points, use: floats(at.use, I * G), outside: floats(at.outside, I), histogram };
}

// Whole numbers of 24 bits, offset by 2^23, times a scale.
function fixedPoint(bytes, offset, count, scale) {
  const values = new Float32Array(count);
  for (let k = 0, b = offset; k < count; k++, b += 3)
    values[k] = ((bytes[b] | bytes[b + 1] << 8 | bytes[b + 2] << 16) - 8388608) * scale;
  return values;
}

function splinePoints(layer, i, o) {
  const values = new Array(layer.G);
  for (let g = 0; g < layer.G; g++) values[g] = layer.points[(i * layer.G + g) * layer.O + o];
  return values;
}

// The value at x of a spline given by its control points: straight lines beyond the grid.
function splineValue(points, width, x) {
  const cells = points.length - 1, u = (x + width / 2) * cells / width;
  const j = Math.min(Math.max(Math.floor(u), 0), cells - 1);
  return points[j] + (u - j) * (points[j + 1] - points[j]);
}

// Importance, variance under use, the curved part of that variance, and rise, the signed root of the straight part:
// (I, O) each.
function measured(layer) {
  if (layer.measures) return layer.measures;
  const { I, O, G, points, use, knots } = layer;
  const importance = new Float32Array(I * O), total = new Float32Array(I * O), curved = new Float32Array(I * O), rise = new Float32Array(I * O);
  const around = new Float64Array(G);
  for (let i = 0; i < I; i++) {
    let center = 0, spread = 0;
    for (let g = 0; g < G; g++) center += use[i * G + g] * knots[g];
    for (let g = 0; g < G; g++) { around[g] = knots[g] - center; spread += use[i * G + g] * around[g] ** 2; }
    spread = Math.max(spread, 1e-38);
    for (let o = 0; o < O; o++) {
      let mean = 0, variance = 0, slope = 0, bends = 0;
      for (let g = 0; g < G; g++) mean += use[i * G + g] * points[(i * G + g) * O + o];
      for (let g = 0; g < G; g++) {
        const share = use[i * G + g], value = points[(i * G + g) * O + o] - mean;
        variance += share * value * value;
        slope += share * around[g] * value;
        if (g > 0 && g < G - 1) {
          const at = (i * G + g) * O + o, bend = points[at - O] - 2 * points[at] + points[at + O];
          bends += share * bend * bend;
        }
      }
      const k = i * O + o;
      importance[k] = Math.sqrt(bends);
      total[k] = variance;
      rise[k] = slope / Math.sqrt(spread);
      curved[k] = Math.max(variance - slope * slope / spread, 0);
    }
  }
  const typical = new Float32Array(O);
  for (let k = 0; k < I * O; k++) typical[k % O] += total[k] / I;
  return layer.measures = { importance, total, curved, rise, typical };
}

function curvedShare(measures, k) {
  return measures.total[k] > 0 ? measures.curved[k] / measures.total[k] : 0;
}

function isDead(measures, k, O) {
  return measures.total[k] === 0 || measures.total[k] <= DEAD_SHARE ** 2 * measures.typical[k % O];
}

function isLinear(measures, k, O) {
  return !isDead(measures, k, O) && curvedShare(measures, k) <= LINEAR_SHARE;
}

// What can be searched for: which splines match, and how they are ranked. `varied`: no feature more than twice.
const SEARCHES = {
  curved: {
    label: "Most curved", varied: true,
    about: "Bends that the activations meet: the root mean square of the second differences, weighted with use.",
    matches: () => true, rank: (layer, m, k) => m.importance[k],
  },
  linear: {
    label: "Nearly linear", varied: true,
    about: "A straight line explains at least 95 % of their variation. The strongest first.",
    matches: (layer, m, k) => isLinear(m, k, layer.O), rank: (layer, m, k) => m.total[k],
  },
  dead: {
    label: "Dead", varied: true,
    about: "They vary less than a twentieth as much as a typical spline into the same output. The stillest first.",
    matches: (layer, m, k) => isDead(m, k, layer.O), rank: (layer, m, k) => -m.total[k],
  },
  outside: {
    label: "Outside its grid", varied: true,
    about: "At least one activation in ten reaches them beyond their outermost control points.",
    matches: (layer, m, k) => layer.outside[Math.floor(k / layer.O)] >= 0.1,
    rank: (layer, m, k) => layer.outside[Math.floor(k / layer.O)] + 1e-3 * Math.min(1, m.total[k]),
  },
};

// The matching splines: how many there are, which (a byte each), and the first `count` by rank.
function search(layer, name, count) {
  const { matches, rank, varied } = SEARCHES[name], m = measured(layer), size = layer.I * layer.O;
  const mask = new Uint8Array(size), found = [];
  for (let k = 0; k < size; k++) if (matches(layer, m, k)) { mask[k] = 1; found.push(k); }
  const score = Float64Array.from(found, (k) => rank(layer, m, k));
  const order = Array.from(found.keys()).sort((a, b) => score[b] - score[a]);
  const rows = new Map(), columns = new Map(), first = [];
  for (const at of order) {
    const k = found[at], i = Math.floor(k / layer.O), o = k % layer.O;
    const often = Math.max(rows.get(i) ?? 0, columns.get(o) ?? 0);
    if (varied && often >= 2) continue;
    rows.set(i, (rows.get(i) ?? 0) + 1);
    columns.set(o, (columns.get(o) ?? 0) + 1);
    first.push(k);
    if (first.length === count) break;
  }
  return { count: found.length, mask, first };
}
