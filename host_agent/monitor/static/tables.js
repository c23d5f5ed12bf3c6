// Tables of live rows. A table draws at most `limit` rows, the worst first, and touches only cells whose text changed.

const STEP = 50; // rows at first, and more with each press of "more"

export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "class") made.className = value;
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

// What others say is only ever set as text.
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

const WORST = { red: 0, amber: 1, "": 2 };
export const SIGN = { red: "✖ ", amber: "▲ ", "": "" };
export const SAID = { red: "wrong", amber: "look at it", "": "" };

export class TableView {
  // columns: [{title, text(row, now), number}], states: names that the select offers
  constructor(section, { title, columns, states = [], stateOf = (row) => row.state, order, open, empty }) {
    Object.assign(this, { columns, stateOf, order, open });
    this.rows = new Map();
    this.drawn = new Map();
    this.limit = STEP;
    this.dirty = true;
    this.filter = [];
    const id = section.id;
    this.count = element("span", { class: "count", id: `${id}-count` });
    const head = element("h2", { id: `${id}-title` }, `${title} `, this.count);
    this.select = element("select", { "aria-label": `${title}: state` });
    for (const state of ["all", "wrong", ...states]) this.select.append(element("option", { value: state }, state));
    this.select.addEventListener("change", () => this.touch());
    this.body = element("tbody", { role: "rowgroup" });
    const row = element("tr", { role: "row" }); // roles, because narrow screens take the table's display away
    for (const column of columns) {
      row.append(element("th", { scope: "col", role: "columnheader", class: column.number ? "number" : "" }, column.title));
    }
    this.table = element("table", { role: "table", "aria-labelledby": `${id}-title` }, element("thead", { role: "rowgroup" }, row), this.body);
    this.more = element("button", { class: "more", type: "button" }, "more");
    this.more.addEventListener("click", () => {
      this.limit += STEP;
      this.touch();
      this.draw(Date.now() / 1000);
    });
    this.empty = element("p", { class: "empty" }, empty);
    section.append(
      element("div", { class: "title" }, head, this.select),
      element("div", { class: "scroll" }, this.table),
      this.empty,
      this.more,
    );
    this.body.addEventListener("click", (event) => this.chosen(event));
    this.body.addEventListener("keydown", (event) => this.key(event));
  }

  touch() {
    this.dirty = true;
  }

  reset(rows) {
    this.rows = new Map(Object.entries(rows));
    for (const row of this.rows.values()) this.prepare(row);
    this.touch();
  }

  change(rows) {
    for (const [key, row] of Object.entries(rows)) {
      if (row === null) this.rows.delete(key);
      else {
        this.prepare(row);
        this.rows.set(key, row);
      }
    }
    this.touch();
  }

  prepare(row) {
    const words = [];
    for (const value of Object.values(row)) if (typeof value === "string") words.push(value);
    row.words = words.join(" ").toLowerCase();
  }

  find(words) {
    this.filter = words;
    this.touch();
  }

  matching() {
    const state = this.select.value;
    const found = [];
    for (const [key, row] of this.rows) {
      if (state === "wrong" ? !row.level : state !== "all" && this.stateOf(row) !== state) continue;
      if (this.filter.every((word) => row.words.includes(word))) found.push([key, row]);
    }
    return found.sort(([, a], [, b]) => WORST[a.level] - WORST[b.level] || this.order(a, b));
  }

  draw(now) {
    if (!this.dirty) return;
    this.dirty = false;
    const found = this.matching();
    setText(this.count, found.length === this.rows.size ? `${found.length}` : `${found.length} of ${this.rows.size}`);
    const shown = found.slice(0, this.limit);
    const keys = new Set(shown.map(([key]) => key));
    for (const [key, line] of this.drawn) {
      if (!keys.has(key)) {
        line.remove();
        this.drawn.delete(key);
      }
    }
    let place = this.body.firstChild;
    for (const [key, row] of shown) {
      let line = this.drawn.get(key);
      if (line === undefined) {
        line = element("tr", this.open ? { role: "row", tabindex: "0" } : { role: "row" });
        line.dataset.key = key;
        for (const column of this.columns) {
          const cell = element("td", { role: "cell", class: column.number ? "number" : "" });
          cell.dataset.title = column.title;
          line.append(cell);
        }
        this.drawn.set(key, line);
      }
      if (line !== place) this.body.insertBefore(line, place);
      else place = place.nextSibling;
      if (line.className !== row.level) line.className = row.level;
      this.columns.forEach((column, index) => setText(line.cells[index], column.text(row, now)));
    }
    this.more.hidden = found.length <= this.limit;
    setText(this.more, `show ${Math.min(STEP, found.length - this.limit)} more of ${found.length}`);
    this.empty.hidden = this.rows.size > 0;
    this.table.hidden = this.rows.size === 0;
  }

  chosen(event) {
    const line = event.target.closest("tr");
    if (line && this.open) this.open(line.dataset.key);
  }

  key(event) {
    const line = event.target.closest("tr");
    if (!line) return;
    const next = { ArrowDown: line.nextElementSibling, ArrowUp: line.previousElementSibling }[event.key];
    if (next) {
      next.focus();
      event.preventDefault();
    } else if (event.key === "Enter") this.chosen(event);
  }
}
