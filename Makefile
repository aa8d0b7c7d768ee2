# Everything a newcomer runs. Each target first makes the virtual environment, if it is missing or out of date.

.DEFAULT_GOAL := help
.PHONY: help demo test lint check bench parity crash-matrix asyncapi up venv lock

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.made-from-lock
CANDIDATES := python3 python3.13 python3.12 python3.11 python3.14
FIND_PYTHON := for name in $(CANDIDATES); do \
	$$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$name; break; }; done

help:  ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 16

demo: $(STAMP)  ## payments through real servers, and a crash in the middle (STAY=1 leaves everything running)
	$(BIN)/payments demo $(if $(STAY),--stay)

test: $(STAMP)  ## all tests, against real servers
	$(BIN)/python -m pytest tests

lint: $(STAMP)  ## format, lint rules, types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint test  ## what CI runs: lint, then all tests

bench: $(STAMP)  ## the benchmarks (QUICK=1 for a short run, ONLY=service, relay or gateways for a part)
	$(BIN)/python -m benchmarks $(if $(QUICK),--quick) $(if $(ONLY),--only $(ONLY))

parity: $(STAMP)  ## every message of our relay against the real Debezium's
	$(BIN)/python -m tests.parity

crash-matrix: $(STAMP)  ## a SIGKILL at each boundary of each operation at each provider (make test runs a sample)
	$(BIN)/python -m tests.crash_matrix

asyncapi: $(STAMP)  ## write asyncapi.yaml, the published contract, from the messages' models
	$(BIN)/python -m handlers.messages.asyncapi > asyncapi.yaml

up: $(STAMP)  ## everything on this machine, until Ctrl-C (in containers: docker compose up --build)
	$(BIN)/payments up

venv: $(STAMP)  ## the virtual environment alone

lock:  ## requirements.txt anew from pyproject.toml (needs uv)
	uv pip compile pyproject.toml --extra local --extra dev --universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url --no-header -q -o requirements.txt

$(STAMP): requirements.txt pyproject.toml infra/relay/native.pyx
	@rm -f infra/relay/native.*.so  # One that cannot be compiled anew must not stay as it was.
	@python=$$($(FIND_PYTHON)); \
	if [ -z "$$python" ]; then \
		echo "This project needs Python 3.11 or newer; none of these is: $(CANDIDATES)." >&2; exit 1; fi; \
	set -e; \
	if command -v uv >/dev/null; then \
		[ -x $(BIN)/python ] || uv venv -q --python "$$python" $(VENV); \
		uv pip install -q --compile-bytecode --python $(BIN)/python --require-hashes -r requirements.txt; \
		uv pip install -q --python $(BIN)/python --no-deps --no-build-isolation -e .; \
	else \
		[ -x $(BIN)/pip ] || "$$python" -m venv $(VENV) || { \
			echo "$$python cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }; \
		$(BIN)/pip install -q --disable-pip-version-check --require-hashes -r requirements.txt; \
		$(BIN)/pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .; \
	fi
	@$(BIN)/python -c 'import sys; from infra.relay.compiled import IS_COMPILED; sys.exit(not IS_COMPILED)' || \
		echo "No C compiler (or no Python.h) was found: all works, but the relay's inner loop is Python, at 50 to 60 % of the speed." >&2
	@touch $@
