#!/bin/sh
# SPDX-License-Identifier: MIT
# Fetches and builds the suites: build.sh DIRECTORY. Nothing outside of DIRECTORY changes; no root needed.
# The packages that it needs stand in the Makefile (INTEROP_PACKAGES).
set -eu
here=$1
mkdir -p "$here/apt/lists/partial" "$here/apt/archives/partial" "$here/src"
here=$(cd "$here" && pwd)
mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Component: main' | head -n 1)
cat >"$here/apt/list.sources" <<EOF
Types: deb-src
URIs: $mirror
Suites: bookworm trixie
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
EOF
apt() {
    timeout 300 apt-get -q -o Dir::Etc::sourcelist="$here/apt/list.sources" -o Dir::Etc::sourceparts=/dev/null \
        -o Dir::State::lists="$here/apt/lists" -o Dir::Cache="$here/apt" -o APT::Sandbox::User="$(id -un)" "$@"
}
if ! [ -e "$here/src/fetched" ]; then
    apt update
    cd "$here/src"
    rm -rf libnbd nbd
    # libnbd of the release that is tested on; nbd of trixie: the files of bookworm's 3.24 are not on every mirror.
    apt source --download-only libnbd/bookworm nbd/trixie
    dpkg-source --no-check -x libnbd_*.dsc libnbd
    dpkg-source --no-check -x nbd_*.dsc nbd
    touch fetched
fi

if ! [ -e "$here/src/libnbd/built" ]; then
    cd "$here/src/libnbd"
    # With a peer in PATH, configure finds nbdkit and qemu-nbd; the stand-in comes in at run time only.
    timeout 300 ./configure -q --disable-static --disable-ocaml --disable-golang --disable-fuse --without-gnutls \
        PYTHON=/usr/bin/python3 PATH=/usr/sbin:/usr/bin:/sbin:/bin
    for directory in common/include common/utils include lib info copy dump sh python; do
        timeout 300 make -s -C $directory all man_MANS=
    done
    for directory in tests interop; do
        timeout 300 make -s -C $directory check TESTS= man_MANS=
    done
    touch built
fi

if ! [ -e "$here/src/nbd/built" ]; then
    cd "$here/src/nbd"
    # Debian's patch changes the inputs of automake, bison and flex, and their results, too: the results are newer.
    touch aclocal.m4
    touch configure config.h.in nbdtab_*.[ch]
    find . -name Makefile.in -exec touch {} +
    timeout 300 ./configure -q --enable-syslog --without-gnutls --without-libnl --disable-manpages \
        ax_cv_prog_bison=yes YACC=true LEX=true
    timeout 300 make -s nbd-server nbd-client
    timeout 300 make -s -C tests/run nbd-tester-client
    touch built
fi
