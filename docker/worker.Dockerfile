# A worker: runs queued tunings on the GPUs that it is given. torch and CUDA come with the base image.
#   docker build -f docker/worker.Dockerfile -t tilewise-worker .
FROM pytorch/pytorch:2.11.0-cuda13.0-cudnn9-runtime
WORKDIR /build
COPY . .
RUN python -m pip install --no-cache-dir --disable-pip-version-check '.[gpu,server]'
# Triton compiles a launcher with the C compiler of the image, and keeps what it compiled here.
ENV PYTHONUNBUFFERED=1 HOME=/tmp TILEWISE_HOME=/tmp/tilewise TRITON_CACHE_DIR=/tmp/triton
USER 10001:10001
HEALTHCHECK --interval=30s --timeout=20s --start-period=30s CMD ["tilewise", "db", "check"]
CMD ["tilewise", "worker"]
