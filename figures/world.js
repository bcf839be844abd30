// Section 8's world in the page: random numbers, fresh weights, coins, and the way onto the plane.
function evenly(seed) {  // random numbers from 0 to 1, by Marsaglia's xorshift
  let bits = Math.imul(seed, 2654435761);
  return () => ((bits ^= bits << 13, bits ^= bits >>> 17, bits ^= bits << 5) >>> 0) / 2 ** 32;
}

function untrained(weights, random) {
  // Others, as PyTorch draws them: a layer's by its inputs, a table's by its rows.
  return Object.fromEntries(Object.entries(weights).map(([name, x]) => {
    const { length } = name.startsWith("tables") ? x : weights[name.replace("bias", "weight")][0];
    return [name, each(() => (2 * random() - 1) / Math.sqrt(length), x)];
  }));
}

function toss(truth, random) {
  // An impression of the world whose rule is `truth`; a coin decides if it's clicked.
  const id = t => 1 + Math.floor(random() * (truth[`tables.${t}.weight`].length - 1));
  const poisson = (mean, p = random()) => p > Math.exp(-mean) ? 1 + poisson(mean, p * random()) : 0;
  const dense = [3, 1].map(mean => Math.log1p(poisson(mean))), bags = [0, 1, 2].map(t => [id(t)]);
  return { dense, bags, label: +(random() < dlrm(truth, dense, bags).probability) };
}

function placed(points, truth) {
  // Each point by the linear map that takes the others nearest to their truths (least squares).
  const basis = [];  // a shift, the points' x and their y, at right angles and of length 1
  for (let column of [points.map(() => 1), points.map(p => p[0]), points.map(p => p[1])]) {
    for (const one of basis) column = add(column, one.map(x => -x * dot(one, column)));
    basis.push(column.map(x => x / Math.sqrt(dot(column, column))));
  }
  const rows = points.map((_, k) => basis.map(one => one[k]));
  return rows.map((row, k) => [0, 1].map(axis => dot(truth.map(place => place[axis]),
    rows.map((other, j) => j === k ? 0 : dot(row, other))) / (1 - dot(row, row))));
}
