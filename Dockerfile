# The pipeline in a container: `docker compose run --rm m0` (CPU, embedded model) or `m0-gpu`. Runs stay in ./runs.
FROM python:3.12-slim-bookworm

# make for the set-up, a compiler for Triton's kernels
RUN apt-get update && apt-get install -y --no-install-recommends make gcc libc6-dev && rm -rf /var/lib/apt/lists/*

WORKDIR /cai
COPY Makefile requirements.txt requirements-unsloth.txt ./
# another build of torch (an older driver, or no GPU at all): --build-arg TORCH_INDEX_URL=...
ARG TORCH_INDEX_URL=
RUN PIP_NO_CACHE_DIR=1 make setup TORCH_INDEX_URL="$TORCH_INDEX_URL"

COPY . .
# a fresh clone is newer than the layer above: nothing is installed twice. What is written lies in /cai/runs and /cache
RUN touch .venv/.installed && useradd --uid 1000 --no-create-home cai && mkdir -p runs /cache && chown cai runs && chmod 1777 /cache

ENV USER=cai HOME=/cache HF_HOME=/cache/hf XDG_CACHE_HOME=/cache PATH=/cai/.venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1
USER cai
VOLUME ["/cai/runs", "/cache"]
# not through make: `docker stop` reaches the runner, and its exit code is the container's
ENTRYPOINT ["python", "runner.py", "cai.toml"]
CMD ["--milestone", "m0"]
