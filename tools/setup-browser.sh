#!/usr/bin/env bash
# Installs the browser that the chat page is tested in: Debian's chromium. Without one,
# those tests are skipped and say so; so this never fails, it says why it did nothing.
#
# Unlike the emulators (debs.sh), a browser is not unpacked into a folder: it needs a hundred
# libraries, fonts and settings at their places in the system.
set -euo pipefail

if command -v chromium >/dev/null; then
  exit
fi
skipped() {
  echo "tools/setup-browser.sh: $1; the chat page is not tested in a browser here" >&2
  exit 0
}
[[ -e /etc/debian_version ]] || skipped "no Debian, so no chromium of Debian's"
[[ $(id -u) == 0 ]] || skipped "only root can install it: sudo apt-get install chromium"
echo "installing chromium from Debian" >&2
export DEBIAN_FRONTEND=noninteractive
# A slow or absent mirror must not hold up the rest.
timeout 240 bash -c '
  apt-get -qq -o Acquire::Retries=2 update &&
  apt-get -qq -o Acquire::Retries=2 -o Dpkg::Use-Pty=0 install --no-install-recommends \
    chromium fonts-liberation >/dev/null
' || skipped "chromium could not be installed in time"
