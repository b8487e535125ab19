// Families of splines of the same shape, whatever their size and sign: k-means of unit vectors under use. No DOM.

const FAMILIES = 6, FAMILY_ROUNDS = 30, MOST_SHAPES = 4000, LEAST_USE = 0.02;

// Unit vectors, (splines, G): values around their mean, times the root of the knots' use, so that products of two are
// correlations under use. Zeros for splines that do not vary.
function shapesOf({ I, G, O, points, use }) {
  const shapes = new Float32Array(I * O * G);
  for (let i = 0; i < I; i++) for (let o = 0; o < O; o++) {
    const at = (i * O + o) * G;
    let mean = 0, size = 0;
    for (let g = 0; g < G; g++) mean += use[i * G + g] * points[(i * G + g) * O + o];
    for (let g = 0; g < G; g++) {
      shapes[at + g] = Math.sqrt(use[i * G + g]) * (points[(i * G + g) * O + o] - mean);
      size += shapes[at + g] ** 2;
    }
    if (size > 0) for (let g = 0, by = 1 / Math.sqrt(size); g < G; g++) shapes[at + g] *= by;
  }
  return shapes;
}

// The family that each of the shapes is nearest to: number, and the product with its center, whose sign says whether it
// is mirrored and whose square is the part of its variation that the center explains.
function nearestCenter(shapes, at, G, centers) {
  let family = 0, along = 0;
  for (let f = 0; f < centers.length; f++) {
    let product = 0;
    for (let g = 0; g < G; g++) product += shapes[at + g] * centers[f][g];
    if (Math.abs(product) > Math.abs(along)) { along = product; family = f; }
  }
  return [family, along];
}

// The families of a layer's splines, largest first: typical curve, name, how many follow it and how nearly; and the
// family of every spline, -1 for dead ones.
function familiesOf(layer) {
  if (layer.families) return layer.families;
  const { I, G, O } = layer, m = measured(layer), shapes = shapesOf(layer);
  const alive = [];
  for (let k = 0; k < I * O; k++) if (!isDead(m, k, O)) alive.push(k);
  const every = Math.ceil(alive.length / MOST_SHAPES) || 1, sample = alive.filter((_, n) => n % every === 0);
  let centers = startingCenters(shapes, sample, G);
  for (let round = 0; round < FAMILY_ROUNDS; round++) {
    const sums = centers.map(() => new Float64Array(G));
    for (const k of sample) {
      const [family, along] = nearestCenter(shapes, k * G, G, centers), sign = Math.sign(along);
      for (let g = 0; g < G; g++) sums[family][g] += sign * shapes[k * G + g];
    }
    centers = sums.map((total, f) => dot(total, total) > 0 ? unit(total) : centers[f]);
  }
  return layer.families = describeFamilies(layer, alive, shapes, centers);
}

// Shapes that are as unlike each other as can be found, one after the other.
function startingCenters(shapes, sample, G) {
  const at = (k) => Float64Array.from(shapes.subarray(k * G, (k + 1) * G)), few = sample.filter((_, n) => n % Math.ceil(sample.length / 400) === 0);
  const centers = few.length ? [at(few[0])] : [];
  while (centers.length < Math.min(FAMILIES, few.length)) {
    const likeness = (k) => Math.abs(nearestCenter(shapes, k * G, G, centers)[1]);
    centers.push(at(few.reduce((best, k) => likeness(k) < likeness(best) ? k : best)));
  }
  return centers;
}

function describeFamilies(layer, alive, shapes, centers) {
  const { I, G, O, points, use } = layer, { total } = measured(layer);
  const found = centers.map(() => ({ curve: new Array(G).fill(0), count: 0, explained: 0 })), member = new Int8Array(I * O).fill(-1);
  for (const k of alive) {
    const i = Math.floor(k / O), o = k % O, [family, along] = nearestCenter(shapes, k * G, G, centers), sign = Math.sign(along) / Math.sqrt(total[k]);
    let mean = 0;
    for (let g = 0; g < G; g++) mean += use[i * G + g] * points[(i * G + g) * O + o];
    for (let g = 0; g < G; g++) found[family].curve[g] += sign * (points[(i * G + g) * O + o] - mean);
    found[family].count++;
    found[family].explained += along ** 2;
    member[k] = family;
  }
  const typicalUse = Array.from({ length: G }, (_, g) => { let share = 0; for (let i = 0; i < I; i++) share += use[i * G + g] / I; return share; });
  for (const family of found) {
    family.curve = upright(family.curve.map((value) => value / (family.count || 1)));
    family.explained /= family.count || 1;
    family.name = shapeName(family.curve, typicalUse);
  }
  const order = found.map((_, f) => f).filter((f) => found[f].count).sort((a, b) => found[b].count - found[a].count);
  const places = found.map((_, f) => order.indexOf(f));
  return { list: order.map((f) => found[f]), member: member.map((family) => family < 0 ? -1 : places[family]) };
}

// How many splines have each shape, one by one, by name.
function shapeCounts(layer) {
  if (layer.shapeCounts) return layer.shapeCounts;
  const { I, G, O, use } = layer, m = measured(layer), counts = new Map();
  for (let i = 0; i < I; i++) for (let o = 0, near = use.subarray(i * G, (i + 1) * G); o < O; o++) {
    const name = isDead(m, i * O + o, O) ? "dead" : shapeName(splinePoints(layer, i, o), near);
    counts.set(name, (counts.get(name) ?? 0) + 1);
  }
  return layer.shapeCounts = counts;
}

// A family holds curves and their mirror images; shown is the one whose largest value is above zero.
function upright(curve) {
  const most = curve.reduce((best, value) => Math.abs(value) > Math.abs(best) ? value : best, 0);
  return most < 0 ? curve.map((value) => -value) : curve;
}

// A name by where a curve rises and falls between knots that are used. Small ups and downs do not count.
function shapeName(curve, use) {
  const used = curve.map((_, g) => g).filter((g) => use[g] >= LEAST_USE), G = curve.length;
  const [first, last] = used.length > 1 ? [used[0], used[used.length - 1]] : [0, G - 1];
  const values = curve.slice(first, last + 1), range = Math.max(...values) - Math.min(...values);
  if (linearShare(values, use.slice(first, last + 1)) >= 1 - LINEAR_SHARE) return "nearly straight";
  const steps = values.slice(1).map((value, k) => value - values[k]), large = steps.filter((step) => Math.abs(step) > 0.15 * range);
  const turns = large.slice(1).filter((step, k) => Math.sign(step) !== Math.sign(large[k])).length;
  if (turns === 1) return "one hump";
  if (turns > 1) return "a wave";
  const weight = steps.reduce((all, step) => all + Math.abs(step), 0);
  const center = steps.reduce((all, step, k) => all + Math.abs(step) * ((first + k + 0.5) / (G - 1) - 0.5), 0) / (weight || 1);
  return center > 0.1 ? "steep on the right" : center < -0.1 ? "steep on the left" : "a step in the middle";
}

// The part of a curve's variance under use that a straight line explains.
function linearShare(values, use) {
  const total = use.reduce((a, b) => a + b, 0) || 1, mean = (list) => list.reduce((sum_, value, g) => sum_ + use[g] * value, 0) / total;
  const y = mean(values), x = mean(values.map((_, g) => g));
  const both = mean(values.map((value, g) => (value - y) * (g - x))), spread = mean(values.map((_, g) => (g - x) ** 2)), variance = mean(values.map((value) => (value - y) ** 2));
  return variance > 0 && spread > 0 ? both * both / (spread * variance) : 1;
}
