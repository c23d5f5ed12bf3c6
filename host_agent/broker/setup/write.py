"""What both kinds of configuration write."""

from __future__ import annotations

from pathlib import Path

from .plan import Plan

_README = """\
# {name} for VMwrapper

Written by `vmctl broker init {kind}`. Everything it needs is in this directory; nothing else of the machine is used.

Install it, on Debian 12:   apt-get install --no-install-recommends {packages}
(Debian starts its own instance of some brokers, which this one does not need: systemctl disable --now {service})
Run it, in the foreground:  ./run
Check it:                   vmctl broker check {settings}
Use it:                     vmctl start --broker {settings} VM
                            VMWRAPPER_BROKER=/path/to/{settings} vmwrapper

It listens on {address}:{port}, {tls}.

| file | |
|---|---|
| {settings_names} | a host agent's `--broker FILE`. It holds passcodes; take it there by a safe way, with tls/ca.pem |
| monitor.passcode | passcode of the login `monitor`, which reads statistics and beacons and nothing else |
| tls/ | the authority's certificate (ca.pem, public) and the broker's own; ca.key signs new ones: keep it elsewhere |

Who may do what: a guest reads its own queue and writes to its host's and to the presence topic. A host reads its own
queue and presence, and reads and writes its guests'. Nobody makes or removes a destination. A message waits at most
{seconds} s and a queue holds at most {mib} MiB: the agents send again what was lost.

{statistics}"""


def write_readme(plan: Plan, name: str, packages: str, statistics: str) -> None:
    settings = [plan.settings_file(host).name for host in plan.hosts]
    text = _README.format(
        name=name,
        kind=plan.kind,
        packages=packages,
        service="rabbitmq-server" if plan.kind == "rabbitmq" else "activemq",
        settings=settings[0],
        settings_names=", ".join(settings),
        address=plan.address,
        port=plan.port,
        tls="with TLS" if plan.tls else "without TLS, so only on a network that itself protects it",
        seconds=plan.limits.message_seconds,
        mib=plan.limits.queue_bytes // (1024 * 1024),
        statistics=statistics,
    )
    (plan.directory / "README.md").write_text(text)


def executable(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)
