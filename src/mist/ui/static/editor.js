// A text area with line numbers, and problems beside their lines. The text is the browser's business, undo included.

const PADDING = 10, LINE = 20; // px, as in ui.css

export function editor(area, gutter, marks, changed) {
  let problems = [];
  const lines = () => area.value.split("\n");

  const number = () => {
    const wrong = new Map(problems.filter((p) => p.here && p.line).map((p) => [p.line, p.message]));
    const count = lines().length;
    while (gutter.children.length > count) gutter.lastChild.remove();
    while (gutter.children.length < count) gutter.append(document.createElement("div"));
    [...gutter.children].forEach((each, i) => {
      each.textContent = i + 1;
      each.className = wrong.has(i + 1) ? "wrong" : "";
      each.title = wrong.get(i + 1) || "";
    });
  };

  const mark = () => {
    const text = lines(), beside = new Map();
    for (const each of problems) {
      if (each.here && each.line) beside.set(each.line, [...(beside.get(each.line) || []), each]);
    }
    marks.replaceChildren(...[...beside].map(([line, found]) => {
      const row = document.createElement("div"), written = text[line - 1] || "";
      row.className = "row";
      row.style.top = `${PADDING + (line - 1) * LINE}px`;
      for (const { column } of found) {
        if (!column) continue;
        const under = document.createElement("i"), length = /^[^\s:,{}[\]]*/.exec(written.slice(column - 1))[0].length;
        under.style.left = `calc(${PADDING}px + ${column - 1}ch)`;
        under.style.width = `${Math.max(1, length)}ch`;
        row.append(under);
      }
      const told = document.createElement("span");
      told.textContent = found.map((each) => each.message).join(" · ");
      told.style.left = `calc(${PADDING}px + ${written.length + 3}ch)`;
      row.append(told);
      return row;
    }));
    scroll();
  };

  const scroll = () => {
    gutter.style.transform = `translateY(${-area.scrollTop}px)`;
    marks.style.transform = `translate(${-area.scrollLeft}px, ${-area.scrollTop}px)`;
  };

  const show = (found) => { problems = found; number(); mark(); };

  area.addEventListener("scroll", scroll);
  area.addEventListener("input", () => { number(); mark(); changed(); });
  area.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
    const before = area.value.slice(0, area.selectionStart), line = before.slice(before.lastIndexOf("\n") + 1);
    const indent = /^ */.exec(line)[0] + (/:\s*$/.test(line) ? "  " : "");
    if (!indent) return;
    event.preventDefault();
    document.execCommand("insertText", false, `\n${indent}`); // the only way that undo knows of
  });

  return {
    show,
    set(text) { area.value = text; area.scrollTo(0, 0); area.setSelectionRange(0, 0); show([]); },
    jump(line, column) {
      const text = lines(), start = text.slice(0, line - 1).reduce((sum, each) => sum + each.length + 1, 0);
      const at = Math.min(start + Math.max(0, column - 1), start + (text[line - 1] || "").length);
      area.focus();
      area.setSelectionRange(at, at + /^[^\s:,{}[\]]*/.exec(area.value.slice(at))[0].length);
      area.scrollTop = Math.max(0, (line - 1) * LINE - area.clientHeight / 2);
    },
  };
}
