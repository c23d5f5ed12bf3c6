"""A contextualisation drive: what lets a machine that others made install and start the guest agent at its first boot.

One ISO 9660 volume with the label `cidata` serves both kinds of machines:

    user-data, meta-data    cloud-init's data source NoCloud: a script that installs the agent from this drive
    context.sh, prolog.sh   as CernVM reads a HEPiX drive: user-data for amiconfig, in base64
    agent.pyz or agent.tgz  the agent
    config.json             settings of this very machine, when they do not come another way
"""

from __future__ import annotations

import base64
from pathlib import Path

from common.errors import ConfigError
from host_agent.hypervisors.virtualbox.config_iso import iso9660

LABEL = "cidata"
MOST_USER_DATA = 16 * 1024  # bytes, CernVM's limit

_INSTALL = """\
#!/bin/sh{when}
# Installs VMwrapper's guest agent from the drive that this came on. Once it is there, nothing changes.
place=/run/vmwrapper-context
mkdir -p $place
for drive in /dev/disk/by-label/{label} /dev/sr0 /dev/sr1 /dev/cdrom /dev/vdb; do
    [ -b $drive ] || continue
    mount -t iso9660 -o ro $drive $place 2>/dev/null || continue
    if [ -f $place/agent.pyz ]; then
        python3 $place/agent.pyz --install
    elif [ -f $place/agent.tgz ]; then
        mkdir -p $place.agent && tar -xzf $place/agent.tgz -C $place.agent &&
            $place.agent/vmwrapper-guest-agent/launch --install
        rm -rf $place.agent
    else
        umount $place
        continue
    fi
    umount $place
    break
done
"""

_AMICONFIG = """\
exit 0

[amiconfig]
plugins=cernvm

[cernvm]
"""

_CONTEXT = """\
EC2_USER_DATA="{user_data}"
ONE_CONTEXT_PATH="/var/lib/amiconfig"
export EC2_USER_DATA ONE_CONTEXT_PATH
"""


def context_files(agent: Path, config: bytes | None, instance: str) -> dict[str, bytes]:
    """The drive's files, by their names in capitals as ISO 9660 has them; Linux shows them in small letters."""
    name = "AGENT.TGZ" if agent.name.endswith((".tar.gz", ".tgz")) else "AGENT.PYZ"
    try:
        content = agent.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"the agent {agent} cannot be read: {error.strerror}", "vmctl image agent writes it"
        ) from None
    files = {
        "META-DATA": f"instance-id: {instance}\nlocal-hostname: vmwrapper-guest\n".encode(),
        "USER-DATA": _INSTALL.format(when="", label=LABEL).encode("ascii"),
        "CONTEXT.SH": _CONTEXT.format(user_data=base64.b64encode(amiconfig_user_data()).decode("ascii")).encode(
            "ascii"
        ),
        "PROLOG.SH": b"#!/bin/sh\n",
        name: content,
    }
    if config is not None:
        files["CONFIG.JSON"] = config
    return files


def amiconfig_user_data() -> bytes:
    """User-data as CernVM's amiconfig splits it: a script that runs after its plugins, then their sections."""
    data = (_INSTALL.format(when=".after", label=LABEL) + _AMICONFIG).encode("ascii")
    assert len(data) <= MOST_USER_DATA
    return data


def context_iso(agent: Path, config: bytes | None, instance: str = "vmwrapper") -> bytes:
    """The drive's image."""
    return iso9660(LABEL, context_files(agent, config, instance))
