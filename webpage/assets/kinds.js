// What there is in a layer: groups of inputs beside the map, families of functions below it, and a sentence about both.

// Beside the map: the characters that drive each eighth of the rows, where rows are in the order of what they do.
function drawGroups() {
  const groups = explorer.order === "alike" ? currentGroups() : [];
  $("map-groups").hidden = !groups.length;
  $("map-groups").replaceChildren(...groups.map(({ driving }) => element("li", {}, ...driving.map(({ text }) => element("kbd", {}, visibleToken(text))))));
}

function currentGroups() {
  const layer = DATA.splines.layers[explorer.layer];
  if (!layer.tokens.length) return [];
  tokenMeans(0);  // unpacks them
  const last = lastLayer();
  last.seriation ??= seriation(last);
  return layer.groups ??= rowGroups(last.seriation.rows, layer.inputs.length, layer.tokens, layer.means);
}

// Families of functions at the last step, as cards: the typical curve of each, and how many follow it. Press one to see
// where they are.
function drawFamilies() {
  const layer = lastLayer(), { list } = familiesOf(layer), all = layer.I * layer.O;
  $("layer-sentence").textContent = layerSentence(names().name, layer, currentGroups());
  const limit = niceLimit(Math.max(0, ...list.flatMap(({ curve }) => curve.map(Math.abs))));
  $("families").replaceChildren(...list.map(({ curve, count, explained, name }, family) => {
    const picture = svg("svg", { viewBox: "0 0 150 84", "aria-hidden": "true" });
    drawSpline(picture, { points: curve, width: layer.width, limit }, { left: 0, top: 0, right: 150, bottom: 84, small: true });
    const button = element("button", { type: "button", class: "card family", style: `--family: var(--run${family})`, "aria-pressed": explorer.family === family,
      "aria-label": `${capital(name)}: ${percent(count / all, 0)} of the splines. Show them on the map` }, picture,
    element("span", { class: "card-label" }, capital(name)), element("span", { class: "card-measure" }, percent(count / all, 0)),
    element("span", { class: "card-layer" }, `it explains ${percent(explained, 0)} of them`));
    button.addEventListener("click", () => {
      explorer.family = explorer.family === family ? null : family;
      drawMap();
      drawFamilies();
      $("families").children[family].firstChild.focus();
    });
    return element("li", {}, button);
  }));
}

const SHAPE_WORDS = {
  "nearly straight": "are nearly straight", "one hump": "have one hump", "a wave": "are waves", "a step in the middle": "are steps in the middle",
  "steep on the right": "are steep on the right and flat elsewhere", "steep on the left": "are steep on the left and flat elsewhere", dead: "are dead",
};

// What the layer learnt: the shapes of all its splines, and the two groups of inputs that characters drive most.
function layerSentence(name, layer, groups) {
  const all = layer.I * layer.O, counts = [...shapeCounts(layer)].filter(([, count]) => count >= 0.005 * all);
  const parts = counts.sort((a, b) => b[1] - a[1]).map(([kind, count]) => `${percent(count / all, 0)} ${SHAPE_WORDS[kind]}`);
  const driven = groups.filter(({ driving }) => driving.length).sort((a, b) => b.driving[0].score - a.driving[0].score).slice(0, 2);
  const words = driven.map(({ driving }, k) => `${k ? "another" : "one answers most"} to ${driving.map(({ text }) => `“${visibleToken(text)}”`).join(" ")}`);
  const about = words.length ? ` Of the ${groups.length} groups of inputs beside the map, ${words.join(", ")}.` : "";
  return `Of the splines of ${name.charAt(0).toLowerCase() + name.slice(1)}, ${parts.join(", ")}.${about}`;
}
