// The map of a layer: a pixel a spline, and the cross-hair that pointer and arrow keys move.

const MOST_HEIGHT = 640;

function startMap() {
  const area = $("map").parentElement;
  area.addEventListener("pointermove", (event) => { if (event.pointerType !== "touch") hover(cellAt(event)); });
  area.addEventListener("pointerleave", () => hover(null));
  area.addEventListener("click", (event) => {
    const cell = cellAt(event);
    if (!cell) return;
    Object.assign(explorer, cell, { hovered: null });
    settle();
  });
  area.addEventListener("keydown", (event) => {
    const { I, O } = currentLayer(), far = 10;
    const move = {
      ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1],
      PageUp: [-far, 0], PageDown: [far, 0], Home: [0, -O], End: [0, O],
    }[event.key];
    if (!move) return;
    event.preventDefault();
    explorer.hovered = null;
    explorer.row = Math.min(Math.max(explorer.row + move[0], 0), I - 1);
    explorer.column = Math.min(Math.max(explorer.column + move[1], 0), O - 1);
    settle();
  });
}

function settle() { drawCursor(); drawFunction(); announce(); writeHash(); }

function cellAt(event) {
  const { cell, across, down, ratio } = explorer.grid, box = $("map").getBoundingClientRect();
  const column = Math.floor((event.clientX - box.left) * ratio / cell), row = Math.floor((event.clientY - box.top) * ratio / cell);
  return row >= 0 && row < down && column >= 0 && column < across ? { row, column } : null;
}

let hoverFrame = 0;
function hover(cell) {
  explorer.hovered = cell;
  if (!hoverFrame) hoverFrame = requestAnimationFrame(() => { hoverFrame = 0; drawCursor(); drawFunction(); });
}

// One pixel a spline, then enlarged by a whole number of device pixels, so that all cells are alike.
function drawMap() {
  const layer = currentLayer(), { I, O } = layer;
  drawGroups();
  const ratio = devicePixelRatio || 1, room = $("map").parentElement.clientWidth * ratio;
  const cell = Math.max(1, Math.floor(Math.min(room / O, MOST_HEIGHT * ratio / I, 40 * ratio)));
  explorer.grid = { cell, across: O, down: I, ratio };
  const small = new ImageData(O, I), color = COLORINGS[explorer.color](layer), isShown = shownOnMap();
  for (let row = 0, at = 0; row < I; row++) for (let column = 0; column < O; column++, at += 4) {
    const k = explorer.rows[row] * O + explorer.columns[column];
    small.data.set(color(k), at);
    small.data[at + 3] = isShown(k) ? 255 : 36;
  }
  const source = new OffscreenCanvas(O, I);
  source.getContext("2d").putImageData(small, 0, 0);
  for (const id of ["map", "map-cursor"]) {
    const canvas = $(id);
    canvas.width = O * cell; canvas.height = I * cell;
    canvas.style.width = `${O * cell / ratio}px`; canvas.style.height = `${I * cell / ratio}px`;
  }
  const context = $("map").getContext("2d");
  context.imageSmoothingEnabled = false;
  context.drawImage(source, 0, 0, O * cell, I * cell);
  $("map-groups").style.height = `${I * cell / ratio}px`;
}

// All splines, or those of the chosen family, or those that a search has found.
function shownOnMap() {
  if (explorer.family !== null) {
    const { member } = familiesOf(lastLayer());
    return (k) => member[k] === explorer.family;
  }
  return explorer.search === "curved" ? () => true : (k) => explorer.found.mask[k];
}

// Colours of splines, by number; each also writes the legend.
const COLORINGS = {
  rise(layer) {
    const { rise } = measured(layer), most = limitOf(lastLayer(), "rise"), colors = ramp(["--run1", "--raised", "--run0"]);
    showLegend("falling", "rising", "to right, var(--run1), var(--raised), var(--run0)", most);
    return (k) => colors[Math.round(127.5 + 127.5 * Math.sign(rise[k]) * Math.sqrt(Math.min(1, Math.abs(rise[k]) / most)))];
  },
  curved(layer) {
    const { importance } = measured(layer), most = names().importance_limit || 1, colors = ramp([0, 1, 2, 3, 4].map((k) => `--ramp-${k}`));
    showLegend("straight", "curved", "to right, var(--ramp-0), var(--ramp-1), var(--ramp-2), var(--ramp-3), var(--ramp-4)", most);
    return (k) => colors[Math.min(255, Math.floor(255 * Math.sqrt(Math.min(1, importance[k] / most))))];
  },
};

// What 98 % of a measure's absolute values stay within.
function limitOf(layer, name) {
  layer.limits ??= {};
  return layer.limits[name] ??= Float32Array.from(measured(layer)[name], Math.abs).sort()[Math.floor(0.98 * (layer.I * layer.O - 1))] || 1;
}

function showLegend(low, high, gradient, most) {
  $("scale-start").textContent = low;
  $("scale-ramp").style.background = `linear-gradient(${gradient})`;
  $("scale-end").textContent = `${high} ≥ ${number(most, 2)}`;
}

// 256 colours through some of the theme's.
function ramp(names_) {
  const stops = names_.map(themeColor).map((hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16)));
  return Array.from({ length: 256 }, (_, v) => {
    const at = v / 255 * (stops.length - 1), k = Math.min(stops.length - 2, Math.floor(at)), t = at - k;
    return [0, 1, 2].map((c) => Math.round((1 - t) * stops[k][c] + t * stops[k + 1][c])).concat(255);
  });
}

// A cross-hair through row and column, and a frame around the cell; drawn on a canvas of its own.
function drawCursor() {
  const canvas = $("map-cursor"), context = canvas.getContext("2d"), { cell, ratio } = explorer.grid;
  context.clearRect(0, 0, canvas.width, canvas.height);
  const { row, column } = explorer.hovered ?? explorer, x = column * cell, y = row * cell;
  context.fillStyle = themeColor("--crosshair");
  context.fillRect(0, y, canvas.width, cell);
  context.fillRect(x, 0, cell, canvas.height);
  const grow = Math.max(cell, 9 * ratio), inset = (grow - cell) / 2;
  context.lineWidth = 2 * ratio;
  context.strokeStyle = themeColor("--paper");
  context.strokeRect(x - inset - 2 * ratio, y - inset - 2 * ratio, grow + 4 * ratio, grow + 4 * ratio);
  context.strokeStyle = themeColor("--mark");
  context.strokeRect(x - inset, y - inset, grow, grow);
}

let announcing = 0;
function announce() {
  clearTimeout(announcing);
  announcing = setTimeout(() => { $("announcement").textContent = describe(...shown()); }, 250);
}

function describe(i, o) {
  const layer = currentLayer(), m = measured(layer), k = i * layer.O + o;
  const kind = isDead(m, k, layer.O) ? "dead" : isLinear(m, k, layer.O) ? "nearly linear" : "curved";
  return `${names().name}, input ${names().inputs[i]} to output ${names().outputs[o]}: ${kind}, ` +
    `importance ${number(m.importance[k])}, ${percent(layer.outside[i])} of activations outside its grid, ` +
    `control points ${splinePoints(layer, i, o).map((value) => number(value, 2)).join(", ")}`;
}

