"use strict";
// The behaviour of a run report: themes, charts, the browser of groups, and coming back to one's place after a reload.
(() => {
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  // Okabe and Ito's colours, which stay apart for every common kind of colour blindness; lighter ones on dark paper.
  const COLOURS = {
    light: ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b58900", "#56b4e9", "#6a3d9a", "#7f7f7f", "#7a4419", "#8fbf3f"],
    dark: ["#56b4e9", "#e69f00", "#2fc79a", "#e58fc0", "#f0e442", "#7fa8ff", "#ff7b5c", "#b8b8b8", "#c9a27e", "#c5e384"],
  };

  // ---- what is kept over a reload; a browser may forbid it for files ----

  function load(name, other) {
    try { return JSON.parse(sessionStorage.getItem(location.pathname + name)) ?? other; } catch { return other; }
  }
  function save(name, value) {
    try { sessionStorage.setItem(location.pathname + name, JSON.stringify(value)); } catch { /* nothing is kept */ }
  }

  // ---- themes ----

  const themes = ["automatic", "light", "dark"];
  let theme = load("theme", "automatic");

  function applyTheme() {
    root.dataset.theme = theme === "automatic" ? (dark.matches ? "dark" : "light") : theme;
    document.getElementById("theme").textContent = `Theme: ${theme}`;
  }
  function chartConfig() {
    const style = getComputedStyle(root);
    const colour = (name) => style.getPropertyValue(name).trim();
    const [ink, faint, line] = ["--ink", "--faint", "--line"].map(colour);
    return {
      background: null,
      font: "system-ui, sans-serif",
      view: { stroke: null },
      axis: { labelColor: faint, titleColor: faint, gridColor: line, gridOpacity: 0.6, domainColor: line,
        tickColor: line, titleFontWeight: "normal", titleFontSize: 12, labelFontSize: 11 },
      legend: { labelColor: ink, titleColor: faint, labelFontSize: 12, symbolStrokeWidth: 2 },
      line: { strokeWidth: 2 },
      range: { category: COLOURS[root.dataset.theme] },
    };
  }

  // ---- charts ----

  const figures = [...document.querySelectorAll("figure")];
  const specs = new Map(figures.map((f) => [f, JSON.parse(f.querySelector(".spec").textContent)]));

  async function draw() {
    const config = chartConfig();
    const options = { actions: false, renderer: "svg", config, tooltip: { theme: root.dataset.theme } };
    for (const [figure, spec] of specs) {
      await window.vegaEmbed(figure.querySelector(".chart"), spec, options);
    }
    root.dataset.drawn = String(specs.size);
  }

  function cell(row, name, text) {
    const element = document.createElement(name);
    element.textContent = text;
    row.append(element);
  }
  function showNumbers(details, spec) {
    if (details.querySelector("table")) return;
    const rows = Object.values(spec.datasets ?? {})[0] ?? spec.data.values;
    const most = 1000;
    const names = Object.keys(rows[0] ?? {}).filter((n) => n !== "order" && rows.some((r) => (r[n] ?? "") !== ""));
    const table = document.createElement("table");
    const head = table.createTHead().insertRow();
    names.forEach((name) => cell(head, "th", name));
    const body = table.createTBody();
    for (const values of rows.slice(0, most)) {
      const row = body.insertRow();
      names.forEach((name) => cell(row, "td", values[name] ?? ""));
    }
    const box = document.createElement("div");
    box.tabIndex = 0;
    box.append(table, rows.length > most ? `The first ${most} of ${rows.length} rows.` : "");
    details.append(box);
  }
  for (const [figure, spec] of specs) {
    const details = figure.querySelector(".numbers");
    details.addEventListener("toggle", () => details.open && showNumbers(details, spec));
  }

  // ---- the browser of groups. Texts of files enter the page as textContent only, never as HTML. ----

  const groups = JSON.parse(document.getElementById("group-data").textContent);
  const form = document.getElementById("filters");
  const LISTED = 200;
  let listed = [];
  let current = 0;

  function node(name, className, ...children) {
    const element = document.createElement(name);
    if (className) element.className = className;
    element.append(...children);
    return element;
  }
  function fill(select, values, first) {
    if (first !== null) select.append(new Option(first, ""));
    values.forEach((value) => select.append(new Option(String(value), String(value))));
  }
  const unique = (values) => [...new Set(values)];
  const gateOf = (group) => (group.gate ? "open" : group.second ? "closed" : "none");

  function searchable(group) {
    group.found ??= [group.tokens.join(""), group.answer, ...group.completions.map((c) => c.text)].join("\n").toLowerCase();
    return group.found;
  }
  const preview = (group) => group.tokens.slice(0, 60).join("").replace(/<\|[^|]*\|>(user|system)?/g, " ").trim();
  function matches(group, wanted) {
    return group.run === wanted.run
      && (!wanted.step || String(group.step) === wanted.step)
      && (!wanted.gate || gateOf(group) === wanted.gate)
      && (!wanted.status || group.completions.some((c) => c.status === wanted.status))
      && (!wanted.source || group.source === wanted.source)
      && (!wanted.text || searchable(group).includes(wanted.text.toLowerCase()));
  }

  function promptOf(group) {
    const box = node("div", "prompt");
    const deleted = new Set(group.deleted);
    const noise = new Set(group.noise);
    const most = Math.max(...(group.scores ?? []).map((s) => s ?? 0), 1e-12);
    group.tokens.forEach((text, i) => {
      let token = node("span", noise.has(i) ? "noise" : "", text);
      const score = group.scores?.[i];
      const words = [];
      if (score !== null && score !== undefined) {
        words.push(`score ${score}`);
        if (score > 0) token.style.backgroundColor = `rgba(var(--heat), ${(0.65 * Math.sqrt(score / most)).toFixed(2)})`;
      }
      if (noise.has(i)) words.push("planted noise");
      if (deleted.has(i)) {
        words.push("deleted");
        token = node("del", "", token);
      }
      if (words.length) token.title = words.join(", ");
      box.append(token);
    });
    return box;
  }
  function completionOf(completion) {
    const signed = (x) => (x > 0 ? `+${x}` : String(x));
    const sign = completion.status === "correct" ? "\u2713" : "\u2717";
    const grade = node("span", `grade ${completion.status === "correct" ? "correct" : ""}`, `${sign} ${completion.status}`);
    const facts = [`reward ${completion.reward}`];
    if (completion.weight === null) facts.push("not trained on");
    else facts.push(`weight ${completion.weight}`, `advantage ${signed(completion.advantage)}`);
    facts.push(`${completion.tokens} tokens`);
    if (!completion.finished) facts.push("cut off at the longest length");
    return node("div", "completion", node("div", "facts", grade, ` \u00b7 ${facts.join(" \u00b7 ")}`), node("pre", "", completion.text));
  }
  function articleOf(group) {
    const gates = { open: "gate open: rescued", closed: "gate closed: not rescued", none: "no second wave" };
    const article = node("article", "",
      node("h3", "", `${group.run}, step ${group.step}, prompt ${group.prompt}`),
      node("p", "facts", `source ${group.source} \u00b7 answer ${group.answer} \u00b7 ${gates[gateOf(group)]}`),
      promptOf(group));
    for (const [second, name] of [[false, "First wave"], [true, "Second wave, from the purified prompt"]]) {
      const wave = group.completions.filter((c) => c.second === second);
      if (!wave.length) continue;
      const correct = wave.filter((c) => c.status === "correct").length;
      article.append(node("h4", "", `${name}: ${correct} of ${wave.length} shown are correct`), ...wave.map(completionOf));
    }
    return article;
  }
  function beside(group, run) {
    const same = groups.filter((g) => g.run === run && g.prompt === group.prompt && g.source === group.source);
    const far = (g) => Math.abs(g.step - group.step);
    return same.sort((a, b) => far(a) - far(b))[0];
  }
  function show(place) {
    const shown = document.getElementById("shown");
    shown.replaceChildren();
    current = Math.min(place, listed.length - 1);
    [...document.querySelectorAll("#list button[data-place]")].forEach((button) => {
      button.setAttribute("aria-current", String(Number(button.dataset.place) === current));
    });
    const group = listed[current];
    if (!group) return;
    shown.append(articleOf(group));
    const other = form.elements.other.value;
    if (other) {
      const found = beside(group, other);
      shown.append(found ? articleOf(found)
        : node("article", "", node("p", "facts", `This page holds no group of ${other} with prompt ${group.prompt}.`)));
    }
    save("place", current);
  }
  function list() {
    const wanted = Object.fromEntries(new FormData(form));
    save("filters", wanted);
    listed = groups.filter((group) => matches(group, wanted));
    const items = listed.slice(0, LISTED).map((group, place) => {
      const sign = { open: "rescued", closed: "not rescued", none: "" }[gateOf(group)];
      const button = node("button", "", `step ${group.step}, prompt ${group.prompt} ${sign && `(${sign})`}`,
        node("small", "", preview(group)));
      button.type = "button";
      button.dataset.place = place;
      button.addEventListener("click", () => show(place));
      return node("li", "", button);
    });
    document.getElementById("list").replaceChildren(...items);
    const more = listed.length > LISTED ? ` The first ${LISTED} are listed; a filter brings the others.` : "";
    document.getElementById("count").textContent = `${listed.length} groups match.${more}`;
  }
  function arrow(event) {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    const buttons = [...document.querySelectorAll("#list button")];
    const next = step && buttons[buttons.indexOf(document.activeElement) + step];
    if (!next) return;
    event.preventDefault();
    next.focus();
    next.click();
  }
  function startBrowser() {
    const { run, other, step, status, source } = form.elements;
    fill(run, unique(groups.map((g) => g.run)), null);
    fill(other, unique(groups.map((g) => g.run)), "none");
    fill(step, unique(groups.map((g) => g.step)).sort((a, b) => a - b), "all");
    fill(status, unique(groups.flatMap((g) => g.completions.map((c) => c.status))).sort(), "any");
    fill(source, unique(groups.map((g) => g.source)).sort(), "all");
    for (const [name, value] of Object.entries(load("filters", {}))) {
      const field = form.elements[name];
      if (field && (field.type === "search" || [...field.options].some((o) => o.value === value))) field.value = value;
    }
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("input", () => { list(); show(0); });
    document.getElementById("list").addEventListener("keydown", arrow);
    list();
    show(load("place", 0));
  }

  // ---- start ----

  document.getElementById("theme").addEventListener("click", () => {
    theme = themes[(themes.indexOf(theme) + 1) % themes.length];
    save("theme", theme);
    applyTheme();
    draw();
  });
  dark.addEventListener("change", () => { applyTheme(); draw(); });
  applyTheme();
  if (form) startBrowser();
  draw().then(() => {
    scrollTo(0, load("scroll", scrollY));
    addEventListener("scroll", () => save("scroll", scrollY));
  });
  const seconds = Number(document.body.dataset.reloadSeconds);
  const busy = () => document.hidden || document.activeElement?.type === "search";
  if (seconds) setInterval(() => busy() || location.reload(), 1000 * seconds);
})();
