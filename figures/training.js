// A DLRM in plain JavaScript that predicts and learns as PyTorch's does. Weights have PyTorch's
// names (bottom.0.weight, tables.1.weight); `relu` says if the bottom MLP ends in a ReLU.
const dot = (a, b) => a.reduce((sum, x, k) => sum + x * b[k], 0);
const add = (a, b) => a.map((x, k) => x + b[k]);
const each = (f, x, ...same) => x.map  // number by number, through arrays of the same shape
  ? x.map((y, k) => each(f, y, ...same.map(z => z[k]))) : f(x, ...same);

function layers(weights, name, x, reluAtEnd) {
  // An MLP's layers, each with what goes in and what comes out.
  const kept = [];
  for (let k = 0; `${name}.${k}.weight` in weights; k += 2) {
    const layer = `${name}.${k}`, relu = reluAtEnd || `${name}.${k + 2}.weight` in weights;
    const sums = add(weights[`${layer}.weight`].map(row => dot(row, x)), weights[`${layer}.bias`]);
    kept.push({ layer, relu, x, y: x = relu ? sums.map(y => Math.max(0, y)) : sums });
  }
  return kept;
}

function dlrm(weights, dense, bags, relu = false) {
  const bottom = layers(weights, "bottom", dense, relu), fromDense = bottom.at(-1).y;
  const zeros = fromDense.map(() => 0);
  const sumOfRows = (ids, t) => ids.map(id => weights[`tables.${t}.weight`][id]).reduce(add, zeros);
  const vectors = [fromDense, ...bags.map(sumOfRows)];
  const pairs = vectors.flatMap((one, j) => vectors.slice(0, j).map(other => dot(one, other)));
  const top = layers(weights, "top", [...fromDense, ...pairs], false), [logit] = top.at(-1).y;
  return { bottom, vectors, pairs, top, logit, probability: 1 / (1 + Math.exp(-logit)) };
}

function backward(weights, slopes, kept, slope) {
  // From the loss's slope by an MLP's output to that by its input; `slopes` takes in the weights'.
  for (const { layer, relu, x, y } of kept.toReversed()) {
    const into = slopes[`${layer}.weight`], rows = weights[`${layer}.weight`];
    if (relu) slope = slope.map((g, k) => y[k] > 0 ? g : 0);
    slope.forEach((g, k) => { if (g) x.forEach((z, j) => { into[k][j] += g * z; }); });
    slopes[`${layer}.bias`] = add(slopes[`${layer}.bias`], slope);
    slope = x.map((_, j) => slope.reduce((sum, g, k) => sum + g * rows[k][j], 0));
  }
  return slope;
}

function step(weights, memory, batch, rate, relu = false) {
  // One step of Adagrad on a batch's mean log loss, which it returns.
  const slopes = {};
  for (const name in weights) slopes[name] = each(() => 0, weights[name]);
  const loss = batch.reduce((sum, { dense, bags, label }) => {
    const { bottom, vectors, top, logit, probability } = dlrm(weights, dense, bags, relu);
    const into = backward(weights, slopes, top, [(probability - label) / batch.length]);
    const byVector = vectors.map((v, j) => v.map((_, k) => j ? 0 : into[k]));
    let place = vectors[0].length;  // of a pair's product in the top MLP's input
    vectors.forEach((one, j) => vectors.slice(0, j).forEach((other, i) => {
      const g = into[place++];
      one.forEach((_, k) => { byVector[j][k] += g * other[k]; byVector[i][k] += g * one[k]; });
    }));
    bags.forEach((ids, t) => ids.forEach(id => {
      slopes[`tables.${t}.weight`][id] = add(slopes[`tables.${t}.weight`][id], byVector[t + 1]);
    }));
    backward(weights, slopes, bottom, byVector[0]);
    return sum + Math.log1p(Math.exp(label ? -logit : logit)) / batch.length;
  }, 0);
  for (const [name, slope] of Object.entries(slopes)) {
    memory[name] = each((m, g) => m + g * g, memory[name] ?? each(() => 0, slope), slope);
    weights[name] = each((w, g, m) => w - rate * g / (Math.sqrt(m) + 1e-10),
      weights[name], slope, memory[name]);
  }
  return loss;
}
