# Manta's image, for Kubernetes, `ray up` and plain docker.
#
#   docker build --target cpu  --tag manta:0.1.0-cpu .
#   docker build --target cuda --tag manta:0.1.0-cuda .
#
# The usual builds of torch for Linux bring CUDA along, in either image. For a CPU image without it, name an index with CPU
# builds: --build-arg PIP_EXTRA_INDEX_URL=... --build-arg TORCH_SUFFIX=+cpu. No GPU driver is inside: the node's is used.

ARG PYTHON=3.11.14-slim-bookworm

FROM python:${PYTHON} AS system
# gcc: Triton and DeepSpeed build kernels at run time. wget: the probes that KubeRay gives a Ray node. rsync and ssh: what a
# head that `ray up` made starts its workers with.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends gcc g++ libc6-dev openssh-client rsync wget \
 && rm -rf /var/lib/apt/lists/*

# Into the image's own Python and not a virtual environment: a login shell, which starts Ray on Kubernetes, resets PATH.
FROM system AS packages
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
ARG PIP_EXTRA_INDEX_URL=
ARG TORCH_SUFFIX=
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
# torch goes first and alone: it is the largest, and changes least.
RUN pip install --constraint constraints.txt "torch==$(sed -n 's/^torch==//p' constraints.txt)${TORCH_SUFFIX}"
COPY orchestrator orchestrator
RUN pip install --constraint constraints.txt '.[eval,server]'

FROM packages AS packages-cuda
RUN pip install --constraint constraints.txt '.[eval,server,gpu]'

FROM system AS runtime
# Numbers, so that Kubernetes can see that it is not root.
RUN groupadd --gid 1000 manta \
 && useradd --uid 1000 --gid 1000 --home-dir /var/lib/manta --create-home --shell /bin/bash manta \
 && mkdir -p /mnt/manta /mnt/models \
 && chown 1000:1000 /mnt/manta /mnt/models
ENV PYTHONUNBUFFERED=1 HF_HOME=/mnt/models
WORKDIR /app
COPY jobs jobs

FROM runtime AS cuda
COPY --from=packages-cuda /usr/local /usr/local
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000:1000
CMD ["manta", "--help"]

# Last, and so what is built where no target is named.
FROM runtime AS cpu
COPY --from=packages /usr/local /usr/local
USER 1000:1000
CMD ["manta", "--help"]
