# Two commands need nothing but Python 3.11 or later: `make quickstart` and `make test`.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: quickstart test lint format check experiments zoo clean

quickstart: $(INSTALLED)
	$(BIN)/dlops quickstart

# Three groups at a time, in the order of tests/conftest.py, the longest first: while one waits for a server, the others work.
test: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses 3 --no-loadscope-reorder

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: lint test

# What depends on a real clock or runs long; each writes its result to docs/benchmarks/.
experiments: $(INSTALLED)
	$(BIN)/python -m pytest tests/benchmarks -o "norecursedirs=.*" -o timeout=3600 -s

# Every network that torchvision builds, exported and checked; hours, and it goes on where it was cut off.
zoo: $(INSTALLED)
	$(BIN)/python -P -m dlops.workflows.zoo

# One environment for everything, made once and again when the pins or the dependencies change.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "dlops needs Python 3.11 or later; name one with: make PYTHON=/path/to/python3.12"; exit 1; }
	@echo "Installing into .venv (several GB of packages, PyTorch with CUDA among them; once)"
	@if command -v uv >/dev/null 2>&1; then \
		uv venv --quiet --allow-existing --python "$$(command -v $(PYTHON))" .venv && \
		uv pip install --compile-bytecode --python $(BIN)/python --constraint constraints.txt \
			--build-constraint constraints.txt --editable '.[all,dev]'; \
	else \
		$(PYTHON) -m venv .venv && \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt pip && \
		$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt \
			--build-constraint constraints.txt --editable '.[all,dev]'; \
	fi
	@touch $@

clean:
	rm -rf .venv .peers build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
