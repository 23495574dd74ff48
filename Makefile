# Every target installs what it needs in $(VENV), if it is not there yet, and does its job.
#   make demo    train a network on real data by DFA and compare it with backpropagation; a small
#                language model with ARGS="--network transformer"
#   make test    run the tests in PROCESSES processes; a test that hangs ends its own
#   make coverage    the same, and say which lines no test runs; takes half as long again
#   make test-slow    run what takes longer: all GPU kernels compiled, all pairs, the demo's accuracy
#   make ecosystem    run the tests with accelerate, Lightning and transformers, in .venv-ecosystem
#   make bench   time the kernels against what they replace; results and figures in bench-<date>/
#   make paper   run the paper's experiments; ARGS="table2 --quick" and the like
#   make lint    formatting, lint and types
#   make gpu-check    on a machine with an NVIDIA GPU: build, tests, sanitizer, benchmarks, profile;
#                     GPU_PYTHON=python3 uses a Python that has what it needs, ARGS="--stage A" runs a part

PYTHON ?= python3
VENV ?= .venv
TORCH ?= 2.13.0
PROCESSES ?= 2
bin := $(VENV)/bin
sources := pyproject.toml setup.py $(shell find csrc -type f)

# With an NVIDIA driver, torch's CUDA wheel. Without one, its CPU wheel, from pip's own index or else from PyTorch's.
ifeq ($(wildcard /proc/driver/nvidia/version),)
install_torch = $(bin)/pip install --quiet torch==$(TORCH)+cpu 2>/dev/null \
	|| $(bin)/pip install --quiet --retries 0 torch==$(TORCH) --index-url https://download.pytorch.org/whl/cpu \
	|| $(bin)/pip install --quiet torch==$(TORCH)
else
install_torch = $(bin)/pip install --quiet torch==$(TORCH)
endif

demo: $(VENV)/demo
	$(bin)/dfa-kernels demo $(ARGS)

# Threads that wait for work sleep, because the other processes' tests need the cores. A file's tests
# run in one process, which compiles for them once.
test test-slow coverage: export OMP_WAIT_POLICY = PASSIVE
test test-slow coverage: export OMP_NUM_THREADS = 1
pytest = $(bin)/python -m pytest -n $(PROCESSES) --dist loadfile --no-loadscope-reorder \
	-o faulthandler_exit_on_timeout=true

test: $(VENV)/test
	$(pytest) $(ARGS)

coverage: $(VENV)/test
	$(pytest) --cov --cov-report=term $(ARGS)

test-slow: $(VENV)/test
	$(pytest) -m slow $(ARGS)

ecosystem: export OMP_NUM_THREADS = 1
ecosystem:
	$(MAKE) VENV=.venv-ecosystem .venv-ecosystem/test .venv-ecosystem/ecosystem
	.venv-ecosystem/bin/python -m pytest tests/integrations $(ARGS)

bench: $(VENV)/bench
	$(bin)/dfa-kernels bench $(ARGS)

paper: $(VENV)/paper
	$(bin)/python -m benchmarks.paper $(ARGS)

lint: $(VENV)/dev
	$(bin)/ruff check
	$(bin)/ruff format --check
	$(bin)/mypy
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs -r $(bin)/clang-format --dry-run --Werror

format: $(VENV)/dev
	$(bin)/ruff check --fix
	$(bin)/ruff format
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs -r $(bin)/clang-format -i

ifdef GPU_PYTHON
gpu-check:
	$(GPU_PYTHON) .ci/gpu_check.py $(ARGS)
else
gpu-check: $(VENV)/dev
	$(bin)/python .ci/gpu_check.py $(ARGS)
endif

$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(install_torch)
	@touch $@

# The package is installed in place. The file $(VENV)/<extra> marks that this extra is installed; dev has
# all that the others have, so whoever wants several builds the package once by beginning with it.
$(VENV)/demo $(VENV)/test $(VENV)/bench $(VENV)/paper $(VENV)/ecosystem $(VENV)/dev: $(VENV)/torch $(sources)
	$(bin)/pip install --quiet "setuptools>=77" ninja
	$(bin)/pip install --quiet --no-build-isolation --editable ".[$(@F)]"
	@touch $@ $(if $(filter dev,$(@F)),$(addprefix $(VENV)/,demo test bench paper))

clean:
	rm -rf $(VENV) .venv-ecosystem build *.egg-info

.PHONY: demo test test-slow coverage ecosystem bench paper lint format gpu-check clean
