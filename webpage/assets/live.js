// The panel of the live model: the text, what is computed of it between two frames, and what is pointed at.
// prediction.js shows what comes next, routes.js the splines that made it.

const SLICE_MS = 9, WRITING_SLICE_MS = 25, MOST_CHARACTERS = 3000, REST_MS = 140;
const live = {
  model: null, uses: [], changes: [], plain: null, changed: null, tokens: [], chosen: null, hovered: null, cells: [], next: null,
  writing: null, random: Math.random, scheduled: false, jobs: [],
};

function startLive() {
  live.model = loadModel(DATA.model);
  live.uses = usesOf(live.model);
  live.plain = new Reading(live.model, live.model.splines);
  $("text").value = firstText();
  $("text").addEventListener("input", () => { stopWriting(); live.chosen = null; takeText(); });
  $("write").addEventListener("click", () => { if (live.writing) stopWriting(); else startWriting(); });
  $("clear").addEventListener("click", () => { stopWriting(); $("text").value = ""; live.chosen = null; takeText(); $("text").focus(); });
  $("temperature").addEventListener("input", () => { $("temperature-value").textContent = number(Number($("temperature").value)); });
  startPointing();
  if (live.model.splines.length) startRoutes();
  takeText();
}

// Something the model has written, so that there is a text to point at.
function firstText() {
  const sample = DATA.runs[0].samples.at(-1)?.text.trim() ?? "";
  const start = sample.slice(0, 240), end = start.lastIndexOf("\n");
  return end > 80 ? start.slice(0, end) : start;
}

// The reading that counts: of the model with its changes, if there are any.
const reading = () => live.changed ?? live.plain;

function takeText() {
  const { tokens, unknown } = encodeText(live.model.spec.vocabulary, $("text").value);
  live.tokens = tokens;
  for (const one of [live.plain, live.changed]) one?.take(tokens);
  $("unknown").textContent = unknown.length
    ? `Left out, since the model's ${live.model.spec.vocabulary.length} characters do not include ${unknown.length > 1 ? "them" : "it"}: ${unknown.slice(0, 12).map(visibleToken).join(" ")}` : "";
  live.hovered = null;
  if (live.chosen !== null && live.chosen > tokens.length) live.chosen = null;
  drawText();
  pointAt();
  schedule();
}

function takeChanges(changes) {
  live.changes = changes;
  live.changed = changes.length ? new Reading(live.model, changedSplines(live.model, changes, live.uses)) : null;
  live.changed?.take(live.tokens);
  schedule();
}

// What is computed next: the text as the model reads it, then what it writes, then the rest.
function nextWork() {
  if (!reading().isDone) return () => reading().advance();
  if (live.writing) return writeCharacter;
  if (!live.plain.isDone) return () => live.plain.advance();
  return live.jobs.shift();
}

function schedule() {
  if (!live.scheduled) requestAnimationFrame(workAWhile);
  live.scheduled = true;
}

function workAWhile() {
  live.scheduled = false;
  const until = performance.now() + (live.writing ? WRITING_SLICE_MS : SLICE_MS);  // nobody types meanwhile
  let work;
  while (performance.now() < until && (work = nextWork())) work();
  showWriting();
  drawText();
  drawPrediction();
  moveDots();
  if (live.writing || live.jobs.length || !reading().isDone || !live.plain.isDone) schedule();
}

function startWriting() {
  if ($("text").value.length >= MOST_CHARACTERS) $("text").value = $("text").value.slice(-MOST_CHARACTERS / 2);
  if (!live.tokens.length) $("text").value += live.model.spec.vocabulary.includes("\n") ? "\n" : live.model.spec.vocabulary[0];
  live.chosen = null;
  takeText();
  live.writing = { text: $("text").value, count: 0, since: performance.now() };
  $("write").textContent = "Stop";
  schedule();
}

function stopWriting() {
  if (!live.writing) return;
  showWriting();
  live.writing = null;
  $("write").textContent = "Write on";
  pointAt();
}

function writeCharacter() {
  const { places } = reading(), token = drawToken(places[places.length - 1].logits, Number($("temperature").value), live.random());
  live.tokens = [...live.tokens, token];
  live.writing.text += live.model.spec.vocabulary[token];
  live.writing.count++;
  for (const one of [live.plain, live.changed]) one?.take(live.tokens);
  if (live.writing.text.length >= MOST_CHARACTERS) stopWriting();
}

function showWriting() {
  if (!live.writing) return;
  const { text, count, since } = live.writing, area = $("text");
  if (area.value !== text) { area.value = text; area.scrollTop = area.scrollHeight; }
  if (count > 10) $("speed").textContent = `${number(count / (performance.now() - since) * 1000, 2)} characters a second`;
}

// Every character in a box of its own, shaded by how surprising it was; the last, empty one is what comes next.
function drawText() {
  const { cells, tokens, model } = live, area = $("read-text"), one = reading();
  while (cells.length > tokens.length + 1) cells.pop().remove();
  for (let place = 0; place <= tokens.length; place++) {
    const text = place < tokens.length ? model.spec.vocabulary[tokens[place]] : "";
    if (!cells[place]) area.append(cells[place] = element("span", { "data-place": place }));
    const cell = cells[place], loss = one.loss(place);
    if (cell.letter !== text) { cell.letter = text; cell.textContent = text === "\n" ? "⏎\n" : text === "\t" ? "⇥\t" : text; }
    if (cell.loss === loss) continue;
    cell.loss = loss;
    cell.style.setProperty("--surprise", loss === undefined ? 0 : Math.min(1, loss / 6).toFixed(2));
  }
  live.next?.classList.remove("next");
  live.next = cells[tokens.length];
  live.next.classList.add("next");
  showLoss();
}

function showLoss() {
  const now = reading().meanLoss, before = live.changed && live.plain.meanLoss;
  if (live.tokens.length < 2) { $("loss").textContent = "Two characters or more have a loss."; return; }
  if (now === undefined) { $("loss").textContent = `reading … ${percent(reading().places.length / live.tokens.length, 0)}`; return; }
  const difference = before === undefined || before === null ? "" : `; without the changes ${before.toFixed(3)}, so they cost ${number(Number((now - before).toFixed(3)))}`;
  $("loss").textContent = `Loss of this text: ${now.toFixed(3)} nats a character${difference}.`;
}

// The character that is looked at, by its place; the text's length is the one that comes next.
const pointed = () => live.hovered ?? live.chosen ?? live.tokens.length;

function startPointing() {
  const area = $("read-text");
  const placeOf = (event) => {
    const place = event.target.dataset?.place ?? document.elementFromPoint(event.clientX, event.clientY)?.dataset.place;
    return place === undefined ? null : Number(place);
  };
  area.addEventListener("pointermove", (event) => { if (event.pointerType !== "touch" && placeOf(event) !== live.hovered) hoverText(placeOf(event)); });
  area.addEventListener("pointerleave", () => hoverText(null));
  area.addEventListener("click", (event) => { if (placeOf(event) !== null) { live.chosen = placeOf(event); hoverText(null); } });
  area.addEventListener("keydown", (event) => {
    const now = pointed(), end = live.tokens.length;
    const to = { ArrowLeft: now - 1, ArrowRight: now + 1, ArrowUp: now - 10, ArrowDown: now + 10, Home: 0, End: end }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    live.chosen = Math.min(Math.max(to, 0), end);
    hoverText(null);
    live.cells[live.chosen].scrollIntoView({ block: "nearest" });
    speakPrediction();
  });
}

function hoverText(place) {
  live.hovered = place;
  pointAt();
  schedule();
}

let resting = 0;
function pointAt() {
  for (const cell of $("read-text").querySelectorAll(".pointed")) cell.classList.remove("pointed");
  live.cells[pointed()]?.classList.add("pointed");
  clearTimeout(resting);
  if (live.model.splines.length) resting = setTimeout(findRoutes, REST_MS);
}
