#!/bin/sh
# Installs what the tests of the web page need, where it is missing and can be installed: Chromium, and curl.
# Elsewhere it only says what is missing: the tests themselves fail without a browser.
set -eu

missing=
for name in chromium chromium-browser google-chrome google-chrome-stable; do
    command -v "$name" >/dev/null 2>&1 && found=1
done
[ -n "${CHROMIUM:-}" ] || [ -n "${found:-}" ] || missing=chromium
command -v curl >/dev/null 2>&1 || missing="$missing curl"
[ -n "$missing" ] || exit 0

if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    apt-get update -q >/dev/null
    # shellcheck disable=SC2086
    DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $missing >/dev/null
else
    echo "the tests of the web page need:$missing; install with: sudo apt-get install $missing" >&2
fi
