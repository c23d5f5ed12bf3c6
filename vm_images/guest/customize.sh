# Run by mmdebstrap, outside the new root file system "$1", once Debian's packages are in it.
# PYTHON (as in 3.11) comes from the recipe.
set -eu

# The user that the agent and its tasks run as; no password fits "*".
echo "vmwrapper:x:1000:1000:VMwrapper guest agent:/home/vmwrapper:/bin/bash" >>"$1/etc/passwd"
echo "vmwrapper:x:1000:" >>"$1/etc/group"
echo "vmwrapper:*:19000:0:99999:7:::" >>"$1/etc/shadow"
cp -r "$1/etc/skel" "$1/home/vmwrapper"
chown -R 1000:1000 "$1/home/vmwrapper"

chroot "$1" dpkg-query -W -f '${Package} ${Version}\n' >"$1/packages.txt"

# Not left out by dpkg, because Debian's Python compiles everything that its package lists when it is installed.
rm -rf "$1/usr/lib/python$PYTHON/lib2to3" "$1/usr/lib/python$PYTHON/pydoc_data" "$1/usr/lib/python$PYTHON/ensurepip"

# Byte code that is used without a look at its source, for all of Debian's Python and the packages that come for it.
find "$1/usr/lib" -name __pycache__ -prune -exec rm -rf '{}' +
for place in "/usr/lib/python$PYTHON" /usr/lib/python3/dist-packages; do
    [ ! -d "$1$place" ] || chroot "$1" python3 -m compileall -q --invalidation-mode unchecked-hash "$place" || true
done

# What only package management would need. dpkg's own list stays, as a record of what is here.
rm -rf "$1/var/cache/"* "$1/var/log/"* "$1/var/lib/dpkg/info/"*.md5sums "$1/var/lib/dpkg/"*-old

echo vmwrapper-guest >"$1/etc/hostname"
echo "127.0.0.1 localhost vmwrapper-guest" >"$1/etc/hosts"
: >"$1/etc/resolv.conf"
: >"$1/etc/machine-id"
