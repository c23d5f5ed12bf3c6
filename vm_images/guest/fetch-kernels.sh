# Run by mmdebstrap, outside an empty root file system "$1", with the package lists of the recipe's release.
# KERNELS is like "kernel.deb=linux-image-cloud-amd64": each package is put into the root under that name.
set -eu
export APT_CONFIG="$MMDEBSTRAP_APT_CONFIG"
for wanted in $KERNELS; do
    package=${wanted#*=}
    # A meta-package depends on the one of today's version.
    for _ in 1 2 3; do
        next=$(apt-cache depends --important "$package" | sed -n 's/^ *Depends: \(linux-image-.*\)$/\1/p' | head -n 1)
        [ -n "$next" ] || break
        package=$next
    done
    (cd "$1" && apt-get download -q "$package" && mv linux-image-*.deb "${wanted%%=*}")
done
