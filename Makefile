# `make run` and `make test` do everything on a fresh machine.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: env run test test-environments on-gpu mutants lint compare editors forgetting pretrain clean

env: .venv/.done

.venv/.done: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --requirement requirements.lock
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

.venv/.tools: .venv/.done requirements-dev.lock
	$(BIN)/pip install --quiet --requirement requirements-dev.lock
	touch $@

run: env
	$(BIN)/python train.py

lint: .venv/.tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Two workers of one thread each: faster than one of two, and no more on larger machines, for the sake of memory.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# The numeric and the ledger tests in every numeric environment of today's processors, a line each.
test-environments: .venv/.tools
	tests/environments.sh

# What is measured where there is a GPU, at toy size.
on-gpu: .venv/.tools
	TOY=1 PARTS="b c d f" PYTHON=$(BIN)/python benchmarks/on_gpu.sh build/on_gpu

# Known faults, put into a copy of the project one at a time: the tests have to notice each of them.
mutants: .venv/.tools
	$(BIN)/python tests/mutants.py

# The table and the figure of the README.
compare: env
	rm -rf runs/compare
	$(BIN)/python train.py -m experiment=compare method=rome,r_rome,memit restraint=none,prune,prune_end,prune_restrained
	$(BIN)/python -m prune_lightning.report.compare runs/compare/*-*-* --out docs

# The table and the figure of docs/editing.md, and the figure of docs/stream.md.
editors: env
	rm -rf runs/editors
	$(BIN)/python train.py -m experiment=editors restraint=none,prune,rect \
		method=rome,r_rome,memit,emmet,alphaedit,mend,kn,ft_l,ft_m,lora
	$(BIN)/python -m prune_lightning.report.compare runs/editors/*-*-* --out docs/editors

forgetting: env
	rm -rf runs/forgetting
	$(BIN)/python train.py -m experiment=forgetting method=rome,r_rome,memit,emmet,alphaedit restraint=none
	$(BIN)/python -m prune_lightning.report.compare runs/forgetting/*-*-* --out docs --figures forgetting

# Train the bundled model from scratch (about half an hour on two cores).
pretrain: env
	$(BIN)/python train.py experiment=pretrain_bundled hydra.run.dir=runs/pretrain_bundled

clean:
	rm -rf .venv build *.egg-info
