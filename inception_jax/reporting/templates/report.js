// The page's only script: curves that can be zoomed, tables that can be sorted, the theme.
// All text is inserted as text, never as markup.
"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("data").textContent);
  const isComparison = data.runs.length > 1;
  const MARGIN = { left: 58, right: 14, top: 10, bottom: 40 };
  // Up to this many evaluations in view, each has a dot; more dots would hide the line.
  const MAX_DOTS = 40;
  const RUN_COLORS = 8;

  // State shared by all charts: horizontal axis, its visible range (null: all), hidden curves.
  const view = { axis: "epoch", range: null, hidden: new Set() };
  const charts = [];

  function svgElement(name, attributes = {}, text = null) {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== null) node.textContent = text;
    return node;
  }

  function htmlElement(name, className, text = null) {
    const node = document.createElement(name);
    if (className) node.className = className;
    if (text !== null) node.textContent = text;
    return node;
  }

  function format(value) {
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size < 1e-3 || size >= 1e6) return value.toExponential(1).replace("e+", "e");
    return String(Number(value.toPrecision(4)));
  }

  // Returns about `count` round numbers that cover a range.
  function ticks(low, high, count) {
    const rough = (high - low) / Math.max(count, 1);
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 2.5, 5, 10].find((each) => each * power >= rough * 0.999) * power;
    const numbers = [];
    for (let n = Math.ceil(low / step - 1e-9); n * step <= high + step * 1e-9; n++) {
      numbers.push(Number((n * step).toPrecision(12)));
    }
    return numbers;
  }

  // Returns the curves of one metric: colored by split in a run's report, by run in a comparison.
  function seriesOf(metric) {
    const curves = [];
    // A metric that only training reports needs no label to distinguish its curves.
    const evaluated = data.runs.some((run) => Object.entries(run.splits)
      .some(([split, columns]) => !split.startsWith("train") && columns.metrics[metric]));
    data.runs.forEach((run, index) => {
      for (const [split, columns] of Object.entries(run.splits)) {
        const values = columns.metrics[metric];
        if (!values || !values.some((value) => value !== null)) continue;
        const training = split.startsWith("train");
        const kind = !evaluated ? "" : training ? "training" : "evaluation";
        const color = isComparison ? `run${index % RUN_COLORS}` : columns.color;
        curves.push({
          keys: isComparison ? [`run:${index}`, ...(kind ? [`kind:${kind}`] : [])] : [`split:${split}`],
          name: isComparison ? `${run.name}${kind === "training" ? `, ${columns.label}` : ""}` : columns.label,
          training,
          dashed: isComparison && kind === "training",
          color: `var(--${color})`,
          columns,
          values,
        });
      }
    });
    return curves;
  }

  // Returns the points of a curve that have a value on the axis: [{x, y}], y null for a gap.
  function pointsOf(series) {
    const axis = series.columns[view.axis];
    return series.values.map((y, n) => ({ x: axis[n], y })).filter((point) => point.x !== null);
  }

  function fullRange() {
    let low = Infinity;
    let high = -Infinity;
    for (const chart of charts) {
      for (const series of chart.visible()) {
        for (const { x } of pointsOf(series)) {
          low = Math.min(low, x);
          high = Math.max(high, x);
        }
      }
    }
    if (low > high) return [0, 1];
    // The range begins at the start of the run and is never empty.
    low = Math.min(low, 0);
    return high > low ? [low, high] : [low, low + 1];
  }

  function zoomTo(range) {
    const [low, high] = fullRange();
    if (range) {
      range = [Math.max(range[0], low), Math.min(range[1], high)];
      if (range[1] - range[0] < (high - low) / 1e4) return;
      if (range[0] <= low && range[1] >= high) range = null;
    }
    view.range = range;
    byId("reset").disabled = !range;
    charts.forEach((chart) => chart.draw());
  }

  class Chart {
    constructor(figure) {
      this.figure = figure;
      this.plot = figure.querySelector(".plot");
      this.title = this.plot.getAttribute("aria-label");
      this.unit = figure.dataset.unit;
      this.series = seriesOf(figure.dataset.metric);
      this.clip = `clip-${figure.dataset.metric}`;
      this.at = null;
      if (!this.series.length) return;
      figure.hidden = false;
      charts.push(this);
      const last = this.series.map(({ name, values }) =>
        `${name} ${format(values.findLast((value) => value !== null))}${this.unit}`);
      this.plot.setAttribute("aria-label", `${this.title}. Last values: ${last.join(", ")}`);
      this.svg = svgElement("svg", { "aria-hidden": "true" });
      this.tip = htmlElement("div", "tip");
      this.tip.hidden = true;
      this.plot.append(this.svg, this.tip);
      this.listen();
      new ResizeObserver(() => this.draw()).observe(this.plot);
    }

    visible() {
      return this.series.filter((each) => !each.keys.some((key) => view.hidden.has(key)));
    }

    draw() {
      const width = this.plot.clientWidth;
      const height = this.plot.clientHeight;
      const right = width - MARGIN.right;
      const bottom = height - MARGIN.bottom;
      if (right <= MARGIN.left) return;
      const [low, high] = view.range || fullRange();
      const curves = this.visible().map((series) => ({ series, points: pointsOf(series) }));
      const inside = curves.flatMap(({ points }) =>
        points.filter(({ x, y }) => y !== null && x >= low && x <= high).map(({ y }) => y));
      // Not Math.min(...inside): engines limit the number of arguments of a call.
      let min = inside.length ? inside.reduce((a, b) => Math.min(a, b)) : 0;
      let max = inside.length ? inside.reduce((a, b) => Math.max(a, b)) : 1;
      const room = (max - min) * 0.06 || Math.abs(max) * 0.1 || 1;
      const positive = min >= 0;
      [min, max] = [min - room, max + room];
      if (positive) min = Math.max(min, 0);
      if (this.unit === "%") max = Math.min(max, 100);
      this.box = { low, high, left: MARGIN.left, right, bottom };
      this.x = (value) => MARGIN.left + ((value - low) / (high - low)) * (right - MARGIN.left);
      this.y = (value) => bottom - ((value - min) / (max - min)) * (bottom - MARGIN.top);
      this.svg.replaceChildren();
      this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
      this.drawAxes(width, low, high, min, max);
      this.drawCurves(curves, low, high);
      this.overlay = svgElement("g");
      this.svg.append(this.overlay);
      this.drawCursor();
    }

    drawAxes(width, low, high, min, max) {
      const { left, right, bottom } = this.box;
      for (const tick of ticks(min, max, 5)) {
        const y = this.y(tick);
        this.svg.append(
          svgElement("line", { class: "gridline", x1: left, x2: right, y1: y, y2: y }),
          svgElement("text", { x: left - 8, y: y + 4, "text-anchor": "end" }, format(tick)));
      }
      for (const tick of ticks(low, high, width / 90)) {
        const x = this.x(tick);
        this.svg.append(
          svgElement("line", { class: "gridline", x1: x, x2: x, y1: bottom, y2: bottom + 5 }),
          svgElement("text", { x, y: bottom + 19, "text-anchor": "middle" }, format(tick)));
      }
      const label = view.axis === "epoch" ? "epoch" : "hours";
      this.svg.append(
        svgElement("text", { x: (left + right) / 2, y: bottom + 36, "text-anchor": "middle" }, label));
    }

    drawCurves(curves, low, high) {
      const { left, right, bottom } = this.box;
      const clip = svgElement("clipPath", { id: this.clip });
      clip.append(svgElement("rect", {
        x: left - 4, y: 0, width: right - left + 8, height: bottom + 4,
      }));
      const group = svgElement("g", { "clip-path": `url(#${this.clip})` });
      for (const { series, points } of curves) {
        let path = "";
        let pen = "M";
        for (const { x, y } of points) {
          if (y === null) {
            pen = "M";
            continue;
          }
          path += `${pen}${this.x(x).toFixed(1)} ${this.y(y).toFixed(1)}`;
          pen = "L";
        }
        const dashed = series.dashed ? " dashed" : "";
        const line = svgElement("path", { class: `curve${dashed}`, d: path });
        line.style.stroke = series.color;
        group.append(line);
        const seen = points.filter(({ x, y }) => y !== null && x >= low && x <= high);
        if (seen.length <= (series.training ? 1 : MAX_DOTS)) {
          for (const { x, y } of seen) {
            const dot = svgElement("circle", { cx: this.x(x), cy: this.y(y), r: 3 });
            dot.style.fill = series.color;
            group.append(dot);
          }
        }
      }
      this.svg.append(clip, group);
    }

    // Shows each curve's value at the point nearest to the cursor.
    drawCursor() {
      this.overlay.replaceChildren();
      this.tip.hidden = true;
      if (this.at === null || this.at < this.box.low || this.at > this.box.high) return;
      const x = this.x(this.at);
      this.overlay.append(svgElement("line", {
        class: "cursor", x1: x, x2: x, y1: MARGIN.top, y2: this.box.bottom,
      }));
      this.tip.replaceChildren(htmlElement("b", "", `${view.axis === "epoch" ? "epoch" : "hour"} ${format(this.at)}`));
      for (const { series, point } of this.nearest()) {
        const dot = svgElement("circle", { cx: this.x(point.x), cy: this.y(point.y), r: 4.5 });
        dot.style.fill = series.color;
        this.overlay.append(dot);
        const row = htmlElement("div");
        const key = htmlElement("i");
        key.style.background = series.color;
        row.append(key, htmlElement("span", "", series.name), htmlElement("em", "", `${format(point.y)}${this.unit}`));
        this.tip.append(row);
      }
      this.tip.hidden = false;
      const room = this.plot.clientWidth - this.tip.offsetWidth;
      this.tip.style.left = `${Math.max(0, Math.min(x + 14 > room ? x - 14 - this.tip.offsetWidth : x + 14, room))}px`;
      this.tip.style.top = `${MARGIN.top}px`;
    }

    nearest() {
      const nearest = [];
      for (const series of this.visible()) {
        let best = null;
        for (const point of pointsOf(series)) {
          if (point.y === null || point.x < this.box.low || point.x > this.box.high) continue;
          if (!best || Math.abs(point.x - this.at) < Math.abs(best.x - this.at)) best = point;
        }
        if (best) nearest.push({ series, point: best });
      }
      return nearest;
    }

    // Returns the positions of all points in view, in order.
    positions() {
      const all = this.visible().flatMap((series) => pointsOf(series))
        .filter(({ x, y }) => y !== null && x >= this.box.low && x <= this.box.high)
        .map(({ x }) => x);
      return [...new Set(all)].sort((a, b) => a - b);
    }

    moveTo(position) {
      this.at = position;
      this.drawCursor();
      const values = this.nearest().map(({ series, point }) => `${series.name} ${format(point.y)}${this.unit}`);
      byId("announcement").textContent = `${this.title}, ${view.axis === "epoch" ? "epoch" : "hour"} ${format(position)}: ${values.join(", ")}`;
    }

    zoomBy(factor) {
      const { low, high } = this.box;
      const center = this.at === null ? (low + high) / 2 : this.at;
      zoomTo([center - (center - low) * factor, center + (high - center) * factor]);
    }

    onKey(event) {
      const positions = this.positions();
      const here = this.at === null ? -1 : positions.findLastIndex((each) => each <= this.at);
      const actions = {
        ArrowRight: () => this.moveTo(positions[Math.min(here + 1, positions.length - 1)]),
        ArrowLeft: () => this.moveTo(positions[Math.max(here - 1, 0)]),
        Home: () => this.moveTo(positions[0]),
        End: () => this.moveTo(positions[positions.length - 1]),
        "+": () => this.zoomBy(0.5),
        "=": () => this.zoomBy(0.5),
        "-": () => this.zoomBy(2),
        0: () => zoomTo(null),
        Escape: () => zoomTo(null),
      };
      const action = actions[event.key];
      if (!action || !positions.length || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      action();
    }

    listen() {
      let from = null;
      const positionOf = (event) => {
        const { left, right, low, high } = this.box;
        const x = event.clientX - this.plot.getBoundingClientRect().left;
        const fraction = Math.min(Math.max((x - left) / (right - left), 0), 1);
        return low + fraction * (high - low);
      };
      const select = (to) => {
        const [a, b] = [this.x(from), this.x(to)].sort((one, other) => one - other);
        this.overlay.append(svgElement("rect", {
          class: "selection", x: a, width: b - a, y: MARGIN.top, height: this.box.bottom - MARGIN.top,
        }));
      };
      this.plot.addEventListener("pointerdown", (event) => {
        if (event.button !== 0) return;
        from = positionOf(event);
        this.plot.setPointerCapture(event.pointerId);
      });
      this.plot.addEventListener("pointermove", (event) => {
        this.at = positionOf(event);
        this.drawCursor();
        if (from !== null) select(this.at);
      });
      this.plot.addEventListener("pointerup", (event) => {
        if (from === null) return;
        const [start, end] = [from, positionOf(event)].sort((one, other) => one - other);
        from = null;
        if (this.x(end) - this.x(start) > 8) zoomTo([start, end]);
        else this.drawCursor();
      });
      const leave = () => {
        from = null;
        this.at = null;
        this.drawCursor();
      };
      this.plot.addEventListener("pointercancel", leave);
      this.plot.addEventListener("pointerleave", () => {
        if (from === null) leave();
      });
      this.plot.addEventListener("blur", leave);
      this.plot.addEventListener("dblclick", () => zoomTo(null));
      this.plot.addEventListener("keydown", (event) => this.onKey(event));
    }
  }

  function legendEntry(key, label, color, dashed) {
    const button = htmlElement("button");
    button.type = "button";
    button.dataset.key = key;
    button.setAttribute("aria-pressed", "true");
    if (color) {
      const sample = svgElement("svg", { width: 22, height: 8, "aria-hidden": "true" });
      const line = svgElement("line", { x1: 1, x2: 21, y1: 4, y2: 4, "stroke-width": dashed ? 2 : 3 });
      if (dashed) line.setAttribute("stroke-dasharray", "5 3");
      line.style.stroke = color;
      sample.append(line);
      button.append(sample);
    }
    button.append(htmlElement("span", "", label));
    button.addEventListener("click", () => {
      const on = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(on));
      if (on) view.hidden.delete(key);
      else view.hidden.add(key);
      charts.forEach((chart) => chart.draw());
    });
    byId("legend").append(button);
  }

  function drawLegend() {
    const seen = new Set();
    for (const series of charts.flatMap((chart) => chart.series)) {
      const key = series.keys[0];
      if (seen.has(key)) continue;
      seen.add(key);
      const label = isComparison ? data.runs[Number(key.slice(4))].name : series.name;
      legendEntry(key, label, series.color, false);
    }
    if (isComparison) {
      legendEntry("kind:evaluation", "evaluation", "currentColor", false);
      legendEntry("kind:training", "training", "currentColor", true);
    }
  }

  function startCharts() {
    byId("no-script").hidden = true;
    document.querySelectorAll(".chart").forEach((figure) => new Chart(figure));
    if (!charts.length) return;
    byId("controls").hidden = false;
    drawLegend();
    const timed = data.runs.some((run) => Object.values(run.splits)
      .some((columns) => columns.hours.some((hour) => hour !== null)));
    for (const input of document.getElementsByName("axis")) {
      if (input.value === "hours") input.disabled = !timed;
      input.addEventListener("change", () => {
        view.axis = input.value;
        charts.forEach((chart) => { chart.at = null; });
        zoomTo(null);
      });
    }
    byId("reset").addEventListener("click", () => zoomTo(null));
    for (const swatch of document.querySelectorAll(".swatch")) {
      swatch.style.background = `var(--run${swatch.dataset.run % RUN_COLORS})`;
    }
    charts.forEach((chart) => chart.draw());
  }

  // Numbers sort numerically and the rest as text; missing values come last in both orders.
  function valueOf(cell) {
    const text = (cell.dataset.sort ?? cell.textContent).trim();
    if (text === "" || text === "–") return null;
    const number = Number(text.replaceAll(",", ""));
    return Number.isNaN(number) ? text : number;
  }

  function compare(one, other) {
    if (typeof one === "number" && typeof other === "number") return one - other;
    return String(one).localeCompare(String(other), undefined, { numeric: true });
  }

  function startSorting(table) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      head.querySelector(".sort").addEventListener("click", () => {
        // The first click sorts numbers from the largest and text from A.
        const first = head.classList.contains("number") ? "descending" : "ascending";
        const second = first === "ascending" ? "descending" : "ascending";
        const order = head.getAttribute("aria-sort") === first ? second : first;
        heads.forEach((each) => each.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", order);
        const rows = [...table.tBodies[0].rows].map((row) => [valueOf(row.cells[column]), row]);
        rows.sort(([one], [other]) => {
          if (one === null || other === null) return (one === null) - (other === null);
          return order === "ascending" ? compare(one, other) : compare(other, one);
        });
        table.tBodies[0].append(...rows.map(([, row]) => row));
      });
    });
  }

  function startFilter() {
    const input = byId("filter");
    if (!input) return;
    const rows = [...byId("all-settings").tBodies[0].rows];
    const texts = rows.map((row) => row.textContent.toLowerCase().replaceAll("_", " "));
    const apply = () => {
      const wanted = input.value.toLowerCase().replaceAll("_", " ").split(/\s+/);
      rows.forEach((row, n) => {
        const matches = wanted.every((word) => texts[n].includes(word));
        row.hidden = !matches || (byId("only-changed").checked && !row.classList.contains("changed"));
      });
      byId("match-count").textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length}`;
    };
    input.addEventListener("input", apply);
    byId("only-changed").addEventListener("change", apply);
  }

  function startTheme() {
    const next = { automatic: "light", light: "dark", dark: "automatic" };
    const button = byId("theme");
    const apply = (theme) => {
      if (theme === "automatic") delete document.documentElement.dataset.theme;
      else document.documentElement.dataset.theme = theme;
      button.textContent = `Theme: ${theme}`;
      button.dataset.theme = theme;
    };
    // A page opened from a file may have no storage; the choice then lasts until it is closed.
    let stored = null;
    try {
      stored = localStorage.getItem("inception-report-theme");
    } catch { /* As above. */ }
    apply(stored in next ? stored : "automatic");
    button.addEventListener("click", () => {
      apply(next[button.dataset.theme]);
      try {
        localStorage.setItem("inception-report-theme", button.dataset.theme);
      } catch { /* As above. */ }
    });
  }

  startTheme();
  startCharts();
  document.querySelectorAll("table.sortable").forEach(startSorting);
  startFilter();
})();
