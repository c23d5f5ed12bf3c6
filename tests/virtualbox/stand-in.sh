# Run by mmdebstrap with the new root file system "$1", before VirtualBox is installed in it.
# VirtualBox depends on its kernel driver, which nobody can load in a chroot: this package stands in for it.
set -eu
package=$(mktemp -d)
trap 'rm -rf "$package"' EXIT
mkdir "$package/DEBIAN"
cat >"$package/DEBIAN/control" <<CONTROL
Package: virtualbox-modules
Version: 99
Architecture: all
Maintainer: nobody <nobody@localhost>
Description: stands in for the kernel driver of VirtualBox
CONTROL
dpkg-deb --build "$package" "$1/stand-in.deb"
chroot "$1" dpkg --install /stand-in.deb
rm "$1/stand-in.deb"
