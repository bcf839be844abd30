PYTHON ?= python3
BIN := .venv/bin
READY := .venv/requirements-installed
# Two processes of one thread each: the notebook's cells in one, the other tests in the other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile
BENCHMARKS := $(filter-out %/shared.py %/arithmetic.py, $(wildcard tests/benchmarks/*.py))

.PHONY: run check test lint lab benchmark execute noise figures

run: $(READY)  ## run the notebook on toy data; an executed copy and an HTML page in build/
	mkdir -p build data && cp -R figures build/
	$(BIN)/python -m papermill --progress-bar DLRM.ipynb build/DLRM.ipynb
	$(BIN)/python -m nbconvert --log-level=ERROR --to html --template page \
	    --TemplateExporter.extra_template_basedirs=figures build/DLRM.ipynb
	@echo "Executed notebook: build/DLRM.ipynb   Page: build/DLRM.html"

check: lint  ## after each edit: lint, layout and the fast tests
	$(PYTEST) --quiet -m "not slow" tests

test: lint  ## everything: lint, every test, and the notebook's stored outputs against fresh ones
	mkdir -p data
	$(PYTEST) --durations=10

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

lab: $(READY)  ## open the notebook in JupyterLab
	$(BIN)/python -m jupyterlab DLRM.ipynb

benchmark: $(READY)  ## measure; each program prints a small table
	for program in $(BENCHMARKS); do $(BIN)/python $$program || exit 1; done

execute: $(READY)  ## after an edit: run the notebook in place, top to bottom, so that it can be committed
	$(BIN)/python -m nbconvert --log-level=ERROR --to notebook --execute --inplace \
	    --coalesce-streams --ExecutePreprocessor.record_timing=False DLRM.ipynb
	$(BIN)/python -c "$$WITHOUT_RATINGS"
	-$(BIN)/python tests/notebook_numbers.py

noise: $(READY)  ## after `execute`: how far each compared number of the notebook scatters
	$(BIN)/python tests/benchmarks/arithmetic.py

# MovieLens may not be passed on: what the ratings taught is not stored in the notebook.
define WITHOUT_RATINGS
import nbformat
notebook = nbformat.read("DLRM.ipynb", 4)
for cell in notebook.cells:
    if cell.id == "section-10-live":
        cell.outputs = []
nbformat.write(notebook, "DLRM.ipynb")
endef
export WITHOUT_RATINGS

figures: $(READY)  ## draw figures/*.svg again
	$(BIN)/python figures/make_figures.py

# Without compiling what is installed: Python does that at the first import, and only for what is
# imported. This halves the time. TorchRec's CPU build exists for Linux on x86-64 alone.
$(READY): requirements.txt requirements-torchrec.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile --requirement requirements.txt
	test "$$(uname -sm)" != "Linux x86_64" || $(BIN)/python -m pip install --quiet --no-compile \
	    --no-deps --requirement requirements-torchrec.txt
	touch $(READY)
