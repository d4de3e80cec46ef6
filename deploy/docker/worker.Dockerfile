# A prefill, decode or aggregated worker for GPU hosts. Build from the repository root:
#   docker build -f deploy/docker/worker.Dockerfile -t kvbaton/worker:0.1.0 .
# SGLang 0.5.17 is the version of the GPU runs in docs/gpu.md; prefill and decode need the same. Other releases:
#   --build-arg SGLANG_IMAGE=lmsysorg/sglang:TAG
ARG SGLANG_IMAGE=lmsysorg/sglang:v0.5.17-cu129-runtime
FROM ${SGLANG_IMAGE}

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_BREAK_SYSTEM_PACKAGES=1
WORKDIR /src
# --no-deps throughout: what the image has of torch, transformers and their kin stays as it is. The stubs of kvbaton/v1
# need protobuf 7 and grpcio 1.84; structlog, uvicorn, fastapi and the rest are SGLang's own or have no requirements.
COPY requirements/frontend.txt requirements/
RUN grep -oE '^(aetcd|googleapis-common-protos|grpcio|grpcio-health-checking|grpcio-reflection|grpcio-status|hatchling|opentelemetry-[a-z-]+|pathspec|pluggy|protobuf|structlog|trove-classifiers)==[^ ;]+' \
        requirements/frontend.txt > requirements/worker.txt \
    && pip install --no-deps -r requirements/worker.txt \
    && pip install --no-deps nixl==1.5.1 nixl-cu12==1.5.1 \
        opentelemetry-exporter-otlp-proto-http==1.45.2 opentelemetry-exporter-http-transport==0.66b2
COPY pyproject.toml README.md ./
COPY kvbaton kvbaton
COPY services services
RUN pip install --no-deps --no-build-isolation . \
    && kvbaton --version \
    && useradd --uid 10001 --create-home --shell /usr/sbin/nologin kvbaton

ENV HOME=/home/kvbaton PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /home/kvbaton
EXPOSE 50061 50062 8081 8082 12345
ENTRYPOINT ["kvbaton"]
CMD ["--help"]
