# `make demo` and `make test` do all their own set-up; nothing else needs to be installed first.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
MODULES := action_units.py answers_au_llava.py arguments.py backbones_au_llava.py configuration_au_llava.py modeling_au_llava.py processing_au_llava.py readout_au_llava.py \
	recognition_au_llava.py grammar_au_llava.py evidence_au_llava.py templates_au_llava.py pipeline_au_llava.py face_alignment.py drawing.py losses.py \
	shared_prefix.py trainer.py trained_weights.py training_rows.py adapters.py au_llava/*.py
DATA ?= data/synthetic
OTHER ?= data/other

.PHONY: demo test test-matrix lint format checkpoint rehearsal clean

demo: $(VENV)/installed
	$(VENV)/bin/au-llava demo

# A process for each core, up to eight, and one thread in each: the models are tiny.
PYTEST := pytest --numprocesses auto --maxprocesses 8 --dist worksteal

test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(RUN) -m $(PYTEST)

# The tests with the lowest versions that pyproject.toml allows, and with the newest ones. About 5 GB; minutes to install.
FLOOR_TORCH ?= torch==2.11.*
NEWEST_TORCH ?= torch
define FLOORS
import re, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
for line in wanted:
    name, major, minor = re.match(r"([\w-]+)>=(\d+)(\.\d+)?", line).groups()
    if name != "torch":
        print(f"{name}=={major}{minor or '.0'}.*")
endef
export FLOORS

test-matrix:
	$(PYTHON) -m venv .matrix/floor
	$(PYTHON) -c "$$FLOORS" > .matrix/floors.txt
	.matrix/floor/bin/pip install --quiet "$(FLOOR_TORCH)"
	.matrix/floor/bin/pip install --quiet --constraint .matrix/floors.txt --editable ".[dev]"
	OMP_NUM_THREADS=1 .matrix/floor/bin/python -m $(PYTEST)
	$(PYTHON) -m venv .matrix/newest
	.matrix/newest/bin/pip install --quiet --upgrade "$(NEWEST_TORCH)"
	.matrix/newest/bin/pip install --quiet --upgrade --editable ".[dev]"
	OMP_NUM_THREADS=1 .matrix/newest/bin/python -m $(PYTEST)

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy $(MODULES)

format: $(VENV)/installed
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# torch goes in first and alone: asked for later, as a dependency, pip would take the newest build and its CUDA packages.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --constraint constraints.txt torch
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

# The default checkpoint from nothing; the same command goes on where it was stopped. About six hours on two cores.
# Stages that begin anew each time are done once, for the next ones go on only from the very files that they began with:
# delete a stage's folder, and those of the stages after it, to have it done again.
# How much of each stage: what the default checkpoint takes (docs/checkpoint.md).
RUNS ?= runs
TARGET ?= .
RENDERS ?= 23250
OTHERS ?= 15000
VALIDATION ?= 1000
TEST ?= 4000
ENCODER ?= --epochs 30
SECOND ?= --num_train_epochs 1.2
HEAD ?= --compute 1.5e14
EVALUATION ?= --formats 64 --robustness 30
ONCE = test -f $(1)/processor_config.json ||
FACES := $(RUN) -m au_llava.datasets_scripts.synthetic_faces
# Only some processors multiply 16-bit numbers fast; on the others that is ten times slower than 32 bits.
# Asked when it is first wanted, and once.
FAST = $(eval FAST := $(shell $(RUN) -c "import torch, checkpoint.pretrain as p; print(p.fast_in_bfloat16(torch.device('cpu')))"))$(FAST)

checkpoint: $(VENV)/installed
	$(FACES) --output_dir $(DATA) --split train --limit $(RENDERS)
	$(FACES) --output_dir $(DATA) --split validation --limit $(VALIDATION)
	$(FACES) --output_dir $(DATA) --split test --limit $(TEST)
	$(FACES) --output_dir $(OTHER) --split train --seed 2023 --varied 1 --limit $(OTHERS)
	$(RUN) -m checkpoint.pretrain --data_dir $(DATA) $(OTHER) --output_dir $(RUNS)/encoder $(ENCODER)
	$(call ONCE,$(RUNS)/start) $(RUN) -m checkpoint.assemble --encoder $(RUNS)/encoder --data_dir $(DATA) \
		--output_dir $(RUNS)/start
	$(RUN) -m checkpoint.language --model $(RUNS)/start --data_dir $(DATA) --output_dir $(RUNS)/language $(LESSONS)
	$(RUN) train_sft.py --config recipes/checkpoint.yaml --model $(RUNS)/language --train_data synthetic:$(DATA) \
		--output_dir $(RUNS)/checkpoint --bf16 $(FAST) $(FIRST)
	$(RUN) train_sft.py --config recipes/checkpoint.yaml --model $(RUNS)/checkpoint --train_data synthetic:$(DATA) \
		--output_dir $(RUNS)/second --seed 1 --bf16 $(FAST) $(SECOND)
	$(call ONCE,$(RUNS)/reading) $(RUN) -m checkpoint.reading --model $(RUNS)/second --data_dir $(DATA) \
		--output_dir $(RUNS)/reading $(READING)
	$(RUN) -m checkpoint.practice --model $(RUNS)/reading --data_dir $(DATA) $(OTHER) --output_dir $(RUNS)/practice $(PRACTICE)
	$(call ONCE,$(RUNS)/again) $(RUN) -m checkpoint.reading --again --model $(RUNS)/practice --data_dir $(DATA) \
		--output_dir $(RUNS)/again $(AGAIN)
	test -f $(RUNS)/again/published || $(RUN) -m checkpoint.publish --model $(RUNS)/again --output_dir $(TARGET)
	touch $(RUNS)/again/published
	$(RUN) -m baselines.linear_head --model $(TARGET) --data_dir $(DATA) --calibrate --output $(RUNS)/linear_head $(HEAD)
	$(RUN) evaluate_au.py --model $(TARGET) --dataset synthetic_facs --data_dir $(DATA) --calibrate --update_card \
		--output $(RUNS)/evaluation_facs
	$(RUN) evaluate_au.py --model $(TARGET) --dataset synthetic --data_dir $(DATA) --calibrate --update_card \
		--beside $(RUNS)/linear_head --output $(RUNS)/evaluation $(EVALUATION)

# All stages on a few faces for a few steps, in minutes and apart from the root: what they make is worth nothing.
rehearsal:
	mkdir -p $(RUNS)/rehearsal/published
	$(MAKE) checkpoint RUNS=$(RUNS)/rehearsal TARGET=$(RUNS)/rehearsal/published \
		DATA=$(RUNS)/rehearsal/synthetic OTHER=$(RUNS)/rehearsal/other RENDERS=320 OTHERS=64 VALIDATION=64 TEST=16 \
		ENCODER="--epochs 1" LESSONS="--steps 4" FIRST="--max_steps 3" SECOND="--max_steps 3" \
		READING="--epochs 1" PRACTICE="--steps 6 --versions 1" AGAIN="--epochs 1 --steps 6" HEAD="--compute 1e12" \
		EVALUATION="--formats 4 --robustness 4"

clean:
	rm -rf $(VENV) .matrix demo
