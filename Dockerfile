# One image for every command of dp-extproc: the service, the stand-in engine, `check`, `envoy-config`.
#
#   docker build -t dp-extproc .                         the service
#   docker build -t dp-extproc:demo --target demo .      also what the load generator and the demo need
#
# Without a package index, put wheels into the folder wheels/ first; then the build uses no index.
# BuildKit and the builder before it both build this file, hence no RUN --mount.

# The Python that the tests run on. The project works with any from 3.11 on.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

# --- installs, and is thrown away ---

FROM ${PYTHON_IMAGE} AS dependencies
WORKDIR /build
# README.md is copied too, because COPY has to find a file if there are no wheels.
COPY README.md wheel[s] /wheels/
COPY deploy/image/install.sh deploy/image/dependencies.py /usr/local/bin/
RUN python3 -m venv --without-pip /app
# The dependencies, with every way of discovery, come before the source: its changes do not install them again.
COPY pyproject.toml ./
RUN python3 /usr/local/bin/dependencies.py dns picker > dependencies.txt && sh /usr/local/bin/install.sh -r dependencies.txt

FROM dependencies AS build
COPY README.md LICENSE ./
COPY src src
RUN sh /usr/local/bin/install.sh --no-deps .

FROM build AS build-demo
RUN python3 /usr/local/bin/dependencies.py demo > demo.txt && sh /usr/local/bin/install.sh -r demo.txt

# --- runs ---

FROM ${PYTHON_IMAGE} AS runtime
# A test compares the version with that of pyproject.toml.
LABEL org.opencontainers.image.title="dp-extproc" \
      org.opencontainers.image.description="Data-parallel-rank-aware routing of prefill/decode LLM fleets, as an Envoy external processor." \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="0.1.0"
# The root file system may be read-only, so nothing may be cached there. HOME is for libraries that read it.
ENV PATH=/app/bin:$PATH HOME=/tmp PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
# A volume that is mounted here belongs to the user of the image.
RUN install --directory --owner 65532 --group 65532 /var/lib/dp-extproc
# A number, because Kubernetes' runAsNonRoot cannot check a name.
USER 65532:65532
WORKDIR /var/lib/dp-extproc
EXPOSE 9002 9090
# Checks the service or the engine, whichever runs in the container; any other command is healthy while it runs.
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s --retries=3 \
  CMD ["python", "-m", "dp_extproc.runtime.container_health"]
ENTRYPOINT ["dp-extproc"]
CMD ["serve", "-c", "/etc/dp-extproc/dp-extproc.yaml"]

FROM runtime AS demo
COPY --from=build-demo /app /app

# A build without a target makes the last stage.
FROM runtime AS service
COPY --from=build /app /app
