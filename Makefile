# `make demo` and `make test` set everything up by themselves: a virtual environment in .venv, from locked requirements.
.PHONY: demo test slow check format lint types imports docs examples lock clean
VENV := .venv
# Compiled modules are kept: the tests start hundreds of processes, and each would compile all that it imports.
unexport PYTHONDONTWRITEBYTECODE
PY := $(VENV)/bin/python
READY := $(VENV)/.ready

demo: $(READY)
	@$(VENV)/bin/apprentice demo $(ARGS)

test: $(READY)
	@$(PY) -m pytest -n 2 -m "not slow" $(ARGS)

slow: $(READY)
	@$(PY) -m pytest -m slow $(ARGS)

check: format lint types imports test docs examples

format: $(READY)
	@$(VENV)/bin/ruff format --check .
lint: $(READY)
	@$(VENV)/bin/ruff check .
types: $(READY)
	@$(VENV)/bin/mypy
imports: $(READY)
	@$(VENV)/bin/lint-imports --no-cache
docs: $(READY)
	@$(PY) docs/generate.py --check
examples: $(READY)
	@$(PY) -m pytest tests/test_examples.py $(ARGS)

bench-%: $(READY)
	@$(PY) -m benches.$* $(ARGS)

$(READY): pyproject.toml requirements/dev.txt
	@PY312=$$(command -v python3.12) || { echo "Apprentice needs Python 3.12 or newer: python3.12 is not on the PATH" >&2; exit 1; }; \
	 "$$PY312" -c 'import venv, ensurepip' 2>/dev/null || { echo "python3.12 lacks the venv module (Debian: apt-get install python3.12-venv)" >&2; exit 1; }; \
	 [ -x $(PY) ] || "$$PY312" -m venv $(VENV)
	@$(PY) -m pip install -q --disable-pip-version-check --require-hashes -r requirements/uv.txt
	@$(VENV)/bin/uv pip install -q --python $(PY) --require-hashes -r requirements/dev.txt
	@$(VENV)/bin/uv pip install -q --python $(PY) --no-deps --no-build-isolation -e .
	@touch $@

# All extras but those of training: torch is gigabytes, and only the slow tests of training need it.
EXTRAS = $$($(PY) -c "import tomllib; print(*(f'--extra {name}' for name in tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies'] if name not in ('train', 'unsloth', 'axolotl', 'mlx')))")

lock:
	@$(VENV)/bin/uv pip compile -q --no-emit-index-url --generate-hashes --universal --python-version 3.12 $(EXTRAS) --group dev pyproject.toml -o requirements/dev.txt
	@echo uv | $(VENV)/bin/uv pip compile -q --no-emit-index-url --generate-hashes --universal --python-version 3.12 - -o requirements/uv.txt

clean:
	rm -rf $(VENV)
