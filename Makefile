# What a maintainer runs. `make setup` first; the other targets use the virtual environment that is active.
.PHONY: setup test slow lint types docs demo wheel clean-install lowest

setup:
	python3 -m venv .venv
	.venv/bin/pip install -q -c .ci/constraints.txt -e ".[test]"

test: lint types
	python -m pytest -n auto --dist loadfile

slow:
	python -m pytest -m slow

lint:
	ruff check .
	ruff format --check .

types:
	mypy

docs:
	mkdocs build --strict

demo:
	python demo/app.py

wheel:
	rm -rf dist
	python -m build

# The wheel in clean environments, with each Python and the lowest and highest Transformers: downloads PyTorch each time
clean-install:
	.ci/clean python3.11 python3.12 python3.13

# All tests with the lowest versions that setup.py allows
lowest:
	.ci/lowest
