FROM python:3.11.15-slim

ENV PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /srv/payments

# The libraries first: they change seldom, the code often.
COPY requirements.txt ./
RUN pip install --require-hashes -r requirements.txt

COPY pyproject.toml asyncapi.yaml ./
COPY app app
COPY domain domain
COPY handlers handlers
COPY infra infra
COPY migrations migrations
# A C compiler for as long as it takes to compile the relay's inner loop. Python's own bytecode is made here, too: who runs
# it may write nothing, and would compile everything at each start. Nothing but the last folder, that is, for a volume that
# is mounted there takes over its owner: the sandbox's books, in docker-compose.yml.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev \
    && pip install --no-deps --no-build-isolation -e . && python -c "import infra.relay.native" \
    && python -m compileall -q app domain handlers infra migrations \
    && apt-get purge -y --auto-remove gcc libc6-dev && rm -rf /var/lib/apt/lists/* \
    && useradd --system --no-create-home payments \
    && install --directory --owner=payments /var/lib/payments

USER payments
ENTRYPOINT ["payments"]
