# make demo   set up .venv, then run the main job on embedded defaults
# make test   linters, types, import contracts and all tests
# make bench  the short versions of the benchmarks

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test check bench clean

demo: $(VENV)/.demo
	$(BIN)/farm demo

# Two at a time, a file by one of them: much of the time is waiting, and what a file's tests share is made once. In the
# order of the folders: those of few long tests come first, so that both have something to do until the end. PyTorch
# gets one thread in each: with more they wait for one another.
test: check
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

check: $(VENV)/.test
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

bench: $(VENV)/.test
	$(BIN)/python -m tests.benchmarks.embedded --short
	$(BIN)/python -m tests.benchmarks.models --short
	$(BIN)/python -m tests.benchmarks.prepare --images 200
	$(BIN)/python -m tests.benchmarks.slide_merge --short
	$(BIN)/python -m tests.benchmarks.segmentation_memory --short
	$(BIN)/python -m tests.benchmarks.many_jobs --short
	$(BIN)/python -m tests.benchmarks.utilisation --short
	$(BIN)/python -m tests.benchmarks.startup --short
	$(BIN)/python -m tests.benchmarks.segmentation_utilisation --short
	$(BIN)/python -m tests.benchmarks.growth --short

clean:
	rm -rf $(VENV)

# A stamp an extra: installed again only when what is asked for changed.
$(VENV)/.%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[$*]'
	touch $@
