PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

PORT ?= 8000

.PHONY: demo serve test soak bench profile picture screenshots lint format clean

demo: $(VENV)/.ready
	$(BIN)/python example_project/demo.py

# The example project, in a browser: make serve PORT=9000, make serve QUEUE=db
serve: $(VENV)/.ready
	@$(BIN)/python example_project/serve.py $(PORT) $(if $(QUEUE),--queue $(QUEUE))

test: lint
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest --numprocesses auto --dist loadfile
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

# A long run with faults in 5% of the server's replies.
soak: $(VENV)/.ready
	SOAK_MESSAGES=20000 $(BIN)/pytest -q -rP tests/test_faults.py -k long_run

# All cases, or some: make bench CASES="batch loopback_batch"
bench: $(VENV)/.bench benchmarks/peers/node_modules
	$(BIN)/python -m benchmarks $(CASES) --json build/benchmarks.json --chart docs/benchmarks.svg

# Where the CPU goes in one send_messages().
profile: $(VENV)/.ready
	$(BIN)/python -m benchmarks.cpu_profile

# The runs of smtpcheck that the README shows.
picture: $(VENV)/.ready
	$(BIN)/python -m docs.smtpcheck_picture

# The pages of the example that the README shows, in Chromium.
screenshots: $(VENV)/.ready
	$(BIN)/python -m docs.screenshots

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .tox build dist benchmarks/peers/node_modules .coverage .coverage.* .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Built anew where it is missing, half made, or older than the metadata.
$(VENV)/.ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed")'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

$(VENV)/.bench: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]'
	touch $@

# nodemailer, which the benchmarks skip where it cannot be had.
benchmarks/peers/node_modules: benchmarks/peers/package.json
	-cd $(@D) && npm install --silent --no-package-lock --no-audit --no-fund && touch $(@F)
