# Everything a person or a machine does here, by name. Needs make and Python 3.11 or newer, nothing else.

VENV := .venv
BIN  := $(VENV)/bin
# The first Python on the path that is new enough; override with `make PYTHON=...`.
PYTHON ?= $(shell for name in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$name && break; done)
# What a command is given on top: make test ARGS="-k tidy", make run ARGS="--port 9000".
ARGS ?=
# The demonstration's trace (a CSV file) and how many of its rows to take; empty means the default.
TRACE ?=
DEMO_ROWS ?=
# The commit that `make bench` compares this checkout with; empty means no comparison.
BASE ?=
# Processes that the tests are spread over, a file to one of them; 0 for none beside.
# One more than the two cores: a third of the time a test waits, for a disk, a broker or a restart.
WORKERS ?= 3

.PHONY: help setup lock run demo kafka test broker-faults explorers clients upstream faults fuzz mutants soak lint bench clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.installed  ## a virtual environment with every dependency, pinned and checked by hash

# The lock names all there is to install; left to look for itself, pip takes the newest of what is wanted with an extra.
$(VENV)/.installed: requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer was not found; install it, or say make PYTHON=/path/to/python" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing the pinned dependencies into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@$(BIN)/python -c "import ingest.admission.kernels, aggregator.decode.kernels" || echo "Loops cannot be compiled here: events are read one by one" >&2
	@touch $@

lock: setup  ## requirements.lock from pyproject.toml; what is pinned stays (ARGS="--upgrade", "--upgrade-package NAME")
	@$(BIN)/uv pip compile -q --no-annotate --no-header --generate-hashes --no-emit-index-url --no-emit-find-links \
		--universal --group dev pyproject.toml -o requirements.lock $(ARGS)

run: setup  ## start Meterstream on 127.0.0.1:8000, data in ./data
	@exec $(BIN)/meterstream serve $(ARGS)

demo: setup  ## meter an LLM trace (TRACE=file; generated where no real one is) end to end and check every total against a recount
	@$(BIN)/meterstream demo $(if $(TRACE),--trace "$(TRACE)") $(if $(DEMO_ROWS),--rows $(DEMO_ROWS)) $(ARGS)

kafka: setup  ## a real Kafka broker on 127.0.0.1 until Ctrl-C (ARGS="--port 9192 --data DIR", "--nodes 3", "--version 3.9"); needs Java 17 and Maven
	@exec $(BIN)/python -m tests.support.kafka $(ARGS)

# Tests that take minutes have a marker (pyproject.toml) and a target of their own. Each test is in exactly one target.
test: setup  ## every test but those of the next four (ARGS="-k tidy" for some)
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder \
		-m "not (kafka or crash or upstream or vendors)" $(ARGS)

broker-faults: setup  ## gateways, aggregators, forwarders and real brokers together, killed and cut off; some minutes
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m kafka $(ARGS)

explorers: setup  ## errors and deaths at every point of a write, killed servers, power losses, torn and damaged files; some minutes
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m crash $(ARGS)

clients: setup  ## Polar's clients, the vendors' libraries and the examples, and our own client killed and cut off; some minutes
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m vendors $(ARGS)

upstream: setup  ## forwarding to a second server that plays Polar, and reconciling with it and with the log; some minutes
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m upstream $(ARGS)

faults: setup  ## the fault tests with more rounds and longer faults, each printing what was sent, stored and lost
	@$(BIN)/python -m pytest tests/faults --long $(ARGS)

fuzz: setup  ## random questions about usage, everywhere they can be asked, against a bookkeeper in plain Python; some minutes
	@$(BIN)/python -m pytest tests/aggregator/api/test_usage_fuzz.py tests/deploy/commands/test_usage_surfaces.py --long $(ARGS)

mutants: setup  ## edits that the tests of what moves money do not notice (ARGS="'meters.ledger.price.*'" for a module)
	@test -x $(BIN)/mutmut || $(BIN)/python -m pip install --quiet --disable-pip-version-check "mutmut==3.8.1"  # for this alone
	@$(BIN)/mutmut run --max-children 1 $(ARGS)
	@$(BIN)/mutmut results

soak: setup  ## an hour of load and random faults, proven at the end (ARGS="--minutes N --seed S"); some kinds need root
	@$(BIN)/python -m tests.faults.soak $(ARGS)

lint: setup  ## style, types and the direction of imports
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

bench: setup  ## every benchmark into benchmarks/README.md; with BASE=COMMIT a comparison with that commit; twelve minutes (ARGS="--quick")
	@$(BIN)/python -m benchmarks$(if $(BASE),.compare "$(BASE)") $(ARGS)

clean:  ## remove what was made here, except the data
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache mutants
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
