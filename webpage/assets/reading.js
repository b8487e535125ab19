// A text as the model reads it: for each token what it predicts next, computed one token at a time, so that whoever asks
// can stop between two. No DOM.

// As sample.py does: when a context is full, the next one begins with the newer half of it.
function contextOf({ block_size }, place) {
  const half = Math.max(1, Math.floor(block_size / 2)), stride = block_size - half + 1;
  const number = Math.max(0, Math.ceil((place - block_size + 1) / stride));
  return { number, start: number * stride };
}

class Reading {
  constructor(model, splines) {
    Object.assign(this, { model, splines, tokens: [], places: [], contexts: [] });
  }

  // Read these tokens instead; what has been computed of the beginning that both have stays.
  take(tokens) {
    let same = 0;
    while (same < tokens.length && tokens[same] === this.tokens[same]) same++;
    this.tokens = tokens.slice();
    this.places.length = Math.min(this.places.length, same);
    for (const context of this.contexts) context.filled = Math.min(context.filled, Math.max(0, same - context.start));
    this.contexts = this.contexts.filter((context) => context.filled > 0);
  }

  get isDone() { return this.places.length === this.tokens.length; }

  // One forward pass: of the next place, or of one before it that its context has not seen yet.
  advance() {
    const next = this.places.length, context = this.context(next), place = context.start + context.filled;
    const { logits, inputs } = this.pass(place, context);
    context.filled++;
    if (place === next) this.places.push({ logits: Float32Array.from(logits), inputs });
  }

  context(place) {
    const { number, start } = contextOf(this.model.spec, place);
    return this.contexts[number] ??= { start, filled: 0, cache: newCache(this.model) };
  }

  pass(place, context, options) {
    const t = place - context.start, before = t > 0 ? this.tokens[place - 1] : -1;
    return forward(this.model, this.splines, context.cache, t, this.tokens[place], before, options);
  }

  // Once more, at a place that has been read, nothing kept: with a spline removed, or for the trace.
  again(place, removed = null) { return this.pass(place, this.context(place), { keep: false, removed }); }

  // -log of the probability that was given to the token at a place; undefined for the first and where not yet known.
  loss(place) {
    const before = this.places[place - 1];
    if (!before || place >= this.tokens.length) return undefined;
    before.losses ??= logProbabilities(before.logits);
    return -before.losses[this.tokens[place]];
  }

  // The mean over the text, in nats; undefined for fewer than two characters, or while it is being read.
  get meanLoss() {
    if (!this.isDone || this.tokens.length < 2) return undefined;
    let total = 0;
    for (let place = 1; place < this.tokens.length; place++) total += this.loss(place);
    return total / (this.tokens.length - 1);
  }
}
