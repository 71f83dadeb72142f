// What a pointer, a finger or the keyboard ask of a page: values under a cross-hair, zoomed time, tabs, colours.
// The page is whole without it. It reads the values that charts carry, draws nothing new and fetches nothing.
"use strict";
(() => {
  const root = document.documentElement, tip = document.getElementById("tip"), told = document.getElementById("told");
  const all = (query, within = document) => [...within.querySelectorAll(query)];
  root.classList.add("scripted");

  // ---- figures: as `figures.py` writes them
  const digits = (value) => {
    if (!value) return "0";
    const decimals = Math.max(0, 2 - Math.floor(Math.log10(Math.abs(value)) + 1e-9));
    if (decimals > 9) return value.toExponential(2);
    return value.toLocaleString("en", { minimumFractionDigits: 0, maximumFractionDigits: decimals });
  };
  const scaled = (value, scales) => {
    const [factor, unit] = scales.find((scale) => Math.abs(value) >= 0.9995 * scale[0]) || scales[scales.length - 1];
    return `${digits(value / factor)} ${unit}`;
  };
  const TIMES = [[1, "s"], [1e-3, "ms"], [1e-6, "µs"], [1e-9, "ns"]];
  const BYTES = [[1e15, "PB"], [1e12, "TB"], [1e9, "GB"], [1e6, "MB"], [1e3, "kB"], [1, "B"]];
  const shown = (value, unit) =>
    unit === "s" ? (value ? scaled(value, TIMES) : "0 s")
      : unit === "%" ? `${digits(value * 100)} %`
        : unit[0] === "B" ? scaled(value, BYTES) + unit.slice(1) : digits(value) + unit.replace("1/", "/");

  // ---- colours
  const theme = document.getElementById("theme"), prefers = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme || (prefers.matches ? "dark" : "light")) === "dark";
  const label = () => { theme.textContent = isDark() ? "Light" : "Dark"; };
  theme.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    try { localStorage.setItem("mist-theme", root.dataset.theme); } catch { /* a file may have no storage */ }
    label();
  });
  prefers.addEventListener("change", label);
  label();

  // ---- tips
  const place = (x, y) => {
    const { width, height } = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(6, Math.min(x + 14, innerWidth - width - 6))}px`;
    tip.style.top = `${y + 18 + height > innerHeight ? Math.max(6, y - height - 12) : y + 18}px`;
  };
  const show = (lines, x, y) => {
    tip.replaceChildren(...lines.flatMap(([text, colour], i) => {
      const swatch = document.createElement("b");
      if (colour) swatch.style.background = colour;
      return [...(i ? ["\n"] : []), ...(colour ? [swatch] : []), text];
    }));
    tip.hidden = false;
    place(x, y);
  };
  const hide = () => { tip.hidden = true; };
  for (const each of all("[data-tip]")) {
    const lines = each.dataset.tip.split("\n").map((line) => [line]);
    each.addEventListener("pointermove", (event) => show(lines, event.clientX, event.clientY));
    each.addEventListener("pointerleave", hide);
    each.addEventListener("focus", () => {
      if (!each.matches(":focus-visible")) return;
      const box = each.getBoundingClientRect();
      show(lines, box.left + Math.min(150, box.width), box.bottom - Math.min(14, box.height));
    });
    each.addEventListener("blur", hide);
  }
  addEventListener("scroll", hide, { passive: true });

  // ---- tabs
  for (const list of all("[role=tablist]")) {
    const buttons = all("[role=tab]", list);
    const choose = (chosen) => buttons.forEach((button) => {
      const on = button === chosen;
      button.setAttribute("aria-selected", on);
      button.tabIndex = on ? 0 : -1;
      document.getElementById(button.getAttribute("aria-controls")).classList.toggle("later", !on);
    });
    list.addEventListener("click", (event) => { if (buttons.includes(event.target)) choose(event.target); });
    list.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const next = buttons[(buttons.indexOf(event.target) + step + buttons.length) % buttons.length];
      choose(next);
      next.focus();
      event.preventDefault();
    });
  }
  for (const button of all(".switch")) {
    button.addEventListener("click", () => {
      const on = button.closest("figure").classList.toggle("shares");
      button.setAttribute("aria-pressed", on);
    });
  }

  // ---- charts
  const charts = [];
  let zoomed = null; // [from, to] of all time axes, null: everything

  class Chart {
    constructor(figure) {
      this.figure = figure;
      this.plot = figure.querySelector(".plot");
      this.isHeat = figure.dataset.kind === "heat";
      this.box = this.isHeat ? this.plot.querySelector("svg") : this.plot.querySelector(".area");
      this.svgs = all("svg.zoomable", figure).map((svg) => [svg, svg.getAttribute("viewBox").split(" ").map(Number)]);
      this.marks = all(".mark.down", figure).map((mark) => [mark, parseFloat(mark.style.left) / 100]);
      this.data = null;
      this.at = null;
      this.row = 0;
      this.listen();
    }
    // parsed when it is first asked for: a page with many charts opens at once
    values() {
      this.data ??= JSON.parse(this.figure.querySelector(".data").textContent);
      return this.data;
    }
    ends() {
      const { x, time } = this.values();
      const [low, high] = time && zoomed ? zoomed : [x.low, x.high];
      return x.log ? [Math.log10(low), Math.log10(high)] : [low, high];
    }
    valueAt(fraction) {
      const [low, high] = this.ends(), value = low + fraction * (high - low);
      return this.values().x.log ? 10 ** value : value;
    }
    fractionOf(value) {
      const [low, high] = this.ends();
      return ((this.values().x.log ? Math.log10(value) : value) - low) / (high - low);
    }
    visible() {
      const keys = all(".key", this.figure);
      return this.values().series.map((series, i) => ({ ...series, i }))
        .filter((series) => !keys.length || keys[series.i].getAttribute("aria-pressed") === "true");
    }
    lines(x) {
      const { x: axis, y, time } = this.values();
      if (this.isHeat) {
        const { name, v } = this.values().rows[this.row];
        const i = Math.max(0, Math.min(v.length - 1, Math.floor((x - axis.low) / (axis.high - axis.low) * v.length)));
        return [[shown(x, axis.unit)], [`${name}: ${v[i]} % busy`]];
      }
      const style = getComputedStyle(this.figure);
      return [[(time ? "" : "≤ ") + shown(x, axis.unit)], ...this.visible().map((series) => {
        const i = nearest(series.x, x, !time);
        let text = `${series.name}: ${shown(i < 0 ? 0 : series.y[i], y.unit)}`;
        if (series.lo && i >= 0) text += ` (${shown(series.lo[i], y.unit)} – ${shown(series.hi[i], y.unit)})`;
        return [text, style.getPropertyValue(all("svg g", this.figure)[series.i].style.getPropertyValue("--c").slice(4, -1))];
      })];
    }
    point(x, clientY, speak) {
      this.at = x;
      const box = this.box.getBoundingClientRect(), fraction = this.fractionOf(x);
      this.hair ??= Object.assign(document.createElement("div"), { className: "hair" });
      const host = this.isHeat ? this.plot : this.box;
      host.append(this.hair);
      this.hair.style.left = `${box.left - host.getBoundingClientRect().left + fraction * box.width}px`;
      const lines = this.lines(x);
      show(lines, box.left + fraction * box.width, clientY);
      if (speak) told.textContent = lines.map(([text]) => text).join(", ");
    }
    leave() {
      this.hair?.remove();
      hide();
    }
    fraction(event) {
      const box = this.box.getBoundingClientRect();
      return Math.max(0, Math.min(1, (event.clientX - box.left) / box.width));
    }
    listen() {
      const { plot } = this;
      let from = null, band = null;
      plot.addEventListener("pointermove", (event) => {
        const fraction = this.fraction(event);
        if (this.isHeat) {
          const rows = all(".row", plot);
          const row = rows.findIndex((each) => event.clientY <= each.getBoundingClientRect().bottom);
          this.row = row < 0 ? rows.length - 1 : row;
        }
        this.point(this.valueAt(fraction), event.clientY);
        if (from !== null) {
          const box = this.box.getBoundingClientRect(), left = box.left - plot.getBoundingClientRect().left;
          band ??= plot.appendChild(Object.assign(document.createElement("div"), { className: "picked" }));
          band.style.left = `${left + Math.min(from, fraction) * box.width}px`;
          band.style.width = `${Math.abs(fraction - from) * box.width}px`;
        }
      });
      plot.addEventListener("pointerleave", () => this.leave());
      plot.addEventListener("pointerdown", (event) => {
        if (!this.values().time || event.pointerType === "touch" || event.button) return;
        from = this.fraction(event);
        plot.setPointerCapture(event.pointerId);
      });
      const stop = (event) => {
        const to = from === null ? from : this.fraction(event), [a, b] = [Math.min(from, to), Math.max(from, to)];
        band?.remove();
        band = null;
        if (from !== null && event.type === "pointerup" && b - a > 0.01) zoom([this.valueAt(a), this.valueAt(b)]);
        from = null;
      };
      plot.addEventListener("pointerup", stop);
      plot.addEventListener("pointercancel", stop);
      plot.addEventListener("dblclick", () => { if (this.values().time) zoom(null); });
      plot.addEventListener("keydown", (event) => this.key(event));
      plot.addEventListener("blur", () => this.leave());
      for (const button of all(".key", this.figure)) {
        button.addEventListener("click", () => {
          const on = button.getAttribute("aria-pressed") !== "true";
          button.setAttribute("aria-pressed", on);
          all("svg g", this.figure)[all(".key", this.figure).indexOf(button)].toggleAttribute("hidden", !on);
        });
      }
    }
    key(event) {
      const { time, rows } = this.values(), [low, high] = this.ends();
      const now = this.at === null ? 0.5 : Math.max(0, Math.min(1, this.fractionOf(this.at)));
      const step = event.shiftKey ? 0.1 : 0.01;
      const moved = { ArrowRight: now + step, ArrowLeft: now - step, Home: 0, End: 1 }[event.key];
      const turned = { ArrowDown: 1, ArrowUp: -1 }[event.key];
      if (turned && rows) this.row = Math.max(0, Math.min(rows.length - 1, this.row + turned));
      else if (time && (event.key === "+" || event.key === "-")) {
        const centre = this.at ?? (low + high) / 2, half = (high - low) * (event.key === "+" ? 0.25 : 1);
        zoom([centre - half, centre + half]);
      } else if (event.key === "Escape") {
        if (time) zoom(null);
        this.leave();
        return;
      } else if (moved === undefined) return;
      event.preventDefault();
      const box = this.isHeat ? this.svgs[this.row][0].getBoundingClientRect() : this.box.getBoundingClientRect();
      this.point(this.valueAt(Math.max(0, Math.min(1, moved ?? now))), box.top + box.height / 3, true);
    }
    rescale() {
      const { x } = this.values(), [low, high] = this.ends(), whole = x.high - x.low;
      for (const [svg, [, y, width, height]] of this.svgs) {
        svg.setAttribute("viewBox", `${(low - x.low) / whole * width} ${y} ${(high - low) / whole * width} ${height}`);
      }
      for (const [mark, place] of this.marks) {
        const moved = (x.low + place * whole - low) / (high - low);
        mark.style.left = `${moved * 100}%`;
        mark.hidden = moved < 0 || moved > 1;
      }
      this.plot.querySelector(".xticks").replaceChildren(...ticks(low, high).map((value) => Object.assign(
        document.createElement("span"),
        { textContent: high >= 1 ? `${value.toLocaleString("en", { maximumFractionDigits: 6 })} s` : shown(value, "s"), style: `left:${this.fractionOf(value) * 100}%` },
      )));
    }
  }

  // the last place at or before x, or the nearest one
  const nearest = (xs, x, before) => {
    let low = 0, high = xs.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (xs[middle] <= x) low = middle + 1; else high = middle;
    }
    if (before) return low - 1;
    return low > 0 && (low === xs.length || x - xs[low - 1] < xs[low] - x) ? low - 1 : low;
  };
  // as `scales.py` does
  const ticks = (low, high) => {
    const rough = (high - low) / 6, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((each) => each >= rough * 0.999);
    const found = [];
    for (let i = Math.ceil(low / step - 1e-9); i <= high / step + 1e-9; i++) found.push(i * step + 0); // no -0
    return found;
  };
  const zoom = (ends) => {
    const timed = charts.filter((chart) => chart.values().time);
    if (!timed.length) return;
    const { low, high } = timed[0].values().x;
    zoomed = ends && [Math.max(low, ends[0]), Math.min(high, ends[1])];
    if (zoomed && zoomed[1] - zoomed[0] > 0.999 * (high - low)) zoomed = null;
    timed.forEach((chart) => chart.rescale());
  };
  for (const figure of all("figure.chart")) charts.push(new Chart(figure));

  // ---- paper shows what is folded
  const folded = all("main > section > details:not(.story, .nested)").filter((each) => !each.open);
  addEventListener("beforeprint", () => folded.forEach((each) => { each.open = true; }));

  // ---- where we are
  const links = new Map(all("nav a").map((link) => [link.hash.slice(1), link]));
  const seen = new Set();
  const watcher = new IntersectionObserver((entries) => {
    entries.forEach((entry) => (entry.isIntersecting ? seen.add(entry.target.id) : seen.delete(entry.target.id)));
    const current = [...links.keys()].find((id) => seen.has(id));
    links.forEach((link, id) => {
      if (id === current) link.setAttribute("aria-current", "true"); else link.removeAttribute("aria-current");
    });
  }, { rootMargin: "-15% 0px -70% 0px" });
  all("main > section").forEach((section) => watcher.observe(section));
})();
