// What a pointer or the keyboard ask of a search's page: other axes, the next deployment, the scenario of one.
// Places and texts are in the page; this moves points and computes nothing.
"use strict";
(() => {
  const figure = document.getElementById("explorer");
  if (!figure) return;
  const all = (query, within = document) => [...within.querySelectorAll(query)];
  const points = all("button.point", figure), chosen = document.getElementById("chosen");
  const { axes, lines } = JSON.parse(figure.querySelector(".data").textContent);
  const selects = all("select", figure), names = Object.keys(axes);
  const axis = (name) => selects.find((each) => each.dataset.axis === name)?.value ?? names[0];
  const at = (point, name) => axes[name].at[point.dataset.point];
  const ticks = (host, name, side, turned) => host.replaceChildren(...axes[name].ticks.map(([place, text]) => {
    const span = Object.assign(document.createElement("span"), { textContent: text });
    span.style[side] = `${(turned ? 1 - place : place) * 100}%`;
    return span;
  }));

  const place = () => {
    const x = axis("across"), y = axis("up");
    for (const point of points) {
      const left = at(point, x), top = at(point, y);
      point.hidden = left === null || top === null;
      point.style.left = `${left * 100}%`;
      point.style.top = `${(1 - top) * 100}%`;
    }
    figure.querySelector(".line").setAttribute("d", lines[`${x} ${y}`] ?? "");
    ticks(figure.querySelector(".xticks"), x, "left", false);
    ticks(figure.querySelector(".yticks"), y, "top", true);
    const [up, across] = all(".axis", figure);
    up.textContent = axes[y].title;
    across.textContent = axes[x].title;
    enter();
  };
  // one point is reached by Tab, the others from there
  const visible = () => points.filter((point) => !point.hidden)
    .sort((a, b) => at(a, axis("across")) - at(b, axis("across")) || at(a, axis("up")) - at(b, axis("up")));
  const enter = (to = visible().find((point) => point.dataset.front) ?? visible()[0]) => {
    points.forEach((point) => { point.tabIndex = point === to ? 0 : -1; });
  };
  const choose = (point) => {
    points.forEach((each) => each.setAttribute("aria-pressed", each === point));
    chosen.textContent = point.dataset.tip;
    if (!point.dataset.front) {
      chosen.textContent += "\nA scenario is written for the front alone.";
      return;
    }
    all("details.story").forEach((each) => { each.open = each.id === `deployment-${point.dataset.front}`; });
    const opened = document.getElementById(`deployment-${point.dataset.front}`);
    opened?.scrollIntoView({ block: "nearest" });
  };
  figure.addEventListener("click", (event) => {
    const point = event.target.closest("button.point");
    if (point) choose(point);
  });
  figure.addEventListener("keydown", (event) => {
    const point = event.target.closest("button.point");
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowUp: 1, ArrowDown: -1 }[event.key];
    if (!point || !step) return;
    const order = visible(), next = order[Math.max(0, Math.min(order.length - 1, order.indexOf(point) + step))];
    enter(next);
    next.focus();
    event.preventDefault();
  });
  selects.forEach((select) => select.addEventListener("change", () => {
    const other = selects.find((each) => each !== select);
    if (other.value === select.value) other.value = names.find((name) => name !== select.value);
    place();
  }));

  // the same deployment in both drawings
  const light = (event, on) => {
    const number = event.target.dataset?.point;
    if (number !== undefined) all(`[data-point="${number}"]`).forEach((each) => each.classList.toggle("lit", on));
  };
  for (const [on, events] of [[true, ["pointerover", "focusin"]], [false, ["pointerout", "focusout"]]]) {
    events.forEach((name) => document.addEventListener(name, (event) => light(event, on)));
  }
  enter();
})();
