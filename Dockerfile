# Everything that requirements.txt installs, and this repository at /app.
#   CPU:  docker build -t forgebook .
#   GPU:  docker build -t forgebook --build-arg BASE=nvidia/cuda:13.0.1-devel-ubuntu24.04 \
#             --build-arg TORCH=https://download.pytorch.org/whl/cu130 --build-arg EXTRAS="liger-kernel bitsandbytes" .
ARG BASE=ubuntu:24.04
FROM ${BASE}
# Where torch's wheels for this processor are, and which optional packages of requirements-gpu.txt to add.
ARG TORCH=https://download.pytorch.org/whl/cpu
ARG EXTRAS=
# g++ and Python's headers: DeepSpeed compiles what it needs at first use.
RUN apt-get update \
    && apt-get install -y --no-install-recommends git g++ ninja-build python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /app
ENV PATH=/app/.venv/bin:$PATH DS_BUILD_OPS=0 PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1
COPY requirements.txt requirements-gpu.txt ./
RUN python3 -m venv .venv \
    && pip install --index-url ${TORCH} --extra-index-url https://pypi.org/simple "$(grep ^torch== requirements.txt)" \
    && pip install -r requirements.txt \
    && for name in ${EXTRAS}; do pip install "$(grep "^${name}==" requirements-gpu.txt)"; done
COPY . .
RUN pip install --no-deps -e .
# Checkpoints, and what is fetched or tokenized: mount disks here.
VOLUME ["/app/runs", "/root/.cache"]
CMD ["forgebook", "--help"]
