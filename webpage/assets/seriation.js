// An order for features, which have none of their own: those that do alike stand side by side. No DOM.

const GROUPS = 8, GROUP_SCORE = 2.6, SERIATION_ROUNDS = 80;

// Rows and columns by their angle in the plane of the two strongest singular vectors of the splines' rise. Where an
// input and an output have the same angle, splines rise; where they are opposite, splines fall.
function seriation(layer) {
  const { rise } = measured(layer), { I, O } = layer;
  const columns = [0, 1].map((n) => unit(Float64Array.from({ length: O }, (_, o) => Math.sin((n + 1) * (o + 1)) + 1e-3)));
  const forward = (v) => product({ weight: rise, bias: null }, v);
  const back = (u) => {
    const v = new Float64Array(O);
    for (let i = 0, k = 0; i < I; i++) for (let o = 0; o < O; o++, k++) v[o] += rise[k] * u[i];
    return v;
  };
  for (let round = 0; round < SERIATION_ROUNDS; round++) {
    columns[0] = unit(back(forward(columns[0])));
    const second = back(forward(columns[1])), along = dot(second, columns[0]);
    columns[1] = unit(second.map((value, o) => value - along * columns[0][o]));
  }
  const rows = columns.map(forward), sizes = rows.map((row) => Math.sqrt(dot(row, row)));
  const byAngle = (a, b) => Array.from(a.keys()).sort((p, q) => Math.atan2(b[p], a[p]) - Math.atan2(b[q], a[q]));
  return { rows: byAngle(rows[0], rows[1]), columns: byAngle(...columns.map((column, n) => column.map((value) => value * sizes[n]))) };
}

const dot = (a, b) => a.reduce((total, value, k) => total + value * b[k], 0);
const unit = (v) => { const size = Math.sqrt(dot(v, v)) || 1; return v.map((value) => value / size); };

// Equal groups of `rows` (places of inputs), and up to three characters that drive each of them: those whose mean
// activation over the group lies more than GROUP_SCORE standard errors above the mean over all characters.
function rowGroups(rows, inputs, tokens, means) {
  const center = Float64Array.from({ length: inputs }, (_, i) => tokens.reduce((total, _, v) => total + means[v * inputs + i], 0) / tokens.length);
  let variance = 0;
  for (let k = 0; k < tokens.length * inputs; k++) variance += (means[k] - center[k % inputs]) ** 2 / (tokens.length * inputs);
  return Array.from({ length: GROUPS }, (_, group) => {
    const members = rows.slice(Math.round(group * rows.length / GROUPS), Math.round((group + 1) * rows.length / GROUPS));
    const scores = tokens.map((text, v) => {
      const mean = members.reduce((total, i) => total + means[v * inputs + i] - center[i], 0) / (members.length || 1);
      return { text, score: mean * Math.sqrt(members.length / (variance || 1)) };
    });
    const driving = scores.filter(({ score }) => score > GROUP_SCORE).sort((a, b) => b.score - a.score).slice(0, 3);
    return { count: members.length, driving };
  });
}
