# Every target makes .venv first where it is missing or older than pyproject.toml or constraints.txt.
PYTHON    ?= python3
BIN       := .venv/bin
INSTALLED := .venv/.installed
PROTOS     = $(wildcard proto/gradwire_proto/v1/*.proto)
# How many test files run at once: one more than the cores that are asked for, because many tests wait.
JOBS      ?= 3
# What the tests run, beside what they start: the marker by which processes that outlive them are found.
RUN       := $(shell cat /proc/sys/kernel/random/uuid)

.DEFAULT_GOAL := help
.PHONY: help demo test conformance chaos lint format stubs bench bench-gpu

help:
	@echo "make demo    train a small network on handwritten digits through an embedded service"
	@echo "make test    all tests, and a check that no process is left behind"
	@echo "make conformance  everything that PyTorch's own tests try, through the service and by plain torch: half an hour"
	@echo "make chaos   ten minutes of training while processes are killed, stopped and cut off"
	@echo "make lint    ruff, pyright and buf"
	@echo "make format  ruff's format and safe fixes"
	@echo "make stubs   generate proto/gradwire_proto/v1/*_pb2* anew"
	@echo "make bench   everything that is timed, beside baselines and floors of the same run: a quarter of an hour;"
	@echo "             ARGS='--only NAME' for a part, ARGS=--write to put the table into README.md and RESULTS.md"
	@echo "make bench-gpu  what runs on a GPU of it"

demo: $(INSTALLED)
	@$(BIN)/gradwire demo

test: $(INSTALLED)
	@GRADWIRE_TEST_RUN=$(RUN) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder --durations=10 $(ARGS); status=$$?; \
	$(BIN)/python tests/leftovers.py $(RUN) && exit $$status

conformance: $(INSTALLED)
	@cd tests && OMP_NUM_THREADS=1 ../$(BIN)/python -m conformance $(ARGS)

chaos: $(INSTALLED)
	@cd tests && OMP_NUM_THREADS=1 ../$(BIN)/python -m chaos $(ARGS)

lint: $(INSTALLED)
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check .
	@$(BIN)/pyright
	@$(BIN)/python proto/buf_lint.py

format: $(INSTALLED)
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

# googleapis-common-protos brings google/api and google/rpc.
stubs: $(INSTALLED)
	@cd proto && ../$(BIN)/python -m grpc_tools.protoc -I . \
		-I $$(../$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') \
		--python_out=. --pyi_out=. --grpc_python_out=. $(PROTOS:proto/%=%)

bench: $(INSTALLED)
	@cd tests && OMP_NUM_THREADS=1 ../$(BIN)/python -m benchmarks $(ARGS)

bench-gpu: $(INSTALLED)
	@cd tests && OMP_NUM_THREADS=1 ../$(BIN)/python -m benchmarks --device cuda $(ARGS)

$(INSTALLED): pyproject.toml constraints.txt
	@echo "Installing gradwire and its tools into .venv (a few minutes the first time) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[server,dev]'
	@touch $@
