# make demo and make test each work as the only command typed on a fresh checkout.

VENV    := .venv
BIN     := $(VENV)/bin
STAMP   := $(VENV)/installed
SAMPLES := samples
DEMO    := demo_out

# The first of these that runs, is 3.11 or 3.12 and can make an environment.
FIND_PYTHON = for python in $(PYTHON) python3.12 python3.11 python3; do \
	"$$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' \
		2>/dev/null && { command -v "$$python"; break; }; done; true

# A stamp that survived a move of the checkout, a removed interpreter or a half-deleted environment
# promises what is no longer there.
ifneq ($(wildcard $(STAMP)),)
ifneq ($(shell test "$$(cat $(STAMP))" = "$(CURDIR)" && $(BIN)/ulae-rt --version >/dev/null 2>&1 && echo ok),ok)
$(shell rm -f $(STAMP))
endif
endif

.DEFAULT_GOAL := help
.PHONY: help install demo test check format kernel-table bench accuracy ablation test-gpu bench-gpu tune-gpu gpu-quarter gpu-cubins \
	gpu-training gpu-train profile-gpu build/path clean

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1|\2/p' $(MAKEFILE_LIST) | \
		while IFS='|' read -r target text; do printf '%-19s%s\n' "$$target" "$$text"; done

$(STAMP): pyproject.toml constraints.txt
	@set -e; if [ ! -f $(STAMP) ]; then \
		python=$$($(FIND_PYTHON)); \
		if [ -z "$$python" ]; then \
			echo "error: no Python 3.11 or 3.12 that can make a virtual environment was found" >&2; \
			echo "hint: install one (with its venv module), or name it: make PYTHON=/path/to/python3.12 ..." >&2; \
			exit 1; \
		fi; \
		echo "setting up $(VENV) with $$python"; \
		"$$python" -m venv --clear $(VENV); \
	fi
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[dev]'
	@printf '%s\n' "$(CURDIR)" > $(STAMP)

install: $(STAMP)  ## set up .venv with the pinned versions

demo: $(STAMP)  ## register the two sample brains and write a picture of it
	@mkdir -p $(DEMO)
	$(BIN)/ulae-rt register -m $(SAMPLES)/colin27_brain.nii.gz -f $(SAMPLES)/mni152_2009a_brain.nii.gz \
		-o $(DEMO)/moved.nii.gz -w $(DEMO)/warp.nii.gz --jacobian $(DEMO)/jacobian.nii.gz \
		--qc $(DEMO)/qc.png --overwrite

test: $(STAMP)  ## run the tests
	$(BIN)/python -P -m pytest $(ARGS)

check: $(STAMP)  ## lint, format and type check
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(STAMP)  ## rewrite the sources in the house format
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format

bench: $(STAMP)  ## run the benchmarks, as pytest --benchmark does, and write their report
	$(BIN)/python -P -m pytest --benchmark $(ARGS)

accuracy: $(STAMP)  ## register OASIS val by every method and baseline, and measure (hours)
	$(BIN)/python -P bench/accuracy.py $(ARGS)

ablation: $(STAMP)  ## train and measure the paper's ablation at small scale (an hour)
	$(BIN)/python -P bench/ablation.py $(ARGS)

kernel-table: $(STAMP)  ## compile the kernels for every GPU and show what each takes of it
	$(BIN)/python -P -m ulae_rt.kernels.resources $(ARGS)

# A borrowed GPU machine has torch, triton, numpy, pytest and pytest-benchmark, and nothing can be
# installed on it: build/path shows the four folders as the one package that an installation would
# make. Its versions are its own: what they warn of is shown, and fails nothing.
# Where the copy of the files has no git history, ULAE_RT_COMMIT says which commit it is of, as
# git describe --always --dirty --abbrev=9 --exclude='*' prints it. Records of bench-gpu and tune-gpu
# go to bench/results, or to the folder that ULAE_RT_EVIDENCE names.
BARE_PYTEST = PYTHONSAFEPATH=1 PYTHONPATH="$(CURDIR)/build/path" python3 -m pytest -W default
# What the kernels are tested by, and imports no more than that machine has.
GPU_ALONE = tests/kernels/test_gpu.py
GPU_TESTS = $(wildcard tests/kernels/test_*_kernel.py) tests/kernels/test_resize.py $(GPU_ALONE)
JOBS = 8

build/path:
	@rm -rf $@ && mkdir -p $@/ulae_rt
	@ln -s $(addprefix ../../../,$(wildcard ulae_rt/*) kernels export engines) $@/ulae_rt/

# Compiling hundreds of small kernels is what takes the time: every module in a process of its own,
# then alone the one that fills the memory. 5 is pytest's status where ARGS leave nothing to run.
test-gpu: build/path  ## run the kernels' tests with this machine's own python3, without installing anything
	@printf '%s\n' $(filter-out $(GPU_ALONE),$(GPU_TESTS)) | xargs -P $(JOBS) -I{} sh -c \
		'log=build/$$(basename {}).log; $(BARE_PYTEST) {} $(ARGS) >$$log 2>&1; status=$$?; \
		cat $$log; [ $$status -eq 5 ] || exit $$status'
	$(BARE_PYTEST) $(GPU_ALONE) $(ARGS) || [ $$? -eq 5 ]

bench-gpu: build/path  ## run the benchmarks in the same way
	$(BARE_PYTEST) --benchmark $(ARGS)

BARE_PATH = $(CURDIR)/build/path:$(CURDIR)/bench:$(CURDIR)/tests
BARE_PYTHON = PYTHONSAFEPATH=1 PYTHONPATH="$(BARE_PATH)" python3

tune-gpu: build/path  ## measure launch configurations and propose lines for kernels/_configs.py
	$(BARE_PYTHON) bench/tune.py $(ARGS)

OUT = build/quarter
gpu-quarter: build/path  ## the most valuable evidence of a GPU in a quarter of an hour: CALL=1, then CALL=2
	$(BARE_PYTHON) bench/quarter.py --out "$(OUT)" $(if $(CALL),--call $(CALL)) $(ARGS)

# What the GPU machine has: a compiled kernel is of use to exactly this Python and Triton. With
# PATH=build/gpu-venv/bin:$PATH before it, make gpu-quarter ARGS=--small rehearses there; numpy is
# older than the machine's for that, because Triton 3.6's interpreter fails with 2.4.
GPU_PYTHON = python3.12
GPU_PACKAGES = torch==2.11.0 triton==3.6.0 'numpy<2.4' safetensors pytest pytest-benchmark
GPU_VENV = build/gpu-venv
$(GPU_VENV)/installed:
	$(GPU_PYTHON) -m venv --clear $(GPU_VENV)
	$(GPU_VENV)/bin/python -m pip install --disable-pip-version-check --quiet $(GPU_PACKAGES)
	@touch $@

gpu-cubins: build/path $(GPU_VENV)/installed  ## compile, without a GPU, the kernels of gpu-quarter into build/triton-cache
	PYTHONSAFEPATH=1 PYTHONPATH="$(BARE_PATH)" $(GPU_VENV)/bin/python bench/cubins.py $(ARGS)

# What training needs and the GPU machine has not, unpacked: nothing can be installed there.
GPU_WHEELS = absl-py annotated-types isal nibabel protobuf pydantic pydantic_core tensorboard tqdm \
	typing-inspection typing_extensions
build/wheels/site: constraints.txt | $(STAMP)
	rm -rf build/wheels && mkdir -p $@
	$(BIN)/python -m pip download --disable-pip-version-check --quiet -c constraints.txt -d build/wheels \
		--no-deps --only-binary=:all: --implementation cp --python-version 3.12 \
		--platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 $(GPU_WHEELS)
	for wheel in build/wheels/*.whl; do $(BIN)/python -m zipfile -e $$wheel $@; done
	rm -rf build/wheels/*.whl $@/tensorboard/webfiles.zip $@/nibabel/tests $@/nibabel/*/tests

PREPARED = prepared
gpu-training: build/wheels/site  ## pack what training needs there: scans of PREPARED/train and val, packages, kernels
	PYTHONSAFEPATH=1 PYTHONPATH="$(BARE_PATH)" $(BIN)/python bench/pack_training.py --data $(PREPARED) \
		-o build/gpu-training.tar.xz

build/gpu-training.unpacked: build/gpu-training.tar.xz
	python3 -m tarfile -e $< build
	@touch $@

DATA = build/training
gpu-train: OUT = build/gpu-train
gpu-train: build/path $(if $(wildcard build/gpu-training.tar.xz),build/gpu-training.unpacked)  ## train for MINUTES into OUT, from the start or from CHECKPOINT=DIR/run of an earlier command
	@test -n "$(MINUTES)" || { echo "error: MINUTES is not given, expected MINUTES=9 or the like" >&2; exit 2; }
	PYTHONSAFEPATH=1 PYTHONPATH="$(BARE_PATH):$(CURDIR)/build/wheels/site" python3 bench/gpu_training.py \
		--out "$(OUT)" --data "$(DATA)" --minutes $(MINUTES) $(if $(CHECKPOINT),--checkpoint "$(CHECKPOINT)") $(ARGS)

profile-gpu: build/path  ## list the kernels that a training step spends its time in
	$(BARE_PYTHON) bench/profile_step.py $(ARGS)

clean:  ## remove everything that was built, and the environment
	rm -rf $(VENV) build dist $(DEMO) *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks
