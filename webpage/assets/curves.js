// Curves over training: one chart a quantity, all runs in each, with a crosshair for pointer and arrow keys.

const CHARTS = {
  loss: { title: "Loss", unit: "nats a token", lines: [["train_loss", "thin"], ["val_loss", "strong"]], digits: 4, clipTop: true },
  throughput: { title: "Throughput", unit: "tokens a second", lines: [["tokens_per_second", "plain"]], digits: 3, fromZero: true },
  rate: { title: "Learning rate", unit: "", lines: [["learning_rate", "plain"]], digits: 3, fromZero: true },
  gradient: { title: "Gradient norm", unit: "before clipping", lines: [["grad_norm", "plain"]], digits: 3, fromZero: true, clipTop: true },
};
const LINE_NAMES = { train_loss: "train", val_loss: "validation" };
let timeAxis = "step";

function startCurves() {
  for (const figure of document.querySelectorAll("figure[data-chart]")) {
    const redraw = () => drawChart(figure, CHARTS[figure.dataset.chart]);
    redraw();
    new ResizeObserver(redraw).observe(figure);
    document.addEventListener("axischange", redraw);
  }
  for (const input of document.querySelectorAll("input[name=axis]"))
    input.addEventListener("change", () => { timeAxis = input.value; document.dispatchEvent(new Event("axischange")); });
}

const along = (run) => timeAxis === "step" ? run.metrics.step : run.metrics.elapsed_s.map((s) => s === null ? null : s / 60);

function chartSeries(chart) {
  return DATA.runs.flatMap((run, number) => chart.lines.map(([key, kind]) => {
    const x = along(run);
    const points = run.metrics[key].map((y, k) => [x[k], y, run.metrics.step[k]]).filter(([a, b]) => a !== null && b !== null);
    return { run, number, key, kind, points };
  })).filter((series) => series.points.length);
}

function drawChart(figure, chart) {
  const series = chartSeries(chart), picture = figure.querySelector("svg");
  const box = picture.getBoundingClientRect(), width = Math.max(260, box.width), height = Math.max(120, box.height);
  picture.setAttribute("viewBox", `0 0 ${width} ${height}`);
  if (!series.length) { picture.replaceChildren(svg("text", { x: 12, y: 30, class: "tick" }, "nothing was logged yet")); return; }
  const left = 46, right = width - 20, top = 12, bottom = height - 26;
  const [x0, x1] = extent(series.flatMap((s) => s.points.map(([x]) => x)));
  let [y0, y1] = extent(series.flatMap((s) => s.points.map(([, y]) => y)));
  if (chart.clipTop) {  // the first steps would squeeze all others
    const sorted = series.flatMap((s) => s.points.map(([, y]) => y)).sort((a, b) => a - b);
    y1 = sorted[Math.floor(0.975 * (sorted.length - 1))];
  }
  if (chart.fromZero) y0 = 0;
  if (!(y1 > y0)) { y1 = y0 + (Math.abs(y0) || 1); }
  const margin = 0.06 * (y1 - y0);
  y1 += margin; if (!chart.fromZero) y0 -= margin;
  const X = (x) => left + (x - x0) / ((x1 - x0) || 1) * (right - left);
  const Y = (y) => bottom - (y - y0) / (y1 - y0) * (bottom - top);
  const parts = [];
  for (const y of ticks(y0, y1, height > 220 ? 6 : 3)) {
    parts.push(svg("path", { class: "rule", d: pathOf([[left, Y(y)], [right, Y(y)]]) }));
    parts.push(svg("text", { class: "tick", x: left - 7, y: Y(y) + 3.5, "text-anchor": "end" }, shortNumber(y)));
  }
  for (const x of ticks(x0, x1, Math.max(2, Math.floor(width / 110))))
    parts.push(svg("text", { class: "tick", x: X(x), y: height - 8, "text-anchor": "middle" }, shortNumber(x)));
  const clip = `chart-${figure.dataset.chart}`, mask = svg("clipPath", { id: clip });
  mask.append(svg("rect", { x: left, y: top - 6, width: right - left + 6, height: bottom - top + 6 }));
  const lines = svg("g", { "clip-path": `url(#${clip})` });
  for (const { number: run, kind, points } of series) {
    lines.append(svg("path", { class: `line ${kind} run${run % 6}`, d: pathOf(points.map(([x, y]) => [X(x), Y(y)])) }));
    if (kind === "strong" && points.length <= 60)
      for (const [x, y] of points) lines.append(svg("circle", { class: `dot run${run % 6}`, cx: X(x), cy: Y(y), r: 2.6 }));
  }
  const cursor = svg("g", { class: "cursor" });
  picture.replaceChildren(mask, ...parts, lines, cursor);
  watchChart(figure, picture, { series, X, Y, x0, x1, left, right, top, bottom, chart, cursor, width });
}

function watchChart(figure, picture, view) {
  const places = [...new Set(view.series.flatMap((s) => s.points.map(([x]) => x)))].sort((a, b) => a - b);
  const show = (place) => showAt(figure, view, places, place);
  picture.onpointermove = (event) => {
    const box = picture.getBoundingClientRect();
    const x = view.x0 + ((event.clientX - box.left) * view.width / box.width - view.left) / (view.right - view.left) * (view.x1 - view.x0);
    show(nearest(places, x));
  };
  picture.onpointerleave = () => hideCursor(figure, view);
  picture.onblur = () => hideCursor(figure, view);
  picture.onfocus = () => { if (picture.matches(":focus-visible")) show(places.length - 1); };
  picture.onkeydown = (event) => {
    const now = figure.place ?? places.length - 1;
    const next = { ArrowLeft: now - 1, ArrowRight: now + 1, Home: 0, End: places.length - 1 }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    show(Math.min(Math.max(next, 0), places.length - 1));
  };
}

function showAt(figure, view, places, place) {
  figure.place = place;
  const x = places[place], across = view.X(x);
  const parts = [svg("path", { class: "crosshair", d: pathOf([[across, view.top], [across, view.bottom]]) })], words = [];
  for (const { run, number: n, key, points } of view.series) {
    const found = points[nearest(points.map(([a]) => a), x)];
    if (key === "val_loss" && found[0] !== x && points.length < 200 && Math.abs(view.X(found[0]) - across) > 24) continue;
    parts.push(svg("circle", { class: `dot run${n % 6}`, cx: view.X(found[0]), cy: view.Y(found[1]), r: 3.4 }));
    const name = [DATA.runs.length > 1 ? run.name : "", LINE_NAMES[key] ?? ""].filter(Boolean).join(" ");
    words.push(`${name} ${number(found[1], view.chart.digits)}`.trim());
  }
  view.cursor.replaceChildren(...parts);
  const where = timeAxis === "step" ? `step ${number(x, 7)}` : `${number(x, 3)} min`;
  figure.querySelector("output").textContent = `${where} · ${words.join(" · ")}`;
}

function hideCursor(figure, view) {
  view.cursor.replaceChildren();
  figure.place = undefined;
  figure.querySelector("output").textContent = view.chart.unit;
}

function extent(values) {
  let low = Infinity, high = -Infinity;
  for (const value of values) { low = Math.min(low, value); high = Math.max(high, value); }
  return [low, high];
}

function nearest(sorted, value) {
  let best = 0;
  for (let k = 1; k < sorted.length; k++) if (Math.abs(sorted[k] - value) < Math.abs(sorted[best] - value)) best = k;
  return best;
}

function shortNumber(value) {
  const size = Math.abs(value);
  if (size >= 1e6) return `${number(value / 1e6)}M`;
  if (size >= 1e4) return `${number(value / 1e3)}k`;
  return number(value);
}
