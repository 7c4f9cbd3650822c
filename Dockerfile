# A build for CPUs. torch's site names an index with wheels for CPUs alone, which are far smaller than the usual ones:
# --build-arg PIP_EXTRA_INDEX_URL=THAT_INDEX.
FROM python:3.12-bookworm AS build
ARG PIP_EXTRA_INDEX_URL
WORKDIR /source
COPY constraints.txt ./
RUN python -m venv /opt/tamingfast \
    && /opt/tamingfast/bin/pip install --no-cache-dir --constraint constraints.txt torch ninja pybind11 setuptools
COPY pyproject.toml setup.py README.md LICENSE ./
COPY csrc csrc
COPY kernels kernels
COPY tamingfast tamingfast
RUN TAMINGFAST_CUDA=0 TAMINGFAST_REQUIRE_NATIVE=1 /opt/tamingfast/bin/pip install --no-cache-dir \
    --no-build-isolation --constraint constraints.txt .

FROM python:3.12-slim-bookworm
# The extension's threads; Debian keeps only the latest version of a package, so none is named.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home tamingfast
COPY --from=build /opt/tamingfast /opt/tamingfast
# Caches may be written by whichever user the container runs as.
ENV PATH=/opt/tamingfast/bin:$PATH TAMINGFAST_CACHE=/tmp/tamingfast HF_HOME=/tmp/huggingface
USER tamingfast
WORKDIR /work
ENTRYPOINT ["tamingfast"]
CMD ["--help"]
