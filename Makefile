VENV ?= .venv
export VENV

.DEFAULT_GOAL := help
.PHONY: aiperf docs faults guidellm help setup model demo test test-unit test-integration test-chaos test-e2e lint format protos

help: ## show this
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## create or complete .venv for a machine without a GPU (VENV=…, PYTHON=…, KVBATON_TORCH_INDEX=…)
	@scripts/setup-cpu.sh

model: setup ## fetch the small model that the demo and the end-to-end tests use
	@$(VENV)/bin/kvbaton model fetch smollm2

demo: model ## a prefill and a decode worker on this machine, and a request through both
	@$(VENV)/bin/python scripts/demo.py

# stage FOLDER,DESCRIPTION: run one folder of tests; a folder that does not exist is no failure
define stage
	@if [ -d tests/$(1) ]; then \
		echo; echo "== $(1): $(2)"; \
		$(VENV)/bin/python -m pytest tests/$(1) $(PYTEST_ARGS); \
	else \
		echo "== $(1): no tests/$(1) folder, skipped"; \
	fi
endef

test: model ## every stage in order, the quick ones first; all run even when one fails (PYTEST_ARGS=…)
	@failed=; for stage in unit integration chaos e2e; do \
		$(MAKE) --no-print-directory test-$$stage || failed="$$failed $$stage"; \
	done; \
	echo; if [ -n "$$failed" ]; then echo "FAILED:$$failed"; exit 1; fi; echo "All stages passed."

test-unit: setup ## one module at a time, no processes, no network
	$(call stage,unit,one module at a time$(comma) no engine)

test-integration: setup ## real etcd, sockets and processes around a fake or simulated engine
	$(call stage,integration,real etcd$(comma) sockets and processes around a fake or simulated engine)

test-chaos: setup ## kills, freezes and restarts of real processes (skipped without tests/chaos)
	$(call stage,chaos,kills$(comma) freezes and restarts of real processes)

test-e2e: model ## SGLang on the CPU: prefill and decode over NIXL, tokens compared
	$(call stage,e2e,SGLang on the CPU$(comma) prefill and decode over NIXL)

aiperf: model ## aiperf against a cluster of simulated engines (1.2 GB more on the first run; LOADGEN_ARGS=…)
	@PATH="$(abspath $(VENV))/bin:$$PATH" scripts/loadgen.sh aiperf $(LOADGEN_ARGS)

guidellm: model ## the same with guidellm (1.5 GB)
	@PATH="$(abspath $(VENV))/bin:$$PATH" scripts/loadgen.sh guidellm $(LOADGEN_ARGS)

comma := ,

lint: setup ## ruff, formatting, types, contracts
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/basedpyright
	$(VENV)/bin/buf lint

format: setup ## rewrite the code as lint wants it
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

protos: setup ## generate kvbaton/v1 from protos/
	@PYTHON=$(VENV)/bin/python scripts/gen_protos.sh

docs: setup ## generate docs/configuration.md and docs/openai.md from the code
	@PYTHONPATH=. $(VENV)/bin/python scripts/gen_config_docs.py
	@PYTHONPATH=. $(VENV)/bin/python scripts/gen_openai_docs.py

faults: setup ## measure every fault in every phase, and write docs/faults.md (times and list of tests)
	@rm -f build/faults.json
	@$(VENV)/bin/python -m pytest tests/chaos/test_matrix.py $(PYTEST_ARGS)
	@PYTHONPATH=. $(VENV)/bin/python scripts/gen_faults_docs.py
