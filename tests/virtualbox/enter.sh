#!/bin/sh
# Run a command beside a real VirtualBox: enter.sh ROOT LIBRARIES CHECKOUT command…
#
# Started by chroot.py in mount, process and network name spaces of its own: whatever is mounted here is gone with them,
# and so is every process that the command leaves behind. ROOT stays as it is; what is written goes to memory.
set -eu
root=$1 libraries=$2 checkout=$3
shift 3

mount --make-rprivate /
mount --bind "$root" "$root"
mount -o remount,bind,ro "$root"
mount -t proc proc "$root/proc"
mount --rbind /sys "$root/sys"
mount -t tmpfs -o mode=0755 dev "$root/dev"
mkdir "$root/dev/pts" "$root/dev/shm"
for name in null zero full random urandom tty; do
    touch "$root/dev/$name"
    mount --bind "/dev/$name" "$root/dev/$name"
done
if [ -e /dev/vboxdrv ]; then
    touch "$root/dev/vboxdrv"
    mount --bind /dev/vboxdrv "$root/dev/vboxdrv"
fi
mount -t devpts -o newinstance,ptmxmode=0666 devpts "$root/dev/pts"
ln -s pts/ptmx "$root/dev/ptmx"
ln -s /proc/self/fd "$root/dev/fd"
for name in dev/shm run tmp var/tmp root; do
    mount -t tmpfs -o mode=1777 tmpfs "$root/$name"
done
mount --bind "$libraries" "$root/libraries"
mount --bind "$checkout" "$root/checkout"
mount -o remount,bind,ro "$root/checkout"
if [ ! -e /dev/vboxdrv ]; then
    # FOR TESTS ONLY: without the kernel driver, guests are interpreted.
    mount --bind "$checkout/tests/virtualbox/interpreter_headless.py" "$root/usr/lib/virtualbox/VBoxHeadless"
fi
chroot "$root" ip link set lo up
exec chroot "$root" /usr/bin/env -i -C /checkout \
    PATH=/usr/lib/virtualbox:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 \
    PYTHONPATH=/libraries PYTHONPYCACHEPREFIX=/tmp/bytecode VBOX_USER_HOME=/tmp/vbox VBOX_IPC_SOCKETID=vmwrapper-test \
    VMWRAPPER_VIRTUALBOX=interpreted \
    ${VMWRAPPER_LONG:+VMWRAPPER_LONG="$VMWRAPPER_LONG"} "$@"
