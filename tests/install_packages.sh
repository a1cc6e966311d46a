#!/bin/sh
# SPDX-License-Identifier: MIT
# Installs the Debian packages named, where missing: as root, or by sudo after saying so.
set -eu
missing=
for package in "$@"; do
    case $(dpkg-query -W -f '${Status}' "$package" 2>/dev/null || true) in
    *"ok installed"*) ;;
    *) missing="$missing $package" ;;
    esac
done
[ -n "$missing" ] || exit 0
if ! command -v apt-get >/dev/null 2>&1; then
    echo "not a Debian system: please install$missing" >&2
    exit 0
fi
run=
if [ "$(id -u)" != 0 ]; then
    if ! command -v sudo >/dev/null 2>&1; then
        echo "please install as root:$missing" >&2
        exit 0
    fi
    echo "installing with sudo:$missing"
    run=sudo
fi
echo "installing$missing"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
$run apt-get update -q >"$log" 2>&1 || true
if ! $run env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends $missing >>"$log" 2>&1; then
    tail -n 20 "$log" >&2
    exit 1
fi
