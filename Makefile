# Each target sets up what it needs: `make demo` on a fresh machine with Python 3.10 or later is enough.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# On Linux a bare `torch` is the CUDA build, gigabytes of it; `make demo TORCH=torch` takes that one.
TORCH ?= torch==2.13.0
MARKS ?= not slow and not browser
# Tests of one file share what is expensive to build: a file stays with one of the processes, and tests/conftest.py
# says in which order the files begin.
WORKERS ?= 2
MODULES := $(subst /,.,$(basename $(wildcard melfusion_pipeline/[a-z]*.py)))

.PHONY: demo docs test test-browser test-slow lint clean

demo: $(VENV)/demo.installed
	$(BIN)/python examples/demo.py

test: $(VENV)/test.installed lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=20 -m "$(MARKS)"

test-browser: $(VENV)/test.installed
	$(BIN)/python -m pytest -m browser

test-slow: $(VENV)/test.installed
	$(BIN)/python -m pytest -m slow -s

docs: $(VENV)/test.installed
	$(BIN)/python -m pdoc --docformat google --output-directory build/docs melfusion_pipeline $(MODULES)
	$(BIN)/python -m pytest tests/test_docs.py

lint: $(VENV)/test.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(VENV)/%.installed: setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	touch $@

clean:
	rm -rf build $(VENV) *.egg-info
