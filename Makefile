SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help serve test test-slow test-k8s lint type proto bench demo-model clean

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTHON ?= python3
PORT ?= 8000

help: ## list what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk 'BEGIN {FS = ":.*## "} {printf "  make %-12s %s\n", $$1, $$2}'

$(READY): pyproject.toml constraints.txt
	@echo "Setting up $(VENV) (once) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

serve: $(READY) ## serve the demo model on 127.0.0.1 (PORT=8000) until Ctrl-C
	@exec $(BIN)/expertmesh serve deploy/mesh.yaml --port $(PORT)

test: $(READY) ## lint, types, import rule, and all tests but the two below (no GPU needed)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/python -m pytest -n 2 --dist loadgroup -m "not slow and not kubernetes" $(PYTEST_ARGS)

test-slow: $(READY) ## the long proofs
	@$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

test-k8s: $(READY) ## the Kubernetes tests, and every overlay, on the cluster that KUBECONFIG names
	@test -n "$$KUBECONFIG" || { echo "set KUBECONFIG: a namespace is made in that cluster, and deleted" >&2; exit 2; }
	@$(BIN)/python -m pytest -m kubernetes $(PYTEST_ARGS)

lint: $(READY) ## ruff and the import rule
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/lint-imports

type: $(READY) ## mypy, strict
	@$(BIN)/mypy

proto: $(READY) ## generate the gRPC stubs from proto/
	@$(BIN)/python -m grpc_tools.protoc --proto_path=proto --python_out=. --pyi_out=. --grpc_python_out=. $$(cd proto && find . -name '*.proto' | sed 's|^\./||')

bench: $(READY) ## serving benchmark: this server and the installed peers, same checkpoint, same prompts
	@$(BIN)/expertmesh bench serve $(BENCH_ARGS)

demo-model: $(READY) ## train deploy/demo-model again (about 40 minutes on 2 cores)
	@$(BIN)/python deploy/demo-model/training/train.py

clean: ## remove what the other targets made
	@rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
