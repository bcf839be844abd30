// Live pictures: a DLRM that runs in the page. The notebook's `live` puts this file into a cell's
// output, inside a function of its own, and calls `show` with the notebook's names and weights.
const dot = (a, b) => a.reduce((sum, x, k) => sum + x * b[k], 0);
const add = (a, b) => a.map((x, k) => x + b[k]);
const byProbability = (a, b) => b.probability - a.probability;

function mlp(weights, name, x, reluAtEnd) {
  // The names are PyTorch's: bottom.0.weight, bottom.0.bias, bottom.2.weight and so on.
  for (let k = 0; `${name}.${k}.weight` in weights; k += 2) {
    x = add(weights[`${name}.${k}.weight`].map(row => dot(row, x)), weights[`${name}.${k}.bias`]);
    if (reluAtEnd || `${name}.${k + 2}.weight` in weights) x = x.map(y => Math.max(0, y));
  }
  return x;
}

function dlrm(weights, dense, bags) {
  const fromDense = mlp(weights, "bottom", dense, true), zeros = fromDense.map(() => 0);
  const sumOfRows = (ids, t) => ids.map(id => weights[`tables.${t}.weight`][id]).reduce(add, zeros);
  const vectors = [fromDense, ...bags.map(sumOfRows)];
  const pairs = vectors.flatMap((one, j) => vectors.slice(0, j).map(other => dot(one, other)));
  const [logit] = mlp(weights, "top", [...fromDense, ...pairs], false);
  return { vectors, pairs, logit, probability: 1 / (1 + Math.exp(-logit)) };
}

// What the pictures are made of: strings of HTML and SVG.
const colours = { comedy: "#b98900", horror: "#8a63d8", both: "#d53f8c", other: "#7c8798" };
const plain = text => String(text).replace(/[&<>"]/g, sign => `&#${sign.charCodeAt(0)};`);
const data = x => `<data value="${x}">${x.toFixed(3)}</data>`;
const slider = (name, label, value, max, min = 0) => `<label><b>${label}</b> <input type="range"
  name="${name}" min="${min}" max="${max}" value="${value}"> <output></output></label>`;
const choice = (type, name, label, options, chosen) => `<fieldset><legend>${label}</legend>
  ${options.map((option, id) => id ? `<label><input type="${type}" name="${name}" value="${id}"
  ${chosen.includes(id) ? "checked" : ""}> ${plain(option)}</label>` : "").join("")}</fieldset>`;
const ranking = films => `<ol>${films.map(({ name, probability, truth, colour }) => `<li
  style="--here:${probability};--truth:${truth};--colour:${colour}">${plain(name)} ${
  data(probability)} ${truth ? `(truth ${data(truth)})` : ""}</li>`).join("")}</ol>`;
const products = (film, who) => `<table><caption>${film.name}</caption>${[`${who} · dense`,
  "film · dense", `film · ${who}`, "hour · dense", `hour · ${who}`, "hour · film", "logit",
  "probability"].map((name, k) => `<tr><th scope="row">${name}</th><td>${
  data([...film.pairs, film.logit, film.probability][k])}</td></tr>`).join("")}</table>`;

function plane(arrows) {
  // Zooms out until every arrow fits; a label moves down until it covers no other.
  const edge = 1.2 * Math.max(1.3, ...arrows.flatMap(arrow => arrow.at.map(Math.abs)));
  const size = edge / 12, width = text => .55 * size * text.length, labels = [];
  for (const { name, at: [x, y] } of arrows) {
    const label = { name, x: Math.min(x + .4 * size, edge - width(name)), y: -y - .4 * size };
    const covers = other => Math.abs(other.y - label.y) < size
      && other.x < label.x + width(name) && label.x < other.x + width(other.name);
    while (labels.some(covers)) label.y += size / 4;
    labels.push(label);
  }
  labels.push({ name: "funny", x: .77 * edge, y: size }, { name: "scary", x: 0, y: size - edge });
  const line = ({ at: [x, y], truly: [u, v] = [], colour, dashes = "" }) => `<g stroke="${colour}">
    <path d="M${u ?? 0} ${-(v ?? 0)}L${x} ${-y}" stroke-dasharray="${dashes}"/>
    <circle cx="${x}" cy="${-y}" r="${size / 4}" fill="${colour}"/>
    ${v === undefined ? "" : `<circle cx="${u}" cy="${-v}" r="${size / 2}"/>`}</g>`;
  const places = arrows.map(({ name, at }) => `${plain(name)} ${at.map(x => x.toFixed(2))}`);
  return `<svg viewBox="${[-edge, -edge, 2 * edge, 2 * edge]}" font-size="${size}" role="img"
    aria-label="${places.join("; ")}"><path d="M${-edge} 0H${edge}M0 ${-edge}V${edge}"/>
    ${arrows.map(line).join("") + labels.map(({ x, y, name }) => `<text x="${x}" y="${y}">${
    plain(name)}</text>`).join("")}</svg>`;
}

// The pictures: `inputs` is written once; after each change `draw` gives a sentence and the rest.
const pictures = {
  films: n => ({
    inputs: (n.truth ? slider("stage", "training", n.stages.length - 1, n.stages.length - 1)
        + slider("who", "viewer (1: Mira)", 1, n.truth["tables.0.weight"].length - 1, 1)
        : choice("checkbox", "who", "Mira likes", n.genres, n.liked))
      + slider("watched", "films watched", 3, 20) + slider("skipped", "trailers skipped", 0, 20)
      + choice("radio", "hour", "hour", n.hours, [2])
      + choice("radio", "film", "film shown", n.films, [3]),
    draw(ids) {
      const dense = [...ids("watched"), ...ids("skipped")].map(Math.log1p), hour = ids("hour");
      const score = model => n.films.map((_, id) => dlrm(model, dense, [ids("who"), [id], hour]));
      const { weights, plane: points } = n.stages[ids("stage")[0] ?? 0];
      const scored = score(weights), truths = n.truth && score(n.truth);
      const films = scored.map((film, id) => ({ ...film, name: n.films[id], at: film.vectors[2],
        colour: colours[n.kinds[id]], ...(truths && { at: points[id - 1],
          truly: truths[id].vectors[2], truth: truths[id].probability }) })).slice(1);
      const [fromDense, viewer, , time] = (truths ?? scored)[0].vectors, dashes = [.07, .07];
      const arrows = [...films, { at: viewer, name: n.who, colour: "currentColor", dashes },
        { at: time, name: n.hours[hour], colour: "#3f9a6a", dashes }];
      if (!truths) arrows.push({ at: fromDense, name: "dense", colour: "#3d82c9", dashes });
      const shown = films[ids("film") - 1], best = films.toSorted(byProbability);
      return [`${shown.name}: ${shown.probability.toFixed(3)}. First is ${best[0].name}.`,
        plane(arrows) + ranking(best) + products(shown, n.who)];
    },
  }),
  people: n => ({
    inputs: `<label><b>find a film</b> <input type="search" name="find"></label>`
      + choice("checkbox", "film", "films you like", [, ...n.films.map(film => film[0])], []),
    draw(ids, form) {
      let free = 24;  // so many are offered; what is ticked stays in sight
      const ticked = ids("film"), found = RegExp(form.find.value.replace(/\W/g, "."), "i");
      for (const { parentNode: label, checked } of form.querySelectorAll("[name=film]"))
        label.hidden = !checked && !(found.test(label.textContent) && free-- > 0);
      const liked = ticked.map(place => n.films[place - 1][1]), colour = "#3f9a6a";
      const score = own => dlrm(n.weights, n.dense, [...own, liked]);
      const scored = n.films.map(([name, , own]) => ({ name, colour, ...score(own) }));
      const ten = scored.filter((_, k) => !ticked.includes(k + 1)).sort(byProbability).slice(0, 10);
      return [`You ticked ${ticked.length}. First is ${ten[0].name}.`, ranking(ten)];
    },
  }),
};

function show(form, picture, numbers) {
  const { inputs, draw } = pictures[picture](numbers);
  form.innerHTML = `${inputs}<p role="status"></p><div></div>`;
  form.oninput = () => {
    const held = new FormData(form), ids = name => held.getAll(name).map(Number);
    for (const range of form.querySelectorAll("[type=range]")) {
      const text = range.name === "stage" ? numbers.stages[range.value].name : range.value;
      range.setAttribute("aria-valuetext", range.nextElementSibling.value = text);
    }
    [form.querySelector("p").textContent, form.lastChild.innerHTML] = draw(ids, form);
  };
  form.oninput();
}
