# A worker for machines without a GPU: development and tests, with SGLang on the CPU. Build from the repository root:
#   docker build -f deploy/docker/worker-cpu.Dockerfile -t kvbaton/worker-cpu:0.1.0 .
# and start its workers with --device cpu.
FROM python:3.12.12-slim-bookworm

RUN useradd --uid 10001 --create-home --shell /usr/sbin/nologin kvbaton
WORKDIR /opt/kvbaton
COPY . .
ENV VENV=/opt/venv PIP_NO_CACHE_DIR=1
RUN scripts/setup-cpu.sh && rm -rf build

ENV PATH=/opt/venv/bin:$PATH HOME=/home/kvbaton PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /home/kvbaton
EXPOSE 50061 50062 8081 8082 12345
ENTRYPOINT ["kvbaton"]
CMD ["--help"]
