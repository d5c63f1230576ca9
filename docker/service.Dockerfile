# The service: answers, jobs and the dashboard. No torch, no compiler, no root.
#   docker build -f docker/service.Dockerfile -t tilewise-service .
FROM python:3.12-slim AS build
WORKDIR /build
COPY . .
RUN python -m venv /opt/tilewise
RUN /opt/tilewise/bin/python -m pip install --no-cache-dir --disable-pip-version-check -c requirements/lock.txt '.[server]'

FROM python:3.12-slim
COPY --from=build /opt/tilewise /opt/tilewise
ENV PATH=/opt/tilewise/bin:$PATH PYTHONUNBUFFERED=1 TILEWISE_HOME=/tmp/tilewise
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
CMD ["tilewise", "serve", "--host", "0.0.0.0", "--port", "8000", "--require-tokens"]
