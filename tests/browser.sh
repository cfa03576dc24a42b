#!/bin/bash
# Chromium and its driver, for the tests of the app.
#
#   tests/browser.sh install     the packages, of Debian, as root; nothing if they are there
set -euo pipefail

install() {
    command -v chromium > /dev/null && command -v chromedriver > /dev/null && return
    apt-get update
    DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends chromium chromium-driver
}

"$@"
