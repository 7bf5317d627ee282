# Two commands on a bare machine: `make demo` and `make test`. Each makes .venv, installs and runs.
PYTHON ?= python3
OUT ?= demo
BIN := .venv/bin

.PHONY: demo test lint types clean

demo: .venv/.installed
	$(BIN)/eosin demo --out $(OUT)

# Two processes of one thread each; a file's tests stay together, as they share what they made.
test: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.installed
	mkdir -p build/types/eosin
	for room in configs data_tools ssl eval launch; do ln -sfn ../../../$$room build/types/eosin/$$room; done
	$(BIN)/mypy

.venv/.installed: setup.py pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Eosin needs Python 3.11 or newer: make PYTHON=python3.12 ...") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --upgrade pip
	$(BIN)/pip install -e '.[test]'
	touch $@

clean:
	rm -rf build demo .venv
