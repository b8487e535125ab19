// Small helpers: elements, numbers, and the picture of one spline.

const MINUS = "−";
const SVG = "http://www.w3.org/2000/svg";

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) if (value !== null) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function svg(name, attributes = {}, text = null) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== null) made.textContent = text;
  return made;
}

function number(value, digits = 3) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  const text = size !== 0 && (size < 1e-3 || size >= 1e6) ? value.toExponential(1)
    : size >= 1000 ? Math.round(value).toLocaleString("en-US")
    : String(Number(value.toPrecision(digits)));
  return text.replaceAll("-", MINUS);
}

const percent = (share, digits = 1) => `${number(Number((100 * share).toFixed(digits)), 4)} %`;

// The least of … 0.1, 0.2, 0.5, 1 … that is not below `value`.
function niceLimit(value) {
  if (!(value > 0)) return 0.1;
  const exponent = Math.floor(Math.log10(value)) - 1;
  for (let k = 0; ; k++) for (const digit of [1, 2, 5]) {
    const step = Number(`${digit}e${exponent + k}`);
    if (step >= value) return step;
  }
}

// Round steps for an axis from `low` to `high`.
function ticks(low, high, wanted) {
  const rough = (high - low) / wanted, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((digit) => digit * power).find((size) => size >= rough);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * step; k++) found.push(Number((k * step).toPrecision(12)));
  return found;
}

const pathOf = (points) => points.map(([x, y], k) => `${k ? "L" : "M"}${x.toFixed(2)} ${y.toFixed(2)}`).join("");

// What is drawn of a spline, in its own units: the curve through the control points and its straight continuations.
function splineLines(points, width, end) {
  const knot = (g) => -width / 2 + width * g / (points.length - 1);
  return {
    curve: points.map((y, g) => [knot(g), y]),
    beyond: [-end, end].map((x) => [[Math.sign(x) * width / 2, points[x < 0 ? 0 : points.length - 1]], [x, splineValue(points, width, x)]]),
  };
}

// How much of the input axis is shown: ± in grid widths.
const VISIBLE = DATA.splines?.visible ?? 0.75;

// Draw into `picture` (an svg element): box in its user units, y in ±limit. `small` leaves out what needs room.
function drawSpline(picture, { points, width, histogram, limit }, { left, top, right, bottom, small }) {
  const end = VISIBLE * width;
  const X = (x) => left + (x + end) / (2 * end) * (right - left);
  const Y = (y) => bottom - (y + limit) / (2 * limit) * (bottom - top);
  const parts = [];
  for (const side of [-1, 1]) {
    const a = X(side * width / 2), b = X(side * end);
    parts.push(svg("rect", { class: "ground", x: Math.min(a, b), y: top, width: Math.abs(b - a), height: bottom - top }));
  }
  if (histogram) {
    const peak = Math.max(...histogram) || 1, step = (right - left) / histogram.length;
    const outline = [[left, bottom]];
    histogram.forEach((share, k) => {
      const y = bottom - 0.6 * (bottom - top) * share / peak;
      outline.push([left + k * step, y], [left + (k + 1) * step, y]);
    });
    outline.push([right, bottom]);
    parts.push(svg("path", { class: "area", d: pathOf(outline) + "Z" }));
  }
  parts.push(svg("path", { class: "rule", d: pathOf([[left, Y(0)], [right, Y(0)]]) }));
  for (const side of [-1, 1])
    parts.push(svg("path", { class: "rule edge", d: pathOf([[X(side * width / 2), top], [X(side * width / 2), bottom]]) }));
  const clip = picture.dataset.clip ?? (picture.dataset.clip = `clip${++drawnClips}`);
  const mask = svg("clipPath", { id: clip });
  mask.append(svg("rect", { x: left, y: top - 1, width: right - left, height: bottom - top + 2 }));
  const drawn = svg("g", { "clip-path": `url(#${clip})` });
  const { curve, beyond } = splineLines(points, width, end);
  for (const line of beyond) drawn.append(svg("path", { class: "beyond", d: pathOf(line.map(([x, y]) => [X(x), Y(y)])) }));
  drawn.append(svg("path", { class: "curve", d: pathOf(curve.map(([x, y]) => [X(x), Y(y)])) }));
  if (points.length <= (small ? 9 : 65))
    for (const [x, y] of curve) drawn.append(svg("circle", { class: "knot", cx: X(x), cy: Y(y), r: small ? 1.8 : 4 }));
  picture.replaceChildren(mask, ...parts, drawn);
  return { X, Y, end };
}
let drawnClips = 0;

// Characters that would not show.
function visibleToken(text) {
  const named = { " ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍" };
  return [...text].map((character) => named[character] ?? (character < " " ? "�" : character)).join("");
}
