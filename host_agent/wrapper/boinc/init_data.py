"""`init_data.xml` to `InitData`.

Read as the client's own library reads it, tag by tag: the file is not always well-formed XML (the project's
preferences are pasted into it, and paths and names are not always escaped). What is missing or cannot be read keeps
its default: an older client says less, a newer one more.
"""

from __future__ import annotations

import re
from pathlib import Path

from .runtime import HostInfo, InitData, Preferences, Proxy

MAX_BYTES = 1 << 20
_GB = 1e9
_ELEMENT = re.compile(r"<([a-z_0-9]+)>([^<]*)</\1>|<([a-z_0-9]+)/>")
_ENTITIES = {"&lt;": "<", "&gt;": ">", "&quot;": '"', "&apos;": "'", "&amp;": "&"}
_ENTITY = re.compile("|".join((*_ENTITIES, r"&#\d{1,7};")))


def read_init_data(path: Path) -> InitData | None:
    """What the file says, or None when it is not one. Raises OSError."""
    with path.open("rb") as file:
        return parse_init_data(file.read(MAX_BYTES).decode("utf-8", "surrogateescape"))


def parse_init_data(text: str) -> InitData | None:
    """What the text of an `init_data.xml` says, or None when it is not one or is cut off."""
    whole = _cut(text, "app_init_data")[1]
    if whole is None:
        return None
    rest, project_preferences = _cut(whole, "project_preferences")
    rest, host = _cut(rest, "host_info")
    rest, proxy = _cut(rest, "proxy_info")
    rest, preferences = _cut(rest, "global_preferences")
    app_files = tuple(_unescape(name) for name in re.findall(r"<app_file>([^<]*)</app_file>", rest))
    top = _Values(rest)
    return InitData(
        standalone=False,
        client_version=".".join(str(top.int(name)) for name in ("major_version", "minor_version", "release")),
        app_name=top.text("app_name"),
        app_version=top.int("app_version"),
        plan_class=top.text("plan_class"),
        app_files=app_files,
        wu_name=top.text("wu_name"),
        result_name=top.text("result_name"),
        project_dir=top.text("project_dir") or ".",
        boinc_dir=top.text("boinc_dir"),
        project_preferences=(project_preferences or "").strip(),
        user_id=top.int("userid"),
        team_id=top.int("teamid"),
        host_id=top.int("hostid"),
        user_name=top.text("user_name"),
        team_name=top.text("team_name"),
        authenticator=top.text("authenticator"),
        slot=top.int("slot"),
        client_pid=top.int("client_pid"),
        shm_key=top.int("shm_key", -1),
        comm_obj_name=top.text("comm_obj_name"),
        wu_cpu_s=top.float("wu_cpu_time"),
        starting_elapsed_s=top.float("starting_elapsed_time"),
        checkpoint_period_s=top.float("checkpoint_period") or InitData().checkpoint_period_s,
        fraction_start=top.float("fraction_done_start"),
        fraction_end=top.float("fraction_done_end", 1.0),
        gpu_type=top.text("gpu_type"),
        gpu_device=top.int("gpu_device_num", -1),
        gpu_opencl_device=top.int("gpu_opencl_dev_index", -1),
        gpu_usage=top.float("gpu_usage"),
        ncpus=top.float("ncpus"),
        fpops_est=top.float("rsc_fpops_est"),
        fpops_bound=top.float("rsc_fpops_bound"),
        memory_bound=top.float("rsc_memory_bound"),
        disk_bound=top.float("rsc_disk_bound"),
        deadline=top.float("computation_deadline"),
        process_priority=_priority(top.int("process_priority", -1)),
        process_priority_special=_priority(top.int("process_priority_special", -1)),
        no_priority_change=top.bool("no_priority_change"),
        using_sandbox=top.bool("using_sandbox"),
        vm_extensions_disabled=top.bool("vm_extensions_disabled"),
        vbox_window=top.bool("vbox_window"),
        user_total_credit=top.float("user_total_credit"),
        host_total_credit=top.float("host_total_credit"),
        resource_share=top.float("resource_share_fraction"),
        host=_host(_Values(host or "")),
        preferences=_preferences(_Values(preferences or "")),
        proxy=_proxy(_Values(proxy or "")),
    )


def _host(values: _Values) -> HostInfo:
    return HostInfo(
        ncpus=values.int("p_ncpus"),
        fpops=values.float("p_fpops"),
        iops=values.float("p_iops"),
        memory_bytes=values.float("m_nbytes"),
        swap_bytes=values.float("m_swap"),
        disk_total_bytes=values.float("d_total"),
        disk_free_bytes=values.float("d_free"),
        domain_name=values.text("domain_name"),
        os_name=values.text("os_name"),
        os_version=values.text("os_version"),
        cpu_vendor=values.text("p_vendor"),
        cpu_model=values.text("p_model"),
        virtualbox_version=values.text("virtualbox_version"),
    )


def _preferences(values: _Values) -> Preferences:
    return Preferences(
        cpu_usage_percent=values.float("cpu_usage_limit"),
        max_ncpus_percent=values.float("max_ncpus_pct"),
        memory_busy_percent=values.float("ram_max_used_busy_pct"),
        memory_idle_percent=values.float("ram_max_used_idle_pct"),
        disk_max_bytes=values.float("disk_max_used_gb") * _GB,
        disk_min_free_bytes=values.float("disk_min_free_gb") * _GB,
        disk_max_percent=values.float("disk_max_used_pct"),
        leave_in_memory=values.bool("leave_apps_in_memory"),
        run_on_batteries=values.bool("run_on_batteries"),
        max_bytes_up_s=values.float("max_bytes_sec_up"),
        max_bytes_down_s=values.float("max_bytes_sec_down"),
    )


def _proxy(values: _Values) -> Proxy:
    http, socks = values.bool("use_http_proxy"), values.bool("use_socks_proxy")
    return Proxy(
        http_host=values.text("http_server_name") if http else "",
        http_port=values.int("http_server_port") if http else 0,
        http_user=values.text("http_user_name") if http else "",
        http_password=values.text("http_user_passwd") if http else "",
        socks_host=values.text("socks_server_name") if socks else "",
        socks_port=values.int("socks_server_port") if socks else 0,
        socks_user=values.text("socks5_user_name") if socks else "",
        socks_password=values.text("socks5_user_passwd") if socks else "",
        no_proxy=values.text("no_proxy"),
    )


def _priority(value: int) -> int:
    """The client counts from 0 (lowest) and says -1 for nothing; we count from 1 to 5, and 0 is nothing."""
    return min(value + 1, 5) if value >= 0 else 0


def _cut(text: str, tag: str) -> tuple[str, str | None]:
    """The text without an element, and the element's inside; None when there is none."""
    start, end = text.find(f"<{tag}>"), text.rfind(f"</{tag}>")
    if start < 0 or end < start:
        return text, None
    return text[:start] + text[end + len(tag) + 3 :], text[start + len(tag) + 2 : end]


class _Values:
    """The simple elements of a text; the first of a name counts."""

    def __init__(self, text: str) -> None:
        self._values: dict[str, str] = {}
        for match in _ELEMENT.finditer(text):
            name, value = (match[1], match[2]) if match[1] else (match[3], "1")
            self._values.setdefault(name, value.strip())

    def text(self, name: str) -> str:
        return _unescape(self._values.get(name, ""))

    def float(self, name: str, default: float = 0.0) -> float:
        try:
            return float(self._values[name])
        except (KeyError, ValueError):
            return default

    def int(self, name: str, default: int = 0) -> int:
        try:
            return int(float(self._values[name]))
        except (KeyError, ValueError, OverflowError):
            return default

    def bool(self, name: str) -> bool:
        return self.float(name) != 0


def _unescape(text: str) -> str:
    return _ENTITY.sub(lambda match: _ENTITIES.get(match[0]) or _character(match[0]), text)


def _character(entity: str) -> str:
    number = int(entity[2:-1])
    return chr(number) if 0 < number < 0x110000 and not 0xD800 <= number < 0xE000 else entity
