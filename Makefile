.DEFAULT_GOAL := help
SHELL := bash
BIN := .venv/bin

.PHONY: help
help: ## list what there is
	@echo "Usage: make TARGET [NAME=value ...]"; echo
	@grep -hE '^[a-zA-Z%-]+:.* ## ' $(MAKEFILE_LIST) \
		| sed -E 's/^([a-zA-Z%-]+):.* ## /\1\t/; s/%/NAME/' \
		| while IFS=$$'\t' read -r name what; do printf '  %-12s %s\n' "$$name" "$$what"; done
	@echo; echo "  PYTHON=path  the Python (3.11 to 3.13) that makes .venv"
	@echo "  EXTRA=cpu    or cuda: the build of vLLM to install (default: cuda where a GPU is seen)"

.PHONY: setup
setup: ## make .venv and install everything (the other targets call it)
	@tools/setup.sh

.PHONY: demo
demo: setup ## serve a tiny Jamba with AVMP and with stock vLLM, compare (SHAREGPT=file DEMO_FLAGS=...)
	@$(BIN)/avmp demo $(DEMO_FLAGS)

.PHONY: test
test: setup ## lint, types and all tests (PYTEST_FLAGS=...)
	@tools/test.sh $(PYTEST_FLAGS)

.PHONY: lint
lint: setup ## ruff and mypy only
	@$(BIN)/ruff check && $(BIN)/ruff format --check && $(BIN)/mypy

.PHONY: format
format: setup ## let ruff put the files in order
	@$(BIN)/ruff check --fix && $(BIN)/ruff format

.PHONY: docs
docs: setup ## build the documentation site into build/docs; a broken link is an error
	@$(BIN)/sphinx-build -W -n --keep-going -q -c docs . build/docs
	@echo build/docs/docs/index.html

bench-%: setup ## run the benchmark NAME (BENCH_FLAGS=...); `.venv/bin/avmp bench --help` lists them
	@$(BIN)/avmp bench $* $(BENCH_FLAGS)

.PHONY: clean
clean: ## remove .venv and what the demo and the benchmarks wrote
	rm -rf .venv .demo .bench .vllm-source
