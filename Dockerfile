# vLLM's official image for CUDA with the AVMP plugin in it.
#
#   docker build --tag avmp-vllm .
#   docker run --gpus all --ipc=host --publish 8000:8000 --volume avmp-cache:/home/avmp/.cache \
#       avmp-vllm ai21labs/AI21-Jamba-Reasoning-3B --block-manager avmp
#
# Linted by the tests (hadolint), which have neither a container daemon nor a GPU: build it, and try
# it, where there are both. Who needs the same base every time replaces its tag by a digest.

FROM python:3.12-slim-bookworm AS wheel
WORKDIR /source
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

# The release that the plugin is written for (avmp_vllm/version.py; a test compares the two).
FROM vllm/vllm-openai:v0.32.0
# Only what the plugin itself needs is installed; vLLM and PyTorch stay as they are in the base.
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    uv pip install --system --no-cache /wheels/*.whl && avmp --version

# The base runs as root. Group 0 and a writable home let other users of that group run it as well.
RUN useradd --uid 10001 --gid 0 --create-home avmp && \
    mkdir /home/avmp/.cache && chown avmp:0 /home/avmp/.cache && chmod -R g+rwX /home/avmp
ENV HOME=/home/avmp
WORKDIR /home/avmp
USER 10001:0

EXPOSE 8000
ENTRYPOINT ["vllm", "serve"]
