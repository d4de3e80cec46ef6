# The frontend: no torch, no SGLang. Build from the repository root:
#   docker build -f deploy/docker/frontend.Dockerfile -t kvbaton/frontend:0.1.0 .
FROM python:3.12.12-slim-bookworm AS build

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
COPY requirements/frontend.txt requirements/
RUN pip install --require-hashes -r requirements/frontend.txt
COPY pyproject.toml README.md ./
COPY kvbaton kvbaton
COPY services services
RUN pip install --no-deps --no-build-isolation . && pip uninstall -y hatchling pip

FROM python:3.12.12-slim-bookworm

RUN useradd --uid 10001 --create-home --shell /usr/sbin/nologin kvbaton
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH HOME=/home/kvbaton PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /home/kvbaton
EXPOSE 50051 8000
ENTRYPOINT ["kvbaton"]
CMD ["frontend", "--host", "0.0.0.0"]
