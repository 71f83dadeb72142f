// The page of `mist ui`: opens, checks, saves and runs scenarios by asking the server, and shows what it answers.
// It computes nothing; every text goes in as text.
import { editor } from "./editor.js";

const TOKEN = location.pathname.split("/")[1], CHECK_AFTER_MS = 250, BUSY_MS = 400, IDLE_MS = 3000;
const NEW = `name: new scenario
seed: 1
workload:
  arrivals: {poisson: {rate_per_s: 4}}
  num_requests: 2000
  lengths: azure-conversation
clients:
  gpu: {device: h100-sxm, model: llama-3.1-8b, engine: vllm-0.10}
slo:
  ttft_s: {p99: 0.5}
`;
const at = (id) => document.getElementById(id);
const make = (name, attributes = {}, ...children) => {
  const made = Object.assign(document.createElement(name), attributes);
  made.append(...children);
  return made;
};
const tell = (text) => { at("told").textContent = text; };

// ---- the server
class Refused extends Error {
  constructor(status, answer) { super(answer.conflict || (answer.problems || []).map((p) => p.message).join("; ")); this.status = status; this.answer = answer; }
}
async function ask(path, body) {
  const headers = { "X-Mist-Token": TOKEN, "Content-Type": "application/json" };
  let response;
  try {
    response = await fetch(path, body === undefined ? {} : { method: "POST", headers, body: JSON.stringify(body) });
  } catch (error) { at("gone").hidden = false; throw error; }
  at("gone").hidden = true;
  const isJson = (response.headers.get("Content-Type") || "").includes("json");
  const answer = isJson ? await response.json() : { problems: [{ message: `${response.status}: ${await response.text()}` }] };
  if (!response.ok) throw new Refused(response.status, answer);
  return answer;
}

// ---- documents: what was opened, with what was typed since; kept while the page is open
const documents = new Map();
let current = null, checked = 0, timer = 0;
const key = (origin, name) => `${origin} ${name}`;
const isDirty = (doc) => doc.text !== doc.saved;
const text = at("text"), page = editor(text, at("gutter"), at("marks"), () => { current.text = text.value; label(); checkSoon(); });

async function open(origin, name) {
  if (!documents.has(key(origin, name))) {
    const found = await ask(`api/scenario?${new URLSearchParams({ origin, name })}`);
    const lines = found.text.replaceAll("\r\n", "\n");
    documents.set(key(origin, name), { origin, name, text: lines, saved: lines, opened: found.digest });
  }
  show(documents.get(key(origin, name)));
}
function show(doc) {
  current = doc;
  page.set(doc.text);
  at("conflict").hidden = true;
  at("label").value = "";
  label();
  check();
}
function label() {
  at("name").textContent = current.name;
  document.title = `${isDirty(current) ? "• " : ""}${current.name} · MIST`;
  at("save").disabled = current.origin === "folder" && current.opened !== "" && !isDirty(current);
  for (const each of document.querySelectorAll(".files button[data-name]")) {
    const doc = documents.get(key(each.dataset.origin, each.dataset.name));
    each.setAttribute("aria-current", String(doc === current));
    each.classList.toggle("dirty", Boolean(doc && isDirty(doc)));
    if (doc === current) within(at("lists"), each);
  }
}
function within(box, child) {
  const outer = box.getBoundingClientRect(), inner = child.getBoundingClientRect();
  if (inner.top < outer.top) box.scrollTop -= outer.top - inner.top;
  if (inner.bottom > outer.bottom) box.scrollTop += inner.bottom - outer.bottom;
}
function badge(word, kind) { const state = at("state"); state.textContent = word; state.className = `badge ${kind}`; }

// ---- checking as one types
function checkSoon() { clearTimeout(timer); timer = setTimeout(check, CHECK_AFTER_MS); }
async function check() {
  clearTimeout(timer);
  const mine = ++checked, { text, name, origin } = current;
  badge("checking", "");
  try {
    const found = await ask("api/check", { text, name, origin });
    if (mine === checked) judge(found);
  } catch (error) { if (mine === checked && error instanceof Refused) judge({ problems: error.answer.problems || [], lines: [] }); }
}
function judge({ problems, lines }) {
  page.show(problems);
  at("problems").replaceChildren(...problems.map(problem));
  const word = problems.length ? `${problems.length} problem${problems.length > 1 ? "s" : ""}` : "fine";
  if (at("state").dataset.told !== word) tell(word);
  at("state").dataset.told = word;
  badge(word, problems.length ? "bad" : "good");
  at("run").disabled = problems.length > 0;
  at("account").hidden = lines.length === 0;
  at("lines").textContent = lines.slice(1).map((line) => line.replace(/^ {2}/, "")).join("\n");
}
function problem(each) {
  const place = each.line ? `${each.here ? "line " : `${each.file}:`}${each.line}${each.column ? `:${each.column}` : ""}` : each.file;
  const where = each.here && each.line
    ? make("button", { type: "button", onclick: () => page.jump(each.line, each.column) }, place)
    : make("span", {}, place || "");
  return make("li", {}, where, make("span", { className: "problem" }, each.message), ...(each.hint ? [make("small", {}, each.hint)] : []));
}

// ---- saving
async function save(doc = current, name = doc.name) {
  const written = doc.text, isNew = name !== doc.name || doc.origin !== "folder";
  const { digest } = await ask("api/save", { name, text: written, opened: isNew ? "" : doc.opened });
  if (isNew) documents.delete(key(doc.origin, doc.name)); // opened again, it is what is on disk
  const saved = isNew ? { origin: "folder", name, text: written } : doc;
  Object.assign(saved, { saved: written, opened: digest });
  documents.set(key("folder", name), saved);
  if (current === doc) current = saved;
  await list();
  at("conflict").hidden = true;
  label();
  tell(`${name} saved`);
  if (isNew) check();
}
async function saveHere() {
  if (current.origin !== "folder" || current.opened === "") { nameIt(); return; }
  try { await save(); } catch (error) { onConflict(error); }
}
function onConflict(error) {
  if (!(error instanceof Refused)) return;
  if (error.status === 409) {
    at("conflict-text").textContent = `${error.message} since you opened it, and was not written over.`;
    at("conflict").hidden = false;
  } else judge({ problems: error.answer.problems || [], lines: [] });
}
function nameIt() {
  at("naming-problem").textContent = "";
  at("new-name").value = current.name;
  at("naming").showModal();
  at("new-name").select();
}
at("naming-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const typed = at("new-name").value.trim(), name = /\.ya?ml$/.test(typed) ? typed : `${typed}.yaml`;
  try {
    const isSame = name === current.name && current.origin === "folder" && current.opened !== "";
    if (isSame) throw new Refused(409, { conflict: "This is the name that it has" });
    await save(current, name);
    at("naming").close();
  } catch (error) { at("naming-problem").textContent = `${error.message}${error.status === 409 ? ": choose another name." : ""}`; }
});
at("naming-cancel").addEventListener("click", () => at("naming").close());
at("save").addEventListener("click", saveHere);
at("save-as").addEventListener("click", nameIt);
at("keep-mine").addEventListener("click", nameIt);
at("take-theirs").addEventListener("click", async () => {
  const { origin, name } = current;
  documents.delete(key(origin, name));
  await open(origin, name);
});
at("new").addEventListener("click", () => {
  let name = "new.yaml";
  for (let i = 2; at("names").querySelector(`[data-name="${name}"]`) || documents.has(key("folder", name)); i++) name = `new-${i}.yaml`;
  const doc = { origin: "folder", name, text: NEW, saved: "", opened: "" };
  documents.set(key("folder", name), doc);
  show(doc);
  text.focus();
  list();
});

// ---- the list of scenarios
async function list() {
  const found = await ask("api/scenarios");
  at("folder").textContent = found.folder;
  at("naming-folder").textContent = found.folder;
  at("runs-folder").textContent = found.runs;
  const entries = (names, origin) => names.map((name) => {
    const button = make("button", { type: "button", onclick: () => open(origin, name).catch(onConflict) }, name.replace(/\.ya?ml$/, ""));
    Object.assign(button.dataset, { origin, name });
    return make("li", {}, button);
  });
  const focused = document.activeElement.dataset.name && key(document.activeElement.dataset.origin, document.activeElement.dataset.name);
  const unsaved = [...documents.values()].filter((doc) => doc.origin === "folder" && doc.opened === "").map((doc) => doc.name);
  at("names").replaceChildren(...entries([...new Set([...found.names, ...unsaved])].sort(), "folder"));
  at("examples").replaceChildren(...entries(found.examples, "example"));
  at("examples-title").hidden = found.examples.length === 0;
  for (const each of document.querySelectorAll(".files button[data-name]")) if (key(each.dataset.origin, each.dataset.name) === focused) each.focus();
  if (current) label();
  return found;
}
async function lookAgain() {
  await list();
  const doc = current;
  if (!doc || doc.origin !== "folder" || doc.opened === "") return;
  const found = await ask(`api/scenario?${new URLSearchParams({ origin: "folder", name: doc.name })}`);
  if (found.digest === doc.opened || doc !== current) return;
  if (isDirty(doc)) onConflict(new Refused(409, { conflict: `${doc.name} has changed on disk` }));
  else at("take-theirs").click();
}

// ---- runs
const rows = new Map(), picked = new Set(), STEP = 50;
let waiting = 0, polled = 0, limit = STEP, known = null, doomed = null;
async function poll() {
  clearTimeout(waiting);
  const mine = ++polled, wanted = [["limit", limit], ...[...picked].map((id) => ["run", id])];
  const found = await ask(`api/runs?${new URLSearchParams(wanted)}`).catch(() => null); // the page says so, and asks again
  if (mine !== polled) return; // a later one is on its way
  const busy = found && found.runs.some(isUnderWay);
  waiting = setTimeout(poll, document.hidden ? 10 * IDLE_MS : busy ? BUSY_MS : IDLE_MS);
  if (found) draw(found.runs, found.count);
}
const isUnderWay = (run) => run.state === "queued" || run.state === "running";
function draw(found, count) {
  const names = new Set(found.map((run) => run.id));
  for (const [id, row] of rows) {
    if (names.has(id)) continue;
    if (row.contains(document.activeElement)) at("table").focus();
    row.remove(); rows.delete(id); picked.delete(id);
  }
  found.forEach((run, i) => {
    const row = rows.get(run.id) || make("tr"), body = at("runs"), told = JSON.stringify(run);
    rows.set(run.id, row);
    if (body.children[i] !== row) body.insertBefore(row, body.children[i] || null);
    if (row.dataset.told === told) return;
    row.dataset.told = told;
    if (known && row.dataset.state && row.dataset.state !== run.state && run.state !== "running") tell(`${run.name}: ${run.state}`);
    if (row.dataset.state === "running" && run.state === "running") advance(row, run);
    else fill(row, run);
    row.dataset.state = run.state;
  });
  known = found;
  at("table").hidden = found.length === 0;
  at("no-runs").hidden = found.length > 0;
  at("older").hidden = found.length >= count;
  at("how-many").textContent = `${found.length.toLocaleString("en")} of ${count.toLocaleString("en")} runs`;
  choose();
}
function fill(row, run) {
  const had = row.contains(document.activeElement);
  const [, day, h, m, s, label] = /^(\d{4}-\d\d-\d\d)-(\d\d)(\d\d)(\d\d)-(.*)$/.exec(run.id) || [];
  const head = make("th", { scope: "row", title: run.id }, make("strong", {}, label || run.id));
  if (run.name !== label) head.append(make("small", {}, run.name));
  head.append(make("small", {}, [day && `${day} ${h}:${m}:${s}`, run.requests].filter(Boolean).join(" · ")));
  if (run.load) head.append(make("span", { className: `badge ${run.load === "saturated" ? "bad" : "fair"}` }, run.load));
  if (run.state === "done") row.replaceChildren(...result(run, head));
  else row.replaceChildren(make("td"), head, make("td", { colSpan: 10, className: "under-way" }, ...underWay(run)), make("td", {}, make("div", { className: "ending" }, ...ending(run))));
  if (run.state === "running") advance(row, run);
  if (had) (row.querySelector("a, button") || at("table")).focus();
}
function result(run, head) {
  const figures = Object.values(run.cells).map((each) => make("td", { className: "n" }, each));
  const slo = make("td");
  if (run.slo) {
    slo.append(make("span", { className: `badge ${run.slo.missed.length ? "bad" : "good"}` }, run.slo.missed.length ? `${run.slo.met} of ${run.slo.of} met` : "met"));
    slo.append(...run.slo.missed.map((each) => make("small", {}, each)));
  } else slo.append("-");
  const box = make("input", { type: "checkbox", checked: picked.has(run.id), ariaLabel: `Compare ${run.id}`, disabled: !run.has_tables,
    onchange: (event) => { event.target.checked ? picked.add(run.id) : picked.delete(run.id); choose(); } });
  const link = make("a", { href: `report?${new URLSearchParams({ run: run.id })}`, target: "_blank", rel: "noopener", ariaLabel: `Report of ${run.id}` }, "Report");
  return [make("td", {}, box), head, ...figures, slo, make("td", {}, make("div", { className: "ending" }, ...(run.has_tables ? [link] : []), remover(run)))];
}
function underWay(run) {
  if (run.state === "queued") return ["waits for its turn"];
  if (run.state === "running") return [make("progress", { ariaLabel: "Requests that are done" }), make("span", {}, "starting")];
  if (run.state === "cancelled") return ["cancelled: nothing was kept"];
  return run.problems.flatMap((each) => [make("span", { className: "problem" }, [each.file && `${each.file}${each.line ? `:${each.line}:${each.column}` : ""}: `, each.message].filter(Boolean).join("")), ...(each.hint ? [make("small", {}, each.hint)] : [])]);
}
function advance(row, run) {
  if (!run.total) return;
  const bar = row.querySelector("progress");
  bar.max = run.total;
  bar.value = run.done;
  bar.nextElementSibling.textContent = `${run.done.toLocaleString("en")} of ${run.total.toLocaleString("en")} requests`;
}
function ending(run) {
  if (!isUnderWay(run)) {
    const link = make("a", { href: `asked?${new URLSearchParams({ run: run.id })}`, target: "_blank", rel: "noopener", ariaLabel: `Scenario of ${run.id}` }, "Scenario");
    return [...(run.has_scenario ? [link] : []), remover(run)];
  }
  const button = make("button", { type: "button", className: "button", ariaLabel: `Cancel ${run.id}` }, "Cancel");
  button.addEventListener("click", async () => {
    button.disabled = true;
    await ask("api/cancel", { id: run.id }).catch(() => {});
    poll();
  });
  return [button];
}
function remover({ id }) {
  return make("button", { type: "button", className: "button", ariaLabel: `Delete ${id}`, onclick: () => {
    doomed = id;
    at("deleting-id").textContent = id;
    at("deleting-problem").textContent = "";
    at("deleting").showModal();
  } }, "Delete");
}
at("deleting-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const id = doomed, row = rows.get(id), beside = row && (row.nextElementSibling || row.previousElementSibling);
  try {
    await ask("api/delete", { id });
    at("deleting").close();
    tell(`${id} deleted`);
    const next = beside && beside.querySelector("td:last-child button");
    await poll();
    (next && next.isConnected ? next : at("table").hidden ? at("run") : at("table")).focus();
  } catch (error) { at("deleting-problem").textContent = [error.message, ...(error.answer?.problems || []).map((p) => p.hint)].filter(Boolean).join(": "); }
});
at("deleting-cancel").addEventListener("click", () => at("deleting").close());
at("show-older").addEventListener("click", async () => {
  const last = at("runs").lastElementChild;
  limit += STEP;
  await poll();
  tell(at("how-many").textContent);
  const next = last.nextElementSibling?.querySelector("input:enabled, a, button");
  if (next) next.focus();
});
at("run-form").addEventListener("submit", (event) => { event.preventDefault(); run(); });
async function run() {
  const { text, name, origin } = current;
  try {
    await ask("api/runs", { text, name, origin, label: at("label").value });
    tell("queued");
    await poll();
    if (at("table").getBoundingClientRect().top > innerHeight - 60) at("table").scrollIntoView({ block: "nearest" });
  } catch (error) { if (error instanceof Refused) judge({ problems: error.answer.problems || [], lines: [] }); }
}

// ---- two runs and what differs
let compared = "";
async function choose() {
  const ids = [...picked].sort(), link = at("compare");
  at("chosen").textContent = ids.length === 1 ? "Choose another run to compare with." : "";
  link.hidden = ids.length < 2;
  if (!link.hidden) link.href = `compare?${new URLSearchParams(ids.map((id) => ["run", id]))}`;
  link.textContent = `Compare ${ids.length} runs`;
  if (ids.join() === compared) return;
  compared = ids.join();
  at("differences").hidden = true;
  if (ids.length !== 2) return;
  const found = await ask(`api/differences?${new URLSearchParams(ids.map((id) => ["run", id]))}`).catch(() => []);
  if (compared !== ids.join()) return;
  const shown = (value) => value === null ? "-" : typeof value === "string" ? value : JSON.stringify(value);
  at("first-run").textContent = ids[0];
  at("second-run").textContent = ids[1];
  at("changed").replaceChildren(...found.map(([path, one, two]) => make("tr", {}, make("th", { scope: "row" }, path), make("td", {}, shown(one)), make("td", {}, shown(two)))));
  if (!found.length) at("changed").replaceChildren(make("tr", {}, make("th", { scope: "row" }, "nothing but the name"), make("td"), make("td")));
  at("differences").hidden = false;
}

// ---- keys, leaving and coming back
addEventListener("keydown", (event) => {
  if (!(event.ctrlKey || event.metaKey) || document.querySelector("dialog[open]")) return;
  if (event.key === "s") { event.preventDefault(); saveHere(); }
  if (event.key === "Enter") { event.preventDefault(); run(); }
});
addEventListener("beforeunload", (event) => { if ([...documents.values()].some((doc) => isDirty(doc) && doc.text !== NEW)) event.preventDefault(); });
addEventListener("focus", () => { lookAgain().catch(() => {}); poll(); });

const first = await list();
if (first.names.length) await open("folder", first.names[0]).catch(onConflict);
else if (first.examples.includes("demo.yaml")) await open("example", "demo.yaml").catch(onConflict);
else at("new").click();
poll();
