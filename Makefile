# `make demo` and `make test` do all their own set-up; nothing else needs to be installed first.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
MODULES := action_units.py arguments.py configuration_au_llava.py modeling_au_llava.py processing_au_llava.py readout_au_llava.py \
	recognition_au_llava.py grammar_au_llava.py evidence_au_llava.py templates_au_llava.py pipeline_au_llava.py face_alignment.py drawing.py losses.py \
	shared_prefix.py trainer.py adapters.py au_llava/*.py
RENDERS ?= 23250
DATA := data/synthetic
OTHER := data/other

.PHONY: demo test test-matrix lint format checkpoint clean

demo: $(VENV)/installed
	$(VENV)/bin/au-llava demo

# A process for each core, up to eight, and one thread in each: the models are tiny.
TEST := pytest --numprocesses auto --maxprocesses 8 --dist worksteal

test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(RUN) -m $(TEST)

# The tests with the lowest versions that pyproject.toml allows, and with the newest ones. About 5 GB; minutes to install.
FLOOR_TORCH ?= torch==2.9.*
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
	OMP_NUM_THREADS=1 .matrix/floor/bin/python -m $(TEST)
	$(PYTHON) -m venv .matrix/newest
	.matrix/newest/bin/pip install --quiet --upgrade "$(NEWEST_TORCH)"
	.matrix/newest/bin/pip install --quiet --upgrade --editable ".[dev]"
	OMP_NUM_THREADS=1 .matrix/newest/bin/python -m $(TEST)

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

# The default checkpoint from nothing. Every stage resumes where it was stopped. About six hours on two cores.
checkpoint: $(VENV)/installed
	$(RUN) -m au_llava.datasets_scripts.synthetic_faces --output_dir $(DATA) --split train --limit $(RENDERS)
	$(RUN) -m au_llava.datasets_scripts.synthetic_faces --output_dir $(DATA) --split validation --limit 1000
	$(RUN) -m au_llava.datasets_scripts.synthetic_faces --output_dir $(OTHER) --split train --seed 2023 --varied 1 --limit 15000
	$(RUN) -m checkpoint.pretrain --data_dir $(DATA) $(OTHER) --output_dir runs/encoder --epochs 30
	$(RUN) -m checkpoint.assemble --encoder runs/encoder --data_dir $(DATA) --output_dir runs/start
	$(RUN) -m checkpoint.language --model runs/start --data_dir $(DATA) --output_dir runs/language
	$(RUN) train_sft.py --config recipes/checkpoint.yaml
	$(RUN) train_sft.py --config recipes/checkpoint.yaml --model runs/checkpoint --output_dir runs/second --num_train_epochs 1.2 --seed 1
	$(RUN) -m checkpoint.reading --model runs/second --data_dir $(DATA) --output_dir runs/reading
	$(RUN) -m checkpoint.practice --model runs/reading --data_dir $(DATA) $(OTHER) --output_dir runs/practice
	$(RUN) -m checkpoint.reading --again --model runs/practice --data_dir $(DATA) --output_dir runs/again
	$(RUN) -m checkpoint.publish --model runs/again --output_dir .
	$(RUN) -m baselines.linear_head --model . --data_dir $(DATA) --test_dir datasets_scripts/synthetic_faces/sample --compute 1.5e14 \
		--calibrate --output runs/linear_head
	$(RUN) evaluate_au.py --model . --dataset synthetic_facs --validation_dir $(DATA) --calibrate --update_card --output runs/evaluation_facs
	$(RUN) evaluate_au.py --model . --dataset synthetic --validation_dir $(DATA) --calibrate --beside runs/linear_head \
		--formats 64 --robustness 30 --update_card --output runs/evaluation

clean:
	rm -rf $(VENV) .matrix demo
