# The pipeline in a container: `docker compose run --rm m0` (CPU, embedded model) or `m0-gpu`. Runs stay in ./runs.
FROM python:3.12-slim

# git for provenance, make for the targets, a compiler for Triton's kernels
RUN apt-get update && apt-get install -y --no-install-recommends git make gcc libc6-dev && rm -rf /var/lib/apt/lists/*

WORKDIR /cai
COPY Makefile requirements.txt requirements-unsloth.txt ./
# another build of torch (an older driver, or no GPU at all): --build-arg TORCH_INDEX_URL=...
ARG TORCH_INDEX_URL=
RUN make setup TORCH_INDEX_URL=$TORCH_INDEX_URL

COPY . .
# a fresh clone is newer than the layer above: nothing is installed twice
RUN touch .venv/.installed

ENV HF_HOME=/cache/hf XDG_CACHE_HOME=/cache PATH=/cai/.venv/bin:$PATH
CMD ["make", "m0"]
