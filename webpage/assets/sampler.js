// Draws the next character.

// `random`: a number from 0 up to 1. Temperature 0 takes the likeliest.
function drawToken(logits, temperature, random) {
  let best = 0;
  for (let k = 1; k < logits.length; k++) if (logits[k] > logits[best]) best = k;
  if (temperature === 0) return best;
  const shares = softmaxInPlace(Float64Array.from(logits, (value) => (value - logits[best]) / temperature));
  let left = random;
  for (let k = 0; k < shares.length; k++) if ((left -= shares[k]) < 0) return k;
  return best;
}

// The tokens of a text, and the characters that the model has no token for.
function encodeText(vocabulary, text) {
  encodeText.places ??= new Map(vocabulary.map((character, token) => [character, token]));
  const tokens = [], unknown = new Set();
  for (const character of text) {
    const token = encodeText.places.get(character);
    if (token === undefined) unknown.add(character);
    else tokens.push(token);
  }
  return { tokens, unknown: [...unknown] };
}
