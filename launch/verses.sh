#!/usr/bin/env bash
# launch/verses.sh [FOLDER]: write FOLDER/verses.tsv (default data/verses.tsv), 31,000 verses in English and Spanish,
# both in the public domain: the World English Bible and the Reina-Valera of 1909, from packages of Debian. A few
# chapters are numbered differently in one of them, so some pairs do not match.
#
# For Debian and its derivatives. Needs no root: missing packages are unpacked to a temporary folder.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
find_python

folder=${1:-data}
packages=(sword-text-web sword-text-sparv libsword-utils)
[[ ! -e $folder/verses.tsv ]] || { say "$folder/verses.tsv already exists"; exit 0; }
command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || fail "got no apt-get; allowed: Debian or Ubuntu"

mkdir -p "$folder"
scratch=$(mktemp -d "$(realpath "$folder")/.verses.XXXXXX")
trap 'rm -rf "$scratch"' EXIT

# The dependencies of the packages, without those that are installed.
needed=$(apt-cache depends --recurse --no-{pre-depends,recommends,suggests,conflicts,breaks,replaces,enhances} \
    "${packages[@]}" 2>/dev/null | grep '^[a-z0-9]') || fail "got no package ${packages[0]}; run apt-get update first"
missing=$(for name in $needed; do dpkg-query -s "$name" >/dev/null 2>&1 || echo "$name"; done)
say "unpacking $(echo $missing)"
(cd "$scratch" && apt-get download $missing >log 2>&1) ||
    { tail -n 3 "$scratch/log" >&2; fail "apt-get could not download the packages; run apt-get update first"; }
for package in "$scratch"/*.deb; do dpkg-deb -x "$package" "$scratch/root"; done

libraries=$(find "$scratch/root" -name 'libsword*.so*' -printf '%h\n' -quit)
export LD_LIBRARY_PATH=$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export SWORD_PATH=$scratch/root/usr/share/sword PATH=$scratch/root/usr/bin:$PATH
for text in engWEB2015eb spaRV1909eb; do mod2imp "$text" >"$scratch/$text.imp"; done

"$python" - "$scratch/engWEB2015eb.imp" "$scratch/spaRV1909eb.imp" "$scratch/verses.tsv" <<'PYTHON'
"""Convert two texts in the format of mod2imp ($$$Book CHAPTER:VERSE, then OSIS) to a table of their common verses."""

import collections
import html
import re
import sys

# Notes and headings, which are not part of a verse.
ASIDE = re.compile(r"<(note|title)\b[^>]*(?:/>|>.*?</\1>)", re.DOTALL)
TAG = re.compile(r"<[^>]*>")
SPACE_BEFORE = re.compile(r"\s+(?=[,.;:!?)”’])")
WORD = re.compile(r"[^\W\d_]+")


def verses(path):
    with open(path, encoding="utf-8") as file:
        entries = file.read().split("$$$")[1:]
    found = {}
    for entry in entries:
        key, _, text = entry.partition("\n")
        chapter, verse = re.search(r"(?:(\d+):(\d+))?$", key.strip()).groups(default="0")
        # Replace a note by a space: it may be the only separator of two words.
        text = html.unescape(TAG.sub("", ASIDE.sub(" ", text)))
        text = SPACE_BEFORE.sub("", " ".join(text.split()))
        if text and int(chapter) and int(verse):
            found[key.strip()] = text
    # The first words of a chapter are in capitals: use their most frequent spelling elsewhere.
    counts = collections.Counter(word for text in found.values() for word in WORD.findall(text))
    usual = lambda word: max((word.lower(), word.capitalize()), key=lambda form: counts[form])
    plain = lambda word: usual(word) if len(word) > 1 and word.isupper() else word
    for key, text in found.items():
        text = WORD.sub(lambda match: plain(match[0]), text)
        # A verse may begin in the middle of a sentence.
        capital = found[key][0].isupper()
        found[key] = text[0].upper() + text[1:] if capital else text
    return found


english, spanish = map(verses, sys.argv[1:3])
with open(sys.argv[3], "w", encoding="utf-8") as file:
    file.write("verse\ten\tes\n")
    for key in english:
        if key in spanish:
            file.write(f"{key}\t{english[key]}\t{spanish[key]}\n")
PYTHON

mv "$scratch/verses.tsv" "$folder/verses.tsv"
say "$folder/verses.tsv: $(($(wc -l <"$folder/verses.tsv") - 1)) verses"
