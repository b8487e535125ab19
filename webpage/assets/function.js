// The function that is shown: its curve, who uses it, the tokens that drive it, and its numbers.

function drawFunction() {
  const [i, o] = shown(), layer = currentLayer(), m = measured(layer), k = i * layer.O + o;
  const picture = $("function"), { width, height } = sizeOf(picture, 280, 200);
  picture.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const points = splinePoints(layer, i, o), letters = tokenMarks(layer, i);
  const area = { left: 46, top: 10, right: width - 8, bottom: height - (letters.length ? 78 : 40) };
  const histogram = histogramOf(layer, i), limit = explorer.fixedScale ? names().spline_limit : splineLimit(i, o);
  const { X, Y, end } = drawSpline(picture, { points, width: layer.width, histogram, limit }, area);
  for (const y of [-limit, -limit / 2, 0, limit / 2, limit])
    picture.append(svg("text", { class: "tick", x: area.left - 7, y: Y(y) + 3.5, "text-anchor": "end" }, number(y)));
  for (const x of ticks(-end, end, 6))
    picture.append(svg("text", { class: "tick", x: X(x), y: area.bottom + 16, "text-anchor": "middle" }, number(x)));
  drawTokens(picture, letters, X, end, area.bottom + 34, width);
  picture.append(svg("text", { class: "tick", x: (area.left + area.right) / 2, y: height - 6, "text-anchor": "middle" },
    `activation of input feature ${names().inputs[i]}`));
  picture.append(svg("g", { id: "reading" }));
  picture.onpointermove = (event) => {
    const box = picture.getBoundingClientRect(), at = (event.clientX - box.left) * width / box.width;
    const x = Math.min(Math.max(-end + (at - area.left) / (area.right - area.left) * 2 * end, -end), end);
    const y = splineValue(points, layer.width, x), inside = Math.abs(y) <= limit;
    $("reading").replaceChildren(
      svg("path", { class: "crosshair", d: pathOf([[X(x), area.top], [X(x), area.bottom]]) }),
      ...(inside ? [svg("circle", { class: "reading", cx: X(x), cy: Y(y), r: 4.5 })] : []),
      svg("text", { class: "value", x: X(x) + (X(x) > width - 130 ? -8 : 8), y: area.top + 14, "text-anchor": X(x) > width - 130 ? "end" : "start" },
        `f(${number(x)}) = ${number(y)}`));
  };
  picture.onpointerleave = () => $("reading").replaceChildren();
  picture.setAttribute("aria-label", describe(i, o));
  $("function-title").textContent = `${names().inputs[i]} → ${names().outputs[o]}`;
  $("input").value = names().inputs[i];
  $("output").value = names().outputs[o];
  showFacts(layer, m, i, o, k);
  drawShares(layer, m, k);
}

// The size of an element, at least so much; kept until it changes, since asking makes the browser lay out the page.
const sizes = new WeakMap();
const sizeWatch = new ResizeObserver((entries) => { for (const { target } of entries) sizes.delete(target); });
function sizeOf(target, width, height) {
  if (!sizes.has(target)) {
    const box = target.getBoundingClientRect();
    sizes.set(target, { width: Math.max(width, box.width), height: Math.max(height, box.height) });
    sizeWatch.observe(target);
  }
  return sizes.get(target);
}

function histogramOf(layer, i) {
  const shares = layer.histogram.subarray(i * DATA.splines.bins, (i + 1) * DATA.splines.bins);
  return shares.some((share) => share) ? Array.from(shares) : null;
}

// The y axis of one spline: wide enough for it at all steps that have been unpacked, so that the film does not jump.
function splineLimit(i, o) {
  let most = 0;
  for (const layers of unpackedSteps.values()) {
    const layer = layers[explorer.layer];
    for (let g = 0; g < layer.G; g++) most = Math.max(most, Math.abs(layer.points[(i * layer.G + g) * layer.O + o]));
  }
  return niceLimit(most);
}

function showFacts(layer, m, i, o, k) {
  const rank = 1 + m.importance.reduce((before, value) => before + (value > m.importance[k]), 0);
  const facts = [
    ["Importance", `${number(m.importance[k])}, rank ${number_(rank)} of ${number_(layer.I * layer.O)}`],
    ["Curved share", isDead(m, k, layer.O) ? "dead" : percent(curvedShare(m, k))],
    ["Standard deviation", number(Math.sqrt(m.total[k]))],
    ["Outside the grid", Number.isNaN(layer.outside[i]) ? "not known" : percent(layer.outside[i])],
    ["Control points", splinePoints(layer, i, o).map((value) => number(value, 3)).join("  ")],
  ];
  const means = tokenMeans(i);
  if (means.length) {
    const word = DATA.splines.token_word;
    facts.push([`${word} that raise it`, tokenList(means.slice(0, 6))], [`${word} that lower it`, tokenList(means.slice(-6).reverse())]);
  }
  $("facts").replaceChildren(...facts.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]));
}

function tokenList(means) {
  const list = element("span", { class: "tokens" });
  for (const { text, mean } of means) list.append(element("span", {}, element("kbd", {}, text), ` ${number(mean, 2)}`));
  return list;
}

// Mean activation of input i by token, the highest first; known for the last step.
function tokenMeans(i) {
  const layer = DATA.splines.layers[explorer.layer];
  if (!layer.tokens.length) return [];
  layer.means ??= new Float32Array(blockBytes(layer.token_block).buffer);
  return layer.tokens.map((text, v) => ({ text: visibleToken(text), mean: layer.means[v * layer.inputs.length + i], v }))
    .sort((a, b) => b.mean - a.mean);
}

// Tokens to write below the axis at their mean activations: only at the step that the means are of.
function tokenMarks(layer, i) {
  if (explorer.step !== DATA.splines.steps.length - 1) return [];
  return tokenMeans(i).filter(({ text }) => [...text].length <= 6).sort((a, b) => a.v - b.v);
}

function drawTokens(picture, letters, X, end, top, width) {
  const taken = [[], []];  // two rows, the most frequent first: what would overlap is left out
  for (const { text, mean } of letters) {
    const half = 4.4 * [...text].length + 2, x = X(Math.min(Math.max(mean, -end), end));
    const row = taken.findIndex((places) => places.every(([a, b]) => x + half < a || x - half > b));
    if (row < 0 || x - half < 30 || x + half > width) continue;
    taken[row].push([x - half, x + half]);
    picture.append(svg("text", { class: "token", x, y: top + 14 * row, "text-anchor": "middle" }, text));
  }
}

// How curved the layer's splines are, all of them; the shown one is marked.
function drawShares(layer, m, k) {
  const picture = $("shares"), { width } = sizeOf(picture, 200, 74), height = 74, bins = 40, bottom = 54;
  picture.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const key = `${explorer.layer} ${explorer.step} ${width}`;
  if (picture.dataset.key !== key) {
    picture.dataset.key = key;
    const counts = new Array(bins).fill(0);
    for (let at = 0; at < m.total.length; at++) counts[Math.min(bins - 1, Math.floor(bins * curvedShare(m, at)))]++;
    const top = Math.max(...counts), step = width / bins;
    picture.replaceChildren(...counts.map((count, b) => svg("rect", { class: "bin", x: b * step, width: step - 1,
      y: bottom - 46 * count / top, height: 46 * count / top })), svg("path", { class: "rule", d: pathOf([[0, bottom], [width, bottom]]) }),
      svg("text", { class: "tick", x: 0, y: height - 6 }, "straight"),
      svg("text", { class: "tick", x: width, y: height - 6, "text-anchor": "end" }, "curved"), svg("path", { class: "here" }));
    const linear = m.total.reduce((n, _, at) => n + isLinear(m, at, layer.O), 0) / m.total.length;
    picture.setAttribute("aria-label", `Distribution of the curved share of variation; ${percent(linear)} of the splines are effectively linear.`);
  }
  const x = Math.min(width - 1.5, Math.max(1.5, curvedShare(m, k) * width));
  picture.querySelector(".here").setAttribute("d", pathOf([[x, 4], [x, bottom]]));
}
