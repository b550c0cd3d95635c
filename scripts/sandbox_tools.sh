#!/bin/sh
# Installs what sandboxes run on, from the distribution's own packages: `sh scripts/sandbox_tools.sh` (as root).
#   bubblewrap runc      containers             qemu-system-x86 qemu-utils    virtual machines
#   erofs-utils          checks of layers       mmdebstrap uidmap             base images
# gVisor (runsc) of Debian 12 cannot run today's coreutils; there the next release's package, one static file, is
# unpacked to /usr/local/bin. Anything that cannot be had is left out: `rorqual sandbox doctor` says what that means.
set -eu

have() { command -v "$1" >/dev/null 2>&1; }

if [ "$(id -u)" != 0 ] || ! have apt-get; then
    echo "This needs apt-get and root; without them install bubblewrap, runc, qemu-system-x86 and mmdebstrap by hand." >&2
    exit 1
fi

wanted=""
add() { # command, packages
    have "$1" || wanted="$wanted $2"
}
add bwrap bubblewrap
add runc runc
add qemu-system-x86_64 "qemu-system-x86 qemu-system-data"
add qemu-img qemu-utils
add fsck.erofs erofs-utils
add mmdebstrap mmdebstrap
add newuidmap uidmap

if [ -n "$wanted" ] || ! have runsc; then
    apt-get update -qq
fi
for package in $wanted; do
    apt-get install -y -qq --no-install-recommends "$package" >/dev/null || echo "could not install $package" >&2
done

newer_runsc() { # the package of Debian 13 through the mirror that apt uses here, without adding it to the system
    folder=$(mktemp -d)
    mirror=$(sed -n -e 's/^URIs: *//p' -e 's/^deb \(\[[^]]*\] \)\{0,1\}\([^ ]*\) .*/\2/p' /etc/apt/sources.list \
        /etc/apt/sources.list.d/*.sources /etc/apt/sources.list.d/*.list 2>/dev/null | grep -v security | head -n 1)
    mkdir -p "$folder/lists/partial"
    echo "deb $mirror trixie main" >"$folder/sources.list"
    options="-o Dir::Etc::sourcelist=$folder/sources.list -o Dir::Etc::sourceparts=/dev/null -o Dir::State::lists=$folder/lists"
    # shellcheck disable=SC2086  # the options are words
    (
        cd "$folder"
        apt-get $options update -qq && apt-get $options download -qq runsc && dpkg-deb -x runsc_*.deb unpacked
    ) >/dev/null 2>&1 && install -m 755 "$folder/unpacked/usr/bin/runsc" /usr/local/bin/runsc
    rm -rf "$folder"
}

if ! have runsc; then
    if grep -q '^VERSION_CODENAME=bookworm' /etc/os-release; then
        newer_runsc || echo "could not fetch runsc" >&2
    else
        apt-get install -y -qq --no-install-recommends runsc >/dev/null 2>&1 || echo "no package of runsc here" >&2
    fi
fi
