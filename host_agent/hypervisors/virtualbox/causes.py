"""VirtualBox's own words, and what they mean for the person who reads them.

A failure keeps VirtualBox's text; where that names a status code which is known here, a sentence with the cause
comes first and the next step with it.
"""

from __future__ import annotations

import attrs


@attrs.frozen
class Cause:
    signs: tuple[str, ...]  # any of these in VirtualBox's text
    sentence: str
    hint: str


CAUSES = (
    Cause(
        ("VERR_VM_DRIVER_NOT_INSTALLED", "VERR_VM_DRIVER_LOAD_ERROR", "VERR_VM_DRIVER_OPEN_ERROR"),
        "VirtualBox's kernel driver is not loaded",
        "load it with: modprobe vboxdrv; build it for this kernel with: /sbin/vboxconfig "
        "(Debian: apt install virtualbox-dkms)",
    ),
    Cause(
        ("VERR_VM_DRIVER_NOT_ACCESSIBLE",),
        "this user may not use VirtualBox's kernel driver",
        "join the group vboxusers (usermod -aG vboxusers USER), then log in again",
    ),
    Cause(
        ("VERR_VM_DRIVER_VERSION_MISMATCH", "VERR_SUPDRV_INTERFACE"),
        "VirtualBox's kernel driver is of another version than VirtualBox",
        "build it again with: /sbin/vboxconfig (Debian: dpkg-reconfigure virtualbox-dkms), or restart this host",
    ),
    Cause(
        ("VERR_VMX_IN_VMX_ROOT_MODE", "VERR_SVM_IN_USE"),
        "the processor's virtualisation (VT-x or AMD-V) is held by another hypervisor, such as KVM",
        "end the other hypervisor's VMs; on Linux: modprobe -r kvm_intel (or kvm_amd)",
    ),
    Cause(
        ("VERR_NEM_NOT_AVAILABLE", "VERR_NEM_VM_CREATE_FAILED", "VERR_NEM_MISSING_KERNEL_API"),
        "Hyper-V holds the processor's virtualisation, and VirtualBox cannot use it through Hyper-V either",
        "switch Hyper-V off (bcdedit /set hypervisorlaunchtype off), then restart Windows",
    ),
    Cause(
        (
            "VERR_VMX_MSR_ALL_VMX_DISABLED",
            "VERR_VMX_MSR_VMX_DISABLED",
            "VERR_VMX_MSR_VMXON_DISABLED",
            "VERR_SVM_DISABLED",
        ),
        "the processor's virtualisation (VT-x or AMD-V) is switched off in this host's firmware",
        "switch it on in the firmware's (BIOS, UEFI) settings",
    ),
    Cause(
        ("VERR_VMX_NO_VMX", "VERR_SVM_NO_SVM"),
        "the processor offers no virtualisation (VT-x or AMD-V), or Hyper-V keeps it",
        "on Windows: switch Hyper-V off (bcdedit /set hypervisorlaunchtype off) and restart; in a VM: nested VT-x",
    ),
    Cause(
        ("VERR_NO_MEMORY", "E_OUTOFMEMORY", "VERR_EM_NO_MEMORY"),
        "there is not enough free memory on this host",
        "close other programs, or give VMs less memory",
    ),
    Cause(("VERR_DISK_FULL",), "the disk of this host is full", "free some space"),
)


def explain(what: str, words: str) -> tuple[str, str]:
    """The sentence and the next step for a failure of `what`, with VirtualBox's own text in it."""
    text = " ".join(words.split()) or "no reason given"
    for cause in CAUSES:
        if any(sign in text for sign in cause.signs):
            return f"{what}: {cause.sentence} (VirtualBox says: {text})", cause.hint
    return f"{what}: VirtualBox says: {text}", ""
