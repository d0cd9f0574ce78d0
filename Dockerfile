# The server in a container, for x86-64 and arm64:
#   docker build -t mobilevlm .
#   docker run -p 8080:8080 -e MOBILEVLM_API_KEY=secret -v "$PWD/bundle:/bundle:ro" mobilevlm /bundle
# Without a bundle it serves the built-in model nano.
FROM python:3.12-slim AS build
WORKDIR /source
COPY setup.cfg pyproject.toml README.md LICENSE ./
COPY mobilevlm mobilevlm
COPY export export
COPY runtime runtime
RUN python -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.12-slim
COPY --from=build /wheels /wheels
COPY constraints.txt /wheels/
RUN python -m pip install --no-cache-dir -c /wheels/constraints.txt \
    "$(echo /wheels/*.whl)[server,structured]"
RUN useradd --system --create-home mobilevlm
USER mobilevlm
EXPOSE 8080
HEALTHCHECK --start-period=60s --interval=30s --timeout=5s \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8080/health', timeout=4)"]
ENTRYPOINT ["mobilevlm", "serve", "--host", "0.0.0.0"]
CMD ["nano"]
