// The monitor's page: one stream of events from the monitor, several tables, no other source.
import { SAID, SIGN, TableView, element, setText } from "./tables.js";
import { Plots, short } from "./plots.js";

const EVENTS_KEPT = 500;
const EVENTS_SHOWN = 50;
const OUTPUT_EVERY = 700; // ms
const OUTPUT_KEPT = 64 * 1024; // characters of a stream

const $ = (id) => document.getElementById(id);
const shared = { key: "", control: false, now: 0, at: 0, open: null };

const seconds = (value) => {
  if (value === null || value === undefined) return "";
  const s = Math.max(0, value);
  if (s < 10) return `${s.toFixed(1)} s`;
  if (s < 120) return `${Math.round(s)} s`;
  if (s < 7200) return `${Math.round(s / 60)} min`;
  return s < 172800 ? `${(s / 3600).toFixed(1)} h` : `${Math.round(s / 86400)} days`;
};
const ago = (time, now) => (time === null || time === undefined ? "never" : `${seconds(now - time)} ago`);
const bytes = (value) => (value === null || value === undefined ? "" : `${short(value)}B`.replace(/(\d)B/, "$1 B"));
const known = (value) => (value === null || value === undefined ? "unknown" : short(value));
const clock = (time) => (time ? new Date(time * 1000).toLocaleTimeString([], { hour12: false }) : "");
const named = (row, text) => SIGN[row.level] + text;
const why = (row) => (row.level ? `${row.what}. To do: ${row.todo}` : row.reason || "");
const byName = (a, b) => (a.vm ?? "").localeCompare(b.vm ?? "", undefined, { numeric: true });
const newest = (field) => (a, b) => (b[field] ?? 0) - (a[field] ?? 0);
const state = (row) => (row.state === "ended" ? (row.outcome === "exited" ? `exit ${row.exit_code}` : row.outcome) : row.state);

const views = {
  guests: new TableView($("guests"), {
    title: "Guests",
    states: ["running", "starting", "paused", "saved", "stopped", "crashed"],
    order: byName,
    open: (key) => open("guests", key),
    empty: "No VM of any host agent, and no guest is heard.",
    columns: [
      { title: "Guest", text: (r) => named(r, r.vm) },
      { title: "State", text: (r) => (r.state === "running" ? `running, agent ${r.agent}` : r.state) },
      { title: "Last heard", text: (r, now) => ago(r.seen, now) },
      { title: "CPU", number: true, text: (r) => (r.cpu === null ? "" : `${r.cpu} %`) },
      {
        title: "Memory",
        number: true,
        text: (r) =>
          `${r.memory_used_bytes === null ? "?" : Math.round(r.memory_used_bytes / 1048576)} / ${r.memory_mb ?? "?"} MB`,
      },
      { title: "Commands", number: true, text: (r) => known(r.commands) },
      { title: "Image", text: (r) => r.image ?? "unknown" },
      { title: "Agent", text: (r) => r.agent_version ?? "" },
      { title: "Host", text: (r) => r.host },
      { title: "Why, and what to do", text: why },
    ],
  }),
  commands: new TableView($("commands"), {
    title: "Commands",
    states: ["asked", "running", "ended"],
    order: (a, b) => (a.state === "ended") - (b.state === "ended") || newest("asked")(a, b),
    open: (key) => open("commands", key),
    empty: "No command yet.",
    columns: [
      { title: "Command", text: (r) => named(r, r.argv) },
      { title: "State", text: state },
      { title: "Guest", text: (r) => r.vm ?? "" },
      {
        title: "Time",
        number: true,
        text: (r, now) => seconds(r.wall_s ?? (r.ended ?? now) - (r.started ?? r.asked ?? now)),
      },
      { title: "Done", number: true, text: (r) => (r.fraction === null ? "" : `${Math.round(100 * r.fraction)} %`) },
      { title: "CPU", number: true, text: (r) => seconds(r.cpu_s) },
      { title: "Output", number: true, text: (r) => bytes((r.stdout_bytes ?? 0) + (r.stderr_bytes ?? 0)) },
      { title: "Asked", text: (r) => clock(r.asked) },
      { title: "Id", text: (r) => r.command },
      { title: "Why, and what to do", text: why },
    ],
  }),
  copies: new TableView($("copies"), {
    title: "Copies",
    stateOf: (row) => (row.ended ? (row.failed ? "failed" : "done") : "running"),
    states: ["running", "done", "failed"],
    order: (a, b) => (a.ended !== null) - (b.ended !== null) || newest("asked")(a, b),
    empty: "No copy yet.",
    columns: [
      { title: "Copy", text: (r) => named(r, `${r.direction === "in" ? "→" : "←"} ${r.path}`) },
      { title: "Guest", text: (r) => r.vm ?? "" },
      { title: "State", text: (r) => (r.ended ? (r.failed ? "failed" : "done") : "running") },
      { title: "Bytes", number: true, text: (r) => (r.total ? `${bytes(r.bytes)} of ${bytes(r.total)}` : bytes(r.bytes)) },
      { title: "Rate", number: true, text: (r) => (r.ended || r.rate === null ? "" : `${bytes(r.rate)}/s`) },
      { title: "Asked", text: (r) => clock(r.asked) },
      { title: "Why, and what to do", text: why },
    ],
  }),
  checkpoints: new TableView($("checkpoints"), {
    title: "Checkpoints",
    stateOf: (row) => row.action,
    states: ["snapshot", "save", "restore"],
    order: newest("time"),
    empty: "None since the monitor knows these hosts.",
    columns: [
      { title: "Guest", text: (r) => named(r, r.vm ?? "") },
      { title: "What", text: (r) => `${r.action} ${r.snapshot ?? ""}` },
      { title: "When", text: (r) => clock(r.time) },
      { title: "Took", number: true, text: (r) => seconds(r.seconds) },
      { title: "Host", text: (r) => r.host },
      { title: "Why, and what to do", text: why },
    ],
  }),
  brokers: new TableView($("brokers"), {
    title: "Brokers",
    stateOf: (row) => row.kind,
    states: ["embedded", "activemq", "rabbitmq"],
    order: (a, b) => a.host.localeCompare(b.host),
    open: (key) => open("brokers", key),
    empty: "None yet.",
    columns: [
      { title: "Broker", text: (r) => named(r, `${r.kind} ${r.name}`) },
      { title: "Of", text: (r) => r.host },
      { title: "Connections", number: true, text: (r) => known(r.connections) },
      { title: "Consumers", number: true, text: (r) => known(r.consumers) },
      { title: "Messages", number: true, text: (r) => known(r.messages) },
      {
        title: "Memory",
        number: true,
        text: (r) =>
          r.memory_bytes === null
            ? "unknown"
            : `${bytes(r.memory_bytes)}${r.memory_limit_bytes ? ` of ${bytes(r.memory_limit_bytes)}` : ""}`,
      },
      { title: "Dead letters", number: true, text: (r) => known(r.dead_letters) },
      { title: "Guests and hosts", text: (r) => r.beacons || "not listened to" },
      { title: "Why, and what to do", text: why },
    ],
  }),
  hosts: new TableView($("hosts"), {
    title: "Hosts",
    stateOf: (row) => (row.problem ? "lost" : "up"),
    states: ["up", "lost"],
    order: (a, b) => a.host.localeCompare(b.host),
    empty: "No host agent of this user runs, and none is heard. Start one: vmctl start NAME",
    columns: [
      { title: "Host", text: (r) => named(r, r.host) },
      { title: "Seen through", text: (r) => r.via || "this machine" },
      { title: "Version", text: (r) => r.version ?? "" },
      { title: "Process", number: true, text: (r) => String(r.pid ?? "") },
      { title: "Up", text: (r, now) => (r.started_at ? seconds(now - r.started_at) : "") },
      { title: "Load", number: true, text: (r) => (r.load === null ? "unknown" : `${r.load} of ${r.cpus}`) },
      {
        title: "Memory free",
        number: true,
        text: (r) => (r.memory_bytes ? `${bytes(r.memory_available_bytes)} of ${bytes(r.memory_bytes)}` : "unknown"),
      },
      { title: "Agent's CPU, memory", number: true, text: (r) => `${seconds(r.agent_cpu_s)}, ${bytes(r.agent_rss_bytes)}` },
      { title: "Why, and what to do", text: why },
    ],
  }),
};

// -- events

const events = { all: [], dirty: true, number: 0, skipped: 0 };
const timeline = new TableView($("events"), {
  title: "Events",
  stateOf: (row) => row.event,
  states: ["vm_state", "guest_presence", "command_ended", "copy_ended", "checkpoint", "broker_lost", "refused"],
  order: (a, b) => b.number - a.number,
  empty: "Nothing has happened yet.",
  columns: [
    { title: "When", text: (r) => clock(r.time) },
    { title: "What", text: (r) => r.event },
    { title: "Guest", text: (r) => r.vm ?? "" },
    { title: "In words", text: (r) => r.text },
    { title: "Host", text: (r) => r.host },
  ],
});
timeline.limit = EVENTS_SHOWN;

function addEvents(fresh, skipped = 0) {
  const rows = {};
  for (const event of fresh) {
    event.number = ++events.number;
    event.level = event.level === "error" || event.level === "critical" ? "red" : event.level === "warn" ? "amber" : "";
    event.key = `${event.number}`;
    rows[event.key] = event;
    events.all.push(event.key);
  }
  events.skipped += skipped;
  timeline.change(rows);
  while (events.all.length > EVENTS_KEPT) timeline.rows.delete(events.all.shift());
}
// The newest first, not the worst: this is a time line.
timeline.matching = function () {
  const chosen = this.select.value;
  const found = [];
  for (const [key, row] of this.rows) {
    if (chosen === "wrong" ? !row.level : chosen !== "all" && row.event !== chosen) continue;
    if (this.filter.every((word) => row.words.includes(word))) found.push([key, row]);
  }
  return found.reverse();
};

// -- summary and troubles

const tiles = new Map();
function tile(name, value, level = "") {
  let shown = tiles.get(name);
  if (!shown) {
    shown = element("dd");
    tiles.set(name, shown);
    $("summary").append(element("div", {}, element("dt", {}, name), shown));
  }
  setText(shown, value);
  if (shown.parentElement.className !== level) shown.parentElement.className = level;
}

function summarize() {
  let [running, silent, ended, work, slow, failed, rate] = [0, 0, 0, 0, 0, 0, 0];
  for (const row of views.guests.rows.values()) {
    if (row.level === "red") ended += 1;
    if (row.state === "running") running += 1;
    if (row.agent === "silent") silent += 1;
  }
  for (const row of views.commands.rows.values()) {
    if (row.state !== "ended") work += 1;
    if (row.level === "amber" && row.state !== "ended") slow += 1;
    if (row.level === "red") failed += 1;
  }
  for (const row of views.copies.rows.values()) if (!row.ended) rate += row.rate ?? 0;
  tile("Hosts", String(views.hosts.rows.size), [...views.hosts.rows.values()].some((r) => r.problem) ? "red" : "");
  tile("Guests", `${running} of ${views.guests.rows.size} running`);
  tile("Guests in trouble", String(ended), ended ? "red" : "");
  tile("Silent", String(silent), silent ? "red" : "");
  tile("Commands running", String(work));
  tile("Slow", String(slow), slow ? "amber" : "");
  tile("Failed lately", String(failed), failed ? "red" : "");
  tile("Copies", `${bytes(rate)}/s`);
}

const troubles = { list: [], dirty: true };
function drawTroubles() {
  if (!troubles.dirty) return;
  troubles.dirty = false;
  const place = $("troubles");
  const words = filterWords();
  const list = troubles.list.filter((each) => words.every((word) => each.what.toLowerCase().includes(word))).slice(0, 12);
  while (place.children.length > list.length) place.lastChild.remove();
  list.forEach((each, index) => {
    let line = place.children[index];
    if (!line) {
      line = element("li", {}, element("button", { type: "button", class: "what" }), element("span", { class: "todo" }));
      line.firstChild.addEventListener("click", () => open(line.dataset.table, line.dataset.key));
      place.append(line);
    }
    Object.assign(line.dataset, { table: each.table, key: each.key });
    if (line.className !== each.level) line.className = each.level;
    setText(line.firstChild, `${SIGN[each.level]}${each.what}`);
    setText(line.lastChild, `To do: ${each.todo}`);
  });
  $("all-well").hidden = list.length > 0;
}

// -- one row in full

async function ask(path, body) {
  const options = body === undefined ? {} : {
    method: "POST",
    headers: { "Content-Type": "application/json", "X-VMwrapper-Key": shared.key },
    body: JSON.stringify(body),
  };
  try {
    const answer = await fetch(path, options);
    const text = await answer.text();
    try {
      return JSON.parse(text);
    } catch {
      return { error: text.trim() };
    }
  } catch {
    return { error: "The monitor does not answer." };
  }
}

const streams = { stdout: null, stderr: null };

function open(table, key) {
  if (!views[table]?.rows.has(key)) return;
  shared.open = { table, key };
  for (const name of ["stdout", "stderr"]) {
    streams[name] = { from: null, decoder: new TextDecoder() };
    setText($(name), "");
  }
  setText($("detail-answer"), "");
  $("detail-fields").replaceChildren();
  const elsewhere = table === "commands" && Boolean(views.commands.rows.get(key).via); // its output stays there
  $("detail-output").hidden = table !== "commands" || elsewhere;
  drawControls();
  drawDetail();
  if (!$("detail").open) $("detail").showModal();
  if (table === "commands" && !elsewhere) followOutput(shared.open);
}
$("detail").addEventListener("close", () => (shared.open = null));

function drawControls() {
  const { table, key } = shared.open;
  const row = views[table].rows.get(key);
  const buttons = [];
  const add = (label, action, more) => {
    const button = element("button", { type: "button" }, label);
    button.addEventListener("click", async () => {
      setText($("detail-answer"), `${label} …`);
      const answer = await ask(`control/${action}`, { host: row.host, ...more });
      const said = answer.error ?? (answer.round_trip_s ? `answers in ${seconds(answer.round_trip_s)}` : "done");
      setText($("detail-answer"), `${label}: ${said}`);
    });
    buttons.push(button);
  };
  if (row.via && (table === "guests" || (table === "commands" && row.state !== "ended"))) {
    // A broker lets a monitor read, and write to nobody.
    const say = table === "guests" ? `vmctl ping ${row.vm}` : `vmctl trace ${row.command}`;
    buttons.push(element("span", {}, `It is heard through the broker only, which takes no orders from here: on ${row.host}, ${say}`));
  } else if (shared.control && table === "guests") {
    add("Ping", "ping", { vm: row.vm });
    add("Pause", "pause", { vm: row.vm });
    add("Resume", "resume", { vm: row.vm });
  } else if (shared.control && table === "commands" && row.state !== "ended") {
    for (const signal of ["INT", "TERM", "KILL"]) add(`Signal ${signal}`, "signal", { command: row.command, signal });
  }
  $("detail-control").replaceChildren(...buttons);
}

function drawDetail() {
  if (!shared.open) return;
  const row = views[shared.open.table].rows.get(shared.open.key);
  if (!row) {
    setText($("detail-trouble"), "It is gone.");
    return;
  }
  setText($("detail-title"), String(row.argv ?? row.vm ?? row.name ?? row.host));
  $("detail-trouble").className = row.level;
  setText($("detail-trouble"), row.level ? `${SIGN[row.level]}${SAID[row.level]}: ${why(row)}` : "");
  const fields = $("detail-fields");
  for (const [name, value] of Object.entries(row)) {
    if (["words", "level", "what", "todo", "looked", "moved", "queues"].includes(name)) continue;
    detailField(fields, name, fieldText(name, value));
  }
  for (const queue of row.queues ?? []) {
    const text = `${known(queue.messages)} messages, ${known(queue.consumers)} consumers, ${known(queue.enqueued)} in`;
    detailField(fields, queue.name, text);
  }
}

function fieldText(name, value) {
  if (value === null || value === undefined) return "unknown";
  if (["asked", "started", "ended", "seen", "since", "time", "started_at"].includes(name)) return clock(value);
  return name.endsWith("bytes") ? bytes(value) : String(value);
}

function detailField(fields, name, text) {
  let shown = [...fields.children].find((each) => each.dataset.name === name);
  if (!shown) {
    shown = element("div", {}, element("dt", {}, name.replaceAll("_", " ")), element("dd"));
    shown.dataset.name = name;
    fields.append(shown);
  }
  setText(shown.lastChild, text);
}

async function followOutput(opened) {
  while (shared.open === opened) {
    const row = views.commands.rows.get(opened.key);
    if (!row) return;
    const asked = new URLSearchParams({ host: row.host, command: row.command });
    for (const name of ["stdout", "stderr"]) if (streams[name].from !== null) asked.set(`${name}_from`, streams[name].from);
    const ended = row.state === "ended";
    const answer = await ask(`output?${asked}`);
    if (shared.open !== opened) return;
    if (answer.error) setText($("detail-answer"), answer.error);
    for (const name of ["stdout", "stderr"]) if (answer[name]) takeOutput(name, answer[name]);
    if (ended) return;
    await new Promise((resolve) => setTimeout(resolve, OUTPUT_EVERY));
  }
}

function takeOutput(name, piece) {
  const stream = streams[name];
  const data = Uint8Array.from(atob(piece.data), (character) => character.charCodeAt(0));
  stream.from = piece.offset + data.length;
  if (!data.length) return;
  const box = $(name);
  const atEnd = box.scrollTop + box.clientHeight >= box.scrollHeight - 8;
  box.append(stream.decoder.decode(data, { stream: true }));
  if (box.textContent.length > OUTPUT_KEPT) box.textContent = box.textContent.slice(-OUTPUT_KEPT / 2);
  if (atEnd) box.scrollTop = box.scrollHeight;
}

// -- drawing: at most once a frame, and not while nobody looks

const plots = new Plots($("plots"));
let planned = false;
function plan() {
  if (planned) return;
  planned = true;
  requestAnimationFrame(() => {
    planned = false;
    const now = shared.now + (performance.now() - shared.at) / 1000;
    for (const view of [...Object.values(views), timeline]) view.draw(now);
    drawTroubles();
    summarize();
    drawDetail();
  });
}
setInterval(() => {
  for (const view of Object.values(views)) view.touch();
  if (!document.hidden) plan();
}, 1000);

// -- filter and keys

function filterWords() {
  return $("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
}
$("filter").addEventListener("input", () => {
  const words = filterWords();
  for (const view of [...Object.values(views), timeline]) view.find(words);
  troubles.dirty = true;
  plan();
});
document.addEventListener("keydown", (event) => {
  const typing = ["INPUT", "SELECT", "TEXTAREA"].includes(event.target.tagName);
  if (event.key === "/" && !typing && !$("detail").open) {
    $("filter").focus();
    event.preventDefault();
  } else if (event.key === "Escape" && event.target === $("filter")) {
    $("filter").value = "";
    $("filter").dispatchEvent(new Event("input"));
  }
});
for (const view of [...Object.values(views), timeline]) view.select.addEventListener("change", plan);

// -- the stream

function connection(text, level) {
  setText($("connection"), text);
  $("connection").className = level;
}

function take(message) {
  shared.now = message.now;
  shared.at = performance.now();
  if (message.troubles) Object.assign(troubles, { list: message.troubles, dirty: true });
}

const stream = new EventSource("stream");
stream.addEventListener("state", (event) => {
  const all = JSON.parse(event.data);
  take(all);
  Object.assign(shared, { key: all.key, control: all.control });
  for (const [name, rows] of Object.entries(all.tables)) views[name].reset(rows);
  timeline.reset({});
  events.all = [];
  addEvents(all.events);
  plots.reset(all.points);
  connection(all.control ? "live, with control" : "live", "live");
  plan();
});
stream.addEventListener("change", (event) => {
  const change = JSON.parse(event.data);
  take(change);
  for (const [name, rows] of Object.entries(change.tables ?? {})) views[name].change(rows);
  if (change.events) addEvents(change.events, change.skipped);
  plan();
});
stream.addEventListener("point", (event) => plots.add(JSON.parse(event.data)));
stream.addEventListener("error", () => connection("no connection to the monitor; trying again", "red"));
