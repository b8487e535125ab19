// Functions of two inputs as maps: the value as colour, and the reading that pointer, focus and arrow keys move.

const MOST_PIXELS = 2;  // device pixels to a CSS pixel that a map is drawn with
const MAP_COLORS = [0, 1, 2, 3, 4].map((k) => `--map-${k}`);

function startMaps() {
  $("maps-block").addEventListener("change", () => { showMaps(); paintMaps(); });
  document.addEventListener("themechange", paintMaps);
  showMaps();
  new ResizeObserver(paintMaps).observe($("maps-list"));  // it paints them for the first time, too
}

const mapsBlock = () => DATA.maps.blocks[$("maps-block").value];

function showMaps() {
  const block = mapsBlock(), { functions, limit } = block;
  $("maps-caption").textContent = `${number_(functions.length)} of its ${number_(block.all)} functions`;
  $("maps-low").textContent = number(-limit, 2);
  $("maps-high").textContent = number(limit, 2);
  $("maps-list").replaceChildren(...functions.map((one) => element("li", {}, pairFigure(one, block))));
}

// A map with its axes, its name and its reading.
function pairFigure(one, block) {
  const end = number(block.width / 2);
  const field = element("div", { class: "field", tabindex: 0, role: "img", "aria-label": describePair(one, block) },
    element("canvas"), element("i", { class: "spot", hidden: "" }));
  const output = element("output", { class: "small" });
  watchPair(field, output, one, block);
  return element("figure", { class: "panel pair" },
    element("figcaption", {}, `${one.feature} → ${one.output}`),
    element("span", { class: "before", "aria-hidden": "true" }, "one token before"), field,
    element("span", { class: "now", "aria-hidden": "true" }, element("span", {}, `${MINUS}${end}`), element("span", {}, "now"), element("span", {}, end)),
    output);
}

function describePair(one, block) {
  const { feature, output, values } = one, [low, high] = extent(values);
  const at = (value) => { const [x, z] = knotPair(values.indexOf(value), block); return `now ${number(x)} and before ${number(z)}`; };
  return `Input feature ${feature} now and one token before, to output feature ${output}: lowest ${number(low)} at ${at(low)}, ` +
    `highest ${number(high)} at ${at(high)}, ${number(pairValue(values, block, 0, 0))} at the centre. Arrow keys read values.`;
}

// Both inputs at a knot, by its place among the values.
function knotPair(place, { width, points }) {
  return [Math.floor(place / points), place % points].map((g) => width * (g / (points - 1) - 0.5));
}

// The value on the grid of a function that is given at its G × G knots, x's outermost. It is linear on the two triangles
// of each cell, as in backends/standard_pairs.py.
function pairValue(values, { width, points }, x, z) {
  const u = (x / width + 0.5) * (points - 1), v = (z / width + 0.5) * (points - 1);
  const j = Math.min(Math.max(Math.floor(u), 0), points - 2), k = Math.min(Math.max(Math.floor(v), 0), points - 2);
  const t = u - j, s = v - k, near = j * points + k, far = near + points + 1, side = t >= s ? near + points : near + 1;
  const larger = Math.max(t, s), smaller = Math.min(t, s);
  return (1 - larger) * values[near] + (larger - smaller) * values[side] + smaller * values[far];
}

// The inputs at a place of the map, in shares of its width from the left and of its height from the top.
const pairAt = (across, down, { width }) => [(across - 0.5) * width, (0.5 - down) * width];

function paintMaps() {
  const block = mapsBlock(), ratio = Math.min(MOST_PIXELS, devicePixelRatio || 1);
  const colors = new Uint32Array(Uint8Array.from(ramp(MAP_COLORS).flat()).buffer);  // four bytes each
  const canvases = $("maps-list").querySelectorAll("canvas"), side = Math.round(canvases[0].clientWidth * ratio);
  if (side) canvases.forEach((canvas, k) => paintMap(canvas, block.functions[k].values, block, colors, side));
}

function paintMap(canvas, values, block, colors, side) {
  const picture = new ImageData(side, side), pixels = new Uint32Array(picture.data.buffer);
  for (let row = 0, at = 0; row < side; row++) for (let column = 0; column < side; column++, at++) {
    const [x, z] = pairAt((column + 0.5) / side, (row + 0.5) / side, block);
    pixels[at] = colors[Math.round(127.5 + 127.5 * pairValue(values, block, x, z) / block.limit)];
  }
  canvas.width = canvas.height = side;
  canvas.getContext("2d").putImageData(picture, 0, 0);
}

// Shows the value under the pointer, or at the centre and from there on by arrow keys, half a cell at a time.
function watchPair(field, output, one, block) {
  const { width, points } = block, end = width / 2, step = end / (points - 1), spot = field.querySelector(".spot");
  const inside = (value) => Math.min(Math.max(value, -end), end);
  let place = [0, 0];
  const show = (x, z) => {
    place = [inside(x), inside(z)];
    spot.hidden = false;
    spot.style.left = `${100 * (place[0] / width + 0.5)}%`;
    spot.style.top = `${100 * (0.5 - place[1] / width)}%`;
    const where = place.map((value) => number(Number(value.toFixed(2)))).join(", ");
    output.textContent = `${number(pairValue(one.values, block, ...place))} at ${where}`;
  };
  const hide = () => {
    spot.hidden = true;
    output.textContent = extent(one.values).map((value) => number(value, 2)).join(" … ");
  };
  field.onpointermove = field.onpointerdown = (event) => {
    const box = field.getBoundingClientRect();
    show(...pairAt((event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height, block));
  };
  field.onpointerleave = (event) => { if (event.pointerType !== "touch") hide(); };  // a finger that has tapped is gone
  field.onfocus = () => { if (field.matches(":focus-visible")) show(0, 0); };
  field.onblur = hide;
  field.onkeydown = (event) => {
    const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
    if (!move) return;
    event.preventDefault();
    show(place[0] + step * move[0], place[1] + step * move[1]);
  };
  hide();
}
