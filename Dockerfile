# SPDX-License-Identifier: Apache-2.0
# Compiles the bundle anew and builds the wheel: docker build --output type=local,dest=dist .
# The bundle follows from the sources and the pinned packages alone; one that differs from the committed one is an error.
ARG BASE_IMAGE=python:3.12-slim-bookworm

# g++ is nvcc's host compiler. apt verifies packages against the signed index of the base image's distribution.
FROM ${BASE_IMAGE} AS base
ARG HOST_COMPILER="g++ g++-12=12.2.0-14+deb12u1"
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends ${HOST_COMPILER} libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home builder \
    && install --directory --owner=builder --group=builder /home/builder/source

FROM base AS build
USER builder
WORKDIR /home/builder/source
ENV PATH=/home/builder/venv/bin:$PATH
COPY docker/requirements.txt /home/builder/requirements.txt
RUN python3 -m venv /home/builder/venv \
    && pip install --no-cache-dir --no-deps --only-binary :all: --require-hashes --requirement ../requirements.txt
COPY --chown=builder . .
# The committed bundle is removed, so that what is found afterwards was made here.
RUN chmod -R u=rwX,go=rX . \
    && sha256sum machete_aot/data/*.zip machete_aot/data/pins.json manifests/*.json > ../committed.sha256 \
    && rm machete_aot/data/*.zip machete_aot/data/pins.json manifests/*.json \
    && python -m build_kernels
ARG ALLOW_CHANGED=
RUN if ! sha256sum --check ../committed.sha256; then \
        echo "The bundle differs from the committed one: run make bundle and commit it, or build with" \
            "--build-arg ALLOW_CHANGED=1." >&2; \
        test -n "${ALLOW_CHANGED}"; \
    fi

FROM build AS wheel
# The time of every file in the wheel: the earliest that a zip archive can hold.
ARG SOURCE_DATE_EPOCH=315532800
RUN export SOURCE_DATE_EPOCH \
    && pip wheel --no-deps --no-build-isolation --no-index --wheel-dir ../dist . \
    && cp machete_aot/data/*.zip manifests/*.json ../dist \
    && cd ../dist \
    && sha256sum -- * > ../SHA256SUMS \
    && mv ../SHA256SUMS .

FROM scratch
COPY --from=wheel /home/builder/dist/ /
