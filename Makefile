# make setup: .venv with kdpipe    make test: lint, types, tests    make demo: the main job in miniature
# A test that fails is run once more and told of as rerun: engines and kills share two cores with it.
# On a GPU machine `make setup EXTRA=cuda` installs the CUDA build of vLLM.

PYTHON ?= python3
EXTRA ?= cpu
STAMP := .venv/.set-up-$(EXTRA)

.PHONY: setup test demo lint clean

setup: $(STAMP)

$(STAMP): pyproject.toml .dev/setup.sh .dev/constraints.txt .dev/peers.txt pipeline/wheels.py
	bash .dev/setup.sh "$(PYTHON)" "$(EXTRA)"
	touch $@

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/basedpyright --level error

test: lint
	.venv/bin/python -m pytest -n 2 --dist loadfile --reruns 1 -rfER

demo: setup
	.venv/bin/kdpipe demo

clean:
	rm -rf .venv runs build *.egg-info
