# Every target does its own set-up: a virtual environment in .venv with the pinned requirements, and the native build. Needed: python3 with venv and,
# for the native libraries, a C++20 compiler. Without a compiler everything still runs, on the reference, and says so.
#
#   make demo     a real MobileViTv2, original against accelerated, on real photos
#   make test     every test, once per instruction set of this CPU and once through the Triton interpreter
#   make bench    the figures of benchmarks/results, measured here: whole models, the scripts of benchmarks/, every op (hours)
#   make gpu      on a machine with a GPU and its own torch (nothing is downloaded): tests, proof and figures on that GPU
#   make lint     ruff and mypy
#   make clean    remove what was built (the environment stays; `make distclean` removes it too)

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN := $(BIN)/python
PIP := $(RUN) -m pip --quiet --disable-pip-version-check
REPORT ?= demo-report
RESULTS ?= benchmarks/results
JOBS ?= 2
PYTEST := $(RUN) -m pytest --quiet -rfE
TRITON_TESTS := test-triton-contract test-triton-ops
ISA_TESTS := test-avx512_bf16 test-avx512 test-avx2 test-baseline
PARTS := test-triton-contract test-contract test-models $(ISA_TESTS) test-rest test-triton-ops test-cpp
MODEL_TESTS := tests/integrations tests/convergence
NATIVE_SOURCES := $(shell find csrc -type f -not -path 'csrc/tests/*') vitkernels/builder.py setup.py pyproject.toml

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: setup demo test $(PARTS) bench gpu lint clean distclean

setup: $(VENV)/.native

# torch first and alone, so that nothing later can pull another one.
$(VENV)/.torch: requirements/torch.txt
	@echo "setting up $(VENV): torch and the other requirements (some minutes, once)"
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@$(PIP) install -r requirements/torch.txt
	@touch $@

$(VENV)/.requirements: $(VENV)/.torch requirements/no-deps.txt requirements/dev.txt
	@$(PIP) install --no-deps -r requirements/no-deps.txt
	@$(PIP) install -r requirements/dev.txt
	@touch $@

$(VENV)/.native: $(VENV)/.requirements $(NATIVE_SOURCES)
	@echo "building vitkernels"
	@$(PIP) install --no-build-isolation --no-deps --editable .
	@touch $@

demo: setup
	@$(RUN) -m vitkernels demo --out $(REPORT) $(DEMO_ARGUMENTS)

# The parts run side by side, the longest first, each one's output in one piece. Two threads in each, as the kernels run with, that do not spin while they
# wait, since another part has the other core.
test: export OMP_WAIT_POLICY := passive
test: setup
	@$(MAKE) --no-print-directory --jobs=$(JOBS) --output-sync=target $(PARTS)

test-cpp: setup
	@if ! command -v cmake >/dev/null; then \
	  echo "no cmake: the C++ tests of csrc/tests are not run"; \
	else \
	  PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B build/cmake -G Ninja -DPython_EXECUTABLE="$(abspath $(BIN))/python" --log-level=WARNING >/dev/null; \
	  MAKEFLAGS= PATH="$(abspath $(BIN)):$$PATH" cmake --build build/cmake --target csrc_tests -- --quiet; \
	  ctest --test-dir build/cmake --output-on-failure; \
	fi

test-contract: setup
	@echo "contract of every backend, with the instruction set of this CPU"
	@$(PYTEST) tests/contract

test-models: setup
	@echo "models, original against accelerated"
	@$(PYTEST) $(MODEL_TESTS)

test-rest: setup
	@echo "everything else"
	@$(PYTEST) tests --ignore=tests/contract $(addprefix --ignore=,$(MODEL_TESTS))

# test-contract runs the instruction set that is detected; what the contract says about kernels holds for the others, too, those this CPU can run.
# avx512 and avx512_bf16 differ in bfloat16 alone.
test-avx512 test-avx512_bf16: ALSO := and bfloat16
OTHER_ISA = from vitkernels import host, native; print(native.cpu_isa() == '$*' != host.isa_report().detected)
$(ISA_TESTS): test-%: setup
	@export OMP_NUM_THREADS=1 VITKERNELS_CPU_ISA=$*; \
	other=$$($(RUN) -c "$(OTHER_ISA)"); \
	if [ "$$other" = True ]; then \
	  echo "contract of the native backend on $*"; \
	  $(PYTEST) tests/contract -m kernel -k 'native $(ALSO)'; \
	else \
	  echo "contract of the native backend on $*: not run by itself (it is the detected one, or cannot run here)"; \
	fi

# The interpreter multiplies with numpy's OpenBLAS, which takes its kernels for Haswell on an AVX-512 CPU that it does not know (Zen 5). Those round the same
# product differently from place to place, as no GPU does: a backward then does not find its forward's logits again.
INTERPRETER_BLAS := $(shell grep -q ' avx512dq ' /proc/cpuinfo 2>/dev/null && echo OPENBLAS_CORETYPE=SkylakeX)
$(TRITON_TESTS): test-triton-%: setup
	@echo "Triton kernels in the interpreter, tests/$*"
	@OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(INTERPRETER_BLAS) $(PYTEST) tests/$* -k triton

bench: setup
	@$(RUN) benchmarks/whole_models.py --compile --threads 2 --out $(RESULTS)/whole_models
	@$(RUN) benchmarks/whole_models.py --dtype bfloat16 --threads 2 --out $(RESULTS)/whole_models/bfloat16
	@$(RUN) benchmarks/training.py --batch 8 --compile --threads 2 --out $(RESULTS)/training/batch8
	@$(RUN) benchmarks/training.py --batch 2 --threads 2 --out $(RESULTS)/training/batch2
	@$(RUN) benchmarks/training.py --batch 8 --tuned-malloc --threads 2 --out $(RESULTS)/training/tuned-malloc
	@for pair in server:server learnable_memory:memory detection:detection patch_embedding:patch_embedding; do \
	  $(RUN) benchmarks/$${pair%%:*}.py --out $(RESULTS)/$${pair##*:}; \
	done
	@$(RUN) -m vitkernels bench --out $(RESULTS)

# No virtual environment: the machine's own python3 and torch are what is to be proved. The build takes the CUDA kernels, too, where nvcc is; `BUILD=`
# leaves it out where the libraries of vitkernels/_lib are there. Most of the time goes into compiling Triton's kernels, so pytest-xdist is used where it
# is installed, and what the benchmark needs is compiled beforehand, by a process for every op and dtype side by side: the others find it in Triton's
# cache. Every part has its limit, and writes what it has found as it finds it: all of it takes under nine minutes, and what is cut off loses nothing.
# WARM, CONTRACT, VERIFY, BENCH and MODELS are the seconds of the parts, for another division of the time. A part that fails does not stop those behind
# it; the target then fails at the end.
WARM = 70
CONTRACT = 130
VERIFY = 25
BENCH = 120
MODELS = 70
TRITON_OPS = import torch; from vitkernels import backends as b, registry; print(*(op for op in registry.all_specs() if not b.why_not(op, 'triton', torch.device('cuda'), torch.float32)))
BUILD = $(PYTHON) -m pip --quiet --disable-pip-version-check install --no-build-isolation --no-deps --editable .
GPU_RESULTS = $(RESULTS)/gpu
SANITIZED := (cuda-cascaded_group_attention and (2x24x8x9 or 1x40x7x7 or 1x20x14x14)) or (cuda-re_attention and bfloat16 and without_gradients)
LIMITED = timeout --signal=INT --kill-after=10
gpu: export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
gpu:
	@$(PYTHON) -c "import sys, torch; torch.cuda.is_available() or sys.exit('make gpu: torch finds no GPU on this machine')"
	@$(BUILD)
	@$(PYTHON) -m vitkernels doctor
	@mkdir -p build; rm -f build/gpu-failed
	@echo "compiling the benchmark's Triton kernels"
	@for op in $$($(PYTHON) -c "$(TRITON_OPS)"); do for dtype in bfloat16 float32; do \
	  timeout --signal=INT --kill-after=5 $(WARM) $(PYTHON) -m vitkernels bench $$op --device cuda --no-compile --rounds 1 --dtype $$dtype >/dev/null 2>&1 & \
	done; done; wait
	@workers=$$($(PYTHON) -c "import importlib.util as u; print('--numprocesses=auto --maxschedchunk=4' if u.find_spec('xdist') else '')"); \
	timeout --signal=INT --kill-after=5 $(CONTRACT) $(PYTHON) -m pytest --quiet $$workers tests/contract --device cuda -m "kernel or gpu" \
	  -k "triton or cuda" --record $(GPU_RESULTS)/contract.txt || echo "make gpu: a test failed, or there was no time for all"
	@echo "the contract's tests: $$(cut -d ' ' -f 1 $(GPU_RESULTS)/contract.txt | grep . | sort | uniq -c | xargs)"
	@grep -q '^passed' $(GPU_RESULTS)/contract.txt && ! grep '^failed' $(GPU_RESULTS)/contract.txt || touch build/gpu-failed
	@if ! command -v compute-sanitizer >/dev/null; then \
	  echo "no compute-sanitizer: the CUDA kernels' memory accesses are not checked"; \
	else \
	  for tool in memcheck racecheck; do \
	    echo "CUDA kernels under compute-sanitizer, $$tool"; \
	    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout --kill-after=5 40 compute-sanitizer --tool $$tool --error-exitcode 1 --kernel-name kns=attention \
	      $(PYTHON) -m pytest --quiet tests/contract/test_forward_backward.py --device cuda -k "$(SANITIZED)" \
	      --op cascaded_group_attention --op re_attention || { [ $$? = 124 ] && echo "cut off"; } || touch build/gpu-failed; \
	  done; \
	fi
	@$(LIMITED) $$(($(VERIFY) + 20)) $(PYTHON) -m vitkernels verify --device cuda --rounds 3 --seconds $(VERIFY) || touch build/gpu-failed
	@$(LIMITED) $$(($(BENCH) + 25)) $(PYTHON) -m vitkernels bench --device cuda --no-compile --rounds 5 --dtype bfloat16 --dtype float32 \
	  --seconds $(BENCH) --out $(GPU_RESULTS) || touch build/gpu-failed
	@$(LIMITED) $$(($(MODELS) + 30)) $(PYTHON) benchmarks/whole_models_gpu.py --total $(MODELS) --seconds 3 --rounds 7 --out $(GPU_RESULTS) \
	  || touch build/gpu-failed
	@test ! -e build/gpu-failed || { echo "make gpu: a part failed, see above"; exit 1; }

lint: $(VENV)/.requirements
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy

clean:
	@rm -rf build dist *.egg-info vitkernels/_lib $(REPORT) $(VENV)/.native
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	@rm -rf $(VENV)
