// Changes to the splines: switched off, or straightened. A change names a layer and an input or an output or both; with
// neither it is of all the layer's splines. No DOM.

// Off: every input gives the spline's mean. Straight: the least-squares line under the use of the knots, as simplify.py.
const CHANGES = { off: "off", straight: "straight" };

function usesOf(model) { return model.splines.map((layer, number) => layer.shared ? recordedLayers()[number].use : null); }

// The splines of `model` with the changes made, copies where they differ; `uses`: see usesOf.
function changedSplines(model, changes, uses) {
  const splines = model.splines.slice();
  for (const { layer: number, input, output, mode } of changes) {
    if (splines[number] === model.splines[number]) splines[number] = { ...model.splines[number], points: model.splines[number].points.slice() };
    const layer = splines[number], range = (one, count) => one === null ? [0, count] : [one, one + 1];
    const [firstInput, endInput] = range(input, layer.I), [firstOutput, endOutput] = range(output, layer.O);
    for (let i = firstInput; i < endInput; i++) for (let o = firstOutput; o < endOutput; o++)
      changeSpline(layer, uses[number], i, o, mode);
  }
  return splines;
}

function changeSpline({ G, O, width, points }, use, i, o, mode) {
  const weight = (g) => use ? use[i * G + g] : 1 / G, knot = (g) => width * (g / (G - 1) - 0.5), place = (g) => (i * G + g) * O + o;
  let mean = 0, center = 0, spread = 0, slope = 0;
  for (let g = 0; g < G; g++) { mean += weight(g) * points[place(g)]; center += weight(g) * knot(g); }
  if (mode === "straight") {
    for (let g = 0; g < G; g++) {
      spread += weight(g) * (knot(g) - center) ** 2;
      slope += weight(g) * (knot(g) - center) * (points[place(g)] - mean);
    }
    slope /= Math.max(spread, 1e-38);
  }
  for (let g = 0; g < G; g++) points[place(g)] = mean + slope * (knot(g) - center);
}

function changeName(model, { layer, input, output, mode }) {
  const { name } = model.splines[layer], what = input !== null && output !== null ? `${input} → ${output}`
    : input !== null ? `all from input ${input}` : output !== null ? `all into output ${output}` : "all splines";
  return `${capital(name)}: ${what} ${CHANGES[mode]}`;
}

const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);
const sameSplines = (a, b) => a.layer === b.layer && a.input === b.input && a.output === b.output;
