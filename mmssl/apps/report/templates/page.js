"use strict";
// Text from the data reaches the page as textContent only: a class name can hold any characters.
(() => {
  const data = JSON.parse(document.getElementById("page-data").textContent);
  const NS = "http://www.w3.org/2000/svg";
  const COLORS = 6;
  const runs = [...new Set(data.charts.flatMap((chart) => chart.series.map((series) => series.run)))];

  const svg = (tag, attributes, parent) => {
    const node = document.createElementNS(NS, tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    if (parent) parent.append(node);
    return node;
  };
  const number = (value) =>
    value === 0 ? "0" : Math.abs(value) >= 1e4 || Math.abs(value) < 1e-3 ? value.toExponential(1) : String(+value.toPrecision(3));

  // Line charts

  function ticks(low, high, log) {
    if (log) {
      const found = [];
      for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++)
        for (const factor of [1, 2, 5]) {
          const tick = factor * 10 ** power;
          if (tick >= low * 0.999 && tick <= high * 1.001) found.push(tick);
        }
      return found.filter((_, place) => place % Math.ceil(found.length / 5) === 0);
    }
    const rough = (high - low) / 5 || 1;
    const unit = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((factor) => factor * unit).find((size) => size >= rough);
    const found = [];
    for (let place = Math.ceil(low / step); place * step <= high + step * 1e-6; place++) found.push(place * step);
    return found;
  }

  function smoothed(values) {
    const reach = Math.max(1, Math.round(values.length / 40));
    return values.map((_, at) => {
      const part = values.slice(Math.max(0, at - reach), at + reach + 1);
      return part.reduce((sum, value) => sum + value, 0) / part.length;
    });
  }

  class Chart {
    constructor(plot, lines, options) {
      Object.assign(this, { plot, lines, options, at: null });
      this.tip = Object.assign(document.createElement("div"), { className: "tip", hidden: true });
      this.tip.setAttribute("aria-live", "polite");
      plot.append(this.tip);
      plot.addEventListener("pointermove", (event) => this.point(event.clientX));
      plot.addEventListener("pointerdown", (event) => this.point(event.clientX));
      plot.addEventListener("pointerleave", () => this.leave());
      plot.addEventListener("blur", () => this.leave());
      plot.addEventListener("keydown", (event) => this.key(event));
      new ResizeObserver(() => this.draw()).observe(plot);
    }

    shown() {
      const hidden = this.options.hidden ? this.options.hidden() : new Set();
      return this.lines.filter((line) => !hidden.has(line.name));
    }

    draw() {
      const width = this.plot.clientWidth, height = this.plot.clientHeight;
      if (!width) return;
      this.plot.querySelector("svg")?.remove();
      const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });
      this.plot.prepend(root);
      const lines = this.shown();
      const values = lines.flatMap((line) => [...line.y, ...(line.low ?? []), ...(line.high ?? [])]);
      const log = this.options.log?.() && values.length > 0 && Math.min(...values) > 0;
      const xs = lines.flatMap((line) => line.x);
      if (!values.length) return;
      let low = Math.min(...values), high = Math.max(...values);
      if (low === high) [low, high] = log ? [low / 2, high * 2] : [low - 1, high + 1];
      const left = Math.min(...xs), right = Math.max(...xs, left + 1e-9);
      const box = { left: 46, right: width - 10, top: 8, bottom: height - 22 };
      const scale = (value) => (log ? Math.log(value) : value);
      this.x = (value) => box.left + ((value - left) / (right - left)) * (box.right - box.left);
      this.y = (value) => box.bottom - ((scale(value) - scale(low)) / (scale(high) - scale(low))) * (box.bottom - box.top);
      for (const tick of ticks(low, high, log)) {
        svg("line", { class: "axis", x1: box.left, x2: box.right, y1: this.y(tick), y2: this.y(tick) }, root);
        svg("text", { x: box.left - 6, y: this.y(tick) + 4, "text-anchor": "end" }, root).textContent = number(tick);
      }
      for (const tick of ticks(left, right, false)) {
        const anchor = this.x(tick) > box.right - 15 ? "end" : "middle";
        svg("text", { x: this.x(tick), y: height - 6, "text-anchor": anchor }, root).textContent = this.options.percent ? `${Math.round(100 * tick)} %` : number(tick);
      }
      const path = (line, ys) => "M" + line.x.map((x, at) => `${this.x(x).toFixed(1)},${this.y(ys[at]).toFixed(1)}`).join("L");
      for (const line of lines) {
        if (line.low) {
          const back = [...line.x.keys()].reverse().map((at) => `${this.x(line.x[at]).toFixed(1)},${this.y(line.low[at]).toFixed(1)}`);
          svg("path", { class: "band", d: `${path(line, line.high)}L${back.join("L")}Z`, style: `fill: ${line.color}` }, root);
        }
        const smooth = this.options.smooth?.() && line.y.length > 20;
        if (smooth) svg("path", { class: "raw", d: path(line, line.y), style: `stroke: ${line.color}` }, root);
        const style = `stroke: ${line.color}; ${line.dash ? `stroke-dasharray: ${line.dash}` : ""}`;
        svg("path", { d: path(line, smooth ? smoothed(line.y) : line.y), style }, root);
        if (line.y.length === 1) svg("circle", { cx: this.x(line.x[0]), cy: this.y(line.y[0]), r: 3, style: `fill: ${line.color}` }, root);
      }
      this.cursor = svg("line", { class: "cursor", y1: box.top, y2: box.bottom, visibility: "hidden" }, root);
      this.box = box;
      this.range = [left, right];
    }

    point(clientX) {
      if (!this.box) return;
      const share = (clientX - this.plot.getBoundingClientRect().left - this.box.left) / (this.box.right - this.box.left);
      this.show(this.range[0] + Math.min(1, Math.max(0, share)) * (this.range[1] - this.range[0]));
    }

    show(wanted) {
      const lines = this.shown();
      if (!lines.length) return;
      const nearest = (line) => line.x.reduce((best, x, at) => (Math.abs(x - wanted) < Math.abs(line.x[best] - wanted) ? at : best), 0);
      this.at = lines[0].x[nearest(lines[0])];
      const place = this.x(this.at);
      this.cursor.setAttribute("x1", place);
      this.cursor.setAttribute("x2", place);
      this.cursor.setAttribute("visibility", "visible");
      const say = (text) => Object.assign(document.createElement("span"), { textContent: text });
      const head = this.options.percent ? `${Math.round(100 * this.at)} % covered` : `step ${number(this.at)}`;
      this.tip.replaceChildren(say(head), ...lines.map((line) => say(`${line.name}: ${+line.y[nearest(line)].toPrecision(4)}`)));
      this.tip.hidden = false;
      const over = place > this.plot.clientWidth / 2;
      this.tip.style.left = over ? "" : `${place + 8}px`;
      this.tip.style.right = over ? `${this.plot.clientWidth - place + 8}px` : "";
      this.tip.style.top = "8px";
    }

    leave() {
      this.tip.hidden = true;
      this.cursor?.setAttribute("visibility", "hidden");
    }

    key(event) {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step || !this.shown().length) return;
      event.preventDefault();
      const x = this.shown()[0].x;
      const now = this.at === null ? (step > 0 ? -1 : x.length) : x.indexOf(this.at);
      this.show(x[Math.min(x.length - 1, Math.max(0, now + step * Math.max(1, Math.round(x.length / 50))))]);
    }
  }

  const log = document.getElementById("log"), smooth = document.getElementById("smooth");
  const toggles = [...document.querySelectorAll(".run-toggle")];
  const hidden = () => new Set(toggles.filter((toggle) => !toggle.checked).map((toggle) => toggle.dataset.run));
  const byKey = new Map(data.charts.map((chart) => [chart.key, chart]));
  const charts = [...document.querySelectorAll("[data-chart]")].map((figure) => {
    const lines = byKey.get(figure.dataset.chart).series.map((series) => ({
      name: series.run, x: series.x, y: series.y, color: `var(--run${runs.indexOf(series.run) % COLORS})`,
    }));
    return new Chart(figure.querySelector(".plot"), lines, { log: () => log.checked, smooth: () => smooth.checked, hidden });
  });
  for (const control of [log, smooth, ...toggles]) control?.addEventListener("change", () => charts.forEach((chart) => chart.draw()));

  for (const figure of document.querySelectorAll("[data-sanity]")) {
    const found = data.sanity[+figure.dataset.sanity];
    const lines = Object.entries(found.curves).map(([name, curve], place) => ({
      name, x: found.fractions, y: curve.mean, low: curve.low, high: curve.high,
      color: name in found.shuffled ? `var(--run${place % COLORS})` : "var(--soft)",
      dash: name in found.shuffled ? "" : name === "random order" ? "2 4" : "7 4",
    }));
    new Chart(figure.querySelector(".plot"), lines, { percent: true });
    const legend = Object.assign(document.createElement("ul"), { className: "legend note" });
    for (const line of lines) {
      const item = document.createElement("li");
      const key = Object.assign(document.createElement("span"), { className: "line" });
      key.style.borderTopColor = line.color;
      key.style.borderTopStyle = line.dash === "" ? "solid" : line.dash === "2 4" ? "dotted" : "dashed";
      item.append(key, line.name + (line.name === found.default ? " (default)" : ""));
      legend.append(item);
    }
    figure.append(legend);
  }

  // Tabs (the pattern of WAI-ARIA: arrow keys move, the chosen one is in the order of the tab key)

  for (const list of document.querySelectorAll('[role="tablist"]')) {
    const tabs = [...list.querySelectorAll('[role="tab"]')];
    const choose = (tab, focus) => {
      for (const other of tabs) {
        other.setAttribute("aria-selected", String(other === tab));
        other.tabIndex = other === tab ? 0 : -1;
        document.getElementById(other.getAttribute("aria-controls")).hidden = other !== tab;
      }
      if (focus) tab.focus();
    };
    tabs.forEach((tab, place) => {
      tab.addEventListener("click", () => choose(tab, false));
      tab.addEventListener("keydown", (event) => {
        const next = { ArrowLeft: place - 1, ArrowRight: place + 1, Home: 0, End: tabs.length - 1 }[event.key];
        if (next === undefined) return;
        event.preventDefault();
        choose(tabs[(next + tabs.length) % tabs.length], true);
      });
    });
    choose(tabs[0], false);
  }

  // Maps of the images

  for (const space of document.querySelectorAll(".space")) {
    const points = data.spaces[space.dataset.space];
    const side = +space.dataset.side, columns = +space.dataset.columns, rows = Math.ceil(points.length / columns);
    const field = space.querySelector(".field"), thumb = space.querySelector(".thumb"), says = space.querySelector(".says");
    const images = space.parentNode.querySelector(".as-images");
    let places = [], marks = [], chosen = -1;
    const show = (node, index) => {
      const size = node.clientWidth;
      node.style.backgroundSize = `${columns * size}px ${rows * size}px`;
      node.style.backgroundPosition = `${-(index % columns) * size}px ${-Math.floor(index / columns) * size}px`;
    };
    const choose = (index) => {
      marks[chosen]?.classList.remove("chosen");
      chosen = index;
      const point = points[index];
      marks[index].classList.add("chosen");
      marks[index].parentNode.append(marks[index]);
      space.querySelector(".lens").classList.remove("unchosen");
      show(thumb, index);
      says.textContent = point.right ? point.label : `${point.label}, predicted as ${point.guess}`;
    };
    const draw = () => {
      const width = field.clientWidth, height = field.clientHeight;
      if (!width) return;
      field.replaceChildren();
      const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" }, field);
      places = points.map((point) => [18 + point.x * (width - 36), 18 + point.y * (height - 36)]);
      marks = points.map((point, index) => {
        const [x, y] = places[index];
        if (images.checked) {
          const mark = Object.assign(document.createElement("span"), { className: point.right ? "right" : "wrong" });
          Object.assign(mark.style, { left: `${x}px`, top: `${y}px`, backgroundImage: thumb.style.backgroundImage });
          field.append(mark);
          show(mark, index);
          return mark;
        }
        return point.right
          ? svg("circle", { class: "right", cx: x, cy: y, r: 4.5 }, root)
          : svg("rect", { class: "wrong", x: x - 3.4, y: y - 3.4, width: 6.8, height: 6.8, transform: `rotate(45 ${x} ${y})` }, root);
      });
      if (chosen >= 0) choose(chosen);
    };
    const nearest = (event) => {
      const box = field.getBoundingClientRect();
      const [x, y] = [event.clientX - box.left, event.clientY - box.top];
      const far = (at) => (places[at][0] - x) ** 2 + (places[at][1] - y) ** 2;
      choose(places.reduce((best, _, at) => (far(at) < far(best) ? at : best), 0));
    };
    field.addEventListener("pointermove", nearest);
    field.addEventListener("pointerdown", nearest);
    field.addEventListener("keydown", (event) => {
      const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
      if (!way) return;
      event.preventDefault();
      if (chosen < 0) return choose(0);
      const [x, y] = places[chosen];
      let best = -1, least = Infinity;
      places.forEach(([left, top], at) => {
        const along = (left - x) * way[0] + (top - y) * way[1];
        const across = Math.abs((left - x) * way[1]) + Math.abs((top - y) * way[0]);
        if (at !== chosen && along > 0 && across <= along && along + across < least) [best, least] = [at, along + across];
      });
      if (best >= 0) choose(best);
    });
    images.addEventListener("change", draw);
    new ResizeObserver(draw).observe(field);
  }
})();
