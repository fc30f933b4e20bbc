#!/usr/bin/env bash
# Update the lock of tested versions: for each Python, write the newest version of every package that llmtrain and its
# extras need to launch/constraints/, and print the changes. Run the tests before committing them.
#
#   ./launch/lock.sh                torch of the series below, with which all tests run
#   TORCH=2.14 ./launch/lock.sh     torch of another series
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

# Use the certificates of the machine, such as those of a company, as pip does.
export UV_SYSTEM_CERTS=1
series=${TORCH:-2.13}
pythons=(3.10 3.11 3.12 3.13 3.14)

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
make_environment "$scratch/environment"
"$scratch/environment/bin/python" -m pip --disable-pip-version-check --quiet install uv

mkdir -p "$launch_folder/constraints"
echo "torch==$series.*" >"$scratch/torch"
for version in "${pythons[@]}"; do
    lock=$launch_folder/constraints/$version.txt new=$scratch/$version.txt
    echo "# Made by launch/lock.sh on $(date -u +%F) for Python $version." >"$new"
    # The most common platform; on others a few packages may be missing from the lock, and pip chooses their version.
    "$scratch/environment/bin/uv" pip compile --quiet --no-header --no-annotate --upgrade --all-extras \
        --python-version "$version" --python-platform x86_64-manylinux_2_28 --constraint "$scratch/torch" \
        "$repository/pyproject.toml" >>"$new" || fail "uv found no versions for Python $version"
    touch "$lock"
    say "Python $version: $(grep -c == "$new") packages"
    diff "$lock" "$new" | grep '^[<>] [^#]' || true
    mv "$new" "$lock"
done
