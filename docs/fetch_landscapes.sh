#!/bin/sh
# Landscape photographs of several megapixels from four Debian packages, for training and evaluation.
# Optional: nothing else depends on them. Usage: docs/fetch_landscapes.sh DIRECTORY (Debian or Ubuntu, without root).
# Each file is one photograph, so `name=folder path=DIRECTORY` splits training and validation by photograph.
set -eu
[ $# -eq 1 ] || { echo "usage: $0 DIRECTORY" >&2; exit 2; }
mkdir -p "$1"
out=$(cd "$1" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
apt-get download lomiri-wallpapers-16.04 lxqt-themes mate-backgrounds plasma-workspace-wallpapers
for package in *.deb; do
    dpkg-deb -x "$package" "${package%%_*}"
done

keep() { # package name, file, new name
    cp "$2" "$out/$1-$3"
}
find lomiri-wallpapers-16.04 -type f \( -name '*.jpg' -o -name '*.png' \) |
    grep -Evi '/(analogpattern|umang|fossa|infinite|painting)' | sort |
    while read -r file; do keep lomiri "$file" "$(basename "$file")"; done
for name in after-the-rain.jpg appleflower.png Butterfly-Kenneth-Wimer.jpg butterfly.png cloud.png drop.png flowers.png \
    fog.jpg this-is-not-windows.jpg Valendas.png; do
    find lxqt-themes -type f -name "$name" | while read -r file; do keep lxqt "$file" "$name"; done
done
find mate-backgrounds -type f -path '*/nature/*' \( -name '*.jpg' -o -name '*.jpeg' \) | sort |
    while read -r file; do keep mate "$file" "$(basename "$file")"; done
for scene in BytheWater ColdRipple ColorfulCups DarkestHour EveningGlow FallenLeaf Grey Kite OneStandsOut Path summer_1am; do
    file=$(find plasma-workspace-wallpapers -type f -path "*/$scene/*" -name '2560x1600.*' | head -n 1)
    [ -z "$file" ] || keep plasma "$file" "$scene.${file##*.}"
done
echo "$(ls "$out" | wc -l) photographs in $out"
