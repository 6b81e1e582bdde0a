#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds the artefacts in a container into dist/ and compares bundle and manifest with those of this checkout.
# BASE_IMAGE chooses another base image. Uses docker where its daemon answers, else buildah.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if docker info >/dev/null 2>&1; then
    build=(docker build)
    export DOCKER_BUILDKIT=1
elif command -v buildah >/dev/null; then
    build=(buildah build --layers)
else
    echo "error: neither a running docker nor buildah was found; install one of them" >&2
    exit 3
fi

# What the container refuses is compared below too, so that both digests are shown.
options=(--build-arg ALLOW_CHANGED=1 --output type=local,dest=dist)
if [[ -n "${BASE_IMAGE:-}" ]]; then
    options+=(--build-arg "BASE_IMAGE=$BASE_IMAGE")
fi
rm -rf dist
"${build[@]}" "${options[@]}" .

(cd dist && sha256sum --check --quiet SHA256SUMS && cat SHA256SUMS)
status=0
for file in machete_aot/data/*.zip manifests/*.json; do
    if cmp "$file" "dist/$(basename "$file")"; then
        echo "same: $file"
    else
        echo "differs: $file" >&2
        status=1
    fi
done
exit "$status"
