"""The monitor's view for a terminal, on textual."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.widgets import DataTable, Footer, Input, Static, TabbedContent, TabPane

from host_agent.broker.watch import WatchSettings
from host_agent.control_client import Endpoint, endpoints

from .gather import Gatherer
from .model import Model
from .table import Row

MOST_ROWS = 200
TROUBLES = 4
STYLES = {"red": "bold red", "amber": "yellow", "": ""}
SIGNS = {"red": "✖ ", "amber": "▲ ", "": ""}
_ORDER = {"red": 0, "amber": 1, "": 2}

Column = tuple[str, Callable[[Row, float], str]]


def _seconds(value: Any) -> str:
    if not isinstance(value, (int, float)):
        return ""
    return f"{value:.1f} s" if value < 120 else f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"


def _bytes(value: Any) -> str:
    if not isinstance(value, (int, float)):
        return "unknown"
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return ""


def _known(value: Any) -> str:
    return "unknown" if value is None else str(value)


def _why(row: Row, now: float) -> str:
    return f"{row['what']}. To do: {row['todo']}" if row["level"] else ""


def _state(row: Row, now: float) -> str:
    if row["state"] != "ended":
        return str(row["state"])
    return f"exit {row['exit_code']}" if row["outcome"] == "exited" else str(row["outcome"])


def _ran(row: Row, now: float) -> str:
    if row["wall_s"] is not None:
        return _seconds(row["wall_s"])
    return _seconds((row["ended"] or now) - (row["started"] or row["asked"] or now))


TABLES: dict[str, list[Column]] = {
    "guests": [
        ("Guest", lambda r, now: str(r["vm"])),
        ("State", lambda r, now: f"{r['state']}, agent {r['agent']}" if r["state"] == "running" else str(r["state"])),
        ("Last heard", lambda r, now: "never" if r["seen"] is None else _seconds(max(0.0, now - r["seen"]))),
        ("CPU", lambda r, now: "" if r["cpu"] is None else f"{r['cpu']} %"),
        ("Commands", lambda r, now: str(r["commands"])),
        ("Image", lambda r, now: str(r["image"])),
        ("Host", lambda r, now: str(r["host"])),
        ("Why, and what to do", _why),
    ],
    "commands": [
        ("Command", lambda r, now: str(r["argv"])[:60]),
        ("State", _state),
        ("Guest", lambda r, now: str(r["vm"])),
        ("Time", _ran),
        ("Done", lambda r, now: "" if r["fraction"] is None else f"{100 * r['fraction']:.0f} %"),
        ("Id", lambda r, now: str(r["command"])),
        ("Why, and what to do", _why),
    ],
    "copies": [
        ("Copy", lambda r, now: f"{r['direction']} {r['path']}"),
        ("Guest", lambda r, now: str(r["vm"])),
        ("Bytes", lambda r, now: _bytes(r["bytes"])),
        ("Rate", lambda r, now: "" if r["ended"] or r["rate"] is None else f"{_bytes(r['rate'])}/s"),
        ("Why, and what to do", _why),
    ],
    "checkpoints": [
        ("Guest", lambda r, now: str(r["vm"])),
        ("What", lambda r, now: f"{r['action']} {r['snapshot'] or ''}"),
        ("Ago", lambda r, now: _seconds(now - (r["time"] or now))),
        ("Took", lambda r, now: _seconds(r["seconds"])),
        ("Why, and what to do", _why),
    ],
    "brokers": [
        ("Broker", lambda r, now: f"{r['kind']} {r['name']}"),
        ("Of", lambda r, now: str(r["host"])),
        ("Connections", lambda r, now: _known(r["connections"])),
        ("Messages", lambda r, now: _known(r["messages"])),
        ("Memory", lambda r, now: _bytes(r["memory_bytes"])),
        ("Dead letters", lambda r, now: _known(r["dead_letters"])),
        ("Why, and what to do", _why),
    ],
    "hosts": [
        ("Host", lambda r, now: str(r["host"])),
        ("Version", lambda r, now: str(r["version"] or "")),
        ("Load", lambda r, now: _known(r["load"])),
        ("Memory free", lambda r, now: _bytes(r["memory_available_bytes"])),
        ("Why, and what to do", _why),
    ],
    "events": [
        ("When", lambda r, now: time.strftime("%H:%M:%S", time.localtime(r["time"]))),
        ("What", lambda r, now: str(r["event"])),
        ("In words", lambda r, now: str(r["text"])),
        ("Host", lambda r, now: str(r["host"])),
    ],
}


class Top(App[None]):
    """Looks, draws what is chosen, and looks again."""

    TITLE = "vmctl top"
    AUTO_FOCUS = "#table-guests"
    CSS = """
    #summary { height: 1; }
    #troubles { height: auto; max-height: 5; }
    #filter { height: 3; display: none; }
    #filter.shown { display: block; }
    DataTable { height: 1fr; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "quit", "end"),
        Binding("slash", "filter", "filter"),
        Binding("escape", "clear", "all rows"),
        *(Binding(str(number), f"show('{name}')", name, show=False) for number, name in enumerate(TABLES, start=1)),
    ]

    def __init__(
        self,
        every: float,
        find: Callable[[], list[Endpoint]] = endpoints,
        brokers: Sequence[WatchSettings] = (),
    ) -> None:
        super().__init__()
        self._every = every
        self._model = Model()
        self._gatherer = Gatherer(self._model, find, brokers)
        self._words: list[str] = []

    def compose(self) -> ComposeResult:
        yield Static(id="summary")
        yield Static(id="troubles")
        yield Input(placeholder="words that must all occur in a row", id="filter", disabled=True)
        with TabbedContent():
            for number, name in enumerate(TABLES, start=1):
                with TabPane(f"{number} {name}", id=name):
                    yield DataTable(id=f"table-{name}", cursor_type="row", zebra_stripes=True)
        yield Footer()

    def on_mount(self) -> None:
        for name, columns in TABLES.items():
            table: DataTable[Text] = self.query_one(f"#table-{name}", DataTable)
            table.add_columns(*(title for title, _ in columns))
        self.run_worker(self._follow(), exclusive=True)

    async def _follow(self) -> None:
        while True:
            # In a thread: an agent that hangs must not make the keys hang.
            await asyncio.to_thread(self._gatherer.look)
            if not self.query("#summary"):
                return  # it was ended meanwhile
            self.draw()
            await asyncio.sleep(self._every)

    def draw(self) -> None:
        """The table that is shown, and the lines above it."""
        model, now = self._model, self._model.clock()
        running = sum(row["state"] == "running" for _, row in model.guests)
        work = sum(row["state"] != "ended" for _, row in model.commands)
        troubles = model.troubles()
        self.query_one("#summary", Static).update(
            Text(
                f"{len(model.hosts)} hosts · {running} of {len(model.guests)} guests run · {work} commands run · "
                f"{len(troubles)} troubles"
            )
        )
        lines = [
            Text(f"{SIGNS[each['level']]}{each['what']}  To do: {each['todo']}", STYLES[each["level"]])
            for each in troubles[:TROUBLES]
        ]
        self.query_one("#troubles", Static).update(Text("\n").join(lines))
        name = self.query_one(TabbedContent).active
        if name in TABLES:
            self._fill(name, now)

    def _fill(self, name: str, now: float) -> None:
        table: DataTable[Text] = self.query_one(f"#table-{name}", DataTable)
        place = table.cursor_row
        table.clear()
        for row in self._rows(name):
            style = STYLES[row.get("level", "")] if name != "events" else ""
            # What guests say is text, not markup, and moves no cursor.
            cells = [Text(_printable(text(row, now)), style) for _, text in TABLES[name]]
            table.add_row(*cells)
        if table.row_count:
            table.move_cursor(row=min(place, table.row_count - 1))

    def _rows(self, name: str) -> list[Row]:
        if name == "events":
            rows = list(reversed(self._model.events))
        else:
            rows = [row for _, row in self._model.tables[name]]
            rows.sort(key=lambda row: (_ORDER[row["level"]], str(row.get("vm") or row["host"])))
        if self._words:
            rows = [row for row in rows if _matches(row, self._words)]
        return rows[:MOST_ROWS]

    # -- keys

    def action_show(self, name: str) -> None:
        self.query_one(TabbedContent).active = name
        self._to_table()

    def on_tabbed_content_tab_activated(self) -> None:
        self.draw()

    def action_filter(self) -> None:
        box = self.query_one("#filter", Input)
        box.disabled = False
        box.add_class("shown")
        box.focus()

    def action_clear(self) -> None:
        box = self.query_one("#filter", Input)
        box.value = ""
        box.remove_class("shown")
        self._to_table()
        box.disabled = True

    def on_input_changed(self, event: Input.Changed) -> None:
        self._words = event.value.lower().split()
        self.draw()

    def on_input_submitted(self) -> None:
        self._to_table()

    def _to_table(self) -> None:
        self.query_one(f"#table-{self.query_one(TabbedContent).active}", DataTable).focus()

    def on_unmount(self) -> None:
        self._gatherer.close()


def _matches(row: Row, words: list[str]) -> bool:
    text = " ".join(value for value in row.values() if isinstance(value, str)).lower()
    return all(word in text for word in words)


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in text)
