"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);

// Every text enters the page through textContent, so that none of it can become markup.
function element(tag, attributes, ...children) {
  const svg = tag === "svg" || tag === "rect" || tag === "line";
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

function number(value) {
  if (value === null) return "not finite";
  const text = Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(4)));
  return text.replace("-", "\u2212");
}

// Curves: pointer and arrow keys read values off them, and pointing at a name brings its line out.
const { left, right, width } = data.plot;
for (const figure of document.querySelectorAll("[data-chart]")) {
  const { from, to, curves } = data.charts[figure.dataset.chart];
  const svg = figure.querySelector("svg"), cursor = figure.querySelector(".cursor"), at = figure.querySelector(".at");
  const values = [...figure.querySelectorAll(".value")], resting = values.map((node) => node.textContent);
  const nearest = (steps, wanted) => {
    let k = 0;
    while (k + 1 < steps.length && Math.abs(steps[k + 1] - wanted) <= Math.abs(steps[k] - wanted)) k++;
    return k;
  };
  const longest = curves.reduce((most, curve) => (curve.steps.length > most.steps.length ? curve : most)).steps;
  let index = longest.length - 1;
  const read = (wanted) => {
    index = nearest(longest, wanted);
    const step = longest[index];
    const x = left + (right - left) * (to > from ? (step - from) / (to - from) : 0.5);
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
    cursor.style.visibility = "visible";
    at.textContent = `at ${step.toLocaleString("en")}`;
    curves.forEach((curve, k) => {
      const { steps } = curve, outside = step < steps[0] || step > steps[steps.length - 1];
      values[k].textContent = outside && steps.length > 1 ? "\u2013" : number(curve.values[nearest(steps, step)]);
    });
  };
  const rest = () => {
    cursor.style.visibility = "hidden";
    at.textContent = "";
    values.forEach((node, k) => { node.textContent = resting[k]; });
  };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const share = ((event.clientX - box.left) / box.width * width - left) / (right - left);
    read(from + Math.min(1, Math.max(0, share)) * (to - from));
  });
  svg.addEventListener("pointerleave", rest);
  svg.addEventListener("blur", rest);
  svg.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: index - 1, ArrowRight: index + 1, Home: 0, End: longest.length - 1 };
    if (!(event.key in moves)) return;
    read(longest[Math.min(longest.length - 1, Math.max(0, moves[event.key]))]);
    event.preventDefault();
    event.stopPropagation();
  });
  figure.querySelectorAll(".key").forEach((key, k, all) => {
    if (all.length < 2) return;
    key.addEventListener("pointerenter", () => {
      svg.classList.add("emphasis");
      svg.querySelectorAll("[data-line]").forEach((node) => node.classList.toggle("on", node.dataset.line === String(k)));
    });
    key.addEventListener("pointerleave", () => svg.classList.remove("emphasis"));
  });
}

// Trajectories.
function tokens(logProbs) {
  const strip = element("span", { class: "tokens" });
  const hovered = element("p", { class: "hovered" });
  const mean = logProbs.includes(null) ? null : logProbs.reduce((sum, value) => sum + value, 0) / logProbs.length;
  const resting = logProbs.length ? `${logProbs.length} tokens, mean ${number(mean)} nats` : "";
  hovered.textContent = resting;
  logProbs.forEach((value, index) => {
    const cell = element("i", {
      class: `token shade-${value === null ? 7 : Math.min(7, Math.max(0, Math.trunc(-value)))}`, title: `${number(value)} nats`,
    });
    cell.addEventListener("pointerenter", () => {
      hovered.textContent = `token ${index + 1} of ${logProbs.length}: ${number(value)} nats`;
    });
    strip.append(cell);
  });
  strip.addEventListener("pointerleave", () => { hovered.textContent = resting; });
  return [strip, hovered];
}

function keys(step, pairs, read) {
  const percent = (share, index) =>
    !read.has(index) && share < 0.0005 ? "<0.1 %" : `${(100 * share).toFixed(1)} %`;
  return element("ol", { class: "keys" }, ...step.probabilities.map((probability, index) => element("li",
    { class: index === step.pair ? "chosen" : read.has(index) ? "gone" : null },
    element("span", { class: "index" }, String(index)),
    element("span", { class: "label", dir: "auto", title: pairs[index] ? pairs[index][0] : null }, pairs[index] ? pairs[index][0] : ""),
    element("svg", { viewBox: "0 0 100 8", preserveAspectRatio: "none", "aria-hidden": "true" },
      element("rect", { width: 100 * probability, height: 8 })),
    element("span", { class: "percent" }, percent(probability, index)))));
}

function panel(step, index, pairs, read) {
  const written = step.query === null ? [] : [
    element("h4", {}, "Query written"),
    element("p", { class: "text", dir: "auto" }, step.query.text),
    ...tokens(step.query.log_probs),
  ];
  const key = pairs[step.pair] ? element("p", { class: "text key-text", dir: "auto" }, pairs[step.pair][0]) : null;
  const against = step.reference === null ? "" : ` (${number(step.mean)} against ${number(step.reference)})`;
  const earned = step.earned === null ? "" : `earned ${number(step.earned)} nats per token${against}`;
  return element("article", { class: "step" },
    element("h3", {}, `Step ${index + 1} `, element("small", {}, earned)),
    element("div", { class: "columns" },
      element("div", {}, ...written, element("h4", {}, `Read: pair ${step.pair}`), key,
        element("p", { class: "text", dir: "auto" }, step.value.text), ...tokens(step.value.log_probs)),
      step.probabilities.length
        ? element("div", {}, element("h4", {}, "Probability over keys"), keys(step, pairs, read)) : null));
}

// Bars of what each step earned, about a common zero.
function path(steps) {
  const earned = steps.map((step) => step.earned ?? 0);
  const low = Math.min(0, ...earned), high = Math.max(0, ...earned), y = (v) => 40 * (high - v) / (high - low || 1);
  return element("div", { class: "path" }, ...steps.map((step, index) => {
    const button = element("button", { type: "button", title: `Step ${index + 1}: pair ${step.pair}` },
      String(index + 1),
      element("svg", { viewBox: "0 0 22 40", "aria-hidden": "true" },
        element("rect", {
          x: 4, width: 14, y: Math.min(y(0), y(earned[index])), height: Math.max(0.5, Math.abs(y(0) - y(earned[index]))),
          class: earned[index] < 0 ? "loss" : null,
        }),
        element("line", { x1: 0, x2: 22, y1: y(0), y2: y(0) })),
      step.earned === null ? "" : number(Number(step.earned.toFixed(2))));
    button.addEventListener("click", () => show(index));
    return button;
  }));
}

let position = 0;

function show(index) {
  const panels = [...byId("viewer").querySelectorAll(".step")];
  position = Math.min(panels.length - 1, Math.max(0, index));
  panels.forEach((node, k) => { node.hidden = k !== position; });
  [...byId("viewer").querySelectorAll(".path button")].forEach((node, k) => {
    if (k === position) node.setAttribute("aria-current", "step"); else node.removeAttribute("aria-current");
  });
  byId("where").textContent = `step ${position + 1} of ${panels.length}`;
  byId("previous").disabled = position === 0;
  byId("next").disabled = position === panels.length - 1;
}

function openEpisode(episode) {
  const { title, pairs } = data.articles[episode.article];
  const facts = [["reward", "reward"], ["normalised_reward", "normalised"], ["temperature", "temperature"]]
    .filter(([name]) => typeof episode[name] === "number").map(([name, label]) => ` · ${label} ${number(episode[name])}`);
  if (typeof episode.passed === "boolean") facts.push(episode.passed ? " · passed the filter" : " · did not pass the filter");
  if (episode.probes !== null) facts.push(` · probes ${number(episode.probes)} nats per token`);
  byId("viewer").replaceChildren(
    element("p", { class: "episode" }, `${episode.arm} · `, element("bdi", {}, title), ` · episode ${episode.episode}`, ...facts),
    path(episode.steps), ...episode.steps.map((step, index) => panel(step, index, pairs, new Set(episode.steps.slice(0, index).map((s) => s.pair)))));
  show(0);
}

function options(select, entries, chosen) {
  select.replaceChildren(...entries.map(([value, label]) => element("option", { value, selected: value === chosen }, label)));
}

if (data.episodes.length) {
  const arm = byId("arm"), article = byId("article"), episode = byId("episode");
  const unique = (values) => [...new Set(values)];
  const offer = (wanted) => {
    const ofArm = data.episodes.filter((e) => e.arm === arm.value);
    const names = unique(ofArm.map((e) => e.article));
    options(article, names.map((name) => [name, data.articles[name].title]), names.includes(wanted.article) ? wanted.article : names[0]);
    offerEpisodes(wanted);
  };
  const offerEpisodes = (wanted) => {
    const entries = data.episodes.map((e, k) => [e, k]).filter(([e]) => e.arm === arm.value && e.article === article.value);
    const last = entries[entries.length - 1][1], at = data.episodes.indexOf(wanted);
    options(episode, entries.map(([e, k]) => [String(k), `${e.episode}, step ${e.step}`]),
      String(entries.some(([, k]) => k === at) ? at : last));
    openEpisode(data.episodes[Number(episode.value)]);
  };
  const first = data.episodes[data.first];
  options(arm, unique(data.episodes.map((e) => e.arm)).map((name) => [name, name.replaceAll("_", " ")]), first.arm);
  arm.addEventListener("change", () => offer({ article: article.value }));
  article.addEventListener("change", () => offerEpisodes({}));
  episode.addEventListener("change", () => openEpisode(data.episodes[Number(episode.value)]));
  byId("previous").addEventListener("click", () => show(position - 1));
  byId("next").addEventListener("click", () => show(position + 1));
  document.addEventListener("keydown", (event) => {
    if (event.target.closest("select, input, textarea") || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "ArrowRight") show(position + 1);
    else if (event.key === "ArrowLeft") show(position - 1);
    else return;
    event.preventDefault();
  });
  document.querySelector(".choice").hidden = false;
  offer(first);
}
