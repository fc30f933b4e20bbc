#!/usr/bin/env bash
# Locks the tested versions again: for each Python the newest of every package that llmtrain and its extras
# need, written to launch/constraints/. Prints what changed. Run the tests before you commit it.
#
#   ./launch/lock.sh                torch of the series below, on which all tests run
#   TORCH=2.14 ./launch/lock.sh     torch of another
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

# As pip does: certificates of the machine, such as a company's, count.
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
    # The platform of most who train; on others a package or two may be missing here, and pip chooses it.
    "$scratch/environment/bin/uv" pip compile --quiet --no-header --no-annotate --upgrade --all-extras \
        --python-version "$version" --python-platform x86_64-manylinux_2_28 --constraint "$scratch/torch" \
        "$repository/pyproject.toml" >>"$new" || fail "uv found no versions for Python $version"
    touch "$lock"
    say "Python $version: $(grep -c == "$new") packages"
    diff "$lock" "$new" | grep '^[<>] [^#]' || true
    mv "$new" "$lock"
done
