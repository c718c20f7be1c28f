// The page: asks the API, shows tables. Everything that comes from the API is hostile (paths, routes, names of
// processes) and reaches the document through textContent and encodeURIComponent only.
"use strict";

const FORMATS = ["svg", "tree", "text", "folded", "pprof", "speedscope"];
const VIEWS = ["wall", "cpu"];
const REFRESH_MS = 5000;
// A list that takes long to compute is not asked for all the time.
const PATIENCE = 10;
const PAGE_ROWS = 100;

const $ = (selector) => document.querySelector(selector);

function element(name, props = {}, ...children) {
  const e = document.createElement(name);
  Object.assign(e, props);
  e.append(...children);
  return e;
}

function duration(ns) {
  if (ns === null || ns === undefined) return "–";
  if (ns >= 1e9) return (ns / 1e9).toFixed(2) + " s";
  if (ns >= 1e6) return (ns / 1e6).toFixed(1) + " ms";
  return (ns / 1e3).toFixed(0) + " µs";
}

const bytes = (n) => (n >= 1 << 20 ? (n / (1 << 20)).toFixed(1) + " MiB" : n >= 1024 ? (n / 1024).toFixed(1) + " KiB" : n + " B");
const two = "2-digit";
const moment = (text) => new Date(text).toLocaleString(undefined, { year: "numeric", month: two, day: two, hour: two, minute: two, second: two, fractionalSecondDigits: 3 });
const sum = (parts) => (parts ? Object.values(parts).reduce((a, b) => a + b, 0) : null);

// label, value of a row, how it is shown, number?
const column = (label, get, show = (v) => v, number = false) => ({ label, get, show, number });

const TABS = {
  routes: {
    url: "/api/v1/routes",
    filters: true,
    sort: { by: "total", down: true },
    empty: "No requests yet. Routes appear as soon as a watched process answers a request.",
    columns: [
      column("service", (r) => r.service),
      column("route", (r) => r.route),
      column("requests", (r) => r.count, (v) => v.toLocaleString(), true),
      column("errors", (r) => r.errors, (v) => (v ? v.toLocaleString() : "0"), true),
      column("p50", (r) => r.p50_ns, duration, true),
      column("p95", (r) => r.p95_ns, duration, true),
      column("p99", (r) => r.p99_ns, duration, true),
      column("slowest", (r) => r.max_ns, duration, true),
      column("total", (r) => r.total_ns, duration, true),
      column("sampled CPU", (r) => r.sampled_cpu_ns, duration, true),
      column("on CPU", (r) => r.on_cpu_ns, duration, true),
      column("off CPU", (r) => sum(r.off_cpu_ns), duration, true),
    ],
    key: (r) => "#route/" + encodeURIComponent(r.service) + "/" + encodeURIComponent(r.route ?? ""),
  },
  requests: {
    url: "/api/v1/requests",
    filters: true,
    // The server sorts these, since there may be more than one page.
    sort: { by: "start", down: true },
    empty: "No request matches.",
    columns: [
      column("start", (r) => r.start, moment),
      column("service", (r) => r.service),
      column("method", (r) => r.method),
      column("path", (r) => r.path),
      column("route", (r) => r.route),
      column("status", (r) => r.status, (v) => v ?? "–", true),
      column("duration", (r) => r.duration_ns, duration, true),
      column("first byte", (r) => r.ttfb_ns, duration, true),
      column("samples", (r) => r.samples, (v) => v.toLocaleString(), true),
      column("outcome", (r) => r.outcome),
      column("pid", (r) => r.pid, (v) => v, true),
    ],
    key: (r) => "#request/" + encodeURIComponent(r.id),
  },
  targets: {
    url: "/api/v1/targets",
    sort: { by: "pid", down: false },
    empty: "No process is watched yet.",
  },
  status: { url: "/api/v1/status" },
};

const SERVER_SORTED = ["start", "duration"];
const state = { tab: null, rows: [], next: null, chosen: null, view: remembered(), detail: null, generation: 0, took: 0, graph: null };

// Without off-CPU time the wall view of most requests is one block, so CPU time comes first.
function remembered() {
  try {
    const view = localStorage.getItem("reqprof.view");
    return VIEWS.includes(view) ? view : "cpu";
  } catch {
    return "cpu";
  }
}

function remember(view) {
  state.view = view;
  try {
    localStorage.setItem("reqprof.view", view);
  } catch {
    // Where nothing may be stored, the choice lasts as long as the page.
  }
}

// The API's names of what the page calls otherwise.
const WORDS = { min_duration: "slower than", max_duration: "faster than" };
const inWords = (text) => text.replace(/`?\b(min_duration|max_duration)\b`?/g, (_, name) => "“" + WORDS[name] + "”");

async function checked(response) {
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw new Error(inWords(body?.error?.message ?? "HTTP " + response.status));
}

async function ask(url) {
  const begun = performance.now();
  const response = await checked(await fetch(url));
  const body = await response.json();
  state.took = performance.now() - begun;
  return body;
}

function filters() {
  const query = new URLSearchParams();
  for (const [name, value] of new FormData($("#filters"))) if (value.trim()) query.set(name, value.trim());
  return query;
}

function problem(error) {
  $("#problem").hidden = !error;
  $("#problem").textContent = error ? "Cannot show this: " + error.message : "";
}

async function load(more = false) {
  const tab = TABS[state.tab];
  const generation = ++state.generation;
  const query = tab.filters ? filters() : new URLSearchParams();
  if (state.tab === "requests") {
    if (SERVER_SORTED.includes(tab.sort.by)) query.set("sort", (tab.sort.down ? "-" : "") + tab.sort.by);
    if (more && state.next) query.set("cursor", state.next);
  }
  try {
    const body = await ask(tab.url + (query.size ? "?" + query : ""));
    // A slow answer must not replace that of a later question.
    if (generation !== state.generation) return;
    problem(null);
    if (state.tab === "status") {
      showStatus(body);
      return;
    }
    const rows = body[state.tab];
    state.rows = more ? state.rows.concat(rows) : rows;
    state.next = body.next;
    // Part of the rows in an order that only the page knows would look like the whole.
    if (state.tab === "requests" && state.next && !SERVER_SORTED.includes(tab.sort.by)) {
      tab.sort = { by: "start", down: true };
    }
    draw();
  } catch (error) {
    if (generation === state.generation) problem(error);
  }
}

async function health() {
  const e = $("#health");
  try {
    const response = await fetch("/-/ready");
    const body = response.ok ? null : await response.json();
    e.className = response.ok ? "good" : "bad";
    e.textContent = response.ok ? "● ready" : "● not ready: " + body.error.message;
  } catch {
    e.className = "bad";
    e.textContent = "● the daemon does not answer";
  }
}

// What a value says, for people: what works on a target, a runtime, a list, anything else.
function words(v) {
  if (v === null || v === undefined) return "–";
  if (Array.isArray(v)) return v.length ? v.map(words).join(", ") : "–";
  if (typeof v !== "object") return typeof v === "number" ? v.toLocaleString() : String(v);
  const { works, state, name, version, detail, ...rest } = v;
  const parts = [works === undefined ? state : works ? "yes" : "no", name && version ? name + " " + version : name ?? version, detail];
  for (const [key, value] of Object.entries(rest)) parts.push(key.replaceAll("_", " ") + " " + words(value));
  return parts.filter((part) => part !== null && part !== undefined && part !== "").join(": ") || "–";
}

const TARGETS_FIRST = ["pid", "service", "runtime", "ports", "boundary", "interpreter_stacks", "native_stacks", "other_protocols", "exe"];

function columns() {
  const tab = TABS[state.tab];
  // A column of which nothing is known yet would only take room.
  if (tab.columns) return tab.columns.filter((c) => !state.rows.length || c.label === "status" || state.rows.some((r) => c.get(r) !== null));
  // Targets say different things from version to version: every field is a column.
  const names = new Set(TARGETS_FIRST);
  for (const row of state.rows) for (const name of Object.keys(row)) names.add(name);
  // A pid is a name, not a quantity: no thousands separators.
  const plain = (name) => (v) => (name === "pid" || name === "ppid" || name === "ports" ? (Array.isArray(v) ? v.join(", ") || "–" : String(v)) : words(v));
  return [...names].map((name) => column(name.replaceAll("_", " "), (r) => r[name] ?? null, plain(name), name === "pid"));
}

// The status as cards: what is one word first, then what has parts of its own, a table each.
function showStatus(status) {
  const objects = Object.entries(status).filter(([, v]) => v !== null && typeof v === "object" && !Array.isArray(v));
  const plain = Object.entries(status).filter(([name]) => !objects.some(([other]) => other === name));
  const flat = (parts) => Object.entries(parts).flatMap(([name, v]) => {
    const nested = v !== null && typeof v === "object" && !Array.isArray(v) && v.state === undefined;
    return nested ? Object.entries(v).map(([inner, value]) => [name + ": " + inner, value]) : [[name, v]];
  });
  const card = (title, rows) => {
    const cells = rows.map(([name, value]) => {
      const size = /bytes/.test(name) && typeof value === "number";
      const shown = element("td", { textContent: size ? bytes(value) : words(value), title: size ? value + " B" : "" });
      const bad = value?.state === "failed" || (title === "lost" && value > 0);
      if (bad) shown.classList.add("error");
      return element("tr", {}, element("td", { textContent: /[./]/.test(name) ? name : name.replaceAll("_", " ") }), shown);
    });
    return element("section", {}, element("h2", { textContent: title.replaceAll("_", " ") }), element("table", {}, element("tbody", {}, ...cells)));
  };
  $("#status").replaceChildren(card("daemon", plain), ...objects.map(([name, parts]) => card(name, flat(parts))));
}

function sorted(rows, all) {
  const tab = TABS[state.tab];
  if (state.tab === "requests" && SERVER_SORTED.includes(tab.sort.by)) return rows;
  const by = all.find((c) => c.label === tab.sort.by);
  if (!by) return rows;
  const direction = tab.sort.down ? -1 : 1;
  const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b)));
  return [...rows].sort((a, b) => {
    const [x, y] = [by.get(a), by.get(b)];
    // What is unknown comes last, whichever way.
    if (x === null || y === null) return (x === null) - (y === null);
    return direction * compare(x, y);
  });
}

function draw() {
  const tab = TABS[state.tab];
  const all = columns();
  const focused = document.activeElement?.dataset?.key;
  const heads = all.map((c) => {
    const chosen = tab.sort.by === c.label;
    if (state.tab === "requests" && state.next && !SERVER_SORTED.includes(c.label)) {
      const why = "While there are more rows, they can be sorted by start and duration only";
      return element("th", { className: c.number ? "number" : "", scope: "col", title: why, textContent: c.label });
    }
    const button = element("button", { type: "button", textContent: c.label + (chosen ? (tab.sort.down ? " ↓" : " ↑") : "") });
    button.onclick = () => {
      tab.sort = { by: c.label, down: chosen ? !tab.sort.down : c.number };
      if (state.tab === "requests" && SERVER_SORTED.includes(c.label)) load();
      else draw();
    };
    const head = element("th", { className: c.number ? "number" : "", scope: "col" }, button);
    if (chosen) head.ariaSort = tab.sort.down ? "descending" : "ascending";
    return head;
  });
  $("#list thead").replaceChildren(element("tr", {}, ...heads));
  const rows = sorted(state.rows, all).map((r) => {
    const cells = all.map((c) => {
      const value = c.get(r);
      const cell = element("td", { textContent: value === null ? "–" : c.show(value), className: c.number ? "number" : "" });
      cell.title = cell.textContent;
      if (value === null) cell.classList.add("unknown");
      if (state.tab === "targets" && value !== null && typeof value === "object" && value.detail) cell.classList.add("words");
      const failed = (c.label === "errors" && value > 0) || (c.label === "status" && value >= 500) || (c.label === "outcome" && !["complete", "upgraded"].includes(value));
      if (failed) cell.classList.add("error");
      return cell;
    });
    const row = element("tr", {}, ...cells);
    if (tab.key) {
      const key = tab.key(r);
      row.className = key === state.chosen ? "link chosen" : "link";
      row.tabIndex = 0;
      row.dataset.key = key;
      row.onclick = () => {
        row.focus({ preventScroll: true });
        location.hash = key;
      };
      row.onkeydown = (event) => {
        if (event.key === "Enter") row.onclick();
      };
    }
    return row;
  });
  $("#list tbody").replaceChildren(...rows);
  if (focused) [...$("#list tbody").children].find((row) => row.dataset.key === focused)?.focus({ preventScroll: true });
  $("#empty").hidden = rows.length > 0;
  $("#empty").textContent = tab.empty ?? "";
  $("#more").hidden = !state.next;
  paused();
}

// Someone who has paged further does not want to be thrown back.
function paused() {
  const stopped = state.rows.length > PAGE_ROWS && state.tab === "requests";
  $("#paused").textContent = stopped ? "paused, because more than one page is shown" : "";
  return stopped;
}

// `profile`: there is a graph; `remark`: what there is to say about it, or in its place.
function describe(title, facts, link, base, query, profile, remark) {
  state.detail = { base, query, remark };
  $("#detail").hidden = false;
  $("#detail h2").textContent = title;
  const items = facts.filter(([, value]) => value !== null && value !== undefined && value !== "");
  $("#detail dl").replaceChildren(...items.map(([name, value]) => element("div", {}, element("dt", { textContent: name }), element("dd", { textContent: value }))));
  $("#related").replaceChildren(...(link ? [link] : []));
  $("#graph").hidden = !profile;
  say(remark, false);
  if (profile) graph();
  else clearGraph();
  $("#detail").scrollIntoView({ block: "nearest" });
}

// What there is to say about a graph, or in its place.
function say(text, failed) {
  $("#note").hidden = !text;
  $("#note").textContent = text;
  $("#note").className = failed ? "error" : "";
}

function clearGraph() {
  state.graph?.abort();
  state.graph = null;
  $("#frame").replaceChildren();
}

async function graph() {
  const { base, query, remark } = state.detail;
  const url = (format) => {
    const q = new URLSearchParams(query);
    q.set("format", format);
    q.set("view", state.view);
    return base + "?" + q;
  };
  $(".views").replaceChildren(
    ...VIEWS.map((view) => {
      const button = element("button", { type: "button", textContent: view === "wall" ? "wall time" : "CPU time", ariaPressed: String(view === state.view) });
      button.onclick = () => {
        remember(view);
        graph();
        $(`.views button:nth-child(${VIEWS.indexOf(view) + 1})`).focus();
      };
      return button;
    }),
  );
  $(".downloads").replaceChildren("download:", ...FORMATS.map((format) => element("a", { href: url(format), download: "", textContent: format })));
  clearGraph();
  const mine = (state.graph = new AbortController());
  say("computing …", false);
  try {
    // A frame shows nothing but the browser's own page when it is given an error, so the graph is asked for first. The
    // server has it at hand then.
    const response = await checked(await fetch(url("svg"), { signal: mine.signal }));
    await response.arrayBuffer();
    say(remark, false);
    // A new frame each time: another address in an old one would be a step for the Back button.
    const frame = element("iframe", { title: "Flame graph", src: url("svg") });
    frame.setAttribute("sandbox", "allow-scripts");
    $("#frame").replaceChildren(frame);
  } catch (error) {
    if (!mine.signal.aborted) say("Cannot show the flame graph: " + error.message, true);
  }
}

function requestsOf(r) {
  // Without a route there is nothing to ask for.
  if (r.route === null) return null;
  const query = new URLSearchParams({ service: r.service, route: r.route });
  return element("a", { href: "#requests?" + query, textContent: "requests of this route" });
}

function showRequest(r) {
  const off = r.off_cpu_ns ? Object.entries(r.off_cpu_ns).filter(([, ns]) => ns > 0).map(([name, ns]) => name + " " + duration(ns)).join(", ") : null;
  const facts = [
    ["start", moment(r.start)],
    ["duration", duration(r.duration_ns)],
    ["first byte after", r.ttfb_ns === null ? null : duration(r.ttfb_ns)],
    ["on CPU", r.on_cpu_ns === null ? null : duration(r.on_cpu_ns)],
    ["waiting for a CPU", r.runqueue_ns === null ? null : duration(r.runqueue_ns)],
    ["off CPU", off],
    ["samples", r.samples + (r.tail_samples ? " + " + r.tail_samples + " after the response" : "")],
    ["lost events", r.lost_events || null],
    ["path", r.path],
    ["service", r.service],
    ["process, thread", r.pid + ", " + r.tid],
    ["request, response", bytes(r.request_bytes) + ", " + bytes(r.response_bytes)],
    ["outcome", r.outcome + (r.note ? ": " + r.note : "")],
    ["boundary, attribution", r.boundary + ", " + r.attribution],
    ["trace", r.trace_id],
    ["id", r.id],
  ];
  // All of its time is `[unsampled]` then, which is a graph too.
  const missed = r.samples === 0;
  const remark = missed ? "No sample hit this request: it used little CPU time. Its route's merged profile may tell more." : r.profile ? "" : "No profile is stored for this request.";
  describe(`${r.method ?? "–"} ${r.route ?? "–"} ${r.status ?? r.outcome}`, facts, requestsOf(r), "/api/v1/requests/" + encodeURIComponent(r.id) + "/profile", {}, r.profile || missed, remark);
}

function showRoute(r) {
  const query = Object.fromEntries(filters());
  query.service = r.service;
  query.route = r.route ?? "";
  const facts = [
    ["requests", r.count.toLocaleString()],
    ["errors", r.errors.toLocaleString()],
    ["p50, p95, p99", [r.p50_ns, r.p95_ns, r.p99_ns].map(duration).join(", ")],
    ["slowest", duration(r.max_ns)],
    ["total duration", duration(r.total_ns)],
    ["sampled CPU time", r.sampled_cpu_ns === null ? null : duration(r.sampled_cpu_ns)],
    ["samples", r.samples.toLocaleString()],
    ["requests with a profile", r.profiles.toLocaleString()],
  ];
  const known = r.route !== null;
  const shown = known && r.profiles > 0;
  const remark = shown ? "" : known ? "No request of this route has a profile yet." : "What these requests asked for was not seen.";
  describe(`${r.service} ${r.route ?? "–"}`, facts, requestsOf(r), "/api/v1/profile", query, shown, remark);
}

function closeDetail() {
  state.chosen = state.detail = null;
  $("#detail").hidden = true;
  clearGraph();
}

// What the address asks for: `#requests`, `#requests?service=…`, `#request/ID`, `#route/SERVICE/ROUTE`.
function wanted() {
  const [path, query] = location.hash.slice(1).split("?", 2);
  let parts;
  try {
    parts = path.split("/").map(decodeURIComponent);
  } catch {
    parts = [];
  }
  if (parts[0] === "request" && parts.length === 2) return { tab: "requests", open: () => openRequest(parts[1]) };
  if (parts[0] === "route" && parts.length === 3) return { tab: "routes", open: () => openRoute(parts[1], parts[2]) };
  return { tab: Object.hasOwn(TABS, parts[0]) ? parts[0] : "routes", query };
}

async function openRequest(id) {
  const known = state.tab === "requests" ? state.rows.find((r) => r.id === id) : null;
  return showRequest(known ?? (await ask("/api/v1/requests/" + encodeURIComponent(id))));
}

async function openRoute(service, route) {
  // An empty one stands for requests whose request line was not seen.
  const is = (r) => r.service === service && (r.route ?? "") === route;
  const query = filters();
  query.set("service", service);
  if (route) query.set("route", route);
  const found = state.rows.find(is) ?? (await ask("/api/v1/routes?" + query)).routes.find(is);
  if (!found) throw new Error("no request of this route in the time that is chosen above");
  return showRoute(found);
}

async function open(show) {
  const hash = location.hash;
  state.chosen = hash;
  try {
    await show();
  } catch (error) {
    if (location.hash !== hash) return;
    state.detail = null;
    $("#detail").hidden = false;
    $("#detail h2").textContent = "Nothing to show";
    $("#detail dl").replaceChildren();
    $("#related").replaceChildren();
    $("#graph").hidden = true;
    say("Cannot show this: " + error.message, true);
  }
  if (state.rows.length) draw();
}

function go() {
  const { tab, query, open: show } = wanted();
  const same = tab === state.tab;
  state.tab = tab;
  if (query !== undefined) {
    const values = new URLSearchParams(query);
    for (const field of $("#filters").elements) {
      if (field.name && field.name !== "since") field.value = values.get(field.name) ?? "";
    }
  }
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === "#" + state.tab) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  if (!same) {
    state.rows = [];
    state.next = null;
    $("#list tbody").replaceChildren();
    $("#empty").hidden = true;
  }
  closeDetail();
  $("#filters").hidden = !TABS[state.tab].filters;
  $("#list").hidden = state.tab === "status";
  $("#status").hidden = state.tab !== "status";
  if (show) open(show);
  if (!same || query !== undefined) load();
  else if (state.rows.length) draw();
}

// Back to the list, at the row from which one came.
function leave() {
  const from = state.chosen;
  if (!from) return;
  location.hash = "#" + state.tab;
  [...$("#list tbody").children].find((row) => row.dataset.key === from)?.focus({ preventScroll: true });
}

async function refresh() {
  if ($("#auto").checked && !document.hidden) {
    await Promise.all([health(), paused() ? null : load()]);
  }
  setTimeout(refresh, Math.max(REFRESH_MS, PATIENCE * state.took));
}

$("#filters").onsubmit = (event) => {
  event.preventDefault();
  load();
};
$("#filters").onreset = () => setTimeout(load);
$("#more").onclick = () => load(true);
$("#close").onclick = leave;
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !event.ctrlKey && !event.metaKey && !event.altKey) leave();
});
window.onhashchange = go;
setTimeout(refresh, REFRESH_MS);
health();
go();
