"""The client's side of a slot, for tests of applications: what a client writes before an application starts, its end of
the shared memory, and what it finds in the slot afterwards. Not for production: nothing of VMwrapper imports it.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Any

from .shared_memory import MEMORY_FILE, SIZE, Channel, SharedMemory

INIT_DATA = """<app_init_data>
<major_version>7</major_version>
<minor_version>20</minor_version>
<release>5</release>
<app_version>104</app_version>
<userid>17</userid>
<teamid>0</teamid>
<hostid>99</hostid>
<app_name>worker</app_name>
<project_preferences>
<color>a & b <blue></color>
<app_name>not this one</app_name>
</project_preferences>
<team_name>R&amp;D &#233;</team_name>
<user_name>A. User</user_name>
<project_dir>/var/lib/boinc & co/projects/example.org</project_dir>
<boinc_dir>/var/lib/boinc & co</boinc_dir>
<authenticator>0123456789abcdef</authenticator>
<wu_name>wu_1</wu_name>
<result_name>wu_1_0</result_name>
<shm_key>{shm_key}</shm_key>
<comm_obj_name>{comm_obj_name}</comm_obj_name>
<slot>3</slot>
<client_pid>{client_pid}</client_pid>
<wu_cpu_time>{wu_cpu_time}</wu_cpu_time>
<starting_elapsed_time>21.5</starting_elapsed_time>
<using_sandbox>0</using_sandbox>
<vm_extensions_disabled>1</vm_extensions_disabled>
<user_total_credit>12.5</user_total_credit>
<host_total_credit>2.5</host_total_credit>
<resource_share_fraction>0.5</resource_share_fraction>
<checkpoint_period>{checkpoint_period}</checkpoint_period>
<fraction_done_start>{fraction_start}</fraction_done_start>
<fraction_done_end>1.000000</fraction_done_end>
<gpu_type></gpu_type>
<gpu_device_num>-1</gpu_device_num>
<gpu_opencl_dev_index>-1</gpu_opencl_dev_index>
<gpu_usage>0.000000</gpu_usage>
<ncpus>1.500000</ncpus>
<rsc_fpops_est>1e12</rsc_fpops_est>
<rsc_fpops_bound>1e15</rsc_fpops_bound>
<rsc_memory_bound>2e8</rsc_memory_bound>
<rsc_disk_bound>1e9</rsc_disk_bound>
<computation_deadline>1893456000.0</computation_deadline>
<vbox_window>0</vbox_window>
<no_priority_change>0</no_priority_change>
<process_priority>{process_priority}</process_priority>
<process_priority_special>-1</process_priority_special>
<host_info>
    <timezone>0</timezone>
    <domain_name>volunteer</domain_name>
    <p_ncpus>4</p_ncpus>
    <p_vendor>GenuineIntel</p_vendor>
    <p_model>A processor</p_model>
    <p_fpops>3.5e9</p_fpops>
    <p_iops>1e10</p_iops>
    <m_nbytes>8e9</m_nbytes>
    <m_swap>1e9</m_swap>
    <d_total>1e11</d_total>
    <d_free>5e10</d_free>
    <os_name>Linux Debian</os_name>
    <os_version>12</os_version>
    <coprocs></coprocs>
</host_info>
<proxy_info>
    <use_http_proxy/>
    <socks_server_name></socks_server_name>
    <http_server_name>proxy.example.org</http_server_name>
    <http_server_port>3128</http_server_port>
    <http_user_name>me</http_user_name>
    <http_user_passwd>secret</http_user_passwd>
    <socks5_user_name></socks5_user_name>
    <no_proxy>localhost</no_proxy>
</proxy_info>
<global_preferences>
   <run_on_batteries>1</run_on_batteries>
   <leave_apps_in_memory>1</leave_apps_in_memory>
   <max_ncpus_pct>50.0</max_ncpus_pct>
   <disk_max_used_gb>2.5</disk_max_used_gb>
   <disk_min_free_gb>1</disk_min_free_gb>
   <disk_max_used_pct>90</disk_max_used_pct>
   <ram_max_used_busy_pct>50</ram_max_used_busy_pct>
   <ram_max_used_idle_pct>90</ram_max_used_idle_pct>
   <max_bytes_sec_up>1000</max_bytes_sec_up>
   <max_bytes_sec_down>2000</max_bytes_sec_down>
   <cpu_usage_limit>80</cpu_usage_limit>
</global_preferences>
{app_files}</app_init_data>
"""


class ClientSide:
    """A slot as a client prepares it, and the client's end of its channels."""

    def __init__(
        self,
        slot: Path,
        *,
        client_pid: int | None = None,
        wu_cpu_time: float = 0.0,
        checkpoint_period: float = 60.0,
        fraction_start: float = 0.0,
        process_priority: int = -1,
        shm_key: int = -1,
        app_files: tuple[str, ...] = (),
    ) -> None:
        self.slot = slot
        self.values: dict[str, Any] = {
            "client_pid": os.getpid() if client_pid is None else client_pid,
            "wu_cpu_time": wu_cpu_time,
            "checkpoint_period": checkpoint_period,
            "fraction_start": fraction_start,
            "process_priority": process_priority,
            "shm_key": shm_key,
            "app_files": "".join(f"<app_file>{name}</app_file>\n" for name in app_files),
            "comm_obj_name": f"boinc_{os.getpid()}_{slot.name}" if os.name == "nt" else "",
        }
        self.write_init_data()
        self.memory = SharedMemory(self._make_memory())

    def _make_memory(self) -> mmap.mmap:
        if os.name == "nt":
            mapping: Any = mmap.mmap
            return mapping(-1, SIZE, tagname=f"shm_{self.values['comm_obj_name']}")  # type: ignore[no-any-return]
        path = self.slot / MEMORY_FILE
        path.write_bytes(bytes(SIZE))
        with path.open("r+b") as file:
            return mmap.mmap(file.fileno(), SIZE)

    def write_init_data(self, **changes: float | str) -> None:
        self.values.update(changes)
        (self.slot / "init_data.xml").write_text(INIT_DATA.format(**self.values))

    def send(self, channel: Channel, text: str) -> None:
        assert self.memory.put(channel, text), f"{channel.name} is full: {self.memory.take(channel)}"

    def control(self, text: str) -> None:
        self.send(Channel.PROCESS_CONTROL_REQUEST, text)

    def beat(self, more: str = "") -> None:
        """The message of every second; like the client, not when the last one was not read."""
        self.memory.put(Channel.HEARTBEAT, f"<heartbeat/><wss>1.500000e+06</wss><max_wss>2.000000e+09</max_wss>{more}")

    def status(self) -> str | None:
        """The newest report of the application, which is then gone."""
        return self.memory.take(Channel.APP_STATUS)
