# syntax=docker/dockerfile:1
# Headway for GPU clusters.
#   docker build -t headway .
#   docker run --rm --gpus all headway doctor
# CI does not build this image, because it has neither a Docker daemon nor a GPU. You may have to adapt it to your
# cluster's driver and network.
#
# Two stages: `build` compiles apex and installs everything into /opt/headway, with the Python in /opt/python; the image
# has these folders and no CUDA compiler. Dependencies are installed before the sources are copied, so a changed source rebuilds the last layers only.
#
# The image must have the CUDA version that torch's wheel was built with (13.0 for torch 2.13). Otherwise apex does not
# compile.
FROM nvidia/cuda:13.0.3-cudnn-devel-ubuntu24.04 AS build

# The Python that the tests run with (constraints.txt); Ubuntu 24.04 has another one.
ARG PYTHON_VERSION=3.11.13
# Full commit hash (40 hex digits), because apex has no releases that follow torch.
ARG APEX_COMMIT=6424da3b4faa6c8f062da4a48c424fff3f02d42d
# Compute capabilities to compile kernels for: A100, H100/H200, B200.
ARG TORCH_CUDA_ARCH_LIST="8.0;9.0;10.0"
# Number of compiler processes. Each needs about 4 GB of memory.
ARG BUILD_JOBS=4

ENV DEBIAN_FRONTEND=noninteractive \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1

RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential ca-certificates git \
    && rm -rf /var/lib/apt/lists/*

# uv downloads a build of CPython with its headers and checks its hash.
COPY --from=ghcr.io/astral-sh/uv:0.8.22 /uv /usr/local/bin/uv
ENV UV_PYTHON_INSTALL_DIR=/opt/python
RUN uv python install "$PYTHON_VERSION" \
    && "$(uv python find --managed-python "$PYTHON_VERSION")" -m venv /opt/headway
ENV PATH=/opt/headway/bin:$PATH

COPY constraints.txt /build/constraints.txt
RUN pip install -c /build/constraints.txt torch numpy ninja packaging setuptools wheel \
    && python -c "import torch; assert torch.version.cuda.startswith('13.0'), torch.version.cuda"

# NVIDIA apex is distributed only as source. The package `apex` on PyPI is another project.
RUN git clone --filter=blob:none https://github.com/NVIDIA/apex /build/apex \
    && git -C /build/apex checkout --detach "$APEX_COMMIT" \
    && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 APEX_PARALLEL_BUILD="$BUILD_JOBS" TORCH_CUDA_ARCH_LIST="$TORCH_CUDA_ARCH_LIST" \
       pip install -v --no-build-isolation --no-deps /build/apex \
    && python -c "import torch, amp_C, apex_C, fused_layer_norm_cuda" \
    && rm -rf /build/apex

# Dependencies of Headway, as pyproject.toml lists them.
COPY pyproject.toml /build/pyproject.toml
RUN python -c "import tomllib; project = tomllib.load(open('/build/pyproject.toml', 'rb'))['project']; \
      extras = project['optional-dependencies']; \
      print(*project['dependencies'], *extras['gpu'], *extras['hf'], sep='\n')" > /build/requirements.txt \
    && pip install -c /build/constraints.txt -r /build/requirements.txt

COPY . /build/headway
RUN pip install --no-deps "/build/headway[gpu,hf]" \
    && pip check \
    && cp -r /build/headway/yaml /opt/headway/yaml

FROM nvidia/cuda:13.0.3-cudnn-runtime-ubuntu24.04

ENV DEBIAN_FRONTEND=noninteractive \
    PYTHONUNBUFFERED=1

# gcc and g++ (and Python's headers in /opt/python): Triton and torch.compile build their launchers and kernels when they
# run.
# ibverbs and rdmacm: NCCL reaches InfiniBand and RoCE through them. iproute2 and openssh-client: launches over ssh.
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates g++ gcc libc6-dev \
       ibverbs-providers libibverbs1 librdmacm1t64 iproute2 openssh-client \
    && rm -rf /var/lib/apt/lists/*

COPY --from=build /opt/python /opt/python
COPY --from=build /opt/headway /opt/headway
ENV PATH=/opt/headway/bin:$PATH

RUN useradd --create-home --uid 10001 headway
USER headway
WORKDIR /home/headway

# Do not import a folder named model or data in the working directory instead of an installed package.
ENV PYTHONSAFEPATH=1

ENTRYPOINT ["headway"]
CMD ["doctor"]
