#!/usr/bin/env bash
# headers.sh FOLDER: the headers of ONNX Runtime and nlohmann-json from Debian trixie, in FOLDER/usr/include.
#
# They are unpacked, not installed: neither root nor Debian trixie is needed, but apt-get and dpkg are, and a Debian
# mirror: the one that this machine uses, or deb.debian.org. The packages' digests are checked by apt-get.
set -euo pipefail
folder=$(mkdir -p "$1" && cd "$1" && pwd)
[[ -e $folder/usr/include/nlohmann/json.hpp && -e $folder/usr/include/onnxruntime/onnxruntime_cxx_api.h ]] && exit
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/sources" "$work/lists/partial" "$work/packages"
mirror=$(sed -nE 's/^URIs: *(\S+).*/\1/p' /etc/apt/sources.list.d/*.sources 2>/dev/null | grep -v security | head -1 || true)
cat > "$work/sources/trixie.sources" <<END
Types: deb
URIs: ${mirror:-http://deb.debian.org/debian}
Suites: trixie
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
END
apt=(apt-get -q -o Dir::Etc::sourcelist=/dev/null -o "Dir::Etc::sourceparts=$work/sources"
     -o "Dir::State::Lists=$work/lists" -o "Dir::Cache=$work" -o APT::Sandbox::User=)
"${apt[@]}" -o Acquire::Languages=none update >&2
(cd "$work/packages" && "${apt[@]}" download libonnxruntime-dev nlohmann-json3-dev) >&2
for package in "$work"/packages/*.deb; do dpkg -x "$package" "$folder"; done
