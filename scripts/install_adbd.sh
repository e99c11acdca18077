#!/usr/bin/env bash
# Unpacks Android's adbd for Linux, from Debian 13 with the libraries that it needs, into a folder: install_adbd.sh FOLDER.
# Needs apt on Debian or a relative of it, whatever its release; installs nothing. The tests of the target adb look in build/adbd.
set -euo pipefail
folder=$(realpath -m "${1:?usage: install_adbd.sh FOLDER}")
[ ! -e "$folder" ] || exit 0
repositories=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages')  # of this machine
mirror=$(grep -m 1 'debian/\?$' <<< "$repositories")  # no pipe from apt-get, which would end in an error where grep reads no further
apt=$(mktemp -d)
trap 'rm -rf "$apt"' EXIT
mkdir -p "$apt"/{lists,cache/archives,etc/sources.list.d,etc/apt.conf.d,etc/preferences.d}
: > "$apt/status"  # nothing counts as installed: every library comes along
cat > "$apt/apt.conf" <<EOF
Dir::Etc "$apt/etc";
Dir::State "$apt";
Dir::State::status "$apt/status";
Dir::Cache "$apt/cache";
APT::Install-Recommends "false";
APT::Sandbox::User "root";
EOF
cat > "$apt/etc/sources.list.d/trixie.sources" <<EOF
Types: deb
URIs: $mirror
Suites: trixie
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
EOF
export APT_CONFIG="$apt/apt.conf"
apt-get update -qq
apt-get install -y -qq --download-only adbd
rm -rf "$folder.new"
mkdir -p "$folder.new"
for package in "$apt"/cache/archives/*.deb; do dpkg-deb -x "$package" "$folder.new"; done
mv "$folder.new" "$folder"
