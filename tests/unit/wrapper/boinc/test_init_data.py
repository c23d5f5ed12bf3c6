"""`init_data.xml`, also of clients that say less, more or nonsense."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from host_agent.wrapper.boinc.init_data import parse_init_data, read_init_data
from host_agent.wrapper.boinc.runtime import HostInfo, InitData, Preferences, Proxy
from host_agent.wrapper.boinc.testing import INIT_DATA, ClientSide


def test_every_field(tmp_path: Path) -> None:
    files = ("worker_1.04", "job_1.04.xml")
    ClientSide(tmp_path, client_pid=4711, wu_cpu_time=12.25, process_priority=2, app_files=files)
    data = read_init_data(tmp_path / "init_data.xml")
    assert data == InitData(
        standalone=False,
        client_version="7.20.5",
        app_name="worker",
        app_version=104,
        app_files=files,
        wu_name="wu_1",
        result_name="wu_1_0",
        project_dir="/var/lib/boinc & co/projects/example.org",
        boinc_dir="/var/lib/boinc & co",
        project_preferences="<color>a & b <blue></color>\n<app_name>not this one</app_name>",
        user_id=17,
        host_id=99,
        user_name="A. User",
        team_name="R&D é",
        authenticator="0123456789abcdef",
        slot=3,
        client_pid=4711,
        wu_cpu_s=12.25,
        starting_elapsed_s=21.5,
        checkpoint_period_s=60.0,
        ncpus=1.5,
        fpops_est=1e12,
        fpops_bound=1e15,
        memory_bound=2e8,
        disk_bound=1e9,
        deadline=1893456000.0,
        process_priority=3,
        vm_extensions_disabled=True,
        user_total_credit=12.5,
        host_total_credit=2.5,
        resource_share=0.5,
        host=HostInfo(
            ncpus=4,
            fpops=3.5e9,
            iops=1e10,
            memory_bytes=8e9,
            swap_bytes=1e9,
            disk_total_bytes=1e11,
            disk_free_bytes=5e10,
            domain_name="volunteer",
            os_name="Linux Debian",
            os_version="12",
            cpu_vendor="GenuineIntel",
            cpu_model="A processor",
        ),
        preferences=Preferences(
            cpu_usage_percent=80.0,
            max_ncpus_percent=50.0,
            memory_busy_percent=50.0,
            memory_idle_percent=90.0,
            disk_max_bytes=2.5e9,
            disk_min_free_bytes=1e9,
            disk_max_percent=90.0,
            leave_in_memory=True,
            run_on_batteries=True,
            max_bytes_up_s=1000.0,
            max_bytes_down_s=2000.0,
        ),
        proxy=Proxy(
            http_host="proxy.example.org",
            http_port=3128,
            http_user="me",
            http_password="secret",
            no_proxy="localhost",
        ),
    )


def test_secrets_are_not_shown() -> None:
    data = parse_init_data(INIT_DATA)
    assert data is not None
    assert "secret" not in repr(data)
    assert "0123456789abcdef" not in repr(data)


def test_what_is_missing_or_nonsense_keeps_its_default() -> None:
    nonsense = "<slot>x</slot><ncpus>many</ncpus><client_pid>1e999</client_pid><unknown>1</unknown><wu_name>&#55296;"
    assert parse_init_data(f"<app_init_data>{nonsense}</wu_name></app_init_data>") == InitData(
        standalone=False, client_version="0.0.0", wu_name="&#55296;"
    )


@pytest.mark.parametrize(("client", "ours"), [(-1, 0), (0, 1), (4, 5), (5, 5)])
def test_the_priority_counts_from_one(client: int, ours: int) -> None:
    data = parse_init_data(f"<app_init_data><process_priority>{client}</process_priority></app_init_data>")
    assert data is not None
    assert data.process_priority == ours


@pytest.mark.parametrize("text", ["", "<app_init_data>", "</app_init_data><app_init_data>", INIT_DATA[:-20]])
def test_half_a_file_is_none(text: str) -> None:
    assert parse_init_data(text) is None


@given(st.text(alphabet="<>/&;#abslot_19 \n", max_size=60))
def test_no_text_breaks_it(text: str) -> None:
    data = parse_init_data(f"<app_init_data>{text}</app_init_data>")
    assert data is None or data._asdict()
