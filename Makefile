PYTHON ?= python3
BIN := .venv/bin
READY := .venv/requirements-installed

.PHONY: run test lab benchmark execute figures

run: $(READY)  ## run the notebook on toy data; an executed copy and an HTML page in build/
	mkdir -p build data && cp -R figures build/
	$(BIN)/python -m papermill DLRM.ipynb build/DLRM.ipynb
	$(BIN)/python -m nbconvert --log-level=ERROR --to html --embed-images build/DLRM.ipynb
	@echo "Executed notebook: build/DLRM.ipynb   Page: build/DLRM.html"

test: $(READY)  ## every test, and every stored output of the notebook compared with a fresh one
	mkdir -p data
	$(BIN)/python -m pytest --nbval --nbval-current-env --nbval-cell-timeout=600 DLRM.ipynb tests

lab: $(READY)  ## open the notebook in JupyterLab
	$(BIN)/python -m jupyterlab DLRM.ipynb

benchmark: $(READY)  ## measure; each program prints a small table
	for program in tests/benchmarks/*.py; do $(BIN)/python $$program || exit 1; done

execute: $(READY)  ## after an edit: run the notebook in place, top to bottom, so that it can be committed
	$(BIN)/python -m nbconvert --log-level=ERROR --to notebook --execute --inplace --coalesce-streams --ExecutePreprocessor.record_timing=False DLRM.ipynb

figures: $(READY)  ## draw figures/*.svg again
	$(BIN)/python figures/make_figures.py

$(READY): requirements.txt requirements-torchrec.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement requirements-torchrec.txt
	touch $(READY)
