# Everything runs in .venv, made on first use and made anew when the versions change.
PYTHON ?= python3
BIN := .venv/bin
VENV_STAMP := .venv/.installed
PARITY_STAMP := .venv-parity/.installed
FUZZ_STAMP := .venv-fuzz/.installed
# seconds that `make fuzz` goes on for each target
SECONDS ?= 600

.PHONY: quickstart quickstart-grpo test kills fuzz parity check lint types format bench-dpo bench-offline bench-saving bench-grpo docs clean

quickstart: $(VENV_STAMP)  ## a model from nothing, SFT, then DPO, and what changed
	$(BIN)/prefopt quickstart

quickstart-grpo: $(VENV_STAMP)  ## a task learnt from rewards, one that stalls, and the way out
	$(BIN)/prefopt quickstart grpo

# one thread a process: the models are tiny, and threads that wait for each other cost more
test: $(VENV_STAMP)  ## every test, a process for each core
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n auto --dist worksteal

kills: $(VENV_STAMP)  ## 100 kills of each kind of run at random moments: every one ends as if nothing had happened
	PREFOPT_KILLS=100 OMP_NUM_THREADS=1 $(BIN)/pytest -q -n auto tests/faults/test_kills.py

fuzz: $(FUZZ_STAMP)  ## readers, shapes, recipes and the sandbox's messages, SECONDS=600 each; what crashes is kept as a test
	OMP_NUM_THREADS=1 .venv-fuzz/bin/python tests/fuzz/fuzz.py $(SECONDS)

parity: $(PARITY_STAMP)  ## loss and gradient of every row beside TRL's own trainers, in an environment of its own
	OMP_NUM_THREADS=1 .venv-parity/bin/pytest -q tests/parity

check: lint types test  ## what a change must pass

lint: $(VENV_STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV_STAMP)
	$(BIN)/mypy

format: $(VENV_STAMP)  ## write the format and the fixes that are safe
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench-dpo: $(VENV_STAMP)  ## pairs a second and memory, beside TRL
	$(BIN)/python benchmarks/offline.py dpo

bench-offline: $(VENV_STAMP)  ## the same for KTO, ORPO, SFT and the reward model
	$(BIN)/python benchmarks/offline.py kto orpo sft reward --shapes 15M --precisions bfloat16

bench-saving: $(VENV_STAMP)  ## checkpoints beside safetensors, and training while one is written
	$(BIN)/python benchmarks/saving.py

bench-grpo: $(VENV_STAMP)  ## generation alone beside transformers, and the whole GRPO step beside TRL
	$(BIN)/python benchmarks/grpo.py

docs: $(VENV_STAMP)  ## write the parts of docs/ that repeat what the source says
	$(BIN)/python docs/generate.py

clean:
	rm -rf .venv .venv-parity .venv-fuzz build dist .mypy_cache .ruff_cache .pytest_cache

# $(1): its folder, $(2): the group of optional dependencies it gets
define environment
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "prefopt needs Python 3.11 or newer and $(PYTHON) is older or missing; try: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 1; }
	@$(1)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(1) || { \
	  echo "$(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv" >&2; rm -rf $(1); exit 1; }
	$(1)/bin/python -m pip install -q -c constraints.txt -e ".[$(2)]"
	@touch $@
endef

$(VENV_STAMP): pyproject.toml constraints.txt
	$(call environment,.venv,dev)

$(PARITY_STAMP): pyproject.toml constraints.txt
	$(call environment,.venv-parity,parity)

$(FUZZ_STAMP): pyproject.toml constraints.txt
	$(call environment,.venv-fuzz,fuzz)
