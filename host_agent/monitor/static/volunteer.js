// The volunteer's page: asks its host agent every two seconds.
const $ = (id) => document.getElementById(id);
const EVERY = 2000;

const WORDS = {
  defined: "is being made", starting: "is starting", running: "is running", paused: "is paused", saved: "is saved on the disk",
  stopped: "has ended", crashed: "has ended unexpectedly", destroyed: "is gone",
};

function element(name, text = "", className = "") {
  const made = document.createElement(name);
  made.textContent = text;
  if (className) made.className = className;
  return made;
}

function time(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  return seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
}

function vm(each) {
  const box = element("div", "", "vm");
  box.append(element("strong", each.vm), ` ${WORDS[each.state] ?? each.state}`);
  const used = each.memory_used_bytes === null ? "" : `, ${Math.round(each.memory_used_bytes / 1048576)} MB of it in use`;
  const facts = `${each.cpus} processor${each.cpus === 1 ? "" : "s"}, ${each.memory_mb} MB of memory${used}; ${time(each.cpu_s)} of processor time so far`;
  box.append(element("p", facts, "soft"));
  if (each.reason) box.append(element("p", each.reason, "red"));
  return box;
}

function work(each, now) {
  const line = element("li", each.program);
  const runs = each.state === "ended" ? each.outcome : `for ${time(now - (each.started_at ?? each.asked_at ?? now))}`;
  line.append(element("span", ` in ${each.vm}: ${each.state === "running" ? "running" : each.state} ${runs}`, "soft"));
  if (each.fraction !== null && each.state !== "ended") {
    const bar = element("progress");
    bar.max = 1;
    bar.value = each.fraction;
    bar.setAttribute("aria-label", "done");
    line.append(bar, element("span", `${Math.round(100 * each.fraction)} % done`, "soft"));
  }
  return line;
}

async function look() {
  try {
    const answer = await fetch("state");
    const state = await answer.json();
    const none = element("p", "None now.", "soft");
    $("vms").replaceChildren(...(state.vms.length ? state.vms.map(vm) : [none]));
    $("work").replaceChildren(...state.commands.map((each) => work(each, state.now)));
    $("news").replaceChildren(
      ...state.events.map((each) => element("li", `${new Date(each.time * 1000).toLocaleTimeString()}  ${each.text}`)),
    );
    $("connection").textContent = "live";
  } catch {
    $("connection").textContent = "The task has ended, or is being started again.";
  }
  setTimeout(look, EVERY);
}
look();
