#!/usr/bin/env bash
# Installs what the tests need beside Python: as root with apt-get, else says what is missing. In CI a missing tool fails.
set -euo pipefail
declare -A package=(
  [dockerd]=docker.io [etcd]=etcd-server [busybox]=busybox-static [ip]=iproute2 [nft]=nftables
  [podman]=podman [faketime]=faketime [iptables]=iptables [nsenter]=util-linux [curl]=curl [cc]=build-essential [docker-registry]=docker-registry [tmux]=tmux
)
export PATH=$PATH:/usr/sbin:/sbin
missing=()
for tool in "${!package[@]}"; do command -v "$tool" >/dev/null || missing+=("${package[$tool]}"); done
[ ${#missing[@]} -gt 0 ] || exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "installing for the tests: ${missing[*]} …"
  # Services of these packages must not start here: the tests start what they need themselves.
  policy=/usr/sbin/policy-rc.d
  if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod +x "$policy"
    trap 'rm -f "$policy"' EXIT
  fi
  { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "${missing[@]}"; } >/dev/null
  exit 0
fi
echo "missing for some tests: ${missing[*]} (install them as root; those tests are skipped now)" >&2
[ -z "${CI:-}" ]
