# One command sets everything up and runs the demo, one sets everything up and runs the tests; each
# in a virtual environment of its own under .venv/.
#
#   make demo                          segment a real microscopy image
#   make test                          all tests, the CUDA sources emulated on the host
#   make sanitize                      the operators' tests under AddressSanitizer and UBSan
#   make lint                          ruff, clang-format and mypy, as before each commit
#   make TORCH=torch==2.13.0 test      with a torch of your choice
PYTHON ?= python3
TORCH ?= torch
PYTEST ?= -q

SOURCES := pyproject.toml CMakeLists.txt $(shell find build_backend csrc python -type f -not -name '*.pyc')
TESTED := cmake.define.SEGFUSE_EMULATED=ON
SANITIZERS := address,undefined
CHOSEN := torch-$(shell echo '$(TORCH)' | tr -c 'A-Za-z0-9.\n' '-')

.PHONY: demo test sanitize lint clean

demo: .venv/demo/installed
	.venv/demo/bin/segfuse demo

test: .venv/test/installed
	.venv/test/bin/python -m pytest $(PYTEST)

# Python itself is not instrumented, so the sanitizer's library is loaded before it; leaks are not
# looked for, since Python and torch have their own at exit.  Compilation is left out: under the
# sanitizer it takes minutes and runs the same kernels.
sanitize: build/sanitized/installed
	PYTHONPATH=build/sanitized ASAN_OPTIONS=detect_leaks=0 \
	LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libubsan.so)" \
	.venv/test/bin/python -m pytest $(PYTEST) -s tests/test_ops.py tests/test_crop_concat.py \
	  tests/test_weighted_cross_entropy.py tests/test_confusion_matrix.py tests/test_tiles.py \
	  tests/test_label_distances.py tests/test_elastic_deform.py tests/test_deconv_upsample.py \
	  tests/test_upsample_argmax.py tests/test_upsample_cross_entropy.py \
	  -k "not compile and not opcheck"

lint: .venv/lint/installed
	PATH="$(CURDIR)/.venv/lint/bin:$$PATH" pre-commit run --all-files

clean:
	rm -rf .venv build

.venv/%/bin/python:
	$(PYTHON) -m venv .venv/$* || { \
	  echo "make: no virtual environment (Debian, Ubuntu: apt install python3-venv)"; exit 1; }
	.venv/$*/bin/python -m pip install -q --upgrade pip

.venv/%/$(CHOSEN): .venv/%/bin/python
	rm -f .venv/$*/torch-*
	.venv/$*/bin/python -m pip install -q "$(TORCH)"
	touch $@

.venv/demo/installed: .venv/demo/$(CHOSEN) $(SOURCES)
	.venv/demo/bin/python -m pip install -q ".[demo]"
	touch $@

.venv/test/installed: .venv/test/$(CHOSEN) $(SOURCES)
	.venv/test/bin/python -m pip install -q ".[test]" -C$(TESTED)
	touch $@

build/sanitized/installed: .venv/test/installed
	rm -rf build/sanitized
	.venv/test/bin/python -m pip install -q . --no-deps --target build/sanitized \
	  -Cbuild-dir=build/sanitized-objects -C$(TESTED) -Ccmake.define.SEGFUSE_CUDA=OFF \
	  -Ccmake.define.SEGFUSE_SANITIZE=$(SANITIZERS)
	touch $@

.venv/lint/installed: .venv/lint/$(CHOSEN) pyproject.toml
	.venv/lint/bin/python -m pip install -q pre-commit mypy ".[demo]"
	touch $@

.SECONDARY:
