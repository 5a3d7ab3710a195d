"use strict";
// Draws the plots as they come into view and then the others; themes, choices, keys.
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const themes = read("themes");
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const coarse = matchMedia("(pointer: coarse)").matches;
  const plots = [...document.querySelectorAll(".plot")];
  const drawn = new Map();
  const theme = () => root.dataset.theme || (system.matches ? "dark" : "light");
  const config = {
    displaylogo: false, responsive: true,
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
  };

  function draw(plot) {
    if (drawn.has(plot)) return;
    const { data, layout, variants } = read("data-" + plot.dataset.name);
    drawn.set(plot, { data, variants, curve: 0, point: -1 });
    const own = { ...layout, template: themes[theme()], autosize: true };
    if (coarse) own.dragmode = false; // a finger scrolls the page
    Plotly.newPlot(plot, data, own, config);
    if (drawn.size === plots.length) {
      root.dataset.drawn = "all";
      performance.mark("drawn");
    }
  }

  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) { seen.unobserve(entry.target); draw(entry.target); }
    if (!root.dataset.drawn) { root.dataset.drawn = "view"; performance.mark("view"); } // what is in view, first
  }, { rootMargin: "200px" });
  const idle = window.requestIdleCallback || ((call) => setTimeout(call, 20));
  const rest = () => { const next = plots.find((p) => !drawn.has(p)); if (next) { draw(next); idle(rest); } };
  plots.forEach((plot) => seen.observe(plot));
  addEventListener("load", () => idle(rest));
  addEventListener("beforeprint", () => plots.forEach(draw));

  const button = document.getElementById("theme");
  function paint() {
    button.setAttribute("aria-pressed", theme() === "dark");
    for (const plot of drawn.keys()) Plotly.relayout(plot, { template: themes[theme()] });
  }
  button.addEventListener("click", () => {
    root.dataset.theme = theme() === "dark" ? "light" : "dark";
    paint();
  });
  system.addEventListener("change", paint);
  button.setAttribute("aria-pressed", theme() === "dark");

  for (const select of document.querySelectorAll("select[data-plot]")) {
    select.addEventListener("change", () => {
      const plot = document.getElementById(select.dataset.plot);
      draw(plot);
      const state = drawn.get(plot);
      state.data = state.variants[select.selectedIndex];
      state.curve = 0; state.point = -1;
      const layout = { ...plot.layout };
      for (const axis of ["xaxis", "yaxis"]) { // another matrix has another range
        const given = read("data-" + plot.dataset.name).layout[axis] || {};
        layout[axis] = { ...given };
      }
      Plotly.react(plot, state.data, layout, config);
    });
  }

  // Left and right walk through the points of a plot, up and down through its curves.
  const size = (trace) => trace.type === "heatmap" ? trace.z.length * trace.z[0].length : trace.x.length;
  const at = (trace, i) => {
    if (trace.type !== "heatmap") return i;
    const wide = trace.z[0].length;
    return [Math.floor(i / wide), i % wide];
  };
  const short = (v) => typeof v === "number" ? String(+v.toPrecision(4)) : v == null ? "undefined" : String(v);
  function spoken(trace, i) {
    const where = at(trace, i);
    if (trace.type === "heatmap") {
      const [row, column] = where;
      const name = trace.customdata ? trace.customdata[row][column] : `${trace.x[column]}, ${trace.y[row]}`;
      return `${name}: ${short(trace.z[row][column])}`;
    }
    const name = Array.isArray(trace.text) && trace.text[i] ? trace.text[i] + ", " : "";
    return `${trace.name || ""} ${name}${short(trace.x[i])}: ${short(trace.y[i])}`;
  }
  const decode = (text) => text.replaceAll("&lt;", "<").replaceAll("&gt;", ">").replaceAll("&amp;", "&");
  function walk(event) {
    const moves = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] };
    const move = moves[event.key], state = drawn.get(event.currentTarget);
    if (!move || !state || event.target !== event.currentTarget) return;
    event.preventDefault();
    const count = state.data.length;
    if (move[0]) { state.curve = (state.curve + move[0] + count) % count; state.point = -1; }
    const trace = state.data[state.curve], total = size(trace);
    if (!total) return;
    do { state.point = (state.point + (move[1] || 1) + total) % total; }
    while (trace.x[state.point] === null);
    const plot = event.currentTarget;
    try { Plotly.Fx.hover(plot, [{ curveNumber: state.curve, pointNumber: at(trace, state.point) }]); }
    catch { /* a box: the words below are enough */ }
    plot.parentElement.querySelector(".spoken").textContent = decode(spoken(trace, state.point));
  }
  plots.forEach((plot) => plot.addEventListener("keydown", walk));

  const links = new Map([...document.querySelectorAll("nav a")].map((a) => [a.hash.slice(1), a]));
  const current = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      if (!isIntersecting) continue;
      links.forEach((a) => a.removeAttribute("aria-current"));
      links.get(target.id)?.setAttribute("aria-current", "true");
    }
  }, { rootMargin: "-20% 0px -70% 0px" });
  document.querySelectorAll("main > section").forEach((section) => current.observe(section));
})();
